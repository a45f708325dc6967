"""Pooling weights against their formulas, one scan at a time."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ctfm.heads.pooling import POOLS, AttentionPool, MaxPool, MeanPool, Pool, build_pool
from ctfm.store.errors import ConfigError

B, S, D, C, H, L = 3, 5, 6, 4, 2, 9
COUNTS = (5, 1, 4)


def mask() -> Tensor:
    return torch.arange(S) < torch.tensor(COUNTS).unsqueeze(1)


def build(name: str) -> Pool:
    pool = build_pool(name, D, findings=C, heads=H, hidden=L).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return pool


def classifier() -> Tensor:
    return torch.randn(C, D, generator=torch.Generator().manual_seed(2), dtype=torch.double)


def slices() -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(3), dtype=torch.double)


def literal_scores(name: str, pool: Pool, h: Tensor) -> list[float]:
    """Scores of one slice for each group, as the formulas of the module read."""
    state = {name: value.detach() for name, value in pool.named_parameters()}
    if name == "attention":
        return [float(state["query"][0] @ h / math.sqrt(D))]
    if name == "per-finding":
        return [float(query @ h / math.sqrt(D)) for query in state["query"]]
    if name == "multihead":
        part = D // H
        return [
            float(state["query"][i] @ h[i * part : (i + 1) * part] / math.sqrt(part))
            for i in range(H)
        ]
    if name == "gated":
        hidden = torch.tanh(state["value"] @ h) * torch.sigmoid(state["gate"] @ h)
        return [float(state["query"][0] @ hidden)]
    return [0.0]


@pytest.mark.parametrize("name", ["attention", "gated", "mean", "multihead", "per-finding"])
def test_weights_are_the_softmax_of_the_formula(name: str) -> None:
    pool, h = build(name), slices()
    weights = pool(h @ pool.keys(classifier()).mT, mask())
    for b, count in enumerate(COUNTS):
        scores = torch.tensor(
            [literal_scores(name, pool, h[b, s]) for s in range(count)], dtype=torch.double
        )
        expected = torch.cat([scores.softmax(0), torch.zeros(S - count, scores.shape[1])])
        assert_close(weights[b], expected, rtol=0, atol=1e-12)


def test_max_takes_the_slice_with_the_largest_logit_of_each_finding() -> None:
    pool, h = MaxPool(), slices()
    weights = pool(h @ pool.keys(classifier()).mT, mask())
    for b, count in enumerate(COUNTS):
        for c in range(C):
            answers = [float(classifier()[c] @ h[b, s]) for s in range(count)]
            assert weights[b, :, c].tolist() == [s == answers.index(max(answers)) for s in range(S)]


@pytest.mark.parametrize("name", POOLS)
def test_ignores_whatever_padding_holds(name: str) -> None:
    pool, h = build(name), slices()
    products = h @ pool.keys(classifier()).mT
    spoilt = products.masked_fill(~mask().unsqueeze(-1), torch.nan)
    weights = pool(products, mask())
    assert torch.equal(weights, pool(spoilt, mask()))
    assert_close(weights.sum(1), torch.ones_like(weights.sum(1)))


@pytest.mark.parametrize("name", [name for name in POOLS if name != "max"])
def test_an_untrained_pool_weighs_all_slices_alike(name: str) -> None:
    pool = build_pool(name, D, findings=C, heads=H, hidden=L)
    products = slices().float() @ pool.keys(classifier().float()).mT
    weights = pool(products, None)
    assert_close(weights, torch.full_like(weights, 1 / S))


def test_the_paper_s_pool_learns_one_query_and_the_mean_nothing() -> None:
    assert {k: tuple(v.shape) for k, v in AttentionPool(D).state_dict().items()} == {
        "query": (1, D)
    }
    assert MeanPool().state_dict() == {}


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no pool is named 'sum': choose one of attention"):
        build_pool("sum", D, findings=C, heads=H, hidden=L)
    with pytest.raises(ConfigError, match="pool_heads must divide the 6 numbers"):
        build_pool("multihead", D, findings=C, heads=4, hidden=L)
