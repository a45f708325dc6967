"""A Dask scheduler and workers as processes of their own, as `dask scheduler` starts them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MAIN = [sys.executable, "-m", "distributed.cli.dask_"]


@contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`dask scheduler` or `dask worker`, until the block ends."""
    command = [*MAIN[:-1], MAIN[-1] + program, *arguments, "--no-dashboard"]
    # A test may send its own functions there: they import what lies beside this file.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def running_scheduler(folder: Path) -> Iterator[str]:
    """A scheduler that nobody here is the parent of a worker of; its file, in the folder."""
    file = folder / "scheduler.json"
    address = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
    with running("scheduler", *address):
        wait_until(file.exists)
        yield str(file)


@contextmanager
def running_worker(scheduler: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that nobody starts again when it dies."""
    with running("worker", "--scheduler-file", scheduler, "--nthreads", "1", "--no-nanny") as one:
        yield one


def wait_until(true: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
