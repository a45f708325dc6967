"""Prediction: a finished run and the embeddings of one scan, to its findings and their slices.

All findings share one attention over the slices, so attention alone cannot tell where each of them
lies. The contributions can: slice s adds α_s Wc·h_s to the logits, and

    logit_c = bias_c + Σ_s contribution_{s, c}

holds exactly. A contribution says what the head used, not where a lesion is.

The embeddings come from the backbone and the preprocessing that `Run.store_settings` names; this
module reads no scan.

Axes: s slices, d embedding, c findings.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ctfm.heads.evaluate import untaught_findings
from ctfm.heads.runs import Run
from ctfm.store.errors import RunError


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


def predict(
    run: Run, rows: Float[Tensor, "s d"], position_mm: Float[np.ndarray, " s"]
) -> ScanPrediction:
    """Apply the head of a run to one scan, in float32 whatever the precision of the fit.

    Args:
        run: A finished run.
        rows: Embeddings of the slices, made as `run.store_settings` says.
        position_mm: Position of each slice along z in the reference frame.

    Raises:
        RunError: If there is no slice, the embeddings have another width than the head's, or are
            not finite.
    """
    if len(rows) == 0 or rows.shape[1] != run.dim:
        raise RunError(
            f"the head of {run.path} takes slices of {run.dim} numbers, at least one, and got "
            f"{tuple(rows.shape)}: embed the scan with the backbone and token of the run"
        )
    if not bool(rows.isfinite().all()):
        raise RunError("the embeddings of the scan are not all finite: embed it again")
    x = rows.float().unsqueeze(0)
    valid = torch.ones(1, len(rows), dtype=torch.bool, device=rows.device)
    head = run.head(rows.device)
    with torch.inference_mode():
        output = head.explain(x, valid)
        contributions = head.slice_contributions(x, valid)
    logits = output.logits[0].cpu()
    return ScanPrediction(
        findings=run.findings,
        logits=logits.numpy(),
        probabilities=logits.sigmoid().numpy(),
        position_mm=position_mm.astype(np.float32),
        attention=output.attention[0, 0].cpu().numpy(),
        contributions=contributions[0].cpu().numpy(),
        untaught=untaught_findings(run),
    )
