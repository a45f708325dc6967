"""Series kind: from what a header says of a series, to why it is of no use, whatever its geometry.

A series is refused by the first of these that holds: no pixels; colour; not CT, or a secondary
capture; localizer; derived map; contrast; an encoding that nothing reads. What it is follows from
SOPClassUID, Modality and ImageType, and for localizers, contrast and maps also from words in
SeriesDescription, as ContrastBolusAgent is often left empty. BodyPartExamined decides nothing.
"""

import re
from dataclasses import dataclass
from functools import cache

from ctfm.extract.dicom import SeriesFacts
from ctfm.extract.dicom_pixels import encoding_fault
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_CT_CLASSES = {
    "",  # lost by some anonymisers
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
}
_COLOURS = ("RGB", "YBR", "PALETTE")
_LOCALIZER_TYPES = {"LOCALIZER", "SCOUT", "SURVIEW", "TOPOGRAM", "SCANOGRAM"}
_LOCALIZER_WORDS = re.compile(r"localizer|scout|surview|topogram|scanogram", re.IGNORECASE)
_MAP_TYPES = re.compile(
    r"MIP|MINIP|MNIP|SSD|VRT|RENDERING|PERFUSION|R?CB[FV]|MTT|TTP|TMAX|IODINE|VNC|ZEFF|SUBTRACT\w*"
    r"|DOSEINFO"
)
_MAP_WORDS = re.compile(
    r"\b(min)?mip\b|\bvrt?\b|\br?cb[fv]\b|\bmtt\b|\bttp\b|\btmax\b|iodine|subtract",
    re.IGNORECASE,
)
_HU_UNITS = {"", "HU", "US", "HU_MOD", "UNSPECIFIED"}  # US: unspecified (PS3.3 C.11.1.1.2)
_NO_AGENTS = {"", "NO", "NONE", "N", "NA", "N/A", "0", "NULL", "NON", "KEIN", "WITHOUT"}
_NO_CONTRAST_WORDS = re.compile(
    r"\b(without|w[\s./_-]*o|non?|pre|un|ohne|kein|sans)[\s._-]*(iv[\s._-]*)?"
    r"(contrast|contr|con|enhanced|km|kontrast)\w*|\bncct\b|\bnect\b"
    r"|\b(contrast|kontrast)\w*[\s.:=_-]*((free|none|nil)\b|no\s*$)",
    re.IGNORECASE,
)
_CONTRAST_WORDS = re.compile(
    r"\bct[av]\b|angio|venogra|perfusion|\bctp\b|contrast|kontrast|enhanced|\bcect\b|\bc\s*\+|\+\s*c\b"
    r"|\bpost[\s._-]*con|\bmit\s*km\b|arterial|venous",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a header, or the JSON beside a NIfTI file, says of the kind of its images."""

    image_type: tuple[str, ...] = ()
    """Every value of ImageType, or of an enhanced object's FrameType."""
    description: str = ""
    """SeriesDescription."""
    contrast_agent: str = ""
    """ContrastBolusAgent."""
    rescale_type: str = ""


def fault_of(facts: SeriesFacts) -> ScanError | None:
    """Why planes with these facts are of no use, whatever their geometry; None if they may be."""
    if not facts.has_pixels:
        return ScanError(Reason.NOT_AN_IMAGE, "a DICOM object without pixels")
    if facts.samples != 1 or facts.photometric.startswith(_COLOURS):
        return ScanError(Reason.COLOUR, "a colour image")
    if facts.modality != "CT":
        return ScanError(Reason.NOT_CT, "its modality is not CT")
    if facts.sop_class not in _CT_CLASSES:
        return ScanError(Reason.NOT_CT, "a secondary capture or another kind of object")
    return kind_fault(_described(facts)) or encoding_fault(facts)


@cache
def kind_of(facts: SeriesFacts) -> Reason:
    """The reason of `fault_of`, or `OK`."""
    fault = fault_of(facts)
    return Reason.OK if fault is None else fault.reason


def kind_fault(said: Described) -> ScanError | None:
    """Why images that are described so are no plain CT: localizer, derived, contrast; or None."""
    types = {word for value in said.image_type for word in re.split(r"[ _/]+", value.upper())}
    if types & _LOCALIZER_TYPES or _LOCALIZER_WORDS.search(said.description):
        return ScanError(Reason.LOCALIZER, "a localizer")
    if any(map(_MAP_TYPES.fullmatch, types)) or _MAP_WORDS.search(said.description):
        return ScanError(Reason.DERIVED, "a projection, a subtraction or a computed map")
    if said.rescale_type.upper() not in _HU_UNITS:
        return ScanError(Reason.DERIVED, "its rescale type says that its unit is not HU")
    if said.contrast_agent.upper() not in _NO_AGENTS:
        return ScanError(Reason.CONTRAST, "the header names a contrast agent")
    if _CONTRAST_WORDS.search(_NO_CONTRAST_WORDS.sub(" ", said.description)):
        return ScanError(Reason.CONTRAST, "the series description speaks of contrast")
    return None


def _described(facts: SeriesFacts) -> Described:
    return Described(
        image_type=facts.image_type,
        description=facts.description,
        contrast_agent=facts.contrast_agent,
        rescale_type=facts.rescale_type,
    )
