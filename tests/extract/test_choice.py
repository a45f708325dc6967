"""Which series of a study is used, and what is said of the others."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from ctfm.extract.choice import (
    Candidate,
    by_study,
    choose,
    fault_of,
    kernel_kind,
    kernel_name,
    split_planes,
)
from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.store.reasons import Reason

FACTS = SeriesFacts(
    patient="P",
    study="1.2",
    series="1.2.3",
    series_number=2,
    sop_class="1.2.840.10008.5.1.4.1.1.2",
    modality="CT",
    image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
    description="Head 5.0",
    contrast_agent="",
    vendor="SIEMENS",
    kernel="H31s",
    rescale_type="HU",
    transfer_syntax="1.2.840.10008.1.2.1",
    photometric="MONOCHROME2",
    samples=1,
    bits_allocated=16,
    bits_stored=12,
    has_pixels=True,
    unplaced_frames=1,
    rows=512,
    columns=512,
    pixel_mm=(0.5, 0.5),
    axes=(-1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
)


def planes(n: int, *, acquisition: str = "1", step_mm: float = 5.0, **facts: Any) -> list[Plane]:
    shared = replace(FACTS, **facts)
    return [
        Plane(
            file=f"{acquisition}/{i}",
            frame=0,
            sop=f"{acquisition}.{i}",
            facts=shared,
            position_mm=(110.0, 130.0, step_mm * i),
            slope=1.0,
            intercept=-1024.0,
            thickness_mm=5.0,
            kvp=120.0,
            acquisition=acquisition,
            truncated=False,
        )
        for i in range(n)
    ]


def scan(
    name: str, *, spacing_mm: float = 5.0, coverage_mm: float = 150, **facts: Any
) -> Candidate:
    return Candidate(
        patient="P",
        study="1.2",
        scan=name,
        files=(name,),
        format="dicom",
        columns={"spacing_z_mm": spacing_mm, "coverage_mm": coverage_mm},
        facts=replace(FACTS, **facts),
    )


def chosen_of(*scans: Candidate) -> str:
    """The one chosen, which must not depend on the order."""
    chosen = {
        next(scan.scan for scan in choose(order) if scan.reason is Reason.OK)
        for order in permutations(scans)
    }
    (name,) = chosen
    return name


@pytest.mark.parametrize(
    ("reason", "facts"),
    [
        (Reason.NOT_AN_IMAGE, {"has_pixels": False, "modality": "SR"}),
        (Reason.COLOUR, {"samples": 3}),
        (Reason.COLOUR, {"photometric": "PALETTE COLOR"}),
        (Reason.NOT_CT, {"modality": "MR"}),
        (Reason.NOT_CT, {"sop_class": "1.2.840.10008.5.1.4.1.1.7"}),
        (Reason.LOCALIZER, {"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}),
        (Reason.LOCALIZER, {"description": "Topogram  0.6  T20s"}),
        (Reason.DERIVED, {"image_type": ("DERIVED", "SECONDARY", "MIP")}),
        (Reason.DERIVED, {"image_type": ("DERIVED", "PRIMARY", "PERFUSION", "RCBF")}),
        (Reason.DERIVED, {"rescale_type": "MGML"}),
        (Reason.CONTRAST, {"contrast_agent": "Iomeron 400"}),
        (Reason.CONTRAST, {"description": "CTA Head 0.75"}),
        (Reason.CONTRAST, {"description": "Head with contrast"}),
        (Reason.CONTRAST, {"description": "HEAD W CONTRAST"}),
        (Reason.CONTRAST, {"description": "HEAD W CONTRAST 0.625"}),
        (Reason.CONTRAST, {"description": "POST CONTRAST NO 2"}),
        (Reason.UNSUPPORTED_ENCODING, {"transfer_syntax": "1.2.840.10008.1.2.4.53"}),
        (Reason.UNSUPPORTED_ENCODING, {"unplaced_frames": 20}),
    ],
)
def test_what_is_no_head_ct_is_refused_with_its_reason(
    reason: Reason, facts: dict[str, Any]
) -> None:
    fault = fault_of(replace(FACTS, **facts))
    assert fault is not None
    assert fault.reason is reason


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"sop_class": ""},  # lost by an anonymiser
        {"image_type": ("DERIVED", "SECONDARY", "MPR")},
        {"image_type": ()},
        {"rescale_type": "US"},
        {"contrast_agent": "NONE"},
        {"description": "HEAD W/O CONTRAST 5mm"},
        {"description": "Brain non-contrast"},
        {"description": "HEAD W O CONTRAST"},
        {"description": "Head contrast: none"},
        {"description": "Brain, contrast-free"},
        {"description": "Head, contrast: NO"},
        {"description": "CCT nativ ohne KM"},
        {"description": "NCCT head"},
    ],
)
def test_a_plain_head_ct_is_not_refused(facts: dict[str, Any]) -> None:
    assert fault_of(replace(FACTS, **facts)) is None


@pytest.mark.parametrize(
    ("kernel", "description", "kind"),
    [
        ("H31s", "", "soft-tissue"),
        ("Br38f", "", "soft-tissue"),
        ("H60f", "", "sharp"),
        ("STANDARD", "", "soft-tissue"),
        ("STD+", "", "soft-tissue"),
        ("BONEPLUS", "", "sharp"),
        ("UB", "", "soft-tissue"),
        ("YA", "", "sharp"),
        ("FC26", "", "soft-tissue"),
        ("FC30", "", "sharp"),
        ("", "HEAD BONE 1mm", "sharp"),
        ("", "", "unknown"),
    ],
)
def test_kernels_of_every_vendor_are_known(kernel: str, description: str, kind: str) -> None:
    assert kernel_kind(replace(FACTS, kernel=kernel, description=description)) == kind
    assert kernel_name(kernel) == (kernel or None)


@pytest.mark.parametrize("kernel", ["B_VSHARP_C", "Brain Standard", "Hr40f", "FL03", "STD+", "uc"])
def test_a_kernel_with_a_name_keeps_it(kernel: str) -> None:
    assert kernel_name(f" {kernel}") == kernel


@pytest.mark.parametrize(
    "text",
    [
        "Jane Doe",
        "DOE^JANE",
        "Doe",
        "19551231",
        "12-31-55",
        "H31 B12",
        "MRN4242",
        "H31s\n",
        "_",
        "61",
        "soft soft soft soft",
        "J.O.H.N",
    ],
)
def test_what_does_not_read_like_a_kernel_is_not_kept(text: str) -> None:
    assert kernel_name(text) is None


def test_an_original_image_comes_before_a_derived_one() -> None:
    derived = scan("a", spacing_mm=4.0, image_type=("DERIVED", "SECONDARY", "MPR"))
    assert chosen_of(derived, scan("b", kernel="H60f")) == "b"


def test_a_soft_kernel_comes_before_a_sharp_one() -> None:
    scans = scan("a", kernel="H60f"), scan("b"), scan("c", kernel="")
    assert chosen_of(*scans) == "b"
    assert chosen_of(scans[0], scans[2]) == "c"


def test_a_whole_head_comes_before_a_part_of_one() -> None:
    part = scan("a", spacing_mm=4.0, coverage_mm=60)
    assert chosen_of(part, scan("b", spacing_mm=0.6, coverage_mm=140)) == "b"


def test_the_slice_distance_nearest_to_the_grid_is_chosen() -> None:
    assert chosen_of(scan("a", spacing_mm=0.6), scan("b", spacing_mm=5.0)) == "b"
    assert chosen_of(scan("a", spacing_mm=3.0), scan("b", spacing_mm=8.0)) == "a"


def test_between_equals_the_first_of_the_study_is_chosen() -> None:
    equals = scan("a", series_number=4), scan("b", series_number=3), scan("c", series_number=3)
    assert chosen_of(*equals) == "b"


def test_every_other_candidate_says_why_it_lost() -> None:
    scans = [
        scan("best"),
        scan("sharp", kernel="H60f"),
        scan("thin", spacing_mm=0.625),
        scan("again", series_number=9),
        replace(scan("scout"), reason=Reason.LOCALIZER, detail="a localizer"),
    ]
    said = {scan.scan: (scan.reason.value, scan.detail) for scan in choose(scans)}
    assert said == {
        "best": ("ok", ""),
        "sharp": (
            "other_series_chosen",
            "the chosen series is of soft-tissue kernel, this one is of sharp kernel",
        ),
        "thin": (
            "other_series_chosen",
            "the chosen series is made of slices 5 mm apart, this one is made of slices 0.625 mm "
            "apart",
        ),
        "again": (
            "other_series_chosen",
            "another series of the study was chosen, its equal under every rule",
        ),
        "scout": ("localizer", "a localizer"),
    }


def test_scans_are_grouped_by_patient_and_study() -> None:
    other = replace(scan("c"), patient="Q")
    assert [[s.scan for s in study] for study in by_study([scan("a"), other, scan("b")])] == [
        ["a", "b"],
        ["c"],
    ]


def sizes(parts: list[list[Plane]]) -> list[int]:
    return sorted(map(len, parts))


def mixed_series() -> Iterator[tuple[list[Plane], list[int]]]:
    yield planes(28), [28]
    scout = planes(1, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    yield planes(28) + scout, [1, 28]
    coronal = planes(9, axes=(-1.0, 0.0, 0.0, 0.0, 0.0, -1.0))
    yield planes(28) + coronal, [9, 28]
    yield planes(28) + planes(30, rows=256, columns=256, pixel_mm=(1.0, 1.0)), [28, 30]
    jitter = planes(5, axes=(-0.99999, 0.00001, 0.0, 0.0, -1.0, 0.00001), acquisition="2")
    yield (
        [replace(p, position_mm=(110.0, 130.0, 200.0 + i)) for i, p in enumerate(jitter)]
        + (planes(28)),
        [33],
    )


@pytest.mark.parametrize(("series", "expected"), list(mixed_series()))
def test_a_series_is_parted_by_what_can_never_be_one_scan(
    series: list[Plane], expected: list[int]
) -> None:
    assert sizes(split_planes(series)) == expected


def test_two_passes_in_one_series_are_parted_by_kernel_or_acquisition() -> None:
    assert sizes(split_planes(planes(20) + planes(20, kernel="H60f"))) == [20, 20]
    assert sizes(split_planes(planes(20) + planes(21, acquisition="2"))) == [20, 21]


def test_passes_that_no_tag_tells_apart_stay_together() -> None:
    assert sizes(split_planes(planes(20) + planes(20))) == [40]
    bolus_tracking = [plane for i in range(6) for plane in planes(1, acquisition=str(i))]
    assert sizes(split_planes(bolus_tracking)) == [6]


def test_a_kernel_or_acquisition_that_changes_on_the_way_up_parts_nothing() -> None:
    low, high = planes(9, kernel="SOFT"), planes(9, acquisition="2")
    above = [replace(p, position_mm=(110.0, 130.0, 100.0 + 5 * i)) for i, p in enumerate(high)]
    assert sizes(split_planes(low + above)) == [18]
