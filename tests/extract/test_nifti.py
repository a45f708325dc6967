"""Units, rescaling, padding and packing: of NIfTI files, and likewise of NRRD and MetaImage."""

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from jaxtyping import Shaped
from nifti_files import AFFINE, VOXELS, nifti_bytes, write_nifti

from ctfm.extract.formats import read_image, read_image_header
from ctfm.extract.sources import Opener
from ctfm.extract.volume import Volume
from ctfm.extract.voxels import PADDING_HU
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

METRES, MICRONS = 1, 3


def error_of(file: str) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_image(file)
    return caught.value


def assert_is_the_volume(volume: Volume) -> None:
    np.testing.assert_array_equal(volume.hu, VOXELS.T)
    np.testing.assert_allclose(volume.column_step_mm, [-0.9, 0, 0], atol=1e-5)
    np.testing.assert_allclose(volume.row_step_mm, [0, -1.1, 0], atol=1e-5)
    np.testing.assert_allclose(volume.slice_origin_mm[4], [50, 60, -60], atol=1e-3)


@pytest.mark.parametrize(("code", "per_mm"), [(METRES, 0.001), (MICRONS, 1000), (0, 1), (2, 1)])
@pytest.mark.parametrize("forms", [("sform",), ("qform",), ("sform", "qform")])
@pytest.mark.parametrize("time", [0, 8, 24])
def test_lengths_become_millimetres(
    tmp_path: Path, code: int, per_mm: float, forms: tuple[str, ...], time: int
) -> None:
    affine = np.diag([per_mm, per_mm, per_mm, 1.0]) @ AFFINE
    content: dict[str, Any] = dict.fromkeys(forms, affine)
    file = write_nifti(tmp_path / "x.nii", xyzt_units=code + time, **content)
    assert_is_the_volume(read_image(file))


@pytest.mark.parametrize(
    ("per_mm", "unit"), [(0.1, "centimetres"), (0.001, "metres"), (1000.0, "microns")]
)
@pytest.mark.parametrize("code", [0, 2])
def test_a_head_in_another_unit_than_it_says_is_refused_by_name(
    tmp_path: Path, per_mm: float, unit: str, code: int
) -> None:
    head = np.diag([0.49, 0.49, 5.0, 1 / per_mm]) * per_mm
    wide = np.zeros((512, 512, 2), np.int8)
    file = write_nifti(tmp_path / "x.nii", sform=head, voxels=wide, xyzt_units=code)
    error = error_of(file)
    assert error.reason is Reason.BAD_GEOMETRY
    assert f"look like {unit}" in error.detail


@pytest.mark.parametrize("pixel_mm", [0.12, 0.3, 0.9])
def test_small_pixels_are_no_other_unit(tmp_path: Path, pixel_mm: float) -> None:
    affine = np.diag([pixel_mm, pixel_mm, 3.0, 1.0])
    wide = np.zeros((512, 512, 2), np.int8)
    read_image(write_nifti(tmp_path / "x.nii", sform=affine, voxels=wide))


@pytest.mark.parametrize(
    ("units", "per_mm"),
    [("mm", 1), ("cm", 0.1), ("m", 0.001), ("micron", 1000), ("millimeters", 1), ("", 1), ("?", 1)],
)
def test_units_of_a_nrrd_become_millimetres(tmp_path: Path, units: str, per_mm: float) -> None:
    x, y, z = (f"{mm * per_mm:.6f}" for mm in (0.9, 1.1, 2.5))
    origin = ",".join(f"{mm * per_mm:.6f}" for mm in (-50, -60, -70))
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 6 7 5\nendian: little\n"
        f'encoding: raw\nspace units: "{units}" "{units}" "{units}"\n'
        f"space directions: ({x},0,0) (0,{y},0) (0,0,{z})\nspace origin: ({origin})\n\n"
    )
    (tmp_path / "x.nrrd").write_bytes(header.encode() + VOXELS.tobytes("F"))
    assert_is_the_volume(read_image(str(tmp_path / "x.nrrd")))


@pytest.mark.parametrize(("unit", "per_mm"), [("mm", 1), ("cm", 0.1), ("um", 1000), ("?", 1)])
def test_units_of_a_metaimage_become_millimetres(tmp_path: Path, unit: str, per_mm: float) -> None:
    spacing = " ".join(f"{mm * per_mm:.6f}" for mm in (0.9, 1.1, 2.5))
    origin = " ".join(f"{mm * per_mm:.6f}" for mm in (-50, -60, -70))
    header = (
        f"NDims = 3\nDimSize = 6 7 5\nDistanceUnits = {unit}\nElementSpacing = {spacing}\n"
        f"Offset = {origin}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    (tmp_path / "x.mha").write_bytes(header.encode() + VOXELS.tobytes("F"))
    assert_is_the_volume(read_image(str(tmp_path / "x.mha")))


def test_an_unknown_unit_is_refused(tmp_path: Path) -> None:
    header = (
        "NDims = 3\nDimSize = 6 7 5\nDistanceUnits = furlong\nElementType = MET_SHORT\n"
        "ElementDataFile = LOCAL\n"
    )
    (tmp_path / "x.mha").write_bytes(header.encode() + VOXELS.tobytes("F"))
    assert error_of(str(tmp_path / "x.mha")).reason is Reason.BAD_GEOMETRY


PADDED = np.where(np.arange(VOXELS.size).reshape(VOXELS.shape) % 5, VOXELS, -3000).astype(int)
"""Every fifth voxel is padding, which is written as a scanner's -2000 in unsigned bits."""


def as_stored(dtype: str, *, intercept: float, padding: float) -> Shaped[np.ndarray, "x y z"]:
    stored = np.where(PADDED == -3000, padding, PADDED - intercept)
    return stored.astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "intercept", "padding"),
    [
        ("u2", -1024, 63536),  # dcm2niix of unsigned images
        ("u2", -1024, 65535),
        ("u2", -8192, 63536),
        ("i4", 0, 62512),  # SimpleITK of the same
        ("u4", -1024, 63536),
        ("u4", -1024, 4294967295),
        ("f4", 0, 62512),  # MONAI
        ("f8", -1024, 63536),
    ],
)
def test_padding_that_wrapped_around_is_air(
    tmp_path: Path, dtype: str, intercept: float, padding: float
) -> None:
    voxels = as_stored(dtype, intercept=intercept, padding=padding)
    file = write_nifti(
        tmp_path / "x.nii.gz", sform=AFFINE, voxels=voxels, scl_slope=1, scl_inter=intercept
    )
    expected = np.where(PADDED == -3000, PADDING_HU, PADDED)
    np.testing.assert_array_equal(read_image(file).hu, expected.T)


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
@pytest.mark.parametrize("dtype", ["i4", "f4"])
def test_padding_that_wrapped_around_is_air_in_every_format(
    tmp_path: Path, name: str, dtype: str
) -> None:
    stored = as_stored(dtype, intercept=0, padding=62512)
    sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(stored.T)), tmp_path / name)
    hu = read_image(str(tmp_path / name)).hu
    assert hu.max() == PADDED.max()
    assert (hu == PADDING_HU).sum() >= (PADDED == -3000).sum()


HEAD = np.random.default_rng(5).choice(
    [-1000, -998, -95, -90, -20, 5, 30, 35, 40, 700, 1400],
    (6, 7, 5),
    p=[0.2, 0.1, 0.1, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05],
)
NO_HEAD = {
    "no air": np.where(HEAD < -900, 20, HEAD) % 65536,
    "air that kept its sign": np.where(HEAD < -900, HEAD, HEAD % 65536),
    "more than 16 bits": np.where(HEAD < 0, HEAD % 65536 + 65536, HEAD),
}


def write_image(path: Path, voxels: Shaped[np.ndarray, "x y z"]) -> str:
    if path.suffix in (".nii", ".gz"):
        return write_nifti(path, sform=AFFINE, voxels=voxels)
    sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(voxels.T)), path)
    return str(path)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.nrrd", "x.mha"])
@pytest.mark.parametrize("dtype", ["u2", "i4", "u4", "f4", "f8"])
@pytest.mark.parametrize("padding", [None, -3024])
def test_a_head_whose_signs_were_lost_has_them_back_in_every_format(
    tmp_path: Path, name: str, dtype: str, padding: int | None
) -> None:
    head = HEAD.copy()
    if padding is not None:
        head[0] = padding
    hu = read_image(write_image(tmp_path / name, (head % 65536).astype(dtype))).hu
    if name.endswith(("nii", "gz")):
        np.testing.assert_array_equal(hu, head.T)
    assert Counter(hu.ravel().tolist()) == Counter(head.ravel().tolist())


@pytest.mark.parametrize("name", ["x.nii.gz", "x.nrrd", "x.mha"])
@pytest.mark.parametrize("kind", NO_HEAD)
def test_values_whose_signs_may_be_lost_are_not_taken_for_air(
    tmp_path: Path, name: str, kind: str
) -> None:
    error = error_of(write_image(tmp_path / name, NO_HEAD[kind].astype(np.float32)))
    assert error.reason is Reason.NOT_HU
    assert "sign was lost" in error.detail


def test_signs_that_a_slope_was_put_over_come_back(tmp_path: Path) -> None:
    voxels = (HEAD * 2 % 65536).astype("u2")
    file = write_nifti(tmp_path / "x.nii", sform=AFFINE, voxels=voxels, scl_slope=0.5)
    np.testing.assert_array_equal(read_image(file).hu, HEAD.T)


def test_what_16_bits_hold_stays_as_it_is(tmp_path: Path) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[0, 0, :3] = [32767, 30000, -2000]
    hu = read_image(write_nifti(tmp_path / "x.nii", sform=AFFINE, voxels=voxels)).hu
    assert hu[:3, 0, 0].tolist() == [32767, 30000, -2000]


@pytest.mark.parametrize("dtype", ["i1", "u1", "u2", "i4", "u4", "f4", "f8"])
def test_every_type_is_read_with_and_without_a_slope(tmp_path: Path, dtype: str) -> None:
    voxels = (np.abs(VOXELS) % 100).astype(dtype)
    plain = write_nifti(tmp_path / "x.nii", sform=AFFINE, voxels=voxels)
    np.testing.assert_array_equal(read_image(plain).hu, voxels.T)
    scaled = write_nifti(
        tmp_path / "y.nii", sform=AFFINE, voxels=voxels, scl_slope=2, scl_inter=-1024
    )
    np.testing.assert_array_equal(read_image(scaled).hu, voxels.T.astype(int) * 2 - 1024)


@pytest.mark.parametrize("intercept", [np.nan, np.inf])
def test_a_slope_without_an_intercept_is_a_bad_rescale(tmp_path: Path, intercept: float) -> None:
    file = write_nifti(tmp_path / "x.nii", sform=AFFINE, scl_slope=1, scl_inter=intercept)
    assert error_of(file).reason is Reason.BAD_RESCALE


@pytest.mark.parametrize("slope", [0, np.nan, np.inf])
def test_without_a_slope_nothing_is_rescaled(tmp_path: Path, slope: float) -> None:
    file = write_nifti(tmp_path / "x.nii", sform=AFFINE, scl_slope=slope, scl_inter=-1024)
    assert_is_the_volume(read_image(file))


PLAIN = nifti_bytes(sform=AFFINE)
PACKED = gzip.compress(PLAIN)


@pytest.mark.parametrize(
    "behind",
    [
        b"\0",
        b"\0" * 70_000,
        b"junk that is no gzip member",
        b"\x1f\x8b",
        PACKED[:30],
        PACKED,
        b"\0" * 512 + b"junk",
    ],
    ids=["zero", "zeros", "junk", "magic", "half a member", "a member", "zeros and junk"],
)
def test_bytes_behind_the_gzip_member_of_the_voxels_are_not_looked_at(
    tmp_path: Path, behind: bytes
) -> None:
    (tmp_path / "x.nii.gz").write_bytes(PACKED + behind)
    assert_is_the_volume(read_image(str(tmp_path / "x.nii.gz")))


@pytest.mark.parametrize("ends", [[348], [352], [100, 353, 500], list(range(50, len(PLAIN), 50))])
@pytest.mark.parametrize("between", [b"", b"\0" * 9])
def test_a_file_may_be_packed_in_several_members(
    tmp_path: Path, ends: list[int], between: bytes
) -> None:
    parts = zip([0, *ends], [*ends, len(PLAIN)], strict=True)
    members = (gzip.compress(PLAIN[start:end]) for start, end in parts)
    (tmp_path / "x.nii.gz").write_bytes(between.join(members))
    assert_is_the_volume(read_image(str(tmp_path / "x.nii.gz")))


def test_what_follows_the_voxels_inside_the_member_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(PLAIN + bytes(100_000)))
    assert_is_the_volume(read_image(str(tmp_path / "x.nii.gz")))


@pytest.mark.parametrize("place", [-8, -5, len(PACKED) // 2])
def test_a_member_that_fails_its_checksum_is_unreadable(tmp_path: Path, place: int) -> None:
    damaged = bytearray(PACKED)
    damaged[place] ^= 0x55
    (tmp_path / "x.nii.gz").write_bytes(damaged)
    assert error_of(str(tmp_path / "x.nii.gz")).reason is Reason.UNREADABLE


@pytest.mark.parametrize("kept", [-1, -8, -20, 200])
def test_a_member_that_is_cut_is_unreadable(tmp_path: Path, kept: int) -> None:
    (tmp_path / "x.nii.gz").write_bytes(PACKED[:kept])
    assert error_of(str(tmp_path / "x.nii.gz")).reason is Reason.UNREADABLE


def test_a_header_is_read_whatever_lies_behind_it(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").write_bytes(PACKED + b"junk")
    with Opener() as opener:
        assert read_image_header(opener, str(tmp_path / "x.nii.gz")).shape == VOXELS.shape


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
@pytest.mark.parametrize("behind", [b"\0" * 9, b"junk"])
def test_bytes_behind_packed_voxels_of_other_formats_are_not_looked_at(
    tmp_path: Path, name: str, behind: bytes
) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(VOXELS.T))
    sitk.WriteImage(image, tmp_path / name, useCompression=True)
    whole = read_image(str(tmp_path / name)).hu
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + behind)
    np.testing.assert_array_equal(read_image(str(tmp_path / name)).hu, whole)
