"""The focal loss against Lin et al. 2017, Eq. 5, one label at a time."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from ctfm.heads.config import AlphaForm
from ctfm.heads.losses import (
    ALPHA_FORMS,
    AlphaWeights,
    alpha_weights,
    focal_loss,
    prevalence,
    prevalence_logit,
)
from ctfm.store.errors import ConfigError

B, C = 5, 3
NAN = math.nan
LABELS = torch.tensor(
    [[1, 0, NAN], [0, NAN, NAN], [NAN, 1, NAN], [1, 0, NAN], [0, 0, NAN]]
).double()


def logits() -> Tensor:
    return 3 * torch.randn(B, C, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def weights() -> AlphaWeights:
    positive, negative = torch.tensor([0.9, 2.0, 5.0]), torch.tensor([0.1, 0.7, 0.5])
    return AlphaWeights(positive.double(), negative.double())


def literal(z: Tensor, labels: Tensor, alpha: AlphaWeights, gamma: float) -> float:
    per_finding: list[float] = []
    for c in range(labels.shape[1]):
        costs: list[float] = []
        for b in range(labels.shape[0]):
            y = labels[b, c].item()
            if math.isnan(y):
                continue
            p = 1 / (1 + math.exp(-z[b, c].item()))
            p_t = p if y == 1 else 1 - p
            alpha_t = (alpha.positive if y == 1 else alpha.negative)[c].item()
            costs.append(-alpha_t * (1 - p_t) ** gamma * math.log(p_t))
        if costs:
            per_finding.append(sum(costs) / len(costs))
    return sum(per_finding) / len(per_finding)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_matches_the_equation(gamma: float) -> None:
    loss = focal_loss(logits(), LABELS, weights=weights(), gamma=gamma)
    assert loss.item() == pytest.approx(literal(logits(), LABELS, weights(), gamma), abs=1e-12)


def test_is_cross_entropy_without_focus_and_weights() -> None:
    known = LABELS.nan_to_num(0)
    plain = alpha_weights(torch.full((C,), 0.3).double(), form="none")
    expected = functional.binary_cross_entropy_with_logits(logits(), known)
    assert_close(focal_loss(logits(), known, weights=plain, gamma=0.0), expected)


def test_unknown_labels_have_no_gradient_and_spoil_none() -> None:
    z = logits().requires_grad_(True)
    torch.autograd.backward(focal_loss(z, LABELS, weights=weights(), gamma=2.0))
    assert z.grad is not None
    assert (z.grad[LABELS.isnan()] == 0).all()
    assert (z.grad[~LABELS.isnan()] != 0).all()


def test_a_batch_without_labels_costs_nothing() -> None:
    z = logits().requires_grad_(True)
    loss = focal_loss(z, torch.full((B, C), NAN).double(), weights=weights(), gamma=2.0)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


@settings(deadline=None)
@given(z=st.floats(-1e4, 1e4), y=st.sampled_from([0.0, 1.0]), gamma=st.floats(0, 5))
def test_stays_finite_for_any_logit(z: float, y: float, gamma: float) -> None:
    x = torch.full((2, 1), z, requires_grad=True)
    one = AlphaWeights(torch.ones(1), torch.ones(1))
    loss = focal_loss(x, torch.full((2, 1), y), weights=one, gamma=gamma)
    torch.autograd.backward(loss)
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_prevalence_counts_known_labels_only() -> None:
    assert_close(prevalence(LABELS), torch.tensor([3 / 6, 2 / 6, 1 / 2]))


def test_every_form_weighs_the_two_classes_differently_but_none() -> None:
    rare = torch.tensor([0.1, 0.02, 0.3])
    for form in ALPHA_FORMS:
        alpha = alpha_weights(rare, form=form)
        if form == "none":
            assert torch.equal(alpha.positive, alpha.negative)
        else:
            assert (alpha.positive > alpha.negative).all()


def test_complement_is_the_literal_reading() -> None:
    alpha = alpha_weights(torch.tensor([0.1, 0.02]), form="complement")
    assert_close(alpha.positive, torch.tensor([0.9, 0.98]))
    assert_close(alpha.negative, torch.tensor([0.1, 0.02]))


def test_balanced_is_complement_with_mean_one_and_clipped() -> None:
    share = torch.tensor([0.1, 0.3, 0.001])
    balanced, complement = (alpha_weights(share, form=f) for f in ("balanced", "complement"))
    mean = share * balanced.positive + (1 - share) * balanced.negative
    assert_close(mean[:2], torch.ones(2))
    ratio = complement.positive / complement.negative
    assert_close((balanced.positive / balanced.negative)[:2], ratio[:2])
    assert balanced.positive[2] == 20.0
    assert balanced.negative[2] == pytest.approx(0.5 / 0.999)


def test_the_first_bias_is_the_best_constant_for_weighted_cross_entropy() -> None:
    share = torch.tensor([0.1, 0.3, 0.004])
    plain = prevalence_logit(share, alpha_weights(share, form="none"))
    assert_close(plain, share.logit())
    assert_close(
        prevalence_logit(share, alpha_weights(share, form="balanced"))[:2],
        torch.zeros(2),
        rtol=0,
        atol=1e-6,
    )
    alpha = alpha_weights(share, form="balanced")
    bias = prevalence_logit(share, alpha)
    slope = (1 - share) * alpha.negative * bias.sigmoid() - share * alpha.positive * (
        1 - bias.sigmoid()
    )
    assert_close(slope, torch.zeros(3), rtol=0, atol=1e-6)


def test_the_config_offers_every_form_and_an_unknown_one_is_refused() -> None:
    assert set(get_args(AlphaForm)) == set(ALPHA_FORMS)
    with pytest.raises(ConfigError, match="choose balanced, complement, none"):
        alpha_weights(torch.tensor([0.5]), form="inverse")
