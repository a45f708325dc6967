"""Which planes of a series are one scan."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dicom_series import planes

from ctfm.extract.dicom import Plane
from ctfm.extract.series_parts import split_planes
from ctfm.extract.series_passes import Part


def sizes(parts: list[Part]) -> list[int]:
    return sorted(len(part.planes) for part in parts)


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


OWN = ("thickness_mm", "acquisition_time", "instance")


def at(positions_mm: Iterable[float], acquisition: str = "1", **facts: Any) -> list[Plane]:
    """Planes at these places; facts of the planes themselves by `Plane`'s names."""
    own = {name: facts.pop(name) for name in OWN if name in facts}
    places = list(positions_mm)
    return [
        replace(plane, position_mm=(110.0, 130.0, z), sop=f"{acquisition}.{z}.{facts}", **own)
        for plane, z in zip(
            planes(len(places), acquisition=acquisition, **facts), places, strict=True
        )
    ]


def steps(n: int, *, of: int = 4, first: int = 0, acquisition: int = 1) -> list[list[Plane]]:
    """Step and shoot: so many acquisitions of 4 slices, 5 mm apart."""
    return [
        at([5.0 * (of * (first + i) + j) for j in range(of)], str(acquisition + i))
        for i in range(n)
    ]


def joined(acquisitions: Iterable[list[Plane]]) -> list[Plane]:
    return [plane for planes in acquisitions for plane in planes]


def height(plane: Plane) -> float:
    assert plane.position_mm is not None
    return plane.position_mm[2]


def heights(part: Part) -> list[float]:
    return sorted(map(height, part.planes))


def acquisitions_at(part: Part) -> dict[float, str]:
    return {height(plane): plane.acquisition for plane in part.planes}


def test_two_passes_that_share_a_slice_are_one_scan() -> None:
    for lower, upper in ((13, 16), (14, 15)):
        low = at([5.0 * i for i in range(lower)])
        high = at([5.0 * (lower - 1 + i) for i in range(upper)], "2")
        used, before = split_planes([*high, *low])
        assert heights(used) == [5.0 * i for i in range(28)]
        assert (used.replaced, used.superseded) == (1, False)
        assert before.superseded
        assert [plane.acquisition for plane in before.planes] == ["1"]


def test_a_step_that_was_scanned_again_takes_the_place_of_the_first() -> None:
    again = steps(1, first=3, acquisition=8)
    used, before = split_planes(joined([*steps(7), *again]))
    assert heights(used) == [5.0 * i for i in range(28)]
    assert [acquisitions_at(used)[5.0 * i] for i in (11, 12, 15, 16)] == ["3", "8", "8", "5"]
    assert {plane.acquisition for plane in before.planes} == {"4"}


def test_a_step_scanned_again_at_once_takes_the_place_of_the_first() -> None:
    low, high = steps(3), steps(5, first=2, acquisition=10)
    used, before = split_planes(joined([*low, *high]))
    assert heights(used) == [5.0 * i for i in range(28)]
    assert acquisitions_at(used)[40.0] == "10"
    assert sizes([used, before]) == [4, 28]


def test_acquisitions_are_put_in_order_by_number_and_not_by_text() -> None:
    used, _ = split_planes([*at([0, 5, 10, 15, 20, 25], "10"), *at([25, 30, 35, 40, 45, 50], "9")])
    assert acquisitions_at(used)[25] == "10"


def test_steps_that_each_share_a_slice_with_the_next_are_one_scan() -> None:
    each = [at([15.0 * i + 5.0 * j for j in range(4)], str(i + 1)) for i in range(9)]
    used, before = split_planes(joined(each))
    assert heights(used) == [5.0 * i for i in range(28)]
    assert len(before.planes) == 8


def test_a_scan_that_was_broken_off_gives_way_to_the_one_begun_anew() -> None:
    used, before = split_planes(joined([*steps(3), *steps(7, acquisition=4)]))
    assert heights(used) == [5.0 * i for i in range(28)]
    assert {plane.acquisition for plane in before.planes} == {"1", "2", "3"}


def test_a_whole_head_scanned_again_is_a_scan_of_its_own() -> None:
    parts = split_planes(joined([*steps(7), *steps(7, acquisition=8)]))
    assert [heights(part) for part in parts] == [[5.0 * i for i in range(28)]] * 2
    assert not any(part.superseded or part.replaced for part in parts)


@pytest.mark.parametrize("shift_mm", [0.3, 2.0, -2.5])
def test_a_whole_head_scanned_again_at_other_places_is_a_scan_of_its_own(shift_mm: float) -> None:
    series = [*planes(28), *at([5.0 * i + shift_mm for i in range(28)], "2")]
    assert sizes(split_planes(series)) == [28, 28]


def test_acquisitions_that_fill_the_holes_of_each_other_are_one_scan() -> None:
    series = [*at([10.0 * i for i in range(14)]), *at([10.0 * i + 5 for i in range(14)], "2")]
    assert sizes(split_planes(series)) == [28]


def test_a_dynamic_run_is_not_parted() -> None:
    run = [at([5.0 * i for i in range(8)], str(n)) for n in range(1, 31)]
    assert sizes(split_planes(joined(run))) == [240]


def test_without_numbers_the_later_image_is_not_known() -> None:
    series = [*at([5.0 * i for i in range(13)], "a"), *at([5.0 * i for i in range(12, 28)], "b")]
    assert sizes(split_planes(series)) == [29]


@pytest.mark.parametrize("shift_mm", [0.0, 0.004, -0.03, 2.5, 1.7])
@pytest.mark.parametrize(
    "other",
    [{"kernel": "H60f"}, {"image_type": ("DERIVED", "SECONDARY", "AXIAL")}, {"thickness_mm": 4.5}],
    ids=str,
)
def test_reconstructions_of_the_same_places_come_apart(
    shift_mm: float, other: dict[str, Any]
) -> None:
    places = [5.0 * i for i in range(28)]
    series = [*at(places), *at([z + shift_mm for z in places], **other)]
    assert sizes(split_planes(series)) == [28, 28]


def test_reconstructions_that_go_on_in_each_other_are_one_scan() -> None:
    low = at([4.0 * i for i in range(14)], image_type=("ORIGINAL", "PRIMARY", "AXIAL", "ADD"))
    high = at([53.08 + 7.0 * i for i in range(14)], "2", kernel="H40s", thickness_mm=7.0)
    assert sizes(split_planes([*low, *high])) == [28]


def test_a_reconstruction_of_a_part_stays_apart_from_that_of_the_whole() -> None:
    whole, part = at([5.0 * i for i in range(28)]), at([5.0 * i for i in range(9)], kernel="H60f")
    assert sizes(split_planes([*part, *whole])) == [9, 28]


def turned(plane: Plane, degrees: float) -> Plane:
    angle = np.radians(degrees)
    axes = (-1.0, 0.0, 0.0, 0.0, -float(np.cos(angle)), float(np.sin(angle)))
    return replace(plane, facts=replace(plane.facts, axes=axes))


@pytest.mark.parametrize("spread", ["four", "normal"])
def test_orientations_that_differ_by_noise_are_one_scan(spread: str) -> None:
    random = np.random.default_rng(5)
    four = [-0.3, -0.1, 0.1, 0.3] * 7
    turns: list[float] = four if spread == "four" else random.normal(0, 0.3, 28).tolist()
    series = [turned(p, t) for p, t in zip(planes(28), turns, strict=True)]
    assert sizes(split_planes(series)) == [28]


def test_whole_stacks_of_two_tilts_come_apart_and_halves_of_near_ones_are_one_scan() -> None:
    both = [*planes(28), *(turned(plane, 1.5) for plane in at([5.0 * i + 2 for i in range(28)]))]
    assert sizes(split_planes(both)) == [28, 28]
    upper = [turned(plane, 1.0) for plane in at([70 + 5.0 * i for i in range(14)])]
    assert sizes(split_planes([*planes(14), *upper])) == [28]
    upper = [turned(plane, 15.0) for plane in at([70 + 5.0 * i for i in range(14)])]
    assert sizes(split_planes([*planes(14), *upper])) == [14, 14]


def is_in_order(part: Part) -> bool:
    """Whether its images come in blocks of one acquisition and time each, one above the other."""
    ordered = sorted(part.planes, key=height)
    made = [(plane.acquisition, plane.acquisition_time) for plane in ordered]
    again = [i for i in range(1, len(made)) if made[i] != made[i - 1]]
    return len({(made[i], made[i - 1]) for i in again}) == len(again) <= 8


SHIFTS = [0.06, 0.3, 0.6, 1.0, 2.0, 2.4, 2.5, 2.6, 2.9, 4.0, 4.5, 4.9]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shift_mm", SHIFTS)
def test_a_step_scanned_again_between_the_old_slices_takes_their_place(
    shift_mm: float, sign: int
) -> None:
    old = steps(5, of=5)
    new = at([5.0 * i + sign * shift_mm for i in range(10, 15)], "9")
    used, before = split_planes(joined([*old, new]))
    assert (before.superseded, used.replaced) == (True, len(before.planes))
    own = [plane for plane in used.planes if plane.acquisition == "9"]
    assert len(own) == 5
    z = sorted(map(height, own))
    assert not any(z[0] < h < z[-1] and a != "9" for h, a in acquisitions_at(used).items())
    assert {p.acquisition for p in before.planes} <= {"3", "2" if sign < 0 else "4"}
    gaps = np.diff(heights(used))
    assert gaps.min() > 0.05
    assert gaps.max() < 8


def test_a_step_scanned_again_twice_gives_way_to_the_last() -> None:
    again = [at([5.0 * i + shift for i in range(10, 15)], n) for n, shift in (("9", 2), ("12", 1))]
    used, _ = split_planes(joined([*steps(5, of=5), *again]))
    assert sum(plane.acquisition == "12" for plane in used.planes) == 5
    assert sum(plane.acquisition == "9" for plane in used.planes) <= 1
    assert is_in_order(used)


def test_a_single_slice_scanned_again_takes_the_place_of_the_nearest() -> None:
    used, before = split_planes([*planes(28), *at([62.0], "2")])
    assert heights(used)[12:14] == [62.0, 65.0]
    assert heights(before) == [60.0]


def test_without_numbers_a_step_between_others_is_refused() -> None:
    series = [*at([5.0 * i for i in range(28)], "a"), *at([52.0, 57.0, 62.0, 67.0], "b")]
    (part,) = split_planes(series)
    assert part.passes == 2


def test_slices_that_fill_holes_are_no_passes() -> None:
    thin: dict[str, Any] = {"thickness_mm": 2.5}
    series = [*at([5.0 * i for i in range(28)], **thin), *at([62.5], "2", **thin)]
    assert [part.passes for part in split_planes(series)] == [0]
    assert sizes(split_planes(series)) == [29]


def numbered(first: int, given: list[Plane], **own: Any) -> list[Plane]:
    """With InstanceNumbers from the first on."""
    return [replace(p, instance=str(first + i), **own) for i, p in enumerate(given)]


def passes_of_one_number(told: str, shift_mm: float, n: int = 28) -> list[Plane]:
    by_time = told == "time"
    first = numbered(1, planes(28), acquisition_time="101000" if by_time else "")
    begin = 28 - n
    again = at([5.0 * i + shift_mm for i in range(begin, 28)])
    number = 1 if by_time else 50
    return [*first, *numbered(number, again, acquisition_time="101500" if by_time else "")]


@pytest.mark.parametrize("shift_mm", [0.3, 2.0, 2.5, -2.5, 4.0])
@pytest.mark.parametrize("told", ["time", "instance"])
def test_passes_of_one_acquisition_number_come_apart(told: str, shift_mm: float) -> None:
    assert sizes(split_planes(passes_of_one_number(told, shift_mm))) == [28, 28]
    used, before = split_planes(passes_of_one_number(told, shift_mm, n=8))
    again = [z for z in heights(used) if abs((z - shift_mm) / 5 - round((z - shift_mm) / 5)) < 1e-6]
    assert len(again) == 8
    assert len(heights(used)) + len(before.planes) == 36
    assert is_in_order(used)


def test_a_pass_back_of_one_acquisition_number_comes_apart() -> None:
    back = at([5.0 * i + 2.5 for i in reversed(range(28))])
    assert sizes(split_planes([*numbered(1, planes(28)), *numbered(29, back)])) == [28, 28]


def test_two_images_of_each_place_that_only_their_number_tells_apart_stay_together() -> None:
    assert sizes(split_planes(passes_of_one_number("instance", 0.0))) == [56]
    assert sizes(split_planes(passes_of_one_number("time", 0.0))) == [28, 28]


def overlapping(n: int = 56) -> list[Plane]:
    """Slices of 5 mm every 2.5 mm."""
    return at([2.5 * i for i in range(n)])


@pytest.mark.parametrize("step", [1, -1, 7, 9])
def test_overlapping_slices_of_one_acquisition_are_one_scan(step: int) -> None:
    order = [str(i * step % 56) for i in range(56)]
    series = [replace(p, instance=n) for p, n in zip(overlapping(), order, strict=True)]
    assert sizes(split_planes(series)) == [56]
    turns = [replace(p, acquisition_time=f"10{i // 4:02d}00.5") for i, p in enumerate(series)]
    assert sizes(split_planes(turns)) == [56]
    each = [replace(p, acquisition=str(i)) for i, p in enumerate(overlapping())]
    assert sizes(split_planes(each)) == [56]


def test_more_than_three_passes_beside_each_other_are_a_dynamic_run() -> None:
    run = [at([5.0 * i + 0.7 * n for i in range(28)], str(n)) for n in range(1, 7)]
    (part,) = split_planes(joined(run))
    assert part.passes > 3


LOW = [5.0 * i for i in range(-17, 1)]


@pytest.mark.parametrize("first_mm", [-20.0, -18.75])
@pytest.mark.parametrize("numbers", [("1", "2"), ("2", "1"), ("1", "1")])
def test_a_coarse_and_a_fine_stack_that_overlap_are_one_scan(
    first_mm: float, numbers: tuple[str, str]
) -> None:
    high = at([first_mm + 2.5 * i for i in range(42)], numbers[1], thickness_mm=2.5)
    used, before = split_planes([*at(LOW, numbers[0]), *high])
    assert before.superseded
    assert heights(used)[0] == -85.0
    assert heights(used)[-1] == first_mm + 2.5 * 41
    thick = [p.thickness_mm for p in sorted(used.planes, key=height)]
    assert thick == sorted(thick, key=lambda mm: -(mm or 0))
