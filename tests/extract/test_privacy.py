"""What is planted in headers, archives and paths is in no column that may be shared."""

import shutil
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pydicom

from ctfm.extract.index import index
from ctfm.extract.phantom_cohort import write_cohort

PLANTED = (
    "DOE^JANE",
    "Jane Doe",
    "19551231",
    "ACC777",
    "9.9.9.9",
    "MRN4242",
    "secretpath",
    "SecretSeries",
)


def plant(study: Path) -> None:
    for file in (path for path in study.rglob("*") if path.is_file()):
        dataset = pydicom.dcmread(file)
        dataset.PatientName, dataset.PatientID = "DOE^JANE", "MRN4242"
        dataset.PatientBirthDate = dataset.StudyDate = "19551231"
        dataset.AccessionNumber, dataset.StudyInstanceUID = "ACC777", "9.9.9.9.1"
        dataset.SeriesDescription = "SecretSeries"
        # Free text that has a column of its own in the shared table.
        dataset.ConvolutionKernel, dataset.Manufacturer = "Jane Doe", "MRN4242 of DOE^JANE"
        dataset.save_as(file)


def test_no_planted_identifier_is_in_the_shared_table(tmp_path: Path) -> None:
    write_cohort(tmp_path / "cohort", scans=3, seed=0, matrix=64, slices=9)
    whole, zipped, damaged = sorted(p for p in (tmp_path / "cohort").iterdir() if p.is_dir())
    for study in (whole, zipped, damaged):
        plant(study)
    scans = tmp_path / "scans"
    shutil.copytree(whole, scans / "secretpath DOE^JANE")
    shutil.copytree(damaged, scans / "MRN4242")
    first = next(path for path in sorted((scans / "MRN4242").rglob("*")) if path.is_file())
    first.write_bytes(first.read_bytes()[:900])
    with zipfile.ZipFile(scans / "secretpath.zip", "w") as archive:
        for file in zipped.rglob("*"):
            archive.write(file, f"DOE^JANE/{file.name}")
        archive.writestr("DOE^JANE/broken.dcm", bytes(128) + b"DICM" + b"junk" * 50)
        archive.writestr("DOE^JANE/inner.zip", b"PK")
    (scans / "DOE^JANE.nii.gz").write_bytes(b"no gzip")
    index([scans], key=bytes(32)).write(tmp_path / "scans.parquet")
    lines = pq.read_table(tmp_path / "scans.parquet").to_pylist()
    assert len({line["reason"] for line in lines}) >= 4
    assert not [secret for secret in PLANTED if secret in repr(lines)]
    content = (tmp_path / "scans.parquet").read_bytes()
    assert not [secret for secret in PLANTED if secret.encode() in content]
    assert {line["vendor"] for line in lines if line["format"] == "dicom"} == {"other", None}
