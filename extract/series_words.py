"""Series words: from the free text of a header, to the words of a vocabulary in it.

A text is cut at spaces, punctuation, digits and changes of case, and loses its accents:
`CTAHead_0.6`, `AX_MIPs` and `artériel` are read like `CTA head 0.6`, `ax mips` and `arteriel`.
Words are sought as whole pieces, the longest first, so that `octave` and `lactation` hold no CTA.

The vocabulary lies in `vocabulary/`: a file for each meaning, a table for each language. There `#`
is any number, `*` any rest of a word, and a space any separator or none.
"""

import importlib.resources
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

_LETTERS = str.maketrans(
    {"ł": "l", "Ł": "L", "ø": "oe", "Ø": "OE", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE"}
    | {"ß": "ss", "ı": "i", "đ": "d", "Đ": "D", "±": "+-", "–": "-", "−": "-", "\\": " "}
)
_SIGN_IN_BRACKETS = re.compile(r"\(\s*([+-]|\+/-)\s*\)")
_PIECE = re.compile(
    r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+"  # CTAHead: CTA Head; MIPs comes together again below
    r"|\d+(?:[.,]\d+)?|\.\d+"
    r"|[^\W\d_A-Za-z]+"  # letters of other scripts
    r"|\S"
)
_BREAKS = set(",;()[]{}|")
_SIGNS = set("+-/&:=")
_MAX_PIECES = 6
_MAX_RUN = 40
_MAX_CHARACTERS = 256
"""Of a text; SeriesDescription has 64 (PS3.5, LO)."""
_SHORT = {"wo", "ct", "km", "hn", "iv", "ax"}
"""Words of two letters that may be part of a run of words without any separator."""


class Piece(NamedTuple):
    """A run of letters, a number or a sign, in lower case and without accents."""

    text: str
    """`#` for a number, `,` for what parts a description."""
    gap: str
    """What stands before it: `` (nothing), `-`, `/`, `.` or a space."""
    number: str = ""
    """Its digits, of a number."""


class Word(NamedTuple):
    """A word of the vocabulary, or a piece that is none (no meanings)."""

    meanings: frozenset[str]
    text: str
    """As the vocabulary spells it; of a piece that is no word, the piece."""
    number: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """Words of some meanings, ready to be found."""

    exact: dict[str, Word] = field(default_factory=dict)
    spaced: set[str] = field(default_factory=set)
    """Keys of words that may be parted by a space."""
    prefixes: dict[str, Word] = field(default_factory=dict)
    parts: dict[str, Word] = field(default_factory=dict)
    """Words that may lie anywhere inside a piece."""
    phrases: dict[str, list[tuple[str, Word]]] = field(default_factory=dict)
    """By their first piece, those whose last one may go on (`post clip*`)."""

    def add(self, meaning: str, word: str) -> None:
        """Take in a word as a vocabulary file spells it."""
        plain = word.strip("*")
        table = self.exact
        if word.startswith("*"):
            table = self.parts
        elif word.endswith("*"):
            table = self.prefixes
        key = next(_keys(pieces_of(plain.replace("#", " 0 "))))
        key = key.replace("0", "#") if "#" in plain else key
        known = table.get(key)
        table[key] = (
            Word(known.meanings | {meaning}, known.text)
            if known
            else Word(frozenset({meaning}), plain)
        )
        if " " in plain or "_" in plain:
            self.spaced.add(key)
            if table is self.prefixes:
                first = pieces_of(plain)[0].text
                self.phrases.setdefault(first, []).append((key, table.pop(key)))

    def words(self, text: str) -> list[Word]:
        """The words of a text in their order, with the numbers, signs and other pieces between."""
        pieces = pieces_of(text)
        found: list[Word] = []
        start = 0
        while start < len(pieces):
            stop, words = self._longest(pieces, start)
            found += words
            start = stop
        return found

    def _longest(self, pieces: Sequence[Piece], start: int) -> tuple[int, Sequence[Word]]:
        for stop in range(min(len(pieces), start + _MAX_PIECES), start, -1):
            span = pieces[start:stop]
            if (word := self._exactly(span)) and not _is_torn(pieces, start, stop):
                return stop, [word]
        joined = _joined(pieces, start)
        run = "".join(piece.text for piece in pieces[start:joined])
        if joined > start + 1 and (words := self._run(run)):
            return joined, words
        piece = pieces[start]
        return start + 1, self._inside(piece.text) or [Word(frozenset(), piece.text, piece.number)]

    def _exactly(self, span: Sequence[Piece]) -> Word | None:
        apart = any(piece.gap == " " for piece in span[1:])
        for key in _keys(span):
            word = self.exact.get(key)
            if word and (key in self.spaced or not apart):
                return word
        whole = "".join(piece.text for piece in span)
        for key, word in self.phrases.get(span[0].text, ()):
            if whole.startswith(key) and len(key) > len(whole) - len(span[-1].text):
                return word
        return None

    def _inside(self, text: str) -> Sequence[Word]:
        """The words that a piece begins with, holds, or is made of."""
        begins = (self.prefixes.get(text[:length]) for length in range(len(text), 2, -1))
        found = [word for word in begins if word][:1]
        found += [word for part, word in self.parts.items() if part in text]
        return found or (self._run(text) if len(text) > 4 else [])

    def _run(self, text: str, most: int = 4) -> list[Word]:
        """Words without separators between them (`HEADWOCONTRAST`), if they make up the whole."""
        if most == 0 or len(text) > _MAX_RUN:
            return []
        for length in range(len(text), 1, -1):
            head, rest = text[:length], text[length:]
            word = self.exact.get(head) or self.prefixes.get(head)
            if word is None or (length == 2 and head not in _SHORT):
                continue
            if not rest:
                return [word]
            if words := self._run(rest, most - 1):
                return [word, *words]
        return []


def _joined(pieces: Sequence[Piece], start: int) -> int:
    """Where the letters end that begin at a piece without anything between (`CBFmap`)."""
    stop = start + 1
    while stop < len(pieces) and pieces[stop].gap == "" and pieces[stop].text.isalpha():
        stop += 1
    return stop if pieces[start].text.isalpha() else start


def _is_torn(pieces: Sequence[Piece], start: int, stop: int) -> bool:
    """Whether a span of a letter or two is but a part of something like `W80`, `H31s` or `Bv40`."""
    text = pieces[start].text
    if stop - start > 1 or len(text) > 2 or not text.isalpha():
        return False
    after = pieces[stop] if stop < len(pieces) else Piece(" ", " ")
    if after.number and after.gap == "":
        return True
    glued = (start > 0 and pieces[start].gap == "") or (after.gap == "" and after.text != "/")
    return len(text) == 1 and glued


def pieces_of(text: str) -> list[Piece]:
    """Cut a text at separators, digits and changes of case."""
    letters = unicodedata.normalize("NFKD", text[:_MAX_CHARACTERS].translate(_LETTERS))
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return list(_pieces(_SIGN_IN_BRACKETS.sub(r"\1", plain)))


def _pieces(text: str) -> Iterator[Piece]:
    end, gap = 0, " "
    for match in _PIECE.finditer(text):
        piece, start = match[0], match.start()
        gap = _wider(gap, " " if start > end else "")
        end = match.end()
        if piece[-1].isdecimal():
            yield Piece("#", gap, piece)
            gap = ""
        elif piece in _BREAKS:
            yield Piece(",", gap)
            gap = " "
        elif piece in _SIGNS and not (piece == "-" and not _is_minus(text, start)):
            yield Piece(piece, gap)
            gap = ""
        elif piece.isalpha():
            yield Piece(piece.lower(), gap)
            gap = ""
        else:
            gap = _wider(gap, piece if piece in ".-'" else " ")


def _wider(gap: str, other: str) -> str:
    return " " if " " in (gap, other) else other or gap


def _is_minus(text: str, at: int) -> bool:
    """Whether a hyphen denies: at one side of a word (`C-`, `-KM`), or before a lone C (`- C`)."""
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if before.isalpha() and not (after.isalnum() or after in ("-", "+")):
        return True
    outside = not before or before in " _(/["
    if not after:
        return outside
    return outside and (
        after.isalpha() or re.match(r" ?[cC](?![\w+-])", text[at + 1 :]) is not None
    )


def _keys(span: Sequence[Piece]) -> Iterator[str]:
    """What a span may be called in a vocabulary: with its signs or not, with its numbers or `#`."""
    texts = [piece.text for piece in span]
    kinds = [texts]
    if not _SIGNS.isdisjoint(texts) and _SIGNS.isdisjoint((texts[0], texts[-1])):
        kinds.append([text for text in texts if text not in _SIGNS])
    for kind in kinds:
        if "#" in kind:
            numbers = iter([piece.number for piece in span if piece.number])
            yield "".join(next(numbers) if text == "#" else text for text in kind)
        yield "".join(kind)


@cache
def vocabulary(*meanings: str) -> Vocabulary:
    """The words of these meanings, which are names of files."""
    words = Vocabulary()
    for meaning in meanings:
        for _, _, word in vocabulary_words(meaning):
            words.add(meaning, word)
    return words


@cache
def sections(name: str) -> Vocabulary:
    """The words of one file whose tables are the meanings."""
    words = Vocabulary()
    for table, _, word in vocabulary_words(name):
        words.add(table, word)
    return words


def vocabulary_words(name: str) -> list[tuple[str, str, str]]:
    """Table, list and word of every entry of a file of the vocabulary."""
    folder = importlib.resources.files("ctfm.extract") / "vocabulary"
    tables = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
    return [
        (table, group, word)
        for table, groups in tables.items()
        for group, words in groups.items()
        for word in words
    ]
