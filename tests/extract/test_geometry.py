"""Order, spacing, gaps and tilt of planes whose positions are written down here."""

from typing import Any

import numpy as np
import pytest
from jaxtyping import Float

from ctfm.extract.geometry import (
    Stack,
    check_head_stack,
    check_order,
    level_planes,
    lost_slices,
    measure_stack,
)
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

# An axial plane as scanners write it: columns to the patient's left, rows to the back (RAS).
COLUMN_STEP = np.array([-0.5, 0.0, 0.0])
ROW_STEP = np.array([0.0, -0.4, 0.0])


def stack_at(z_mm: list[float], **changed: Float[np.ndarray, "3"]) -> Stack:
    origins = np.array([[110.0, 130.0, z] for z in z_mm])
    return measure_stack(
        origins,
        row_step_mm=changed.get("row_step_mm", ROW_STEP),
        column_step_mm=changed.get("column_step_mm", COLUMN_STEP),
    )


def reason_of(stack: Stack) -> Reason:
    with pytest.raises(ScanError) as caught:
        check_head_stack(stack)
    return caught.value.reason


def test_planes_are_ordered_feet_to_head_however_they_come() -> None:
    stack = stack_at([15.0, -5.0, 5.0, 0.0, 10.0])
    assert stack.order.tolist() == [1, 3, 2, 4, 0]
    assert stack.gap_mm.tolist() == [5.0] * 4
    assert (stack.spacing_mm, stack.coverage_mm) == (5.0, 20.0)


def test_the_order_does_not_depend_on_the_sense_of_rows_and_columns() -> None:
    feet_first = stack_at([0.0, 9.0, 3.0], column_step_mm=-COLUMN_STEP)
    assert feet_first.order.tolist() == [0, 2, 1]


def test_spacing_is_measured_along_the_normal_of_tilted_planes() -> None:
    tilt = np.radians(18.5)
    # The front edge is higher: going back along a column, z falls.
    row_step = 0.4 * np.array([0.0, -np.cos(tilt), -np.sin(tilt)])
    stack = stack_at([4.22 * i for i in range(12)], row_step_mm=row_step)
    assert stack.tilt_deg == pytest.approx(18.5, abs=1e-6)
    assert stack.spacing_mm == pytest.approx(4.22 * np.cos(tilt))
    assert stack.obliquity_deg == pytest.approx(18.5, abs=1e-6)
    backwards = stack_at([0.0, 4.0, 8.0], row_step_mm=row_step * np.array([1, 1, -1]))
    assert backwards.tilt_deg == pytest.approx(-18.5, abs=1e-6)


def test_an_oblique_stack_that_advances_along_its_normal_has_no_tilt() -> None:
    angle = np.radians(20)
    normal = np.array([0.0, -np.sin(angle), np.cos(angle)])
    origins = np.outer(np.arange(9) * 3.0, normal)
    row_step = 0.4 * np.array([0.0, -np.cos(angle), -np.sin(angle)])
    stack = measure_stack(origins, row_step_mm=row_step, column_step_mm=COLUMN_STEP)
    assert stack.tilt_deg == pytest.approx(0.0, abs=1e-6)
    assert stack.obliquity_deg == pytest.approx(20.0)


@pytest.mark.parametrize(
    "gaps",
    [
        [5.0] * 8,
        [4.0] * 13 + [1.08] + [7.0] * 13,  # two blocks that overlap
        [2.5] * 8 + [7.5] * 12,
        [4.0] * 6 + [5.5] + [7.0] * 6,
        [5.0, 5.0, 2.0, 3.0, 5.0, 5.0],  # one slice more
        [5.0, 5.0, 5.0, 2.0, 5.0],
        [3.0, 3.2, 2.9, 3.1],
    ],
)
def test_a_change_of_spacing_is_no_missing_slice(gaps: list[float]) -> None:
    assert lost_slices(np.array(gaps)) == []


@pytest.mark.parametrize(
    ("gaps", "lost"),
    [
        ([5.0, 5.0, 10.0], [2]),
        ([10.0, 5.0, 5.0], [0]),
        ([5.0, 5.0, 10.0, 5.0, 5.0], [2]),
        ([5.0, 10.0, 5.0, 10.0, 5.0], [1, 3]),
        ([5.0, 5.0, 10.0, 10.0, 5.0, 5.0], [2, 3]),
        ([4.0, 4.0, 8.0, 4.0, 4.0, 7.0, 7.0, 7.0], [2]),
        ([4.0] * 5 + [7.0] * 3 + [14.0] + [7.0] * 3, [8]),
        ([202.5, 1.25, 1.25], [0]),
    ],
)
def test_a_single_gap_in_an_even_stack_is_a_missing_slice(
    gaps: list[float], lost: list[int]
) -> None:
    assert lost_slices(np.array(gaps)) == lost


def test_images_at_one_position_are_no_volume() -> None:
    assert reason_of(stack_at([0.0, 5.0, 5.0, 10.0, 15.0])) is Reason.DUPLICATE_POSITIONS


def test_a_missing_slice_is_named_by_its_place() -> None:
    with pytest.raises(ScanError, match=r"1 gap is .*10 mm after slice 3") as caught:
        check_order(stack_at([0.0, 5.0, 10.0, 20.0, 25.0, 30.0]))
    assert caught.value.reason is Reason.MISSING_SLICES


def test_too_few_slices_or_too_short_a_stack_are_no_head() -> None:
    assert reason_of(stack_at([0.0])) is Reason.TOO_FEW_SLICES
    assert reason_of(stack_at([0.0, 20.0, 40.0])) is Reason.TOO_FEW_SLICES
    assert reason_of(stack_at([float(z) for z in range(12)])) is Reason.TOO_FEW_SLICES
    check_head_stack(stack_at([0.0, 10.0, 20.0, 30.0]))


def test_a_coronal_stack_is_not_axial() -> None:
    down = np.array([0.0, 0.0, -0.4])
    origins = np.array([[0.0, y, 0.0] for y in range(0, 90, 3)])
    stack = measure_stack(origins, row_step_mm=down, column_step_mm=COLUMN_STEP)
    assert stack.obliquity_deg == pytest.approx(90.0)
    assert reason_of(stack) is Reason.NOT_AXIAL


def test_a_stack_that_slides_sideways_is_refused() -> None:
    origins = np.array([[0.0, 6.0 * i, 4.0 * i] for i in range(9)])
    stack = measure_stack(origins, row_step_mm=ROW_STEP, column_step_mm=COLUMN_STEP)
    assert reason_of(stack) is Reason.BAD_GEOMETRY


@pytest.mark.parametrize(
    "row_step",
    [
        np.array([0.0, 0.0, 0.0]),
        np.array([0.0, -40.0, 0.0]),
        np.array([np.nan, -0.4, 0.0]),
        np.array([-0.2, -0.4, 0.0]),
    ],
)
def test_an_impossible_pixel_is_refused(row_step: Float[np.ndarray, "3"]) -> None:
    with pytest.raises(ScanError, match="bad_geometry"):
        stack_at([0.0, 5.0], row_step_mm=row_step)


def turned_planes(degrees: list[float]) -> dict[str, Any]:
    """Planes of 11 x 7 pixels of 2 and 3 mm, 5 mm apart, each turned about its first voxel."""
    angle = np.radians(degrees)
    zeros = np.zeros(len(angle))
    return {
        "origin_mm": np.array([(10.0, 20.0, 5.0 * i) for i in range(len(angle))]),
        "row_step_mm": 2 * np.stack([zeros, -np.cos(angle), np.sin(angle)], axis=1),
        "column_step_mm": np.tile([-3.0, 0.0, 0.0], (len(angle), 1)),
        "shape": (11, 7),
    }


def test_planes_of_one_orientation_stay_as_they_are() -> None:
    planes = turned_planes([7.0] * 5)
    level = level_planes(**planes)
    assert level.origin_mm is planes["origin_mm"]
    np.testing.assert_array_equal(level.row_step_mm, planes["row_step_mm"][0])


def test_noise_of_orientation_is_levelled_about_the_voxel_that_leaves_the_stack_even() -> None:
    planes = turned_planes([0.4, -0.2, 0.3, -0.5, 0.0])
    level = level_planes(**planes)
    np.testing.assert_array_equal(level.origin_mm, planes["origin_mm"])
    np.testing.assert_allclose(level.row_step_mm, [0, -2, 0], atol=1e-4)
    about_middle = planes | {"origin_mm": planes["origin_mm"] - 5 * planes["row_step_mm"]}
    level = level_planes(**about_middle)
    np.testing.assert_allclose(level.origin_mm, planes["origin_mm"] + [0, 10, 0], atol=1e-3)


def test_planes_that_are_not_parallel_are_no_stack() -> None:
    with pytest.raises(ScanError, match="not parallel"):
        level_planes(**turned_planes([0.0, 0.0, 20.0]))


@pytest.mark.parametrize("n", [1, 2, 11, 21])
def test_messages_count_in_the_singular_only_what_is_one(n: int) -> None:
    lost = [float(z) for i in range(n + 1) for z in range(35 * i, 35 * i + 30, 5)]
    with pytest.raises(ScanError, match=rf": {n} gap" + (" is " if n == 1 else "s are ")):
        check_order(stack_at(lost))
    with pytest.raises(ScanError, match=rf": {n} slice" + (" " if n == 1 else "s ") + "over"):
        check_head_stack(stack_at([float(z) for z in range(n)]))


def mixed(*stacks_mm: list[float]) -> list[float]:
    return sorted(z for stack_mm in stacks_mm for z in stack_mm)


def test_stacks_that_lie_between_each_other_are_told_from_lost_slices() -> None:
    thick, thin = [5.0 * i for i in range(18)], [2.0 * i + 0.5 for i in range(60)]
    upper = [68.75 + 2.5 * i for i in range(30)]
    every_third = [5.0 * i for i in range(36) if i % 3]
    lost_below_thick = mixed([4.0 * i for i in range(12) if i not in (4, 8)], [51, 58, 65, 72])
    for z_mm, alternate in (
        (mixed(thick, thin), True),
        (mixed(thick, upper), True),
        (every_third, False),
        (lost_below_thick, False),
    ):
        with pytest.raises(ScanError) as caught:
            check_order(stack_at(z_mm))
        assert caught.value.reason is Reason.MISSING_SLICES
        assert ("may alternate" in caught.value.detail) is alternate
