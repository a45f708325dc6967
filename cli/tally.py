"""Tally: from what is done of a job, to a line every half a minute where there is no terminal.

A log of a cluster job shows no bar: without lines, a job of hours and one that hangs look alike.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

EVERY_S = 30.0
"""Between two lines."""


@dataclass
class Tally:
    """What is done of a job."""

    label: str
    unit: str
    """In the plural, such as scans; "" if nothing is counted."""
    clock: Callable[[], float] = time.monotonic
    total: int | None = None
    done: int = 0
    failed: int = 0
    note: str = ""
    start_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.start_s = self.clock()

    def line(self) -> str:
        """Done, total, rate, time left, failures so far, in words."""
        elapsed_s = self.clock() - self.start_s
        parts = [self._count(), *self._pace(elapsed_s)] if self.unit else []
        parts.append(f"{duration(elapsed_s)} so far")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.note:
            parts.append(self.note)
        return f"{self.label}: {', '.join(parts)}"

    def _count(self) -> str:
        if self.total is None:
            return f"{self.done} {self.unit}"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.done} of {self.total} {self.unit}{share}"

    def _pace(self, elapsed_s: float) -> Iterator[str]:
        if not self.done or elapsed_s <= 0:
            return
        rate = self.done / elapsed_s
        one = self.unit.removesuffix("s")
        yield f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s a {one}"
        if self.total is not None and self.done < self.total:
            yield f"about {duration((self.total - self.done) / rate)} left"


def duration(seconds: float) -> str:
    """A time in the unit that a person would take."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 2:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


@contextmanager
def told_in_lines(tally: Tally, say: Callable[[str], None]) -> Iterator[None]:
    """Say a line every `EVERY_S`, also where nothing gets done, and one of counts at the end.

    Args:
        tally: Read by another thread; a number that is one step old does no harm.
        say: Prints a line.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(EVERY_S):
            say(tally.line())

    teller = threading.Thread(target=run, name="ctfm-tally", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        if tally.unit:
            say(tally.line())
