"""Threads wait briefly unless the user says otherwise, are as many as asked for, and are told."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ctfm

from ctfm.store.threads import wait_briefly, waiting_of_threads

VARIABLES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
LOOK = """
import os, sys
from ctfm.cli import app
app.app = lambda: print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
app.main()
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the threads and the environment of this process as they were."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # noted, and so taken back at the end
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_threads_wait_briefly_by_themselves() -> None:
    assert waiting_of_threads() == "OpenMP's default"
    wait_briefly()
    assert waiting_of_threads() == "GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=1"


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_set_is_left(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "7")
    wait_briefly()
    assert waiting_of_threads() == f"{name}=7"


def test_it_is_set_before_torch_is_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1000 False\n"


def test_as_many_as_asked_for_compute_and_the_run_says_so(project: Path) -> None:
    short = ("--set", "max_epochs=1", "--set", "min_epochs=1", "--set", "min_positives=1")
    fit = ("fit-head", "--experts", "0", *short)
    printed = ctfm(*fit, "--out", "r", "--threads", "1", cwd=project)
    assert "computing with 1 thread (GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=1)" in printed
    machine = json.loads((project / "r" / "summary.json").read_text())["machine"]
    assert (machine["threads"], machine["threads_wait"]) == (
        1,
        "GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=1",
    )
    sweep = ("sweep", "--grid", "experts=0", *short, "--threads", "2")
    assert "computing with 2 threads" in ctfm(*sweep, cwd=project)


@pytest.mark.parametrize(
    "arguments",
    [
        ("sweep", "--grid", "experts=0", "--scheduler", "tcp://nowhere:1"),
        ("extract", "--model", "intensity", "--cluster", "local"),
    ],
)
def test_threads_are_of_this_process(project: Path, arguments: tuple[str, ...]) -> None:
    printed = ctfm(*arguments, "--threads", "2", cwd=project, code=2)
    assert "OMP_NUM_THREADS" in printed


def test_no_threads_are_wrong_usage(project: Path) -> None:
    assert "or equal to 1" in ctfm("fit-head", "--threads", "0", cwd=project, code=2)
