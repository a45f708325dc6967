"""Claim: experts help where the regions of the head contradict each other, and only there.

The cohorts are those of `synthetic.py`: four findings in each of six regions, and along the
direction of a finding, in the other regions, normal variation in the amount `conflict`. An expert
of rank 4 can serve the four findings of one region; a shared update of that rank, or of any rank,
must read all regions alike. Each seed draws another cohort (directions, labels, embeddings), other
first parameters and another order. All heads of a cohort are fitted side by side and judged on its
test split; which expert a slice goes to is compared with its region.

All numbers that a user would choose are at the top. The paper's learning rates are one of the
heads: in the steps that there are here they have not finished. Intervals are Student's over seeds;
those of differences are paired.
"""

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import main_with_out
from planted_figure import figure_svg
from scipy.stats import norm, t
from sklearn.metrics import adjusted_rand_score
from synthetic import SIGNAL, CohortConfig, SyntheticCohort, prevalences

from ctfm.heads.config import FitConfig
from ctfm.heads.data import FitData
from ctfm.heads.fit import Variant, fit_group
from ctfm.heads.head import Head
from ctfm.heads.metrics import auc_per_finding
from ctfm.heads.runs import Run

SEEDS = 5
TRAIN, VALIDATION, TEST, SLICES, DIM, FINDINGS, REGIONS = 6000, 1000, 2000, 12, 192, 24, 6
RANK = FINDINGS // REGIONS
EXPERTS = (0, 1, 2, 4, 6, 8)
FULL, SHORT = (0.0, 0.3), (0.1, 1.0)
"""Amounts of conflict at which all heads are fitted, and at which K = 0, 1 and 6 are."""

BASE = FitConfig(
    experts=REGIONS,
    rank=RANK,
    router_hidden=64,
    load_balance=0.01,
    lr_head=3e-3,
    lr_molre=3e-3,
    repeat_threshold=0.0,
    min_epochs=8,
    patience=4,
    max_epochs=20,
)
WHOLE, ONE, NONE = f"K={REGIONS}", "K=1", "K=0"
WIDE, MLP = f"K=1, rank {REGIONS * RANK}", f"mlp, {REGIONS * RANK} wide"
UNBALANCED, SLOW = f"{WHOLE}, load_balance 0", f"{WHOLE}, load_balance 0, the paper's rates"

HEADS = {f"K={experts}": replace(BASE, experts=experts) for experts in EXPERTS} | {
    WIDE: replace(BASE, experts=1, rank=REGIONS * RANK),
    MLP: replace(BASE, adapter="mlp"),
    UNBALANCED: replace(BASE, load_balance=0.0),
    SLOW: replace(BASE, load_balance=0.0, lr_head=1e-3, lr_molre=1e-4),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one fitted head does on the test split."""

    auc: float
    """Macro AUC."""

    rand_index: float | None
    """Adjusted Rand index of the expert with the largest share of a slice, and its region; None
    without experts to choose from."""

    best_epoch: int

    parameters: int


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95% interval."""

    mean: float
    low: float
    high: float
    raw: list[float]


def interval(raw: Sequence[float]) -> Interval:
    """Student's, over seeds; of no width for one."""
    mean = statistics.fmean(raw)
    error = statistics.stdev(raw) / math.sqrt(len(raw)) if len(raw) > 1 else 0.0
    half = float(t.ppf(0.975, len(raw) - 1)) * error if error else 0.0
    return Interval(mean=mean, low=mean - half, high=mean + half, raw=list(raw))


def cohort_of(conflict: float, *, seed: int, train: int) -> SyntheticCohort:
    """The cohort of a seed."""
    return SyntheticCohort(
        CohortConfig(
            train=train,
            validation=VALIDATION,
            test=TEST,
            prevalences=prevalences(FINDINGS, lowest=0.1, highest=0.3),
            dim=DIM,
            slices=SLICES,
            regions=REGIONS,
            conflict=conflict,
            seed=seed,
        )
    )


def fitted(
    cohort: SyntheticCohort, heads: Mapping[str, FitConfig], *, seed: int
) -> dict[str, Result]:
    """Fit heads side by side on a cohort and judge them on its test split."""
    configs = [replace(config, seed=seed, order_seed=seed) for config in heads.values()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, labels = cohort.write_store(folder)
        data = FitData([store], labels, configs[0])
        variants = [
            Variant(config=config, out=folder / f"run{index}")
            for index, config in enumerate(configs)
        ]
        fit_group(data, variants)
        runs = [Run.open(variant.out) for variant in variants]
        return dict(zip(heads, judged(runs, cohort), strict=True))


def judged(runs: Sequence[Run], cohort: SyntheticCohort) -> list[Result]:
    """What each run does on the test split, which is the end of a cohort."""
    rows = cohort.rows().view(-1, SLICES, DIM)[-TEST:].float()
    regions = cohort.regions[-TEST * SLICES :]
    return [_judged(run, rows, labels=cohort.y[-TEST:], regions=regions) for run in runs]


def _judged(run: Run, rows: torch.Tensor, *, labels: np.ndarray, regions: np.ndarray) -> Result:
    head: Head = run.head()
    with torch.inference_mode():
        output = head.explain(rows, torch.ones(rows.shape[:2], dtype=torch.bool))
    expert = output.routing.flatten(0, 1)
    several = expert.shape[1] > 1
    epochs = run.epochs()
    return Result(
        auc=float(np.mean(auc_per_finding(labels, output.logits.numpy()))),
        rand_index=float(adjusted_rand_score(regions, expert.argmax(1))) if several else None,
        best_epoch=max(epochs, key=lambda epoch: epoch["validation_macro_auc"])["epoch"],
        parameters=sum(parameter.numel() for parameter in head.parameters()),
    )


def level(conflict: float, *, seeds: int, train: int) -> dict[str, list[Result]]:
    """The results of all heads at one amount of conflict, seed by seed."""
    short = conflict in SHORT
    heads = {name: HEADS[name] for name in (NONE, ONE, WHOLE)} if short else HEADS
    results: dict[str, list[Result]] = {name: [] for name in heads}
    for seed in range(seeds):
        cohort = cohort_of(conflict, seed=seed, train=train)
        for name, result in fitted(cohort, heads, seed=seed).items():
            results[name].append(result)
        print(f"conflict {conflict}, seed {seed}: {WHOLE} {results[WHOLE][-1].auc:.4f}", flush=True)
    return results


def difference(results: Mapping[str, Sequence[Result]], name: str, other: str) -> Interval:
    """Macro AUC of one head minus that of another, in points, paired by seed."""
    pairs = zip(results[name], results[other], strict=True)
    return interval([100 * (one.auc - two.auc) for one, two in pairs])


def differences(results: Mapping[str, Sequence[Result]]) -> dict[str, Interval]:
    """Every comparison that the claim is made of, where both heads were fitted."""
    pairs = [(WHOLE, name) for name in (NONE, ONE, "K=4", WIDE, MLP, UNBALANCED, SLOW)]
    pairs += [("K=8", WHOLE), (ONE, NONE)]
    return {
        f"{name} minus {other}": difference(results, name, other)
        for name, other in pairs
        if name in results and other in results
    }


def summary(results: Mapping[str, Sequence[Result]]) -> dict[str, object]:
    """All about one amount of conflict."""
    heads = {}
    for name, own in results.items():
        found = [one.rand_index for one in own if one.rand_index is not None]
        heads[name] = {
            "macro_auc": interval([one.auc for one in own]),
            "rand_index": interval(found) if found else None,
            "best_epoch": [one.best_epoch for one in own],
            "parameters": own[0].parameters,
        }
    return {"heads": heads, "points": differences(results)}


def shared_readout(conflict: float) -> float:
    """AUC of a linear read-out of the evenly pooled scan, with endless scans to learn from."""
    spread = math.sqrt(2 * (1 + (REGIONS - 1) * conflict))
    return float(norm.cdf(SIGNAL / spread))


def measure(*, seeds: int = SEEDS, train: int = TRAIN) -> dict[str, object]:
    """Macro AUC and routing of every head at every amount of conflict."""
    levels = {
        conflict: level(conflict, seeds=seeds, train=train) for conflict in sorted(FULL + SHORT)
    }
    planted = levels[FULL[-1]]
    gain = difference(planted, WHOLE, ONE)
    wrong = [1 - statistics.fmean(one.auc for one in planted[name]) for name in (ONE, WHOLE)]
    return {
        "claim": f"pairs in the wrong order with K = 1 / with K = {REGIONS} "
        f"({gain.mean:+.1f} points of macro AUC, {gain.low:.1f} to {gain.high:.1f})",
        "ratio": wrong[0] / wrong[1],
        "cohort": asdict(cohort_of(FULL[-1], seed=0, train=train).config),
        "fit": {name: config.as_dict() for name, config in HEADS.items()},
        "seeds": seeds,
        "threads": torch.get_num_threads(),
        "own_region_auc": float(norm.cdf(SIGNAL / math.sqrt(2))),
        "shared_readout_auc": {str(conflict): shared_readout(conflict) for conflict in levels},
        "conflict": {str(conflict): summary(results) for conflict, results in levels.items()},
    }


def draw(record: Mapping[str, Any]) -> str:
    """The figure of a record."""
    controls = {
        WIDE: f"K = 1\nrank {REGIONS * RANK}",
        MLP: "mlp",
        UNBALANCED: f"K = {REGIONS}\nnot\nbalanced",
    }
    return figure_svg(record, experts=EXPERTS, controls=controls, at=str(FULL[-1]))


if __name__ == "__main__":
    main_with_out(measure, draw=draw)
