"""Pooling: how well each slice answers the query, to how much it weighs in its scan.

Attention with one learnt query (Algorithm 1, lines 5 to 8, of the MoLRE paper),

    α = softmax(q·h_s / √d over the slices s),    p = Σ_s α_s h_s

or the plain mean, the baseline without attention. A pool gives only α; `heads/head.py` takes the
weighted sum, because there it costs no d-wide copy of the slices. The query belongs to the scan,
not to a finding: all findings share one attention.

Axes: b scans, s slices (padded to the longest scan), d embedding, q queries (1, or 0 for the mean).
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ctfm.store.errors import ConfigError


class AttentionPool(nn.Module):
    """One learnt query; it starts at zero, so that an untrained head weighs all slices alike.

    Args:
        dim: d, numbers of an embedding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, dim))

    def forward(
        self, products: Float[Tensor, "b s q"], valid: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b s"]:
        """Weights α = softmax(q·h_s / √d) of the slices (line 7).

        Args:
            products: q·h_s. Padding may hold anything, NaN included.
            valid: True at slices, False at padding. A scan without any slice gives NaN:
                `PackedScans` refuses such a scan before it gets here.

        Returns:
            α in float32 at least: 0 at padding, summing to 1 over the slices of a scan.
        """
        scores = widened(products.squeeze(-1)) / math.sqrt(self.query.shape[1])
        return scores.masked_fill(~valid, -torch.inf).softmax(-1)


class MeanPool(nn.Module):
    """Every slice of a scan weighs the same; nothing is learnt.

    Args:
        dim: d, numbers of an embedding.
    """

    query: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("query", torch.zeros(0, dim), persistent=False)

    def forward(
        self, products: Float[Tensor, "b s q"], valid: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b s"]:
        """Weights 1 / (number of slices of the scan), 0 at padding, in float32 at least."""
        counted = widened(valid.to(products.dtype))
        return counted / counted.sum(-1, keepdim=True)


def build_pool(name: str, dim: int) -> AttentionPool | MeanPool:
    """The pool of that name.

    Raises:
        ConfigError: If there is none.
    """
    if name == "attention":
        return AttentionPool(dim)
    if name == "mean":
        return MeanPool(dim)
    raise ConfigError(f"no pool is named {name!r}: choose attention or mean")


def widened(x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """In float32, or in its own type where that is wider: the type for a softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
