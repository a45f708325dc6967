"""Lines of the catalogue from planes: whose scan it is, and what of it is missing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dicom_series import planes

from ctfm.extract.choice import Candidate
from ctfm.extract.dicom import Plane
from ctfm.extract.series_ids import SeriesPlanes
from ctfm.extract.series_scans import series_scans
from ctfm.store.reasons import Reason


def lines(given: Sequence[Plane]) -> list[Candidate]:
    series = SeriesPlanes()
    series.add(given)
    return list(series_scans(series))


def above(z_mm: float, given: Sequence[Plane]) -> list[Plane]:
    """The same planes so much higher, as other objects."""
    raised = []
    for plane in given:
        assert plane.position_mm is not None
        x, y, z = plane.position_mm
        name = f"{plane.facts.patient}.{plane.facts.study}.{z_mm}.{plane.sop}"
        raised.append(replace(plane, position_mm=(x, y, z + z_mm), sop=name, file=name))
    return raised


def reasons(given: Sequence[Plane]) -> list[str]:
    return [scan.reason.value for scan in lines(given)]


LOWER = above(0, planes(14))


@pytest.mark.parametrize(
    "other",
    [
        {"patient": "Q"},
        {"study": "1.9"},
        {"patient": "Q", "study": "1.9"},
    ],
    ids=str,
)
def test_a_head_under_two_ids_is_one_line_that_names_the_conflict(other: dict[str, Any]) -> None:
    (line,) = lines([*LOWER, *above(70, planes(14, **other))])
    assert line.reason is Reason.CONFLICTING_IDS
    assert len(line.files) == 28
    assert f"{1 + ('patient' in other)} patient ids" in line.detail
    assert f"{1 + ('study' in other)} study ids" in line.detail


@pytest.mark.parametrize("patient", ["p", "P ", "00P", ""], ids=repr)
def test_one_id_in_several_spellings_is_one_scan(patient: str) -> None:
    (line,) = lines([*LOWER, *above(70, planes(14, patient=patient))])
    assert (line.reason, len(line.files)) == (Reason.OK, 28)
    assert line.patient == "P" or patient


def test_images_without_a_study_are_of_the_study_of_their_series() -> None:
    (line,) = lines([*above(70, planes(14, study="")), *LOWER])
    assert (line.reason, len(line.files), line.study) == (Reason.OK, 28, "1.2")


def test_whole_heads_of_other_patients_under_one_series_id_stay_apart() -> None:
    others = [planes(28, patient=f"Q{i}", study=f"1.{i}") for i in range(3, 9)]
    found = lines([*above(0, planes(28)), *(p for other in others for p in above(0, other))])
    assert [(scan.reason.value, len(scan.files)) for scan in found] == [("ok", 28)] * 7
    assert len({scan.patient for scan in found}) == 7


def test_one_head_under_two_patients_is_refused_where_its_objects_are_the_same() -> None:
    copies = [
        replace(plane, facts=replace(plane.facts, patient="Q", study="1.9"), file=f"q{plane.file}")
        for plane in planes(28)
    ]
    assert reasons([*planes(28), *copies]) == ["conflicting_ids"]


def test_two_patients_of_one_study_are_refused_though_each_is_whole() -> None:
    other = above(0, planes(28, patient="Q"))
    assert reasons([*above(0, planes(28)), *other]) == ["conflicting_ids"]


def test_patients_in_one_folder_without_series_ids_do_not_conflict() -> None:
    unnamed: dict[str, Any] = {"series": "folder", "series_is_folder": True}
    other = above(0, planes(28, patient="Q", study="1.9", **unnamed))
    halves = above(70, planes(14, patient="R", study="1.8", **unnamed))
    found = reasons([*above(0, planes(28, **unnamed)), *other, *halves])
    assert found == ["ok", "ok", "ok"]


def test_a_scan_says_that_images_of_it_were_scanned_again() -> None:
    used, before = lines([*LOWER, *above(65, planes(15, acquisition="2"))])
    assert used.detail == "1 image was scanned again: the later one is used"
    assert used.columns["n_slices"] == 28
    assert before.reason is Reason.DUPLICATE_POSITIONS
    assert "the later" in before.detail
    assert set(used.files).isdisjoint(before.files)


@pytest.mark.parametrize(
    "other", [{"pixel_mm": (0.45, 0.45)}, {"rows": 256, "columns": 256}], ids=str
)
def test_a_part_of_a_head_says_how_much_is_missing(other: dict[str, Any]) -> None:
    found = lines([*LOWER, *above(70, planes(14, **other))])
    assert [scan.reason for scan in found] == [Reason.OK, Reason.OK]
    assert all("it covers 65 of the " in scan.detail for scan in found)


def test_whole_reconstructions_and_localizers_are_no_missing_parts() -> None:
    scout = above(200, planes(1, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")))
    bone = above(0, planes(28, kernel="H60f", acquisition="2"))
    found = lines([*above(0, planes(28)), *bone, *scout])
    assert [(scan.reason.value, scan.detail) for scan in found[:2]] == [("ok", "")] * 2


def test_a_part_whose_rest_is_unusable_says_so() -> None:
    rest = [replace(plane, slope=0.0) for plane in above(70, planes(14, rows=256))]
    used, refused = lines([*LOWER, *rest])
    assert refused.reason is Reason.BAD_RESCALE
    assert "of its series" in used.detail


def test_halves_of_one_head_among_a_cohort_with_one_series_id_are_found() -> None:
    others = [above(0, planes(28, patient=f"Q{i}", study=f"1.{i}")) for i in range(3, 40)]
    aside = [
        [
            replace(p, position_mm=(100.0 - 2 * i, 130.0, 5.0 * k + 7 * i))
            for k, p in enumerate(other)
        ]
        for i, other in enumerate(others)
    ]
    upper = above(70, planes(14, patient="R", study="1.9.9"))
    found = lines([*LOWER, *upper, *(plane for other in aside for plane in other)])
    assert [scan.reason.value for scan in found].count("ok") == 37
    (conflict,) = [scan for scan in found if scan.reason is Reason.CONFLICTING_IDS]
    assert len(conflict.files) == 28


def test_two_studies_of_a_patient_under_one_series_id_stay_apart() -> None:
    assert reasons([*above(0, planes(28)), *above(3, planes(28, study="1.9"))]) == ["ok", "ok"]


def test_every_other_slice_under_another_patient_is_a_conflict() -> None:
    both = [planes(28), planes(28, patient="Q", study="1.9")]
    series = [plane for i, one in enumerate(both) for plane in above(0, one[i::2])]
    assert reasons(series) == ["conflicting_ids"]


def stacks_of_a_cohort(n: int) -> list[Plane]:
    """Whole heads at any table height, in the middle of the field of view, of two pixel sizes."""
    random = np.random.default_rng(3)
    cohort: list[Plane] = []
    for i in range(n):
        pixel_mm = (0.45, 0.45) if i % 2 else (0.5, 0.5)
        head = planes(30, patient=f"Q{i}", study=f"1.{i}", pixel_mm=pixel_mm)
        cohort += above(float(random.uniform(-400, 400)), head)
    return cohort


def test_heads_that_end_where_others_of_a_cohort_begin_stay_apart() -> None:
    assert reasons(stacks_of_a_cohort(400)) == ["ok"] * 400


def aside(y_mm: float, given: Sequence[Plane]) -> list[Plane]:
    return [
        replace(p, position_mm=(p.position_mm[0], p.position_mm[1] + y_mm, p.position_mm[2]))
        for p in given
        if p.position_mm is not None
    ]


@pytest.mark.parametrize(("y_mm", "expected"), [(0.2, ["conflicting_ids"]), (4.0, ["ok", "ok"])])
def test_half_a_head_goes_on_only_in_one_right_above_it(y_mm: float, expected: list[str]) -> None:
    upper = above(70, planes(14, patient="Q", study="1.9"))
    assert reasons([*LOWER, *aside(y_mm, upper)]) == expected


def test_half_a_tilted_head_goes_on_along_its_tilt() -> None:
    both = [*planes(14), *above(70, planes(14, patient="Q", study="1.9"))]
    tilted = [aside(0.3 * (one.position_mm or (0, 0, 0))[2], [one])[0] for one in both]
    assert reasons(tilted) == ["conflicting_ids"]


@pytest.mark.parametrize("swapped", [False, True])
def test_the_copy_of_an_image_that_is_not_cut_short_is_used(swapped: bool) -> None:
    names = ["b", "a"] if swapped else ["a", "b"]
    copies = [
        [
            replace(p, file=f"{name}/{p.file}", truncated=cut and i == 15)
            for i, p in enumerate(planes(28))
        ]
        for name, cut in zip(names, (True, False), strict=True)
    ]
    used, left = lines([*copies[0], *copies[1]])
    assert (used.reason, left.reason) == (Reason.OK, Reason.DUPLICATE_SCAN)
    assert f"{names[1]}/1/15" in used.files
    assert f"{names[0]}/1/15" in left.files


def test_of_equal_acquisitions_the_one_whose_file_comes_first_keeps_the_id() -> None:
    first = [replace(p, file=f"a{p.file}") for p in planes(28, acquisition="2")]
    second = [replace(p, file=f"b{p.file}") for p in planes(28, acquisition="1")]
    assert [scan.files[0][0] for scan in lines([*second, *first])] == ["a", "b"]
