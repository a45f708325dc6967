"""Claim: the index of 100,000 files is no slower than before the rules for real inputs.

2,500 series of 40 images, of three vendors, with descriptions as sites write them; pixels are
32 × 32, as a header is read up to them. The code of `BEFORE` and of this tree index the same files
in turn, each in a process of its own. Seconds of one core, start of the process left out; the least
of the rounds counts, because a busy machine only ever adds.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pydicom
from measure import main_with_out

from ctfm.extract.phantom_cohort import make_scan, write_series

BEFORE = "d4be24d"
SERIES, IMAGES, ROUNDS = 2_500, 40, 3
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


def write_files(folder: Path) -> None:
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


def measure() -> dict[str, object]:
    """Seconds of both, in turn."""
    here = Path(__file__).parent.parent / ".typing"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        codes = {"before": code_of_before(folder / "before"), "now": here}
        rounds = [
            {which: index_once(code, folder / "scans") for which, code in codes.items()}
            for _ in range(ROUNDS)
        ]
    least = {which: min(one[which]["s"] for one in rounds) for which in ("before", "now")}
    return {
        "claim": f"index of {SERIES * IMAGES:,} files: before ({least['before']:.0f} s of one "
        f"core) over now ({least['now']:.0f} s)",
        "before": BEFORE,
        "files": SERIES * IMAGES,
        "core_s": least,
        "ratio": least["before"] / least["now"],
        "raw": rounds,
    }


if __name__ == "__main__":
    main_with_out(measure)
