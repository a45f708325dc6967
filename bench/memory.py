"""Claim: the memory of an extraction does not grow with the number of scans.

`ctfm extract` runs as a user runs it, over phantom cohorts of 50 and of 500 scans of the same
kind, with `intensity`. Measured is the peak of the resident memory of its largest process (the
extracting one; readers hold one scan each), as the kernel reports it when the process ends.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import main_with_out

from ctfm.extract.index import index
from ctfm.extract.phantom_cohort import write_cohort

SCANS = (50, 500)
MATRIX, SLICES = 128, 24


def peak_mb(folder: Path, *, scans: int) -> float:
    """Peak resident memory in MB of an extraction of so many scans."""
    write_cohort(folder / "cohort", scans=scans, seed=0, matrix=MATRIX, slices=SLICES, extras=0.0)
    index([folder / "cohort"], key=None).write(folder / "scans.parquet")
    command = "from ctfm.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "extract", "--model", "intensity"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the extraction ended with code {code}")
    return usage.ru_maxrss / 1024


def measure() -> dict[str, object]:
    """The peak at each size of the cohort, and their ratio."""
    peaks = {}
    for scans in SCANS:
        with tempfile.TemporaryDirectory() as name:
            peaks[scans] = peak_mb(Path(name), scans=scans)
    return {
        "claim": f"peak memory of an extraction of {SCANS[1]} scans against one of {SCANS[0]}",
        "matrix": MATRIX,
        "slices": SLICES,
        "peak_mb": peaks,
        "ratio": peaks[SCANS[1]] / peaks[SCANS[0]],
    }


if __name__ == "__main__":
    main_with_out(measure)
