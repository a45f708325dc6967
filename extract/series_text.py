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
from dataclasses import dataclass
from functools import lru_cache

from ctfm.extract.series_words import Vocabulary, Word, vocabulary
from ctfm.store.reasons import Reason

_DENIES = {"without", "not"}
_DENY_AN_AGENT = {"not", "without", "plain", "no_contrast", "denied"}
_STAY = {"view", "feature", "filler"}
"""Meanings that a denial reaches across, and that may follow `without` though it means contrast."""
_BREAK = ","
_FIELD = {":", "="}
_TELLS = _FIELD | {"-"}
"""What may stand between a field and its value."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a text says, and the word of the vocabulary that says it."""

    reason: Reason
    """`OK`: no contrast medium was given."""
    word: str


def description_words() -> Vocabulary:
    """The words that are sought in descriptions."""
    kinds = ("localizer", "localizer_view", "derived", "contrast", "procedure", "plain")
    grammar = ("no_contrast", "without", "not", "denied", "with", "after", "neutral")
    return vocabulary(*kinds, *grammar, *sorted(_STAY))


@lru_cache(maxsize=1 << 16)
def read_description(text: str) -> Told | None:
    """What a series description says; None if nothing that decides."""
    words = description_words().words(text)
    reading = _Reading(words)
    found = reading.found
    for kind in (Reason.LOCALIZER, Reason.DERIVED, Reason.CONTRAST):
        if word := found.get(kind.value):
            return Told(reason=kind, word=word)
    if "procedure" in found and (reading.joined or "plain" not in found):
        return Told(reason=Reason.CONTRAST, word=found["procedure"])
    return Told(reason=Reason.OK, word=found["plain"]) if "plain" in found else _view(words)


def _view(words: Sequence[Word]) -> Told | None:
    """A radiograph named by its direction (`AP`, `Lateral`), if the text has no other word."""
    views = [word for word in words if "localizer_view" in word.meanings]
    others = [word for word in words if _is_word(word) and word not in views]
    return Told(reason=Reason.LOCALIZER, word=views[0].text) if views and not others else None


class _Reading:
    """The first word of each kind that is found while words are read, and not denied."""

    def __init__(self, words: Sequence[Word]) -> None:
        self.found: dict[str, str] = {}
        self.joined = False
        """Whether an examination and a denial are joined by `and`: both were done."""
        self._denial: Word | None = None
        self._last = ""
        self._after = False
        for at, word in enumerate(words):
            self._read(word, words[max(at - 1, 0) : at], words[at + 1 :])

    def _read(self, word: Word, before: Sequence[Word], after: Sequence[Word]) -> None:
        meanings = word.meanings
        if meanings & {"contrast", "plain", "no_contrast"}:
            self._read_contrast(word, after)
        elif "procedure" in meanings:
            self._read_procedure(word)
        elif meanings & {"derived", "localizer"}:
            if self._denial is None or [self._denial] != before:
                self.found.setdefault(next(iter(meanings & {"derived", "localizer"})), word.text)
            self._denial = None
        elif meanings & _DENIES and not _is_number_sign(word, after):
            self._denial = word
            if "without" in meanings and _is_elided(after):
                self._note_plain(word)
        elif "with" in meanings:
            self._denial = None
            if _is_elided(after) or _denies_next(after):
                self.found.setdefault("contrast", word.text)
        elif "after" in meanings:
            self._denial, self._after = None, True
        else:
            self._pass(word, before)

    def _read_contrast(self, word: Word, after: Sequence[Word]) -> None:
        if "with" in word.meanings:
            self._denial = None
        if "contrast" not in word.meanings or _denied_after(after):
            self._note_plain(word)
            self._denial = word if "no_contrast" in word.meanings else self._denial
        elif self._denial is None:
            self.found.setdefault("contrast", word.text)
        else:
            self._note_plain(self._denial)

    def _read_procedure(self, word: Word) -> None:
        if self._denial is None:
            self.joined = self.joined or (self._after and self._last == "plain")
            self.found.setdefault("procedure", word.text)
            self._last, self._after = "procedure", False
        else:
            self._note_plain(self._denial)
        self._denial = None

    def _pass(self, word: Word, before: Sequence[Word]) -> None:
        """A word that tells nothing. It ends a denial unless it may stand between."""
        if not word.meanings & _STAY and not _is_gap(word, before):
            self._denial = None
        if self._last == "procedure" and _is_word(word):
            # `CTA HEAD AND NECK WITHOUT CONTRAST` joins head and neck.
            self._after = False

    def _note_plain(self, word: Word) -> None:
        self.joined = self.joined or (self._after and self._last == "procedure")
        self.found.setdefault("plain", word.text)
        self._last, self._after = "plain", False


def _is_word(word: Word) -> bool:
    return bool(word.meanings) or word.text.isalpha()


def _is_gap(word: Word, before: Sequence[Word]) -> bool:
    """Numbers and signs, and punctuation right after a denial (`W/O (CONTRAST)`)."""
    denies = any(one.meanings & _DENIES for one in before)
    return not _is_word(word) and (word.text != _BREAK or denies)


def _is_elided(after: Sequence[Word]) -> bool:
    """Whether what `with` or `without` speaks of is left out: only known words follow, or none."""
    known = {"view", "after", "derived"}
    return not after or bool(after[0].meanings & known) or not _is_word(after[0])


def _denies_next(after: Sequence[Word]) -> bool:
    """Whether a denial follows: `W/WO`, `mit und ohne`."""
    rest = [word for word in after[:3] if "after" not in word.meanings and _is_word(word)]
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
    if after[0].text in _FIELD:  # `CONTRAST: NONE HEAD 3MM`
        return bool(denial.meanings & {"denied", *_DENIES})
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
    found = _Reading(words).found
    if "contrast" in found:
        return Told(reason=Reason.CONTRAST, word=found["contrast"])
    denials = [word for word in words if word.meanings & _DENY_AN_AGENT]
    fillers = [word for word in words if "filler" in word.meanings]
    rest = [word for word in words if not _says_nothing(word)]
    other = [word for word in words if word.meanings & {"unknown", "enteral"} or _is_zero(word)]
    given = fillers and not denials and not other
    # `NOT GIVEN, TRAUMA` and `NO (TRAUMA)` deny an agent; `NO REACTION` does not.
    clear = (
        "plain" in found
        or any(" " in word.text and "denied" in word.meanings for word in denials)
        or (denials[:1] == words[:1] and [word.text for word in words[1:2]] == [_BREAK])
    )
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


@lru_cache(maxsize=1 << 14)
def names_another_part(description: str) -> bool:
    """Whether a description names a part of the body (`HWS`, `C-SPINE`), and not the head."""
    words = vocabulary("head", "other_part").words(description)
    meanings = {meaning for word in words for meaning in word.meanings}
    return "other_part" in meanings and "head" not in meanings
