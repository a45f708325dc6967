"""Encodings as they come: the HU that were scanned, or a reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_bytes import with_meta_header_of
from jaxtyping import Int16, Shaped
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ctfm.extract.index import index
from ctfm.extract.reading import read_volume
from ctfm.extract.voxels import PADDING_HU
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

EVEN_MM = np.arange(0.0, 45.0, 5.0)


@pytest.mark.parametrize("outside", [63536, 0])
def test_unsigned_values_with_padding_outside_the_circle(
    tmp_path: Path, scanner: Any, outside: int
) -> None:
    planes = scanner.axial(EVEN_MM, dtype="<u2", intercept=-8192, PixelPaddingValue=outside)
    for plane in planes:
        stored = np.frombuffer(plane.PixelData, "<u2").copy().reshape(12, 10)
        stored[:, 0] = outside
        plane.PixelData = stored.tobytes()
    scanner.save(planes, tmp_path)
    catalogue = index([tmp_path], key=None)
    hu = read_volume(catalogue.files["1.2.1"]).hu
    assert (hu[:, :, 0] == PADDING_HU).all()
    assert hu[:, :, 1:].min() > -500


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "<u2"},
        {"dtype": "<u2", "BitsStored": 12, "HighBit": 11},
        {"dtype": "<i2", "BitsStored": 13, "HighBit": 12},
        {"dtype": "<i2", "intercept": 0.0},
        {"slope": 0.5, "intercept": 12.0},
        {"slope": 2.0, "intercept": -2047.0},
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"dtype": "<i4", "BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ],
    ids=["u16", "u12", "i13", "HU as such", "half", "double", "inverse", "i32", "inverse LUT"],
)
def test_stored_values_become_the_hu_that_were_scanned(
    tmp_path: Path, scanner: Any, options: dict[str, Any]
) -> None:
    scanner.save(scanner.axial(EVEN_MM, **options), tmp_path)
    scanner.read_usable(tmp_path)


@pytest.mark.parametrize(
    "tags",
    [
        {"RescaleSlope": None},
        {"RescaleIntercept": None},
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"RescaleSlope": "0"},
        {"RescaleSlope": "-1"},
        {"RescaleSlope": ""},
    ],
)
def test_a_rescale_that_cannot_be_is_no_guess(
    tmp_path: Path, scanner: Any, tags: dict[str, str | None]
) -> None:
    scanner.save(scanner.axial(EVEN_MM, **tags), tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": "bad_rescale"}


def test_one_slice_without_a_slope_spoils_its_series_and_no_other(
    tmp_path: Path, scanner: Any
) -> None:
    planes = scanner.axial(EVEN_MM)
    planes[3].RescaleSlope = "0"
    scanner.save(planes, tmp_path / "a")
    scanner.save(scanner.axial(EVEN_MM, SeriesInstanceUID="1.2.2"), tmp_path / "b")
    assert scanner.reasons(tmp_path) == {"1.2.1": "bad_rescale", "1.2.2": "ok"}


@pytest.mark.parametrize("dtype", ["<i2", "<u2"])
@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_lossless_syntaxes_give_back_every_bit(
    tmp_path: Path, scanner: Any, syntax: str, dtype: str
) -> None:
    planes = scanner.axial(EVEN_MM, dtype=dtype)
    for plane in planes:
        plane.compress(syntax, generate_instance_uid=False)
    scanner.save(planes, tmp_path)
    scanner.read_usable(tmp_path)


@pytest.mark.parametrize("options", [{"dtype": "<i2"}, {"dtype": "<u2"}])
@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1, JPEG2000Lossless])
def test_lossless_jpeg_and_jpeg_2000_give_back_every_bit(
    tmp_path: Path, scanner: Any, recode: Any, syntax: str, options: dict[str, Any]
) -> None:
    for file in scanner.save(scanner.axial(EVEN_MM, **options), tmp_path):
        recode(file, syntax)
    scanner.read_usable(tmp_path)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("51", "JPEG Extended"),  # pydicom's plug-ins of a free licence refuse its 12 bits
        ("53", "JPEG Spectral Selection"),  # retired
        ("99", "an unknown transfer syntax"),
    ],
)
def test_a_syntax_without_a_trusted_decoder_is_named(
    tmp_path: Path, scanner: Any, code: str, said: str
) -> None:
    planes = scanner.axial(EVEN_MM, BitsStored=12, HighBit=11)
    for plane in planes:
        plane.file_meta.TransferSyntaxUID = JPEGExtended12Bit
        plane.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
        plane["PixelData"].is_undefined_length = True
    files = scanner.save(planes, tmp_path)
    syntax = JPEGExtended12Bit.encode()
    for file in map(Path, files):
        file.write_bytes(file.read_bytes().replace(syntax, syntax[:-2] + code.encode()))
    (line,) = index([tmp_path], key=None).scans.to_pylist()
    assert line["reason"] == "unsupported_encoding"
    assert said in line["detail"]
    with pytest.raises(ScanError, match=said):
        read_volume(files)


def shuffled_frames(scanner: Any) -> list[Dataset]:
    """Planes in random order, every third with another rescale."""
    planes = [
        *scanner.axial(EVEN_MM[::3], slope=0.5, intercept=-1000),
        *scanner.axial(EVEN_MM[1::3]),
        *scanner.axial(EVEN_MM[2::3], slope=1, intercept=-31),
    ]
    return [planes[i] for i in np.random.default_rng(3).permutation(len(planes))]


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEGLSLossless])
def test_frames_of_an_enhanced_object_in_any_order_are_a_volume(
    tmp_path: Path, scanner: Any, syntax: str | None
) -> None:
    dataset = scanner.enhanced(shuffled_frames(scanner))
    if syntax is not None:
        dataset.compress(syntax)
    scanner.save([dataset], tmp_path)
    volume, line = scanner.read_usable(tmp_path)
    assert volume.slice_origin_mm[:, 2].tolist() == EVEN_MM.tolist()
    assert line["thickness_mm"] == 5


def test_an_enhanced_series_of_several_objects_is_one_scan(tmp_path: Path, scanner: Any) -> None:
    planes = shuffled_frames(scanner)
    scanner.save([scanner.enhanced(planes[:4]), scanner.enhanced(planes[4:])], tmp_path)
    scanner.read_usable(tmp_path)


def test_an_enhanced_object_that_lost_frames_is_unreadable(tmp_path: Path, scanner: Any) -> None:
    (file,) = scanner.save([scanner.enhanced(shuffled_frames(scanner))], tmp_path)
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[:-200])
    assert scanner.reasons(tmp_path) == {"1.2.1": "unreadable"}


def test_pixels_too_short_for_their_frames_allocate_nothing(tmp_path: Path, scanner: Any) -> None:
    (plane,) = scanner.axial([0.0], Rows=8000, Columns=8000)
    files = scanner.save([plane], tmp_path)
    with pytest.raises(ScanError) as caught:
        read_volume(files)
    assert caught.value.reason is Reason.UNREADABLE


OVERLAY = 0xF000 * (np.arange(120).reshape(12, 10) % 3 == 0)
"""Graphics in the bits above 12 that are stored."""


def with_overlay(scanner: Any, dtype: str, intercept: float) -> list[Dataset]:
    planes: list[Dataset] = scanner.axial(EVEN_MM, dtype=dtype, intercept=intercept)
    for plane in planes:
        words = np.frombuffer(plane.PixelData, "<u2").reshape(12, 10)
        plane.PixelData = ((words & 0x0FFF) | OVERLAY).astype("<u2").tobytes()
    return planes


@pytest.mark.parametrize(("dtype", "intercept"), [("<u2", -1024.0), ("<i2", 0.0)])
@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1])
def test_an_overlay_in_the_bits_above_those_stored_is_no_value(
    tmp_path: Path, scanner: Any, recode: Any, dtype: str, intercept: float, syntax: str | None
) -> None:
    for file in scanner.save(with_overlay(scanner, dtype, intercept), tmp_path):
        if syntax is not None:
            recode(file, syntax)
        dataset = pydicom.dcmread(file)
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.save_as(file)
    scanner.read_usable(tmp_path)


@pytest.mark.parametrize("syntax", [None, RLELossless])
@pytest.mark.parametrize(("dtype", "intercept"), [("<u2", -1024.0), ("<i2", 0.0)])
def test_values_in_the_upper_bits_of_a_word_are_moved_down(
    tmp_path: Path, scanner: Any, dtype: str, intercept: float, syntax: str | None
) -> None:
    planes = scanner.axial(EVEN_MM, dtype=dtype, intercept=intercept)
    for plane in planes:
        words = np.frombuffer(plane.PixelData, "<u2") << 4
        plane.PixelData = words.tobytes()
        if syntax is not None:
            plane.compress(syntax, generate_instance_uid=False)
        plane.BitsStored, plane.HighBit = 12, 15
    scanner.save(planes, tmp_path)
    scanner.read_usable(tmp_path)


def test_values_in_the_lower_bits_under_a_higher_high_bit_are_no_guess(
    tmp_path: Path, scanner: Any
) -> None:
    files = scanner.save(scanner.axial(EVEN_MM, BitsStored=12, HighBit=15), tmp_path)
    with pytest.raises(ScanError, match="HighBit is 15 and BitsStored 12"):
        read_volume(files)


@pytest.mark.parametrize(
    "tags",
    [
        {"PhotometricInterpretation": None},
        {"SamplesPerPixel": None},
        {"HighBit": None},
        {"BitsStored": None},
        {"BitsStored": None, "dtype": "<u2", "HighBit": 11},
        {"dtype": "<u2", "BitsStored": 12, "HighBit": None},
    ],
    ids=str,
)
def test_what_the_header_lacks_and_the_rest_of_it_tells_is_no_fault(
    tmp_path: Path, scanner: Any, tags: dict[str, Any]
) -> None:
    scanner.save(scanner.axial(EVEN_MM, **tags), tmp_path)
    scanner.read_usable(tmp_path)


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"PixelRepresentation": None}, "PixelRepresentation is missing"),
        ({"BitsStored": None, "HighBit": None}, "BitsStored and HighBit are missing"),
        ({"BitsAllocated": 12}, "BitsAllocated is 12"),
        ({"BitsStored": 12, "HighBit": 7}, "HighBit 7 does not go with BitsStored 12"),
        ({"BitsStored": 20, "HighBit": 19}, "HighBit 19 does not go with BitsStored 20"),
    ],
    ids=str,
)
def test_the_index_names_what_keeps_pixels_from_being_read(
    tmp_path: Path, scanner: Any, tags: dict[str, Any], said: str
) -> None:
    files = scanner.save(scanner.axial(EVEN_MM, **tags), tmp_path)
    (line,) = index([tmp_path], key=None).scans.to_pylist()
    assert line["reason"] == "unsupported_encoding"
    assert said in line["detail"]
    with pytest.raises(ScanError, match=said):
        read_volume(files)


@pytest.mark.parametrize("named", [RLELossless, ExplicitVRLittleEndian])
def test_pixels_that_are_not_as_their_syntax_says_are_named_by_the_index(
    tmp_path: Path, scanner: Any, named: str
) -> None:
    plain = scanner.save(scanner.axial(EVEN_MM), tmp_path / "plain")
    packed_planes = scanner.axial(EVEN_MM)
    for plane in packed_planes:
        plane.compress(RLELossless, generate_instance_uid=False)
    packed = scanner.save(packed_planes, tmp_path / "packed")
    (tmp_path / "mixed").mkdir()
    for pair in zip(plain, packed, strict=True):
        content = [Path(file).read_bytes() for file in pair]
        if named == RLELossless:
            content.reverse()
        (tmp_path / "mixed" / Path(pair[0]).name).write_bytes(with_meta_header_of(*content))
    (line,) = index([tmp_path / "mixed"], key=None).scans.to_pylist()
    assert line["reason"] == "unsupported_encoding"
    assert "transfer syntax" in line["detail"]


def head(n: int = 6) -> Int16[np.ndarray, "z y x"]:
    """HU of a ball with a skull in noisy air, from -1024 to 1000."""
    z, y, x = np.indices((n, 40, 40))
    radius = np.hypot(np.hypot(y - 20, x - 20), 3 * (z - n / 2))
    noise = np.random.default_rng(0).integers(-9, 9, radius.shape)
    hu = np.where(radius < 14, 32, np.where(radius < 16, 1000, -1000)) + noise
    clipped: Int16[np.ndarray, "z y x"] = hu.clip(-1024).astype(np.int16)
    return clipped


def write_head(
    folder: Path, scanner: Any, stored: Shaped[np.ndarray, "z y x"], **tags: Any
) -> list[str]:
    planes = scanner.axial(5.0 * np.arange(len(stored)), intercept=0.0, Rows=40, Columns=40, **tags)
    for plane, image in zip(planes, stored, strict=True):
        plane.PixelData = image.astype("<u2").tobytes()
    files = scanner.save(planes, folder)
    return [file for _, file in sorted(zip(map(z_of, files), files, strict=True))]


def z_of(file: str) -> float:
    return float(pydicom.dcmread(file).ImagePositionPatient[2])


@pytest.mark.parametrize("bits", [16, 12, 13])
@pytest.mark.parametrize(("padding", "named"), [(None, None), (-2000, None), (-2000, 63536)])
def test_signed_values_that_are_called_unsigned_keep_their_sign(
    tmp_path: Path, scanner: Any, bits: int, padding: int | None, named: int | None
) -> None:
    hu = head()
    hu[3, 20, 20:23] = 2500  # metal, which reaches into the highest of 12 bits
    if padding is not None:
        hu[:, :4] = padding
    tags: dict[str, Any] = {"PixelRepresentation": 0, "BitsStored": bits, "HighBit": bits - 1}
    if named is not None:
        tags["PixelPaddingValue"] = named
    words = hu.astype("<u2") & ((1 << bits) - 1)
    read = read_volume(write_head(tmp_path, scanner, words, **tags)).hu
    np.testing.assert_array_equal(read, hu if named is None else hu.clip(PADDING_HU))


def test_unsigned_values_of_which_none_is_air_stay_unsigned(tmp_path: Path, scanner: Any) -> None:
    tags = {"PixelRepresentation": 0, "BitsStored": 12, "HighBit": 11}
    clipped = head().clip(0)
    clipped[3, 18:22, 18:22] = 3071  # metal, which is -1025 with a sign
    read = read_volume(write_head(tmp_path / "clipped", scanner, clipped, **tags)).hu
    np.testing.assert_array_equal(read, clipped)
    inverted = 3071 - head()
    read = read_volume(write_head(tmp_path / "inverted", scanner, inverted, **tags)).hu
    np.testing.assert_array_equal(read, inverted)


def test_tissue_above_all_hu_without_air_to_tell_by_is_refused(
    tmp_path: Path, scanner: Any
) -> None:
    hu = np.where(head() < 0, -90 + head() % 30, head())  # fat where air was
    files = write_head(tmp_path, scanner, hu, PixelRepresentation=0)
    with pytest.raises(ScanError, match="PixelRepresentation") as caught:
        read_volume(files)
    assert caught.value.reason is Reason.NOT_HU
    with_padding = np.where(hu < 0, 65535, hu.astype(int))
    files = write_head(tmp_path / "padding", scanner, with_padding, PixelRepresentation=0)
    np.testing.assert_array_equal(read_volume(files).hu == PADDING_HU, hu < 0)


@pytest.mark.parametrize("padding", [b"\xff\xff", b"\0\0\0\xff", b"  ", b"end of frame"])
def test_a_frame_may_be_padded_after_its_end_marker_and_lack_no_marker(
    tmp_path: Path, scanner: Any, recode: Any, padding: bytes
) -> None:
    files = scanner.save(scanner.axial(EVEN_MM), tmp_path)
    for file in files:
        recode(file, JPEGLosslessSV1)
        dataset = pydicom.dcmread(file)
        (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
        marker = frame.rindex(b"\xff\xd9")
        dataset.PixelData = encapsulate([frame[: marker + 2] + padding])
        dataset.save_as(file)
    scanner.read_usable(tmp_path)
    dataset.PixelData = encapsulate([frame[:marker] + padding])
    dataset.save_as(file)
    with pytest.raises(ScanError, match="ends before its pixels do"):
        read_volume(files)
