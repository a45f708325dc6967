"""Claim: the memory of an extraction does not grow with the number of scans.

`ctfm extract` runs as a user runs it, over phantom cohorts of 50 and of 500 scans of the same
kind, with `intensity`. Measured is the peak, sampled ten times a second, of the memory of the
extracting process and all its readers together: the proportional set size, in which a page that
several of them share counts once; where the system does not tell it, the resident set size.
"""

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from measure import main_with_out

from ctfm.extract.index import index
from ctfm.extract.phantom_cohort import write_cohort

SCANS = (50, 500)
MATRIX, SLICES, INTERVAL_S = 64, 24, 0.1
KIND = "pss" if psutil.LINUX else "rss"


def taken_mb(process: psutil.Process) -> float:
    """What a process and its children take now, in MB."""
    total_bytes = 0
    with suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                info = one.memory_full_info() if KIND == "pss" else one.memory_info()
                total_bytes += getattr(info, KIND)
    return total_bytes / 1e6


def peak_mb(folder: Path, *, scans: int) -> float:
    """Peak memory in MB of an extraction of so many scans."""
    write_cohort(folder / "cohort", scans=scans, seed=0, matrix=MATRIX, slices=SLICES, extras=0.0)
    index([folder / "cohort"], key=None).write(folder / "scans.parquet")
    command = "from ctfm.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "extract", "--model", "intensity"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    peak, watched = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, taken_mb(watched))
        time.sleep(INTERVAL_S)
    if process.returncode:
        raise RuntimeError(f"the extraction ended with code {process.returncode}")
    return peak


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
        "memory": f"{KIND} of the extracting process and its readers, sampled",
        "peak_mb": peaks,
        "ratio": peaks[SCANS[1]] / peaks[SCANS[0]],
    }


if __name__ == "__main__":
    main_with_out(measure)
