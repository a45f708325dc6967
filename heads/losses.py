"""Multi-label losses: logits and partly known labels, to one number a head.

One loss with three numbers, of which the usual losses are settings (`focusing_of`):

    -α₊ (1 - p)^γ₊ log p               for a scan with the finding
    -α₋ pₘ^γ₋ log(1 - pₘ)              for one without it,   pₘ = max(p - m, 0)

Cross-entropy is γ₊ = γ₋ = m = 0. The focal loss has γ₊ = γ₋ (Lin et al. 2017, Eq. 5). The
asymmetric loss has γ₊ < γ₋ and throws away easy negatives by its margin m (Ridnik et al. 2021,
arXiv:2009.14119, Sec. 2).

The weights α come from how often a finding is there. The MoLRE paper says "prevalence-based class
weights" (Sec. 2.2) and no more, so the forms in `ALPHA_FORMS` are readings of it, each by name.
An unknown label is NaN; it takes part in nothing, and no arithmetic touches the NaN.

Axes: v variants (heads that see one batch side by side), n scans of a split, b scans of a batch,
c findings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional

from ctfm.store.errors import ConfigError

MAX_WEIGHT = 20.0
"""Largest α of `balanced`; it is reached by findings rarer than 1 in 40."""

MAX_SQRT_WEIGHT = 10.0
"""Largest α of `sqrt`; it is reached by findings rarer than 1 in 101."""

EFFECTIVE_BETA = 0.9999
"""β of `effective`: of scans beyond 1 / (1 - β) = 10,000, few tell anything new."""

MAX_LOGIT = 20.0
"""A first bias lies between this and its negative: no finding is rarer than 1 in 10⁸."""

Known = Shaped[Tensor, " c"] | None
"""Number of known labels of each finding."""


class AlphaWeights(NamedTuple):
    """α of each finding, for scans that have it and for scans that do not."""

    positive: Float[Tensor, " c"]
    negative: Float[Tensor, " c"]


@dataclass(frozen=True, kw_only=True)
class Focusing:
    """How much less a label costs that the head has right already; by default, no less."""

    positive: float = 0.0
    """γ₊, at least 0."""

    negative: float = 0.0
    """γ₋, at least 0."""

    margin: float = 0.0
    """m, at least 0 and below 1: a negative with p ≤ m costs nothing."""

    def __post_init__(self) -> None:
        if not (0 <= self.positive < math.inf and 0 <= self.negative < math.inf):
            raise ConfigError(
                f"γ of a loss must be at least 0, got {self.positive} for positive and "
                f"{self.negative} for negative labels"
            )
        if not 0 <= self.margin < 1:
            raise ConfigError(
                f"the margin of a loss must be at least 0 and below 1, got {self.margin}"
            )


def focusing_of(
    loss: str, *, gamma: float, gamma_positive: float, gamma_negative: float, margin: float
) -> Focusing:
    """The loss of a name, as `multilabel_loss` takes it.

    Args:
        loss: `focal`, `bce` (weighted cross-entropy) or `asymmetric`.
        gamma: γ of `focal`; 2 in Lin et al. 2017.
        gamma_positive: γ₊ of `asymmetric`; 0 in Ridnik et al. 2021 on MS-COCO.
        gamma_negative: γ₋ of `asymmetric`; 4 there.
        margin: m of `asymmetric`; 0.05 there.

    Raises:
        ConfigError: If no loss has that name, or a number is out of its range.
    """
    named = {
        "focal": Focusing(positive=gamma, negative=gamma),
        "bce": Focusing(),
        "asymmetric": Focusing(positive=gamma_positive, negative=gamma_negative, margin=margin),
    }
    if loss not in named:
        raise ConfigError(f"no loss is named {loss!r}: choose {', '.join(named)}")
    return named[loss]


def multilabel_loss(
    logits: Float[Tensor, "*v b c"],
    labels: Float[Tensor, "b c"],
    *,
    weights: AlphaWeights,
    focusing: Focusing,
) -> Float[Tensor, "*v"]:
    """Mean over the labelled scans of each finding, then over the findings with any label.

    So a finding weighs the same however many of its labels are unknown. A batch without any
    label costs 0. The sum of several variants' losses has, in each variant's parameters, the
    gradient of that variant's own.

    Args:
        logits: Any finite values; half precision is computed in float32.
        labels: 1, 0 or NaN for unknown; the same for every variant.
        weights: α of the two classes of each finding.
        focusing: γ₊, γ₋ and m.
    """
    known, positive = ~labels.isnan(), labels == 1
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    alpha = torch.where(positive, weights.positive, weights.negative)
    costs = alpha * _costs(wide, positive, focusing)
    counts = known.sum(0)
    per_finding = torch.where(known, costs, 0.0).sum(-2) / counts.clamp(min=1)
    return per_finding.sum(-1) / (counts > 0).sum().clamp(min=1)


def _costs(
    logits: Float[Tensor, "*v b c"], positive: Bool[Tensor, "b c"], focusing: Focusing
) -> Float[Tensor, "*v b c"]:
    """Cost of each label before α; log-sigmoids, so that no logit overflows."""
    towards = torch.where(positive, logits, -logits)
    log_p, log_rest = functional.logsigmoid(towards), functional.logsigmoid(-towards)
    if focusing.margin > 0:
        shifted = (log_p.exp() + focusing.margin).clamp(max=1.0)
        # The smallest number keeps 0^γ and its slope finite.
        rest = (1 - shifted).clamp(min=torch.finfo(shifted.dtype).tiny)
        log_p = torch.where(positive, log_p, shifted.log())
        log_rest = torch.where(positive, log_rest, rest.log())
    focused = torch.where(
        positive, focusing.positive * log_rest, focusing.negative * log_rest
    ).exp()
    return -focused * log_p


def prevalence(
    labels: Float[Tensor, "n c"], *, visits: Float[Tensor, " n"] | None = None
) -> Float[Tensor, " c"]:
    """Share of positives among the known labels of each finding, Laplace-smoothed.

    (positives + 1) / (known + 2) is never 0 or 1, and 1/2 for a finding without any label.

    Args:
        labels: 1, 0 or NaN of the training scans.
        visits: How often an epoch meets each scan, such as its repeat factor; once if not given.
    """
    met = torch.ones(len(labels), device=labels.device) if visits is None else visits
    positives, known = (met @ mask.to(met.dtype) for mask in (labels == 1, ~labels.isnan()))
    return (positives + 1) / (known + 2)


def _balanced(prevalence: Float[Tensor, " c"], _: Known) -> AlphaWeights:
    positive, negative = 0.5 / prevalence, 0.5 / (1 - prevalence)
    return AlphaWeights(positive.clamp(max=MAX_WEIGHT), negative.clamp(max=MAX_WEIGHT))


def _complement(prevalence: Float[Tensor, " c"], _: Known) -> AlphaWeights:
    return AlphaWeights(1 - prevalence, prevalence)


def _sqrt(prevalence: Float[Tensor, " c"], _: Known) -> AlphaWeights:
    positive = ((1 - prevalence) / prevalence).sqrt().clamp(max=MAX_SQRT_WEIGHT)
    return AlphaWeights(positive, torch.ones_like(prevalence))


def _retinanet(prevalence: Float[Tensor, " c"], _: Known) -> AlphaWeights:
    return AlphaWeights(torch.full_like(prevalence, 0.25), torch.full_like(prevalence, 0.75))


def _none(prevalence: Float[Tensor, " c"], _: Known) -> AlphaWeights:
    return AlphaWeights(torch.ones_like(prevalence), torch.ones_like(prevalence))


def _effective(prevalence: Float[Tensor, " c"], known: Known) -> AlphaWeights:
    if known is None:
        raise ConfigError("alpha `effective` needs the number of labels of each finding, got none")
    labelled = known.clamp(min=1).to(prevalence.dtype)
    positive = 1 / _effective_number(prevalence * labelled)
    negative = 1 / _effective_number((1 - prevalence) * labelled)
    mean = prevalence * positive + (1 - prevalence) * negative
    return AlphaWeights(positive / mean, negative / mean)


def _effective_number(count: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    """(1 - βⁿ) / (1 - β), where nothing is lost to 1 - β being small (Cui et al. 2019, Prop. 1)."""
    return -torch.expm1(count * math.log(EFFECTIVE_BETA)) / (1 - EFFECTIVE_BETA)


ALPHA_FORMS: dict[str, Callable[[Float[Tensor, " c"], Known], AlphaWeights]] = {
    "balanced": _balanced,
    "complement": _complement,
    "sqrt": _sqrt,
    "effective": _effective,
    "retinanet": _retinanet,
    "none": _none,
}
"""Forms of α, π being the prevalence of a finding.

- `balanced`: 1/2π and 1/2(1-π), at most 20: `complement`, rescaled for each finding so that α has
  mean 1 over the training scans. Every finding that is not clipped has the same share of the loss.
- `complement`: 1-π and π, the literal reading; rare findings all but vanish from the sum.
- `sqrt`: √((1-π)/π), at most 10, and 1: halfway between `none` and `balanced`.
- `effective`: 1/E(n₊) and 1/E(n₋) with mean 1, E(n) = (1-βⁿ)/(1-β) being the effective number of n
  scans (Cui et al. 2019, arXiv:1901.05555, Prop. 1); not clipped.
- `retinanet`: 0.25 and 0.75, the best of Lin et al. 2017 beside γ = 2, for every finding alike.
- `none`: 1 and 1.
"""


def alpha_weights(
    prevalence: Float[Tensor, " c"], *, form: str, known: Known = None
) -> AlphaWeights:
    """Weights α of the two classes of each finding.

    Args:
        prevalence: π of each finding, inside (0, 1).
        form: A name in `ALPHA_FORMS`.
        known: Labelled scans of each finding; `effective` needs it, no other form reads it.

    Raises:
        ConfigError: If no form has that name, or `effective` is not told `known`.
    """
    if form not in ALPHA_FORMS:
        raise ConfigError(f"no form of alpha is named {form!r}: choose {', '.join(ALPHA_FORMS)}")
    return ALPHA_FORMS[form](prevalence, known)


def prevalence_logit(
    prevalence: Float[Tensor, " c"],
    weights: AlphaWeights,
    *,
    focusing: Focusing = Focusing(),
) -> Float[Tensor, " c"]:
    """The bias with which a classifier starts: the best answer that does not look at the scan.

    It is the constant logit with the least expected loss, so that no epoch goes into learning how
    rare a finding is. For cross-entropy that is log(π α₊ / (1-π) α₋), the log-odds of the classes
    as the loss weighs them: logit(π) without weights, the prior of Lin et al. 2017, Sec. 4.1, and
    0 with `balanced` for findings that are not clipped. A focused loss rests nearer to 0: at
    γ = 2 without weights, on p = 15% for a finding in 1% of the scans. Where a margin throws away
    so many negatives that no constant is best, the bias is 0.

    Args:
        prevalence: π of each finding among the visits of an epoch, inside (0, 1).
        weights: α of the two classes of each finding.
        focusing: γ₊, γ₋ and m of the loss; nothing is cross-entropy.
    """
    present = (prevalence * weights.positive).double()
    absent = ((1 - prevalence) * weights.negative).double()
    grid = torch.linspace(-1, 1, 201, dtype=torch.double, device=prevalence.device).unsqueeze(1)
    yes = torch.ones((len(grid), len(prevalence)), dtype=torch.bool, device=prevalence.device)
    best, reach = torch.zeros_like(present), MAX_LOGIT
    for _ in range(5):  # the last grid is finer than 1e-9
        logits = best + reach * grid
        expected = present * _costs(logits, yes, focusing) + absent * _costs(logits, ~yes, focusing)
        best = logits.gather(0, expected.argmin(0, keepdim=True))[0]
        reach /= 50
    return torch.where(best < MAX_LOGIT - 1, best, 0.0).to(prevalence.dtype)
