"""Converted names: from the names that dcm2niix gives, to which files are of one series or study.

dcm2niix 1.0.20260724 (and its FILENAMING.md) adds to the name that the user chose:

    _Tilt_1, _Eq_1, _Tilt_Eq_1   made right: gantry tilt, unequal distances of slices, both
    _ROI1                        an overlay drawn in the scan
    _Crop_1                      the same with the neck cut off
    a, b, c …                    another series, whose name would have been the same

The plain file of a series with a corrected copy is wrong: all slices lie at the first distance, and
a tilted one has the distance along the normal as that along z. With `-f %p` or `-f %f` series of
two patients in one folder differ in the letter alone, so a letter tells no study.
"""

import re
from collections.abc import Set

from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_COPY = re.compile(r"(?P<plain>.+?)(?P<kind>(?:_Tilt)?(?:_Eq)?(?:_Crop|_ROI(?=\d))?)(?:_?\d{1,2})?")
_LETTERED = re.compile(r"(?P<plain>.+)[a-z]")
_NUMBERED = re.compile(r"(?P<plain>.+)_(?P<number>\d{1,5})[a-z]?")
TIME_DIGITS = 14
"""Date and time of a study to the second, as `%t` writes them."""
_TIMED = re.compile(r".*(?<!\d)\d{12}(?!00)\d{2}")


def copy_of(stem: str) -> tuple[str, str]:
    """The name of the plain file, and what this one is: `_Tilt`, `_Tilt_Eq`, `_ROI` …; "" is it."""
    if "_" not in stem:
        return stem, ""
    match = _COPY.fullmatch(stem)
    return (match["plain"], match["kind"]) if match and match["kind"] else (stem, "")


def lettered_stem(stem: str) -> str | None:
    """The name that a series had to give way to, if it ends in a letter for that."""
    match = _LETTERED.fullmatch(stem)
    return match["plain"] if match else None


def numbered_stem(stem: str) -> str | None:
    """A name without the number of its series, and without the letter after it."""
    match = _NUMBERED.fullmatch(stem)
    return match["plain"] if match else None


def number_of(stem: str) -> str:
    """The number at the end of a name, which dcm2niix takes from SeriesNumber; "" for none."""
    match = _NUMBERED.fullmatch(stem)
    return match["number"] if match else ""


def relatives(stem: str) -> tuple[str, ...]:
    """Names, or beginnings of names, of files by which the study of a file may be called."""
    plain, _ = copy_of(stem)
    names = (plain, lettered_stem(plain), numbered_stem(plain))
    return tuple(one for one in names if one and one != stem)


def beginning_of(base: str) -> str:
    """What names of one study share before their number.

    dcm2niix's default is `%f_%p_%t_%s`: a folder, the protocol, the time of the study. Without
    ProtocolName, the protocol is the SeriesDescription, which is another in each series.
    """
    return base.partition("_")[0] if names_a_time(base) else base


def names_a_time(stem: str) -> bool:
    """Whether it ends in date and time of a study (`%t`), to the second.

    A whole minute was mostly made up, and may be that of other patients.
    """
    return _TIMED.fullmatch(stem) is not None


def copy_fault(kind: str, kinds: Set[str]) -> ScanError | None:
    """Why a file of a series is not used in favour of another one; None if it may be.

    Args:
        kind: What it is, as `copy_of` says.
        kinds: What the files of the series are, this one among them.
    """
    if kind.endswith("_ROI"):
        detail = "an overlay that was drawn in the scan beside it (_ROI of dcm2niix)"
        return ScanError(Reason.DERIVED, detail) if kinds - {kind} else None
    whole = kind.removesuffix("_Crop")
    corrected = [one for one in ("_Tilt_Eq", "_Tilt", "_Eq") if {one, f"{one}_Crop"} & kinds]
    if corrected[:2] == ["_Tilt", "_Eq"]:
        detail = "dcm2niix corrected tilt and distances in two files, so neither has both right"
        return ScanError(Reason.BAD_GEOMETRY, detail)
    if corrected and corrected[0] != whole:
        detail = (
            f"dcm2niix corrected its geometry in the file beside it that ends in {corrected[0]}"
        )
        return ScanError(Reason.BAD_GEOMETRY, detail)
    if kind != whole and whole in kinds:
        detail = "a cropped copy of the file beside it (_Crop of dcm2niix)"
        return ScanError(Reason.OTHER_SERIES_CHOSEN, detail)
    return None
