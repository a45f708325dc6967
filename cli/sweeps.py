"""What `ctfm sweep` does with what it was asked for, and how it prints what came out."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ctfm.cli.console import note, out, print_table, progress_bar
from ctfm.cli.fit import counting
from ctfm.cli.options import typed_command
from ctfm.cli.signals import KEPT, if_interrupted

if TYPE_CHECKING:
    import pyarrow as pa

    from ctfm.heads.grid import Grid
    from ctfm.heads.sweep import Effect
    from ctfm.store.features import FeatureStore
    from ctfm.store.label_join import JoinedLabels

BEST = 10
"""Variants of the table of the best."""


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """What `ctfm sweep` was asked for."""

    stores: "Sequence[FeatureStore]"
    labels: "JoinedLabels"
    grid: "Grid"
    out: Path
    method: str
    trials: int
    device: str | None
    side_by_side: int | None
    scheduler: str | None
    memory_bytes: int | None
    plot: bool


def run_sweep(request: SweepRequest) -> None:
    """Fit what is not fitted yet, print the best variants and the effect of each factor.

    Raises:
        typer.Exit: With code 3, if a head diverged.
    """
    from ctfm.heads.search import search
    from ctfm.heads.sweep import TABLE, marginal_effects
    from ctfm.heads.sweep_figure import write_effects

    with (
        if_interrupted(KEPT),
        progress_bar(f"sweep {request.out.name}", "heads") as bar,
        _executor(request) as executor,
    ):
        table = search(
            request.stores,
            request.labels,
            request.grid,
            out=request.out,
            method=request.method,
            trials=request.trials,
            device=request.device,
            command=typed_command(),
            memory_bytes=request.memory_bytes,
            side_by_side=request.side_by_side,
            executor=executor,
            begin=bar.start,
            progress=counting(bar),
        )
    effects = marginal_effects(request.out, request.grid)
    print_best(table, request.grid)
    print_effects(effects)
    fitted, count = table["status"].to_pylist().count("ok"), len(request.grid.variants())
    if effects and fitted < count:
        note(f"{fitted} of {count} variants are fitted: what the others lack moves these means too")
    if request.plot:
        figure = request.out / "sweep.svg"
        write_effects(effects, figure)
        out.print(f"figure: {figure}")
    out.print(f"table: {request.out / TABLE}")
    if diverged := [line for line in table.to_pylist() if line["status"] == "diverged"]:
        rows = [[line["name"], line["reason"]] for line in diverged]
        print_table(f"{len(diverged)} diverged", ["variant", "reason"], rows)
        raise typer.Exit(3)


def print_best(table: "pa.Table", grid: "Grid") -> None:
    """The variants with the best validation macro AUC, which is what may choose among them."""
    fitted = [line for line in table.to_pylist() if line["status"] == "ok"]
    lines = sorted(fitted, key=lambda line: -(line["validation_macro_auc"] or 0.0))
    factors = [name for name, values in grid.factors.items() if len(values) > 1]
    header = [*factors, "validation", "test", "epochs", "parameters", "seconds"]
    rows = [
        [
            *(str(line[name]) for name in factors),
            line["validation_macro_auc"],
            line["test_macro_auc"],
            line["last_epoch"],
            f"{line['parameters']:,}",
            f"{line['seconds']:.1f}",
        ]
        for line in lines[:BEST]
    ]
    print_table(f"best of {len(lines)} by validation macro AUC", header, rows)


def print_effects(effects: "Sequence[Effect]") -> None:
    """A line each value of each factor: the mean over all others, and the spread over seeds."""
    if not effects:
        return
    rows = [
        [
            effect.factor,
            str(effect.value),
            effect.mean,
            effect.seed_sd if effect.seed_sd == effect.seed_sd else "",
            effect.variants,
        ]
        for effect in effects
    ]
    header = ["factor", "value", "validation macro AUC", "SD over seeds", "combinations"]
    print_table("each value, over all others", header, rows)


@contextmanager
def _executor(request: SweepRequest) -> Iterator[Executor | None]:
    """The workers of a Dask scheduler, or None for this process."""
    if request.scheduler is None:
        yield None
        return
    from ctfm.extract.cluster import connect

    with connect(scheduler=request.scheduler) as client:
        yield client.get_executor(retries=3)
