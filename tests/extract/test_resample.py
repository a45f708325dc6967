"""Resampling against pointwise interpolation of analytic volumes in true stacks of slices."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation

from ctfm.extract.augment import Warp
from ctfm.extract.resample import (
    OUTSIDE_HU,
    block_mean,
    block_starts,
    reduce_volume,
    resample,
)
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

SIZE_PX, IN_PLANE_MM, SLICE_MM, MAX_SLICES = 40, 2.0, 4.0, 13
EVEN_MM = np.arange(25) * 2.5
UNEVEN_MM = np.array([0, 4, 8, 12, 16, 19, 26, 33, 40, 47, 54, 60.0])
RAMP = np.array([1.7, -2.3, 3.1])


def stack(
    along_mm: np.ndarray,
    *,
    tilt_deg: float = 0.0,
    pixel_mm: tuple[float, float] = (2.2, 2.6),
    shape: tuple[int, int] = (71, 61),
) -> Volume:
    """Zeros, in slices tilted about x whose origins move along z alone: a gantry tilt."""
    tilt = np.deg2rad(tilt_deg)
    row = np.array([0.0, np.cos(tilt), np.sin(tilt)]) * pixel_mm[0]
    column = np.array([1.0, 0.0, 0.0]) * pixel_mm[1]
    corner = -(shape[0] - 1) / 2 * row - (shape[1] - 1) / 2 * column
    origins = corner + np.outer(along_mm - along_mm.mean() - 25.0, [0, 0, 1 / np.cos(tilt)])
    return Volume(
        hu=np.zeros((len(along_mm), *shape), np.int16),
        slice_origin_mm=origins,
        row_step_mm=row,
        column_step_mm=column,
    )


def on_grid(
    volume: Volume, world_from_head: np.ndarray, *, warp: Warp | None = None
) -> tuple[np.ndarray, np.ndarray]:
    return resample(
        reduce_volume(volume, in_plane_mm=IN_PLANE_MM, slice_mm=SLICE_MM),
        world_from_head,
        size_px=SIZE_PX,
        in_plane_mm=IN_PLANE_MM,
        slice_mm=SLICE_MM,
        max_slices=MAX_SLICES,
        warp=warp,
    )


def places_mm(volume: Volume) -> np.ndarray:
    """RAS position of every voxel, (z, y, x, 3)."""
    _, rows, columns = volume.hu.shape
    y, x = np.arange(rows)[:, None, None], np.arange(columns)[:, None]
    in_plane = y * volume.row_step_mm + x * volume.column_step_mm
    places: np.ndarray = volume.slice_origin_mm[:, None, None] + in_plane
    return places


def filled(volume: Volume, hu: np.ndarray) -> Volume:
    return replace(volume, hu=np.rint(hu).astype(np.int16))


def pose(*, rotation_deg: tuple[float, float, float], shift_mm: tuple[float, ...]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", rotation_deg, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def grid_mm(position_mm: np.ndarray) -> np.ndarray:
    """Head-frame position of every voxel of the grid, as the architecture page defines it."""
    x = ((SIZE_PX - 1) / 2 - np.arange(SIZE_PX)) * IN_PLANE_MM
    y = ((SIZE_PX - 1) / 2 - np.arange(SIZE_PX)) * IN_PLANE_MM
    zz, yy, xx = np.meshgrid(position_mm, y, x, indexing="ij")
    return np.stack([xx, yy, zz], axis=-1)


def to_world(points_mm: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    moved: np.ndarray = points_mm @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def slabs_inside(volume: Volume, position_mm: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Pixels of the grid whose slab lies between the outermost slice centres and within them."""
    normal = np.cross(volume.column_step_mm, volume.row_step_mm)
    normal /= np.linalg.norm(normal)
    basis = np.stack([normal, volume.row_step_mm, volume.column_step_mm], axis=1)
    origins = volume.slice_origin_mm @ np.linalg.inv(basis).T
    whole = np.ones((len(position_mm), SIZE_PX, SIZE_PX), bool)
    for shift_mm in (-SLICE_MM / 2, SLICE_MM / 2):
        points = to_world(grid_mm(position_mm + shift_mm), matrix) @ np.linalg.inv(basis).T
        whole &= (points[..., 0] > origins[0, 0]) & (points[..., 0] < origins[-1, 0])
        for axis in (1, 2):
            first = np.interp(points[..., 0], origins[:, 0], origins[:, axis])
            index = points[..., axis] - first
            whole &= (index > 0) & (index < volume.hu.shape[axis] - 1)
    return whole


@pytest.mark.parametrize("tilt_deg", [0.0, 18.5, -12.0])
@pytest.mark.parametrize("along_mm", [EVEN_MM, UNEVEN_MM], ids=["even", "uneven"])
def test_a_linear_ramp_comes_back_exactly(along_mm: np.ndarray, tilt_deg: float) -> None:
    volume = stack(along_mm, tilt_deg=tilt_deg)
    volume = filled(volume, places_mm(volume) @ RAMP)
    world_from_head = pose(rotation_deg=(7, -5, 11), shift_mm=(4.0, -3.0, 9.0))
    hu, position_mm = on_grid(volume, world_from_head)
    expected = to_world(grid_mm(position_mm), world_from_head) @ RAMP
    whole = slabs_inside(volume, position_mm, world_from_head)
    assert whole.mean() > 0.4
    assert np.abs(hu - expected)[whole].max() <= 1.01  # rounded twice


def test_matches_pointwise_interpolation_averaged_over_each_slab() -> None:
    volume = stack(EVEN_MM)
    x, y, z = np.moveaxis(places_mm(volume), -1, 0)
    volume = filled(volume, 300 * np.sin(x / 9) * np.cos(y / 11) + 200 * np.cos(z / 7))
    world_from_head = pose(rotation_deg=(9, 4, -6), shift_mm=(1.0, 2.0, 5.0))
    hu, position_mm = on_grid(volume, world_from_head)
    axes = (
        volume.slice_origin_mm[:, 2],
        volume.slice_origin_mm[0, 1] + np.arange(71) * 2.2,
        volume.slice_origin_mm[0, 0] + np.arange(61) * 2.6,
    )
    reference = RegularGridInterpolator(axes, volume.hu.astype(float))
    planes = []
    for part in (-1.0, 1.0):  # two source slices fit into a slab
        points = grid_mm(position_mm + part)[3:-3, 5:-5, 5:-5]
        planes.append(reference(to_world(points, world_from_head)[..., ::-1]))
    assert np.abs(hu[3:-3, 5:-5, 5:-5] - np.mean(planes, axis=0)).max() <= 0.51


def test_thin_slices_are_averaged_over_the_slab() -> None:
    volume = stack(np.arange(120) * 0.625)
    z = places_mm(volume)[..., 2]
    volume = filled(volume, np.where((np.floor(z / 0.625) % 2) == 0, 100, 300))
    hu, _ = on_grid(volume, np.eye(4))
    assert np.abs(hu[1:-1, 4:-4, 4:-4].astype(float) - 200).max() <= 12


@pytest.mark.parametrize(("n_thin", "n_thick"), [(60, 8), (30, 9)])
def test_thin_and_thick_slices_in_one_stack_are_each_averaged_as_they_are(
    n_thin: int, n_thick: int
) -> None:
    """Thin slices are averaged, thick ones are not, whichever are the more."""
    thin_mm = np.arange(n_thin) * 0.625
    thick_mm = thin_mm[-1] + 4.1 + np.arange(n_thick) * 7.5
    volume = stack(np.concatenate([thick_mm[::-1] * -1, thin_mm[::-1] * -1]))
    noise = np.resize([100, 300], n_thin)
    steps = np.resize([0, 900, 0, 0, 700], n_thick)
    per_slice = np.concatenate([steps, noise])
    volume = filled(volume, np.broadcast_to(per_slice[:, None, None], volume.hu.shape))
    z_mm = volume.slice_origin_mm[:, 2]
    matrix = pose(rotation_deg=(0, 0, 0), shift_mm=(0.0, 0.0, z_mm[-1]))
    hu, position_mm = resample(
        reduce_volume(volume, in_plane_mm=IN_PLANE_MM, slice_mm=SLICE_MM),
        matrix,
        size_px=SIZE_PX,
        in_plane_mm=IN_PLANE_MM,
        slice_mm=SLICE_MM,
        max_slices=40,
    )
    middle = hu[:, 20, 20].astype(float)
    world_mm = position_mm + z_mm[-1]
    fine = np.linspace(-SLICE_MM / 2, SLICE_MM / 2, 401)
    slabs = np.interp(world_mm[:, None] + fine, z_mm, per_slice).mean(axis=1)
    thick = world_mm + SLICE_MM / 2 < z_mm[n_thick - 1]
    thin = world_mm - SLICE_MM / 2 > z_mm[n_thick] + 2
    assert thick.sum() > 8
    assert thin.sum() > 3
    # Where the slope changes inside a slab, planes miss some of it: 900 HU in 7.5 mm at most.
    assert np.abs(middle - slabs)[thick].max() < 60
    assert np.abs(middle - 200)[thin].max() <= 12


def test_blocks_are_as_thick_as_allowed_where_slices_are_thin() -> None:
    gaps_mm = np.array([0.6, 0.6, 0.6, 0.6, 5.0, 5.0, 0.4, 0.4, 0.4, 0.4])
    assert block_starts(gaps_mm, most_mm=1.3) == [0, 2, 4, 5, 6, 9]
    assert block_starts(np.array([1.0]), most_mm=0.5) == [0, 1]
    rounded = np.array([0.62, 0.63, 0.62, 0.63, 0.62])
    assert block_starts(rounded, most_mm=1.25) == [0, 2, 4]


def test_an_edge_between_slabs_stays_between_them() -> None:
    volume = stack(np.arange(160) * 0.5)
    z = places_mm(volume)[..., 2]
    volume = filled(volume, np.where(z > -24.0, 0, 1000))
    hu, position_mm = on_grid(volume, np.eye(4))
    middle = hu[:, 20, 20]
    assert np.abs(middle[position_mm > -21]).max() == 0
    assert np.abs(middle[position_mm < -27] - 1000).max() == 0
    assert abs(int(middle[position_mm == -22][0])) < 100


def test_a_ball_appears_at_its_pixel_nose_up_and_right_on_the_left() -> None:
    volume = stack(np.arange(40) * 1.5, tilt_deg=10)
    world_from_head = pose(rotation_deg=(-8, 6, 12), shift_mm=(3.0, -4.0, 2.0))
    ball_mm = np.array([21.0, 9.0, -30.0])  # patient's right, front, below the vertex
    distance = np.linalg.norm(places_mm(volume) - to_world(ball_mm, world_from_head), axis=-1)
    volume = filled(volume, np.where(distance < 6, 1000, 0))
    hu, position_mm = on_grid(volume, world_from_head)
    weights = np.maximum(hu, 0).astype(float)
    s, y, x = (np.indices(hu.shape) * weights).sum(axis=(1, 2, 3)) / weights.sum()
    assert np.interp(s, np.arange(len(position_mm)), position_mm) == pytest.approx(-30, abs=0.4)
    assert y == pytest.approx(39 / 2 - 9 / 2, abs=0.2)  # above the middle of the picture
    assert x == pytest.approx(39 / 2 - 21 / 2, abs=0.2)  # left of it


def test_only_slabs_inside_the_scan_become_rows() -> None:
    volume = stack(np.arange(12) * 3.0, shape=(91, 81))  # 36 mm of scan, ends included
    top_mm = volume.slice_origin_mm[-1, 2] + 1.5
    world_from_head = pose(rotation_deg=(0, 0, 0), shift_mm=(0.0, 0.0, top_mm + 8.0))
    hu, position_mm = on_grid(volume, world_from_head)
    np.testing.assert_allclose(position_mm, -4.0 * np.arange(2, 11) - 2)
    assert (hu[:, 20, 20] == 0).all()


def test_a_slab_that_a_tilted_scan_half_covers_is_a_row_and_empty_outside() -> None:
    volume = stack(np.arange(24) * 2.0, shape=(121, 101))
    world_from_head = pose(rotation_deg=(20, 0, 0), shift_mm=(0.0, 0.0, 0.0))
    hu, _ = on_grid(volume, world_from_head)
    assert len(hu) == 13
    assert {OUTSIDE_HU, 0} <= set(np.unique(hu[-1]))
    assert (hu[0, -3:] == OUTSIDE_HU).all() != (hu[0, :3] == OUTSIDE_HU).all()


def test_a_scan_elsewhere_gives_no_row() -> None:
    hu, position_mm = on_grid(
        stack(EVEN_MM), pose(rotation_deg=(0, 0, 0), shift_mm=(0.0, 0.0, 500.0))
    )
    assert hu.shape == (0, 40, 40)
    assert position_mm.shape == (0,)


def test_a_slab_that_is_partly_outside_is_the_mean_of_what_is_inside() -> None:
    volume = stack(EVEN_MM)
    volume = filled(volume, np.full(volume.hu.shape, 37))
    hu, _ = on_grid(volume, pose(rotation_deg=(12, -9, 4), shift_mm=(0.0, 0.0, 2.0)))
    assert set(np.unique(hu)) == {OUTSIDE_HU, 37}


def test_one_slice_is_refused() -> None:
    with pytest.raises(ScanError) as caught:
        on_grid(stack(np.array([0.0])), np.eye(4))
    assert caught.value.reason == Reason.TOO_FEW_SLICES


def test_nothing_overshoots_at_an_edge() -> None:
    volume = stack(EVEN_MM)
    volume = filled(volume, np.where(places_mm(volume)[..., 0] > 3.3, 2000, -1000))
    hu, _ = on_grid(volume, pose(rotation_deg=(3, 14, 25), shift_mm=(0.0, 0.0, 0.0)))
    assert hu.min() == -1000
    assert hu.max() == 2000


def test_slices_that_run_backwards_in_x_and_y_give_the_same() -> None:
    volume = stack(EVEN_MM)
    volume = filled(volume, places_mm(volume) @ RAMP)
    last = (volume.hu.shape[1] - 1) * volume.row_step_mm
    last = last + (volume.hu.shape[2] - 1) * volume.column_step_mm
    turned = Volume(
        hu=np.ascontiguousarray(volume.hu[:, ::-1, ::-1]),
        slice_origin_mm=volume.slice_origin_mm + last,
        row_step_mm=-volume.row_step_mm,
        column_step_mm=-volume.column_step_mm,
    )
    mirrored = Volume(
        hu=np.ascontiguousarray(volume.hu[:, :, ::-1]),
        slice_origin_mm=volume.slice_origin_mm + 60 * volume.column_step_mm,
        row_step_mm=volume.row_step_mm,
        column_step_mm=-volume.column_step_mm,
    )
    expected, _ = on_grid(volume, np.eye(4))
    for other in (turned, mirrored):
        assert np.abs(on_grid(other, np.eye(4))[0] - expected).max() <= 1


def test_reducing_keeps_places() -> None:
    volume = stack(np.arange(90) * 0.6, pixel_mm=(0.5, 0.45), shape=(203, 181), tilt_deg=7)
    volume = filled(volume, places_mm(volume) @ RAMP)
    small = reduce_volume(volume, in_plane_mm=1.0, slice_mm=4.0)
    assert small.hu.shape == (45, 101, 90)
    assert np.abs(small.hu - places_mm(small) @ RAMP).max() <= 1.0
    assert reduce_volume(small, in_plane_mm=0.8, slice_mm=3.0) is small


def test_a_last_incomplete_block_of_slices_is_kept() -> None:
    volume = stack(np.arange(11) * 1.0)
    volume = filled(volume, places_mm(volume) @ RAMP)
    small = block_mean(volume, starts=[0, 4, 8], n_rows=3, n_columns=2)
    assert small.hu.shape == (3, 23, 30)
    assert np.abs(small.hu - places_mm(small) @ RAMP).max() <= 1.0  # rounded twice


STILL = Warp(
    rotation_rad=(0, 0, 0),
    scale=(1, 1, 1),
    mirror=(False, False, False),
    alpha=0,
    sigma_voxels=10,
    seed=5,
)


def test_a_warp_that_does_nothing_changes_nothing() -> None:
    volume = stack(UNEVEN_MM, tilt_deg=9)
    volume = filled(volume, 500 * np.sin(places_mm(volume).sum(axis=-1) / 15))
    world_from_head = pose(rotation_deg=(3, -7, 5), shift_mm=(0.0, 0.0, 5.0))
    plain, position_mm = on_grid(volume, world_from_head)
    warped, warped_mm = on_grid(volume, world_from_head, warp=STILL)
    np.testing.assert_array_equal(warped, plain)
    np.testing.assert_array_equal(warped_mm, position_mm)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["x", "y", "z"])
def test_mirroring_flips_the_block_of_rows(axis: int) -> None:
    volume = stack(EVEN_MM)
    volume = filled(volume, places_mm(volume) @ RAMP)
    plain, _ = on_grid(volume, np.eye(4))
    mirror = (axis == 0, axis == 1, axis == 2)
    warped, _ = on_grid(volume, np.eye(4), warp=replace(STILL, mirror=mirror))
    assert np.abs(warped - np.flip(plain, 2 - axis)).max() <= 1


def test_a_warp_takes_values_from_where_its_matrix_and_field_say() -> None:
    volume = stack(np.arange(60) * 2.0, shape=(91, 81))
    volume = filled(volume, places_mm(volume) @ RAMP)
    warp = Warp(
        rotation_rad=(0.1, -0.06, 0.08),
        scale=(0.9, 1.1, 0.95),
        mirror=(True, False, False),
        alpha=200,
        sigma_voxels=11,
        seed=3,
    )
    hu, position_mm = on_grid(volume, np.eye(4), warp=warp)
    field = warp.elastic(hu.shape)
    middle_mm = np.array([0, 0, position_mm.mean()])
    for row in (2, 6, 10):
        moved_mm = -field.plane(float(row))[::-1] * np.array([2.0, 2.0, 4.0])[:, None, None]
        plain_mm = grid_mm(position_mm)[row] - middle_mm
        place_mm = (plain_mm + np.moveaxis(moved_mm, 0, -1)) @ warp.matrix().T + middle_mm
        difference = hu[row] - place_mm @ RAMP
        assert np.abs(difference[6:-6, 6:-6]).max() <= 1.5
