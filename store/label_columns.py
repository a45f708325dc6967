"""Label columns: from the text of one column, to what its cells mean and what kind they are of.

A column is looked at by its distinct values, of which there are few where it holds labels. What it
is said to hold names no cell but numbers below 1000 and words that mean labels.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from ctfm.store.label_words import Words, as_number, plain

MOSTLY = 0.8
"""Share of the filled cells that are labels from which on a column is meant to be a finding."""

LISTED = 5
"""Numbers that are told one by one."""

_DATE = re.compile(r"\d{4}-\d\d?-\d\d?([ T].*)?|\d{1,2}[./]\d{1,2}[./]\d{2,4}( .*)?")
_SIGNS = frozenset("+-")


class Column:
    """One column by its distinct values."""

    def __init__(self, name: str, texts: pa.Array, *, kind: str) -> None:
        encoded = texts.fill_null("").dictionary_encode()
        self.name, self.kind = name, kind
        self.values: list[str] = encoded.dictionary.to_pylist()
        self.codes: Int64[np.ndarray, " n"] = encoded.indices.to_numpy(zero_copy_only=False)

    @property
    def texts(self) -> list[str]:
        """Every cell, without space around it."""
        values = [value.strip() for value in self.values]
        return [values[code] for code in self.codes]

    @cached_property
    def counts(self) -> Int64[np.ndarray, " v"]:
        """Cells of each distinct value."""
        counted: Int64[np.ndarray, " v"] = np.bincount(self.codes, minlength=len(self.values))
        return counted

    def cells(self, wanted: Callable[[str], bool]) -> int:
        """How many cells hold a value that is wanted."""
        return sum(
            int(n) for value, n in zip(self.values, self.counts, strict=True) if wanted(value)
        )

    def lines(self, wanted: Callable[[str], bool]) -> list[int]:
        """Which lines hold one."""
        codes = [code for code, value in enumerate(self.values) if wanted(value)]
        return [int(line) for line in np.flatnonzero(np.isin(self.codes, codes))]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A column as labels."""

    meanings: dict[str, float | None]
    """Of each distinct value: 1, 0, NaN for unknown, None for what is no label."""
    column: Column

    @classmethod
    def of(cls, column: Column, words: Words) -> "Labels":
        """What the cells of a column mean."""
        meanings = {value: words.meaning(value) for value in column.values}
        decided = {plain(value) for value, one in meanings.items() if one is None or one == one}
        if decided == _SIGNS:  # beside a plus a minus means negative; alone it may mean nothing
            meanings.update({value: 0.0 for value, one in meanings.items() if one is None})
        return cls(meanings=meanings, column=column)

    @property
    def y(self) -> Float32[np.ndarray, " n"]:
        """1, 0 or NaN; NaN also where a cell is no label."""
        known = [self.meanings[value] for value in self.column.values]
        numbers = np.array([np.nan if one is None else one for one in known], dtype=np.float32)
        taken: Float32[np.ndarray, " n"] = numbers[self.column.codes]
        return taken

    @cached_property
    def strays(self) -> int:
        """Cells that are no label."""
        return self.column.cells(lambda value: self.meanings[value] is None)

    @cached_property
    def decided(self) -> int:
        """Cells that are positive or negative."""
        return self.column.cells(lambda value: self.meanings[value] in (0.0, 1.0))

    @property
    def mostly(self) -> bool:
        """Whether the column is meant to be a finding, though some cells are no label."""
        return self.decided >= MOSTLY * (self.decided + self.strays)

    def said(self) -> str:
        """Which words mean what."""
        signs = {1.0: "positive", 0.0: "negative"}
        words: dict[str, list[str]] = {"positive": [], "negative": [], "unknown": []}
        for value, meaning in self.meanings.items():
            if meaning is not None and plain(value):
                listed = words[signs.get(meaning, "unknown")]
                if plain(value) not in listed:
                    listed.append(plain(value))
        parts = [f"{' '.join(sorted(one))}: {what}" for what, one in words.items() if one]
        return "; ".join(parts) or "no label in any row"


def kinds_of(values: Iterable[str]) -> str:
    """Values as they may be shown: a few small numbers, else what kind they are."""
    texts = [value.strip() for value in values]
    numbers = [as_number(text) for text in texts]
    small = sorted({one for one in numbers if one is not None and abs(one) < 1000})
    kinds = [
        f"{len(small)} different numbers" if len(small) > LISTED else ", ".join(map(_number, small))
    ]
    if any(one is not None and abs(one) >= 1000 for one in numbers):
        kinds.append("large numbers")
    words = [text for text, one in zip(texts, numbers, strict=True) if one is None]
    dates = [text for text in words if _DATE.fullmatch(text)]
    if dates:
        kinds.append("dates")
    if len(words) > len(dates):
        kinds.append("text")
    if "-" in words:
        kinds.append("- (negative or unknown?)")
    return " and ".join(filter(None, kinds))


def _number(value: float) -> str:
    return format(value, "g")
