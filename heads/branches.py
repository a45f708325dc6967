"""Branches: a config, to the head that it describes, or to one head a store whose logits add up.

A linear classifier on what several pools give, laid end to end, is the sum of linear classifiers
on each. So a head on several stores that are joined by scan is a list of heads, its branches; a
head on one store is a list of one.

Axes: d embedding, c findings.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ctfm.heads.adapters import build_adapter
from ctfm.heads.config import FitConfig
from ctfm.heads.head import Head
from ctfm.heads.routing import Routing


def build_branches(config: FitConfig, *, dims: Sequence[int], findings: int) -> list[Head]:
    """New heads as the config says, one a branch.

    Args:
        config: Its sizes, adapter and pool.
        dims: d of each branch.
        findings: C.
    """
    return [_build_head(config, dim=dim, findings=findings) for dim in dims]


def _build_head(config: FitConfig, *, dim: int, findings: int) -> Head:
    adapter = None
    if config.adapter not in ("molre", "none"):
        adapter = build_adapter(
            config.adapter, dim, rank=config.rank, hidden=config.rank * max(config.experts, 1)
        )
    return Head(
        dim,
        findings,
        experts=config.experts if config.adapter == "molre" else 0,
        rank=config.rank,
        router_hidden=config.router_hidden,
        pool=config.pool,
        expert_bias=config.expert_bias,
        routing=Routing(
            top_k=config.top_k,
            temperature=config.router_temperature,
            noise=config.router_noise,
        ),
        adapter=adapter,
        pool_heads=config.pool_heads,
        pool_hidden=config.pool_hidden,
    )


def branches_state(branches: Sequence[Head]) -> dict[str, Tensor]:
    """Tensors of a head by name; those of several branches as `branches.<i>.<name>`."""
    if len(branches) == 1:
        return branches[0].state_dict()
    return {
        f"branches.{index}.{name}": value
        for index, branch in enumerate(branches)
        for name, value in branch.state_dict().items()
    }


def load_branches(branches: Sequence[Head], state: dict[str, Tensor]) -> None:
    """The reverse of `branches_state`.

    Raises:
        RuntimeError: If a tensor is missing, left over or of another shape.
    """
    if len(branches) == 1:
        branches[0].load_state_dict(state)
        return
    for index, branch in enumerate(branches):
        branch.load_state_dict(under(f"branches.{index}.", state))


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
