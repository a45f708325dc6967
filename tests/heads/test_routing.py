"""Regularisers of the routing against their formulas, one slice at a time."""

import math

import pytest
import torch
from torch import Tensor

from ctfm.heads.routing import Routing, RoutingPenalties
from ctfm.store.errors import ConfigError

R, K = 7, 4


@pytest.fixture
def scores() -> Tensor:
    random = torch.Generator().manual_seed(3)
    return torch.randn(R, K, generator=random, dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    whole = sum(math.exp(one) for one in row)
    return [math.exp(one) / whole for one in row]


def test_each_regulariser_is_its_formula_over_the_slices_alone(scores: Tensor) -> None:
    valid = torch.tensor([True, True, False, True, True, False, True])
    rows = scores[valid].tolist()
    gates = [softmax(row) for row in rows]
    mean = [sum(gate[k] for gate in gates) / len(gates) for k in range(K)]
    balance = K * sum(one**2 for one in mean)
    z = sum(math.log(sum(math.exp(one) for one in row)) ** 2 for row in rows) / len(rows)
    entropy = sum(-sum(g * math.log(g) for g in gate) for gate in gates) / len(gates)
    padded = scores.masked_fill(~valid.unsqueeze(-1), 50.0)  # padding may hold anything
    for weights, expected in (
        ({"load_balance": 0.5}, 0.5 * balance),
        ({"z_loss": 0.25}, 0.25 * z),
        ({"entropy": -2.0}, -2 * entropy),
        ({"load_balance": 1.0, "z_loss": 2.0, "entropy": 3.0}, balance + 2 * z + 3 * entropy),
    ):
        penalties = RoutingPenalties(**weights)
        assert penalties
        found = penalties(padded.softmax(-1), padded, valid=valid)
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_load_balance_is_1_when_even_and_k_when_one_expert_takes_all() -> None:
    balance = RoutingPenalties(load_balance=1.0)
    even, one = torch.full((R, K), 1 / K), torch.eye(K)[torch.zeros(R, dtype=torch.long)]
    assert float(balance(even, even, valid=None)) == pytest.approx(1)
    assert float(balance(one, one, valid=None)) == pytest.approx(K)


@pytest.mark.parametrize("top_k", range(1, K))
def test_gradients_stay_finite_where_experts_take_no_part(scores: Tensor, top_k: int) -> None:
    scores.requires_grad_()
    gates = Routing(top_k=top_k).gates(scores)
    penalties = RoutingPenalties(load_balance=1.0, z_loss=1.0, entropy=1.0)
    penalties(gates, scores, valid=None).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_without_weights_there_are_none() -> None:
    assert not RoutingPenalties()
    with pytest.raises(ConfigError, match="must not be negative"):
        RoutingPenalties(z_loss=-1.0)
