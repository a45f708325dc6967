"""Id repairs: from ids that match no scan, to what was done to them on their way.

Spreadsheets drop leading zeros and write numbers with a decimal point; file names come with folders
and extensions; BIDS puts `sub-` before a subject. Each repair is a function of the id alone. That a
repair makes ids match does not mean that they are the same patients', so it is tried and told, and
done only on request (`--id-repair`); but `101.0` for `101` is the same number, and is done at once.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ctfm.store.errors import ConfigError

LONGEST_PAD = 16
"""Digits that ids are padded to at most: a DICOM ID of a hospital rarely has more."""

_WHOLE = re.compile(r"(\d+)\.0+")
_PAD = re.compile(r"pad(\d{1,2})")
_LITERAL = re.compile(r"'(.+)|=?\"(.+)\"")
_EXTENSION = re.compile(r"\.(nii|nrrd|nhdr|mha|mhd|dcm|zip)(\.gz)?$|\.gz$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class IdRepair:
    """A change of ids that may have to be undone."""

    name: str
    """As it is asked for."""
    what: str
    """What it does, after "if"."""
    change: Callable[[str], str]


def _stem(one: str) -> str:
    return _EXTENSION.sub("", re.split(r"[/\\]|::", one.rstrip("/\\"))[-1])


def _unquoted(one: str) -> str:
    found = _LITERAL.fullmatch(one)
    return (found[1] or found[2]) if found else one


def _pad(digits: int) -> IdRepair:
    def change(one: str) -> str:
        return one.zfill(digits) if one.isascii() and one.isdigit() else one

    return IdRepair(
        name=f"pad{digits}", what=f"padded with zeros to {digits} digits", change=change
    )


_REPAIRS = (
    IdRepair(
        name="unpad",
        what="leading zeros are left out",
        change=lambda one: (one.lstrip("0") or "0") if one.isdigit() else one,
    ),
    IdRepair(name="stem", what="folders and the extension are left out", change=_stem),
    IdRepair(name="unquote", what="the marks of text around them are left out", change=_unquoted),
    IdRepair(name="upper", what="written in capitals", change=str.upper),
    IdRepair(name="lower", what="written in small letters", change=str.lower),
    IdRepair(
        name="alnum",
        what="only letters and digits are kept",
        change=lambda one: re.sub(r"[\W_]+", "", one),
    ),
    IdRepair(
        name="sub",
        what="`sub-` is put before them",
        change=lambda one: one if one.startswith("sub-") else f"sub-{one}",
    ),
)


def whole_number(one: str) -> str:
    """`101.0` as `101`; any other id as it is."""
    found = _WHOLE.fullmatch(one)
    return found[1] if found else one


def repair_named(name: str) -> IdRepair:
    """The repair of that name.

    Raises:
        ConfigError: If there is none.
    """
    padded = _PAD.fullmatch(name)
    if padded and 0 < int(padded[1]) <= LONGEST_PAD:
        return _pad(int(padded[1]))
    for repair in _REPAIRS:
        if repair.name == name:
            return repair
    raise ConfigError(
        f"--id-repair must be padN (N digits, at most {LONGEST_PAD}), "
        f"{', '.join(repair.name for repair in _REPAIRS)}; got {name!r}"
    )


def useful_repairs(
    ids: Sequence[str], matching: Callable[[Iterable[str]], int]
) -> list[tuple[IdRepair, int]]:
    """Repairs that make ids match, the best first.

    Args:
        ids: That match nothing as they are.
        matching: How many of some ids match.
    """
    found = [
        (repair, count) for repair in _tried(ids) if (count := matching(_changed(ids, repair)))
    ]
    return sorted(found, key=lambda one: -one[1])


def _tried(ids: Sequence[str]) -> Iterator[IdRepair]:
    yield from _REPAIRS
    shortest = min(
        (len(one) for one in ids if one.isascii() and one.isdigit()), default=LONGEST_PAD
    )
    yield from (_pad(digits) for digits in range(shortest + 1, LONGEST_PAD + 1))


def _changed(ids: Sequence[str], repair: IdRepair) -> Iterator[str]:
    for one in ids:
        changed = repair.change(one)
        if changed and changed != one:
            yield changed
