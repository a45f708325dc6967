"""Geometry as it comes: every voxel at its place with its HU, or a reason."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctfm.extract.index import index
from ctfm.extract.reading import read_volume

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
EVEN_MM = np.arange(0.0, 45.0, 5.0)


def tilted(degrees: float) -> tuple[float, ...]:
    """Axial axes after a turn about the patient's left-right axis: columns rise to the back."""
    angle = np.radians(degrees)
    return (1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(np.sin(angle)))


def moved(axes: tuple[float, ...], along_normal_mm: float) -> tuple[float, ...]:
    """A first voxel so far from a common one along the normal of the planes."""
    normal = np.cross(axes[:3], axes[3:])
    return tuple((np.array([-25.0, -30.0, 2.0]) + along_normal_mm * normal).tolist())


@pytest.mark.parametrize("degrees", [-24.0, -11.5, 18.0])
def test_a_gantry_tilt_stays_a_shear(tmp_path: Path, scanner: Any, degrees: float) -> None:
    scanner.save(scanner.axial(EVEN_MM, axes=tilted(degrees)), tmp_path)
    volume, line = scanner.read_usable(tmp_path)
    assert np.ptp(volume.slice_origin_mm[:, :2], axis=0).tolist() == [0, 0]
    assert line["tilt_deg"] == pytest.approx(-degrees, abs=0.01)  # columns sink to the front
    assert line["spacing_z_mm"] == pytest.approx(5 * np.cos(np.radians(degrees)), abs=0.001)


@pytest.mark.parametrize("sense", [1, -1])
def test_thin_slices_below_thick_ones_are_one_scan(
    tmp_path: Path, scanner: Any, sense: int
) -> None:
    z_mm = np.cumsum([0.0, *[2.5] * 12, *[7.5] * 9])[::sense]
    scanner.save(scanner.axial(z_mm), tmp_path)
    volume, line = scanner.read_usable(tmp_path)
    assert volume.slice_origin_mm[:, 2].tolist() == sorted(z_mm.tolist())
    assert (line["spacing_z_min_mm"], line["spacing_z_max_mm"]) == (2.5, 7.5)


def test_copied_files_are_told_from_the_scan_they_copy(tmp_path: Path, scanner: Any) -> None:
    files = scanner.save(scanner.axial(EVEN_MM), tmp_path)
    for file in files[2:5]:
        shutil.copy(file, file + "_copy")
    _, line = scanner.read_usable(tmp_path)
    assert line["n_slices"] == 9
    assert scanner.reasons(tmp_path) == {"1.2.1": "ok", "1.2.1#2": "duplicate_scan"}


def test_other_images_at_the_place_of_a_slice_are_refused(tmp_path: Path, scanner: Any) -> None:
    scanner.save(scanner.axial([*EVEN_MM, 10.0, 25.0]), tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": "duplicate_positions"}


@pytest.mark.parametrize("lost", [[4], [2, 3], [1, 6]])
def test_a_lost_slice_is_not_interpolated(tmp_path: Path, scanner: Any, lost: list[int]) -> None:
    scanner.save(scanner.axial(np.delete(EVEN_MM, lost)), tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": "missing_slices"}


def test_series_mixed_in_one_folder_come_apart(tmp_path: Path, scanner: Any) -> None:
    soft = scanner.axial(EVEN_MM, ConvolutionKernel="H30s")
    bone = scanner.axial(EVEN_MM, ConvolutionKernel="H70h", SeriesInstanceUID="1.2.2")
    scout = scanner.axial([0.0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    another = {"PatientID": "MRN2", "StudyInstanceUID": "1.5", "SeriesInstanceUID": "1.5.1"}
    tilt = scanner.axial(EVEN_MM, axes=tilted(20.0), **another)
    series = {"1.2.1": soft, "1.2.2": bone, "1.5.1": tilt}
    for name, planes in series.items():
        scanner.save(planes, tmp_path, name=name + "_{:03d}")
    scanner.save(scout, tmp_path, name="scout")
    assert scanner.reasons(tmp_path) == {
        "1.2.1": "ok",
        "1.2.1#2": "localizer",
        "1.2.2": "other_series_chosen",
        "1.5.1": "ok",
    }
    catalogue = index([tmp_path], key=None)
    assert scanner.accounted(catalogue, 28)
    for name in series:
        scanner.check(read_volume(catalogue.files[name]))


# Rows and columns as scanners write them for each PatientPosition.
POSITIONS = {
    "HFS": (1, 0, 0, 0, 1, 0),
    "FFS": (1, 0, 0, 0, 1, 0),
    "HFP": (-1, 0, 0, 0, -1, 0),
    "FFP": (-1, 0, 0, 0, -1, 0),
    "HFDL": (0, -1, 0, 1, 0, 0),
    "HFDR": (0, 1, 0, -1, 0, 0),
    "mirrored": (-1, 0, 0, 0, 1, 0),
}


@pytest.mark.parametrize("position", POSITIONS)
def test_a_patient_may_lie_in_any_way(tmp_path: Path, scanner: Any, position: str) -> None:
    axes = tuple(map(float, POSITIONS[position]))
    planes = [
        scanner.plane((20.0, 15.0, z), axes=axes, PatientPosition=position[:4].upper())
        for z in EVEN_MM
    ]
    scanner.save(planes, tmp_path)
    volume, line = scanner.read_usable(tmp_path)
    assert (np.diff(volume.slice_origin_mm[:, 2]) == 5).all()  # feet to head
    assert line["tilt_deg"] == 0


def from_corner(scanner: Any, z: float, turned: tuple[bool, bool]) -> Any:
    """The axial plane at a height, with the rows, the columns or both in the other order."""
    rows, columns = turned
    x = 20.0 + columns * (scanner.columns - 1) * scanner.pixel_mm[1]
    y = 15.0 + rows * (scanner.rows - 1) * scanner.pixel_mm[0]
    axes = (1.0 - 2 * columns, 0.0, 0.0, 0.0, 1.0 - 2 * rows, 0.0)
    return scanner.plane((x, y, z), axes=axes, SliceThickness="5")


@pytest.mark.parametrize("turned", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("which", [slice(5, None), slice(0, 4), slice(3, 4), slice(1, None, 2)])
def test_images_of_a_scan_may_run_the_other_way(
    tmp_path: Path, scanner: Any, turned: tuple[bool, bool], which: slice
) -> None:
    other = set(EVEN_MM[which].tolist())
    planes = [from_corner(scanner, z, turned if z in other else (False, False)) for z in EVEN_MM]
    scanner.save(planes, tmp_path)
    _, line = scanner.read_usable(tmp_path)
    assert line["n_slices"] == 9


def test_images_that_run_the_other_way_only_in_their_header_are_refused(
    tmp_path: Path, scanner: Any
) -> None:
    lower = [scanner.plane((20.0, 15.0, z), PixelSpacing=[9, 9]) for z in EVEN_MM[:5]]
    other = {"axes": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), "PixelSpacing": [9, 9]}
    upper = [scanner.plane((20.0, 15.0, z), **other) for z in EVEN_MM[5:]]
    scanner.save([*lower, *upper], tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": "bad_geometry"}


def test_an_acquisition_along_the_orbitomeatal_line_is_no_tilt(
    tmp_path: Path, scanner: Any
) -> None:
    axes = tilted(-22.0)
    planes = [scanner.plane(moved(axes, depth), axes=axes) for depth in EVEN_MM]
    scanner.save(planes, tmp_path)
    _, line = scanner.read_usable(tmp_path)
    assert line["tilt_deg"] == pytest.approx(0, abs=0.01)
    assert line["spacing_z_mm"] == pytest.approx(5, abs=0.001)


def test_planes_turned_about_two_axes_keep_every_voxel_in_place(
    tmp_path: Path, scanner: Any
) -> None:
    about_x, about_z = np.radians([14.0, 9.0])
    row = np.array([np.cos(about_z), np.sin(about_z), 0.0])
    back = np.array([-np.sin(about_z), np.cos(about_z), 0.0])
    column = np.cos(about_x) * back + np.sin(about_x) * np.array([0.0, 0.0, 1.0])
    axes = (*row.tolist(), *column.tolist())
    planes = [scanner.plane(moved(axes, depth), axes=axes) for depth in EVEN_MM]
    scanner.save(planes, tmp_path)
    scanner.read_usable(tmp_path)


@pytest.mark.parametrize(
    "axes", [(1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), tilted(55.0)], ids=["cor", "sag", "oblique"]
)
def test_other_planes_are_not_axial(tmp_path: Path, scanner: Any, axes: tuple[float, ...]) -> None:
    planes = [scanner.plane(moved(axes, depth), axes=axes) for depth in EVEN_MM]
    scanner.save(planes, tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": "not_axial"}


def test_reformats_beside_the_axial_series_do_not_disturb_it(tmp_path: Path, scanner: Any) -> None:
    coronal = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    reformat = [scanner.plane(moved(coronal, depth), axes=coronal) for depth in EVEN_MM]
    scanner.save([*scanner.axial(EVEN_MM), *reformat], tmp_path)
    scanner.read_usable(tmp_path)
    assert Counter(scanner.reasons(tmp_path).values()) == {"ok": 1, "not_axial": 1}


def test_a_single_slice_is_no_volume(tmp_path: Path, scanner: Any) -> None:
    scanner.save(scanner.axial([3.0]), tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": "too_few_slices"}


@pytest.mark.slow
def test_two_thousand_slices_are_one_scan(tmp_path: Path, scanner: Any) -> None:
    scanner.save(scanner.axial(np.arange(2000) * 0.125), tmp_path)
    volume, line = scanner.read_usable(tmp_path)
    assert len(volume.hu) == 2000
    assert (line["spacing_z_mm"], line["coverage_mm"]) == (0.125, 249.875)


def near_level(degrees: float, *, about_middle: bool) -> tuple[tuple[float, ...], list[float]]:
    """Axes turned by so little about the left-right axis, and what that lifts the first voxel by.

    About the middle of the scanner's 12 rows of 4 mm, or about the first voxel itself.
    """
    axes = tilted(degrees)
    from_level = np.array([0.0, 22.0, 0.0]) - 22.0 * np.array(axes[3:])
    return axes, (from_level if about_middle else np.zeros(3)).tolist()


@pytest.mark.parametrize("about_middle", [True, False])
@pytest.mark.parametrize("step_mm", [5.0, 0.5])
def test_slices_that_are_turned_by_noise_are_one_scan(
    tmp_path: Path, scanner: Any, step_mm: float, about_middle: bool
) -> None:
    turns = np.random.default_rng(4).normal(0, 0.3, 80)
    planes = []
    for i, turn in enumerate(turns[: 80 if step_mm < 1 else 9]):
        axes, lift = near_level(float(turn), about_middle=about_middle)
        origin = np.add([-25.0, -30.0, step_mm * i], lift).tolist()
        planes.append(scanner.plane(origin, axes=axes))
    scanner.save(planes, tmp_path)
    (line,) = index([tmp_path], key=None).scans.to_pylist()
    assert (line["reason"], line["n_slices"]) == ("ok", len(planes))
    volume = read_volume(index([tmp_path], key=None).files["1.2.1"])
    np.testing.assert_allclose(np.diff(volume.slice_origin_mm[:, 2]), step_mm, atol=0.01)
    # 0.9 degrees on 44 mm of rows are 0.7 mm, and the object changes by 7 HU/mm.
    places = volume.slice_origin_mm[:, None, None] + (
        np.arange(12)[None, :, None, None] * volume.row_step_mm
        + np.arange(10)[None, None, :, None] * volume.column_step_mm
    )
    expected = (places * [-1, -1, 1] - np.array(scanner.centre_mm)) @ np.array([3.0, -5.0, 7.0])
    assert np.abs(volume.hu - expected).max() < 7


def test_a_step_scanned_again_is_read_from_the_later_images(tmp_path: Path, scanner: Any) -> None:
    first = scanner.axial(EVEN_MM[:5], AcquisitionNumber=1, intercept=-24.0)
    second = scanner.axial(EVEN_MM[3:], AcquisitionNumber=2)
    for plane in first[3:]:
        plane.PixelData = bytes(len(plane.PixelData))  # what the patient's moving spoiled
    scanner.save([*first, *second], tmp_path)
    volume, line = scanner.read_usable(tmp_path)
    assert volume.slice_origin_mm[:, 2].tolist() == EVEN_MM.tolist()
    assert line["detail"] == "2 images were scanned again: the later ones are used"
    assert scanner.reasons(tmp_path) == {"1.2.1": "ok", "1.2.1#2": "duplicate_positions"}
    assert scanner.accounted(index([tmp_path], key=None), len(first) + len(second))
