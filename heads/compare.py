"""Comparison: runs and a split, to macro AUCs on the same scans and the differences between them.

All runs are judged on what they share: the scans that each has predicted, and the findings that
each could learn and that are estimable there. A difference is paired: its error comes from the
covariance of the AUCs that the same scans give two scores (DeLong et al. 1988), summed by patient.
It is the sampling error of the test scans alone. Two seeds of one head differ by more; compare
`fit-head --seeds` runs, or read the effects of a sweep.

Axes: n scans, c findings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64

from ctfm.heads.evaluate import (
    Evaluation,
    evaluate_predictions,
    labels_and_logits,
    rows_of_split,
    untaught_findings,
)
from ctfm.heads.intervals import macro_difference
from ctfm.heads.runs import Run
from ctfm.store.errors import RunError


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """One run beside the first."""

    run: Run
    evaluation: Evaluation
    """On the scans and findings that all runs share."""

    difference: float
    """Macro AUC less that of the first run."""

    difference_ci: tuple[float, float]
    """95%, paired, clustered by patient; NaN for the first run."""

    @property
    def backbone(self) -> str:
        """Of its stores."""
        return " + ".join(str(store.settings["backbone"]) for store in self.run.stores)

    @property
    def parameters(self) -> dict[str, int]:
        """Of the whole head, and of its adapter."""
        counts: dict[str, int] = self.run.summary["parameters"]
        return counts

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "run": str(self.run.path),
            "backbone": self.backbone,
            "parameters": self.parameters,
            "difference": self.difference,
            "difference_ci": None if np.isnan(self.difference_ci[0]) else self.difference_ci,
            **self.evaluation.to_json(),
        }


def compare(
    runs: Sequence[Run], *, split: str = "test", min_positives: int | None = None
) -> list[Compared]:
    """Judge runs on the scans and findings that they share.

    Args:
        runs: At least one; differences are from the first.
        split: train, validation or test.
        min_positives: Fewest positives, and fewest negatives, of a finding; None is the most that
            a run was fitted with.

    Raises:
        RunError: If they share no scan of the split or no finding, or disagree on a label.
    """
    findings = [name for name in runs[0].findings if all(name in run.findings for run in runs)]
    if not findings:
        raise RunError("these runs share no finding: compare runs that were fitted on the same")
    tables = _shared_rows(runs, split)
    _check_labels(runs, tables, findings)
    least = min_positives or max(run.config.min_positives for run in runs)
    untaught = {name: why for run in runs for name, why in untaught_findings(run).items()}
    evaluations = [
        evaluate_predictions(
            table, findings=findings, split=split, min_positives=least, untaught=untaught
        )
        for table in tables
    ]
    results = zip(*(evaluation.findings for evaluation in evaluations), strict=True)
    used = [each[0].name for each in results if all(finding.estimable for finding in each)]
    first, *others = tables
    unpaired = Compared(
        run=runs[0], evaluation=evaluations[0], difference=0.0, difference_ci=(np.nan, np.nan)
    )
    return [unpaired] + [
        _compared(run, evaluation, tables=(first, table), findings=used)
        for run, evaluation, table in zip(runs[1:], evaluations[1:], others, strict=True)
    ]


def _shared_rows(runs: Sequence[Run], split: str) -> list[pa.Table]:
    """The lines of the split that all runs have, in the same order."""
    tables = [rows_of_split(run.predictions(), split) for run in runs]
    shared = set.intersection(*(set(table["scan_id"].to_pylist()) for table in tables))
    if not shared:
        raise RunError(
            f"these runs share no scan of the split {split!r}: fit them with the same split"
        )
    wanted = pa.array(sorted(shared))
    return [
        table.filter(pc.is_in(table["scan_id"], value_set=wanted)).sort_by("scan_id")
        for table in tables
    ]


def _check_labels(runs: Sequence[Run], tables: Sequence[pa.Table], findings: Sequence[str]) -> None:
    first = labels_and_logits(tables[0], findings)[0]
    for run, table in zip(runs[1:], tables[1:], strict=True):
        labels: Float64[np.ndarray, "n c"] = labels_and_logits(table, findings)[0]
        if not np.array_equal(labels, first, equal_nan=True):
            raise RunError(
                f"{run.path} and {runs[0].path} were fitted on tables that label the same scans "
                "otherwise: fit them on one table"
            )


def _compared(
    run: Run,
    evaluation: Evaluation,
    *,
    tables: tuple[pa.Table, pa.Table],
    findings: Sequence[str],
) -> Compared:
    labels, before = labels_and_logits(tables[0], findings)
    difference, low, high = macro_difference(
        labels,
        before,
        labels_and_logits(tables[1], findings)[1],
        patients=tables[0]["patient_id"].to_pylist(),
    )
    return Compared(
        run=run, evaluation=evaluation, difference=difference, difference_ci=(low, high)
    )
