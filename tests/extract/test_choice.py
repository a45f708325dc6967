"""Which series of a study is used, and what is said of the others."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from dicom_series import FACTS

from ctfm.extract.choice import Candidate, by_study, choose
from ctfm.store.reasons import Reason


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
    "other",
    [
        "C-SPINE 2mm",
        "HWS 1.0",
        "Thorax/Abdomen",
        "CAP 5mm",
        "Cou",
        "PETROUS 1.0",
        "Felsenbein",
        "IAMs 0.6",
    ],
)
def test_the_head_comes_before_other_parts_of_the_body(other: str) -> None:
    """A study of a trauma patient has both, and the body is longer."""
    body = scan("a", spacing_mm=4.0, coverage_mm=400, description=other)
    head = scan("b", coverage_mm=140, description="Head 5.0", image_type=("DERIVED", "SECONDARY"))
    assert chosen_of(body, head) == "b"
    both = scan("c", spacing_mm=4.0, coverage_mm=300, description="HEAD AND C-SPINE")
    assert chosen_of(body, both) == "c"
    said = {one.scan: one.detail for one in choose([body, head])}
    assert said["a"] == "the chosen series is of a head, this one is of another part of the body"


def test_a_study_in_which_no_series_names_the_head_is_used_all_the_same() -> None:
    assert chosen_of(scan("a", description="Neck"), scan("b", description="5.0 mm")) == "b"
    assert chosen_of(scan("a", description="Neck", kernel="H60f"), scan("b", description="NNH"))


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
