"""Multi-label focal loss: logits and partly known labels, to one number.

    FL = -α_t (1 - p_t)^γ log p_t,    p_t = p if y = 1 else 1 - p           (Lin et al. 2017, Eq. 5)

with weights α_t from the prevalence of each finding. The MoLRE paper says "prevalence-based class
weights" (Sec. 2.2) and no more, so the forms in `ALPHA_FORMS` are readings of it, each by name.
An unknown label is NaN; it takes part in nothing, and no arithmetic touches the NaN.

Axes: n scans of a split, b scans of a batch, c findings.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ctfm.store.errors import ConfigError

MAX_WEIGHT = 20.0
"""Largest α_t of `balanced`; it is reached by findings rarer than 1 in 40."""


class AlphaWeights(NamedTuple):
    """α_t of each finding, for scans that have it and for scans that do not."""

    positive: Float[Tensor, " c"]
    negative: Float[Tensor, " c"]


def _balanced(prevalence: Float[Tensor, " c"]) -> AlphaWeights:
    positive, negative = 0.5 / prevalence, 0.5 / (1 - prevalence)
    return AlphaWeights(positive.clamp(max=MAX_WEIGHT), negative.clamp(max=MAX_WEIGHT))


def _complement(prevalence: Float[Tensor, " c"]) -> AlphaWeights:
    return AlphaWeights(1 - prevalence, prevalence)


def _none(prevalence: Float[Tensor, " c"]) -> AlphaWeights:
    return AlphaWeights(torch.ones_like(prevalence), torch.ones_like(prevalence))


ALPHA_FORMS: dict[str, Callable[[Float[Tensor, " c"]], AlphaWeights]] = {
    "balanced": _balanced,
    "complement": _complement,
    "none": _none,
}
"""Forms of α_t, π being the prevalence of a finding.

- `balanced`: 1/2π and 1/2(1-π), at most 20: `complement`, rescaled for each finding so that α_t
  has mean 1 over the training scans. Every finding has the same share of the loss.
- `complement`: 1-π and π, the literal reading; rare findings all but vanish from the sum.
- `none`: 1 and 1.
"""


def prevalence(labels: Float[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """Share of positives among the known labels of each finding, Laplace-smoothed.

    (positives + 1) / (known + 2) is never 0 or 1, and 1/2 for a finding without any label.

    Args:
        labels: 1, 0 or NaN of the training scans, before any resampling.
    """
    known = ~labels.isnan()
    return ((labels == 1).sum(0) + 1) / (known.sum(0) + 2)


def alpha_weights(prevalence: Float[Tensor, " c"], *, form: str) -> AlphaWeights:
    """Weights α_t of the two classes of each finding.

    Args:
        prevalence: π of each finding, inside (0, 1).
        form: A name in `ALPHA_FORMS`.

    Raises:
        ConfigError: If no form has that name.
    """
    if form not in ALPHA_FORMS:
        raise ConfigError(f"no form of alpha is named {form!r}: choose {', '.join(ALPHA_FORMS)}")
    return ALPHA_FORMS[form](prevalence)


def prevalence_logit(prevalence: Float[Tensor, " c"], weights: AlphaWeights) -> Float[Tensor, " c"]:
    """The bias with which a classifier starts: the log-odds of the classes as the loss weighs them.

    log(π α₊ / (1-π) α₋). Without weights that is logit(π), the prior of Lin et al. 2017, Sec. 4.1;
    with `balanced` it is 0 for findings that are not clipped. Starting there saves the epochs in
    which a classifier only learns how rare a finding is.
    """
    odds = prevalence * weights.positive / ((1 - prevalence) * weights.negative)
    return odds.log()


def focal_loss(
    logits: Float[Tensor, "b c"],
    labels: Float[Tensor, "b c"],
    *,
    weights: AlphaWeights,
    gamma: float,
) -> Float[Tensor, ""]:
    """Mean over the labelled scans of each finding, then over the findings with any label.

    So a finding weighs the same however many of its labels are unknown. A batch without any
    label costs 0.

    Args:
        logits: Any finite values; log p_t is computed as a log-sigmoid and does not overflow.
        labels: 1, 0 or NaN for unknown.
        weights: α_t of the two classes of each finding.
        gamma: γ ≥ 0; 0 is weighted cross-entropy.
    """
    known = ~labels.isnan()
    positive = labels == 1
    towards = torch.where(positive, logits, -logits)
    log_p, log_rest = functional.logsigmoid(towards), functional.logsigmoid(-towards)
    alpha = torch.where(positive, weights.positive, weights.negative)
    costs = -alpha * (gamma * log_rest).exp() * log_p
    counts = known.sum(0)
    per_finding = torch.where(known, costs, 0.0).sum(0) / counts.clamp(min=1)
    return per_finding.sum() / (counts > 0).sum().clamp(min=1)
