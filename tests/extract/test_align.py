"""Alignment: a drawn head in a known pose, and real heads moved by known rigid motions."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from ctfm.extract.align import find_head_frame, find_scanner_frame
from ctfm.extract.dome import DOME_PITCH_DEG
from ctfm.extract.placement import Placement
from ctfm.extract.reading import read_volume
from ctfm.extract.template import register_to_template
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SKULL_MM, SCALP_MM = 7.0, 6.0
INNER_MM = np.array([68.0, 83.0, 62.0])  # across, long, short
LONG_MM, SHORT_MM = INNER_MM[1:] + SKULL_MM + SCALP_MM
TILT = np.deg2rad(-DOME_PITCH_DEG)
VERTEX_MM = float(np.hypot(LONG_MM * np.sin(TILT), SHORT_MM * np.cos(TILT)))

Paint = Callable[[np.ndarray], np.ndarray]


def drawn_head(points_mm: np.ndarray, *, lesions: bool = False) -> np.ndarray:
    """HU at points of the head frame: layers below an ellipsoid, ventricles, a face and a neck."""
    x, y, z = np.moveaxis(points_mm, -1, 0)
    z = z + VERTEX_MM
    long = y * np.cos(TILT) + z * np.sin(TILT)
    short = z * np.cos(TILT) - y * np.sin(TILT)

    def within(margin_mm: float) -> np.ndarray:
        a, b, c = INNER_MM + margin_mm
        inside: np.ndarray = (x / a) ** 2 + (long / b) ** 2 + (short / c) ** 2 < 1
        return inside

    hu = np.full(x.shape, -1000.0)
    hu[(np.hypot(x, y + 20) < 58) & (z < -20)] = 50  # neck
    hu[(x / 62) ** 2 + ((y - 40) / 58) ** 2 + ((z + 75) / 60) ** 2 < 1] = 60  # face
    hu[within(SKULL_MM + SCALP_MM)] = 20
    floor_mm = np.where(y > 20, -28, np.where(np.abs(x) < 20, -40, -52))  # of the skull's base
    hu[within(SKULL_MM) & (z > floor_mm - SKULL_MM)] = 900
    hu[within(0) & (z > floor_mm)] = 33
    hu[(np.abs(np.abs(x) - 14) < 7) & (np.abs(y) < 30) & (np.abs(z) < 12)] = 6
    hu[(np.abs(x) < 2) & (y > 20) & (np.abs(z + 70) < 30)] = 700  # nasal septum
    hu[(np.abs(np.abs(x) - 30) < 14) & (np.abs(y - 75) < 12) & (np.abs(z + 50) < 12)] = -900
    if lesions:
        hu[within(0) & ~within(-14) & (x > 20)] = 75  # a subdural bleed on the right
        hu[(x + 35) ** 2 + (y + 30) ** 2 + z**2 < 30**2] = 15  # an infarct on the left
        swollen = ((x - 45) ** 2 + (y - 45) ** 2 + (z - 30) ** 2 < 28**2) & (hu < -500)
        hu[swollen] = 60
    return hu


def couch(points_mm: np.ndarray) -> np.ndarray:
    """HU of a head rest and a table in world coordinates: air where there is neither."""
    x, y, _ = np.moveaxis(points_mm, -1, 0)
    radius = np.hypot(x, y)
    hu = np.full(x.shape, -1000.0)
    hu[(np.abs(radius - 104) < 3) & (y < -20)] = 150
    hu[(np.abs(y + 125) < 6)] = 80
    return hu


def scanned(
    world_from_head: np.ndarray,
    *,
    z_mm: np.ndarray,
    paint: Paint = drawn_head,
    tilt_deg: float = 0.0,
    noise_hu: float = 8.0,
    with_couch: bool = True,
) -> Volume:
    """A scan of a head: axial slices (tilted ones sheared), 1.9 and 2.1 mm pixels."""
    rows, columns = 140, 128
    tilt = np.deg2rad(tilt_deg)
    row = np.array([0, -np.cos(tilt), -np.sin(tilt)]) * 1.9
    column = np.array([-2.1, 0, 0])
    corner = -(rows - 1) / 2 * row - (columns - 1) / 2 * column
    origins = corner + np.outer(z_mm, [0, 0, 1.0])
    in_plane = np.arange(rows)[:, None, None] * row + np.arange(columns)[:, None] * column
    hu = np.zeros((len(z_mm), rows, columns))
    for part in (-1 / 3, 0, 1 / 3):  # a slice is the mean over its thickness
        depth = np.outer(part * np.gradient(z_mm), [0, 0, 1.0])
        points = (origins + depth)[:, None, None] + in_plane
        plane = paint((points - world_from_head[:3, 3]) @ world_from_head[:3, :3])
        hu += np.maximum(plane, couch(points)) / 3 if with_couch else plane / 3
    hu += np.random.default_rng(0).normal(0, noise_hu, hu.shape)
    return Volume(
        hu=np.rint(hu).astype(np.int16),
        slice_origin_mm=origins,
        row_step_mm=row,
        column_step_mm=column,
    )


def pose(rotation_deg: tuple[float, ...], shift_mm: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    """Head to world: turned about the middle of the head, then shifted."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(rotation_deg, degrees=True).as_matrix()
    middle = np.array([0, 0, -80.0])
    matrix[:3, 3] = -matrix[:3, :3] @ middle + shift_mm
    return matrix


def error(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Degrees, and mm in the middle of the head."""
    between = np.linalg.inv(truth) @ found
    middle = np.array([0, 0, -80, 1.0])
    degrees = np.rad2deg(Rotation.from_matrix(between[:3, :3]).magnitude())
    return float(degrees), float(np.linalg.norm((between @ middle - middle)[:3]))


AXIAL_MM = np.arange(-95, 95, 5.0)


@pytest.mark.parametrize(
    ("rotation_deg", "shift_mm"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((15, 0, 0), (5, -8, 3)),
        ((-15, 0, 0), (-20, 10, -6)),
        ((0, 15, 0), (12, 4, 0)),
        ((0, 0, -25), (0, 20, 5)),
        ((9, -8, 12), (-7, -9, 4)),
    ],
    ids=str,
)
def test_finds_the_pose_of_a_drawn_head(
    rotation_deg: tuple[float, ...], shift_mm: tuple[float, ...]
) -> None:
    truth = pose(rotation_deg, shift_mm)
    frame = find_head_frame(scanned(truth, z_mm=AXIAL_MM))
    degrees, mm = error(frame.world_from_head, truth)
    assert degrees < 1.2
    assert mm < 1.5
    assert frame.quality["similarity"] > 0.9
    assert frame.quality["residual_mm"] < 1.0


def test_the_frame_is_rigid_and_its_numbers_are_floats() -> None:
    frame = find_head_frame(scanned(pose((5, 3, -4)), z_mm=AXIAL_MM))
    rotation = frame.world_from_head[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_array_equal(frame.world_from_head[3], [0, 0, 0, 1])
    assert all(type(value) is float for value in frame.quality.values())


def test_lesions_on_one_side_move_it_little() -> None:
    truth = pose((4, -6, 8), (3, 5, 0))
    scan = scanned(truth, z_mm=AXIAL_MM, paint=lambda points: drawn_head(points, lesions=True))
    degrees, mm = error(find_head_frame(scan).world_from_head, truth)
    assert degrees < 2
    assert mm < 3


def test_gantry_tilt_and_uneven_spacing_are_seen_through() -> None:
    truth = pose((-12, 4, -9), (2, -6, 0))
    z_mm = np.concatenate([np.arange(-95, -15, 4.0), np.arange(-11, 100, 7.0)])
    frame = find_head_frame(scanned(truth, z_mm=z_mm, tilt_deg=-18))
    degrees, mm = error(frame.world_from_head, truth)
    assert degrees < 1.5
    assert mm < 2


def test_a_scan_that_ends_at_the_skull_base_is_enough() -> None:
    truth = pose((8, 5, -7))
    frame = find_head_frame(scanned(truth, z_mm=np.arange(-30, 95, 5.0)))
    degrees, mm = error(frame.world_from_head, truth)
    assert degrees < 2.5
    assert mm < 3


def test_a_cut_vertex_is_put_where_it_would_be() -> None:
    truth = pose((3, -4, 5))
    frame = find_head_frame(scanned(truth, z_mm=np.arange(-95, 62, 5.0)))  # 18 mm are missing
    degrees, mm = error(frame.world_from_head, truth)
    assert degrees < 2
    assert mm < 3


def test_a_stripped_brain_on_a_background_of_zero_is_aligned() -> None:
    def brain(points_mm: np.ndarray) -> np.ndarray:
        hu = drawn_head(points_mm)
        hu[(hu > 40) | (hu < 30)] = 0
        z = points_mm[..., 2] + VERTEX_MM
        hu[z < -70] = 0
        return hu

    truth = pose((-7, 9, 6), (4, 0, 0))
    scan = scanned(truth, z_mm=AXIAL_MM, paint=brain, noise_hu=0, with_couch=False)
    degrees, mm = error(find_head_frame(scan).world_from_head, truth)
    assert degrees < 1.5
    assert mm == pytest.approx(SKULL_MM + SCALP_MM, abs=2.5)  # its vertex is the brain's


def test_the_origin_of_the_world_does_not_matter() -> None:
    scan = scanned(pose((5, -5, 5)), z_mm=AXIAL_MM)
    motion = pose((40, -30, 20), (900, -700, 1200))
    frame = find_head_frame(moved(scan, motion)).world_from_head
    np.testing.assert_allclose(frame, motion @ find_head_frame(scan).world_from_head, atol=0.05)


@pytest.mark.parametrize(
    ("paint", "reason"),
    [
        (lambda p: np.full(p.shape[:-1], -1000.0), Reason.EMPTY),
        (lambda p: np.where(np.abs(p).max(axis=-1) < 25, 40.0, -1000), Reason.NOT_A_HEAD),
        (
            lambda p: np.where(np.hypot(p[..., 0] / 120, p[..., 1] / 90) < 1, 40.0, -1000),
            Reason.NOT_A_HEAD,
        ),
        (lambda p: np.where(np.abs(p).max(axis=-1) < 75, 40.0, -1000), Reason.NOT_A_HEAD),
    ],
    ids=["air", "bottle", "torso", "box"],
)
def test_what_is_no_head_is_refused_with_a_reason(paint: Paint, reason: Reason) -> None:
    scan = scanned(np.eye(4), z_mm=AXIAL_MM, paint=paint, with_couch=False)
    with pytest.raises(ScanError) as caught:
        find_head_frame(scan)
    assert caught.value.reason == reason


def test_the_scanner_frame_keeps_the_axes_and_puts_the_origin_on_the_head() -> None:
    truth = pose((0, 0, 0), (15, -12, 7))
    frame = find_scanner_frame(scanned(truth, z_mm=AXIAL_MM)).world_from_head
    np.testing.assert_array_equal(frame[:3, :3], np.eye(3))
    np.testing.assert_allclose(frame[:2, 3], truth[:2, 3], atol=9)  # the nose counts here
    assert frame[2, 3] == pytest.approx(truth[2, 3], abs=4.5)


def test_registering_to_a_template_gives_the_frame_of_its_axes() -> None:
    template = scanned(pose((6, 0, 0)), z_mm=AXIAL_MM, with_couch=False)
    truth = pose((-5, 6, 9), (4, 2, -3))
    frame = register_to_template(scanned(truth, z_mm=AXIAL_MM), template).world_from_head
    template_frame = find_scanner_frame(template).world_from_head
    expected = truth @ np.linalg.inv(pose((6, 0, 0))) @ template_frame
    degrees, mm = error(frame, expected)
    assert degrees < 1
    assert mm < 1.5


def moved(volume: Volume, motion: np.ndarray) -> Volume:
    """The same voxels elsewhere: exact, and the slices are oblique afterwards."""
    rotation, shift = motion[:3, :3], motion[:3, 3]
    return Volume(
        hu=volume.hu,
        slice_origin_mm=volume.slice_origin_mm @ rotation.T + shift,
        row_step_mm=rotation @ volume.row_step_mm,
        column_step_mm=rotation @ volume.column_step_mm,
    )


def middle_mm(volume: Volume) -> np.ndarray:
    _, rows, columns = volume.hu.shape
    half = (rows - 1) / 2 * volume.row_step_mm + (columns - 1) / 2 * volume.column_step_mm
    middle: np.ndarray = volume.slice_origin_mm.mean(axis=0) + half
    return middle


def rescanned(volume: Volume, motion: np.ndarray) -> Volume:
    """The moved head in a new axial stack of the old median spacing, large enough for all of it.

    Three planes a slice are averaged; beyond the old scan there is air, or the old background.
    """
    there = moved(volume, motion)
    stack = Placement.of(there)
    _, rows, columns = volume.hu.shape
    far = (rows - 1) * there.row_step_mm, (columns - 1) * there.column_step_mm
    corners = [
        o + a + b for o in there.slice_origin_mm[[0, -1]] for a in (0, far[0]) for b in (0, far[1])
    ]
    low_mm, high_mm = np.min(corners, axis=0)[2], np.max(corners, axis=0)[2]
    spacing_mm = max(1.0, float(np.median(Placement.of(volume).gaps_mm)))
    z_mm, offset_mm = np.arange(low_mm, high_mm, spacing_mm), np.arange(-128.0, 128.0, 1.6)
    centre = middle_mm(there)
    yy, xx = np.meshgrid(centre[1] - offset_mm, centre[0] - offset_mm, indexing="ij")
    background = float(max(-1000, np.median(volume.hu[:, 0])))
    hu = np.empty((len(z_mm), *xx.shape), np.int16)
    for i, z in enumerate(z_mm):
        planes = [
            look_up(there.hu, stack, np.stack([xx, yy, np.full_like(xx, z + part)]), background)
            for part in spacing_mm * np.array([-1 / 3, 0, 1 / 3])
        ]
        hu[i] = np.rint(np.mean(planes, axis=0))
    origin = np.stack([np.full_like(z_mm, xx[0, 0]), np.full_like(z_mm, yy[0, 0]), z_mm], axis=1)
    step = np.array([1.6, 0, 0])
    return Volume(hu=hu, slice_origin_mm=origin, row_step_mm=-step[[1, 0, 2]], column_step_mm=-step)


def look_up(
    hu: np.ndarray, stack: Placement, world_mm: np.ndarray, background: float
) -> np.ndarray:
    voxels = stack.voxels(np.tensordot(stack.stack_from_world, world_mm, axes=1))
    found = map_coordinates(hu, voxels, np.float32, order=1, cval=background, prefilter=False)
    clipped: np.ndarray = np.maximum(found, -1024)
    return clipped


def motions(count: int, volume: Volume) -> list[np.ndarray]:
    """±15° about each axis, then random ones up to 15°, each shifted by up to 20 mm an axis."""
    rng = np.random.default_rng(5)
    turns = [sign * 15 * axis for axis in np.eye(3) for sign in (1, -1)]
    for _ in range(max(0, count - 6)):
        direction = rng.normal(size=3)
        turns.append(direction / np.linalg.norm(direction) * rng.uniform(5, 15))
    found = []
    for turn in [turns[i] for i in rng.permutation(len(turns))[:count]]:
        motion = np.eye(4)
        motion[:3, :3] = Rotation.from_rotvec(turn, degrees=True).as_matrix()
        middle = middle_mm(volume)
        motion[:3, 3] = middle - motion[:3, :3] @ middle + rng.uniform(-20, 20, 3)
        found.append(motion)
    return found


REAL = {
    "ge": "dcm_qa_ct/GE",
    "plastic": "dcm_qa_ct/Philips",
    "atlas": "totalsegmentator/ct_brain_atlas_1mm.nii.gz",
    "stripped": "ichseg/scct_stripped_hu.nii.gz",
}


def _is_plane(file: Path, name: str) -> bool:
    """A slice of the axial series; the plastic head's study holds others, and an index."""
    if not file.is_file():
        return False
    return name != "plastic" or (file.parent.name == "S2010" and file.stat().st_size > 400_000)


@cache
def real_head(name: str) -> Volume:
    """Read from the files; of the plastic head, the axial series alone."""
    path = DATA / REAL[name]
    if not path.exists():
        pytest.skip(f"the real scans are not there: {path.name} is missing")
    if path.is_file():
        return read_volume([str(path)])
    files = sorted(str(file) for file in path.rglob("*") if _is_plane(file, name))
    return read_volume(files)


@pytest.mark.parametrize("move", [moved, rescanned], ids=["geometry", "rescanned"])
def test_real_heads_are_found_again_after_a_known_motion(
    move: Callable[[Volume, np.ndarray], Volume],
) -> None:
    errors = []
    for name in REAL:
        volume = real_head(name)
        unmoved = find_head_frame(volume).world_from_head
        for motion in motions(3, volume):
            found = find_head_frame(move(volume, motion)).world_from_head
            errors.append(error(found, motion @ unmoved))
    degrees, mm = np.median(errors, axis=0)
    assert degrees < 2
    assert mm < 3
    assert np.max(errors, axis=0)[0] < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_each_real_head_is_found_again_after_many_motions(name: str) -> None:
    volume = real_head(name)
    unmoved = find_head_frame(volume).world_from_head
    errors = [
        error(find_head_frame(rescanned(volume, motion)).world_from_head, motion @ unmoved)
        for motion in motions(24, volume)
    ]
    assert np.median(errors, axis=0)[0] < 1
    assert np.median(errors, axis=0)[1] < 1.5
    assert np.percentile(errors, 90, axis=0)[0] < 2
    assert np.percentile(errors, 90, axis=0)[1] < 3
