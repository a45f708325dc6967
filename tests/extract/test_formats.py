"""NIfTI, NRRD and MetaImage: any order of the axes gives one volume, and lies are refused."""

import gzip
import zipfile
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from jaxtyping import Float, Int16
from nibabel.orientations import apply_orientation, inv_ornt_aff

from ctfm.extract.formats import check_sampling, read_image, read_image_header
from ctfm.extract.sources import Opener
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the public test scans are not here")

X, Y, Z = 6, 7, 5
VOXELS = np.random.default_rng(3).integers(-1024, 2000, (X, Y, Z)).astype(np.int16)  # LPS order
AFFINE = np.array(
    [[-0.9, 0.0, 0.0, 50.0], [0.0, -1.1, 0.0, 60.0], [0.0, 0.0, 2.5, -70.0], [0, 0, 0, 1.0]]
)


def save(
    path: Path,
    voxels: Float[np.ndarray, "..."] | Int16[np.ndarray, "..."] = VOXELS,
    affine: Float[np.ndarray, "4 4"] = AFFINE,
) -> str:
    image = nib.Nifti1Image(voxels, None)
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    nib.save(image, path)
    return str(path)


def save_as_named(path: Path) -> str:
    """In the format that the name stands for."""
    if ".nii" in path.name:
        return save(path)
    image = sitk.GetImageFromArray(VOXELS.transpose())
    image.SetSpacing((0.9, 1.1, 2.5))
    image.SetOrigin((-50.0, -60.0, -70.0))  # LPS
    sitk.WriteImage(image, path)
    return str(path)


def reason_of(file: str) -> Reason:
    with pytest.raises(ScanError) as caught:
        read_image(file)
    return caught.value.reason


def assert_is_the_volume(volume: Volume) -> None:
    np.testing.assert_array_equal(volume.hu, VOXELS.transpose())
    np.testing.assert_allclose(volume.column_step_mm, [-0.9, 0, 0], atol=1e-5)
    np.testing.assert_allclose(volume.row_step_mm, [0, -1.1, 0], atol=1e-5)
    places = [[50.0, 60.0, -70.0 + 2.5 * z] for z in range(Z)]
    np.testing.assert_allclose(volume.slice_origin_mm, places, atol=1e-4)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_all_orders_and_senses_of_the_axes_give_one_volume(
    tmp_path: Path, order: tuple[int, int, int]
) -> None:
    for senses in product((1, -1), repeat=3):
        turn = np.array(list(zip(order, senses, strict=True)), dtype=float)
        affine = AFFINE @ inv_ornt_aff(turn, VOXELS.shape)
        assert_is_the_volume(
            read_image(save(tmp_path / "turned.nii", apply_orientation(VOXELS, turn), affine))
        )


FILES = ["scan.nii.gz", "scan.nrrd", "scan.nhdr", "scan.mha", "scan.mhd"]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_volume(tmp_path: Path, name: str) -> None:
    assert_is_the_volume(read_image(save_as_named(tmp_path / name)))


@pytest.mark.parametrize("name", FILES)
def test_a_volume_in_an_archive_is_read_in_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "plain").mkdir()
    save_as_named(tmp_path / "plain" / name)
    archive = tmp_path / "scans.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in (tmp_path / "plain").iterdir():
            packed.write(file, f"a/{file.name}")
    before = set(tmp_path.rglob("*"))
    assert_is_the_volume(read_image(f"{archive}::a/{name}"))
    assert set(tmp_path.rglob("*")) == before


def test_a_sheared_affine_keeps_its_tilt(tmp_path: Path) -> None:
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.8
    volume = read_image(save(tmp_path / "tilted.nii", affine=sheared))
    np.testing.assert_allclose(volume.slice_origin_mm[2], [50.0, 61.6, -65.0], atol=1e-4)
    with Opener() as opener:
        stack = read_image_header(opener, str(tmp_path / "tilted.nii")).stack()
    assert stack.tilt_deg == pytest.approx(np.degrees(np.arctan(0.8 / 2.5)), abs=1e-4)


def test_a_file_that_does_not_tell_left_from_right_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, None)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "lost.nii")
    assert reason_of(str(tmp_path / "lost.nii")) is Reason.BAD_GEOMETRY


def test_a_rescaled_file_is_rounded_to_hu(tmp_path: Path) -> None:
    path = tmp_path / "scaled.nii"
    content = bytearray(Path(save(path)).read_bytes())
    content[112:120] = np.array([0.25, -1.2], dtype="<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    expected = np.round(VOXELS.astype(float) * 0.25 - 1.2)
    np.testing.assert_array_equal(read_image(str(path)).hu, expected.transpose())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[1, 2, 3] = value
    assert reason_of(save(tmp_path / "nan.nii.gz", voxels)) is Reason.NOT_FINITE


def test_values_beyond_16_bits_are_padding_above_and_clipped_below(tmp_path: Path) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[0, 0, 0], voxels[1, 0, 0] = 1e6, -1e6
    hu = read_image(save(tmp_path / "large.nii", voxels)).hu
    assert hu[0, 0, :2].tolist() == [-1024, -32768]


def test_what_is_no_single_volume_is_refused(tmp_path: Path) -> None:
    flat = save(tmp_path / "flat.nii", VOXELS[:, :, :1])
    series = save(tmp_path / "series.nii", np.stack([VOXELS] * 2, axis=-1))
    assert reason_of(flat) is Reason.TOO_FEW_SLICES
    assert reason_of(series) is Reason.UNSUPPORTED_ENCODING
    assert_is_the_volume(read_image(save(tmp_path / "one.nii", VOXELS[..., None])))


def test_a_colour_volume_is_refused(tmp_path: Path) -> None:
    rgb = np.zeros((X, Y, Z), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, AFFINE), tmp_path / "rgb.nii")
    assert reason_of(str(tmp_path / "rgb.nii")) is Reason.COLOUR
    image = sitk.GetImageFromArray(np.zeros((Z, Y, X, 3), dtype=np.uint8), isVector=True)
    sitk.WriteImage(image, tmp_path / "rgb.mha")
    assert reason_of(str(tmp_path / "rgb.mha")) is Reason.COLOUR


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha"])
@pytest.mark.parametrize("kept", [0, 3, 100, 360, -20])
def test_a_file_cut_anywhere_is_unreadable(tmp_path: Path, name: str, kept: int) -> None:
    path = tmp_path / name
    save_as_named(path)
    path.write_bytes(path.read_bytes()[:kept])
    assert reason_of(str(path)) is Reason.UNREADABLE


@pytest.mark.parametrize("name", ["scan.nii", "scan.nrrd", "scan.mha", "scan.mhd", "scan.nhdr"])
def test_an_index_notices_that_voxels_are_missing(tmp_path: Path, name: str) -> None:
    save_as_named(tmp_path / name)
    longest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    longest.write_bytes(longest.read_bytes()[:-1])
    with Opener() as opener, pytest.raises(ScanError, match="ends before its voxels do"):
        read_image_header(opener, str(tmp_path / name))


@pytest.mark.parametrize("name", ["bomb.nii.gz", "bomb.nrrd", "bomb.mha"])
def test_a_small_file_that_unpacks_to_very_much_is_not_unpacked(tmp_path: Path, name: str) -> None:
    voxels = np.zeros((400, 400, 300), np.int16)
    if ".nii" in name:
        save(tmp_path / name, voxels)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(voxels), tmp_path / name, useCompression=True)
    assert (tmp_path / name).stat().st_size < voxels.nbytes / 150
    with pytest.raises(ScanError, match="hostile"):
        read_image(str(tmp_path / name))


@pytest.mark.parametrize("name", ["junk.nii", "junk.nii.gz", "junk.nrrd", "junk.mha"])
def test_junk_under_the_name_of_an_image_is_unreadable(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"This is not a scan. " * 50)
    assert reason_of(str(tmp_path / name)) is Reason.UNREADABLE


def test_a_header_that_claims_too_many_voxels_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "huge.nii.gz"
    content = bytearray(gzip.decompress(Path(save(path)).read_bytes()))
    content[42:48] = np.array([30000, 30000, 30000], dtype="<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))
    assert reason_of(str(path)) is Reason.BAD_GEOMETRY


def test_thick_slices_of_another_plane_are_not_axial(tmp_path: Path) -> None:
    coronal = AFFINE @ np.diag([1.0, 5.0, 0.4, 1.0])
    with Opener() as opener:
        thick = read_image_header(opener, save(tmp_path / "coronal.nii", affine=coronal))
        plain = read_image_header(opener, save(tmp_path / "axial.nii"))
    check_sampling(plain)
    with pytest.raises(ScanError, match="not_axial"):
        check_sampling(thick)


@needs_data
def test_real_files_in_eight_orientations_are_one_volume() -> None:
    first, *others = (read_image(str(file)) for file in sorted((DATA / "niivue").rglob("*.nii.gz")))
    assert len(others) == 7
    for other in others:
        np.testing.assert_array_equal(other.hu, first.hu)
        np.testing.assert_allclose(other.slice_origin_mm, first.slice_origin_mm, atol=1e-3)
        np.testing.assert_allclose(other.row_step_mm, first.row_step_mm, atol=1e-5)
