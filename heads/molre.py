"""MoLRE: a feature of d numbers, to the same feature adapted by a mixture of low-rank experts.

    g(x) = softmax(W2 · relu(W1 x + b1) + b2)                                   (Eq. 2)
    h(x) = W0 x + Σ_i g_i(x) · B_i A_i x                                        (Eq. 1)

of *Specializing Foundation Models via Mixture of Low-Rank Experts for Comprehensive Head CT
Analysis*, Sec. 2.1. On cached embeddings W0 is the identity (`MoLRE`); inside a backbone it is
the frozen weight of a linear layer (`MoLRELinear`). The B_i start at zero, so an untrained module
changes nothing; one expert is LoRA, without LoRA's scaling by alpha / rank, which Eq. 1 lacks.

Everything after the router is linear, so the update is a row of K·r coefficients times one
matrix: `projection`, `coefficients` and `basis` give the three factors, and `heads/head.py`
multiplies them in the order in which no d-wide intermediate per slice is ever made.

Routing other than the paper's is in `heads/routing.py`, adapters other than MoLRE in
`heads/adapters.py`.

Axes: d embedding in, o embedding out, k experts, r rank, m = k·r + d_h, n = k·r (+ k biases);
v variants side by side: parameters may carry axes in front (`heads/stack.py` puts them there).
"""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctfm.heads.adapters import Adapter, Coefficients
from ctfm.heads.routing import Routing
from ctfm.store.errors import ConfigError

SOFT = Routing()
"""The paper's routing."""


class LowRankExperts(Adapter):
    """K experts of rank r and their router: the parameters that both forms of MoLRE share.

    Args:
        dim: d, numbers of the feature that goes in.
        out_dim: Numbers of the feature that comes out.
        experts: K, at least 1.
        rank: r of every expert.
        router_hidden: d_h, hidden width of the router.
        expert_bias: Whether each expert adds a vector b_i beside B_i A_i x. Eq. 1 has none, but
            the parameter counts of Table 2 are those with one.
        routing: How the router's scores become weights.

    Raises:
        ConfigError: If a size is not positive.
    """

    up_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        experts: int,
        rank: int,
        router_hidden: int,
        expert_bias: bool,
        routing: Routing,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "experts": experts, "rank": rank, "router_hidden": router_hidden}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} must be at least 1, got {size}")
        self.experts, self.rank, self.routing = experts, rank, routing
        self.down = nn.Parameter(torch.empty(experts, rank, dim))
        self.up = nn.Parameter(torch.zeros(experts, out_dim, rank))
        bias = nn.Parameter(torch.zeros(experts, out_dim)) if expert_bias else None
        self.register_parameter("up_bias", bias)
        hidden, gates = nn.Linear(dim, router_hidden), nn.Linear(router_hidden, experts)
        self.router = nn.Sequential(hidden, nn.ReLU(), gates)
        # As LoRA (Hu et al. 2021) and every linear layer of torch: uniform in ±1/√d.
        nn.init.uniform_(self.down, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def projection(self) -> Float[Tensor, "*v m d"]:
        """All A_i over W1: what a feature is multiplied with, in one product."""
        return torch.cat([self.down.flatten(-3, -2), self._router_layers()[0].weight], dim=-2)

    def coefficients(
        self,
        projected: Float[Tensor, "*v r m"],
        *,
        noise: Float[Tensor, "*v r k"] | None = None,
    ) -> Coefficients:
        """Coefficients u = (g ⊗ 1_r) ⊙ A x of the update, and the routing g (Eq. 2).

        Args:
            projected: Features times `projection` transposed, in the parameters' type or bfloat16.
            noise: Standard normal numbers for noisy routing; None is without.

        Returns:
            u such that the update is u times `basis` (with expert biases, g follows in u).
        """
        width = self.experts * self.rank
        router_in, router_out = self._router_layers()
        kind = projected.dtype
        reduced, routing = split_columns(projected, width)
        hidden = routing + router_in.bias.unsqueeze(-2).to(kind)
        raw = torch.matmul(functional.relu(hidden), router_out.weight.mT.to(kind))
        wide = torch.promote_types(self.down.dtype, torch.float32)
        scores = raw.to(wide) + router_out.bias.unsqueeze(-2)
        gates = self.routing.gates(scores, noise=noise)
        reduced = reduced.to(self.down.dtype)
        weights = gates.to(reduced.dtype)
        mixed = weights.unsqueeze(-1) * reduced.reshape(
            *reduced.shape[:-1], self.experts, self.rank
        )
        u = mixed.flatten(-2)
        return Coefficients(
            u if self.up_bias is None else torch.cat([u, weights], -1), gates, scores
        )

    def basis(self) -> Float[Tensor, "*v n o"]:
        """All B_i transposed, stacked; below them the expert biases, if any."""
        stacked = self.up.mT.flatten(-3, -2)
        return stacked if self.up_bias is None else torch.cat([stacked, self.up_bias], dim=-2)

    def update(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch o"]:
        """Σ_i g_i(x) (B_i A_i x + b_i), in the dtype of the parameters."""
        weights = self.projection()
        rows = as_factor(x, weights.dtype).reshape(-1, x.shape[-1])
        projected = functional.linear(rows, weights.to(rows.dtype))
        update = self.coefficients(projected).u @ self.basis()
        return update.reshape(*x.shape[:-1], -1)

    def _router_layers(self) -> tuple[nn.Linear, nn.Linear]:
        first, _, last = self.router
        return cast(nn.Linear, first), cast(nn.Linear, last)


class MoLRE(LowRankExperts):
    """Eq. 1 with W0 the identity: for embeddings that a frozen backbone has already made.

    Args:
        dim: d, numbers of an embedding.
        experts: K; 1 is LoRA with a trivial router.
        rank: r of every expert.
        router_hidden: d_h, hidden width of the router.
        expert_bias: Whether each expert adds a vector of its own.
        routing: How the router's scores become weights.
    """

    def __init__(
        self,
        dim: int,
        experts: int = 6,
        rank: int = 8,
        router_hidden: int = 256,
        expert_bias: bool = False,
        routing: Routing = SOFT,
    ) -> None:
        super().__init__(
            dim,
            dim,
            experts=experts,
            rank=rank,
            router_hidden=router_hidden,
            expert_bias=expert_bias,
            routing=routing,
        )

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Adapt features (Eq. 1); computed in the parameters' dtype, returned in that of x."""
        return x + self.update(x).to(x.dtype)


class MoLRELinear(LowRankExperts):
    """Eq. 1 around a linear layer of a backbone: W0 (and its bias) stay as they are.

    Args:
        base: The layer; its parameters are frozen here.
        experts: K; 1 is LoRA with a trivial router.
        rank: r of every expert.
        router_hidden: d_h, hidden width of the router.
        expert_bias: Whether each expert adds a vector of its own.
        routing: How the router's scores become weights.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        experts: int = 6,
        rank: int = 8,
        router_hidden: int = 256,
        expert_bias: bool = False,
        routing: Routing = SOFT,
    ) -> None:
        super().__init__(
            base.in_features,
            base.out_features,
            experts=experts,
            rank=rank,
            router_hidden=router_hidden,
            expert_bias=expert_bias,
            routing=routing,
        )
        self.base = base.requires_grad_(False)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch o"]:
        """W0 x + Σ_i g_i(x) B_i A_i x (Eq. 1), in the dtype that the frozen layer gives."""
        frozen: Tensor = self.base(x)
        return frozen + self.update(x).to(frozen.dtype)


def as_factor(x: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Cast features to the type in which they are multiplied.

    Args:
        x: Features; float16 is a storage type here, and bfloat16 a request for mixed precision.
        dtype: Of the parameters.

    Returns:
        x itself if it is bfloat16, else x in `dtype`.
    """
    return x if x.dtype == torch.bfloat16 else x.to(dtype)


def split_columns(
    x: Float[Tensor, "... m"], first: int
) -> tuple[Float[Tensor, "... _"], Float[Tensor, "... _"]]:
    """The first columns and the others.

    The gradient of a slice is written into zeros as large as the whole, that of a split is not.
    """
    one, other = torch.split(x, [first, x.shape[-1] - first], dim=-1)
    return one, other


def parameter_count(
    dim: int,
    experts: int = 6,
    rank: int = 8,
    *,
    router_hidden: int = 256,
    expert_bias: bool = False,
) -> int:
    """Trainable numbers of a `MoLRE`: K·r·2d + (d + 1)·d_h + (d_h + 1)·K, and K·d for biases.

    Args:
        dim: d, numbers of an embedding.
        experts: K; 0 is no adapter.
        rank: r of every expert.
        router_hidden: d_h, hidden width of the router.
        expert_bias: Whether each expert adds a vector of its own.
    """
    if experts == 0:
        return 0
    router = (dim + 1) * router_hidden + (router_hidden + 1) * experts
    return experts * rank * 2 * dim + router + (experts * dim if expert_bias else 0)
