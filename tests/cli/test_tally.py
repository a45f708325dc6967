"""Off a terminal, progress is a line now and then that says what is done and what is left."""

import threading

import pytest

from ctfm.cli import tally as tally_module
from ctfm.cli.console import err, progress_bar, waiting
from ctfm.cli.tally import Tally, duration


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def tally(*, after_s: float, done: int, total: int | None, unit: str = "scans") -> Tally:
    clock = Clock()
    made = Tally("extract", unit, clock=clock, total=total)
    clock.now_s += after_s
    made.done = done
    return made


@pytest.mark.parametrize(
    ("after_s", "done", "total", "line"),
    [
        (0, 0, None, "extract: 0 scans, 0 s so far"),
        (30, 0, 5000, "extract: 0 of 5000 scans (0%), 30 s so far"),
        (
            60,
            120,
            1200,
            "extract: 120 of 1200 scans (10%), 2.0 scans/s, about 9 min left, 60 s so far",
        ),
        (
            9000,
            1000,
            5000,
            "extract: 1000 of 5000 scans (20%), 9.0 s a scan, about 10.0 h left, 2.5 h so far",
        ),
        (10, 5, 5, "extract: 5 of 5 scans (100%), 2.0 s a scan, 10 s so far"),
        (10, 0, 0, "extract: 0 of 0 scans, 10 s so far"),
        (10, 20, None, "extract: 20 scans, 2.0 scans/s, 10 s so far"),
    ],
)
def test_a_line_says_done_total_rate_and_time_left(
    after_s: float, done: int, total: int | None, line: str
) -> None:
    assert tally(after_s=after_s, done=done, total=total).line() == line


def test_a_line_says_failures_and_what_was_noted() -> None:
    made = tally(after_s=10, done=20, total=None)
    made.failed, made.note = 3, "validation macro AUC 0.812"
    assert made.line().endswith("3 failed, validation macro AUC 0.812")


def test_a_job_that_counts_nothing_says_how_long_it_takes() -> None:
    made = tally(after_s=7300, done=0, total=None, unit="")
    assert made.line() == "extract: 2.0 h so far"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")],
)
def test_a_time_is_in_the_unit_that_a_person_would_take(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that were said, at an interval that no test waits for."""
    lines: list[str] = []
    monkeypatch.setattr(tally_module, "EVERY_S", 0.001)
    monkeypatch.setattr(err, "print", lines.append)
    return lines


def wait_for_lines(lines: list[str], count: int) -> None:
    pause = threading.Event()
    for _ in range(10_000):
        if len(lines) >= count:
            return
        pause.wait(0.001)
    raise AssertionError(f"only {lines} was said")


def test_lines_come_by_themselves_also_where_nothing_gets_done(told: list[str]) -> None:
    with progress_bar("extract", "scans") as bar:
        bar.start(4)
        wait_for_lines(told, 3)
        bar.advance()
        bar.advance(failed=True)
        wait_for_lines(told, len(told) + 2)
        assert told[-1].startswith("extract: 2 of 4 scans (50%)")
        bar.set(4, 4)
    count = len(told)
    assert told[-1].startswith("extract: 4 of 4 scans (100%)")
    assert "1 failed" in told[-1]
    threading.Event().wait(0.01)
    assert len(told) == count, "none comes after the last"


def test_what_is_interrupted_says_how_far_it_came(told: list[str]) -> None:
    def extract() -> None:
        with progress_bar("extract", "scans") as bar:
            bar.set(3, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract()
    assert told[-1].startswith("extract: 3 of 10 scans (30%)")


def test_what_only_takes_time_says_so(told: list[str]) -> None:
    with waiting("verifying"):
        wait_for_lines(told, 2)
    assert told[0] == "verifying: 0 s so far"


def test_a_short_job_that_counts_nothing_says_nothing(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally_module, "EVERY_S", 1000.0)
    with waiting("verifying"):
        pass
    assert told == []
