"""Every adapter, routing and pool in the fused form, against the formulas one slice at a time."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ctfm.heads.batches import Layout, PackedScans
from ctfm.heads.branches import build_branches
from ctfm.heads.config import FitConfig
from ctfm.heads.head import Head
from ctfm.heads.pooling import POOLS

D, C, K, R, HIDDEN, POOL_HEADS, POOL_HIDDEN = 6, 4, 3, 2, 5, 2, 7
COUNTS = (5, 1, 4, 8)
ADAPTERS: dict[str, dict[str, Any]] = {
    "molre": {},
    "molre with biases": {"expert_bias": True},
    "molre top 2": {"top_k": 2},
    "molre sharp": {"router_temperature": 0.5},
    "lora": {"adapter": "lora"},
    "mlp": {"adapter": "mlp"},
    "linear": {"adapter": "linear"},
    "none": {"adapter": "none"},
}
COMBINATIONS = list(itertools.product(ADAPTERS, POOLS))


def build(adapter: str, pool: str) -> tuple[Head, FitConfig]:
    """A head in which no parameter is zero."""
    config = FitConfig.from_dict(
        {
            "experts": K,
            "rank": R,
            "router_hidden": HIDDEN,
            "pool": pool,
            "pool_heads": POOL_HEADS,
            "pool_hidden": POOL_HIDDEN,
            **ADAPTERS[adapter],
        }
    )
    (head,) = build_branches(config, dims=[D], findings=C)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return head, config


def scans() -> PackedScans:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(sum(COUNTS), D, generator=generator, dtype=torch.double)
    return PackedScans(rows=rows, offsets=torch.tensor([0, *COUNTS]).cumsum(0))


def adapted(state: Mapping[str, Tensor], x: Tensor, config: FitConfig) -> Tensor:
    """What the adapter makes of one slice."""
    if config.adapter == "none":
        return x
    if config.adapter == "linear":
        return x + state["adapter.map"] @ x
    if config.adapter == "lora":
        return x + state["adapter.up"] @ (state["adapter.down"] @ x)
    if config.adapter == "mlp":
        hidden = (state["adapter.down.weight"] @ x + state["adapter.down.bias"]).clamp(min=0)
        return x + state["adapter.up.weight"] @ hidden + state["adapter.up.bias"]
    hidden = (state["molre.router.0.weight"] @ x + state["molre.router.0.bias"]).clamp(min=0)
    scores = state["molre.router.2.weight"] @ hidden + state["molre.router.2.bias"]
    scores = scores / config.router_temperature
    taking_part = sorted(range(K), key=lambda k: -scores[k].item())[: config.top_k or K]
    total = torch.stack([scores[k].exp() for k in taking_part]).sum()
    h = x
    for k in taking_part:
        update = state["molre.up"][k] @ (state["molre.down"][k] @ x)
        if config.expert_bias:
            update = update + state["molre.up_bias"][k]
        h = h + scores[k].exp() / total * update
    return h


def score(state: Mapping[str, Tensor], h: Tensor, pool: str, *, group: int) -> Tensor:
    """How well an adapted slice answers, for one group of weights."""
    if pool == "mean":
        return h.new_zeros(())
    if pool == "gated":
        hidden = torch.tanh(state["pool.value"] @ h) * torch.sigmoid(state["pool.gate"] @ h)
        return state["pool.query"][0] @ hidden
    if pool == "multihead":
        size = D // POOL_HEADS
        own = h[group * size : (group + 1) * size]
        return state["pool.query"][group] @ own / math.sqrt(size)
    return state["pool.query"][group] @ h / math.sqrt(D)


def pooled(state: Mapping[str, Tensor], slices: list[Tensor], pool: str, *, group: int) -> Tensor:
    raised = torch.stack([score(state, h, pool, group=group) for h in slices]).exp()
    return (raised / raised.sum()) @ torch.stack(slices)


def literal(head: Head, data: PackedScans, config: FitConfig) -> Tensor:
    """The logits of all scans, slice by slice and finding by finding."""
    state, pool = dict(head.named_parameters()), config.pool
    weight, bias = state["classifier.weight"], state["classifier.bias"]
    logits = []
    for first, last in itertools.pairwise(data.offsets.tolist()):
        slices = [adapted(state, x, config) for x in data.rows[first:last]]
        if pool == "max":
            answers = torch.stack([weight @ h for h in slices])
            logits.append(answers.max(0).values + bias)
        elif pool == "per-finding":
            each = [weight[c] @ pooled(state, slices, pool, group=c) for c in range(C)]
            logits.append(torch.stack(each) + bias)
        elif pool == "multihead":
            size = D // POOL_HEADS
            parts = [pooled(state, slices, pool, group=i) for i in range(POOL_HEADS)]
            own = [part[i * size : (i + 1) * size] for i, part in enumerate(parts)]
            logits.append(weight @ torch.cat(own) + bias)
        else:
            logits.append(weight @ pooled(state, slices, pool, group=0) + bias)
    return torch.stack(logits)


@pytest.mark.parametrize(("adapter", "pool"), COMBINATIONS)
def test_equals_the_formulas_in_values_and_gradients(adapter: str, pool: str) -> None:
    head, config = build(adapter, pool)
    data, order = scans(), torch.tensor([2, 0, 3, 1, 3])
    batch = data.batch(order, device=torch.device("cpu"))
    upstream = torch.randn(len(order), C, dtype=torch.double)
    fused = head.of_rows(batch.x, batch.layout).logits
    expected = literal(head, data, config)[order]
    assert_close(fused, expected, rtol=0, atol=1e-10)
    parameters = dict(head.named_parameters())
    gradients = [
        torch.autograd.grad((logits * upstream).sum(), list(parameters.values()), allow_unused=True)
        for logits in (fused, expected)
    ]
    for name, got, wanted in zip(parameters, *gradients, strict=True):
        if wanted is None or got is None:
            # The pool's query is not used by the mean, say; nothing may be missed.
            assert (0 if got is None else got.abs().max()) == 0, name
            assert (0 if wanted is None else wanted.abs().max()) == 0, name
        else:
            assert_close(got, wanted, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(("adapter", "pool"), COMBINATIONS)
def test_contributions_of_slices_add_up_to_the_logits(adapter: str, pool: str) -> None:
    head, _ = build(adapter, pool)
    x = torch.randn(3, 5, D, dtype=torch.double)
    valid = torch.arange(5) < torch.tensor([[5], [1], [4]])
    contributions = head.slice_contributions(x, valid)
    assert_close(contributions.sum(1) + head.classifier.bias, head(x, valid), rtol=0, atol=1e-12)
    assert (contributions[~valid] == 0).all()


@pytest.mark.parametrize(("adapter", "pool"), COMBINATIONS)
def test_nothing_as_wide_as_an_embedding_is_made_of_each_slice(adapter: str, pool: str) -> None:
    config = FitConfig.from_dict(
        {"experts": K, "pool": pool, "pool_hidden": POOL_HIDDEN, **ADAPTERS[adapter]}
    )
    wide, scan_count, slices = 512, 9, 64
    (head,) = build_branches(config, dims=[wide], findings=C)
    x = torch.randn(scan_count * slices, wide)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != x.data_ptr():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head.of_rows(x, Layout(blocks=((scan_count, slices),)))
    # The map of `linear` has d² numbers, which say nothing of slices.
    assert max(saved, default=0) < x.numel() or adapter == "linear"


@pytest.mark.parametrize("pool", POOLS)
def test_an_untrained_adapter_changes_nothing(pool: str) -> None:
    x, valid = torch.randn(3, 5, D), torch.ones(3, 5, dtype=torch.bool)
    shared: dict[str, Tensor] = {}
    logits = {}
    for adapter in ADAPTERS:
        config = FitConfig.from_dict({"experts": K, "pool": pool, "pool_heads": POOL_HEADS,
                                      **ADAPTERS[adapter]})  # fmt: skip
        (head,) = build_branches(config, dims=[D], findings=C)
        state = head.state_dict()
        outer = {name: value for name, value in state.items() if not name.startswith(("m", "a"))}
        shared = shared or outer
        head.load_state_dict(state | shared)
        logits[adapter] = head(x, valid)
    for adapter, got in logits.items():
        assert_close(got, logits["none"], msg=adapter)
