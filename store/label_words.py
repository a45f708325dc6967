"""Label words: from a cell of a finding's column, to positive, negative, unknown or none of these.

Words are those of English, German, French, Spanish, Italian, Dutch and Portuguese tables, in any
case, with or without accents. Only words that mean one thing are here: "detected", "none" after a
finding's name or a lone "-" are read either way by people, so the user says what they mean. -1 is
CheXpert's "uncertain" (Irvin et al. 2019, arXiv:1901.07031, Sec. 3) and unknown; what is uncertain
is neither a positive nor a negative unless the user says so.
"""

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from ctfm.store.errors import ConfigError

BLANK = "blank"
"""The word that stands for an empty cell where words are given."""

_POSITIVE = (
    "yes y true positive pos present + ja j wahr positiv vorhanden oui vrai positif si verdadero "
    "positivo presente vero sim"
)
_NEGATIVE = (
    "no n false negative neg absent nein falsch negativ non faux negatif falso negativo ausente "
    "assente nee nao"
)
_UNKNOWN = (
    "na n/a nan null none <na> #n/a ? ?? . unk unknown missing unbekannt uncertain unclear unsure "
    "equivocal indeterminate unklar fraglich"
)
_MORE_NEGATIVE = ("not present", "nicht vorhanden")
_MORE_UNKNOWN = ("not available", "k.a.", "k. a.")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?")
# "1,000" is one or a thousand.
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,(\d{1,2}|\d{4,})?")
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-"})
_LONGEST = 40
"""Characters of the longest cell that is looked at as a word."""


def plain(text: str) -> str:
    """A word as it is compared: no case, accents or space around it; a number in one form."""
    text = text.strip().translate(_MINUS)
    if not text or len(text) > _LONGEST:
        return text
    if (number := as_number(text)) is not None:
        return format(number + 0.0, "g")  # -0 is 0
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(one for one in parts if not unicodedata.combining(one))


def as_number(text: str) -> float | None:
    """A number with decimal point or comma, None if it is none or may be two."""
    text = text.strip().lower().translate(_MINUS)
    if _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    return float(text) if _NUMBER.fullmatch(text) else None


def is_missing(text: str) -> bool:
    """Whether a cell of an id, a patient or a split holds nothing."""
    return not text.strip() or plain(text) in _MISSING


_MISSING = frozenset(["na", "n/a", "nan", "null", "none", "<na>", "#n/a"])


@dataclass(frozen=True)
class Words:
    """What cells mean; `Words.given` makes it."""

    positive: frozenset[str]
    negative: frozenset[str]
    unknown: frozenset[str]

    @classmethod
    def given(
        cls, positive: Iterable[str], negative: Iterable[str], uncertain: Iterable[str]
    ) -> "Words":
        """The usual words and those that a user gives, which come first.

        A number other than -1 given for positive or negative, or 1 and 0 turned round, means that
        the table has codes of its own: then 1, 0 and -1 mean only what was given.

        Raises:
            ConfigError: If a word is given two meanings.
        """
        own = [
            frozenset(plain("" if word.strip().lower() == BLANK else word) for word in words)
            for words in (positive, negative, uncertain)
        ]
        twice = (own[0] & own[1]) | (own[0] & own[2]) | (own[1] & own[2])
        if twice:
            raise ConfigError(
                f"a word means one thing: {sorted(twice)[0]!r} is given as two of --positive, "
                "--negative and --uncertain"
            )
        usual = [
            frozenset([*_POSITIVE.split(), "1"]),
            frozenset([*_NEGATIVE.split(), *_MORE_NEGATIVE, "0"]),
            frozenset([*_UNKNOWN.split(), *_MORE_UNKNOWN, "", "-1"]),
        ]
        codes = {"1", "0", "-1"} if _has_codes(own[0], own[1]) else set()
        said = own[0] | own[1] | own[2] | codes
        return cls(*(mine | (theirs - said) for mine, theirs in zip(own, usual, strict=True)))

    def meaning(self, text: str) -> float | None:
        """1, 0, NaN for unknown, None for what is no label."""
        word = plain(text)
        if word in self.positive:
            return 1.0
        if word in self.negative:
            return 0.0
        return math.nan if word in self.unknown else None


def _has_codes(positive: frozenset[str], negative: frozenset[str]) -> bool:
    numbers = {
        (word, sign)
        for sign, words in ((1, positive), (0, negative))
        for word in words
        if as_number(word) is not None and word != "-1"
    }
    return not numbers <= {("1", 1), ("0", 0)}
