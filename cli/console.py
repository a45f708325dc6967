r"""What every command prints with: the console, tables, and a progress bar that counts failures.

Names of files and messages are printed as they are: nothing in them is markup or an emoji, and no
line is folded, so that a path can be copied. Where a part is to be coloured, it is a `Text`. A name
from a file may hold control characters, with which a terminal can be made to show, hide or type
anything: they are printed as `\x1b`. What the encoding of standard output lacks is in its words.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ctfm.cli.characters import plain
from ctfm.cli.tally import Tally, told_in_lines

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""All but tab and newline, and what turns the direction of the text around it."""


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_shown, objects), **options)


out = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
"""What a command is asked for."""
err = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)
"""Progress, notes and errors."""


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns whose cells are all numbers are set flush right."""
    cells = [["" if cell is None else _text(cell) for cell in row] for row in rows]
    table = Table(
        title=_escaped(title), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for i, name in enumerate(header):
        numbers = all(_is_number(row[i]) for row in cells)
        table.add_column(
            _escaped(name), justify="right" if numbers else "left", overflow="fold", no_wrap=i == 0
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table, soft_wrap=False)


def note(text: str) -> None:
    """Say on standard error what the user may want to know."""
    err.print(Text.assemble(("note: ", "yellow"), text))


def _shown(printed: Any) -> Any:
    """Text without control characters; anything else as it is."""
    if isinstance(printed, str):
        return _escaped(printed)
    if isinstance(printed, Text) and _CONTROL.search(printed.plain):
        return Text(_escaped(printed.plain), style=printed.style)
    return printed


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], plain(text, out.encoding))


def _text(cell: object) -> str:
    if not isinstance(cell, float):
        return _escaped(str(cell))
    return _escaped("–") if math.isnan(cell) else f"{cell:.3f}"


def _is_number(cell: str) -> bool:
    return cell == "" or cell.replace(",", "").replace(".", "").lstrip("-−").isdigit()


class _Rate(ProgressColumn):
    """Finished a second, as the mean over the run."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / max(task.elapsed or 0, 1e-9):.1f} {self._unit}/s")


@dataclass
class Bar:
    """Progress in use: set `total` when it is known, then `advance`."""

    tally: Tally
    drawn: Progress | None
    """None where there is no terminal."""

    def start(self, total: int) -> None:
        self.set(self.tally.done, total)

    def set(self, done: int, total: int) -> None:
        self.tally.done, self.tally.total = done, total
        self._draw()

    def advance(self, n: int = 1, *, failed: bool = False, note: str = "") -> None:
        self.tally.done += n
        self.tally.failed += failed
        self.tally.note = note
        self._draw()

    def _draw(self) -> None:
        if self.drawn is not None:
            self.drawn.update(
                self.drawn.task_ids[0],
                completed=self.tally.done,
                total=self.tally.total,
                failures=f"{self.tally.failed} failed" if self.tally.failed else "",
                note=plain(self.tally.note, err.encoding),
            )


def _draws() -> bool:
    return err.is_terminal and not err.is_dumb_terminal


@contextmanager
def waiting(text: str) -> Iterator[Status | None]:
    """Say on standard error what is going on, while the block runs; what is drawn, if it is."""
    if _draws():
        with err.status(Text(plain(text, err.encoding))) as drawn:
            yield drawn
    else:
        with told_in_lines(Tally(text, unit=""), err.print):
            yield None


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Bar]:
    """Show count, rate, time left and failures so far, on standard error.

    On a terminal as a bar; elsewhere as a line every half a minute and one at the end.
    """
    tally = Tally(label, unit)
    if not _draws():
        with told_in_lines(tally, err.print):
            yield Bar(tally, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failures]}", style="red"),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err) as progress:
        progress.add_task(plain(label, err.encoding), total=None, failures="", note="")
        yield Bar(tally, progress)
