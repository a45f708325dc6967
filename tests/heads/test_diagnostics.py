"""Routing diagnostics on routings whose meaning is known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ctfm.heads.config import FitConfig
from ctfm.heads.data import FitData
from ctfm.heads.diagnostics import (
    RoutingDiagnostics,
    diagnose,
    expert_similarity,
    routing_diagnostics,
)
from ctfm.heads.metrics import auc_per_finding
from ctfm.heads.molre import MoLRE
from ctfm.heads.outputs import logits_of, outputs_of
from ctfm.store.features import FeatureStore

N, K = 60, 3


def judged(
    gates: np.ndarray, entropy: float, *, similarity: np.ndarray | None = None
) -> RoutingDiagnostics:
    y = np.zeros((len(gates), 1), np.float32)
    y[::3] = 1
    return routing_diagnostics(
        gates.astype(np.float32),
        np.full(len(gates), entropy, np.float32),
        y=y,
        findings=["mass"],
        similarity=np.eye(K) if similarity is None else similarity,
        knock_out=[0.0] * K,
    )


def test_tells_uniform_collapsed_and_specialised_routing_apart() -> None:
    uniform = judged(np.full((N, K), 1 / K), math.log(K))
    collapsed = judged(np.tile([0.98, 0.01, 0.01], (N, 1)), 0.11)
    specialised = judged(np.eye(K)[np.arange(N) % K], 0.0)
    assert [round(d.load_entropy, 2) for d in (uniform, collapsed, specialised)] == [1, 0.10, 1]
    assert [round(d.routing_entropy, 2) for d in (uniform, collapsed, specialised)] == [1, 0.10, 0]
    assert [round(d.information, 2) for d in (uniform, collapsed, specialised)] == [0, 0, 1]
    assert specialised.effective_experts == pytest.approx(K)
    assert "nothing apart" in uniform.warnings[0]
    assert "collapsed: expert 0 takes 98%" in collapsed.warnings[0]
    assert specialised.warnings == []


def test_experts_with_the_same_update_are_named() -> None:
    similarity = np.eye(K)
    similarity[0, 2] = similarity[2, 0] = 0.99
    (said,) = judged(np.eye(K)[np.arange(N) % K], 0.0, similarity=similarity).warnings
    assert said == "experts do the same: 0 and 2. Fewer would do"


def test_lift_is_the_log_ratio_of_mean_shares() -> None:
    gates = np.full((N, K), 1 / K)
    gates[::3] = [0.5, 0.25, 0.25]
    expected = [math.log(0.5 * 3), math.log(0.75), math.log(0.75)]
    assert judged(gates, 1.0).lift["mass"] == pytest.approx(expected, abs=1e-6)


def test_similarity_is_the_cosine_of_the_updates() -> None:
    molre = MoLRE(7, K, 2, 5)
    with torch.no_grad():
        molre.up.normal_(generator=torch.Generator().manual_seed(1))
        molre.up[2] = 3 * molre.up[0]
        molre.down[2] = molre.down[0]
    updates = [(molre.up[i] @ molre.down[i]).detach().flatten() for i in range(K)]
    found = expert_similarity(molre)
    for i in range(K):
        for j in range(K):
            expected = torch.nn.functional.cosine_similarity(updates[i], updates[j], dim=0)
            assert found[i, j] == pytest.approx(float(expected), abs=1e-5)
    assert found[0, 2] == pytest.approx(1)
    assert (expert_similarity(MoLRE(7, K, 2, 5)) == 0).all()


def test_knocking_an_expert_out_is_predicting_without_its_update(
    planted_store: FeatureStore, planted_labels: Path
) -> None:
    config = FitConfig(
        experts=K, rank=1, router_hidden=3, min_positives=1, split_fractions=(0.6, 0.2, 0.2)
    )
    data = FitData([planted_store], planted_labels, config, device="cpu")
    (head,) = data.learner(config).branches
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    every = np.arange(data.cohort.scans.num_rows)
    (outputs,) = outputs_of(data, [[head]], every)
    (found,) = diagnose(data, [head], outputs)
    assert head.molre is not None
    with torch.no_grad():
        head.molre.up[1] = 0
    (without,) = logits_of(data, [[head]], data.validation)
    y = data.cohort.y[data.validation]
    before = auc_per_finding(y, outputs.logits[data.validation])[data.selecting].mean()
    after = auc_per_finding(y, without)[data.selecting].mean()
    assert found["knock_out"][1] == pytest.approx(after - before)
    assert sum(found["load"]) == pytest.approx(1)
