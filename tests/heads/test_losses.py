"""The losses against Lin et al. 2017 and Ridnik et al. 2021, one label at a time."""

import itertools
import math
from typing import get_args

import numpy as np
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
    Focusing,
    alpha_weights,
    focusing_of,
    multilabel_loss,
    prevalence,
    prevalence_logit,
)
from ctfm.store.errors import ConfigError

V, B, C = 4, 5, 3
NAN = math.nan
LABELS = torch.tensor(
    [[1, 0, NAN], [0, NAN, NAN], [NAN, 1, NAN], [1, 0, NAN], [0, 0, NAN]]
).double()
SHAPES = {
    "bce": Focusing(),
    "focal": Focusing(positive=2.0, negative=2.0),
    "sharp": Focusing(positive=3.5, negative=3.5),
    "asymmetric": Focusing(positive=0.0, negative=4.0, margin=0.05),
    "uneven": Focusing(positive=1.3, negative=0.5, margin=0.2),
    "margin alone": Focusing(margin=0.1),
}


def logits(*shape: int) -> Tensor:
    return 3 * torch.randn(
        *shape, B, C, dtype=torch.double, generator=torch.Generator().manual_seed(1)
    )


def weights() -> AlphaWeights:
    positive, negative = torch.tensor([0.9, 2.0, 5.0]), torch.tensor([0.1, 0.7, 0.5])
    return AlphaWeights(positive.double(), negative.double())


def literal_cost(z: float, y: float, focusing: Focusing) -> float:
    p = 1 / (1 + math.exp(-z))
    if y == 1:
        return float(-((1 - p) ** focusing.positive) * math.log(p))
    shifted = max(p - focusing.margin, 0)
    return float(-(shifted**focusing.negative) * math.log(1 - shifted))


def literal(z: Tensor, labels: Tensor, alpha: AlphaWeights, focusing: Focusing) -> float:
    per_finding: list[float] = []
    for c in range(labels.shape[1]):
        costs: list[float] = []
        for b in range(labels.shape[0]):
            y = labels[b, c].item()
            if math.isnan(y):
                continue
            alpha_y = (alpha.positive if y == 1 else alpha.negative)[c].item()
            costs.append(alpha_y * literal_cost(z[b, c].item(), y, focusing))
        if costs:
            per_finding.append(sum(costs) / len(costs))
    return sum(per_finding) / len(per_finding)


@pytest.mark.parametrize("focusing", SHAPES.values(), ids=SHAPES)
def test_matches_the_equations(focusing: Focusing) -> None:
    loss = multilabel_loss(logits(), LABELS, weights=weights(), focusing=focusing)
    assert loss.item() == pytest.approx(literal(logits(), LABELS, weights(), focusing), abs=1e-12)


def test_names_are_settings_of_one_loss() -> None:
    told = {"gamma": 2.0, "gamma_positive": 1.0, "gamma_negative": 4.0, "margin": 0.05}
    assert focusing_of("focal", **told) == Focusing(positive=2.0, negative=2.0)
    assert focusing_of("bce", **told) == Focusing()
    assert focusing_of("asymmetric", **told) == Focusing(positive=1.0, negative=4.0, margin=0.05)
    with pytest.raises(ConfigError, match="choose focal, bce, asymmetric"):
        focusing_of("hinge", **told)


@pytest.mark.parametrize("gamma", [-1.0, math.inf, NAN])
def test_a_focus_that_cannot_be_is_refused(gamma: float) -> None:
    with pytest.raises(ConfigError, match="γ"):
        Focusing(positive=gamma)
    with pytest.raises(ConfigError, match="γ"):
        Focusing(negative=gamma)


@pytest.mark.parametrize("margin", [-0.1, 1.0, NAN])
def test_a_margin_that_cannot_be_is_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin"):
        Focusing(margin=margin)


def test_is_cross_entropy_without_focus_and_weights() -> None:
    known = LABELS.nan_to_num(0)
    plain = alpha_weights(torch.full((C,), 0.3).double(), form="none")
    expected = functional.binary_cross_entropy_with_logits(logits(), known)
    assert_close(multilabel_loss(logits(), known, weights=plain, focusing=Focusing()), expected)


def test_a_negative_within_the_margin_costs_nothing_and_teaches_nothing() -> None:
    z = torch.tensor([[-4.0], [-2.0]], requires_grad=True)  # p = 0.018, 0.119
    one = AlphaWeights(torch.ones(1), torch.ones(1))
    loss = multilabel_loss(z, torch.zeros(2, 1), weights=one, focusing=Focusing(margin=0.05))
    torch.autograd.backward(loss)
    assert z.grad is not None
    assert z.grad[0] == 0
    assert z.grad[1] > 0


@pytest.mark.parametrize("focusing", SHAPES.values(), ids=SHAPES)
def test_variants_side_by_side_have_each_the_loss_and_gradient_they_have_alone(
    focusing: Focusing,
) -> None:
    together = logits(V).requires_grad_(True)
    losses = multilabel_loss(together, LABELS, weights=weights(), focusing=focusing)
    assert losses.shape == (V,)
    torch.autograd.backward(losses.sum())
    assert together.grad is not None
    for v in range(V):
        alone = logits(V)[v].requires_grad_(True)
        loss = multilabel_loss(alone, LABELS, weights=weights(), focusing=focusing)
        torch.autograd.backward(loss)
        assert_close(losses[v], loss, rtol=0, atol=1e-15)
        assert_close(together.grad[v], alone.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("focusing", SHAPES.values(), ids=SHAPES)
def test_unknown_labels_have_no_gradient_and_spoil_none(focusing: Focusing) -> None:
    z = torch.linspace(-1, 2, B * C).reshape(B, C).double().requires_grad_(True)
    torch.autograd.backward(multilabel_loss(z, LABELS, weights=weights(), focusing=focusing))
    assert z.grad is not None
    assert (z.grad[LABELS.isnan()] == 0).all()
    assert (z.grad[~LABELS.isnan()] != 0).all()


def test_a_batch_without_labels_costs_nothing() -> None:
    z = logits().requires_grad_(True)
    unknown = torch.full((B, C), NAN).double()
    loss = multilabel_loss(z, unknown, weights=weights(), focusing=SHAPES["focal"])
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


@settings(deadline=None)
@given(
    z=st.floats(-1e4, 1e4, width=32),
    y=st.sampled_from([0.0, 1.0]),
    positive=st.floats(0, 5),
    negative=st.floats(0, 5),
    margin=st.one_of(st.just(0.0), st.floats(1e-12, 0.9)),
)
def test_stays_finite_for_any_logit(
    z: float, y: float, positive: float, negative: float, margin: float
) -> None:
    x = torch.full((2, 1), z, requires_grad=True)
    one = AlphaWeights(torch.ones(1), torch.ones(1))
    focusing = Focusing(positive=positive, negative=negative, margin=margin)
    loss = multilabel_loss(x, torch.full((2, 1), y), weights=one, focusing=focusing)
    torch.autograd.backward(loss)
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(half: torch.dtype) -> None:
    z, alpha = logits().to(half), AlphaWeights(*(one.float() for one in weights()))
    loss = multilabel_loss(z, LABELS.float(), weights=alpha, focusing=SHAPES["asymmetric"])
    wide = multilabel_loss(z.float(), LABELS.float(), weights=alpha, focusing=SHAPES["asymmetric"])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wide)


def test_prevalence_counts_known_labels_only() -> None:
    assert_close(prevalence(LABELS), torch.tensor([3 / 6, 2 / 6, 1 / 2]))


def test_prevalence_counts_a_scan_as_often_as_it_is_visited() -> None:
    visits = torch.tensor([2, 1, 1, 3, 1])
    expected = prevalence(LABELS.repeat_interleave(visits, 0))
    assert_close(prevalence(LABELS, visits=visits.float()), expected)


def test_every_form_weighs_the_two_classes_differently_but_none() -> None:
    rare, known = torch.tensor([0.1, 0.02, 0.3]), torch.tensor([900, 5000, 60])
    for form in ALPHA_FORMS:
        alpha = alpha_weights(rare, form=form, known=known)
        if form == "none":
            assert torch.equal(alpha.positive, alpha.negative)
        elif form == "retinanet":
            assert (alpha.positive < alpha.negative).all()
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


def test_effective_weighs_by_the_inverse_effective_number_with_mean_one() -> None:
    positives, known = 37, 640
    share = torch.tensor([positives / known], dtype=torch.double)
    alpha = alpha_weights(share, form="effective", known=torch.tensor([known]))
    # The effective number is 1 + β + … + βⁿ⁻¹.
    present, absent = (sum(0.9999**i for i in range(n)) for n in (positives, known - positives))
    ratio = alpha.positive / alpha.negative
    assert ratio.item() == pytest.approx(absent / present, rel=1e-9)
    mean = (positives * alpha.positive + (known - positives) * alpha.negative) / known
    assert mean.item() == pytest.approx(1)


def test_effective_is_even_without_labels_and_needs_their_number() -> None:
    alpha = alpha_weights(torch.tensor([0.5]), form="effective", known=torch.tensor([0]))
    assert_close(torch.cat(alpha), torch.ones(2))
    with pytest.raises(ConfigError, match="number of labels"):
        alpha_weights(torch.tensor([0.5]), form="effective")


# 75 prevalences between those of the paper's rarest and commonest findings, 58,251 scans.
PAPER_LIKE = torch.from_numpy(np.geomspace(0.00079, 0.296, 75))


@pytest.mark.parametrize(
    ("form", "ratio", "share", "positive_share"),
    [
        ("none", 1, 0.333, 0.016),
        ("retinanet", 1 / 3, 0.345, 0.016),
        ("complement", 1265, 0.019, 0.019),
        ("balanced", 40, 0.232, 0.056),
        ("sqrt", 10, 0.308, 0.052),
        ("effective", 217, 0.333, 0.280),
    ],
)
def test_what_is_left_of_the_loss_for_the_rarest_third_of_the_findings(
    form: str, ratio: float, share: float, positive_share: float
) -> None:
    known = torch.full((75,), 58_251)
    alpha = alpha_weights(PAPER_LIKE, form=form, known=known)
    of_positives = PAPER_LIKE * alpha.positive
    mass = of_positives + (1 - PAPER_LIKE) * alpha.negative
    assert (alpha.positive[0] / alpha.negative[0]).item() == pytest.approx(ratio, rel=2e-3)
    assert (mass[:25].sum() / mass.sum()).item() == pytest.approx(share, abs=6e-4)
    rarest = of_positives[:25].sum() / of_positives.sum()
    assert rarest.item() == pytest.approx(positive_share, abs=6e-4)


def test_without_focus_the_first_bias_is_the_log_odds_as_the_loss_weighs_them() -> None:
    share = torch.tensor([0.1, 0.3, 0.004])
    plain = prevalence_logit(share, alpha_weights(share, form="none"))
    assert_close(plain, share.logit())
    balanced = prevalence_logit(share, alpha_weights(share, form="balanced"))
    assert_close(balanced[:2], torch.zeros(2), rtol=0, atol=1e-6)
    assert balanced[2].item() == pytest.approx(math.log(0.004 * 20 / 0.5), abs=1e-5)


@pytest.mark.parametrize("form", ALPHA_FORMS)
@pytest.mark.parametrize("focusing", SHAPES.values(), ids=SHAPES)
def test_the_first_bias_is_the_constant_with_the_least_loss(form: str, focusing: Focusing) -> None:
    positives, scans = torch.tensor([1, 8, 90]), 300
    labels = (torch.arange(scans).unsqueeze(1) < positives).double()
    share = positives.double() / scans
    alpha = alpha_weights(share, form=form, known=torch.full((C,), scans))
    bias = prevalence_logit(share, alpha, focusing=focusing)

    def loss(of: Tensor) -> Tensor:
        return multilabel_loss(of.expand(scans, C), labels, weights=alpha, focusing=focusing)

    for c, step in itertools.product(range(C), (-8.0, -1.0, -0.1, 0.1, 1.0, 8.0)):
        moved = bias + step * functional.one_hot(torch.tensor(c), C)
        assert loss(moved) > loss(bias)


@pytest.mark.parametrize("form", ALPHA_FORMS)
def test_the_first_bias_does_not_move_in_a_first_step(form: str) -> None:
    positives, scans = torch.tensor([1, 8, 90]), 300
    labels = (torch.arange(scans).unsqueeze(1) < positives).double()
    share = positives.double() / scans
    alpha = alpha_weights(share, form=form, known=torch.full((C,), scans))
    bias = prevalence_logit(share, alpha, focusing=SHAPES["asymmetric"]).requires_grad_(True)
    z = bias.expand(scans, C)
    loss = multilabel_loss(z, labels, weights=alpha, focusing=SHAPES["asymmetric"])
    torch.autograd.backward(loss)
    assert bias.grad is not None
    assert_close(bias.grad, torch.zeros(C).double(), rtol=0, atol=1e-7)


def test_the_first_bias_is_0_where_a_margin_leaves_no_best_constant() -> None:
    common = torch.tensor([0.99]).double()
    focusing = Focusing(negative=4.0, margin=0.5)
    bias = prevalence_logit(common, alpha_weights(common, form="none"), focusing=focusing)
    assert bias.item() == 0


def test_every_form_of_the_config_exists_and_an_unknown_one_is_refused() -> None:
    assert set(get_args(AlphaForm)) == set(ALPHA_FORMS)
    with pytest.raises(ConfigError, match="choose balanced, complement, sqrt"):
        alpha_weights(torch.tensor([0.5]), form="inverse")
