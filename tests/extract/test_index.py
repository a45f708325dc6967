"""The whole of `ctfm index`: every file has its line or is counted, and no line says too much."""

import os
import random
import shutil
import stat
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any
from zlib import crc32

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)

from ctfm.extract.index import index
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.reading import read_volume
from ctfm.store.catalogue import (
    Catalogue,
    key_for,
    private_path,
    read_catalogue,
    read_former,
)
from ctfm.store.pseudonyms import Pseudonyms

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the public test scans are not here")
KEY = bytes(range(32))
ROWS, COLUMNS = 6, 8


def ct_slice(study: str, series: str, z_mm: float, **tags: Any) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.Modality = CTImageStorage, "CT"
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientID = f"MRN-{study}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, f"{study}.{series}"
    dataset.ImagePositionPatient = [-110.0, -130.0, z_mm]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.4, 0.5]
    dataset.ConvolutionKernel, dataset.Manufacturer = "STANDARD", "GE MEDICAL SYSTEMS"
    dataset.KVP, dataset.SliceThickness = "120", "5"
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.Rows, dataset.Columns = ROWS, COLUMNS
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.PixelData = np.full((ROWS, COLUMNS), int(1024 + z_mm), dtype="<i2").tobytes()
    for keyword, value in tags.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def write_series(
    folder: Path, study: str, series: str, *, z_mm: Any = range(0, 50, 5), **tags: Any
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, z in enumerate(z_mm):
        files.append(folder / f"IM{i:03d}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of these are wrong on purpose
            ct_slice(study, series, float(z), **tags).save_as(files[-1], enforce_file_format=True)
    return files


def lines(*paths: Path, key: bytes | None = None) -> dict[str, dict[str, Any]]:
    """The catalogue by scan id; with no key those are the series."""
    return {line["scan_id"]: line for line in index(list(paths), key=key).scans.to_pylist()}


def reasons(*paths: Path) -> dict[str, str]:
    return {name: line["reason"] for name, line in lines(*paths).items()}


def test_a_series_is_one_line_with_its_geometry(tmp_path: Path) -> None:
    write_series(tmp_path / "deep" / "er", "1.2", "1")
    (line,) = lines(tmp_path).values()
    assert line == {
        "scan_id": "1.2.1",
        "study_id": "1.2",
        "patient_id": "MRN-1.2",
        "usable": True,
        "reason": "ok",
        "detail": "",
        "format": "dicom",
        "n_slices": 10,
        "rows": ROWS,
        "columns": COLUMNS,
        "spacing_x_mm": 0.5,
        "spacing_y_mm": 0.4,
        "spacing_z_mm": 5.0,
        "spacing_z_min_mm": 5.0,
        "spacing_z_max_mm": 5.0,
        "thickness_mm": 5.0,
        "tilt_deg": 0.0,
        "coverage_mm": 45.0,
        "vendor": "GE",
        "kernel": "STANDARD",
        "kvp": 120.0,
    }


def test_files_are_listed_in_slice_order_whatever_their_names(tmp_path: Path) -> None:
    files = write_series(tmp_path, "1.2", "1", z_mm=[40, 0, 30, 20, 10])
    catalogue = index([tmp_path], key=None)
    expected = [str(files[i]) for i in (1, 4, 3, 2, 0)]
    assert catalogue.files == {"1.2.1": expected}
    assert read_volume(expected).hu[:, 0, 0].tolist() == [0, 10, 20, 30, 40]


def test_series_of_one_folder_are_told_apart_and_joined_across_folders(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "1.2", "1", z_mm=range(0, 20, 5))
    write_series(tmp_path / "b", "1.2", "1", z_mm=range(20, 45, 5))
    for i, file in enumerate(write_series(tmp_path / "c", "1.2", "2", KVP="140")):
        file.rename(tmp_path / "a" / f"x{i}")
    found = lines(tmp_path)
    assert {name: line["n_slices"] for name, line in found.items()} == {"1.2.1": 9, "1.2.2": 10}
    assert Counter(line["usable"] for line in found.values()) == {True: 1, False: 1}


@pytest.mark.parametrize(
    ("reason", "tags"),
    [
        ("localizer", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        ("not_ct", {"Modality": "MR", "SOPClassUID": MRImageStorage}),
        ("not_ct", {"SOPClassUID": SecondaryCaptureImageStorage}),
        ("colour", {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}),
        ("not_an_image", {"PixelData": None}),
        ("unreadable", {"PixelData": b"\0" * 90}),
        ("contrast", {"ContrastBolusAgent": "OMNIPAQUE"}),
        ("derived", {"ImageType": ["DERIVED", "SECONDARY", "MIP"]}),
        ("bad_rescale", {"RescaleSlope": "0"}),
        ("bad_rescale", {"RescaleIntercept": None}),
        ("bad_geometry", {"ImagePositionPatient": None}),
        ("bad_geometry", {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}),
        ("bad_geometry", {"PixelSpacing": [40, 40]}),
        ("bad_geometry", {"PixelSpacing": None}),
        ("not_axial", {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}),
        ("duplicate_positions", {"ImagePositionPatient": [0, 0, 0]}),
        ("unsupported_encoding", {"NumberOfFrames": 2, "Rows": ROWS // 2}),
    ],
)
def test_a_faulty_series_has_one_line_with_its_reason(
    tmp_path: Path, reason: str, tags: dict[str, Any]
) -> None:
    write_series(tmp_path / "good", "1.3", "1")
    write_series(tmp_path / "bad", "1.2", "1", **tags)
    assert reasons(tmp_path) == {"1.2.1": reason, "1.3.1": "ok"}


@pytest.mark.parametrize(
    ("reason", "z_mm"),
    [
        ("missing_slices", [0, 5, 10, 20, 25, 30, 35]),
        ("duplicate_positions", [0, 5, 5, 10, 15, 20, 25]),
        ("too_few_slices", [0, 5]),
        ("ok", [0, 4, 8, 12, 16, 23, 30, 37]),
        ("ok", [50, 45, 40, 35, 30, 25, 20]),
    ],
)
def test_positions_decide_whether_a_series_is_whole(
    tmp_path: Path, reason: str, z_mm: list[int]
) -> None:
    write_series(tmp_path, "1.2", "1", z_mm=z_mm)
    assert reasons(tmp_path) == {"1.2.1": reason}


def test_one_series_of_a_study_is_chosen_and_the_others_say_why_not(tmp_path: Path) -> None:
    write_series(tmp_path / "1", "1.2", "1", ConvolutionKernel="BONE")
    write_series(tmp_path / "2", "1.2", "2")
    write_series(tmp_path / "3", "1.2", "3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "4", "1.4", "1", ConvolutionKernel="BONE")
    found = lines(tmp_path)
    assert {name: line["reason"] for name, line in found.items()} == {
        "1.2.1": "other_series_chosen",
        "1.2.2": "ok",
        "1.2.3": "localizer",
        "1.4.1": "ok",
    }
    assert all(line["detail"] for line in found.values() if not line["usable"])


def test_a_localizer_inside_a_series_becomes_a_line_of_its_own(tmp_path: Path) -> None:
    write_series(tmp_path / "1", "1.2", "1")
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    write_series(tmp_path / "2", "1.2", "1", z_mm=[900], **scout)
    assert reasons(tmp_path) == {"1.2.1": "ok", "1.2.1#2": "localizer"}


def test_copies_of_a_series_become_a_line_of_their_own(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "1.2", "1")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    catalogue = index([tmp_path], key=None)
    by_id = dict(
        zip(*(catalogue.scans[name].to_pylist() for name in ("scan_id", "reason")), strict=True)
    )
    assert by_id == {"1.2.1": "ok", "1.2.1#2": "duplicate_scan"}
    assert {len(files) for files in catalogue.files.values()} == {10}


def test_images_without_series_or_patient_id_are_grouped_by_folder_and_study(
    tmp_path: Path,
) -> None:
    missing: dict[str, Any] = {"SeriesInstanceUID": None, "PatientID": ""}
    write_series(tmp_path / "cohort" / "one", "1.2", "1", **missing)
    write_series(tmp_path / "cohort" / "two", "1.3", "1", **missing)
    found = lines(tmp_path / "cohort")
    assert {name: line["patient_id"] for name, line in found.items()} == {
        "cohort/one": "1.2",
        "cohort/two": "1.3",
    }


def test_a_zip_archive_gives_the_lines_of_its_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "plain" / "a", "1.2", "1")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "plain")
    plain, packed = lines(tmp_path / "plain"), lines(tmp_path / "packed.zip")
    assert plain == packed
    files = index([tmp_path / "packed.zip"], key=None).files["1.2.1"]
    assert files[0] == f"{tmp_path / 'packed.zip'}::a/IM000"
    assert read_volume(files).hu[:, 0, 0].tolist() == list(range(0, 50, 5))
    assert not (tmp_path / "a").exists()


def test_an_encrypted_archive_is_one_line(tmp_path: Path) -> None:
    write_series(tmp_path / "plain", "1.2", "1")
    archive = Path(shutil.make_archive(str(tmp_path / "locked"), "zip", tmp_path / "plain"))
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        offsets = [info.header_offset for info in opened.infolist()]
        entry = opened.start_dir
    for _ in offsets:
        content[entry + 8] |= 1
        lengths = np.frombuffer(bytes(content[entry + 28 : entry + 34]), dtype="<u2")
        entry += 46 + int(lengths.sum())
    archive.write_bytes(content)
    assert reasons(archive) == {"locked": "encrypted"}


def test_junk_never_stops_the_rest(tmp_path: Path) -> None:
    write_series(tmp_path / "good", "1.2", "1")
    half = write_series(tmp_path / "half", "1.3", "1")[3]
    half.write_bytes(half.read_bytes()[:300])
    rng = np.random.default_rng(5)
    (tmp_path / "noise.dcm").write_bytes(rng.bytes(5000))
    (tmp_path / "magic").write_bytes(bytes(128) + b"DICM" + rng.bytes(5000))
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "README").write_bytes(b"Not a scan. " * 40)
    (tmp_path / "notes.txt").write_bytes(b"x")
    report = ct_slice("1.4", "1", 0, SOPClassUID=BasicTextSRStorage, Modality="SR", PixelData=None)
    report.save_as(tmp_path / "report", enforce_file_format=True)
    catalogue = index([tmp_path], key=None)
    found = {line["scan_id"]: line["reason"] for line in catalogue.scans.to_pylist()}
    assert found["1.2.1"] == "ok"
    assert found["1.3.1"] == "missing_slices"
    assert found["1.4.1"] == "not_an_image"
    assert {found[name] for name in ("noise", "magic", "empty.dcm", "empty.nii.gz")} == {
        "unreadable"
    }
    assert catalogue.ignored == {".txt": 1, "no extension": 1}
    files = sum(map(len, catalogue.files.values())) + sum(catalogue.ignored.values())
    assert files == sum(path.is_file() for path in tmp_path.rglob("*"))


def save_nifti(path: Path, slices: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(crc32(bytes(path))).integers(0, 80, (7, 8, slices))
    image = nib.Nifti1Image(voxels.astype(np.int16), np.diag([1.0, 1.0, 5.0, 1.0]))
    nib.save(image, path)
    return path


def test_a_nifti_is_named_by_its_file_and_bids_names_its_patient(tmp_path: Path) -> None:
    save_nifti(tmp_path / "head_07.nii.gz")
    save_nifti(tmp_path / "sub-01" / "ses-2" / "ct" / "sub-01_ses-2_ct.nii")
    save_nifti(tmp_path / "sub-02" / "ct.nii", slices=2)
    found = lines(tmp_path)
    assert {name: line["patient_id"] for name, line in found.items()} == {
        "head_07": "head_07",
        "sub-01_ses-2_ct": "sub-01",
        "ct": "sub-02",
    }
    assert found["head_07"]["coverage_mm"] == 40.0
    assert found["head_07"]["usable"]
    assert found["ct"]["reason"] == "too_few_slices"


def test_a_folder_above_the_indexed_one_names_no_patient(tmp_path: Path) -> None:
    folder = tmp_path / "sub-projects" / "ct"
    for name in ("alice", "bob", "carol"):
        save_nifti(folder / f"{name}.nii")
    patients = {line["patient_id"] for line in lines(folder, folder / "bob.nii").values()}
    assert patients == {"alice", "bob", "carol"}


def test_a_bids_folder_in_an_archive_names_its_patient_as_it_does_outside(tmp_path: Path) -> None:
    for session in ("1", "2"):
        save_nifti(tmp_path / "plain" / "sub-01" / f"ses-{session}.nii")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "plain")
    plain, packed = lines(tmp_path / "plain"), lines(tmp_path / "packed.zip")
    assert plain == packed
    assert {line["patient_id"] for line in packed.values()} == {"sub-01"}


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a" / "ct.nii")
    save_nifti(tmp_path / "b" / "ct.nii")
    save_nifti(tmp_path / "c" / "other.nii")
    assert set(lines(tmp_path)) == {"a/ct", "b/ct", "other"}
    assert set(lines(tmp_path / "a", tmp_path / "b")) == {"a/ct.nii", "b/ct.nii"}
    save_nifti(tmp_path / "b" / "ct.nii.gz")
    assert set(lines(tmp_path / "b")) == {"ct.nii", "ct.nii.gz"}
    save_nifti(tmp_path / "c" / "b" / "ct.nii")
    apart = {f"{tmp_path.name}/b/ct.nii", "c/b/ct.nii"}
    assert set(lines(tmp_path / "b" / "ct.nii", tmp_path / "c" / "b")) == apart


def test_ids_are_pseudonyms_of_the_documented_originals(tmp_path: Path) -> None:
    write_series(tmp_path, "1.2", "1")
    (line,) = lines(tmp_path, key=KEY).values()
    pseudonyms = Pseudonyms(KEY)
    assert line["patient_id"] == pseudonyms.patient("MRN-1.2")
    assert line["study_id"] == pseudonyms.study("1.2")
    assert line["scan_id"] == pseudonyms.scan("1.2.1")


def test_no_byte_of_the_shared_table_names_the_patient(tmp_path: Path) -> None:
    secrets = {
        "PatientName": "Nachname^Vorname",
        "PatientID": "MRN0815",
        "PatientBirthDate": "19480229",
        "AccessionNumber": "ACC4711",
        "StudyDate": "20190630",
        "AcquisitionDate": "20190701",
        "InstitutionName": "Spital am Berg",
        "StudyDescription": "Verlaufskontrolle Nachname",
        "SeriesDescription": "Nachname CTA",
        "Manufacturer": "Nachname Vorname",
        "ConvolutionKernel": "Nachname, Vorname",
        "ImageComments": "Vorname",
        "StudyInstanceUID": "1.2.276.0.815",
        "SeriesInstanceUID": "1.2.276.0.4711",
    }
    folder = tmp_path / "Nachname^Vorname"
    write_series(folder / "a", "1", "1", SOPInstanceUID="1.2.276.0.99", **secrets)
    broken = write_series(folder / "b", "1", "2", RescaleSlope="0", **secrets)
    broken[0].write_bytes(b"Nachname")
    broken[1].rename(folder / "Nachname.dcm")
    (folder / "Nachname.dcm").write_bytes(b"MRN0815")
    save_nifti(folder / "sub-MRN0815" / "Nachname.nii")
    path = tmp_path / "scans.parquet"
    index([folder], key=KEY).write(path)
    told = [*secrets.values(), "1.2.276.0.99", "Nachname", "Vorname", str(tmp_path), "IM00"]
    content = path.read_bytes()
    assert [value for value in told if value.encode() in content] == []
    assert KEY not in content
    assert stat.S_IMODE(private_path(path).stat().st_mode) == 0o600
    table = read_catalogue(path, private=False).scans
    assert not any(value in str(table.to_pydict()) for value in told)


def test_indexing_again_keeps_the_ids(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "1.2", "1")
    path = tmp_path / "scans.parquet"
    index([tmp_path / "a"], key=key_for(path)).write(path)
    first = read_catalogue(path)
    write_series(tmp_path / "b", "1.3", "1")
    index([tmp_path / "a", tmp_path / "b"], key=key_for(path)).write(path)
    second = read_catalogue(path)
    assert len(second.scans) == 2
    assert set(first.files) < set(second.files)


def test_studies_whose_patient_nothing_tells_are_counted(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "1.1", "1")
    write_series(tmp_path / "b", "1.2", "1", PatientID="")
    write_series(tmp_path / "c", "1.2", "2", PatientID="")
    save_nifti(tmp_path / "head.nii")
    save_nifti(tmp_path / "sub-7" / "ct.nii")
    assert index([tmp_path], key=KEY).studies_without_patient == 2


@pytest.mark.parametrize("key", [KEY, None])
def test_a_file_keeps_its_ids_when_others_of_its_name_join_it(
    tmp_path: Path, key: bytes | None
) -> None:
    path = tmp_path / "scans.parquet"
    for site in ("a", "b", "c"):
        save_nifti(tmp_path / "data" / site / "head.nii")
        index([tmp_path / "data"], key=key, before=read_former(path)).write(path)
        found = read_catalogue(path)
        if site == "a":
            first = found
    assert len(found.scans) == len({line["patient_id"] for line in found.scans.to_pylist()}) == 3
    assert first.files.items() < found.files.items()
    new = [scan_id for scan_id in found.files if scan_id not in first.files]
    together = index([tmp_path / "data"], key=key)
    assert set(new) < set(together.files)  # what they are called where all come at once
    again = index([tmp_path / "data"], key=key, before=read_former(path))
    assert again.files == found.files


def test_files_keep_their_ids_where_their_folder_has_moved_or_another_one_is_indexed(
    tmp_path: Path,
) -> None:
    for n, site in enumerate(("a", "b")):
        save_nifti(tmp_path / "data" / site / "head.nii", slices=9 + n)
    first = index([tmp_path / "data"], key=KEY)
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").rename(tmp_path / "disk" / "data")
    second = index([tmp_path / "disk"], key=KEY, before=first)
    assert set(second.files) == set(first.files)
    assert second.scans["patient_id"].to_pylist() == first.scans["patient_id"].to_pylist()
    third = index([tmp_path / "disk" / "data" / "a"], key=KEY, before=second)
    assert set(third.files) < set(first.files)


def test_the_only_file_of_its_name_does_not_get_the_ids_of_one_that_is_gone(tmp_path: Path) -> None:
    save_nifti(tmp_path / "d" / "p1" / "ct.nii", slices=9)
    first = index([tmp_path / "d"], key=KEY)
    (tmp_path / "d" / "p1" / "ct.nii").unlink()
    save_nifti(tmp_path / "d" / "p2" / "ct.nii", slices=10)
    second = index([tmp_path / "d"], key=KEY, before=first)
    assert second.files.keys().isdisjoint(first.files)


def test_a_file_whose_folder_names_another_patient_by_now_is_a_new_scan(tmp_path: Path) -> None:
    save_nifti(tmp_path / "d" / "sub-01" / "ct_a.nii")
    first = index([tmp_path / "d"], key=KEY)
    (tmp_path / "d" / "sub-01").rename(tmp_path / "d" / "sub-05")
    second = index([tmp_path / "d"], key=KEY, before=first)
    assert second.files.keys().isdisjoint(first.files)


def test_names_that_differ_in_white_space_alone_are_told_apart(tmp_path: Path) -> None:
    save_nifti(tmp_path / "d" / "ct.nii")
    save_nifti(tmp_path / "d" / "ct .nii", slices=10)
    found = index([tmp_path / "d"], key=KEY)
    assert len(found.files) == found.scans.num_rows == 2


def test_a_member_at_the_top_of_an_archive_keeps_its_ids(tmp_path: Path) -> None:
    save_nifti(tmp_path / "ct.nii")
    (tmp_path / "d").mkdir()
    with zipfile.ZipFile(tmp_path / "d" / "z.zip", "w") as archive:
        archive.write(tmp_path / "ct.nii", "ct.nii")
    first = index([tmp_path / "d"], key=KEY)
    save_nifti(tmp_path / "d" / "ct.nii", slices=10)
    second = index([tmp_path / "d"], key=KEY, before=first)
    assert len(second.files) == 2
    assert first.files.items() < second.files.items()


def test_a_broken_archive_that_is_named_twice_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(b"PK no archive")
    assert index([tmp_path, tmp_path / "bad.zip"], key=KEY).scans.num_rows == 1


def test_copies_of_a_file_that_has_moved_do_not_share_its_ids(tmp_path: Path) -> None:
    save_nifti(tmp_path / "d" / "ct.nii")
    first = index([tmp_path / "d"], key=None)
    for site in ("a", "b"):
        (tmp_path / "d" / site).mkdir()
        shutil.copy(tmp_path / "d" / "ct.nii", tmp_path / "d" / site / "ct.nii")
    (tmp_path / "d" / "ct.nii").unlink()
    second = index([tmp_path / "d"], key=None, before=first)
    assert set(second.files) == {"a/ct", "b/ct"}
    assert index([tmp_path / "d"], key=None, before=second).files == second.files


def test_a_new_file_does_not_get_the_ids_of_another_that_is_gone(tmp_path: Path) -> None:
    save_nifti(tmp_path / "d" / "b" / "ct.nii", slices=9)
    first = index([tmp_path / "d"], key=None)
    save_nifti(tmp_path / "d" / "a" / "ct.nii", slices=10)
    second = index([tmp_path / "d"], key=None, before=first)
    assert set(second.files) == {"ct", "a/ct"}
    (tmp_path / "d" / "b" / "ct.nii").unlink()
    save_nifti(tmp_path / "d" / "c" / "ct.nii", slices=11)
    third = index([tmp_path / "d"], key=None, before=second)
    assert set(third.files) == {"a/ct", "c/ct"}


def test_files_under_two_folders_of_one_name_have_ids_that_stay(tmp_path: Path) -> None:
    folders = [tmp_path / site / "data" for site in ("A", "B")]
    for n, folder in enumerate(folders):
        save_nifti(folder / "p1" / "ct.nii", slices=9 + n)
    first = index(folders, key=None)
    assert set(first.files) == {"A/data/p1/ct.nii", "B/data/p1/ct.nii"}
    assert index(folders, key=None, before=first).files == first.files


def test_a_file_keeps_its_patient_where_other_folders_are_seen_above_it(tmp_path: Path) -> None:
    save_nifti(tmp_path / "b" / "sub-01" / "ct.nii")
    narrow = index([tmp_path / "b" / "sub-01"], key=KEY)
    wide = index([tmp_path / "b"], key=KEY, before=narrow)
    assert wide.scans.equals(narrow.scans)
    again = index([tmp_path / "b" / "sub-01"], key=KEY, before=index([tmp_path / "b"], key=KEY))
    assert again.scans.equals(index([tmp_path / "b"], key=KEY).scans)


def test_a_copy_of_a_file_that_is_still_there_does_not_take_its_ids(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a" / "head.nii")
    first = index([tmp_path], key=KEY)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = index([tmp_path], key=KEY, before=first)
    assert len(second.files) == 2
    assert first.files.items() < second.files.items()


def test_ids_of_another_key_name_no_file(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a" / "head.nii")
    first = index([tmp_path / "a"], key=None)
    assert index([tmp_path / "a"], key=KEY, before=first).files.keys() == set(
        index([tmp_path / "a"], key=KEY).files
    )


def same(one: Catalogue, other: Catalogue) -> bool:
    return one.scans.equals(other.scans) and list(one.files.items()) == list(other.files.items())


def test_the_result_does_not_depend_on_workers_or_the_order_of_paths(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(8)]
    for i, folder in enumerate(folders):
        write_series(folder, f"1.{i % 3}", str(i), z_mm=range(0, 50, 5))
    (tmp_path / "junk.dcm").write_bytes(b"junk")
    paths = [*folders, tmp_path / "junk.dcm"]
    one = index(paths, key=KEY)
    random.Random(1).shuffle(paths)
    done: list[tuple[int, int]] = []
    two = index(paths, key=KEY, workers=2, progress=lambda *at: done.append(at))
    assert same(one, two)
    assert done == [(64, 81), (81, 81)]


@needs_data
def test_the_real_tilted_series_is_described_as_it_is() -> None:
    (line,) = lines(DATA / "dcm_qa_ct" / "GE").values()
    assert line["usable"]
    assert line["n_slices"] == 28
    assert line["tilt_deg"] == pytest.approx(18.5, abs=0.01)
    assert line["spacing_z_min_mm"] == pytest.approx(1.08, abs=0.01)
    assert line["spacing_z_max_mm"] == pytest.approx(7.0, abs=0.01)
    assert (line["vendor"], line["kernel"]) == ("GE", "STD+")


def test_a_file_that_kills_the_process_that_reads_it_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cohort(tmp_path / "cohort", scans=2, seed=0, matrix=64, slices=9, extras=0.0)
    (tmp_path / "cohort" / "killer.dcm").write_bytes(bytes(200))
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(
        "import builtins, os\n"
        "real = builtins.open\n"
        "def deadly(file, *rest, **more):\n"
        "    if 'killer' in str(file):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return real(file, *rest, **more)\n"
        "builtins.open = deadly\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{planted}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("ctfm.extract.headers.FILES_AT_ONCE", 5)
    lines = index([tmp_path / "cohort"], key=None, workers=2).scans.to_pylist()
    reasons = sorted(line["reason"] for line in lines)
    assert reasons == ["ok", "ok", "reader_crashed"]
