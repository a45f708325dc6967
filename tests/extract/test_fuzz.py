"""Damaged files by the thousand: none crashes, hangs or takes memory, and none is lost sight of.

Valid scans of a phantom in every format and transfer syntax are damaged as a seed decides: bits
flipped, pieces cut out, doubled or overwritten, numbers of a header replaced by hostile ones.
"""

import gzip
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.random import Generator
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ctfm.extract.phantom_cohort import make_scan, write_series
from ctfm.extract.reading import read_volume

SLICES = 9
SYNTAXES = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
]
HOSTILE = [0, 1, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
TAGS = [
    *("00020010", "00080005", "00080008", "00080016", "00080018", "0020000D", "0020000E"),
    *("00200032", "00200037", "00280002", "00280004", "00280008", "00280010", "00280011"),
    *("00280030", "00280100", "00280101", "00280102", "00280103", "00280120", "00281052"),
    *("00281053", "7FE00010"),
]
NIFTI_FIELDS = [40, 42, 44, 46, 48, 70, 72, 76, 80, 84, 88, 108, 112, 116, 252, 254, 256, 280, 344]
SIDECAR_KEYS = [
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription"),
    *("ImageType", "ContrastBolusAgent", "ContrastBolusVolume", "AcquisitionDateTime", "KVP"),
    *("AcquisitionTime", "ConvolutionKernel", "SliceThickness", "Manufacturer"),
]
SIDECAR_VALUES = [
    *("null", "true", "-0", "1e400", "NaN", "9" * 400, '""', "[]", "[[[1]]]", '{"a": {}}'),
    *('"\\ud800"', '["\\udfff", 1]', '"\\u0000"', '"1.2.\\ud800"', f'"{"x" * 70_000}"', '"::/../"'),
]
Damage = Callable[[bytearray, Generator], None]


def flip_bits(content: bytearray, rng: Generator) -> None:
    end = len(content) if rng.random() < 0.5 else min(len(content), 2000)
    for at in rng.integers(0, end, rng.integers(1, 33)):
        content[at] ^= 1 << int(rng.integers(8))


def cut(content: bytearray, rng: Generator) -> None:
    del content[rng.integers(len(content)) :]


def move_pieces(content: bytearray, rng: Generator) -> None:
    at, to = rng.integers(0, min(len(content), 4000), 2)
    length = int(rng.integers(1, 256))
    piece = content[at : at + length] if rng.random() < 0.5 else rng.bytes(length)
    content[to : to + int(rng.choice([0, length, 2 * length]))] = piece


def write_number(content: bytearray, rng: Generator, at: int) -> None:
    """A hostile number of two or four bytes, in either order, or an odd float."""
    number = int(rng.choice(HOSTILE))
    odd = float(rng.choice([0, -1, np.nan, np.inf, 1e30]))
    value = [
        struct.pack("<H", number & 0xFFFF),
        struct.pack("<I", number),
        struct.pack(">I", number),
        struct.pack("<h", int(rng.integers(-10, 3000))),
        struct.pack("<f", odd),
    ][rng.integers(5)]
    content[at : at + len(value)] = value


def number_anywhere(content: bytearray, rng: Generator) -> None:
    write_number(content, rng, int(rng.integers(min(len(content), 2000))))


def number_in_an_element(content: bytearray, rng: Generator) -> None:
    tag = bytes.fromhex(str(rng.choice(TAGS)))
    at = content.find(tag[1::-1] + tag[:1:-1])
    if at >= 0:
        write_number(content, rng, at + int(rng.choice([4, 6, 8, 9, 12])))


def number_in_a_nifti(content: bytearray, rng: Generator) -> None:
    packed = content.startswith(b"\x1f\x8b")
    plain = bytearray(gzip.decompress(content) if packed else content)
    write_number(plain, rng, int(rng.choice(NIFTI_FIELDS)))
    content[:] = gzip.compress(plain, 1) if packed else plain


def hostile_sidecar(rng: Generator) -> bytes:
    """JSON of odd values, every other one damaged besides."""
    values = rng.choice(SIDECAR_VALUES, len(SIDECAR_KEYS))
    said = ", ".join(f'"{key}": {value}' for key, value in zip(SIDECAR_KEYS, values, strict=True))
    content = bytearray(f"{{{said}}}".encode())
    if rng.random() < 0.5:
        flip_bits(content, rng)
    return bytes(content)


def digits(content: bytearray, rng: Generator) -> None:
    places = [at for at, byte in enumerate(content[:600]) if chr(byte).isdigit()]
    at = int(rng.choice(places))
    content[at : at + int(rng.integers(2))] = b"9" * int(rng.integers(1, 12))


ANYWHERE: list[Damage] = [flip_bits, cut, move_pieces, number_anywhere]


def damaged(content: bytes, rng: Generator, own: Damage) -> bytes:
    """One to three damages, in half of the files one of the kind that its format knows."""
    changed = bytearray(content)
    kinds = [ANYWHERE[i] for i in rng.integers(len(ANYWHERE), size=rng.integers(1, 4))]
    for damage in [own, *kinds[1:]] if rng.random() < 0.5 else kinds:
        if len(changed) > 500:
            damage(changed, rng)
    return bytes(changed)


OWN: dict[str, Damage] = {
    "nii": number_in_a_nifti,
    "gz": number_in_a_nifti,
    "mha": digits,
    "nrrd": digits,
    "zip": flip_bits,
}


Seeds = Mapping[str, Sequence[bytes]]
"""The files of valid scans, by the name of what they are: a transfer syntax, or a file."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory, scanner: Any, recode: Any) -> Seeds:
    """The head of one phantom in every format, without the ids that make files a series.

    So the files of each folder are a series of their own, whatever is copied there.
    """
    folder = tmp_path_factory.mktemp("phantom")
    write_series(make_scan(3, 1, matrix=64, slices=SLICES, tilt_deg=0.0), folder)
    files = sorted(folder.iterdir())
    planes = [pydicom.dcmread(file) for file in files]
    made = {
        syntax.keyword: [in_syntax(plane, syntax, folder, recode) for plane in planes]
        for syntax in SYNTAXES
    }
    enhanced = [in_syntax(scanner.enhanced(planes), ExplicitVRLittleEndian, folder, recode)]
    return made | {"Enhanced": enhanced} | volumes(files, made, folder)


def in_syntax(plane: Dataset, syntax: UID, folder: Path, recode: Any) -> bytes:
    plane, file = deepcopy(plane), folder / "plane"
    if syntax == JPEGLosslessSV1:
        plane.save_as(file)
        recode(str(file), syntax)
        plane = pydicom.dcmread(file)
    order = {"implicit_vr": syntax == ImplicitVRLittleEndian, "little_endian": True}
    if syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        plane.compress(syntax, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        order["little_endian"] = False
        plane.PixelData = np.frombuffer(plane.PixelData, "<i2").astype(">i2").tobytes()
    del plane.PatientID, plane.StudyInstanceUID, plane.SeriesInstanceUID
    plane.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(file, plane, **order, force_encoding=True)
    return file.read_bytes()


def volumes(files: Sequence[Path], made: Seeds, folder: Path) -> dict[str, Sequence[bytes]]:
    volume = read_volume([str(file) for file in files])
    steps = (
        volume.column_step_mm,
        volume.row_step_mm,
        np.diff(volume.slice_origin_mm[:2], axis=0)[0],
    )
    affine = np.eye(4)
    affine[:3] = np.stack([*steps, volume.slice_origin_mm[0]], axis=1)
    voxels = volume.hu.transpose()
    nib.save(nib.Nifti1Image(voxels, affine), folder / "a.nii")
    nib.save(nib.Nifti2Image(voxels, affine), folder / "b.nii")
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), folder / "f.nii.gz")
    image = sitk.GetImageFromArray(volume.hu)
    image.SetSpacing(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    for name in ("a.mha", "z.mha", "a.nrrd", "z.nrrd"):
        sitk.WriteImage(image, folder / name, useCompression=name.startswith("z"))
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, content in enumerate(made[ExplicitVRLittleEndian.keyword]):
            archive.writestr(f"a/{number}", content)
    return {file.name: [file.read_bytes()] for file in folder.iterdir() if file.suffix[1:] in OWN}


def write(folder: Path, name: str, contents: Sequence[bytes]) -> None:
    """The files of one scan, under names that differ from those in other folders."""
    folder.mkdir(parents=True)
    ending = name[1:] if "." in name else ""
    for i, content in enumerate(contents):
        (folder / f"{folder.name}_{i}{ending}").write_bytes(content)


def write_damaged(folder: Path, seeds: Seeds, *, count: int, seed: int) -> int:
    """Scans with this many damaged files, or a few more; how many files there are in all."""
    present = 0
    for number, name in enumerate(cycle(seeds)):
        if count <= 0:
            break
        rng, contents = np.random.default_rng([seed, number]), list(seeds[name])
        own = OWN.get(name.rsplit(".", 1)[-1], number_in_an_element)
        for i in rng.permutation(len(contents))[: rng.integers(1, 4)]:
            contents[i] = damaged(contents[i], rng, own)
            count -= 1
        write(folder / f"{number:05d}", name, contents)
        present += len(contents)
        if ".nii" in name:
            sidecar = folder / f"{number:05d}" / f"{number:05d}_0.json"
            sidecar.write_bytes(hostile_sidecar(rng))
            present += 1
    return present


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_have_their_reasons_and_leave_the_others_alone(
    tmp_path: Path, seeds: Seeds, endure: Any, count: int
) -> None:
    for name, contents in seeds.items():
        write(tmp_path / "files" / f"valid_{name.replace('.', '_')}", name, contents)
    present = sum(map(len, seeds.values()))
    present += write_damaged(tmp_path / "files", seeds, count=count, seed=2024)
    endured = endure(tmp_path / "files")
    listed = [file for files in endured.catalogue.files.values() for file in files]
    plain = {file.split("::")[0] for file in listed}
    assert len(set(listed)) == len(listed)
    assert len(plain) + sum(endured.catalogue.ignored.values()) == present
    valid = [one for one, files in endured.catalogue.files.items() if "/valid_" in files[0]]
    assert len(valid) == len(seeds)
    assert {endured.outcomes[one] for one in valid} == {"ok"}
    # The trial is one only if some of what was damaged is still read, and some no more.
    outcomes = Counter(endured.outcomes[one] for one in endured.outcomes if one not in valid)
    assert min(outcomes["ok"], outcomes["unreadable"]) > count / 20, outcomes
