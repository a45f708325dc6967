"""The fused head against a literal Algorithm 1, looped over scans, slices and experts."""

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ctfm.heads.head import Head
from ctfm.heads.molre import MoLRE
from ctfm.store.errors import ConfigError

B, S, D, C, R, HIDDEN = 3, 5, 7, 4, 2, 9  # all different, so that a swapped axis cannot pass
COUNTS = (5, 1, 4)
VARIANTS = list(itertools.product([0, 1, 6], [False, True], ["attention", "mean"]))


def build(experts: int, expert_bias: bool, pool: str, *, dtype: torch.dtype) -> Head:
    """A head in which no parameter is zero."""
    head = Head(D, C, experts, R, HIDDEN, pool, expert_bias).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return head


def batch(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(B, S, D, generator=generator, dtype=torch.double).to(dtype)
    return x, torch.arange(S) < torch.tensor(COUNTS).unsqueeze(1)


def adapt(state: Mapping[str, Tensor], x: Tensor, experts: int) -> Tensor:
    """Eq. 1 and 2 for one slice, W0 being the identity."""
    if experts == 0:
        return x
    hidden = (state["molre.router.0.weight"] @ x + state["molre.router.0.bias"]).clamp(min=0)
    scores = state["molre.router.2.weight"] @ hidden + state["molre.router.2.bias"]
    total = scores.exp().sum()
    h = x
    for i in range(experts):
        update = state["molre.up"][i] @ (state["molre.down"][i] @ x)
        if "molre.up_bias" in state:
            update = update + state["molre.up_bias"][i]
        h = h + scores[i].exp() / total * update
    return h


def literal(head: Head, x: Tensor, valid: Tensor, *, experts: int) -> Tensor:
    """Algorithm 1, lines 3 to 9 (without the sigmoid), one scan after another."""
    state = dict(head.named_parameters())
    logits = []
    for scan, mask in zip(x, valid, strict=True):
        adapted = [adapt(state, scan[s], experts) for s in range(S) if mask[s]]
        if "pool.query" in state:
            raised = [((state["pool.query"][0] @ h) / math.sqrt(D)).exp() for h in adapted]
        else:
            raised = [torch.ones((), dtype=x.dtype) for _ in adapted]
        pooled = torch.stack([a * h for a, h in zip(raised, adapted, strict=True)]).sum(0)
        pooled = pooled / torch.stack(raised).sum()
        logits.append(state["classifier.weight"] @ pooled + state["classifier.bias"])
    return torch.stack(logits)


@pytest.mark.parametrize(("experts", "expert_bias", "pool"), VARIANTS)
def test_equals_algorithm_1_in_values_and_gradients(
    experts: int, expert_bias: bool, pool: str
) -> None:
    head = build(experts, expert_bias, pool, dtype=torch.double)
    x, valid = batch()
    x.requires_grad_(True)
    upstream = torch.randn(B, C, dtype=torch.double, generator=torch.Generator().manual_seed(9))
    names = [*dict(head.named_parameters()), "x"]
    results = []
    for logits in (head(x, valid), literal(head, x, valid, experts=experts)):
        gradients = torch.autograd.grad((logits * upstream).sum(), [*head.parameters(), x])
        results.append({"logits": logits, **dict(zip(names, gradients, strict=True))})
    fused, expected = results
    for name, value in expected.items():
        assert_close(fused[name], value, rtol=0, atol=1e-10, msg=name)
        idle = experts == 1 and "router" in name  # one gate is always 1
        assert idle or value.abs().max() > 1e-3


def test_the_comparison_finds_a_planted_bug() -> None:
    head = build(3, False, "attention", dtype=torch.double)
    x, valid = batch()
    expected = literal(head, x, valid, experts=3)
    assert head.molre is not None
    with torch.no_grad():
        head.molre.up[0] += 1e-6
    assert (head(x, valid) - expected).abs().max() > 1e-10


@pytest.mark.parametrize(("experts", "expert_bias", "pool"), VARIANTS)
def test_names_its_parameters_as_documented(experts: int, expert_bias: bool, pool: str) -> None:
    shapes = {
        name: tuple(value.shape)
        for name, value in Head(D, C, experts, R, HIDDEN, pool, expert_bias).state_dict().items()
    }
    expected: dict[str, tuple[int, ...]] = {"classifier.weight": (C, D), "classifier.bias": (C,)}
    if pool == "attention":
        expected["pool.query"] = (1, D)
    if experts:
        adapter = MoLRE(D, experts, R, HIDDEN, expert_bias).state_dict()
        expected |= {f"molre.{name}": tuple(value.shape) for name, value in adapter.items()}
    assert shapes == expected


def test_a_saved_state_gives_the_same_logits() -> None:
    head = build(3, True, "attention", dtype=torch.float32)
    other = Head(D, C, 3, R, HIDDEN, "attention", True)
    other.load_state_dict(head.state_dict())
    x, valid = batch(torch.float32)
    assert torch.equal(head(x, valid), other(x, valid))


@settings(max_examples=25, deadline=None)
@given(
    filling=st.floats(-1e30, 1e30),
    extra=st.integers(0, 3),
    experts=st.sampled_from([0, 3]),
    pool=st.sampled_from(["attention", "mean"]),
)
def test_padding_changes_neither_values_nor_gradients(
    filling: float, extra: int, experts: int, pool: str
) -> None:
    head = build(experts, False, pool, dtype=torch.float32)
    x, valid = batch(torch.float32)
    longer = torch.full((B, S + extra, D), filling)
    longer[:, :S] = torch.where(valid.unsqueeze(-1), x, longer[:, :S])
    mask = torch.cat([valid, torch.zeros(B, extra, dtype=torch.bool)], dim=1)
    expected = torch.autograd.grad(head(x, valid).sum(), list(head.parameters()))
    assert_close(head(longer, mask), head(x, valid))
    for got, gradient in zip(
        torch.autograd.grad(head(longer, mask).sum(), list(head.parameters())),
        expected,
        strict=True,
    ):
        assert_close(got, gradient, rtol=1e-4, atol=1e-4)


def test_the_order_of_slices_does_not_matter_and_attention_follows_it() -> None:
    head = build(3, False, "attention", dtype=torch.double)
    x, valid = batch()
    order = torch.tensor([3, 0, 4, 2, 1])
    before, after = head.explain(x, valid), head.explain(x[:, order], valid[:, order])
    assert_close(after.logits, before.logits)
    assert_close(after.attention, before.attention[:, :, order])
    assert_close(after.routing, before.routing[:, order])


@pytest.mark.parametrize("experts", [0, 3])
def test_explains_with_attention_and_routing(experts: int) -> None:
    head = build(experts, False, "attention", dtype=torch.double)
    x, valid = batch()
    output = head.explain(x, valid)
    assert torch.equal(output.logits, head(x, valid))
    assert output.attention.shape == (B, 1, S)
    assert output.routing.shape == (B, S, experts)
    assert_close(output.attention.sum(-1), torch.ones(B, 1, dtype=torch.double))
    assert (output.attention[:, 0][~valid] == 0).all()
    assert (output.routing[~valid] == 0).all()
    if experts:
        ones = torch.ones(int(valid.sum()), dtype=torch.double)
        assert_close(output.routing[valid].sum(-1), ones)


@pytest.mark.parametrize(("experts", "expert_bias", "pool"), VARIANTS)
def test_contributions_of_slices_add_up_to_the_logits(
    experts: int, expert_bias: bool, pool: str
) -> None:
    head = build(experts, expert_bias, pool, dtype=torch.double)
    x, valid = batch()
    contributions = head.slice_contributions(x, valid)
    assert contributions.shape == (B, S, C)
    assert_close(contributions.sum(1) + head.classifier.bias, head(x, valid), rtol=0, atol=1e-12)
    assert (contributions[~valid] == 0).all()
    scan = adapt(dict(head.named_parameters()), x[0, 2], experts)
    attention = head.explain(x, valid).attention[0, 0, 2]
    assert_close(contributions[0, 2], attention * (head.classifier.weight @ scan))


@pytest.mark.parametrize(("dtype", "far"), [(torch.float16, 1e-5), (torch.bfloat16, 0.05)])
def test_takes_stored_half_precision(dtype: torch.dtype, far: float) -> None:
    head = Head(64, C, 3, R, HIDDEN)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.1)
    x = torch.randn(B, S, 64).to(dtype)
    _, valid = batch()
    logits = head(x, valid)
    assert logits.dtype == torch.float32
    assert_close(logits, head(x.float(), valid), rtol=far, atol=far)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_a_mean_head_without_experts_is_a_linear_probe() -> None:
    head = Head(D, C, experts=0, pool="mean")
    x, valid = batch(torch.float32)
    means = torch.stack([scan[mask].mean(0) for scan, mask in zip(x, valid, strict=True)])
    assert_close(head(x, valid), head.classifier(means))


def test_refuses_an_unknown_pool() -> None:
    with pytest.raises(ConfigError, match="choose one of attention"):
        Head(D, C, pool="sum")
