"""Claim: the index of 100,000 DICOM files takes no longer than before the rules for real inputs.

That of 20,000 NIfTI files takes longer by what is new in it.

DICOM: 2,500 series of 40 images, of three vendors, with descriptions as sites write them; pixels
are 32 × 32, as a header is read up to them. NIfTI: files of 6 × 6 × 8 voxels in one folder, packed,
every other one with a JSON file beside it. The code of `BEFORE` and of this tree index the same
files in turn, each in a process of its own. Seconds of one core, start of the process left out; the
least of the rounds counts, because a busy machine only ever adds. New for NIfTI is that JSON files
are read, copies told, names of one study joined, and both forms of a header compared.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from measure import main_with_out

from ctfm.extract.phantom_cohort import make_scan, write_series

BEFORE = "d4be24d"
SERIES, IMAGES, ROUNDS = 2_500, 40, 3
VOLUMES = 20_000
SAID = {
    "Modality": "CT",
    "Manufacturer": "Siemens",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "ConvolutionKernel": "H31s",
    "SliceThickness": 5,
    "ConversionSoftware": "dcm2niix",
}
DESCRIPTIONS = (
    "HEAD W/O CONTRAST 5mm", "Head  5.0  H31s", "AX_BRAIN_STD", "CCT nativ ohne KM", "BONE 1.25",
    "CTA Head 0.75", "HEAD_CTA_0.6", "Schaedel 4.0 Hr40", "Cerveau sans injection", "Sag MPR",
    "COR MIP 10mm", "cranio simples", "NCCT BRAIN (STROKE)", "TAC cráneo sin contraste",
    "Head 2.0 FC26", "Topogram 0.6", "Monitoring", "rCBV_map", "HEAD C-", "Hersenen blanco",
)  # fmt: skip
PATIENTS = (1, 2, 3)

_INDEX = """
import json, sys, time, warnings
from pathlib import Path
from ctfm.extract.index import index
warnings.simplefilter("ignore")
start = time.process_time()
scans = index([Path(sys.argv[1])], key=bytes(32), workers=1).scans
took = time.process_time() - start
print(json.dumps({"s": took, "scans": scans.num_rows, "usable": sum(scans["usable"].to_pylist())}))
"""


def write_dicom(folder: Path) -> None:
    """The series of three phantoms, over and over under new UIDs and descriptions."""
    for patient in PATIENTS:
        scan = make_scan(0, patient, matrix=32, slices=IMAGES)
        write_series(scan, folder / "made" / str(patient))
    kept = {patient: sorted((folder / "made" / str(patient)).iterdir()) for patient in PATIENTS}
    for number in range(SERIES):
        target = folder / "scans" / f"{number:04d}"
        target.mkdir(parents=True)
        description = DESCRIPTIONS[number % len(DESCRIPTIONS)]
        for i, file in enumerate(kept[PATIENTS[number % len(PATIENTS)]]):
            dataset = pydicom.dcmread(file)
            dataset.SpecificCharacterSet = "ISO_IR 192"
            dataset.PatientID, dataset.SeriesDescription = f"P{number // 2}", description
            dataset.StudyInstanceUID = f"2.25.{10**30 + number // 2}"
            dataset.SeriesInstanceUID = f"2.25.{2 * 10**30 + number}"
            dataset.SOPInstanceUID = f"2.25.{3 * 10**30 + number * IMAGES + i}"
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.save_as(target / f"{i:02d}.dcm")


def write_nifti(folder: Path) -> None:
    """Volumes of one header and of values of their own, half of them with a sidecar."""
    target = folder / "scans"
    target.mkdir(parents=True)
    for number in range(VOLUMES):
        rng = np.random.default_rng(number)
        voxels = rng.integers(-1000, 100, (6, 6, 8)).astype(np.int16)
        content = nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 5.0, 1.0])).to_bytes()
        (target / f"CT_{number:05}.nii.gz").write_bytes(gzip.compress(content, 1))
        if number % 2:
            time, series = f"{number % 10 + 8:02}:10:{number % 59 + 1:02}", number % 5
            said = {
                **SAID,
                "SeriesDescription": DESCRIPTIONS[number % len(DESCRIPTIONS)],
                "AcquisitionTime": time,
                "SeriesNumber": series,
            }
            (target / f"CT_{number:05}.json").write_text(json.dumps(said))


def code_of_before(folder: Path) -> Path:
    """A folder that holds the package `ctfm` as it was."""
    root = Path(__file__).parent.parent
    folder.mkdir()
    archive = subprocess.run(
        ["git", "archive", BEFORE], cwd=root, check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder / ".typing"


def index_once(code: Path, scans: Path) -> dict[str, float]:
    """Index in a process that imports `ctfm` from `code`."""
    done = subprocess.run(
        [sys.executable, "-c", _INDEX, str(scans)],
        env={**os.environ, "PYTHONPATH": str(code)},
        check=True,
        capture_output=True,
        text=True,
    )
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


KINDS = {"DICOM": (write_dicom, SERIES * IMAGES), "NIfTI": (write_nifti, VOLUMES)}


def measure_kind(kind: str) -> dict[str, Any]:
    """Seconds of both, in turn, for files of one kind."""
    write, files = KINDS[kind]
    here = Path(__file__).parent.parent / ".typing"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        codes = {"before": code_of_before(folder / "before"), "now": here}
        rounds = [
            {which: index_once(code, folder / "scans") for which, code in codes.items()}
            for _ in range(ROUNDS)
        ]
    least = {which: min(one[which]["s"] for one in rounds) for which in ("before", "now")}
    return {
        "claim": f"{files:,} {kind} files: {least['before']:.0f} s over {least['now']:.0f} s",
        "files": files,
        "core_s": least,
        "ratio": least["before"] / least["now"],
        "raw": rounds,
    }


def measure(kinds: Collection[str]) -> dict[str, object]:
    """Both kinds of files; the ratio is that of the slower one."""
    records = {kind: measure_kind(kind) for kind in KINDS if kind in kinds}
    claims = "; ".join(f"{one['claim']}, {one['ratio']:.2f}x" for one in records.values())
    return {
        "claim": f"index in seconds of one core, before over now: {claims}; the least",
        "before": BEFORE,
        "ratio": min(one["ratio"] for one in records.values()),
        "kinds": records,
    }


if __name__ == "__main__":
    main_with_out(measure, parts=tuple(KINDS))
