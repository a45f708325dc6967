"""Choice: from the planes of a study, to its scans, and to the one scan that is used.

A scan is refused by the first of these that holds: no pixels; colour; not CT, or a secondary
capture; localizer; derived map; contrast; an encoding that nothing reads; then geometry. What a
series is follows from SOPClassUID, Modality and ImageType, and for localizers, contrast and maps
also from words in SeriesDescription, as ContrastBolusAgent is often left empty. BodyPartExamined
decides nothing.

Of what is left in a study, one scan is chosen. The rules apply in this order, the next one only
between scans that are equal under those before:

1. an original image before a derived one (ImageType, value 1);
2. a soft-tissue kernel before an unknown one before a sharp (bone, lung) one;
3. the larger coverage, in steps of 40 mm up to 120 mm;
4. the distance of slices nearest to the 4 mm of the grid, as a ratio;
5. the larger coverage; then the lower series number, then the lower SeriesInstanceUID.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ctfm.extract.config import ExtractConfig
from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.extract.dicom_pixels import encoding_fault
from ctfm.extract.geometry import MIN_SLICES
from ctfm.extract.sources import Format
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
_SHARP_WORDS = re.compile(r"bone|edge|lung|sharp|detail|ultra|knochen", re.IGNORECASE)
_SOFT_WORDS = re.compile(r"stand|std|stnd|soft|smooth|brain|routine|weich", re.IGNORECASE)
_SIEMENS_KERNEL = re.compile(r"[A-Z][a-z]?(\d\d)[a-z]*", re.IGNORECASE)
_CANON_KERNEL = re.compile(r"FC(\d\d)", re.IGNORECASE)
_PHILIPS_SOFT = {"A", "B", "C", "UA", "UB", "UC", "EB", "EC"}
_PHILIPS_SHARP = {"D", "E", "F", "L", "YA", "YB", "YC", "YD", "YE", "YL", "UD", "UE"}
_KERNEL_CODE = re.compile(r"[A-Z]{1,2}\d\d[A-Z]{0,2}", re.IGNORECASE)  # H31s, Hr40f, FC26
_KERNEL_WORD = re.compile(
    r"stand(ard)?|std|stnd|v?soft|smooth|v?sharp|bone(plus)?|plus|lung|detail|edge|ultra|brain|head"
    r"|neuro|body|routine|chest|chst|medium|hd|knochen|weich|[A-Z]",
    re.IGNORECASE,
)
_KERNEL_RANKS = {"soft-tissue": 0, "unknown": 1, "sharp": 2}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One line of the catalogue in the making, under its original ids."""

    patient: str
    study: str
    scan: str
    files: tuple[str, ...]
    """In slice order where there is one."""
    format: Format
    reason: Reason = Reason.OK
    detail: str = ""
    columns: dict[str, Any]
    """The geometry and the other columns of the catalogue that are known."""
    facts: SeriesFacts | None = None
    digest: str | None = None
    """Of the files, from `ctfm.extract.identity`; None if they could not be read."""


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
    return _kind_fault(facts) or encoding_fault(facts)


def split_planes(planes: Sequence[Plane]) -> list[list[Plane]]:
    """Part the planes of one series into those that can be one scan.

    Images of another kind (a localizer in the series), matrix, pixel size or orientation are
    never of one scan. Kernel, acquisition and image type part a series only where it has several
    images at one position, and only if that leaves one image at each.
    """
    parts: list[list[Plane]] = []
    seen: list[tuple[SeriesFacts, Reason]] = []
    for plane in planes:
        kind = _kind(plane.facts)
        for part, (facts, other_kind) in zip(parts, seen, strict=True):
            if kind is other_kind and plane.facts.same_plane(facts):
                part.append(plane)
                break
        else:
            parts.append([plane])
            seen.append((plane.facts, kind))
    return [scan for part in parts for scan in _split_repeats(part)]


def choose(study: Sequence[Candidate]) -> list[Candidate]:
    """Keep the best of the faultless scans of one study; say of the others why they lost."""
    faultless = [scan for scan in study if scan.reason is Reason.OK]
    if len(faultless) < 2:
        return list(study)
    best = min(faultless, key=_rank)
    return [
        scan if scan is best or scan.reason is not Reason.OK else _not_chosen(scan, best)
        for scan in study
    ]


def kernel_kind(facts: SeriesFacts) -> str:
    """What the reconstruction kernel is made for: `soft-tissue`, `unknown` or `sharp`."""
    kernel = facts.kernel.strip()
    canon, siemens = _CANON_KERNEL.match(kernel), _SIEMENS_KERNEL.fullmatch(kernel)
    if canon:
        number = int(canon[1])
        soft = number < 30 or 40 <= number < 50 or 60 <= number < 70
        return "soft-tissue" if soft else "sharp"
    if siemens:
        return "soft-tissue" if int(siemens[1]) < 50 else "sharp"
    if kernel.upper() in _PHILIPS_SOFT | _PHILIPS_SHARP:
        return "soft-tissue" if kernel.upper() in _PHILIPS_SOFT else "sharp"
    for text in (kernel, facts.description):
        if _SHARP_WORDS.search(text):
            return "sharp"
        if _SOFT_WORDS.search(text):
            return "soft-tissue"
    return "unknown"


def kernel_name(text: str) -> str | None:
    """A ConvolutionKernel that reads like one, else None: the field is free text.

    At most three words that vendors use, one of them a code of a letter or two and two digits: too
    little for a name, also one that is spelled out, a date or a number of a patient.
    """
    words = re.split(r"[ _.+-]+", text.strip(" _.+-"))
    codes = [word for word in words if _KERNEL_CODE.fullmatch(word)]
    others = [word for word in words if word not in codes]
    philips = _PHILIPS_SOFT | _PHILIPS_SHARP
    known = all(_KERNEL_WORD.fullmatch(word) or word.upper() in philips for word in others)
    return text.strip() if known and len(codes) <= 1 and len(words) <= 3 else None


def _kind_fault(facts: SeriesFacts) -> ScanError | None:
    types = {word for value in facts.image_type for word in re.split(r"[ _/]+", value.upper())}
    if types & _LOCALIZER_TYPES or _LOCALIZER_WORDS.search(facts.description):
        return ScanError(Reason.LOCALIZER, "a localizer")
    if any(map(_MAP_TYPES.fullmatch, types)) or _MAP_WORDS.search(facts.description):
        return ScanError(Reason.DERIVED, "a projection, a subtraction or a computed map")
    if facts.rescale_type not in _HU_UNITS:
        return ScanError(Reason.DERIVED, "its rescale type says that its unit is not HU")
    if facts.contrast_agent.upper() not in _NO_AGENTS:
        return ScanError(Reason.CONTRAST, "the header names a contrast agent")
    if _CONTRAST_WORDS.search(_NO_CONTRAST_WORDS.sub(" ", facts.description)):
        return ScanError(Reason.CONTRAST, "the series description speaks of contrast")
    return None


@cache
def _kind(facts: SeriesFacts) -> Reason:
    fault = fault_of(facts)
    return Reason.OK if fault is None else fault.reason


def _split_repeats(planes: list[Plane]) -> list[list[Plane]]:
    if not _repeats(planes):
        return [planes]
    for key in _SPLIT_KEYS:
        parts: dict[Any, list[Plane]] = {}
        for plane in planes:
            parts.setdefault(key(plane), []).append(plane)
        if len(parts) > 1 and all(_is_whole(part) for part in parts.values()):
            return list(parts.values())
    return [planes]


def _is_whole(planes: Sequence[Plane]) -> bool:
    return len(planes) >= MIN_SLICES and not _repeats(planes)


def _repeats(planes: Sequence[Plane]) -> bool:
    positions = [plane.position_mm for plane in planes]
    return None not in positions and len(set(positions)) < len(positions)


_SPLIT_KEYS: tuple[Callable[[Plane], object], ...] = (
    lambda plane: plane.facts.kernel,
    lambda plane: plane.facts.image_type,
    lambda plane: plane.acquisition,
    lambda plane: (plane.facts.kernel, plane.facts.image_type, plane.acquisition),
)


def _facts_of(scan: Candidate) -> SeriesFacts:
    assert scan.facts is not None  # only DICOM studies hold several scans
    return scan.facts


def _derived_rank(scan: Candidate) -> int:
    return int("DERIVED" in (value.upper() for value in _facts_of(scan).image_type))


def _kernel_rank(scan: Candidate) -> int:
    return _KERNEL_RANKS[kernel_kind(_facts_of(scan))]


def _coverage_rank(scan: Candidate) -> int:
    return -min(3, int(scan.columns["coverage_mm"] // 40))


def _spacing_rank(scan: Candidate) -> float:
    ratio = scan.columns["spacing_z_mm"] / ExtractConfig.slice_mm
    return round(abs(math.log(ratio)), 3)


def _tie_rank(scan: Candidate) -> tuple[float, int, str]:
    facts = _facts_of(scan)
    return -round(scan.columns["coverage_mm"], 1), facts.series_number, scan.scan


_RULES: Sequence[tuple[Callable[[Candidate], Any], Callable[[Candidate], str]]] = (
    (_derived_rank, lambda scan: "derived" if _derived_rank(scan) else "original"),
    (_kernel_rank, lambda scan: f"of {kernel_kind(_facts_of(scan))} kernel"),
    (_coverage_rank, lambda scan: f"{scan.columns['coverage_mm']:.0f} mm long"),
    (_spacing_rank, lambda scan: f"made of slices {scan.columns['spacing_z_mm']:.3g} mm apart"),
)


def _rank(scan: Candidate) -> list[Any]:
    return [*(key(scan) for key, _ in _RULES), _tie_rank(scan)]


def _not_chosen(scan: Candidate, best: Candidate) -> Candidate:
    detail = "another series of the study was chosen, its equal under every rule"
    for key, describe in _RULES:
        if key(scan) != key(best):
            detail = f"the chosen series is {describe(best)}, this one is {describe(scan)}"
            break
    return replace(scan, reason=Reason.OTHER_SERIES_CHOSEN, detail=detail)


def by_study(scans: Iterable[Candidate]) -> list[list[Candidate]]:
    """Group scans by patient and study."""
    studies: dict[tuple[str, str], list[Candidate]] = {}
    for scan in scans:
        studies.setdefault((scan.patient, scan.study), []).append(scan)
    return list(studies.values())
