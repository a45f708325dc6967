"""Choice: from the scans of a study, to the one that is used.

Of the scans without a fault (`series_kind`, then geometry), one is chosen. The rules apply in this
order, the next one only between scans that are equal under those before:

1. a series whose description names no other part of the body (`names_another_part`);
2. an original image before a derived one (ImageType, value 1);
3. a soft-tissue kernel before an unknown one before a sharp (bone, lung) one;
4. the larger coverage, in steps of 40 mm up to 120 mm;
5. the distance of slices nearest to the 4 mm of the grid, as a ratio;
6. the larger coverage; then the lower series number, then the lower id.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from ctfm.extract.config import ExtractConfig
from ctfm.extract.kernels import HasKernel, kernel_kind
from ctfm.extract.series_text import names_another_part
from ctfm.extract.sources import Format
from ctfm.store.reasons import Reason


@runtime_checkable
class Reconstruction(HasKernel, Protocol):
    """What a header says of how a scan was made: of DICOM, or the JSON file beside a NIfTI file."""

    @property
    def image_type(self) -> tuple[str, ...]:
        """Every value of ImageType."""

    @property
    def series_number(self) -> int:
        """0 if unknown."""


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
    facts: Reconstruction | None = None
    digest: str | None = None
    """Of the files, from `ctfm.extract.identity`; None if they could not be read."""


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


def _facts_of(scan: Candidate) -> Reconstruction:
    assert scan.facts is not None  # whatever could be read has some
    return scan.facts


def _part_rank(scan: Candidate) -> int:
    return int(names_another_part(_facts_of(scan).description))


def _derived_rank(scan: Candidate) -> int:
    return int("DERIVED" in (value.upper() for value in _facts_of(scan).image_type))


def _kernel_rank(scan: Candidate) -> int:
    return _KERNEL_RANKS[kernel_kind(_facts_of(scan))]


def _coverage_rank(scan: Candidate) -> int:
    return -min(3, int(scan.columns["coverage_mm"] // 40))


def _spacing_rank(scan: Candidate) -> float:
    ratio = scan.columns["spacing_z_mm"] / ExtractConfig.slice_mm
    return round(abs(math.log(ratio)), 3)


def _coverage_mm(scan: Candidate) -> float:
    return round(float(scan.columns["coverage_mm"]), 1)


def _tie_rank(scan: Candidate) -> tuple[float, int, str]:
    facts = _facts_of(scan)
    return -_coverage_mm(scan), facts.series_number, scan.scan


_RULES: Sequence[tuple[Callable[[Candidate], Any], Callable[[Candidate], str]]] = (
    (_part_rank, lambda scan: f"of {'another part of the body' if _part_rank(scan) else 'a head'}"),
    (_derived_rank, lambda scan: "derived" if _derived_rank(scan) else "original"),
    (_kernel_rank, lambda scan: f"of {kernel_kind(_facts_of(scan))} kernel"),
    (_coverage_rank, lambda scan: f"{scan.columns['coverage_mm']:.0f} mm long"),
    (_spacing_rank, lambda scan: f"made of slices {scan.columns['spacing_z_mm']:.3g} mm apart"),
)


def _rank(scan: Candidate) -> list[Any]:
    return [*(key(scan) for key, _ in _RULES), _tie_rank(scan)]


def _not_chosen(scan: Candidate, best: Candidate) -> Candidate:
    detail = "another series of the study was chosen, its equal under every rule"
    length = (_coverage_mm, lambda scan: f"{_coverage_mm(scan):g} mm long")
    for key, describe in (*_RULES, length):
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
