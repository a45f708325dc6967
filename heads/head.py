"""The head: padded slice embeddings of scans, to one logit a finding (Algorithm 1).

MoLRE adapts each slice, attention pools the slices, a linear layer classifies (lines 3 to 9 of
Algorithm 1 of the MoLRE paper; the sigmoid of line 9 is left to the loss and to `predict`).

Everything after the router is linear, so the adapted slices h are never made. With u the
coefficients of the update and B their basis (see `heads/molre.py`),

    h_s = x_s + u_s B       q·h_s = q·x_s + u_s·(B q)       p = Σ_s α_s x_s + (Σ_s α_s u_s) B

costs one product of x with [A; W1; q] and no d-wide intermediate per slice. What is exact in
real numbers is exact here: the tests hold this form against a literal Algorithm 1.

Axes: b scans, s slices (padded to the longest scan), d embedding, k experts, c findings,
m rows of `MoLRE.projection`, n rows of `MoLRE.basis`, q queries (1, or 0 for the mean).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from ctfm.heads.molre import MoLRE, as_factor
from ctfm.heads.pooling import build_pool

_GEMM_MULTIPLE = 16
"""Rows of the one big factor are filled up to a multiple: 305 cost half as much again as 304."""


class HeadOutput(NamedTuple):
    """What `Head.explain` gives; padding is 0 in `attention` and `routing`."""

    logits: Float[Tensor, "b c"]
    attention: Float[Tensor, "b 1 s"]
    routing: Float[Tensor, "b s k"]


class _Slices(NamedTuple):
    """What is known of each slice without making its adapted embedding."""

    x: Float[Tensor, "b s d"]
    coefficients: Float[Tensor, "b s n"]
    basis: Float[Tensor, "n d"]
    attention: Float[Tensor, "b s"]
    routing: Float[Tensor, "b s k"]


class Head(nn.Module):
    """MoLRE, pooling and classifier in the fused form of the module's docstring.

    It computes in the type of its parameters (float32), to which stored float16 is cast. For mixed
    precision pass x in bfloat16: the products with x then run in bfloat16, the rest as before.

    State: `molre.*` (see `MoLRE`; none for `experts=0`), `pool.query` (1, d) (none for the mean),
    `classifier.weight` (c, d), `classifier.bias` (c).

    Args:
        dim: d, numbers of an embedding.
        findings: C, number of findings.
        experts: K; 0 is no adapter, 1 is LoRA with a trivial router.
        rank: r of every expert.
        router_hidden: d_h, hidden width of the router.
        pool: `attention` or `mean`.
        expert_bias: Whether each expert adds a vector of its own.

    Raises:
        ConfigError: If a size is not positive, or no pool has that name.
    """

    def __init__(
        self,
        dim: int,
        findings: int,
        experts: int = 6,
        rank: int = 8,
        router_hidden: int = 256,
        pool: str = "attention",
        expert_bias: bool = False,
    ) -> None:
        super().__init__()
        self.molre = MoLRE(dim, experts, rank, router_hidden, expert_bias) if experts else None
        self.pool = build_pool(pool, dim)
        self.classifier = nn.Linear(dim, findings)

    def forward(
        self, x: Float[Tensor, "b s d"], valid: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b c"]:
        """One logit a scan and finding.

        Args:
            x: Embeddings of the slices. Padding may hold anything finite.
            valid: True at slices, False at padding. A scan without any slice gives NaN:
                `PackedScans` refuses such a scan before it gets here.
        """
        return self._classify(self._slices(x, valid))

    def explain(self, x: Float[Tensor, "b s d"], valid: Bool[Tensor, "b s"]) -> HeadOutput:
        """Logits, with the attention and the routing that led to them; arguments as `forward`."""
        slices = self._slices(x, valid)
        routing = slices.routing.masked_fill(~valid.unsqueeze(-1), 0.0)
        return HeadOutput(self._classify(slices), slices.attention.unsqueeze(1), routing)

    def slice_contributions(
        self, x: Float[Tensor, "b s d"], valid: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b s c"]:
        """What each slice adds to each logit: α_s Wc·h_s; arguments as `forward`.

        All findings share the attention α; the contributions tell them apart. Their sum over the
        slices, plus the classifier's bias, is the logit.
        """
        slices = self._slices(x, valid)
        weight = self.classifier.weight
        direct = functional.linear(slices.x, weight.to(slices.x.dtype)).to(weight.dtype)
        answers = direct + slices.coefficients @ (slices.basis @ weight.T)
        answers = answers.masked_fill(~valid.unsqueeze(-1), 0.0)
        return slices.attention.unsqueeze(-1) * answers

    def _slices(self, x: Float[Tensor, "b s d"], valid: Bool[Tensor, "b s"]) -> _Slices:
        query = self.pool.query
        adapter = query[:0] if self.molre is None else self.molre.projection()
        basis = query[:0] if self.molre is None else self.molre.basis()
        filler = query.new_zeros(-(len(adapter) + len(query)) % _GEMM_MULTIPLE, query.shape[1])
        factors = torch.cat([adapter, query, filler])
        x = as_factor(x, factors.dtype)
        projected = functional.linear(x, factors.to(x.dtype)).to(factors.dtype)
        # Zeroed before anything non-linear: huge padding would give NaN gradients (0 · inf).
        projected = projected.masked_fill_(~valid.unsqueeze(-1), 0.0)
        sizes = [len(adapter), len(query), len(filler)]
        adapted, products, _ = torch.split(projected, sizes, dim=-1)
        if self.molre is None:
            coefficients, routing = adapted, adapted
        else:
            coefficients, routing = self.molre.coefficients(adapted)
        attention = self.pool(products + coefficients @ (basis @ query.T), valid)
        return _Slices(x, coefficients, basis, attention, routing)

    def _classify(self, slices: _Slices) -> Float[Tensor, "b c"]:
        weights = slices.attention.unsqueeze(1)
        pooled = (weights.to(slices.x.dtype) @ slices.x).to(slices.basis.dtype)
        pooled = pooled + (weights.to(slices.basis.dtype) @ slices.coefficients) @ slices.basis
        logits: Tensor = self.classifier(pooled.squeeze(1))
        return logits
