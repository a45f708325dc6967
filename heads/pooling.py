"""Pooling: how well each slice answers some queries, to how much it weighs in its scan.

A pool is given the products k·h_s of its keys k with the adapted slices, and gives weights α that
sum to 1 over the slices of a scan; `heads/head.py` takes the weighted sums, because there it costs
no d-wide copy of the slices. α has one column a group:

    attention    α = softmax(q·h_s / √d)               one learnt query (Algorithm 1, lines 5 to 8)
    gated        α = softmax(w·(tanh(V h_s) ⊙ σ(U h_s)))       Ilse et al. 2018, Eq. 9
    mean         α = 1 / S                             the baseline without attention
    multihead    α^i = softmax(q_i·h_s^i / √(d/H))     H queries, each of its own d/H of the numbers
    per-finding  α^c = softmax(q_c·h_s / √d)           a query a finding: each has its own slices
    max          α^c = 1 at the largest w_c·h_s        the most suspicious slice of each finding

The maximum is taken over the logits of the slices, not over the numbers of their embeddings: that
would need every adapted slice, and would not say which slice a finding was found in. (In the words
of Ilse et al., Sec. 2.2: the instance-level approach.) Queries start at zero, so an untrained head
weighs all slices alike.

Axes: b scans, s slices (of one block of a layout), d embedding, q keys, g groups, c findings;
v variants of a head side by side, where there are several.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ctfm.store.errors import ConfigError

POOLS = ("attention", "gated", "mean", "max", "multihead", "per-finding")
"""Names of the pools."""


class Pool(nn.Module):
    """What a head needs of a pool; a subclass says how products become scores."""

    per_finding = False
    """Whether each finding has a group of its own; the last keys are then the classifier's weights.
    """

    def keys(self, classifier: Float[Tensor, "*v c d"]) -> Float[Tensor, "*v q d"]:
        """What adapted slices are multiplied with.

        Args:
            classifier: Weights Wc of the head's classifier.
        """
        return classifier[..., :0, :]

    def scores(self, products: Float[Tensor, "*v b s q"]) -> Float[Tensor, "*v b s g"]:
        """The logarithm of the weights, up to a constant a scan and group."""
        raise NotImplementedError

    def forward(
        self, products: Float[Tensor, "*v b s q"], valid: Bool[Tensor, "b s"] | None
    ) -> Float[Tensor, "*v b s g"]:
        """Weights α of the slices, in the type of the products.

        Args:
            products: Keys times slices. Padding may hold anything, NaN included.
            valid: True at slices, False at padding; None if there is none. A scan without any
                slice gives NaN: `PackedScans` refuses such a scan before it gets here.

        Returns:
            0 at padding, summing to 1 over the slices of a scan.
        """
        scores = self.scores(products)
        if valid is not None:
            scores = scores.masked_fill(~valid.unsqueeze(-1), -torch.inf)
        return scores.softmax(-2)


class AttentionPool(Pool):
    """Learnt queries; one, which all findings share, is the paper's.

    Args:
        dim: d, numbers of an embedding.
        queries: 1, or one for each finding.
    """

    def __init__(self, dim: int, queries: int = 1) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, dim))

    def keys(self, classifier: Float[Tensor, "*v c d"]) -> Float[Tensor, "*v q d"]:
        """The queries."""
        return self.query

    def scores(self, products: Float[Tensor, "*v b s q"]) -> Float[Tensor, "*v b s g"]:
        """q·h_s / √d (line 7)."""
        return products / math.sqrt(self.query.shape[-1])


class PerFindingPool(AttentionPool):
    """A learnt query for each finding."""

    per_finding = True

    def keys(self, classifier: Float[Tensor, "*v c d"]) -> Float[Tensor, "*v q d"]:
        """The queries, and what the slices that they weigh answer."""
        return torch.cat([self.query, classifier], dim=-2)

    def scores(self, products: Float[Tensor, "*v b s q"]) -> Float[Tensor, "*v b s g"]:
        """q_c·h_s / √d."""
        return super().scores(products[..., : self.query.shape[-2]])


class MultiheadPool(Pool):
    """H learnt queries, each of an equal part of the embedding (Vaswani et al. 2017, Sec. 3.2.2).

    Args:
        dim: d, numbers of an embedding.
        heads: H; d is a multiple of it.

    Raises:
        ConfigError: If it is not.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ConfigError(
                f"pool_heads must divide the {dim} numbers of an embedding, got {heads}"
            )
        self.query = nn.Parameter(torch.zeros(heads, dim // heads))

    def keys(self, classifier: Float[Tensor, "*v c d"]) -> Float[Tensor, "*v q d"]:
        """Each query at its part of the embedding, zero elsewhere."""
        heads = self.query.shape[-2]
        apart = torch.eye(heads, dtype=self.query.dtype, device=self.query.device)
        return (apart.unsqueeze(-1) * self.query.unsqueeze(-2)).flatten(-2)

    def scores(self, products: Float[Tensor, "*v b s q"]) -> Float[Tensor, "*v b s g"]:
        """q_i·h_s^i / √(d/H)."""
        return products / math.sqrt(self.query.shape[-1])


class GatedPool(Pool):
    """Gated attention.

    Args:
        dim: d, numbers of an embedding.
        hidden: Rows of V and of U (L of the source, 128 there).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dim)
        self.value = nn.Parameter(torch.empty(hidden, dim).uniform_(-bound, bound))
        self.gate = nn.Parameter(torch.empty(hidden, dim).uniform_(-bound, bound))
        self.query = nn.Parameter(torch.zeros(1, hidden))

    def keys(self, classifier: Float[Tensor, "*v c d"]) -> Float[Tensor, "*v q d"]:
        """V over U."""
        return torch.cat([self.value, self.gate], dim=-2)

    def scores(self, products: Float[Tensor, "*v b s q"]) -> Float[Tensor, "*v b s g"]:
        """w·(tanh(V h_s) ⊙ σ(U h_s))."""
        value, gate = products.chunk(2, dim=-1)
        hidden = value.tanh() * gate.sigmoid()
        return hidden @ self.query.mT.unsqueeze(-3)


class MeanPool(Pool):
    """Every slice of a scan weighs the same; nothing is learnt."""

    def scores(self, products: Float[Tensor, "*v b s q"]) -> Float[Tensor, "*v b s g"]:
        """0 for all."""
        return products.new_zeros(*products.shape[:-1], 1)


class MaxPool(Pool):
    """For each finding the slice with the largest logit, the first of equal ones."""

    per_finding = True

    def keys(self, classifier: Float[Tensor, "*v c d"]) -> Float[Tensor, "*v q d"]:
        """The classifier's weights: the products are the logits of the slices."""
        return classifier

    def forward(
        self, products: Float[Tensor, "*v b s q"], valid: Bool[Tensor, "b s"] | None
    ) -> Float[Tensor, "*v b s g"]:
        """1 at the largest product of each column, 0 elsewhere; arguments as `Pool.forward`."""
        scores = products.detach()
        if valid is not None:
            scores = scores.masked_fill(~valid.unsqueeze(-1), -torch.inf)
        return torch.zeros_like(scores).scatter(-2, scores.argmax(-2, keepdim=True), 1.0)


def build_pool(name: str, dim: int, *, findings: int, heads: int, hidden: int) -> Pool:
    """The pool of that name.

    Args:
        name: One of `POOLS`.
        dim: d, numbers of an embedding.
        findings: C.
        heads: H of `multihead`.
        hidden: L of `gated`.

    Raises:
        ConfigError: If there is none, or a size does not fit.
    """
    if name == "attention":
        return AttentionPool(dim)
    if name == "gated":
        return GatedPool(dim, hidden)
    if name == "multihead":
        return MultiheadPool(dim, heads)
    if name == "per-finding":
        return PerFindingPool(dim, findings)
    if name in ("mean", "max"):
        return MeanPool() if name == "mean" else MaxPool()
    raise ConfigError(f"no pool is named {name!r}: choose one of {', '.join(POOLS)}")
