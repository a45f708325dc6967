"""Other files in place of the indexed ones are noticed; another order of the same is not."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from ctfm.extract.identity import file_digest
from ctfm.extract.index import index
from ctfm.extract.phantom_cohort import make_scan, write_series
from ctfm.extract.reading import read_volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason


def write_head(folder: Path, patient: int) -> list[Path]:
    write_series(make_scan(0, patient, 0, matrix=64, slices=9), folder)
    return sorted(folder.iterdir())


def write_nifti(path: Path, value: int) -> Path:
    """A head in a uniform field: two of them differ in the middle of their slices alone."""
    voxels = np.full((64, 64, 32), -1024, np.int16)
    voxels[16:48, 16:48, 8:24] = value
    nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4.0, 5.0, 1.0])), path)
    return path


def indexed(path: Path) -> tuple[list[str], str]:
    """Files and digest of the one scan there."""
    found = index([path], key=None)
    ((scan_id, files),) = found.files.items()
    return files, found.digests[scan_id]


def reason(files: list[str], digest: str) -> Reason:
    try:
        read_volume(files, digest=digest)
    except ScanError as error:
        return error.reason
    return Reason.OK


def test_a_series_is_what_it_was_in_any_order_of_its_files_and_in_an_archive(
    tmp_path: Path,
) -> None:
    write_head(tmp_path / "a", 0)
    files, digest = indexed(tmp_path / "a")
    archive = shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "a")
    assert indexed(Path(archive))[1] == digest
    assert reason(files, digest) is Reason.OK
    assert reason(files[::-1], digest) is Reason.OK


@pytest.mark.parametrize("replaced", [1, 9])
def test_slices_of_another_patient_in_place_of_the_indexed_ones_are_noticed(
    tmp_path: Path, replaced: int
) -> None:
    mine, others = write_head(tmp_path / "a", 0), write_head(tmp_path / "b", 1)
    files, digest = indexed(tmp_path / "a")
    for source, target in zip(others[:replaced], mine, strict=False):
        shutil.copy(source, target)
    assert reason(files, digest) is Reason.CHANGED


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_a_volume_of_the_same_size_and_geometry_is_told_apart(tmp_path: Path, name: str) -> None:
    path = write_nifti(tmp_path / name, 30)
    files, digest = indexed(path)
    assert reason(files, digest) is Reason.OK
    write_nifti(path, 31)
    assert reason(files, digest) is Reason.CHANGED


def test_a_series_without_an_id_is_what_it_was(tmp_path: Path) -> None:
    for file in write_head(tmp_path / "a", 0):
        dataset = pydicom.dcmread(file)
        del dataset.SeriesInstanceUID
        dataset.save_as(file)
    files, digest = indexed(tmp_path / "a")
    assert reason(files, digest) is Reason.OK


@pytest.mark.parametrize("size", [0, 1, 5000, 200_000])
def test_a_file_of_any_size_has_a_digest_of_its_own(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(bytes(size))
    (tmp_path / "b").write_bytes(bytes(size + 1))
    with open(tmp_path / "a", "rb") as a, open(tmp_path / "b", "rb") as b:
        assert file_digest(a) != file_digest(b)


def test_other_voxels_beside_the_same_header_are_noticed(tmp_path: Path) -> None:
    header = "NDims = 3\nDimSize = 10 12 9\nElementSpacing = 4 4 5\nElementType = MET_SHORT\n"
    (tmp_path / "a.mhd").write_text(f"{header}ElementDataFile = a.raw\n")
    np.full((9, 12, 10), 30, "<i2").tofile(tmp_path / "a.raw")
    files, digest = indexed(tmp_path)
    assert reason(files, digest) is Reason.OK
    np.full((9, 12, 10), 40, "<i2").tofile(tmp_path / "a.raw")
    assert reason(files, digest) is Reason.CHANGED
