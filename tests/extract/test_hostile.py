"""Files that mean harm: each costs no more time or memory than a file may, and has its reason."""

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ctfm.extract.codestream import claimed_size
from ctfm.extract.dicom import read_planes
from ctfm.extract.dicom_pixels import read_dicom
from ctfm.store.errors import ScanError

MIB = 1 << 20
BOMB_BYTES = 128 * MIB
POSITION, PATIENT = b"\x20\x00\x32\x00", b"\x10\x00\x20\x00"
ROWS, COLUMNS = b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x11\x00US\x02\x00"


def written(dataset: Dataset, syntax: str | None = None) -> bytes:
    if syntax is not None:
        dataset.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def bomb(start: bytes, *, wbits: int) -> bytes:
    """A deflated stream that begins as `start` does and goes on with zeros."""
    pack = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return pack.compress(start) + pack.compress(bytes(BOMB_BYTES)) + pack.flush()


def deflate_bomb(plane: Dataset) -> bytes:
    content = written(plane, DeflatedExplicitVRLittleEndian)
    start = 144 + int.from_bytes(content[140:144], "little")  # the group length of the meta header
    return content[:start] + bomb(zlib.decompress(content[start:], -15), wbits=-15)


def late_deflate_bomb(plane: Dataset, ends_at: int = 60_000) -> bytes:
    """The transfer syntax stands behind more private information than a glance sees."""
    content = deflate_bomb(plane)
    syntax = content.index(b"\x02\x00\x10\x00UI")
    length = ends_at - syntax - 12
    information = struct.pack("<HH2s2xL", 2, 0x0102, b"OB", length) + bytes(length)
    return content[:syntax] + information + content[syntax:]


def nested(plane: Dataset) -> bytes:
    """A sequence in a sequence in a sequence, 100,000 deep, where a header may hold one."""
    content = written(plane)
    level = struct.pack("<HH2s2xLHHL", 0x5200, 0x9230, b"SQ", 2**32 - 1, 0xFFFE, 0xE000, 2**32 - 1)
    at = content.index(b"\x08\x00\x08\x00CS")
    return content[:at] + 100_000 * level + content[at:]


def long_value(plane: Dataset, tag: bytes, value: bytes) -> bytes:
    """An element of implicit VR, of which the length has four bytes."""
    content = written(plane, ImplicitVRLittleEndian)
    at = content.index(tag)
    (length,) = struct.unpack_from("<L", content, at + 4)
    head = content[: at + 4] + struct.pack("<L", len(value))
    return head + value + content[at + 8 + length :]


def claims_the_rest(plane: Dataset) -> bytes:
    content = written(plane, ImplicitVRLittleEndian)
    at = content.index(PATIENT)
    return content[: at + 4] + struct.pack("<L", 2**32 - 16) + content[at + 8 :]


def resized(content: bytes, side: int) -> bytes:
    """Another number of rows and columns in a DICOM header."""
    for tag in (ROWS, COLUMNS):
        at = content.index(tag) + len(tag)
        content = content[:at] + struct.pack("<H", side) + content[at + 2 :]
    return content


def resized_codestream(content: bytes, side: int) -> bytes:
    """Another size in the codestream itself, where JPEG, JPEG-LS or JPEG 2000 keep it."""
    if (at := content.find(b"\xff\x4f\xff\x51")) >= 0:
        sizes = struct.pack(">II", side, side)
        content = content[: at + 8] + sizes + content[at + 16 :]
        return content[: at + 24] + sizes + content[at + 32 :]
    frame = content.index(b"\xff\xd8")
    at = min(a for m in (b"\xff\xc3", b"\xff\xf7") if (a := content.find(m, frame)) >= 0)
    return content[: at + 5] + struct.pack(">HH", side, side) + content[at + 9 :]


def compressed(plane: Dataset, syntax: str) -> bytes:
    plane.compress(syntax, generate_instance_uid=False)
    return written(plane)


HOSTILE: dict[str, Callable[[Dataset], bytes]] = {
    "deflate_bomb": deflate_bomb,
    "late_deflate_bomb": late_deflate_bomb,
    "deflate_bomb_at_the_edge": lambda plane: late_deflate_bomb(plane, ends_at=4096),
    "nested": nested,
    "many_values": lambda plane: long_value(plane, POSITION, b"1\\" * (40 * MIB)),
    "long_id": lambda plane: long_value(plane, PATIENT, b"A" * (80 * MIB)),
    "claims_the_rest": claims_the_rest,
    "wide_rle": lambda plane: resized(compressed(plane, RLELossless), 8192),
    "wide_jls": lambda plane: resized_codestream(compressed(plane, JPEGLSLossless), 65_500),
    "wide_j2k": lambda plane: resized_codestream(compressed(plane, JPEG2000Lossless), 60_000),
    "wider_j2k": lambda plane: resized(
        resized_codestream(compressed(plane, JPEG2000Lossless), 4096), 4096
    ),
}
INDEX_REASONS = {
    "deflate_bomb": "unreadable",
    "late_deflate_bomb": "unreadable",
    "deflate_bomb_at_the_edge": "unreadable",
    "nested": "unreadable",
    "many_values": "bad_geometry",
    "claims_the_rest": "not_an_image",
}


def lossless_jpeg(scanner: Any, recode: Any, folder: Path) -> bytes:
    (file,) = scanner.save([scanner.plane((-25.0, -30.0, 0.0))], folder)
    recode(file, JPEGLosslessSV1)
    return Path(file).read_bytes()


@pytest.mark.parametrize("damage", ["wide", "cut"])
def test_a_jpeg_that_is_not_the_image_of_its_header_is_not_decoded(
    tmp_path: Path, scanner: Any, recode: Any, damage: str
) -> None:
    content = lossless_jpeg(scanner, recode, tmp_path)
    end = content.rindex(b"\xff\xd9")
    wrong = (
        resized_codestream(content, 6000)
        if damage == "wide"
        else (content[: end - 20] + bytes(22) + content[end + 2 :])
    )
    (tmp_path / "IM0000").write_bytes(wrong)
    with pytest.raises(ScanError, match="compressed image"):
        read_dicom([str(tmp_path / "IM0000")])


def test_a_box_without_an_end_is_no_endless_loop() -> None:
    box = struct.pack(">L4s", 0, b"free")
    with pytest.raises(ValueError, match="box"):
        claimed_size(b"\x00\x00\x00\x0cjP  \r\n\x87\n" + box)


def test_a_meta_header_that_does_not_end_is_unreadable(scanner: Any) -> None:
    content = bytearray(written(scanner.plane((0.0, 0.0, 0.0))))
    at = content.index(b"\x02\x00\x10\x00UI")
    content[at + 4 : at + 12] = b"OB\0\0\xf0\xff\xff\xff"
    with pytest.raises(ScanError, match="unreadable"):
        read_planes(io.BytesIO(bytes(content)), "file")


def nifti(shape: tuple[int, int, int]) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header.set_sform(np.diag([0.5, 0.5, 0.5, 1.0]), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return bytes(header.binaryblock) + bytes(4)


METAIMAGE = b"""NDims = 3
DimSize = 1000 1000 60
ElementType = MET_SHORT
CompressedData = True
ElementDataFile = LOCAL
"""
NRRD = b"""NRRD0004
type: short
dimension: 3
space: LPS
sizes: 1000 1000 60
space directions: (1,0,0) (0,1,0) (0,0,1)
endian: little
encoding: gzip

"""


def write_hostile_dicom(folder: Path, scanner: Any) -> None:
    wide = replace(scanner, rows=64, columns=48)  # JPEG 2000 needs more than a few pixels
    for number, (name, make) in enumerate(HOSTILE.items()):
        plane = wide.plane((-25.0, -30.0, 0.0), SeriesInstanceUID=f"1.2.{number}")
        (folder / name).write_bytes(make(plane))


def write_hostile_volumes(folder: Path) -> list[str]:
    """Their names, of those in an archive, too."""
    zeros = gzip.compress(bytes(64 * MIB))
    packed = gzip.compress(nifti((1000, 1000, 500))) + 15 * zeros
    files = {
        "bomb.nii.gz": packed,
        "liar.nii.gz": gzip.compress(nifti((1000, 1000, 500)) + bytes(4000)),
        "liar.nii": nifti((1000, 1000, 500)) + bytes(4000),
        "huge.nii": nifti((32767, 32767, 32767)),
        "bomb.mha": METAIMAGE + bomb(b"", wbits=15),
        "bomb.nrrd": NRRD + bomb(b"", wbits=31),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("packed.nii.gz", packed)
        archive.writestr("zeros.dcm", bytes(100 * MIB))
    return [*files, "packed.nii.gz", "zeros.dcm"]


def test_hostile_files_cost_little_and_have_their_reason(
    tmp_path: Path, scanner: Any, endure: Any
) -> None:
    folder = tmp_path / "hostile"
    scanner.save(scanner.axial(np.arange(0.0, 45.0, 5.0), SeriesInstanceUID="1.3"), folder)
    write_hostile_dicom(folder, scanner)
    volumes = write_hostile_volumes(folder)
    endured = endure(folder)
    assert scanner.accounted(endured.catalogue, 9 + len(HOSTILE) + len(volumes))
    assert endured.of("/IM0000")[0] == "ok"
    for name in HOSTILE:
        found, outcome = endured.of(f"/{name}")
        assert found == INDEX_REASONS.get(name, "too_few_slices"), name
        assert outcome != "ok"
    for name in volumes:
        reason = "bad_geometry" if name == "huge.nii" else "unreadable"
        assert endured.of(name) == (reason, reason), name
