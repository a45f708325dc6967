"""Reader processes: results in order, one bad scan lost at a time, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from ctfm.extract.config import ExtractConfig
from ctfm.extract.phantom_cohort import make_scan, write_series
from ctfm.extract.readers import Prepared, ReadJob, read_ahead
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

CONFIG = ExtractConfig(backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=30)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[ReadJob]:
    folder = tmp_path_factory.mktemp("series")
    found = []
    for patient in range(5):
        series = folder / f"study-{patient}"
        write_series(make_scan(3, patient, 0, matrix=64, slices=9), series)
        files = tuple(sorted(str(file) for file in series.iterdir()))
        found.append(ReadJob(f"c{patient}", files))
    found[2] = ReadJob("c2", (str(folder / "nothing-here.dcm"),))
    return found


def reader_pids() -> list[int]:
    """Reader processes of this one that run."""
    children = psutil.Process().children()
    return [child.pid for child in children if "ctfm.extract.readers" in " ".join(child.cmdline())]


def reasons(results: list[Prepared]) -> list[Reason]:
    return [r.reason if isinstance(r, ScanError) else Reason.OK for r in results]


def test_a_bad_scan_is_a_reason_and_the_others_are_prepared(jobs: list[ReadJob]) -> None:
    found = reasons(list(read_ahead(jobs, CONFIG, workers=0)))
    assert found[2] is Reason.VANISHED
    assert [found[i] for i in (0, 1, 3, 4)] == [Reason.OK] * 4


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_gives_the_same_scans_in_the_same_order(
    jobs: list[ReadJob], workers: int
) -> None:
    expected = list(read_ahead(jobs, CONFIG, workers=0))
    found = list(read_ahead(jobs, CONFIG, workers=workers))
    assert reasons(found) == reasons(expected)
    for a, b in zip(found, expected, strict=True):
        if not isinstance(a, ScanError) and not isinstance(b, ScanError):
            np.testing.assert_array_equal(a[0].hu, b[0].hu)
            np.testing.assert_array_equal(a[0].position_mm, b[0].position_mm)


@pytest.fixture
def blocked(tmp_path: Path) -> ReadJob:
    """A named pipe without a writer: opening it blocks for ever, as a hanging decoder would."""
    path = tmp_path / "blocked.nii"
    os.mkfifo(path)
    return ReadJob("c9", (str(path),))


def test_a_scan_that_takes_too_long_is_lost_and_the_rest_goes_on(
    jobs: list[ReadJob], blocked: ReadJob
) -> None:
    found = reasons(list(read_ahead([jobs[0], blocked, jobs[1]], CONFIG, workers=1, timeout_s=5)))
    assert found == [Reason.OK, Reason.READER_CRASHED, Reason.OK]


def test_a_process_that_dies_costs_one_scan_and_is_replaced(
    jobs: list[ReadJob], blocked: ReadJob
) -> None:
    results = read_ahead([jobs[0], blocked, jobs[1]], CONFIG, workers=1)
    found = [next(results)]
    time.sleep(0.5)  # by now the process is at work on the second scan
    for pid in reader_pids():
        os.kill(pid, signal.SIGKILL)
    found += results
    assert reasons(found) == [Reason.OK, Reason.READER_CRASHED, Reason.OK]


def test_a_process_that_dies_while_it_sends_costs_one_scan_and_is_replaced(
    jobs: list[ReadJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, struct\n"
        "from multiprocessing.connection import Connection\n"
        "send = Connection.send\n"
        "def die_in_the_first_scan(self, message):\n"
        f"    mark = {str(tmp_path / 'died')!r}\n"
        "    if message == 'ready' or os.path.exists(mark):\n"
        "        return send(self, message)\n"
        "    open(mark, 'w').close()\n"
        "    os.write(self.fileno(), struct.pack('!i', 4_000_000) + bytes(1000))\n"
        "    os.kill(os.getpid(), 9)\n"
        "Connection.send = die_in_the_first_scan\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = reasons(list(read_ahead(jobs[:2], CONFIG, workers=1)))
    assert found == [Reason.READER_CRASHED, Reason.OK]


def test_a_scan_that_takes_too_much_memory_is_lost_and_the_rest_goes_on(
    jobs: list[ReadJob], tmp_path: Path
) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((256, 256, 2000))
    header.set_sform(np.diag([1.0, 1.0, 0.1, 1.0]), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    (tmp_path / "large.nii").write_bytes(header.binaryblock)
    os.truncate(tmp_path / "large.nii", 352 + 2 * 256 * 256 * 2000)  # takes no room on the disk
    large = ReadJob("c9", (str(tmp_path / "large.nii"),))
    results = list(read_ahead([large, jobs[0]], CONFIG, workers=1, memory_bytes=200 << 20))
    assert reasons(results) == [Reason.READER_CRASHED, Reason.OK]
    assert "memory" in str(results[0])


def test_a_process_gives_way_to_the_caller_and_uses_one_thread(jobs: list[ReadJob]) -> None:
    results = read_ahead(jobs, CONFIG, workers=1)
    next(results)
    (reader,) = map(psutil.Process, reader_pids())
    priority = min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)
    assert (reader.nice(), reader.environ()["OMP_NUM_THREADS"]) == (priority, "1")
    results.close()


def test_no_process_is_left_when_the_caller_stops_early(jobs: list[ReadJob]) -> None:
    results = read_ahead(jobs, CONFIG, workers=2)
    next(results)
    results.close()
    assert not reader_pids()


def test_a_script_without_a_main_guard_can_read_ahead(jobs: list[ReadJob], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from ctfm.extract.config import ExtractConfig\n"
        "from ctfm.extract.readers import ReadJob, read_ahead\n"
        f"jobs = [{jobs[0]!r}]\n"
        "config = ExtractConfig(backbone='intensity')\n"
        "print([len(scan[0].hu) > 0 for scan in read_ahead(jobs, config, workers=1)])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "[True]\n", done.stderr
