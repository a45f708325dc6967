"""Which geometry of a NIfTI file is believed; each right value is known from how it was made."""

import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from jaxtyping import Float
from nifti_files import AFFINE, VOXELS, write_nifti

from ctfm.extract.formats import ImageHeader, image_digest, read_image, read_image_header
from ctfm.extract.identity import file_digest
from ctfm.extract.reading import read_volume
from ctfm.extract.sources import Opener
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

GE = Path(__file__).parents[2].parent / "shared" / "data" / "dcm_qa_ct" / "GE"
SIZES_MM = (0.9, 1.1, 2.5)
COSINE, SINE = np.cos(np.radians(18.5)), np.sin(np.radians(18.5))


def header_of(path: Path, **content: Any) -> ImageHeader:
    file = write_nifti(path, **content)
    with Opener() as opener:
        return read_image_header(opener, file)


def assert_lies_at(header: ImageHeader, affine: Float[np.ndarray, "4 4"]) -> None:
    """At an affine whose axes run as `AFFINE`'s do."""
    np.testing.assert_allclose(header.affine, affine, atol=2e-3)


def refusal_of(path: Path, **content: Any) -> str:
    with pytest.raises(ScanError) as caught:
        header_of(path, **content)
    assert caught.value.reason is Reason.BAD_GEOMETRY
    return caught.value.detail


def stretched(*factors: float) -> Float[np.ndarray, "4 4"]:
    return np.asarray(AFFINE @ np.diag([*factors, 1.0]))


def moved(*, turn_deg: float = 0.0, mm: float = 0.0) -> Float[np.ndarray, "4 4"]:
    """Turned about z, and moved to the right."""
    angle = np.radians(turn_deg)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[0, 3] = mm
    return np.asarray(turn @ AFFINE)


MIRRORED = np.diag([-1.0, 1.0, 1.0, 1.0]) @ AFFINE


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (4, 1), (1, 2)])
@pytest.mark.parametrize(
    "sform",
    [
        pytest.param(stretched(1, 1, 4 / 3), id="thickness for the step (dcm2niix#1018)"),
        pytest.param(stretched(1 / 0.9, 1 / 1.1, 1 / 2.5), id="unit columns (ITK#3514)"),
        pytest.param(np.eye(4), id="identity"),
        pytest.param(stretched(1.12, 1.15, 1.1), id="scaled to a template"),
        pytest.param(stretched(1, 1, 1.02), id="little"),
    ],
)
def test_a_sform_of_other_voxel_sizes_than_pixdim_loses(
    tmp_path: Path, sform: Float[np.ndarray, "4 4"], codes: tuple[int, int]
) -> None:
    header = header_of(tmp_path / "x.nii", sform=sform, qform=AFFINE, codes=codes)
    assert_lies_at(header, AFFINE)
    assert header.note.endswith("qform is used")


def test_the_note_names_both_sizes(tmp_path: Path) -> None:
    header = header_of(tmp_path / "x.nii", sform=stretched(1, 1, 4 / 3), qform=AFFINE)
    assert header.note == (
        "sform says voxels of 0.9 x 1.1 x 3.333 mm, qform and pixdim 0.9 x 1.1 x 2.5 mm; "
        "qform is used"
    )


@pytest.mark.parametrize("sform", [stretched(1 / 0.9, 1 / 1.1, 1 / 2.5), stretched(1, 1, 1.3)])
def test_a_sform_against_pixdim_without_a_qform_is_refused(
    tmp_path: Path, sform: Float[np.ndarray, "4 4"]
) -> None:
    detail = refusal_of(tmp_path / "x.nii", sform=sform, pixdim=SIZES_MM)
    assert "its pixdim 0.9 x 1.1 x 2.5 mm" in detail


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "sizes", [SIZES_MM, (1, 1, 1), (0, 0, 0), (0.9, np.nan, 2.5), (-0.9, -1.1, -2.5), (0.9, 1.1, 0)]
)
def test_a_sform_alone_is_believed_where_pixdim_agrees_or_says_nothing(
    tmp_path: Path, sizes: tuple[float, ...], code: int
) -> None:
    header = header_of(tmp_path / "x.nii", sform=AFFINE, codes=(code, 0), pixdim=sizes)
    assert_lies_at(header, AFFINE)
    assert header.note == ""


def test_an_unset_qform_says_nothing_against_a_sform(tmp_path: Path) -> None:
    header = header_of(tmp_path / "x.nii", sform=AFFINE, pixdim=(1, 1, 1), qform_code=1)
    assert_lies_at(header, AFFINE)


@pytest.mark.parametrize("code", [1, 2])
def test_a_qform_alone_is_believed(tmp_path: Path, code: int) -> None:
    header = header_of(tmp_path / "x.nii", qform=AFFINE, codes=(0, code))
    assert_lies_at(header, AFFINE)
    assert header.note == ""


@pytest.mark.parametrize("norm", [1.01, 1.5, 40.0, np.nan])
def test_a_qform_that_is_no_rotation_says_nothing(tmp_path: Path, norm: float) -> None:
    quaternion = {"quatern_b": 0.0, "quatern_c": norm, "quatern_d": 0.0}
    header = header_of(tmp_path / "x.nii", sform=AFFINE, qform=AFFINE, **quaternion)
    assert_lies_at(header, AFFINE)
    assert header.note == "its qform says nothing; sform is used"
    assert "neither" in refusal_of(tmp_path / "x.nii", qform=AFFINE, **quaternion)


def test_a_quaternion_that_was_rounded_is_a_rotation(tmp_path: Path) -> None:
    rounded = {"quatern_b": 0.0, "quatern_c": 0.0, "quatern_d": 1.0002}
    assert_lies_at(header_of(tmp_path / "x.nii", qform=AFFINE, **rounded), AFFINE)


@pytest.mark.parametrize("row", [[np.nan] * 4, [np.inf, 0, 0, 0], [0, 0, 0, 0], [0, 1.1, 0, 0]])
def test_a_sform_that_spans_no_volume_says_nothing(tmp_path: Path, row: list[float]) -> None:
    header = header_of(tmp_path / "x.nii", sform=AFFINE, qform=AFFINE, srow_x=row)
    assert_lies_at(header, AFFINE)
    assert header.note == "its sform says nothing; qform is used"
    assert "neither" in refusal_of(tmp_path / "x.nii", sform=AFFINE, srow_x=row)


@pytest.mark.parametrize("code", [2, 3, 4, 5])
@pytest.mark.parametrize("other", [moved(turn_deg=8, mm=30), moved(turn_deg=180), MIRRORED])
def test_the_scanner_is_believed_before_what_was_aligned(
    tmp_path: Path, other: Float[np.ndarray, "4 4"], code: int
) -> None:
    as_qform = header_of(tmp_path / "q.nii", sform=other, qform=AFFINE, codes=(code, 1))
    as_sform = header_of(tmp_path / "s.nii", sform=AFFINE, qform=other, codes=(1, code))
    assert_lies_at(as_qform, AFFINE)
    assert_lies_at(as_sform, AFFINE)
    assert "qform is used, as it is the scanner's" in as_qform.note
    assert as_sform.note.endswith("mm apart; sform is used")


@pytest.mark.parametrize("codes", [(1, 1), (2, 2), (2, 4)])
def test_forms_that_turn_the_image_alike_are_the_sform(
    tmp_path: Path, codes: tuple[int, int]
) -> None:
    header = header_of(tmp_path / "x.nii", sform=AFFINE, qform=moved(mm=30), codes=codes)
    assert_lies_at(header, AFFINE)
    assert header.note == "sform and qform are 30 mm apart; sform is used"


@pytest.mark.parametrize("codes", [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize(
    ("other", "said"),
    [(MIRRORED, "mirror images"), (moved(turn_deg=180), "180 deg"), (moved(turn_deg=90), "90 deg")],
)
def test_what_nothing_decides_is_refused(
    tmp_path: Path, other: Float[np.ndarray, "4 4"], said: str, codes: tuple[int, int]
) -> None:
    detail = refusal_of(tmp_path / "x.nii", sform=other, qform=AFFINE, codes=codes)
    assert said in detail
    assert f"(codes {codes[0]} and {codes[1]})" in detail


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("shape", [VOXELS.shape, (*VOXELS.shape, 1)])
def test_versions_byte_orders_and_a_fourth_axis_of_one_change_nothing(
    tmp_path: Path, kind: Any, endianness: str, name: str, shape: tuple[int, ...]
) -> None:
    content = {"voxels": VOXELS.reshape(shape), "kind": kind, "endianness": endianness}
    stretch = stretched(1, 1, 1.3)
    volume = read_image(write_nifti(tmp_path / name, sform=stretch, qform=AFFINE, **content))
    np.testing.assert_array_equal(volume.hu, VOXELS.T)
    np.testing.assert_allclose(volume.slice_origin_mm[2], [50, 60, -65], atol=1e-4)


# What dcm2niix 1.0.20260724 wrote of 36 unsigned images, 2 mm pixels, tilt 18.5 degrees, table step
# 4 mm; its pixdim and both forms were read with nibabel.
UNCORRECTED = np.array(
    [
        [-2.0, 0.0, 0.0, 95.0],
        [0.0, 1.896647334, 0.0, -90.090759],
        [0.0, 0.634609342, 3.793294907, -100.143944],
        [0, 0, 0, 1.0],
    ]
)
ORTHOGONAL = np.array(
    [
        [-2.0, 0.0, 0.0, 95.0],
        [0.0, 1.896647334, -1.203630262, -90.090759],
        [0.0, 0.634609342, 3.597271249, -100.143944],
        [0, 0, 0, 1.0],
    ]
)
BY_DCM2NIIX = {"xyzt_units": 10, "descrip": b"Time=0.000"}
TRUE_STEP_MM = [0.0, 0.0, 4.0]


def longer(affine: Float[np.ndarray, "4 4"], by: float) -> Float[np.ndarray, "4 4"]:
    """With another step from slice to slice."""
    return np.asarray(affine @ np.diag([1.0, 1.0, by, 1.0]))


def slice_step_mm(file: str) -> Float[np.ndarray, "3"]:
    return np.asarray(np.diff(read_image(file).slice_origin_mm, axis=0).mean(axis=0))


def dcm2niix_file(path: Path, *image_type: str, **content: Any) -> str:
    content = {"sform": UNCORRECTED, "qform": ORTHOGONAL, **BY_DCM2NIIX, **content}
    if image_type:
        sidecar = path.with_name(path.name.split(".")[0] + ".json")
        sidecar.write_text(json.dumps({"ImageType": list(image_type)}))
    return write_nifti(path, **content)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_the_uncorrected_file_of_single_images_gets_the_step_of_the_table(
    tmp_path: Path, name: str
) -> None:
    file = dcm2niix_file(tmp_path / name, "ORIGINAL", "PRIMARY", "AXIAL")
    np.testing.assert_allclose(slice_step_mm(file), TRUE_STEP_MM, atol=1e-4)
    with Opener() as opener:
        header = read_image_header(opener, file)
    assert header.stack().gap_mm == pytest.approx(4 * COSINE, abs=1e-4)
    assert abs(header.stack().tilt_deg) == pytest.approx(18.5, abs=1e-3)
    assert header.note == (
        "tilted by 18.5 deg; dcm2niix's slice step lengthened from 3.793 to 4 mm"
    )


@pytest.mark.parametrize("image_type", ["ORIGINAL\\PRIMARY\\AXIAL", ["Original", "Axial"]])
def test_a_sidecar_may_write_its_values_in_one_text_or_in_small_letters(
    tmp_path: Path, image_type: object
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"ImageType": image_type}))
    file = dcm2niix_file(tmp_path / "x.nii")
    np.testing.assert_allclose(slice_step_mm(file), TRUE_STEP_MM, atol=1e-4)


def digest_of(file: str) -> str:
    with Opener() as opener:
        return image_digest(opener, file)


def test_a_step_that_a_sidecar_decides_does_not_change_with_it_unnoticed(tmp_path: Path) -> None:
    file = dcm2niix_file(tmp_path / "x.nii", "ORIGINAL", "PRIMARY", "AXIAL")
    indexed = digest_of(file)
    read_volume([file], digest=indexed)
    for image_type in (["VOLUME"], []):
        (tmp_path / "x.json").write_text(json.dumps({"ImageType": image_type}))
        with pytest.raises(ScanError) as caught:
            read_volume([file], digest=indexed)
        assert caught.value.reason is Reason.CHANGED
    (tmp_path / "x.json").write_text(json.dumps({"ImageType": ["AXIAL"], "KVP": 120}))
    read_volume([file], digest=indexed)


def test_the_digest_of_another_file_is_that_of_its_bytes_alone(tmp_path: Path) -> None:
    file = write_nifti(tmp_path / "x.nii", sform=AFFINE)
    before = digest_of(file)
    (tmp_path / "x.json").write_text(json.dumps({"ImageType": ["AXIAL"]}))
    with open(file, "rb") as stream:
        assert digest_of(file) == before == file_digest(stream)


@pytest.mark.skipif(not GE.exists(), reason="the public test scans are not here")
def test_the_step_of_a_real_tilted_head_is_that_of_its_dicom_files(tmp_path: Path) -> None:
    positions = sorted(
        float(pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient[2])
        for file in GE.rglob("*")
        if file.is_file()
    )
    sform = np.diag([-0.488281190, 0.463048577, 4.001925945, 1.0])  # dcm2niix 1.0.20260724
    sform[2, 1] = 0.154933900
    file = dcm2niix_file(tmp_path / "x.nii", "ORIGINAL", "AXIAL", sform=sform, qform=sform)
    np.testing.assert_allclose(slice_step_mm(file), [0, 0, positions[1] - positions[0]], atol=2e-3)


def test_the_uncorrected_file_of_an_enhanced_object_is_right(tmp_path: Path) -> None:
    forms = {"sform": longer(UNCORRECTED, 1 / COSINE), "qform": longer(ORTHOGONAL, 1 / COSINE)}
    file = dcm2niix_file(tmp_path / "x.nii", "ORIGINAL", "PRIMARY", "VOLUME", "NONE", **forms)
    np.testing.assert_allclose(slice_step_mm(file), TRUE_STEP_MM, atol=1e-4)


@pytest.mark.parametrize(
    "sidecar", [None, "", "{", "[]", "{}", '{"ImageType": null}', '{"ImageType": ["DERIVED"]}']
)
def test_an_uncorrected_file_is_refused_where_nothing_tells_its_origin(
    tmp_path: Path, sidecar: str | None
) -> None:
    if sidecar is not None:
        (tmp_path / "x.json").write_text(sidecar)
    with pytest.raises(
        ScanError, match=r"tilted by 18.5 deg with a sform as of dcm2niix"
    ) as caught:
        read_image(dcm2niix_file(tmp_path / "x.nii"))
    assert caught.value.reason is Reason.BAD_GEOMETRY


def test_the_origin_is_told_inside_an_archive(tmp_path: Path) -> None:
    file = dcm2niix_file(tmp_path / "x.nii.gz", "ORIGINAL", "PRIMARY", "AXIAL")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(file, "in/x.nii.gz")
        archive.write(tmp_path / "x.json", "in/x.json")
    inside = f"{tmp_path}/a.zip::in/x.nii.gz"
    np.testing.assert_allclose(slice_step_mm(inside), TRUE_STEP_MM, atol=1e-4)


def turned_canonical(path: Path) -> str:
    """By nibabel, which drops the qform and keeps the other fields."""
    image = nib.load(dcm2niix_file(path))
    nib.save(nib.as_closest_canonical(image), path)
    assert int(nib.load(path).header["qform_code"]) == 0
    return str(path)


def test_an_uncorrected_file_that_went_through_nibabel_is_still_noticed(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="dcm2niix"):
        read_image(turned_canonical(tmp_path / "x.nii"))
    both = dcm2niix_file(tmp_path / "y.nii", qform=UNCORRECTED)  # a qform of nibabel's, no shear
    with pytest.raises(ScanError, match="dcm2niix"):
        read_image(both)
    alone = dcm2niix_file(tmp_path / "z.nii", qform=None, descrip=b"")
    with pytest.raises(ScanError, match="dcm2niix"):
        read_image(alone)


def test_a_corrected_file_is_right_as_it_is(tmp_path: Path) -> None:
    file = dcm2niix_file(tmp_path / "x_Tilt_1.nii", sform=ORTHOGONAL)
    normal_mm = [0.0, -4 * COSINE * SINE, 4 * COSINE * COSINE]
    np.testing.assert_allclose(slice_step_mm(file), normal_mm, atol=1e-4)


def test_the_sform_of_dicom2nifti_holds_the_step_of_the_table(tmp_path: Path) -> None:
    sform = longer(UNCORRECTED, 1 / COSINE)  # as dicom2nifti 2.6.2 wrote the same images
    file = write_nifti(tmp_path / "x.nii", sform=sform, codes=(2, 0))
    np.testing.assert_allclose(slice_step_mm(file), TRUE_STEP_MM, atol=1e-4)


def test_a_step_along_the_patient_whose_planes_are_a_pixdim_apart_is_right(tmp_path: Path) -> None:
    sform = longer(UNCORRECTED, 1 / COSINE)
    file = dcm2niix_file(tmp_path / "x.nii", sform=sform)
    np.testing.assert_allclose(slice_step_mm(file), TRUE_STEP_MM, atol=1e-4)


def test_a_tilt_too_small_to_matter_needs_no_sidecar(tmp_path: Path) -> None:
    sine, cosine = np.sin(np.radians(4)), np.cos(np.radians(4))
    sform, qform = np.diag([-2.0, 2.0, 4.0, 1.0]), np.diag([-2.0, 2.0, 4.0, 1.0])
    sform[:3, 1] = qform[:3, 1] = [0, 2 * cosine, 2 * sine]
    qform[:3, 2] = [0, -4 * sine, 4 * cosine]
    file = dcm2niix_file(tmp_path / "x.nii", sform=sform, qform=qform)
    np.testing.assert_allclose(slice_step_mm(file), TRUE_STEP_MM, atol=1e-4)


@pytest.mark.parametrize("codes", [(1, 1), (2, 1)])
def test_a_shear_that_the_qform_cannot_hold_is_kept(tmp_path: Path, codes: tuple[int, int]) -> None:
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.8
    file = write_nifti(tmp_path / "x.nii", sform=sheared, qform=sheared, codes=codes)
    np.testing.assert_allclose(slice_step_mm(file), [0, 0.8, 2.5], atol=1e-4)


def test_a_tilt_is_not_given_up_for_a_qform_with_the_right_step(tmp_path: Path) -> None:
    detail = refusal_of(tmp_path / "x.nii", sform=longer(UNCORRECTED, 1.4), qform=ORTHOGONAL)
    assert "only the sform can hold its tilt" in detail
