"""The head: slice embeddings of scans, to one logit a finding (Algorithm 1).

An adapter (MoLRE) adapts each slice, a pool weighs the slices, a linear layer classifies (lines 3
to 9 of Algorithm 1 of the MoLRE paper; the sigmoid of line 9 is left to the loss and to
`predict`).

Everything after the router is linear, so the adapted slices h are never made. With u the
coefficients of the update, B their basis, M the linear part of the adapter (see
`heads/adapters.py`) and k a key of the pool,

    h_s = (I + M) x_s + u_s B                        k·h_s = (k + k M)·x_s + u_s·(B k)
    p = (I + M) Σ_s α_s x_s + (Σ_s α_s u_s) B        logit = Wc p + b

costs one product of x with [A; W1; k] and no d-wide intermediate per slice. Where each finding has
its own weights α, logit_c = Σ_s α^c_s (w_c·h_s) + b_c: Wc joins the product and nothing d-wide is
pooled. What is exact in real numbers is exact here: the tests hold this form against a literal
Algorithm 1.

A head reads rows in blocks (`heads/batches.py`). Its two steps, `factors` and `finish`, are apart
so that several heads can share the product (`heads/stack.py`), and parameters may carry an axis of
variants in front.

Axes: b scans, s slices (padded to the longest scan), r rows, d embedding, k experts, c findings,
m rows of `factors`, n rows of the adapter's basis, q keys of the pool, g groups of weights;
v variants side by side, where there are several.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from ctfm.heads.adapters import Adapter, Coefficients, without_routing
from ctfm.heads.batches import Layout
from ctfm.heads.molre import SOFT, MoLRE, as_factor, split_columns
from ctfm.heads.pooling import MultiheadPool, Pool, build_pool
from ctfm.heads.routing import Routing

_GEMM_MULTIPLE = 16


class HeadOutput(NamedTuple):
    """What `Head.explain` gives; padding is 0 in `attention` and `routing`."""

    logits: Float[Tensor, "b c"]
    attention: Float[Tensor, "b g s"]
    routing: Float[Tensor, "b s k"]


class RowOutput(NamedTuple):
    """What `Head.finish` gives: logits by scan, the rest by row of the batch."""

    logits: Float[Tensor, "*v b c"]
    attention: Float[Tensor, "*v r g"]
    """0 at padding."""
    routed: Coefficients


class Head(nn.Module):
    """Adapter, pool and classifier in the fused form of the module's docstring.

    It computes in the type of its parameters (float32), to which stored float16 is cast. For mixed
    precision pass x in bfloat16: the products with x and the router's hidden layer then run in
    bfloat16, the rest as before.

    State: `molre.*` (see `MoLRE`), or `adapter.*` of another adapter, or neither for `experts=0`;
    `pool.*` (`pool.query` (1, d) of `attention`); `classifier.weight` (c, d), `classifier.bias`.

    Args:
        dim: d, numbers of an embedding.
        findings: C, number of findings.
        experts: K; 0 is no adapter, 1 is LoRA with a trivial router.
        rank: r of every expert.
        router_hidden: d_h, hidden width of the router.
        pool: Its name, one of `pooling.POOLS`.
        expert_bias: Whether each expert adds a vector of its own.
        routing: How the router's scores become weights.
        adapter: An adapter without experts, instead of MoLRE; `experts` is then 0.
        pool_heads: H of the pool `multihead`.
        pool_hidden: L of the pool `gated`.

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
        *,
        routing: Routing = SOFT,
        adapter: Adapter | None = None,
        pool_heads: int = 4,
        pool_hidden: int = 128,
    ) -> None:
        super().__init__()
        self.molre = (
            MoLRE(dim, experts, rank, router_hidden, expert_bias, routing) if experts else None
        )
        self.adapter = adapter
        self.pool: Pool = build_pool(
            pool, dim, findings=findings, heads=pool_heads, hidden=pool_hidden
        )
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
        return self.of_rows(*_one_block(x, valid)).logits

    def explain(self, x: Float[Tensor, "b s d"], valid: Bool[Tensor, "b s"]) -> HeadOutput:
        """Logits, with the attention and the routing that led to them; arguments as `forward`."""
        output = self.of_rows(*_one_block(x, valid))
        routing = output.routed.gates.reshape(*valid.shape, -1)
        return HeadOutput(
            output.logits,
            output.attention.reshape(*valid.shape, -1).mT,
            routing.masked_fill(~valid.unsqueeze(-1), 0.0),
        )

    def slice_contributions(
        self, x: Float[Tensor, "b s d"], valid: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b s c"]:
        """What each slice adds to each logit: α_s Wc·h_s; arguments as `forward`.

        Their sum over the slices, plus the classifier's bias, is the logit.
        """
        rows, layout = _one_block(x, valid)
        attention = self.of_rows(rows, layout).attention
        classifier = self.classifier.weight
        if isinstance(self.pool, MultiheadPool):
            answers = self._answers(rows, _by_part(classifier, len(self.pool.query)).flatten(0, 1))
            by_part = answers.reshape(len(rows), len(classifier), -1)
            added = (by_part * attention.unsqueeze(-2)).sum(-1)
        else:
            added = self._answers(rows, classifier) * attention
        return added.reshape(*valid.shape, -1).masked_fill(~valid.unsqueeze(-1), 0.0)

    def of_rows(
        self,
        x: Float[Tensor, "r d"],
        layout: Layout,
        *,
        noise: Float[Tensor, "r k"] | None = None,
    ) -> RowOutput:
        """Both steps of a head by itself.

        Args:
            x: Rows of a batch; padding holds finite numbers.
            layout: How they belong to its scans.
            noise: Standard normal numbers for noisy routing, while fitting.
        """
        factors = self.factors()
        x = as_factor(x, factors.dtype)
        return self.finish(times(x, factors), x, layout, noise=noise)

    def factors(self) -> Float[Tensor, "*v m d"]:
        """All that x is multiplied with: the adapter's projection, and the keys of the pool."""
        keys = self._folded(self.pool.keys(self.classifier.weight))
        adapter = self._adapting()
        return keys if adapter is None else torch.cat([adapter.projection(), keys], dim=-2)

    def finish(
        self,
        projected: Float[Tensor, "*v r m"],
        x: Float[Tensor, "r d"],
        layout: Layout,
        *,
        noise: Float[Tensor, "*v r k"] | None = None,
    ) -> RowOutput:
        """All that comes after the product of x with `factors`.

        Args:
            projected: That product, in the type of x.
            x: Rows of a batch, in the type of the parameters or bfloat16.
            layout: How they belong to its scans.
            noise: Standard normal numbers for noisy routing, while fitting.
        """
        classifier, basis = self.classifier, self._basis()
        keys = self.pool.keys(classifier.weight)
        adapting, answering = split_columns(projected, projected.shape[-1] - keys.shape[-2])
        routed = self._coefficients(adapting, noise=noise)
        products = answering.to(keys.dtype) + routed.u @ (basis @ keys.mT)
        attention, logits = [], []
        columns = (layout.split(products), layout.split(x), layout.split(routed.u), layout.masks())
        for answers, slices, u, valid in zip(*columns, strict=True):
            weights = self.pool(answers, valid)
            attention.append(weights.flatten(-3, -2))
            if self.pool.per_finding:
                logits.append((weights * answers[..., -classifier.out_features :]).sum(-2))
            else:
                adapted = (weights.mT @ u) @ basis.unsqueeze(-3)
                pooled = self._joined(self._summed(weights, slices) + adapted)
                logits.append(pooled @ classifier.weight.mT)
        in_blocks = torch.cat(logits, dim=-2) + classifier.bias.unsqueeze(-2)
        return RowOutput(layout.restore(in_blocks), torch.cat(attention, dim=-2), routed)

    def _summed(
        self, weights: Float[Tensor, "*v b s g"], slices: Float[Tensor, "b s d"]
    ) -> Float[Tensor, "*v b g d"]:
        """(I + M) Σ_s α_s x_s of each scan, under the weights of each group."""
        flat = weights.to(slices.dtype).reshape(-1, *weights.shape[-3:])
        # One product for all variants; a broadcast one would copy the slices for each.
        summed = torch.einsum("vbsg,bsd->vbgd", flat, slices).to(weights.dtype)
        summed = summed.reshape(*weights.shape[:-3], *summed.shape[1:])
        linear = self._linear()
        return summed if linear is None else summed + summed @ linear.mT.unsqueeze(-3)

    def _joined(self, pooled: Float[Tensor, "*v b g d"]) -> Float[Tensor, "*v b d"]:
        """Part i of the embedding from group i; all of it where there is one group."""
        groups = pooled.shape[-2]
        parts = pooled.reshape(*pooled.shape[:-1], groups, -1)
        return parts.diagonal(dim1=-3, dim2=-2).mT.flatten(-2)

    def _answers(self, x: Float[Tensor, "r d"], keys: Float[Tensor, "q d"]) -> Float[Tensor, "r q"]:
        """k·h of each row, without making h."""
        x = as_factor(x, keys.dtype)
        adapter, answers = self._adapting(), times(x, self._folded(keys)).to(keys.dtype)
        if adapter is None:
            return answers
        routed = adapter.coefficients(times(x, adapter.projection()))
        return answers + routed.u @ (self._basis() @ keys.mT)

    def _adapting(self) -> Adapter | None:
        return self.molre if self.adapter is None else self.adapter

    def _coefficients(
        self, projected: Float[Tensor, "*v r m"], *, noise: Float[Tensor, "*v r k"] | None
    ) -> Coefficients:
        if (adapter := self._adapting()) is not None:
            return adapter.coefficients(projected, noise=noise)
        return without_routing(projected.to(self.classifier.weight.dtype))

    def _basis(self) -> Float[Tensor, "*v n d"]:
        adapter = self._adapting()
        return self.classifier.weight[..., :0, :] if adapter is None else adapter.basis()

    def _linear(self) -> Float[Tensor, "*v d d"] | None:
        return None if self.adapter is None else self.adapter.linear()

    def _folded(self, keys: Float[Tensor, "*v q d"]) -> Float[Tensor, "*v q d"]:
        """Keys k (I + M)."""
        linear = self._linear()
        return keys if linear is None else keys + keys @ linear


def times(x: Float[Tensor, "r d"], factors: Float[Tensor, "*v m d"]) -> Float[Tensor, "*v r m"]:
    """The one product of rows with factors, in the type of the rows.

    The rows of the factor are filled up to a multiple: 305 cost half as much again as 304.
    """
    flat = factors.flatten(0, -2).to(x.dtype)
    filler = -len(flat) % _GEMM_MULTIPLE
    product = functional.linear(x, functional.pad(flat, (0, 0, 0, filler)))
    product = split_columns(product, len(flat))[0].reshape(len(x), *factors.shape[:-1])
    return product.movedim(0, -2)


def _one_block(
    x: Float[Tensor, "b s d"], valid: Bool[Tensor, "b s"]
) -> tuple[Float[Tensor, "r d"], Layout]:
    """Padded slices as rows; padding is zeroed, for huge numbers would give NaN gradients."""
    blocks = ((valid.shape[0], valid.shape[1]),)
    if bool(valid.all()):
        return x.flatten(0, 1), Layout(blocks=blocks)
    shown = x.masked_fill(~valid.unsqueeze(-1), 0.0)
    return shown.flatten(0, 1), Layout(blocks=blocks, valid=valid.flatten())


def _by_part(rows: Float[Tensor, "c d"], parts: int) -> Float[Tensor, "c p d"]:
    """Each row as many times as there are parts, with zeros outside the part."""
    apart = torch.eye(parts, dtype=rows.dtype, device=rows.device)
    spread = apart.unsqueeze(-1) * rows.reshape(len(rows), parts, -1).unsqueeze(-3)
    return spread.flatten(-2)
