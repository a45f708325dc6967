"""Files that converters and BIDS tools write: whose they are, and which of them is used."""

import gzip
import json
import os
import random
import shutil
import zipfile
from itertools import permutations
from pathlib import Path
from typing import Any
from zlib import crc32

import nibabel as nib
import numpy as np
import pytest

from ctfm.extract.file_groups import GroupedFile, studies_and_patients
from ctfm.extract.headers import look_at_all
from ctfm.extract.index import index
from ctfm.extract.sidecars import parse_sidecar
from ctfm.extract.sources import Source, find
from ctfm.store.catalogue import Catalogue

KEY = bytes(range(32))

# As dcm2niix 1.0.20260724 writes for a series of Siemens, without `-ba n`.
SAID: dict[str, Any] = {
    "Modality": "CT",
    "Manufacturer": "Siemens",
    "ManufacturersModelName": "Sensation",
    "StationName": "CT1",
    "SeriesDescription": "HEAD 4.0 H31s",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT", "SOM5 SPI"],
    "SeriesNumber": 2,
    "AcquisitionTime": "10:10:11.000000",
    "AcquisitionNumber": 1,
    "ConvolutionKernel": "H31s",
    "SliceThickness": 4,
    "ConversionSoftware": "dcm2niix",
    "ConversionSoftwareVersion": "v1.0.20260724",
}


def save(path: Path, *, slices: int = 9, like: Path | None = None, **said: Any) -> Path:
    """A volume with values of its own, or those of another file; with a sidecar if it says any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = crc32(bytes(like or path))
    voxels = np.random.default_rng(seed).integers(0, 80, (7, 8, slices)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 5.0, 1.0])), path)
    if said:
        stem = path.name.removesuffix(".gz").removesuffix(".nii")
        (path.parent / f"{stem}.json").write_text(json.dumps(said))
    return path


def lines(*paths: Path, key: bytes | None = None) -> dict[str, dict[str, Any]]:
    return {line["scan_id"]: line for line in index(list(paths), key=key).scans.to_pylist()}


def reasons(*paths: Path) -> dict[str, str]:
    return {name: line["reason"] for name, line in lines(*paths).items()}


def column(catalogue: Catalogue, name: str) -> set[str]:
    return set(catalogue.scans[name].to_pylist())


COPIES = {
    ("", "_Tilt_1"): "_Tilt_1",
    ("", "_Eq_1"): "_Eq_1",
    ("", "_Tilt_Eq_1"): "_Tilt_Eq_1",
    ("", "_Tilt_1", "_Tilt_Eq_1"): "_Tilt_Eq_1",
    ("", "_Tilt_1", "_Eq_1", "_Tilt_Eq_1", "_ROI1"): "_Tilt_Eq_1",
    ("_Tilt_1", "_Tilt_Eq_1"): "_Tilt_Eq_1",
    ("", "_ROI1", "_ROI2"): "",
    ("", "_Crop_1"): "",
    ("", "_Tilt_1", "_Tilt_Crop_1"): "_Tilt_1",
    ("", "_Tilt"): "_Tilt",
    ("", "_Tilt_1", "_Eq_1"): None,  # neither has both tilt and distances right
}


@pytest.mark.parametrize("endings", COPIES)
@pytest.mark.parametrize("packing", [".nii", ".nii.gz"])
def test_of_the_files_of_one_series_the_corrected_one_is_used(
    tmp_path: Path, endings: tuple[str, ...], packing: str
) -> None:
    for ending in endings:
        save(tmp_path / f"x{ending}{packing}", slices=9 + len(ending))
    found = lines(tmp_path)
    used = [name for name, line in found.items() if line["usable"]]
    assert used == ([] if COPIES[endings] is None else [f"x{COPIES[endings]}"])
    named = "x" if "" in endings else "x_Tilt_1"
    assert {line["patient_id"] for line in found.values()} == {named}
    assert {line["study_id"] for line in found.values()} == {named}


def test_the_plain_file_says_which_one_is_used_instead(tmp_path: Path) -> None:
    save(tmp_path / "x.nii")
    save(tmp_path / "x_Eq_1.nii")
    plain = lines(tmp_path)["x"]
    assert plain["reason"] == "bad_geometry"
    assert "corrected" in plain["detail"]
    assert "_Eq" in plain["detail"]


def test_a_plain_file_whose_corrected_one_cannot_be_read_is_not_used(tmp_path: Path) -> None:
    save(tmp_path / "x.nii")
    (tmp_path / "x_Eq_1.nii").write_bytes(b"damaged")
    assert reasons(tmp_path) == {"x": "bad_geometry", "x_Eq_1": "unreadable"}


@pytest.mark.parametrize("name", ["x_Eq_1", "x_Tilt_1", "x_ROI1", "x_Crop_1", "tilt", "EQ_1"])
def test_a_name_like_a_copy_of_nothing_is_a_scan_of_its_own(tmp_path: Path, name: str) -> None:
    save(tmp_path / f"{name}.nii")
    (line,) = lines(tmp_path).values()
    assert line["usable"]
    assert line["patient_id"] == line["study_id"] == name


def test_a_corrected_file_in_another_folder_is_not_that_of_a_series(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.nii")
    save(tmp_path / "b" / "x_Eq_1.nii")
    assert set(reasons(tmp_path).values()) == {"ok"}
    assert len(column(index([tmp_path], key=KEY), "patient_id")) == 2


def test_files_of_a_series_in_an_archive_are_those_of_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "plain" / "x.nii.gz", **SAID)
    save(tmp_path / "plain" / "x_Tilt_1.nii.gz")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "plain")
    assert lines(tmp_path / "packed.zip") == lines(tmp_path / "plain")
    assert lines(tmp_path / "plain")["x_Tilt_1"]["kernel"] == "H31s"


def test_a_sidecar_fills_the_columns_of_a_dicom_header(tmp_path: Path) -> None:
    save(tmp_path / "x.nii.gz", **SAID, KVP=120)
    (line,) = lines(tmp_path).values()
    assert (line["vendor"], line["kernel"]) == ("Siemens", "H31s")
    assert (line["kvp"], line["thickness_mm"]) == (120.0, 4.0)


KINDS: dict[str, dict[str, Any]] = {
    "ok": {},
    "not_ct": {"Modality": "MR"},
    "contrast": {"SeriesDescription": "CTA HEAD"},
    "contrast ": {"ContrastBolusAgent": "OMNIPAQUE 350"},
    "derived": {"ImageType": ["DERIVED", "SECONDARY", "MIP"]},
    "derived ": {"SeriesDescription": "MIP sag"},
    "localizer": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
    "localizer ": {"ImageType": "ORIGINAL\\PRIMARY\\LOCALIZER"},
    "contrast of a list": {"SeriesDescription": ["CTA"]},
    "contrast of an agent in a list": {"ContrastBolusAgent": ["", "Ultravist"]},
    "contrast of a volume": {"ContrastBolusVolume": 80, "ContrastBolusRoute": "IV"},
    "contrast of a volume that is a text": {"ContrastBolusVolume": "80"},
    "contrast of a route": {"ContrastBolusRoute": "IV"},
    "contrast of BIDS": {"ContrastBolusIngredient": "IODINE"},
    "ok for a swallowed agent": {"ContrastBolusRoute": "ORAL", "ContrastBolusVolume": 800},
    "ok for none": {"ContrastBolusAgent": "NONE", "ContrastBolusVolume": 0},
    "derived technique": {"VolumeBasedCalculationTechnique": "MAX_IP"},
    "derived techniques": {"VolumeBasedCalculationTechnique": ["NONE", "MIN_IP"]},
    "ok for a reformat": {"VolumeBasedCalculationTechnique": "MPR"},
    "ok for a text of parts": {"ImageType": "ORIGINAL\\PRIMARY\\AXIAL"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sidecar_tells_the_kind_as_a_dicom_header_does(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "x.nii", **(SAID | KINDS[kind]))
    assert reasons(tmp_path) == {"x": kind.split()[0]}


def test_the_first_of_several_kernels_counts_as_in_dicom(tmp_path: Path) -> None:
    save(tmp_path / "x.nii", **(SAID | {"ConvolutionKernel": "Br40f\\3"}))
    save(tmp_path / "y.nii", **(SAID | {"ConvolutionKernel": ["Br40f", "3"]}))
    assert {line["kernel"] for line in lines(tmp_path).values()} == {"Br40f"}


@pytest.mark.parametrize("number", [0, -4, 0.0, "0", "-120"])
def test_a_length_or_voltage_that_is_not_positive_is_not_said(
    tmp_path: Path, number: object
) -> None:
    save(tmp_path / "x.nii", **(SAID | {"KVP": number, "SliceThickness": number}))
    (line,) = lines(tmp_path).values()
    assert (line["kvp"], line["thickness_mm"]) == (None, None)


def test_a_sidecar_of_ids_gives_those_of_the_dicom_headers(tmp_path: Path) -> None:
    ids: dict[str, Any] = {"PatientID": "MRN-1", "StudyInstanceUID": "1.2"}
    save(tmp_path / "a" / "one.nii", **SAID, **ids, SeriesInstanceUID="1.2.1")
    sharp = SAID | ids | {"ConvolutionKernel": "H60s", "SeriesInstanceUID": "1.2.2"}
    save(tmp_path / "b" / "two.nii", **sharp)
    save(tmp_path / "c" / "three.nii", **(SAID | ids | {"StudyInstanceUID": "1.3"}))
    found = lines(tmp_path)
    assert {line["patient_id"] for line in found.values()} == {"MRN-1"}
    assert {name: line["study_id"] for name, line in found.items()} == {
        "one": "1.2",
        "two": "1.2",
        "three": "1.3",
    }
    assert found["two"]["reason"] == "other_series_chosen"
    assert found["two"]["detail"].startswith("the chosen series is of soft-tissue kernel")


def test_a_file_made_from_a_series_that_is_here_too_is_a_copy_of_it(
    tmp_path: Path, scanner: Any
) -> None:
    ids: dict[str, Any] = {"PatientID": "MRN-1", "StudyInstanceUID": "1.2"}
    planes = scanner.axial(np.arange(0, 45, 5.0), **ids, SeriesInstanceUID="1.2.1")
    scanner.save(planes, tmp_path / "dicom", name="{}.dcm")
    save(tmp_path / "nifti" / "copy.nii", **SAID, **ids, SeriesInstanceUID="1.2.1")
    save(tmp_path / "nifti" / "sharp.nii", **SAID, **ids, SeriesInstanceUID="1.2.2", slices=6)
    found = lines(tmp_path)
    assert {line["patient_id"] for line in found.values()} == {"MRN-1"}
    assert {line["study_id"] for line in found.values()} == {"1.2"}
    assert found["copy"]["reason"] == "duplicate_scan"
    assert [found[name]["usable"] for name in ("1.2.1", "sharp")].count(True) == 1


def write_dicom(folder: Path, scanner: Any, heights: Any, **ids: str) -> None:
    scanner.save(scanner.axial(heights, **ids), folder, name="{}.dcm")


EVEN = np.arange(0, 45, 5.0)
UNUSABLE = {
    "missing_slices": np.delete(EVEN, 4),
    "conflicting_ids": EVEN,
    "bad_geometry": EVEN,
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_file_is_used_where_its_dicom_series_is_not_whole(
    tmp_path: Path, scanner: Any, reason: str
) -> None:
    ids: dict[str, Any] = {
        "PatientID": "MRN-1",
        "StudyInstanceUID": "1.2",
        "SeriesInstanceUID": "1.2.1",
    }
    planes = scanner.axial(UNUSABLE[reason], **ids)
    for plane in planes[5:]:
        if reason == "conflicting_ids":
            plane.PatientID = "MRN-2"
        if reason == "bad_geometry":
            del plane.ImagePositionPatient
    scanner.save(planes, tmp_path / "dicom", name="{}.dcm")
    save(tmp_path / "nifti" / "x.nii", slices=9, **SAID, **ids)
    found = lines(tmp_path)
    assert found["1.2.1"]["reason"] == reason
    assert found["x"]["reason"] == "ok"


@pytest.mark.parametrize("name", ["x", "x_Eq_1"])
def test_a_file_that_was_made_of_a_series_without_all_slices_lacks_them_too(
    tmp_path: Path, scanner: Any, name: str
) -> None:
    """Whatever its header says: dcm2niix puts all slices at the first distance."""
    ids: dict[str, Any] = {
        "PatientID": "MRN-1",
        "StudyInstanceUID": "1.2",
        "SeriesInstanceUID": "1.2.1",
    }
    write_dicom(tmp_path / "dicom", scanner, UNUSABLE["missing_slices"], **ids)
    save(tmp_path / f"{name}.nii", slices=8 if name == "x" else 9, **SAID, **ids)
    assert reasons(tmp_path) == {"1.2.1": "missing_slices", name: "missing_slices"}


def test_a_file_of_a_contrast_series_is_a_copy_of_it(tmp_path: Path, scanner: Any) -> None:
    ids: dict[str, Any] = {
        "PatientID": "MRN-1",
        "StudyInstanceUID": "1.2",
        "SeriesInstanceUID": "1.2.1",
    }
    write_dicom(tmp_path / "dicom", scanner, EVEN, **ids, ContrastBolusAgent="Ultravist")
    save(tmp_path / "x.nii", **SAID, **ids)
    assert reasons(tmp_path) == {"1.2.1": "contrast", "x": "duplicate_scan"}


PLACEHOLDERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "a study of three subjects": [(f"sub-0{n}_ct", {}) for n in (1, 2, 3)],
    "a study of two patients": [(name, {"PatientID": f"P-{name}"}) for name in "ab"],
    "a study of a subject and a patient": [("sub-01_ct", {}), ("x", {"PatientID": "P"})],
    "a study and a patient of three subjects": [
        (f"sub-0{n}_ct", {"PatientID": "anonymous"}) for n in (1, 2, 3)
    ],
}


@pytest.mark.parametrize("kind", PLACEHOLDERS)
def test_ids_that_more_have_than_can_name_nothing(tmp_path: Path, kind: str) -> None:
    for name, ids in PLACEHOLDERS[kind]:
        save(tmp_path / f"{name}.nii", **SAID, **ids, StudyInstanceUID="1.2.3")
    found = lines(tmp_path).values()
    assert {line["reason"] for line in found} == {"ok"}
    for name in ("patient_id", "study_id"):
        assert len({line[name] for line in found}) == len(PLACEHOLDERS[kind])


def test_one_patient_whose_id_is_spelled_in_two_ways_has_one_study(tmp_path: Path) -> None:
    for name, spelled in (("a", "0012"), ("b", "12")):
        save(tmp_path / f"{name}.nii", **SAID, PatientID=spelled, StudyInstanceUID="1.2.3")
    found = lines(tmp_path)
    assert {line["patient_id"] for line in found.values()} == {"0012"}
    assert {line["reason"] for line in found.values()} == {"ok", "other_series_chosen"}


SAME_PATIENT: dict[str, dict[str, Any]] = {
    "by both ids": {"PatientID": "777", "StudyInstanceUID": "1.2.3"},
    "by the study": {"StudyInstanceUID": "1.2.3"},
    "by the patient": {"PatientID": "777"},
    "spelled otherwise": {"PatientID": "0777", "StudyInstanceUID": "1.2.3"},
}


@pytest.mark.parametrize("told", SAME_PATIENT)
def test_a_subject_of_bids_is_the_patient_that_it_is_in_dicom(
    tmp_path: Path, scanner: Any, told: str
) -> None:
    ids = {"PatientID": "777", "StudyInstanceUID": "1.2.3"}
    write_dicom(tmp_path / "dicom", scanner, EVEN, **ids, SeriesInstanceUID="1.2.3.4")
    save(tmp_path / "sub-01" / "sub-01_ct.nii", **SAID, **SAME_PATIENT[told])
    save(tmp_path / "sub-01" / "sub-01_ses-2_ct.nii")
    save(tmp_path / "sub-02" / "sub-02_ct.nii")
    found = lines(tmp_path)
    assert {name: line["patient_id"] for name, line in found.items()} == {
        "1.2.3.4": "777",
        "sub-01_ct": "777",
        "sub-01_ses-2_ct": "777",
        "sub-02_ct": "sub-02",
    }
    studies = {found[name]["study_id"] for name in ("1.2.3.4", "sub-01_ct")}
    assert len(studies) == (1 if "StudyInstanceUID" in SAME_PATIENT[told] else 2)


def test_a_study_of_another_patient_in_dicom_is_a_placeholder(tmp_path: Path, scanner: Any) -> None:
    ids = {"PatientID": "777", "StudyInstanceUID": "1.2.3"}
    write_dicom(tmp_path / "dicom", scanner, EVEN, **ids, SeriesInstanceUID="1.2.3.4")
    save(tmp_path / "x.nii", **SAID, PatientID="888", StudyInstanceUID="1.2.3")
    found = lines(tmp_path)
    assert found["x"]["patient_id"] == "888"
    assert found["x"]["study_id"] == "x"


@pytest.mark.parametrize("key", [KEY, None])
def test_a_file_keeps_its_ids_where_what_named_them_names_nothing_any_more(
    tmp_path: Path, key: bytes | None
) -> None:
    save(tmp_path / "sub-01_ct.nii", **SAID, StudyInstanceUID="1.2.3")
    first = index([tmp_path], key=key)
    save(tmp_path / "sub-02_ct.nii", **SAID, StudyInstanceUID="1.2.3")
    second = index([tmp_path], key=key, before=first)
    (old,) = first.scans.to_pylist()
    assert old in second.scans.to_pylist()
    assert len(column(second, "patient_id")) == len(column(second, "study_id")) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"\xff\xfe{",
        b'{"a": ' * 100_000,
        b'{"SeriesDescription": "' + b"x" * (1 << 20) + b'"}',
    ],
)
def test_a_sidecar_that_cannot_be_read_is_said_to_be_so(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "x.nii")
    (tmp_path / "x.json").write_bytes(content)
    (line,) = lines(tmp_path).values()
    assert line["usable"]
    assert line["detail"] == "the JSON file beside it cannot be read"


HALF = "\ud800abc"
"""Half of a surrogate pair, which JSON can write and UTF-8 cannot."""


@pytest.mark.parametrize("key", [KEY, None])
def test_a_text_that_is_no_unicode_stops_no_index_and_is_not_said(
    tmp_path: Path, key: bytes | None
) -> None:
    said: dict[str, Any] = dict.fromkeys(
        [*SAID, "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "ContrastBolusAgent"], HALF
    )
    save(tmp_path / "x.nii", **(said | {"ImageType": [HALF, "AXIAL"]}))
    save(tmp_path / "y.nii", PatientID="P")
    found = index([tmp_path], key=key)
    assert column(found, "reason") == {"ok"}
    if key is None:
        assert column(found, "patient_id") == {"x", "P"}


def test_values_of_another_type_count_as_not_said(tmp_path: Path) -> None:
    odd: dict[str, Any] = {key: {"a": [1]} for key in SAID} | {
        "KVP": "120 kV",
        "SliceThickness": 1e400,
    }
    save(tmp_path / "x.nii", **odd, PatientID=7, StudyInstanceUID=None)
    (line,) = lines(tmp_path).values()
    assert line["usable"]
    assert (line["patient_id"], line["kvp"], line["thickness_mm"]) == ("x", None, None)


def test_a_pipe_beside_a_file_is_not_opened(tmp_path: Path) -> None:
    save(tmp_path / "x.nii")
    os.mkfifo(tmp_path / "x.json")
    assert reasons(tmp_path) == {"x": "ok"}


def test_nothing_that_a_sidecar_says_of_the_patient_is_shared(tmp_path: Path) -> None:
    secret = "NACHNAME"
    said: dict[str, Any] = dict.fromkeys(
        [*SAID, "PatientID", "StudyInstanceUID", "SeriesInstanceUID"], secret
    )
    save(tmp_path / "x.nii", **(said | {"Modality": "CT", "ImageType": [secret]}))
    catalogue = index([tmp_path], key=KEY)
    assert secret not in str(catalogue.scans.to_pylist())
    assert catalogue.ignored == {".json": 1}


def kernels(folder: Path, one: str, other: str, **differs: Any) -> dict[str, dict[str, Any]]:
    """Of two series whose numbers stand in their names, as dcm2niix writes them."""
    numbers = [int("".join(filter(str.isdigit, name)) or 2) for name in (one, other)]
    sharp = SAID | {"ConvolutionKernel": "H60s", "SeriesNumber": numbers[0]}
    save(folder / f"{one}.nii.gz", **sharp)
    save(folder / f"{other}.nii.gz", **(SAID | {"SeriesNumber": numbers[1]} | differs))
    return lines(folder)


@pytest.mark.parametrize("names", [("x", "xa"), ("x", "xz"), ("x_2", "x_3"), ("x_2", "x_2a")])
def test_two_kernels_of_one_acquisition_are_one_study(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    found = kernels(tmp_path, *names)
    assert {line["study_id"] for line in found.values()} == {names[0]}
    assert {line["patient_id"] for line in found.values()} == {names[0]}
    assert found[names[0]]["reason"] == "other_series_chosen"
    assert found[names[1]]["usable"]


def test_corrected_files_whose_plain_ones_are_gone_are_one_study(tmp_path: Path) -> None:
    kernels(tmp_path, "x", "xa")
    for name in ("x", "xa"):
        (tmp_path / f"{name}.nii.gz").rename(tmp_path / f"{name}_Tilt_1.nii.gz")
    found = lines(tmp_path)
    assert found["xa_Tilt_1"]["usable"]
    assert found["x_Tilt_1"]["reason"] == "other_series_chosen"


@pytest.mark.parametrize(
    "differs",
    [
        {"AcquisitionTime": "10:10:12.000000"},
        {"StationName": "CT2"},
        {"AcquisitionTime": ""},
    ],
)
def test_without_one_acquisition_a_letter_tells_a_patient_and_no_study(
    tmp_path: Path, differs: dict[str, Any]
) -> None:
    found = kernels(tmp_path, "x", "xa", **differs)
    assert all(line["usable"] for line in found.values())
    assert {line["patient_id"] for line in found.values()} == {"x"}
    assert len({line["study_id"] for line in found.values()}) == 2


def test_a_time_of_a_whole_minute_may_be_made_up(tmp_path: Path) -> None:
    noon = {"AcquisitionTime": "12:00:00.000000"}
    save(tmp_path / "p_1.nii", **(SAID | noon))
    save(tmp_path / "p_2.nii", **(SAID | noon))
    found = lines(tmp_path)
    assert all(line["usable"] for line in found.values())
    assert len({line["patient_id"] for line in found.values()}) == 2


def cohort(count: int, *, dates: bool) -> list[GroupedFile]:
    """Patients of one scanner, each under a number, scanned on some day at some second."""
    rng, files = random.Random(count), []
    for number in range(1, count + 1):
        time = f"{rng.randrange(8, 18):02}:{rng.randrange(60):02}:{rng.randrange(1, 60):02}"
        date = f"20{rng.randrange(10, 25)}-{rng.randrange(1, 13):02}-{rng.randrange(2, 28):02}"
        when = {"AcquisitionDateTime": f"{date}T{time}"} if dates else {"AcquisitionTime": time}
        said = parse_sidecar({key: SAID[key] for key in SAID if key != "AcquisitionTime"} | when)
        source = Source(f"/data/CT_{number:05}.nii.gz", "/data")
        files.append(GroupedFile(source=source, sidecar=said, digest=str(number)))
    return files


@pytest.mark.parametrize("dates", [True, False])
def test_strangers_of_a_cohort_who_were_scanned_at_one_second_stay_apart(dates: bool) -> None:
    files = cohort(1000, dates=dates)
    assert all(file.sidecar.acquired for file in files)
    studies, patients = studies_and_patients(files)
    assert len(set(studies)) == len(set(patients)) == 1000


@pytest.mark.parametrize("day", ["2020-03-04", "2020-01-01"])
def test_a_time_with_its_date_joins_numbers_unless_the_date_is_made_up(
    tmp_path: Path, day: str
) -> None:
    when = {"AcquisitionDateTime": f"{day}T10:10:11.000000"}
    for name in ("x_2", "x_3"):
        save(tmp_path / f"{name}.nii", **(SAID | when | {"SeriesNumber": 7}))
    studies = {line["study_id"] for line in lines(tmp_path).values()}
    assert len(studies) == (2 if day.endswith("-01-01") else 1)


def test_patients_with_numbers_or_told_apart_are_not_joined(tmp_path: Path) -> None:
    for name in ("case_1", "case_2", "x_Head_20200101120000_2", "x_Head_20200101120000_3"):
        save(tmp_path / "numbers" / f"{name}.nii")
    save(tmp_path / "ids" / "Head.nii", **SAID, PatientID="A", StudyInstanceUID="1")
    save(tmp_path / "ids" / "Heada.nii", **SAID, PatientID="B", StudyInstanceUID="2")
    for folder, count in (("numbers", 4), ("ids", 2)):
        found = index([tmp_path / folder], key=None)
        assert len(column(found, "patient_id")) == len(column(found, "study_id")) == count
        assert column(found, "reason") == {"ok"}


def test_names_with_the_time_of_a_study_need_no_sidecar(tmp_path: Path) -> None:
    """The default of dcm2niix: folder, protocol, time, series."""
    for number, slices in (("2", 9), ("3", 19), ("3a", 29)):
        save(tmp_path / f"f_Head_20200101101011_{number}.nii", slices=slices)
    save(tmp_path / "f_Head_20200101101012_2.nii")
    found = lines(tmp_path)
    assert [line["usable"] for line in found.values()].count(True) == 2
    assert len({line["study_id"] for line in found.values()}) == 2


def test_which_file_is_used_depends_on_no_order(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / str(number) / "x.nii", like=tmp_path / "same.nii", **SAID)
        save(tmp_path / str(number) / "xa.nii", **SAID)
    folders = [tmp_path / str(number) for number in range(3)]
    first = index(folders, key=KEY)
    for order in permutations(folders):
        assert index(list(order), key=KEY).scans.equals(first.scans)


def test_equal_files_under_two_names_are_one_scan_of_one_patient(tmp_path: Path) -> None:
    one = save(tmp_path / "a.nii.gz")
    shutil.copy(one, tmp_path / "b.nii.gz")
    (tmp_path / "deep").mkdir()
    shutil.copy(one, tmp_path / "deep" / "c.nii.gz")
    save(tmp_path / "d.nii.gz")
    found = lines(tmp_path)
    assert {name: line["reason"] for name, line in found.items()} == {
        "a": "ok",
        "b": "duplicate_scan",
        "c": "duplicate_scan",
        "d": "ok",
    }
    assert {found[name]["patient_id"] for name in "abc"} == {"a"}
    assert found["d"]["patient_id"] == "d"


def test_an_image_that_was_packed_again_is_the_same(tmp_path: Path) -> None:
    one = save(tmp_path / "a.nii", slices=30)
    for level in (1, 9):
        (tmp_path / f"b{level}.nii.gz").write_bytes(gzip.compress(one.read_bytes(), level))
    one.rename(tmp_path / "b1.nii")
    found = lines(tmp_path)
    assert sorted(line["reason"] for line in found.values()) == [
        "duplicate_scan",
        "duplicate_scan",
        "ok",
    ]
    assert len({line["patient_id"] for line in found.values()}) == 1


def test_two_images_of_one_name_packed_and_not_are_two_images(tmp_path: Path) -> None:
    save(tmp_path / "x.nii", slices=30)
    save(tmp_path / "x.nii.gz", slices=30)
    shutil.copy(tmp_path / "x.nii", tmp_path / "y.nii")
    found = reasons(tmp_path)
    assert found == {"x.nii": "ok", "x.nii.gz": "other_series_chosen", "y": "duplicate_scan"}


def test_files_of_many_gzip_members_are_not_taken_for_copies(tmp_path: Path) -> None:
    """As of bgzip, which ends in an empty member: every file says the same of its content."""
    for name in ("a", "b"):
        content = save(tmp_path / f"{name}.nii").read_bytes()
        (tmp_path / f"{name}.nii").unlink()
        members = (content[:600], content[600:], b"")
        (tmp_path / f"{name}.nii.gz").write_bytes(b"".join(map(gzip.compress, members)))
    assert reasons(tmp_path) == {"a": "ok", "b": "ok"}


def test_a_copy_has_the_fault_that_the_other_one_says(tmp_path: Path) -> None:
    one = save(tmp_path / "b" / "x.nii.gz", **(SAID | {"SeriesDescription": "CTA"}))
    (tmp_path / "a").mkdir()
    shutil.copy(one, tmp_path / "a" / "y.nii.gz")
    assert reasons(tmp_path) == {"x": "contrast", "y": "duplicate_scan"}


def test_a_copy_does_not_take_the_place_of_a_file_that_was_used(tmp_path: Path) -> None:
    one = save(tmp_path / "m.nii")
    first = index([tmp_path], key=KEY)
    shutil.copy(one, tmp_path / "a.nii")
    second = index([tmp_path], key=KEY, before=first)
    (used,) = [line["scan_id"] for line in second.scans.to_pylist() if line["usable"]]
    assert set(first.files) == {used}
    third = index([tmp_path], key=KEY, before=second)
    assert third.scans.equals(second.scans)


def test_a_copy_under_two_subjects_makes_them_one_patient(tmp_path: Path) -> None:
    one = save(tmp_path / "sub-01" / "sub-01_ct.nii")
    (tmp_path / "sub-02").mkdir()
    shutil.copy(one, tmp_path / "sub-02" / "sub-02_ct.nii")
    save(tmp_path / "sub-02" / "sub-02_ses-2_ct.nii")
    assert {line["patient_id"] for line in lines(tmp_path).values()} == {"sub-01"}


def test_a_copy_in_another_study_takes_no_scan_from_it(tmp_path: Path) -> None:
    one = save(tmp_path / "a.nii", **SAID, StudyInstanceUID="1", PatientID="P")
    save(tmp_path / "b.nii", **SAID, StudyInstanceUID="2", PatientID="Q")
    shutil.copy(one, tmp_path / "b.nii")
    save(tmp_path / "c.nii", **SAID, StudyInstanceUID="2", PatientID="Q")
    found = lines(tmp_path)
    assert {name: line["reason"] for name, line in found.items()} == {
        "a": "ok",
        "b": "duplicate_scan",
        "c": "ok",
    }
    assert {line["patient_id"] for line in found.values()} == {"P"}


def test_a_placeholder_under_many_subjects_makes_them_no_patient(tmp_path: Path) -> None:
    one = save(tmp_path / "empty.nii")
    for number in range(4):
        save(tmp_path / f"sub-{number}" / f"sub-{number}_ct.nii")
        shutil.copy(one, tmp_path / f"sub-{number}" / f"sub-{number}_run-2_ct.nii")
    used = [line for line in lines(tmp_path).values() if line["usable"]]
    assert len({line["patient_id"] for line in used}) == 5


NO_SCANS = [
    "sub-01_mask",
    "sub-01_ses-1_label-brain_mask",
    "sub-01_dseg",
    "sub-01_space-MNI152NLin2009cAsym_dseg",
    "sub-01_label-GM_probseg",
    "sub-01_desc-brain_ct",
    "sub-01_desc-brain_mask",
    "sub-01_space-MNI_desc-preproc_ct",
    "sub-01_res-2_ct",
]


@pytest.mark.parametrize("name", NO_SCANS)
def test_masks_maps_and_processed_copies_of_bids_are_no_scans(tmp_path: Path, name: str) -> None:
    save(tmp_path / "sub-01" / "ct" / "sub-01_ct.nii.gz")
    save(tmp_path / "derivatives" / "p" / "sub-01" / "ct" / f"{name}.nii.gz")
    found = lines(tmp_path)
    assert {name: line["reason"] for name, line in found.items()} == {
        "sub-01_ct": "ok",
        name: "derived",
    }
    assert {line["patient_id"] for line in found.values()} == {"sub-01"}


@pytest.mark.parametrize(
    "name", ["sub-01_desc-defaced_ct", "sub-01_acq-desc_ct", "my_mask", "mask", "sub-mask_ct"]
)
def test_other_names_are_left_to_the_voxels(tmp_path: Path, name: str) -> None:
    save(tmp_path / f"{name}.nii.gz")
    assert reasons(tmp_path) == {name: "ok"}


def dataset(root: Path, *subjects: str, described: str | None = "raw") -> Path:
    for subject in subjects:
        save(root / subject / "ct" / f"{subject}_ct.nii.gz")
    if described:
        text = json.dumps({"Name": "n", "BIDSVersion": "1.10.0", "DatasetType": described})
        (root / "dataset_description.json").write_text(text)
    return root


def patients(*paths: Path, before: Catalogue | None = None) -> list[str]:
    return sorted(set(index(list(paths), key=None, before=before).scans["patient_id"].to_pylist()))


def test_subjects_of_two_data_sets_are_two_patients(tmp_path: Path) -> None:
    one = dataset(tmp_path / "A", "sub-01", "sub-02")
    two = dataset(tmp_path / "B", "sub-01", "sub-03")
    apart = ["A/sub-01", "B/sub-01", "sub-02", "sub-03"]
    assert patients(tmp_path) == patients(one, two) == apart
    assert patients(one) == ["sub-01", "sub-02"]
    same_name = dataset(tmp_path / "C" / "A", "sub-01")
    longer = ["C/A/sub-01", f"{tmp_path.name}/A/sub-01", "sub-02"]
    assert patients(one, same_name) == sorted(longer)


def test_a_copy_is_one_of_a_file_of_its_own_subject_alone(tmp_path: Path) -> None:
    save(tmp_path / "A" / "sub-01_ct.nii")
    save(tmp_path / "B" / "sub-01_space-orig_ct.nii")
    assert set(reasons(tmp_path / "A", tmp_path / "B").values()) == {"ok"}
    assert patients(tmp_path / "A", tmp_path / "B") == ["A/sub-01", "B/sub-01"]
    assert reasons(tmp_path)["sub-01_space-orig_ct"] == "derived"


def test_paths_that_are_given_are_data_sets_where_none_is_described(tmp_path: Path) -> None:
    one = dataset(tmp_path / "A", "sub-01", described=None)
    two = dataset(tmp_path / "B", "sub-01", described=None)
    assert patients(one, two) == ["A/sub-01", "B/sub-01"]
    assert patients(tmp_path) == ["sub-01"]
    for session in ("1", "2"):
        save(one / "sub-07" / f"ses-{session}" / f"sub-07_ses-{session}_ct.nii")
    assert patients(one / "sub-07" / "ses-1", one / "sub-07" / "ses-2") == ["sub-07"]


def test_derivatives_are_of_the_subjects_of_their_data_set(tmp_path: Path) -> None:
    inside = dataset(tmp_path / "A", "sub-01")
    dataset(inside / "derivatives" / "p", "sub-01", described="derivative")
    beside = tmp_path / "B"
    dataset(beside / "rawdata", "sub-02")
    dataset(beside / "derivatives" / "p", "sub-02", described="derivative")
    assert patients(tmp_path) == ["sub-01", "sub-02"]


def test_data_sets_in_archives_are_told_apart(tmp_path: Path) -> None:
    for name in ("A", "B"):
        dataset(tmp_path / name, "sub-01")
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for file in sorted((tmp_path / name).rglob("*.*")):
                archive.write(file, f"{name}/{file.relative_to(tmp_path / name)}")
        shutil.rmtree(tmp_path / name)
    assert len(patients(tmp_path)) == 2
    assert patients(tmp_path / "A.zip") == ["sub-01"]


def test_patients_keep_their_ids_when_another_data_set_joins(tmp_path: Path) -> None:
    one = dataset(tmp_path / "A", "sub-01")
    first = index([tmp_path], key=None)
    dataset(tmp_path / "B", "sub-01")
    save(one / "sub-01" / "ct" / "sub-01_run-2_ct.nii.gz")
    second = index([tmp_path], key=None, before=first)
    assert column(second, "patient_id") == {"sub-01", "B/sub-01"}
    counts = second.scans["patient_id"].to_pylist()
    assert counts.count("sub-01") == 2
    assert index([tmp_path], key=None, before=second).scans.equals(second.scans)


@pytest.mark.parametrize("key", [KEY, None])
def test_files_keep_the_ids_that_they_had_as_patients_of_their_own(
    tmp_path: Path, key: bytes | None
) -> None:
    """A store holds them under these ids; those that join are of the patient they join."""
    save(tmp_path / "x_Tilt_1.nii")
    first = index([tmp_path], key=key)
    save(tmp_path / "x.nii")
    second = index([tmp_path], key=key, before=first)
    assert column(second, "patient_id") == column(first, "patient_id")
    assert column(second, "study_id") == column(first, "study_id")
    assert index([tmp_path], key=key, before=second).scans.equals(second.scans)


@pytest.mark.parametrize("gone", ["x", "x_2"])
def test_a_file_keeps_its_ids_when_the_one_it_is_named_after_is_gone(
    tmp_path: Path, gone: str
) -> None:
    for name in ("x", "x_Tilt_1", "xa"):
        save(tmp_path / f"{name}.nii")
    for name in ("x_2", "x_3"):
        save(tmp_path / f"{name}.nii", **(SAID | {"SeriesNumber": int(name[-1])}))
    first = index([tmp_path], key=KEY)
    (tmp_path / f"{gone}.nii").unlink()
    second = index([tmp_path], key=KEY, before=first)
    left = [line for line in first.scans.to_pylist() if line["scan_id"] in second.files]
    ids = ("scan_id", "study_id", "patient_id")
    assert len(left) == len(second.scans) == 4
    assert [[line[name] for name in ids] for line in second.scans.to_pylist()] == [
        [line[name] for name in ids] for line in left
    ]


def test_a_scan_and_its_sidecar_cost_one_look_each(tmp_path: Path) -> None:
    for number in range(20):
        save(tmp_path / f"{number}.nii", **SAID)
    found = find([tmp_path])
    assert found.ignored == {".json": 20}
    assert len(found.sources) == 20
    looks = list(look_at_all(found.sources, workers=1, progress=lambda *_: None))
    assert len(looks) == 20


def test_lines_do_not_depend_on_the_order_in_which_files_are_seen(tmp_path: Path) -> None:
    names = ["x", "x_Tilt_1", "xa", "y_2", "y_3", "sub-01_ct", "sub-01_desc-brain_ct"]
    paths = [save(tmp_path / f"{name}.nii.gz", **SAID) for name in names]
    first = index(paths, key=KEY)
    for seed in range(4):
        random.Random(seed).shuffle(paths)
        assert index(paths, key=KEY).scans.equals(first.scans)


def test_series_without_a_protocol_name_are_one_study_by_folder_and_time(tmp_path: Path) -> None:
    """dcm2niix 1.0.20260724 then writes SeriesDescription where its default has the protocol."""
    for name in (
        "ct_Head_soft_5_20240302101112_2",
        "ct_Head_bone_5_20240302101112_3",
        "ct_Head_soft_5_20240302101113_2",
        "other_Head_soft_5_20240302101112_2",
    ):
        save(tmp_path / f"{name}.nii")
    found = lines(tmp_path)
    patients = {name: line["patient_id"] for name, line in found.items()}
    one, again, later, another = (
        patients[name]
        for name in (
            "ct_Head_soft_5_20240302101112_2",
            "ct_Head_bone_5_20240302101112_3",
            "ct_Head_soft_5_20240302101113_2",
            "other_Head_soft_5_20240302101112_2",
        )
    )
    assert one == again
    assert len({one, later, another}) == 3
    assert sum(line["usable"] for line in found.values()) == 3


def test_the_contrast_entity_of_a_bids_name_is_obeyed(tmp_path: Path) -> None:
    for name in ("sub-01_ce-iohexol_ct", "sub-02_ce-none_ct", "sub-03_ct"):
        save(tmp_path / f"{name}.nii")
    assert reasons(tmp_path) == {
        "sub-01_ce-iohexol_ct": "contrast",
        "sub-02_ce-none_ct": "ok",
        "sub-03_ct": "ok",
    }
