"""What is planted in DICOM is in no byte of a store, a run, a public catalogue or the output."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pydicom
import pytest

from ctfm.extract.phantom_cohort import write_cohort

SCANS = 16
PLANTED = {
    "PatientName": "DOE^JANE",
    "PatientBirthDate": "19551231",
    "StudyDate": "20190203",
    "AcquisitionDateTime": "20190203123456",
    "AccessionNumber": "ACC7770001",
    "OtherPatientIDs": "OTHER4242",
    "PatientAddress": "12 Elm Street",
    "ReferringPhysicianName": "HOUSE^GREGORY",
    "InstitutionName": "Princeton-Plainsboro",
    "DeviceSerialNumber": "SN99887766",
    "StudyDescription": "secret study",
    "SeriesDescription": "secret series",
    "PatientComments": "secret comment",
    "ConvolutionKernel": "Roe Richard",
    "Manufacturer": "Siemens of Gregory",
    "ManufacturerModelName": "secret model",
    "ProtocolName": "secret protocol",
}
SPELLINGS = ["1955-12-31", "31.12.1955", "2019-02-03", "Jane", "Doe "]
UIDS = (
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
)


def ctfm(*arguments: str, cwd: Path) -> str:
    program = "from ctfm.cli.app import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr
    return done.stdout + done.stderr


def plant(cohort: Path) -> set[str]:
    """Put identifiers into every file and path; all that must not come out again."""
    secrets = {*PLANTED.values(), *SPELLINGS, "secret-folder"}
    for file in sorted(path for path in cohort.rglob("*") if path.suffix != ".parquet"):
        if not file.is_file():
            continue
        dataset = pydicom.dcmread(file)
        for keyword, value in PLANTED.items():
            setattr(dataset, keyword, value)
        secrets |= {str(dataset.get(keyword)) for keyword in UIDS if keyword in dataset}
        dataset.save_as(file)
    return secrets


def write_labels(labels: pa.Table, path: Path) -> None:
    """One finding by original study id; a split of the patients in which all have both classes."""
    patients = labels["patient_id"].to_pylist()
    place = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    splits = ("train", "train", "validation", "validation", "test", "test")
    columns = {
        "study_id": labels["study_id"],
        "sick": [place[patient] % 2 for patient in patients],
        "split": [splits[place[patient] % 6] for patient in patients],
    }
    csv.write_csv(pa.table(columns), path)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], str]:
    """A project walked through, what was planted, and what was printed on the way."""
    folder = tmp_path_factory.mktemp("project")
    cohort = folder / "secret-folder DOE^JANE"
    write_cohort(cohort, scans=SCANS, seed=0, matrix=64, slices=9)
    secrets = plant(cohort)
    broken, unreadable, *_ = sorted(cohort.rglob("*.dcm"))
    broken.write_bytes(broken.read_bytes()[:-700])
    unreadable.write_bytes(b"DOE^JANE")
    write_labels(pq.read_table(cohort / "labels.parquet"), folder / "labels.csv")
    printed = ctfm("index", cohort.name, "--workers", "1", cwd=folder)
    printed += ctfm("extract", "--model", "intensity", "--workers", "0", cwd=folder)
    fit = ("--experts", "2", "--max-epochs", "3", "--min-epochs", "1", "--set", "min_positives=1")
    printed += ctfm("fit-head", "--labels", "labels.csv", *fit, cwd=folder)
    printed += ctfm("evaluate", "runs/intensity-molre2", cwd=folder)
    printed += ctfm("report", "runs/intensity-molre2", cwd=folder)
    printed += ctfm("store", "info", "features/intensity", cwd=folder)
    return folder, secrets, printed


def readable(file: Path) -> bytes:
    """The bytes of a file, and those that its compression hides."""
    content = file.read_bytes()
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        content += repr(table.to_pylist()).encode() + repr(table.schema.metadata).encode()
    return content.lower()


@pytest.mark.parametrize("shared", ["scans.parquet", "features", "runs"])
def test_nothing_that_was_planted_is_in_any_byte(
    project: tuple[Path, set[str], str], shared: str
) -> None:
    folder, secrets, _ = project
    root = folder / shared
    files = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    assert files
    for file in files:
        content = readable(file) + str(file.relative_to(folder)).encode().lower()
        assert not [secret for secret in secrets if secret.lower().encode() in content], file


def test_nothing_that_was_planted_is_printed(project: tuple[Path, set[str], str]) -> None:
    _, secrets, printed = project
    assert not [secret for secret in secrets if secret.lower() in printed.lower()]


def test_the_search_would_find_what_the_private_catalogue_holds(
    project: tuple[Path, set[str], str],
) -> None:
    folder, secrets, _ = project
    content = readable(folder / "scans.private.parquet")
    assert "secret-folder" in {secret for secret in secrets if secret.encode() in content}
