"""NRRD and MetaImage against ITK, which wrote or read the same files; and headers that lie."""

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from jaxtyping import Float, Shaped

from ctfm.extract.formats import read_image, read_image_header
from ctfm.extract.sources import Opener
from ctfm.extract.text_headers import TextHeader, read_text_header
from ctfm.extract.voxels import read_voxels
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

SIZE = (7, 6, 5)  # i, j, k
TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"]
# Turned about every axis, and no two spacings alike.
TURN = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
SPACING_MM, ORIGIN_MM = (0.5, 0.75, 3.0), (-120.0, 33.0, 7.5)


def itk_image(dtype: str = "i2") -> sitk.Image:
    values = np.random.default_rng(7).integers(0, 100, SIZE[::-1]).astype(dtype)
    image = sitk.GetImageFromArray(values)
    image.SetDirection(TURN.ravel().tolist())
    image.SetSpacing(SPACING_MM)
    image.SetOrigin(ORIGIN_MM)
    return image


def affine_of(image: sitk.Image) -> Float[np.ndarray, "4 4"]:
    """From ITK's LPS to RAS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1
    return affine


def read(path: Path) -> tuple[TextHeader, Shaped[np.ndarray, "..."]]:
    with Opener() as opener:
        with opener.open(str(path)) as stream:
            header = read_text_header(stream, str(path))
        with opener.open(header.data) as stream:
            stream.seek(header.start or 0)
            return header, read_voxels(stream, header.shape, header.dtype, packed=header.packed)


def assert_as_itk_reads_it(path: Path) -> None:
    image = sitk.ReadImage(path)
    header, voxels = read(path)
    np.testing.assert_allclose(header.affine, affine_of(image), atol=1e-5)
    np.testing.assert_array_equal(voxels, sitk.GetArrayFromImage(image).T)


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_itk_wrote_is_read_as_it_reads_it(
    tmp_path: Path, ending: str, packed: bool, dtype: str
) -> None:
    path = tmp_path / f"scan.{ending}"
    sitk.WriteImage(itk_image(dtype), path, useCompression=packed)
    assert_as_itk_reads_it(path)


VALUES = np.arange(np.prod(SIZE)).astype(">i2").tobytes()
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "right-anterior-superior",
    "sizes": "7 6 5",
    "space directions": "(0.5,0,0.1) (0,0.75,0) (0,0.2,3)",
    "space origin": "(1,2,3)",
    "endian": "big",
    "encoding": "raw",
}
METAIMAGE = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "True",
    "Offset": "1 2 3",
    "Rotation": "0 1 0 1 0 0 0 0 1",
    "ElementSpacing": "0.5 0.75 3",
    "DimSize": "7 6 5",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def write(path: Path, fields: dict[str, Any], *, data: bytes = VALUES) -> Path:
    """A header as `fields` say, without those of None; the name of the data ends a MetaImage's."""
    fields = dict(sorted(fields.items(), key=lambda field: field[0] == "ElementDataFile"))
    between, end = (": ", "\n") if path.suffix in (".nrrd", ".nhdr") else (" = ", "")
    lines = [f"{name}{between}{value}\n" for name, value in fields.items() if value is not None]
    first = "NRRD0004\n# by hand\nkey:=value: 3\n" if end else ""
    path.write_bytes((first + "".join(lines) + end).encode() + data)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"space": "LPS"},
        {"space": "left-anterior-superior"},
        {"space origin": None},
        {
            "dimension": 4,
            "sizes": "1 7 6 5",
            "space directions": "none (1,0,0) (0,2,0) (0,0,3)",
            "kinds": "vector domain domain domain",
        },
        {"encoding": "gzip"},
        {"byte skip": 4},
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_nrrd_by_another_hand_is_read_as_itk_reads_it(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    data = gzip.compress(VALUES) if "encoding" in change else VALUES
    data = b"skip" + data if "byte skip" in change else data
    path = write(tmp_path / "scan.nrrd", NRRD | change, data=data)
    header, voxels = read(path)
    image = sitk.ReadImage(path)
    np.testing.assert_array_equal(voxels.ravel("F"), sitk.GetArrayFromImage(image).ravel())
    np.testing.assert_allclose(header.affine, affine_of(image), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "True"},
        {"Rotation": None, "TransformMatrix": "0 0 1 1 0 0 0 1 0"},
        {"ElementSpacing": None, "ElementSize": "0.4 0.5 5"},
        {"Offset": None, "Rotation": None},
    ],
)
def test_a_metaimage_by_another_hand_is_read_as_itk_reads_it(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    assert_as_itk_reads_it(write(tmp_path / "scan.mha", METAIMAGE | change))


def test_voxels_may_be_what_a_file_ends_with(tmp_path: Path) -> None:
    (tmp_path / "scan.raw").write_bytes(b"a header of its own" + VALUES)
    place = {"HeaderSize": "-1", "ElementDataFile": "scan.raw"}
    volume = read_image(str(write(tmp_path / "scan.mhd", METAIMAGE | place, data=b"")))
    assert sorted(volume.hu.ravel()) == list(range(7 * 6 * 5))


def reason_of(path: Path) -> Reason:
    with Opener() as opener, pytest.raises(ScanError) as caught:
        read_image_header(opener, str(path))
    return caught.value.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"space": None}, Reason.BAD_GEOMETRY),
        ({"space": "scanner-xyz"}, Reason.BAD_GEOMETRY),
        ({"space directions": None, "spacings": "1 1 1"}, Reason.BAD_GEOMETRY),
        ({"space directions": "(1,0,0) (0,1,0) (nan,0,0)"}, Reason.BAD_GEOMETRY),
        ({"space directions": "(1,0,0) (0,1,0)"}, Reason.UNREADABLE),
        ({"sizes": "7 6"}, Reason.UNREADABLE),
        ({"sizes": "7 6 -5"}, Reason.UNREADABLE),
        ({"sizes": "7 6 5e9"}, Reason.UNREADABLE),
        ({"sizes": "99999 99999 99999"}, Reason.BAD_GEOMETRY),
        ({"sizes": "7 6 500"}, Reason.UNREADABLE),
        ({"dimension": "9" * 400}, Reason.UNREADABLE),
        ({"type": "block"}, Reason.UNSUPPORTED_ENCODING),
        ({"encoding": "bzip2"}, Reason.UNSUPPORTED_ENCODING),
        ({"encoding": None}, Reason.UNREADABLE),
        ({"line skip": "3"}, Reason.UNSUPPORTED_ENCODING),
        ({"byte skip": "-9"}, Reason.UNREADABLE),
        ({"dimension": "2", "sizes": "7 6"}, Reason.TOO_FEW_SLICES),
        (
            {
                "dimension": 4,
                "sizes": "3 7 6 5",
                "space directions": "none (1,0,0) (0,2,0) (0,0,3)",
            },
            Reason.COLOUR,
        ),
        (
            {
                "dimension": 4,
                "sizes": "7 6 5 3",
                "space directions": "(1,0,0) (0,2,0) (0,0,3) none",
            },
            Reason.UNSUPPORTED_ENCODING,
        ),
    ],
)
def test_a_nrrd_that_is_no_plain_volume_has_a_reason(
    tmp_path: Path, change: dict[str, Any], reason: Reason
) -> None:
    assert reason_of(write(tmp_path / "scan.nrrd", NRRD | change)) is reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"NDims": "9999993"}, Reason.UNREADABLE),  # ends a process that reads it with ITK
        ({"NDims": "9999993", "DimSize": "1 " * 40}, Reason.UNREADABLE),
        ({"NDims": None}, Reason.UNREADABLE),
        ({"DimSize": "65535 65535 65535"}, Reason.BAD_GEOMETRY),
        ({"DimSize": "7 6 6"}, Reason.UNREADABLE),
        ({"CompressedData": "True", "DimSize": "700 600 500"}, Reason.UNREADABLE),
        ({"ElementSpacing": "1 1"}, Reason.UNREADABLE),
        ({"ElementSpacing": "0 0 0"}, Reason.BAD_GEOMETRY),
        ({"ElementType": "MET_SHORT_ARRAY"}, Reason.UNSUPPORTED_ENCODING),
        ({"ElementNumberOfChannels": "3"}, Reason.COLOUR),
        ({"BinaryData": "False"}, Reason.UNSUPPORTED_ENCODING),
        ({"ElementDataFile": None}, Reason.UNREADABLE),
    ],
)
def test_a_metaimage_that_is_no_plain_volume_has_a_reason(
    tmp_path: Path, change: dict[str, Any], reason: Reason
) -> None:
    assert reason_of(write(tmp_path / "scan.mha", METAIMAGE | change)) is reason


@pytest.mark.parametrize(
    "name", ["../scan.raw", "/dev/zero", "..\\scan.raw", "x.zip::scan.raw", "LIST"]
)
def test_voxels_are_not_looked_for_outside_the_folder_of_their_header(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "scan.raw").write_bytes(VALUES)
    (tmp_path / "in").mkdir()
    mhd = write(tmp_path / "in" / "a.mhd", METAIMAGE | {"ElementDataFile": name}, data=b"")
    nhdr = write(tmp_path / "in" / "a.nhdr", NRRD | {"data file": name}, data=b"")
    assert reason_of(mhd) is Reason.UNSUPPORTED_ENCODING
    assert reason_of(nhdr) is Reason.UNSUPPORTED_ENCODING


def test_a_data_file_that_would_block_or_is_missing_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "gone.raw", "."):
        path = write(tmp_path / "a.mhd", METAIMAGE | {"ElementDataFile": name}, data=b"")
        assert reason_of(path) is Reason.UNREADABLE
