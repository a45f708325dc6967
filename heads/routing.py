"""Routing: the scores that a router gives the experts, to how much each expert takes part.

The paper's routing is soft (Eq. 2): g = softmax(scores), every expert takes part. Beside it, all
off by default: a temperature; noise on the scores while fitting, so that experts that are seldom
chosen are tried (Shazeer et al. 2017, arXiv:1701.06538, Sec. 2.1, there with a learnt width); the
top k experts only, their weights renormalised (same source, Eq. 4). `penalties` are the usual
regularisers of routing, which the paper does without.

Axes: r rows (slices), k experts; v variants of a head side by side, where there are several.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctfm.store.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How scores become weights; the defaults are the paper's."""

    top_k: int = 0
    """Experts that take part in a slice; 0 is all of them."""

    temperature: float = 1.0
    """Scores are divided by it: below 1 sharper, above 1 flatter."""

    noise: float = 0.0
    """Standard deviation of what is added to the scores while fitting."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.noise < 0 or self.top_k < 0:
            raise ConfigError(
                "routing needs a positive temperature, and noise and top_k of 0 or more, got "
                f"{self.temperature}, {self.noise} and {self.top_k}"
            )

    def gates(
        self, scores: Float[Tensor, "*v r k"], *, noise: Float[Tensor, "*v r k"] | None = None
    ) -> Float[Tensor, "*v r k"]:
        """Weights g of the experts: not negative, summing to 1.

        Args:
            scores: Of the router, in the type in which the softmax is to run.
            noise: Standard normal numbers, while fitting; None is without noise.
        """
        if noise is not None:
            scores = scores + self.noise * noise.to(scores.dtype)
        scores = scores / self.temperature if self.temperature != 1 else scores
        if 0 < self.top_k < scores.shape[-1]:
            chosen = scores.topk(self.top_k, dim=-1).indices
            left_out = torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen, False)
            scores = scores.masked_fill(left_out, -torch.inf)
        return scores.softmax(-1)


@dataclass(frozen=True, kw_only=True)
class RoutingPenalties:
    """Weights of the regularisers; 0 leaves one out."""

    load_balance: float = 0.0
    """Of K Σ_k P_k², P being the mean routing of the batch: 1 when even, K when one expert takes
    all. The loss of Switch Transformers (arXiv:2101.03961, Eq. 4) with f = P, as for soft routing.
    """

    z_loss: float = 0.0
    """Of the mean of logsumexp(scores)², which keeps scores small (ST-MoE, arXiv:2202.08906,
    Eq. 5)."""

    entropy: float = 0.0
    """Of the mean entropy of g, in nats: positive makes slices choose, negative makes them share.
    """

    def __post_init__(self) -> None:
        if self.load_balance < 0 or self.z_loss < 0:
            raise ConfigError(
                "load_balance and z_loss must not be negative, got "
                f"{self.load_balance} and {self.z_loss}"
            )

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.load_balance or self.z_loss or self.entropy)

    def __call__(
        self,
        gates: Float[Tensor, "*v r k"],
        scores: Float[Tensor, "*v r k"],
        *,
        valid: Bool[Tensor, " r"] | None,
    ) -> Float[Tensor, "*v"]:
        """The weighted sum of the regularisers over the slices of a batch.

        Args:
            gates: g of each slice.
            scores: What they were made from, before noise, temperature and top-k.
            valid: True at slices, False at padding, which counts nowhere; None if there is none.
        """
        if valid is not None:
            gates, scores = gates[..., valid, :], scores[..., valid, :]
        mean = gates.mean(-2)
        # Not xlogy, whose gradient is NaN where an expert takes no part.
        logs = gates.clamp_min(torch.finfo(gates.dtype).tiny).log()
        entropy = -(gates * logs).sum(-1).mean(-1)
        balance = gates.shape[-1] * mean.square().sum(-1)
        z = scores.logsumexp(-1).square().mean(-1)
        total: Tensor = self.load_balance * balance + self.z_loss * z + self.entropy * entropy
        return total
