"""Places in a stack and values there, against scipy and against the definition of a volume."""

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from ctfm.extract.placement import Placement, is_inside, trilinear
from ctfm.extract.volume import Volume

SHAPE = (5, 7, 11)
UNEVEN_MM = np.array([0.0, 4.0, 8.0, 15.0, 22.0])


def places(count: int, *, beyond: float) -> np.ndarray:
    rng = np.random.default_rng(count)
    last = np.array(SHAPE)[:, None] - 1.0
    found: np.ndarray = rng.uniform(-beyond, last + beyond, (3, count))
    return found


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_interpolates_as_scipy_does(dtype: type) -> None:
    values: np.ndarray = np.random.default_rng(0).normal(0, 800, SHAPE).astype(dtype)
    where = places(999, beyond=0.5)
    found, inside = trilinear(values, where)
    expected = map_coordinates(values, where, np.float64, order=1, cval=np.nan, prefilter=False)
    np.testing.assert_array_equal(inside, np.isfinite(expected))
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-3)


def test_gives_every_voxel_itself_and_outside_the_nearest() -> None:
    values = np.random.default_rng(1).integers(-1024, 3000, SHAPE).astype(np.int16)
    at = np.indices(SHAPE).astype(np.float64)
    found, inside = trilinear(values, at)
    assert inside.all()
    np.testing.assert_array_equal(found, values)
    found, inside = trilinear(values, at + np.array([9.0, 0, -20.0])[:, None, None, None])
    assert not inside.any()
    np.testing.assert_array_equal(found, np.broadcast_to(values[-1:, :, :1], SHAPE))


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1)])
def test_an_axis_of_one_voxel_is_the_same_everywhere(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(3)
    values = rng.integers(-1000, 1000, shape).astype(np.int16)
    places = rng.uniform(-1, 4, (3, 50))
    expected = map_coordinates(values.astype(float), places, order=1, mode="nearest")
    np.testing.assert_allclose(trilinear(values, places)[0], expected, atol=2e-3)


def test_the_centres_of_the_outermost_voxels_are_inside() -> None:
    last = np.array(SHAPE)[:, None] - 1.0
    assert is_inside(SHAPE, np.hstack([np.zeros((3, 1)), last])).all()
    assert not is_inside(SHAPE, np.hstack([last + 1e-9, -1e-9 * np.ones((3, 1))])).any()


def test_voxels_of_a_sheared_uneven_stack_come_back() -> None:
    tilt = np.deg2rad(14)
    volume = Volume(
        hu=np.zeros(SHAPE, np.int16),
        slice_origin_mm=np.array([30.0, 40.0, -900.0]) + np.outer(UNEVEN_MM, [0.0, 0.1, 1.0]),
        row_step_mm=np.array([0.0, -np.cos(tilt), -np.sin(tilt)]) * 1.9,
        column_step_mm=np.array([-2.3, 0.0, 0.0]),
    )
    stack = Placement.of(volume)
    z, y, x = np.indices(SHAPE).reshape(3, -1)
    world_mm = (
        volume.slice_origin_mm[z]
        + y[:, None] * volume.row_step_mm
        + x[:, None] * volume.column_step_mm
    )
    found = stack.voxels(stack.stack_from_world @ world_mm.T)
    np.testing.assert_allclose(found, [z, y, x], atol=1e-9)
    above_mm = world_mm[-1:] + np.array([0.0, 0.0, 9.0])
    assert stack.voxels(stack.stack_from_world @ above_mm.T)[0] == -2
    assert not stack.contains(above_mm).any()
