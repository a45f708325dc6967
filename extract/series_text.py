"""Series text: from the free text of a header, to what it says of contrast medium and of maps.

Negation is by scope, as in a report (NegEx, Chapman et al. 2001, doi:10.1006/jbin.2001.1029): a
word such as `without` denies the words after it until punctuation, a word that is no part of the
vocabulary, or one that begins another part (`and`, `then`, `with`); a word such as `none` denies
the one before it. `without` alone, before nothing or before words that stand in a description
anyway (`HEAD WO 5MM`), means contrast medium.

Which says more: a localizer; a map; contrast medium (`with`, `KM`, `arterial phase`); that none was
given (`NCCT`, `ohne KM`); the name of an examination (`CTA`), as protocols are named for all their
series. What no word of the vocabulary tells is unknown, which is not contrast.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ctfm.extract.series_words import Vocabulary, Word, vocabulary
from ctfm.store.reasons import Reason

_DENIES = {"without", "not"}
_DENY_AN_AGENT = {"not", "without", "plain", "no_contrast", "denied"}
_STAY = {"view", "feature", "filler"}
"""Meanings that a denial reaches across, and that may follow `without` though it means contrast."""
_BREAK = ","
_TELLS = {":", "=", "-"}
"""What may stand between a field and its value."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a text says, and the word of the vocabulary that says it."""

    reason: Reason
    """`OK`: no contrast medium was given."""
    word: str


@dataclass
class _Reading:
    """What was found while a text was read."""

    localizer: str = ""
    derived: str = ""
    contrast: str = ""
    procedure: str = ""
    plain: str = ""
    joined: bool = False
    """Whether the examination and the denial are joined by `and` or the like: both were done."""
    only_views: bool = True
    """Whether there is nothing but words such as `lateral`."""
    last: str = field(default="", repr=False)
    between: bool = False


def description_words() -> Vocabulary:
    """The words that are sought in descriptions."""
    kinds = (
        "localizer",
        "localizer_view",
        "derived",
        "contrast",
        "procedure",
        "plain",
        "no_contrast",
    )
    grammar = ("without", "not", "denied", "with", "after", "neutral")
    return vocabulary(*kinds, *grammar, *sorted(_STAY))


@lru_cache(maxsize=1 << 16)
def read_description(text: str) -> Told | None:
    """What a series description says; None if nothing that decides."""
    words = description_words().words(text)
    reading = _read(words)
    if reading.localizer:
        return Told(reason=Reason.LOCALIZER, word=reading.localizer)
    if reading.derived:
        return Told(reason=Reason.DERIVED, word=reading.derived)
    if reading.contrast:
        return Told(reason=Reason.CONTRAST, word=reading.contrast)
    if reading.procedure and (reading.joined or not reading.plain):
        return Told(reason=Reason.CONTRAST, word=reading.procedure)
    return Told(reason=Reason.OK, word=reading.plain) if reading.plain else _view(words)


def _view(words: Sequence[Word]) -> Told | None:
    """A radiograph named by its direction (`AP`, `Lateral`), if the text has no other word."""
    views = [word for word in words if "localizer_view" in word.meanings]
    others = [word for word in words if word.text.isalpha() and word not in views]
    return Told(reason=Reason.LOCALIZER, word=views[0].text) if views and not others else None


def _read(words: Sequence[Word]) -> _Reading:
    reading = _Reading()
    denial: Word | None = None
    for at, word in enumerate(words):
        meanings = word.meanings
        after = words[at + 1 :]
        if {"contrast", "with"} <= meanings:
            denial = None
        if "contrast" in meanings and not _denied_after(after):
            if denial is None:
                reading.contrast = reading.contrast or word.text
            else:
                _note_plain(reading, denial)
        elif meanings & {"contrast", "plain", "no_contrast"}:
            _note_plain(reading, word)
            denial = word if "no_contrast" in meanings else denial
        elif "procedure" in meanings:
            _note_procedure(reading, word, denial)
            denial = None
        elif "derived" in meanings or "localizer" in meanings:
            if denial is None or denial is not words[at - 1]:
                _note_kind(reading, word)
            denial = None
        elif meanings & _DENIES and not _is_number_sign(word, after):
            denial = word
            if "without" in meanings and _is_elided(after):
                _note_plain(reading, word)
        elif "with" in meanings:
            denial = None
            if _is_elided(after) or _denies_next(after):
                reading.contrast = reading.contrast or word.text
        elif "after" in meanings:
            denial = None
            reading.between = True
        elif not meanings & _STAY and not _is_gap(word, words[at - 1] if at else None):
            denial = None
    return reading


def _note_plain(reading: _Reading, word: Word) -> None:
    _note_joined(reading, "plain")
    reading.plain = reading.plain or word.text


def _note_procedure(reading: _Reading, word: Word, denial: Word | None) -> None:
    if denial is not None:
        _note_plain(reading, denial)
        return
    _note_joined(reading, "procedure")
    reading.procedure = reading.procedure or word.text


def _note_joined(reading: _Reading, kind: str) -> None:
    if reading.between and reading.last not in ("", kind):
        reading.joined = True
    reading.last, reading.between = kind, False


def _note_kind(reading: _Reading, word: Word) -> None:
    if "localizer" in word.meanings:
        reading.localizer = reading.localizer or word.text
    else:
        reading.derived = reading.derived or word.text


def _is_gap(word: Word, before: Word | None) -> bool:
    """Numbers and signs, and punctuation right after a denial (`W/O (CONTRAST)`)."""
    denies = before is not None and bool(before.meanings & _DENIES)
    return not word.text.isalpha() and (word.text != _BREAK or denies)


def _is_elided(after: Sequence[Word]) -> bool:
    """Whether what `with` or `without` speaks of is left out: only known words follow, or none."""
    if not after:
        return True
    following = after[0]
    return bool(following.meanings & {"view", "after", "derived"}) or not following.text.isalpha()


def _denies_next(after: Sequence[Word]) -> bool:
    """Whether a denial follows: `W/WO`, `mit und ohne`."""
    rest = [word for word in after[:3] if "after" not in word.meanings and word.text.isalpha()]
    return bool(rest) and bool(rest[0].meanings & _DENIES)


def _denied_after(after: Sequence[Word]) -> bool:
    """Whether a denial of what stands before follows: `: none`, `(NO)`, `not given`, `: 0`."""
    rest = [word for word in after if word.text not in _TELLS]
    if not rest:
        return False
    if rest[0].number and after[0].text in _TELLS:
        return _is_zero(rest[0])
    bracketed = rest[0].text == _BREAK and len(rest) > 1
    denial, *others = rest[1:] if bracketed else rest
    if "denied" not in denial.meanings:
        return False
    ends = not others or others[0].text == _BREAK or "filler" in others[0].meanings
    # `CONTRAST NO 2` is a number, and `CONTRAST NO MOTION` denies something else.
    return ends or ("not" not in denial.meanings and not bracketed)


def _is_zero(word: Word) -> bool:
    return bool(word.number) and float(word.number.replace(",", ".")) == 0


def _is_number_sign(word: Word, after: Sequence[Word]) -> bool:
    """Whether `no` stands for number: `SERIES NO 2`."""
    return word.text == "no" and bool(after) and after[0].text == "#"


@lru_cache(maxsize=1 << 12)
def read_agent(text: str) -> Told | None:
    """What a field for the agent says: `CONTRAST`, `OK` for none, or None for nothing.

    Any text is the name of an agent, unless it denies one or says that it is unknown.
    """
    words = _agent_words().words(text)
    told = _read(words)
    if told.contrast:
        return Told(reason=Reason.CONTRAST, word=told.contrast)
    denials = [word for word in words if word.meanings & _DENY_AN_AGENT]
    fillers = [word for word in words if "filler" in word.meanings]
    rest = [word for word in words if not _says_nothing(word)]
    given = fillers and not denials and not any(map(_is_zero, words))
    # `NOT GIVEN, TRAUMA` denies an agent; `NO REACTION` does not.
    clear = told.plain or any(" " in word.text and "denied" in word.meanings for word in denials)
    if given or (rest and not clear):
        return Told(reason=Reason.CONTRAST, word="")
    return Told(reason=Reason.OK, word=denials[0].text) if denials else None


def _agent_words() -> Vocabulary:
    kinds = ("contrast", "plain", "no_contrast", "unknown", "enteral")
    return vocabulary(*kinds, "without", "not", "denied", "with", "after", "neutral", "filler")


def _says_nothing(word: Word) -> bool:
    nothing = _DENY_AN_AGENT | {"unknown", "filler", "contrast", "neutral", "enteral"}
    if word.number:
        return _is_zero(word)
    return bool(word.meanings & nothing) or not any(map(str.isalnum, word.text))


@lru_cache(maxsize=1 << 12)
def is_enteral(route: str) -> bool:
    """Whether a route does not lead to the vessels of the head (`ORAL`)."""
    words = vocabulary("contrast", "enteral").words(route)
    meanings = {meaning for word in words for meaning in word.meanings}
    return meanings == {"enteral"}
