"""Folders and archives as they come: trees of public data sets, zip archives, hostile ones."""

import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctfm.extract.index import index
from ctfm.extract.reading import read_volume

EVEN_MM = np.arange(0.0, 45.0, 5.0)


def packed(folder: Path, archive: Path, *, inside: str = "") -> Path:
    """A zip archive of the files of a folder, under a folder of the archive."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            opened.write(file, inside + str(file.relative_to(folder)))
    return archive


def test_a_series_deep_in_an_archive_is_read_in_place(tmp_path: Path, scanner: Any) -> None:
    scanner.save(scanner.axial(EVEN_MM), tmp_path / "plain")
    archive = packed(tmp_path / "plain", tmp_path / "study.ZIP", inside="ex port/ST 1/SE 2/")
    before = set(tmp_path.rglob("*"))
    scanner.read_usable(archive)
    assert set(tmp_path.rglob("*")) == before


def test_an_archive_for_each_series_of_a_study_gives_one_scan(tmp_path: Path, scanner: Any) -> None:
    for number in (1, 2):
        planes = scanner.axial(EVEN_MM, SeriesInstanceUID=f"1.2.{number}", SeriesNumber=number)
        scanner.save(planes, tmp_path / "plain" / str(number))
        packed(tmp_path / "plain" / str(number), tmp_path / f"series{number}.zip")
    shutil.rmtree(tmp_path / "plain")
    scanner.read_usable(tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": "ok", "1.2.2": "other_series_chosen"}


def test_an_archive_in_an_archive_has_a_line_that_says_what_to_do(
    tmp_path: Path, scanner: Any
) -> None:
    scanner.save(scanner.axial(EVEN_MM), tmp_path / "plain" / "a")
    packed(tmp_path / "plain" / "a", tmp_path / "plain" / "inner.zip")
    archive = packed(tmp_path / "plain", tmp_path / "outer.zip")
    scanner.read_usable(archive)
    lines = {line["scan_id"]: line for line in index([archive], key=None).scans.to_pylist()}
    assert lines["inner"]["reason"] == "unsupported_encoding"
    assert "unpack" in lines["inner"]["detail"]


@pytest.mark.parametrize(
    "name", ["../../out.dcm", "a/../../out.dcm", "..\\out.dcm", "/etc/out.dcm"]
)
def test_a_member_that_names_a_place_outside_writes_nothing_there(
    tmp_path: Path, scanner: Any, name: str
) -> None:
    files = scanner.save(scanner.axial(EVEN_MM), tmp_path / "plain")
    archive = tmp_path / "in" / "hostile.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as opened:
        for number, file in enumerate(files):
            opened.writestr(name.replace("out", f"out{number}"), Path(file).read_bytes())
    shutil.rmtree(tmp_path / "plain")
    before = set(tmp_path.rglob("*"))
    if ".." in name:
        catalogue = index([tmp_path], key=None)
        (line,) = catalogue.scans.to_pylist()
        assert (line["reason"], "leads out" in line["detail"]) == ("unreadable", True)
        assert scanner.accounted(catalogue, len(files))
    else:
        scanner.read_usable(tmp_path)  # no tool takes the root of a name for the root of the disk
    assert set(tmp_path.rglob("*")) == before


def test_a_bomb_among_slices_costs_one_line(tmp_path: Path, scanner: Any) -> None:
    files = scanner.save(scanner.axial(EVEN_MM), tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        for file in files:
            opened.write(file, Path(file).name)
        with opened.open("bomb", "w", force_zip64=True) as member:
            for _ in range(80):
                member.write(bytes(1 << 20))
    shutil.rmtree(tmp_path / "plain")
    scanner.read_usable(tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": "ok", "bomb": "unreadable"}


def test_a_member_that_lies_about_its_size_is_cut_there(tmp_path: Path) -> None:
    archive = tmp_path / "b.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("bomb", bytes(8 << 20))
    content = archive.read_bytes()
    archive.write_bytes(
        content.replace((8 << 20).to_bytes(4, "little"), (999).to_bytes(4, "little"))
    )
    (line,) = index([archive], key=None).scans.to_pylist()
    assert line["reason"] == "unreadable"


def rsna_tags(patient: int) -> dict[str, Any]:
    """Of an RSNA 2019 slice: few tags, ids that are no UIDs."""
    return {
        "SOPClassUID": None,
        "ImageType": None,
        "PatientID": f"ID_{patient:08x}",
        "StudyInstanceUID": f"ID_{patient * 7 + 1:010x}",
        "SeriesInstanceUID": f"ID_{patient * 7 + 2:010x}",
        "StudyID": "",
        "WindowCenter": ["00036", "00036"],
        "WindowWidth": ["00080", "00080"],
    }


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_flat_folder_of_thousands_of_slices_comes_apart_by_series(
    tmp_path: Path, scanner: Any
) -> None:
    folder = tmp_path / "stage_2_train"
    rng = np.random.default_rng(5)
    series = 60
    names = iter(rng.permutation(series * 34))
    written: Counter[str] = Counter()
    for patient in range(series):
        count = 30 + patient % 5
        for plane in scanner.axial(np.arange(count) * 5.0, **rsna_tags(patient)):
            sop = f"ID_{next(names):09x}"
            plane.SOPInstanceUID = sop
            plane.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
            scanner.save([plane], folder, name=f"{sop}.dcm")
            written[plane.SeriesInstanceUID] += 1
    catalogue = index([folder], key=None)
    lines = catalogue.scans.to_pylist()
    assert {line["scan_id"]: line["n_slices"] for line in lines} == written
    assert all(line["usable"] for line in lines)
    assert scanner.accounted(catalogue, sum(written.values()))
    for name in list(catalogue.files)[::20]:
        scanner.check(read_volume(catalogue.files[name]))


def cq500(root: Path, scanner: Any, patient: int) -> int:
    """One patient of a CQ500 tree; how many files it has."""
    study = root / f"CQ500CT{patient} CQ500CT{patient}" / "Unknown Study"
    series = {
        "CT PRE CONTRAST 5MM": (5.0, {"ConvolutionKernel": "SOFT"}),
        "CT PRE CONTRAST BONE": (5.0, {"ConvolutionKernel": "BONE"}),
        "CT PRE CONTRAST THIN": (0.625, {"ConvolutionKernel": "SOFT"}),
        "CT POST CONTRAST": (5.0, {"ConvolutionKernel": "SOFT"}),
    }
    count = 0
    for number, (name, (step_mm, tags)) in enumerate(series.items()):
        uids = {
            "PatientID": f"CQ500-CT-{patient}",
            "StudyInstanceUID": f"1.9.{patient}",
            "SeriesInstanceUID": f"1.9.{patient}.{number}",
            "SeriesDescription": name,
        }
        planes = scanner.axial(np.arange(0, 45, step_mm), **uids, **tags)
        scanner.save(planes, study / name, name="CT{:06d}.dcm")
        count += len(planes)
    return count


def test_of_each_patient_of_a_cq500_tree_one_reconstruction_is_used(
    tmp_path: Path, scanner: Any
) -> None:
    count = sum(cq500(tmp_path, scanner, patient) for patient in range(3))
    packed(tmp_path / "CQ500CT2 CQ500CT2", tmp_path / "CQ500CT2.zip", inside="CQ500CT2 CQ500CT2/")
    shutil.rmtree(tmp_path / "CQ500CT2 CQ500CT2")
    catalogue = index([tmp_path], key=None)
    reasons = {line["scan_id"]: line["reason"] for line in catalogue.scans.to_pylist()}
    for patient in range(3):
        found = [reasons[f"1.9.{patient}.{number}"] for number in range(4)]
        assert found == ["ok", "other_series_chosen", "other_series_chosen", "contrast"]
        scanner.check(read_volume(catalogue.files[f"1.9.{patient}.0"]))
    assert scanner.accounted(catalogue, count)
