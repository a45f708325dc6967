"""Ctrl-C and SIGTERM end a command in order, and it says what is true of what was done."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from commands import ctfm

from ctfm.cli import app
from ctfm.cli.signals import KEPT, RUN_AGAIN, Terminated, if_interrupted, terminated_in_order

SIZE = ("--matrix", "64", "--slices", "12")
MANY = ("phantom", "--scans", "5000", "--out", "cohort", *SIZE, "--workers", "2")
PROGRAM = """
import fcntl, os, sys, termios
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ctfm.cli.app import main
if __name__ == "__main__":
    main()
"""


def ended(command: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command."""
    made = typer.Typer()
    made.command()(command)
    monkeypatch.setattr(app, "app", made)
    monkeypatch.setattr("sys.argv", ["ctfm"])
    with pytest.raises(SystemExit) as end:
        app.main()
    return end.value.code


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("it goes on after SIGTERM")


@pytest.mark.parametrize(
    ("end", "code", "said"), [(interrupt, 130, "interrupted"), (terminate, 143, "terminated")]
)
def test_an_end_says_what_is_kept(
    end: Callable[[], None],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def kept() -> None:
        with if_interrupted(KEPT):
            end()

    assert ended(kept, monkeypatch) == code
    assert capsys.readouterr().err == f"{said}: {KEPT}\n"
    assert ended(end, monkeypatch) == code
    assert capsys.readouterr().err == f"{said}: {RUN_AGAIN}\n"


def test_an_exit_that_no_interruption_caused_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise typer.Exit(3)

    assert ended(fail, monkeypatch) == 3


def test_a_second_sigterm_does_not_disturb_the_end() -> None:
    tidied = []

    def end() -> None:
        with terminated_in_order():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                tidied.append("up")

    with pytest.raises(Terminated):
        end()
    assert tidied == ["up"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_who_ignores_sigterm_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminated_in_order():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_index_says_that_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    ctfm("phantom", "--scans", "2", "--out", "cohort", *SIZE, "--workers", "1", cwd=tmp_path)
    ctfm("index", "cohort", "--workers", "1", cwd=tmp_path)
    before = (tmp_path / "scans.parquet").read_bytes()
    monkeypatch.setattr("ctfm.cli.console.Bar.set", lambda *_: interrupt())
    printed = ctfm("index", "cohort", "--workers", workers, cwd=tmp_path, code=130)
    assert "interrupted: nothing was kept, and scans.parquet is as it was" in printed
    assert (tmp_path / "scans.parquet").read_bytes() == before


def studies(folder: Path) -> int:
    return sum(not path.name.startswith(".") for path in (folder / "cohort").glob("*/*"))


def wait_for_studies(process: subprocess.Popen[bytes], folder: Path) -> None:
    while not studies(folder):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)


def nobody_is_left(group: int) -> bool:
    """Whether the processes of a group end, multiprocessing's own helper a little later."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_sigterm_to_every_process_of_a_job_ends_it_in_order(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "ctfm"), *MANY],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for_studies(process, tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    *_, count, said = printed.decode().splitlines()
    assert count.startswith("phantom: ")
    assert " of 5000 scans" in count
    kept = "what was made stays in cohort: remove it, and run the same command again"
    assert said == f"terminated: {kept}"
    assert nobody_is_left(process.pid)


def test_ctrl_c_on_a_terminal_ends_a_command_whose_progress_is_drawn(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x28\x00\xa0\x00\x00\x00\x00\x00")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *MANY],
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "ascii"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    wait_for_studies(process, tmp_path)
    os.write(ours, b"\x03")
    printed = b""
    while True:
        try:
            printed += os.read(ours, 65536)
        except OSError:  # the last process has closed its end
            break
    os.close(ours)
    assert process.wait(60) == 130, printed
    assert b"interrupted: what was made stays in cohort" in printed
    assert b"/5000" in printed
    assert b"\x1b[" in printed
    assert printed.isascii()
    assert b"Traceback" not in printed


@pytest.mark.slow
def test_an_extraction_that_is_terminated_loses_no_scan(tmp_path: Path) -> None:
    cohort = ("phantom", "--scans", "40", "--out", "cohort", "--matrix", "96", "--workers", "2")
    ctfm(*cohort, cwd=tmp_path)
    ctfm("index", "cohort", "--workers", "2", cwd=tmp_path)
    extract = ("extract", "--model", "intensity", "--workers", "2")
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "ctfm"), *extract],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    store = tmp_path / "features" / "intensity"
    while not list(store.glob("commits/*")):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    assert printed.decode().splitlines()[-1] == f"terminated: {KEPT}"
    assert nobody_is_left(process.pid)
    assert "reader_crashed" not in ctfm("store", "info", str(store), cwd=tmp_path)
    assert "reader_crashed" not in ctfm(*extract, cwd=tmp_path)
    assert "as it was written" in ctfm("store", "verify", str(store), cwd=tmp_path)
