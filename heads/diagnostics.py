"""Diagnostics: the routing of a fitted MoLRE, to what its experts do and whether they differ.

With p the mean routing of the scans (slices weighted by attention) and g that of a slice,

    load entropy      H(p) / ln K               1: all experts are used alike
    routing entropy   E[H(g)] / ln K            1: every slice uses all alike
    information       their difference          0: the router tells slices nothing apart

`information` is the mutual information of slice and expert, as a share of ln K. A mixture whose
router is not used is one averaged LoRA; one that has collapsed onto an expert is a plain LoRA.

Axes: n scans, k experts, c findings, d embedding, r rank.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ctfm.heads.data import FitData
from ctfm.heads.head import Head
from ctfm.heads.metrics import auc_per_finding
from ctfm.heads.molre import MoLRE
from ctfm.heads.outputs import ScanOutputs, logits_of

COLLAPSED_LOAD = 0.8
"""One expert that takes a larger share has taken over."""

FEWEST_EFFECTIVE = 1.5

LEAST_INFORMATION = 0.01

MOST_ALIKE = 0.95
"""Experts whose updates have a larger cosine do the same."""


@dataclass(frozen=True, kw_only=True)
class RoutingDiagnostics:
    """What the experts of one MoLRE do."""

    load: list[float]
    """p: share of the routing that each expert gets."""

    load_entropy: float
    routing_entropy: float
    information: float

    effective_experts: float
    """exp H(p), from 1 to K."""

    lift: dict[str, list[float]]
    """Of each finding with positives and negatives, for each expert the logarithm of its mean share
    in scans with the finding over that in scans without."""

    knock_out: list[float]
    """Macro AUC on validation without each expert, minus that of the whole head."""

    similarity: list[list[float]]
    """Cosine of the updates B_i A_i of each two experts."""

    warnings: list[str]
    """Plain sentences; none if nothing looks wrong."""


def diagnose(data: FitData, branches: Sequence[Head], outputs: ScanOutputs) -> list[dict[str, Any]]:
    """Diagnostics of each branch that has two experts or more, as plain values.

    Args:
        data: Where the scans are from.
        branches: The fitted head.
        outputs: What it says of all scans of `data`.
    """
    found = []
    for index, branch in enumerate(branches):
        if branch.molre is None or branch.molre.experts < 2:
            continue
        found.append(
            asdict(
                routing_diagnostics(
                    outputs.gates[index],
                    outputs.entropy[index],
                    y=data.cohort.y,
                    findings=data.cohort.findings,
                    similarity=expert_similarity(branch.molre),
                    knock_out=_knock_out(data, branches, branch=index),
                )
            )
        )
    return found


def routing_diagnostics(
    gates: Float[np.ndarray, "n k"],
    entropy: Float[np.ndarray, " n"],
    *,
    y: Float[np.ndarray, "n c"],
    findings: Sequence[str],
    similarity: Float64[np.ndarray, "k k"],
    knock_out: Sequence[float],
) -> RoutingDiagnostics:
    """Put the figures together, and judge them.

    Args:
        gates: Routing of each scan: the mean over its slices, weighted by attention.
        entropy: Entropy of the routing of a slice in nats, averaged likewise.
        y: 1, 0 or NaN.
        findings: Names of the columns of `y`.
        similarity: See `expert_similarity`.
        knock_out: See `RoutingDiagnostics`.
    """
    load = gates.mean(0, dtype=np.float64)
    load = load / load.sum()
    whole = math.log(len(load))
    load_entropy = float(-(load * np.log(np.maximum(load, 1e-300))).sum())
    routing_entropy = float(entropy.mean(dtype=np.float64))
    information = max(0.0, load_entropy - routing_entropy) / whole
    return RoutingDiagnostics(
        load=load.tolist(),
        load_entropy=load_entropy / whole,
        routing_entropy=routing_entropy / whole,
        information=information,
        effective_experts=math.exp(load_entropy),
        lift=expert_lift(gates, y, findings=findings),
        knock_out=list(knock_out),
        similarity=similarity.tolist(),
        warnings=_warnings(load, math.exp(load_entropy), information, similarity=similarity),
    )


def expert_lift(
    gates: Float[np.ndarray, "n k"], y: Float[np.ndarray, "n c"], *, findings: Sequence[str]
) -> dict[str, list[float]]:
    """Ln of each expert's mean share in scans with a finding over that in scans without."""
    lifts = {}
    for c, name in enumerate(findings):
        present, absent = gates[y[:, c] == 1], gates[y[:, c] == 0]
        if len(present) and len(absent):
            tiny = np.finfo(np.float64).tiny
            with_it = np.maximum(present.mean(0, dtype=np.float64), tiny)
            without = np.maximum(absent.mean(0, dtype=np.float64), tiny)
            lifts[name] = np.log(with_it / without).tolist()
    return lifts


def expert_similarity(molre: MoLRE) -> Float64[np.ndarray, "k k"]:
    """Cosine of the updates B_i A_i of each two experts, 0 where one of them is zero.

    ⟨B_i A_i, B_j A_j⟩ is the sum of (B_iᵀ B_j) ⊙ (A_i A_jᵀ), so no update is made.
    """
    down, up = molre.down.detach().double(), molre.up.detach().double()
    between_up = torch.einsum("idr,jds->ijrs", up, up)
    between_down = torch.einsum("ird,jsd->ijrs", down, down)
    products = (between_up * between_down).sum((-2, -1))
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = norms.unsqueeze(0) * norms.unsqueeze(1)
    cosine: Tensor = torch.where(scale > 0, products / scale.clamp(min=1e-300), 0.0)
    return cosine.cpu().numpy()


def _knock_out(data: FitData, branches: Sequence[Head], *, branch: int) -> list[float]:
    """Change of the validation macro AUC without each expert, all from one pass."""
    molre = branches[branch].molre
    assert molre is not None, "only asked of a branch with experts"
    variants = [list(branches)]
    for expert in range(molre.experts):
        without = copy.deepcopy(branches[branch])
        assert without.molre is not None
        with torch.no_grad():
            without.molre.up[expert] = 0
            if without.molre.up_bias is not None:
                without.molre.up_bias[expert] = 0
        variants.append([*branches[:branch], without, *branches[branch + 1 :]])
    y = data.cohort.y[data.validation]
    aucs = [
        float(auc_per_finding(y, logits)[data.selecting].mean())
        for logits in logits_of(data, variants, data.validation)
    ]
    return [auc - aucs[0] for auc in aucs[1:]]


def _warnings(
    load: Float64[np.ndarray, " k"],
    effective: float,
    information: float,
    *,
    similarity: Float64[np.ndarray, "k k"],
) -> list[str]:
    said = []
    if load.max() > COLLAPSED_LOAD or effective < FEWEST_EFFECTIVE:
        said.append(
            f"routing has collapsed: expert {int(load.argmax())} takes {load.max():.0%} of it. "
            "Try load_balance=0.01, or fewer experts"
        )
    elif information < LEAST_INFORMATION:
        said.append(
            "the router tells slices nothing apart: the experts act as one averaged LoRA. Fit "
            "longer, raise lr_molre, or use one expert"
        )
    alike = [
        f"{i} and {j}"
        for i in range(len(load))
        for j in range(i + 1, len(load))
        if similarity[i, j] > MOST_ALIKE
    ]
    if alike:
        said.append(f"experts do the same: {', '.join(alike)}. Fewer would do")
    return said
