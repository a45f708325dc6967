"""Encodings as they come: the HU that were scanned, or a reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
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
