"""Summaries: a finished fit, to what `summary.json` says of it.

Axes: n scans, c findings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from ctfm.heads.cohort import taught_findings
from ctfm.heads.data import FitData
from ctfm.heads.head import Head
from ctfm.heads.learner import Learner
from ctfm.heads.metrics import auc_per_finding
from ctfm.heads.outputs import ScanOutputs
from ctfm.heads.sampling import repeat_effect
from ctfm.store.splits import SPLITS


def summary_of(data: FitData, learner: Learner, outputs: ScanOutputs) -> dict[str, Any]:
    """What `summary.json` says of a fit."""
    cohort, best = data.cohort, learner.best
    patients = cohort.scans["patient_id"].to_numpy()
    lines: dict[str, Int64[np.ndarray, " _"]] = {split: cohort.lines(split) for split in SPLITS}
    macro = {
        split: macro_auc(data, outputs.logits, lines[split]) for split in ("validation", "test")
    }
    sizes = [parameter.numel() for branch in learner.judged for parameter in branch.parameters()]
    return {
        "labels": {
            "digest": cohort.labels.digest,
            "unmatched_scans": cohort.labels.unmatched_scans.count,
            "unmatched_labels": cohort.labels.unmatched_labels.count,
        },
        "scans": {split: len(chosen) for split, chosen in lines.items()},
        "patients": {split: len(set(patients[chosen])) for split, chosen in lines.items()},
        "best_epoch": best.epoch,
        "last_epoch": learner.records[-1].epoch,
        "macro_auc": {split: mean for split, (mean, _) in macro.items()},
        "macro_findings": {split: count for split, (_, count) in macro.items()},
        "repeats": _repeats(data),
        "parameters": {"head": sum(sizes), "adapter": _adapter_size(learner.judged)},
        "findings": _about_findings(data, learner, lines),
    }


def macro_auc(
    data: FitData, logits: Float32[np.ndarray, "n c"], lines: Int64[np.ndarray, " lines"]
) -> tuple[float, int]:
    """Mean over the estimable findings that train has taught, NaN if none; their number."""
    least = data.config.min_positives
    aucs = auc_per_finding(data.cohort.y[lines], logits[lines], min_positives=least)
    known = aucs[np.isfinite(aucs) & taught_findings(data.cohort)]
    return (float(known.mean()) if known.size else float("nan")), known.size


def _repeats(data: FitData) -> dict[str, float]:
    effect = repeat_effect(data.cohort.y[data.train], threshold=data.threshold)
    return {
        "threshold": effect.threshold,
        "growth": effect.growth,
        "repeated": effect.repeated,
        "expected_visits": float(data.factors.sum()),
    }


def _adapter_size(branches: Sequence[Head]) -> int:
    modules = [module for head in branches for module in (head.molre, head.adapter) if module]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _about_findings(
    data: FitData, learner: Learner, lines: Mapping[str, Int64[np.ndarray, " lines"]]
) -> dict[str, Any]:
    """What each finding had to learn from; a finding that could not is said to be so here."""
    labels = {split: data.cohort.y[chosen] for split, chosen in lines.items()}
    taught = taught_findings(data.cohort)
    return {
        finding: {
            "positives": {split: int((y[:, c] == 1).sum()) for split, y in labels.items()},
            "negatives": {split: int((y[:, c] == 0).sum()) for split, y in labels.items()},
            "prevalence": float(data.prevalence[c]),
            "alpha_positive": float(learner.weights.positive[c]),
            "alpha_negative": float(learner.weights.negative[c]),
            "taught": bool(taught[c]),
            "selects_epoch": bool(data.selecting[c]),
        }
        for c, finding in enumerate(data.cohort.findings)
    }
