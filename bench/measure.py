"""What the benches share: timings taken in turn, and results with command and machine."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from ctfm.store.provenance import machine, versions


@dataclass(frozen=True)
class Seconds:
    """Timings of one variant."""

    median: float
    raw: list[float]


def median_seconds(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """Time every variant once a round, so that a busy moment hits them alike.

    `clock` is `time.process_time` where seconds of one core are asked for.
    """
    for _ in range(warm_up):
        for run in variants.values():
            run()
    raw: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = clock()
            run()
            raw[name].append(clock() - start)
    return {name: Seconds(statistics.median(s), s) for name, s in raw.items()}


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"JSON cannot hold a {type(value).__name__}")


def main_with_out(
    measure: Callable[..., dict[str, object]],
    *,
    draw: Callable[[dict[str, Any]], str] | None = None,
    parts: Sequence[str] = (),
) -> None:
    """Measure, print the ratio, and write the record if `--out` is given.

    Args:
        measure: The bench; its record has a `claim` and a `ratio`.
        draw: Makes an SVG of the record, which is written if `--figure` is given.
        parts: What a long bench consists of; `measure` gets those that are asked for.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    if draw is not None:
        parser.add_argument("--figure", type=Path, help="SVG file for the figure")
    if parts:
        parser.add_argument("--only", choices=parts, nargs="+", default=parts, help="parts to run")
    options = parser.parse_args()
    out, figure = options.out, getattr(options, "figure", None)
    record = {
        **(measure(options.only) if parts else measure()),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(),
    }
    text = json.dumps(record, indent=1, default=_plain)
    print(f"{Path(sys.argv[0]).stem}: {record['claim']}: {record['ratio']:.2f}x")
    if out is not None:
        out.write_text(text + "\n")
    if draw is not None and figure is not None:
        figure.write_text(draw(json.loads(text)))
