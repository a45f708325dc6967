"""Adapters: a slice feature, to the same feature adapted; MoLRE, and what it is compared with.

Every adapter has the form

    h = (I + M) x + u(x) B

with u a few coefficients a slice and B their basis, so that a head never makes h (`heads/head.py`):

    molre    u = (g ⊗ 1_r) ⊙ A x     K experts of rank r, mixed slice by slice (`heads/molre.py`)
    lora     u = A x                 one expert, no router: LoRA without alpha / rank
    mlp      u = relu(W1 x + b1)     a bottleneck adapter (Houlsby et al. 2019, arXiv:1902.00751)
    linear   M, no u                 any linear map: what adaptation without routing can do at most
    none     neither                 the frozen feature

All start as the identity.

Axes: d embedding, r rows (slices), m rows of `projection`, n rows of `basis`, q rows that h is to
be multiplied with; v variants side by side, where there are several.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctfm.store.errors import ConfigError


class Coefficients(NamedTuple):
    """What an adapter makes of each slice."""

    u: Float[Tensor, "*v r n"]
    """Coefficients of the update: it is u times the adapter's `basis`."""

    gates: Float[Tensor, "*v r k"]
    """Routing g, in float32 at least; no columns without experts."""

    scores: Float[Tensor, "*v r k"]
    """What the router gave, before the softmax."""


class Adapter(nn.Module):
    """What a head needs of an adapter."""

    def projection(self) -> Float[Tensor, "*v m d"]:
        """What features are multiplied with to find the coefficients."""
        raise NotImplementedError

    def coefficients(
        self, projected: Float[Tensor, "*v r m"], *, noise: Float[Tensor, "*v r k"] | None = None
    ) -> Coefficients:
        """Coefficients of each slice, and the routing that led to them.

        Args:
            projected: Features times `projection` transposed, in the parameters' type or bfloat16.
            noise: Standard normal numbers for noisy routing; None is without.
        """
        raise NotImplementedError

    def basis(self) -> Float[Tensor, "*v n d"]:
        """B: the update is u times it."""
        raise NotImplementedError

    def linear(self) -> Float[Tensor, "*v d d"] | None:
        """M, or None where it is zero."""
        return None


def without_routing(u: Float[Tensor, "*v r n"]) -> Coefficients:
    """Coefficients of an adapter that has no experts."""
    return Coefficients(u, u[..., :0], u[..., :0])


class LoRA(Adapter):
    """h = x + B A x, with B zero at the start.

    Args:
        dim: d, numbers of an embedding.
        rank: r.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dim)
        self.down = nn.Parameter(torch.empty(rank, dim).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(dim, rank))

    def projection(self) -> Float[Tensor, "*v m d"]:
        """A."""
        return self.down

    def coefficients(
        self, projected: Float[Tensor, "*v r m"], *, noise: Float[Tensor, "*v r k"] | None = None
    ) -> Coefficients:
        """A x."""
        return without_routing(projected.to(self.down.dtype))

    def basis(self) -> Float[Tensor, "*v n d"]:
        """B transposed."""
        return self.up.mT


class BottleneckMLP(Adapter):
    """h = x + W2 relu(W1 x + b1) + b2, with W2 and b2 zero at the start.

    Args:
        dim: d, numbers of an embedding.
        hidden: Width of the bottleneck.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def projection(self) -> Float[Tensor, "*v m d"]:
        """W1."""
        return self.down.weight

    def coefficients(
        self, projected: Float[Tensor, "*v r m"], *, noise: Float[Tensor, "*v r k"] | None = None
    ) -> Coefficients:
        """relu(W1 x + b1), and a 1 for b2."""
        bias = self.down.bias
        hidden = functional.relu(projected.to(bias.dtype) + bias.unsqueeze(-2))
        return without_routing(functional.pad(hidden, (0, 1), value=1.0))

    def basis(self) -> Float[Tensor, "*v n d"]:
        """W2 transposed, and b2 below it."""
        return torch.cat([self.up.weight.mT, self.up.bias.unsqueeze(-2)], dim=-2)


class LinearMap(Adapter):
    """h = x + M x, with M zero at the start.

    Args:
        dim: d, numbers of an embedding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(dim, dim))

    def projection(self) -> Float[Tensor, "*v m d"]:
        """Nothing: there are no coefficients."""
        return self.map[..., :0, :]

    def coefficients(
        self, projected: Float[Tensor, "*v r m"], *, noise: Float[Tensor, "*v r k"] | None = None
    ) -> Coefficients:
        """None."""
        return without_routing(projected.to(self.map.dtype))

    def basis(self) -> Float[Tensor, "*v n d"]:
        """Nothing."""
        return self.map[..., :0, :]

    def linear(self) -> Float[Tensor, "*v d d"] | None:
        """M."""
        return self.map


def build_adapter(name: str, dim: int, *, rank: int, hidden: int) -> Adapter:
    """An adapter without experts.

    Args:
        name: `lora`, `mlp` or `linear`.
        dim: d, numbers of an embedding.
        rank: r of `lora`.
        hidden: Width of `mlp`.

    Raises:
        ConfigError: If no such adapter has that name, or a size is not positive.
    """
    if min(dim, rank, hidden) < 1:
        raise ConfigError(f"an adapter needs sizes of at least 1, got {dim}, {rank}, {hidden}")
    if name == "lora":
        return LoRA(dim, rank)
    if name == "mlp":
        return BottleneckMLP(dim, hidden)
    if name == "linear":
        return LinearMap(dim)
    raise ConfigError(f"no adapter is named {name!r}: choose molre, lora, mlp, linear or none")
