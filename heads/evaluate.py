"""Evaluation: the predictions of a run on one split, to AUCs with intervals and their summary.

A finding with too few positives or negatives, or with none of either to learn from in train, keeps
its line, with a status that says so: it is never 0, never left out in silence, and never part of a
mean. Two spreads of the macro AUC go by
two names: `sd_across_findings`, the paper's ±, says how much findings differ; `macro_ci` how far
the cohort's size leaves the mean uncertain. Two runs are compared in `compare`, not by these.

Axes: n scans, c findings.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64

from ctfm.heads.config import FitConfig
from ctfm.heads.intervals import auc_intervals
from ctfm.heads.metrics import average_precision_per_finding
from ctfm.heads.runs import Run, json_text
from ctfm.store.errors import RunError
from ctfm.store.findings import Findings, load_findings

FEW_POSITIVES = 20
"""Below it an AUC is shown, with its interval, and nothing is claimed from it."""

OTHER = "other"
"""Category of a finding that the taxonomy lacks."""


@dataclass(frozen=True, kw_only=True)
class FindingResult:
    """What the split says on one finding."""

    name: str
    display: str
    category: str
    """Name of its category; `other` if the taxonomy lacks the finding."""
    n: int
    """Scans whose label is known."""
    n_positive: int
    auc: float
    """NaN where not estimable, as the four below."""
    ci_low: float
    """95%: the wider of the logit-DeLong and the Newcombe interval, clustered by patient."""
    ci_high: float
    average_precision: float
    prevalence: float
    """Share of positives among `n`: the average precision of a score that knows nothing."""
    status: str
    """`ok`, or why there is no AUC."""

    @property
    def estimable(self) -> bool:
        """Whether there is an AUC."""
        return self.status == "ok"

    @property
    def few_positives(self) -> bool:
        """Whether the AUC rests on too few positives to claim anything from it."""
        return self.estimable and self.n_positive < FEW_POSITIVES


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the split says on all findings."""

    split: str
    min_positives: int
    """Fewest positives, and fewest negatives, of an estimable finding."""
    n_scans: int
    n_patients: int
    findings: tuple[FindingResult, ...]
    """In the order of the head."""
    categories: dict[str, str]
    """Display name of each category that occurs, in the order of the taxonomy."""
    macro_auc: float
    """Mean AUC of the estimable findings; NaN without any."""
    macro_ci: tuple[float, float]
    """95%, clustered by patient, with all correlations between findings."""
    sd_across_findings: float
    """Of the AUCs of the estimable findings; the paper's ±."""
    macro_average_precision: float

    @property
    def findings_used(self) -> int:
        """Findings that enter the means."""
        return sum(finding.estimable for finding in self.findings)

    @property
    def findings_not_estimable(self) -> int:
        """Findings that no mean includes."""
        return len(self.findings) - self.findings_used

    @property
    def auc_at_least_090(self) -> int:
        """Findings with an AUC of 0.90 or more."""
        return sum(finding.auc >= 0.90 for finding in self.findings)

    @property
    def auc_080_to_090(self) -> int:
        """Findings with an AUC of 0.80 or more, but less than 0.90."""
        return sum(0.80 <= finding.auc < 0.90 for finding in self.findings)

    @property
    def ci_low_at_least_090(self) -> int:
        """Findings whose whole interval lies at 0.90 or more: what the first count can claim."""
        return sum(finding.ci_low >= 0.90 for finding in self.findings)

    def headline(self) -> dict[str, str]:
        """The summary for people: what, and its value as text."""
        low, high = self.macro_ci
        no_auc = f"none of {len(self.findings)} findings is estimable"
        return {
            "macro AUC": f"{self.macro_auc:.3f}" if self.findings_used else no_auc,
            "95% CI, clustered by patient": f"{low:.3f}–{high:.3f}" if self.findings_used else "–",
            "SD across findings": number(self.sd_across_findings),
            "findings used": f"{self.findings_used} of {len(self.findings)}",
            "not estimable": str(self.findings_not_estimable),
            "AUC ≥ 0.90": f"{self.auc_at_least_090} (whole CI: {self.ci_low_at_least_090})",
            "AUC 0.80–0.90": str(self.auc_080_to_090),
            f"{self.split} scans": f"{self.n_scans} of {self.n_patients} patients",
        }

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; a number that is not estimable is null."""
        values = asdict(self) | {
            "findings_used": self.findings_used,
            "findings_not_estimable": self.findings_not_estimable,
            "auc_at_least_090": self.auc_at_least_090,
            "auc_080_to_090": self.auc_080_to_090,
            "ci_low_at_least_090": self.ci_low_at_least_090,
        }
        plain: dict[str, Any] = json.loads(json_text(values))
        return plain


def evaluate(
    run: Run | Path | str, *, split: str = "test", min_positives: int | None = None
) -> Evaluation:
    """Evaluate a finished run on one split.

    Args:
        run: The run or its folder.
        split: train, validation or test.
        min_positives: Fewest positives, and fewest negatives, of an estimable finding; None is
            what the run was fitted with.

    Raises:
        RunError: If the run is missing or unfinished, or has no scan in that split.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    return evaluate_predictions(
        opened.predictions(),
        findings=opened.findings,
        split=split,
        min_positives=opened.config.min_positives if min_positives is None else min_positives,
        untaught=untaught_findings(opened),
    )


def untaught_findings(run: Run) -> dict[str, str]:
    """Findings that a run could not learn, and what its train split lacked of them."""
    about = run.summary.get("findings", {})
    return {
        name: _lacking(counts["positives"])
        for name, counts in about.items()
        if not counts["taught"]
    }


def _lacking(positives: Mapping[str, int]) -> str:
    if "train" not in positives:  # folds, each of which has its own
        return "no positive, or no negative, in train of a fold"
    return f"no {'negative' if positives['train'] else 'positive'} in train"


def evaluate_predictions(
    predictions: pa.Table,
    *,
    findings: Sequence[str],
    split: str = "test",
    min_positives: int = FitConfig.min_positives,
    untaught: Mapping[str, str] | None = None,
    taxonomy: Findings | None = None,
) -> Evaluation:
    """Evaluate a table of predictions; scans are ranked by logit, as probabilities round to ties.

    Args:
        predictions: patient_id, split, and `logit_` and `label_` of each finding.
        findings: Their names, in the order of the result.
        split: train, validation or test.
        min_positives: Fewest positives, and fewest negatives, of an estimable finding.
        untaught: From `untaught_findings`; these are not estimable.
        taxonomy: Gives display names and categories; None is the packaged one.

    Raises:
        RunError: If no scan is in that split.
    """
    table = rows_of_split(predictions, split)
    labels, scores = labels_and_logits(table, findings)
    taxonomy = load_findings() if taxonomy is None else taxonomy
    lacks = untaught or {}
    scores[:, [name in lacks for name in findings]] = math.nan  # estimable to no metric
    patients = table["patient_id"].to_pylist()
    interval = auc_intervals(labels, scores, patients=patients, min_positives=min_positives)
    precision = average_precision_per_finding(labels, scores, min_positives=min_positives)
    used = ~np.isnan(interval.auc)
    results = tuple(
        _finding_result(
            name,
            labels=labels[:, c],
            values=(interval.auc[c], interval.low[c], interval.high[c], precision[c]),
            lacks=lacks.get(name, ""),
            min_positives=min_positives,
            taxonomy=taxonomy,
        )
        for c, name in enumerate(findings)
    )
    return Evaluation(
        split=split,
        min_positives=min_positives,
        n_scans=table.num_rows,
        n_patients=len(set(patients)),
        findings=results,
        categories=_categories(results, taxonomy),
        macro_auc=interval.macro_auc,
        macro_ci=(interval.macro_low, interval.macro_high),
        sd_across_findings=float(interval.auc[used].std(ddof=1)) if used.sum() > 1 else math.nan,
        macro_average_precision=float(precision[used].mean()) if used.any() else math.nan,
    )


def rows_of_split(table: pa.Table, split: str) -> pa.Table:
    """The lines of one split.

    Raises:
        RunError: If there is none.
    """
    rows = table.filter(pc.equal(table["split"], split))
    if rows.num_rows == 0:
        present = ", ".join(sorted(set(table["split"].to_pylist()) - {None, ""})) or "none"
        raise RunError(f"no scan of this run is in the split {split!r}: it has {present}")
    return rows


def labels_and_logits(
    table: pa.Table, findings: Sequence[str]
) -> tuple[Float64[np.ndarray, "n c"], Float64[np.ndarray, "n c"]]:
    """Labels (NaN where unknown) and logits of a table of predictions."""
    return _stacked(table, "label", findings), _stacked(table, "logit", findings)


def number(value: float, digits: int = 3) -> str:
    """A number as text; a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _stacked(table: pa.Table, prefix: str, findings: Sequence[str]) -> Float64[np.ndarray, "n c"]:
    columns = np.empty((table.num_rows, len(findings)))
    for c, name in enumerate(findings):
        column = table[f"{prefix}_{name}"].cast(pa.float64())
        columns[:, c] = column.fill_null(math.nan).to_numpy()
    return columns


def _finding_result(
    name: str,
    *,
    labels: Float64[np.ndarray, " n"],
    values: tuple[float, float, float, float],
    lacks: str,
    min_positives: int,
    taxonomy: Findings,
) -> FindingResult:
    positives, negatives = int((labels == 1).sum()), int((labels == 0).sum())
    known = positives + negatives
    finding = taxonomy.get(name)
    auc, low, high, precision = (float(value) for value in values)
    return FindingResult(
        name=name,
        display=taxonomy.display(name),
        category=finding.category if finding else OTHER,
        n=known,
        n_positive=positives,
        auc=auc,
        ci_low=low,
        ci_high=high,
        average_precision=precision,
        prevalence=positives / known if known else math.nan,
        status=_status(
            auc, positives=positives, negatives=negatives, least=min_positives, lacks=lacks
        ),
    )


def _status(auc: float, *, positives: int, negatives: int, least: int, lacks: str) -> str:
    if not math.isnan(auc):
        return "ok"
    if lacks:
        return f"not estimable: {lacks}"
    if positives < max(least, 1):
        return f"not estimable: {positives} positive{'s' * (positives != 1)}"
    if negatives < max(least, 1):
        return f"not estimable: {negatives} negative{'s' * (negatives != 1)}"
    return "not estimable: a score is not a number"


def _categories(results: Sequence[FindingResult], taxonomy: Findings) -> dict[str, str]:
    present = {result.category for result in results}
    known = {name: display for name, display in taxonomy.categories.items() if name in present}
    return known | ({OTHER: "Other"} if OTHER in present - known.keys() else {})
