"""Kills between two publications, by a fault that is injected: not by luck."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ctfm.store import files


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


@contextmanager
def killed_before(n: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Nothing is published from the n-th publication on (from 0); names of what was until then."""
    published: list[str] = []
    real = files._publish

    def publish(path: Path, *arguments: object, **options: object) -> bool:
        if len(published) == n:
            raise Killed
        published.append(Path(path).name)
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(files, "_publish", publish)
        yield published


def windows(
    command: Callable[[Path], object],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    prepare: Callable[[Path], object] = lambda place: None,
) -> Iterator[tuple[str, Path]]:
    """What a command leaves when it is killed before each of its publications.

    Args:
        command: Writes below the place that it is given.
        folder: Where the places are made.
        monkeypatch: Of the test.
        prepare: Makes what lies at a place before.

    Yields:
        Name of what was published last, and the place; at the end `""` and the place of a command
        that ended.
    """
    n = 0
    while True:
        place = folder / f"killed-before-{n}" / "out"
        place.parent.mkdir(parents=True)
        prepare(place)
        try:
            with killed_before(n, monkeypatch) as published:
                command(place)
        except Killed:
            yield (published or ["nothing"])[-1], place
            n += 1
            continue
        assert n == len(published)
        yield "", place
        return


def contents(place: Path) -> dict[str, bytes]:
    """Every file at or below a place, but for what a dead writer left unpublished."""
    return {
        os.path.relpath(file, place): file.read_bytes()
        for file in ([place] if place.is_file() else sorted(place.rglob("*")))
        if file.is_file() and not file.name.endswith(files.PARTIAL_SUFFIX)
    }
