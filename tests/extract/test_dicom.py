"""DICOM headers and pixels: small files written here, odd ones from public collections."""

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_bytes import with_meta_header_of
from jaxtyping import Shaped
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from ctfm.extract.dicom import Plane, is_dicom, read_planes
from ctfm.extract.dicom_pixels import read_dicom
from ctfm.extract.voxels import PADDING_HU
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the public test scans are not here")
ROWS, COLUMNS = 5, 7


def ct_slice(z_mm: float = 0.0, **tags: Any) -> Dataset:
    """A valid CT image whose stored values grow by one a pixel, at HU -1000 and up."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientID = "patient"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.1", "1.2.1.1"
    dataset.ImagePositionPatient = [-110.0, -130.0, z_mm]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.4, 0.5]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.Rows, dataset.Columns = ROWS, COLUMNS
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.PixelData = (np.arange(ROWS * COLUMNS, dtype="<i2") + 24).tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def store(pixels: Shaped[np.ndarray, "y x"], **tags: Any) -> dict[str, Any]:
    """Tags of an image with these stored values."""
    signed = np.issubdtype(pixels.dtype, np.signedinteger)
    return {"PixelData": pixels.tobytes(), "PixelRepresentation": int(signed), **tags}


def save(dataset: Dataset, path: Path) -> str:
    dataset.save_as(path, enforce_file_format=True)
    return str(path)


def planes_of(dataset: Dataset) -> list[Plane]:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    stream.seek(0)
    return read_planes(stream, "file")


@pytest.fixture
def read_hu(tmp_path: Path) -> Callable[..., Shaped[np.ndarray, "y x"]]:
    def read(**tags: Any) -> Shaped[np.ndarray, "y x"]:
        (hu,) = read_dicom([save(ct_slice(**tags), tmp_path / "slice")]).hu
        return np.asarray(hu)

    return read


def reason_of(files: list[str]) -> Reason:
    with pytest.raises(ScanError) as caught:
        read_dicom(files)
    return caught.value.reason


def test_the_facts_of_a_header_are_read_with_positions_in_ras() -> None:
    (plane,) = planes_of(ct_slice(12.5, KVP="120", SliceThickness="4.8", ConvolutionKernel="UB"))
    assert plane.position_mm == (110.0, 130.0, 12.5)
    assert plane.facts.column_step_mm.tolist() == [-0.5, 0.0, 0.0]
    assert plane.facts.row_step_mm.tolist() == [0.0, -0.4, 0.0]
    assert (plane.slope, plane.intercept, plane.kvp, plane.thickness_mm) == (1, -1024, 120, 4.8)
    assert (plane.facts.rows, plane.facts.columns, plane.facts.kernel) == (ROWS, COLUMNS, "UB")
    assert plane.facts.image_type == ("ORIGINAL", "PRIMARY", "AXIAL")
    assert plane.facts.has_pixels
    assert not plane.truncated


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_every_plain_syntax_gives_the_same_facts(syntax: str) -> None:
    other = ct_slice()
    other.file_meta.TransferSyntaxUID = syntax
    (plane,), (reference,) = planes_of(other), planes_of(ct_slice())
    assert plane.facts.has_pixels
    assert plane.position_mm == reference.position_mm
    assert plane.facts.patient == reference.facts.patient


def test_a_name_outside_ascii_is_read_in_its_character_set() -> None:
    (plane,) = planes_of(ct_slice(SpecificCharacterSet="ISO_IR 192", PatientID="Żółw-7"))
    assert plane.facts.patient == "Żółw-7"


def test_missing_values_are_missing_and_not_an_error() -> None:
    dataset = ct_slice()
    for keyword in ("ImagePositionPatient", "PixelSpacing", "RescaleSlope", "PatientID"):
        delattr(dataset, keyword)
    (plane,) = planes_of(dataset)
    assert (plane.position_mm, plane.facts.pixel_mm, plane.facts.patient) == (None, None, "")
    assert np.isnan(plane.slope)


def test_a_header_without_pixels_says_so() -> None:
    dataset = ct_slice()
    del dataset.PixelData
    assert not planes_of(dataset)[0].facts.has_pixels


def test_a_header_tells_that_the_pixels_are_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "slice"
    save(ct_slice(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with path.open("rb") as stream:
        (plane,) = read_planes(stream, str(path))
    assert plane.truncated
    assert reason_of([str(path)]) is Reason.UNREADABLE


def test_a_file_is_told_to_be_dicom_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "slice"
    dataset = ct_slice()
    save(dataset, path)
    assert is_dicom(path.read_bytes())
    assert not is_dicom(b"A licence that is long enough to be taken for a header." * 4)
    bare = path.read_bytes()[132:]
    assert is_dicom(bare)
    assert not is_dicom(b"")


@pytest.mark.parametrize("share", np.linspace(0.17, 0.99, 23).tolist())
def test_a_header_cut_anywhere_is_a_reason_and_nothing_else(share: float) -> None:
    stream = io.BytesIO()
    ct_slice().save_as(stream, enforce_file_format=True)
    cut = int(share * len(stream.getvalue()))
    planes: list[Plane] = []
    with suppress(ScanError):
        planes = read_planes(io.BytesIO(stream.getvalue()[:cut]), "file")
    assert all(plane.truncated or not plane.facts.has_pixels for plane in planes)


def test_slices_are_put_in_order_with_their_true_places(tmp_path: Path) -> None:
    files = []
    for i, z_mm in enumerate((7.0, -2.0, 3.0, 20.0, 13.0)):
        pixels = np.full((ROWS, COLUMNS), 1024 + i, dtype="<i2")
        files.append(save(ct_slice(z_mm, **store(pixels)), tmp_path / str(i)))
    volume = read_dicom(files)
    assert volume.hu[:, 0, 0].tolist() == [1, 2, 0, 4, 3]
    assert volume.hu.shape == (5, ROWS, COLUMNS)
    assert volume.slice_origin_mm[:, 2].tolist() == [-2, 3, 7, 13, 20]
    assert volume.slice_origin_mm[0].tolist() == [110, 130, -2]
    assert volume.column_step_mm.tolist() == [-0.5, 0, 0]


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    pixels = store(np.full((ROWS, COLUMNS), 100, dtype="<i2"))
    one = save(ct_slice(0, **pixels, RescaleSlope="1", RescaleIntercept="-60"), tmp_path / "1")
    two = save(ct_slice(5, **pixels, RescaleSlope="0.5", RescaleIntercept="2.4"), tmp_path / "2")
    assert read_dicom([one, two]).hu[:, 2, 3].tolist() == [40, 52]


@pytest.mark.parametrize(
    ("dtype", "stored", "padding", "tags"),
    [
        ("<i2", -2000, -2000, {"RescaleIntercept": "0"}),
        ("<u2", 63536, 63536, {"RescaleIntercept": "-1024"}),
        ("<u2", 63536, None, {"RescaleIntercept": "-1024"}),  # wrapped, and no header says so
        ("<u2", 0, 0, {"RescaleIntercept": "-8192"}),
        ("<u2", 4095, 4095, {"RescaleIntercept": "0"}),
    ],
)
def test_padding_is_air_whatever_its_sign(
    read_hu: Callable[..., Shaped[np.ndarray, "y x"]],
    dtype: str,
    stored: int,
    padding: int | None,
    tags: dict[str, Any],
) -> None:
    pixels = np.full((ROWS, COLUMNS), 1000, dtype=dtype)
    pixels[0, :3] = stored
    if padding is not None:
        tags = {**tags, "PixelPaddingValue": padding}
    hu = read_hu(**store(pixels, **tags))
    assert (hu[0, :3] == PADDING_HU).all()
    assert (hu[1:] == 1000 + int(tags["RescaleIntercept"])).all()


def test_padding_inside_the_range_of_tissue_is_left_alone(
    read_hu: Callable[..., Shaped[np.ndarray, "y x"]],
) -> None:
    pixels = store(np.zeros((ROWS, COLUMNS), dtype="<i2"))
    assert not read_hu(**pixels, PixelPaddingValue=0, RescaleIntercept="0").any()


def test_a_range_of_padding_is_air(read_hu: Callable[..., Shaped[np.ndarray, "y x"]]) -> None:
    pixels = np.full((ROWS, COLUMNS), 40, dtype="<i2")
    pixels[0] = np.arange(-2000, -2000 + COLUMNS)
    tags = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1900, "RescaleIntercept": "0"}
    hu = read_hu(**store(pixels, **tags))
    assert (hu[0] == PADDING_HU).all()


def test_monochrome1_changes_nothing(read_hu: Callable[..., Shaped[np.ndarray, "y x"]]) -> None:
    plain, inverted = read_hu(), read_hu(PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(plain, inverted)
    assert plain[0, :3].tolist() == [-1000, -999, -998]


def test_bits_above_those_stored_are_ignored(
    read_hu: Callable[..., Shaped[np.ndarray, "y x"]],
) -> None:
    overlay = (np.arange(ROWS * COLUMNS, dtype="<u2") + 24) | 0xF000
    hu = read_hu(**store(overlay.reshape(ROWS, COLUMNS), BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(hu, read_hu())


@pytest.mark.parametrize("slope", ["0", "-1", "NaN", None])
def test_an_impossible_slope_is_refused(tmp_path: Path, slope: str | None) -> None:
    dataset = ct_slice()
    del dataset.RescaleSlope
    if slope is not None:
        dataset.add_new("RescaleSlope", "DS", "1")
        dataset["RescaleSlope"]._value = slope
    assert reason_of([save(dataset, tmp_path / "slice")]) is Reason.BAD_RESCALE


def test_compressed_pixels_come_out_as_raw_ones(tmp_path: Path) -> None:
    raw, packed = ct_slice(), ct_slice()
    packed.compress(RLELossless)
    expected = read_dicom([save(raw, tmp_path / "raw")]).hu
    np.testing.assert_array_equal(read_dicom([save(packed, tmp_path / "packed")]).hu, expected)


def test_compressed_pixels_that_end_early_are_unreadable(tmp_path: Path) -> None:
    dataset = ct_slice()
    dataset.compress(RLELossless)
    path = tmp_path / "slice"
    save(dataset, path)
    path.write_bytes(path.read_bytes()[:-60])
    assert reason_of([str(path)]) is Reason.UNREADABLE


def test_planes_that_are_no_volume_are_refused(tmp_path: Path) -> None:
    straight = save(ct_slice(0), tmp_path / "1")
    turned = save(ct_slice(5, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), tmp_path / "2")
    same = save(ct_slice(0), tmp_path / "3")
    assert reason_of([straight, turned]) is Reason.BAD_GEOMETRY
    assert reason_of([straight, same]) is Reason.DUPLICATE_POSITIONS


def test_a_header_that_claims_a_huge_image_allocates_nothing(tmp_path: Path) -> None:
    dataset = ct_slice()
    dataset.compress(RLELossless)
    dataset.Rows = dataset.Columns = 65535
    assert reason_of([save(dataset, tmp_path / "slice")]) is Reason.BAD_GEOMETRY


def enhanced(z_mm: list[float]) -> Dataset:
    """An enhanced CT object; frame i holds the value 10 i, and 1000 is added by its rescale."""
    dataset = ct_slice(SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(z_mm))
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(dataset, keyword)
    del dataset.RescaleSlope, dataset.RescaleIntercept
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [0.4, 0.5]
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for z in z_mm:
        group, position, rescale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [-110.0, -130.0, z]
        rescale.RescaleSlope, rescale.RescaleIntercept = "1", "1000"
        group.PlanePositionSequence = Sequence([position])
        group.PixelValueTransformationSequence = Sequence([rescale])
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    frames = np.repeat(10 * np.arange(len(z_mm), dtype="<i2"), ROWS * COLUMNS)
    dataset.PixelData = frames.tobytes()
    return dataset


def test_frames_of_an_enhanced_object_are_its_slices(tmp_path: Path) -> None:
    volume = read_dicom([save(enhanced([8.0, 0.0, 4.0]), tmp_path / "frames")])
    assert volume.hu[:, 1, 1].tolist() == [1010, 1020, 1000]
    assert volume.slice_origin_mm[:, 2].tolist() == [0, 4, 8]


def test_frames_without_a_position_are_refused(tmp_path: Path) -> None:
    dataset = enhanced([0.0, 4.0])
    dataset.NumberOfFrames = 3
    assert reason_of([save(dataset, tmp_path / "1")]) is Reason.BAD_GEOMETRY
    stacked = ct_slice(NumberOfFrames=2)
    stacked.PixelData *= 2
    assert reason_of([save(stacked, tmp_path / "2")]) is Reason.UNSUPPORTED_ENCODING


@needs_data
@pytest.mark.parametrize("name", ["J2KR", "JLSL", "JPLL", "RLE"])
def test_real_lossless_slices_equal_the_raw_one(name: str) -> None:
    folder = DATA / "nema_wg04"
    raw = read_dicom([str(folder / "CT1_UNC")]).hu
    np.testing.assert_array_equal(read_dicom([str(folder / f"CT1_{name}")]).hu, raw)


@needs_data
@pytest.mark.parametrize(
    ("syntax", "largest"),
    [
        ("BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2", 0),
        ("DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99", 0),
        ("JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57", 0),
        ("JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70", 0),
        ("JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80", 0),
        ("JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90", 0),
        ("RLELosslessTransferSyntax_1.2.840.10008.1.2.5", 0),
        ("JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81", 1),
        ("JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91", 5),
        ("JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50", 64),
    ],
)
def test_a_real_slice_is_the_same_in_every_syntax(syntax: str, largest: int) -> None:
    folder = DATA / "cornerstone_wado"
    raw = read_dicom([str(folder / "CTImage.dcm")]).hu.astype(int)
    hu = read_dicom([str(folder / f"CTImage.dcm_{syntax}.dcm")]).hu
    assert np.abs(hu - raw).max() <= largest


@needs_data
@pytest.mark.parametrize("code", ["51", "53", "55"])
def test_real_syntaxes_without_a_trusted_decoder_are_refused(code: str) -> None:
    (file,) = (DATA / "cornerstone_wado").glob(f"*.4.{code}.dcm")
    assert reason_of([str(file)]) is Reason.UNSUPPORTED_ENCODING


@needs_data
def test_real_fragments_without_an_offset_table_are_joined() -> None:
    folder = DATA / "dicomparser"
    raw = read_dicom([str(folder / "CT0012.explicit_little_endian.dcm")])
    for syntax in ("lossless.57", "lossless.70", "ls.80"):
        file = folder / f"CT0012.fragmented_no_bot_jpeg_{syntax}.dcm"
        np.testing.assert_array_equal(read_dicom([str(file)]).hu, raw.hu)


@needs_data
def test_the_real_tilted_and_uneven_series_keeps_its_true_geometry() -> None:
    volume = read_dicom([str(file) for file in (DATA / "dcm_qa_ct" / "GE").iterdir()])
    normal = np.cross(volume.row_step_mm, volume.column_step_mm)
    normal /= np.linalg.norm(normal)
    gaps = np.abs(np.diff(volume.slice_origin_mm @ normal))
    np.testing.assert_allclose(gaps, [4.0] * 13 + [1.08] + [7.0] * 13, atol=0.005)
    assert np.ptp(volume.slice_origin_mm[:, :2], axis=0).tolist() == [0, 0]  # a shear
    assert volume.hu.min() == PADDING_HU


@pytest.mark.filterwarnings("ignore:Expected")  # pydicom's, of the meta header
@pytest.mark.parametrize(
    ("named", "lying_as"),
    [
        (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        (ImplicitVRLittleEndian, ExplicitVRLittleEndian),
    ],
)
def test_a_file_is_read_as_it_lies_whatever_its_meta_header_says(
    tmp_path: Path, named: str, lying_as: str
) -> None:
    path = tmp_path / "slice"
    expected = read_dicom([save(ct_slice(), path)]).hu
    files = []
    for syntax in (named, lying_as):
        dataset = ct_slice()
        dataset.file_meta.TransferSyntaxUID = syntax
        files.append(Path(save(dataset, tmp_path / syntax)).read_bytes())
    content = with_meta_header_of(*files)
    path.write_bytes(content)
    (plane,) = read_planes(io.BytesIO(content), "file")
    assert plane.facts.has_pixels
    assert not plane.truncated
    np.testing.assert_array_equal(read_dicom([str(path)]).hu, expected)
    (plane,) = read_planes(io.BytesIO(content[:-4]), "file")
    assert plane.truncated


@needs_data
@pytest.mark.parametrize("padding", [b"\xff\xff", b"\0\0", b"  ", b"\xff\0", bytes(range(60, 130))])
@pytest.mark.parametrize("name", ["JPLL", "JLSL", "J2KR"])
def test_whatever_follows_the_end_of_a_compressed_frame_is_padding(
    tmp_path: Path, name: str, padding: bytes
) -> None:
    dataset = pydicom.dcmread(DATA / "nema_wg04" / f"CT1_{name}")
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1)).rstrip(b"\0")
    dataset.PixelData = encapsulate([frame + padding])
    padded = read_dicom([save(dataset, tmp_path / "padded")]).hu
    np.testing.assert_array_equal(padded, read_dicom([str(DATA / "nema_wg04" / "CT1_UNC")]).hu)
    dataset.PixelData = encapsulate([frame[: len(frame) // 2] + padding])
    assert reason_of([save(dataset, tmp_path / "cut")]) is Reason.UNREADABLE
