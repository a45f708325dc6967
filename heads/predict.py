"""Prediction: a finished run and the embeddings of one scan, to its findings and their slices.

All findings may share one attention over the slices, so attention alone cannot tell where each of
them lies. The contributions can: slice s adds α_s Wc·h_s to the logits, and

    logit_c = bias_c + Σ_s contribution_{s, c}

holds exactly. With several stores the slices of one follow those of the other; with several heads
that answer together, logits and contributions are the means of theirs.

A contribution says what the head used, not where a lesion is.

The embeddings come from the backbone and the preprocessing that `Run.stores` names; this
module reads no scan.

Axes: s slices, d embedding, c findings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ctfm.heads.evaluate import untaught_findings
from ctfm.heads.runs import Run
from ctfm.store.errors import RunError

Rows = Float[Tensor, "s d"] | Sequence[Float[Tensor, "_ _"]]
Positions = Float[np.ndarray, " s"] | Sequence[Float[np.ndarray, " _"]]


@dataclass(frozen=True, kw_only=True)
class TopSlice:
    """A slice that speaks for a finding."""

    slice_index: int
    """Row of the scan, 0 at the vertex."""

    position_mm: float
    """Along z in the reference frame."""

    attention: float
    """Its share of the attention of the scan, 0..1."""

    contribution: float
    """What it adds to the logit of the finding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanPrediction:
    """The findings of one scan, in the order of the run."""

    findings: tuple[str, ...]
    logits: Float32[np.ndarray, " c"]
    probabilities: Float32[np.ndarray, " c"]
    """Sigmoid of the logits; it ranks scans and is not calibrated."""

    position_mm: Float32[np.ndarray, " s"]
    attention: Float32[np.ndarray, " s"]
    """Of each slice, shared by all findings; sums to 1."""

    contributions: Float32[np.ndarray, "s c"]
    """What each slice adds to each logit."""

    untaught: Mapping[str, str]
    """Findings whose probability means nothing, and what the train split lacked of them."""

    def top_slices(self, finding: str, *, count: int = 3) -> tuple[TopSlice, ...]:
        """The slices that add most to the logit of a finding, the strongest first.

        Args:
            finding: Its name.
            count: Most slices returned.

        Raises:
            RunError: If the run has no such finding.
        """
        if finding not in self.findings:
            raise RunError(f"the run has no finding {finding!r}: it has {', '.join(self.findings)}")
        added = self.contributions[:, self.findings.index(finding)]
        return tuple(
            TopSlice(
                slice_index=int(index),
                position_mm=float(self.position_mm[index]),
                attention=float(self.attention[index]),
                contribution=float(added[index]),
            )
            for index in np.argsort(-added, kind="stable")[:count]
        )

    def to_json(self, *, count: int = 3) -> dict[str, Any]:
        """As plain JSON values, with the strongest slices of each finding.

        Args:
            count: Most slices of a finding.
        """
        findings = [
            {
                "name": name,
                "logit": float(logit),
                "probability": float(probability),
                "status": f"not taught: {self.untaught[name]}" if name in self.untaught else "ok",
                "top_slices": [asdict(top) for top in self.top_slices(name, count=count)],
            }
            for name, logit, probability in zip(
                self.findings, self.logits, self.probabilities, strict=True
            )
        ]
        return {
            "position_mm": self.position_mm.tolist(),
            "attention": self.attention.tolist(),
            "findings": findings,
        }


def predict(run: Run, rows: Rows, position_mm: Positions) -> ScanPrediction:
    """Apply the head of a run to one scan, in float32 whatever the precision of the fit.

    Args:
        run: A finished run.
        rows: Embeddings of the slices, made as the settings of `run.stores` say: one array, or
            one for each store.
        position_mm: Position of each slice along z in the reference frame, likewise.

    Raises:
        RunError: If there is no slice, the embeddings have another width than the head's, or are
            not finite.
    """
    by_store = [rows] if isinstance(rows, Tensor) else list(rows)
    places = [position_mm] if isinstance(position_mm, np.ndarray) else list(position_mm)
    branches = _branch_rows(run, by_store)
    valid = [torch.ones(1, one.shape[1], dtype=torch.bool, device=one.device) for one in branches]
    members = run.heads(branches[0].device)
    logits, attention, contributions = [], [], []
    with torch.inference_mode():
        for member in members:
            outputs = [
                head.explain(x, ok) for head, x, ok in zip(member, branches, valid, strict=True)
            ]
            added = [
                head.slice_contributions(x, ok)[0]
                for head, x, ok in zip(member, branches, valid, strict=True)
            ]
            logits.append(torch.stack([one.logits[0] for one in outputs]).sum(0))
            weights = [one.attention[0].mean(0) / len(member) for one in outputs]
            attention.append(torch.cat(weights))
            contributions.append(torch.cat(added))
    mean = torch.stack(logits).mean(0).cpu()
    joined = [max(places, key=len)] if len(branches) == 1 else places
    return ScanPrediction(
        findings=run.findings,
        logits=mean.numpy(),
        probabilities=mean.sigmoid().numpy(),
        position_mm=np.concatenate(joined).astype(np.float32),
        attention=torch.stack(attention).mean(0).cpu().numpy(),
        contributions=torch.stack(contributions).mean(0).cpu().numpy(),
        untaught=untaught_findings(run),
    )


def _branch_rows(
    run: Run, by_store: Sequence[Float[Tensor, "_ _"]]
) -> list[Float[Tensor, "1 _ _"]]:
    """Rows of each branch of the head.

    Raises:
        RunError: If they do not fit the head.
    """
    if len(by_store) != len(run.stores):
        raise RunError(
            f"{run.path} was fitted on {len(run.stores)} stores, got embeddings of {len(by_store)}"
        )
    if len(run.dims) == 1 and len(by_store) > 1:
        longest = max(len(one) for one in by_store)
        by_store = [torch.cat([one.expand(longest, -1) for one in by_store], 1)]
    for rows, dim in zip(by_store, run.dims, strict=True):
        if len(rows) == 0 or rows.shape[1] != dim:
            raise RunError(
                f"the head of {run.path} takes slices of {dim} numbers, at least one, and got "
                f"{tuple(rows.shape)}: embed the scan with the backbone and token of the run"
            )
        if not bool(rows.isfinite().all()):
            raise RunError("the embeddings of the scan are not all finite: embed it again")
    return [rows.float().unsqueeze(0) for rows in by_store]
