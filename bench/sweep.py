"""Claim: a sweep of 48 heads takes a small part of the time of 48 fits, or of a loop over 48 heads.

5,000 scans of train and 1,000 of validation, 40 slices each, d = 1024, 75 findings; 4 × 2 × 2 × 3
variants of experts, rank, pool and seed, all with MoLRE; two epochs with validation after each.
`sweep` runs as it is: reading the store, predicting every scan and writing 48 runs are in its time.

The baselines are those of `baselines.py`, in float32, with the parameters that ours start from, and
the same loss and rates. A fit by itself is measured for one variant of each number of experts, and
its epoch, validation included, is taken 48 times; of the loop over 48 heads a few steps are
measured and taken as often as there are steps, without any validation. Macro AUC on validation of
the measured fits has to be that of the same variants of the sweep.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import forever, literal_logits, loaded, optimizer_of, train_step
from measure import Seconds, main_with_out
from synthetic import CohortConfig, SyntheticCohort, prevalences
from torch import Tensor
from torch.utils.data import DataLoader

from ctfm.heads.config import FitConfig, Precision
from ctfm.heads.data import FitData
from ctfm.heads.grid import Grid, read_grid
from ctfm.heads.metrics import auc_per_finding
from ctfm.heads.runs import Run
from ctfm.heads.sweep import RUNS, sweep
from ctfm.store.features import FeatureStore

TRAIN, VALIDATION, SLICES, DIM, FINDINGS = 5000, 1000, 40, 1024, 75
FACTORS = ("experts=1,2,4,6", "rank=4,8", "pool=attention,mean", "seed=0:3")
EPOCHS, BATCH, WORKERS, LOOP_STEPS = 2, 256, 2, 2
NOISE = 0.02
"""How much the macro AUC may differ for another order of the data."""

Loader = DataLoader[tuple[Tensor, Tensor]]


def grid_of(precision: Precision) -> Grid:
    """The variants."""
    base = FitConfig(
        precision=precision,
        batch_size=BATCH,
        min_epochs=EPOCHS,
        max_epochs=EPOCHS,
        min_positives=2,
        repeat_threshold=0.0,
        lr_head=3e-3,
        lr_molre=1e-3,
    )
    return read_grid(FACTORS, base=base)


def seconds_of_sweep(store: FeatureStore, labels: Path, grid: Grid, out: Path) -> float:
    """Of the sweep as a user runs it."""
    started_s = time.perf_counter()
    sweep([store], labels, grid, out=out)
    return time.perf_counter() - started_s


def fit_alone(
    data: FitData, config: FitConfig, train: Loader, validation: tuple[Tensor, Tensor]
) -> tuple[list[float], float]:
    """A fit without ctfm: seconds of each epoch, and its macro AUC on validation."""
    learner = data.learner(config)
    (head,) = learner.branches
    seconds, auc = [], 0.0
    for epoch in range(EPOCHS):
        started_s = time.perf_counter()
        for step, (x, y) in enumerate(train):
            torch.autograd.backward(learner.label_loss(literal_logits(head, x), y))
            learner.step(epochs_done=epoch + step / len(train))
        with torch.inference_mode():
            parts = [literal_logits(head, x.float()) for x in _pieces(validation[0])]
        aucs = auc_per_finding(validation[1].numpy(), torch.cat(parts).numpy(), min_positives=2)
        auc = float(np.nanmean(aucs))
        seconds.append(time.perf_counter() - started_s)
    return seconds, auc


def _pieces(x: Tensor) -> list[Tensor]:
    return [x[first : first + BATCH] for first in range(0, len(x), BATCH)]


def seconds_of_loop(data: FitData, grid: Grid, train: Loader) -> list[float]:
    """Of each step of a loop over all heads."""
    learners = [data.learner(config) for config in grid.variants().values()]
    heads = [learner.branches[0] for learner in learners]
    optimizer, batches = optimizer_of(heads, rate=1e-3), forever(train)
    seconds = []
    for _ in range(LOOP_STEPS):
        started_s = time.perf_counter()
        train_step(heads, optimizer, next(batches), loss=learners[0].label_loss)
        seconds.append(time.perf_counter() - started_s)
    return seconds


def measured(configs: Grid) -> Iterator[tuple[str, FitConfig]]:
    """One variant of each number of experts."""
    for name, config in configs.variants().items():
        if config.rank == 8 and config.pool == "attention" and config.seed == 0:
            yield name, config


def cohort_of_sweep() -> SyntheticCohort:
    """Embeddings and labels at a realistic prevalence."""
    return SyntheticCohort(
        CohortConfig(
            train=TRAIN,
            validation=VALIDATION,
            test=0,
            prevalences=prevalences(FINDINGS, lowest=0.01, highest=0.3),
            dim=DIM,
            slices=SLICES,
            conflict=0.3,
        )
    )


def measure() -> dict[str, object]:
    """Seconds of the sweep in both precisions, and of the baselines."""
    cohort = cohort_of_sweep()
    rows = cohort.rows().view(-1, SLICES, DIM)
    y = torch.from_numpy(cohort.y)
    train = loaded(rows[:TRAIN], y[:TRAIN], batch=BATCH, workers=WORKERS)
    validation = (rows[TRAIN:], y[TRAIN:])
    grid = grid_of("float32")
    ours: dict[str, float] = {}
    alone: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, labels = cohort.write_store(folder)
        for precision in ("float32", "bfloat16"):
            ours[precision] = seconds_of_sweep(
                store, labels, grid_of(precision), folder / precision
            )
        data = FitData([store], labels, next(iter(grid.variants().values())))
        for variant, config in measured(grid):
            seconds, auc = fit_alone(data, config, train, validation)
            record = Run.open(folder / "float32" / RUNS / variant).epochs()[-1]
            here = record["validation_macro_auc"]
            if abs(auc - here) > NOISE:
                raise RuntimeError(f"{variant}: {auc} alone, {here} here")
            epoch = Seconds(statistics.median(seconds), seconds)
            alone[variant] = {"epoch": epoch, "macro_auc": [auc, here]}
        loop = seconds_of_loop(data, grid, train)
    count = len(grid.variants())
    epoch_s = statistics.fmean(one["epoch"].median for one in alone.values())
    total = {
        **{f"sweep_{precision}": seconds for precision, seconds in ours.items()},
        "one_after_the_other": epoch_s * EPOCHS * count,
        "loop_over_heads": statistics.median(loop) * (TRAIN // BATCH) * EPOCHS,
    }
    fast = total["one_after_the_other"] / total["sweep_bfloat16"]
    against_loop = total["loop_over_heads"] / total["sweep_float32"]
    return {
        "claim": f"{count} fits one after the other / one sweep in float32 ({fast:.1f}x in "
        f"bfloat16; {against_loop:.1f}x against a loop over all heads)",
        "ratio": total["one_after_the_other"] / total["sweep_float32"],
        "total_s": total,
        "shape": {"scans": TRAIN, "slices": SLICES, "dim": DIM, "batch": BATCH, "epochs": EPOCHS},
        "alone": alone,
        "loop_step_s": loop,
    }


if __name__ == "__main__":
    main_with_out(measure)
