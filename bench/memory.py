"""Claim: the memory of an extraction does not grow with the number of scans.

`ctfm extract` runs as a user runs it, over phantom cohorts of 50 and of 500 scans of the same
kind, with `intensity` and two reader processes. Measured is the memory of all its processes
together, ten times a second: the sum of their proportional set sizes, in which a page that several
processes share counts once.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from measure import main_with_out

from ctfm.extract.index import index
from ctfm.extract.phantom_cohort import write_cohort

SCANS = (50, 500)
MATRIX, SLICES, SAMPLE_S = 128, 24, 0.1


def peak_mb(folder: Path, *, scans: int) -> float:
    """Peak memory in MB of an extraction of so many scans."""
    write_cohort(folder / "cohort", scans=scans, seed=0, matrix=MATRIX, slices=SLICES, extras=0.0)
    index([folder / "cohort"], key=None).write(folder / "scans.parquet")
    command = "from ctfm.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "extract", "--model", "intensity", "--workers", "2"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, _bytes_of(psutil.Process(process.pid)))
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise RuntimeError(f"the extraction ended with code {process.returncode}")
    return peak_bytes / 1e6


def _bytes_of(process: psutil.Process) -> int:
    """Of a process and all that it started; one that ends meanwhile counts as nothing."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += one.memory_full_info().pss
    return total


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
