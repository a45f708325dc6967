"""MoLRE against Eq. 1 and 2 written out one feature and one expert at a time."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ctfm.heads.molre import MoLRE, MoLRELinear, parameter_count
from ctfm.store.errors import ConfigError

D, OUT, K, R, HIDDEN = 7, 9, 3, 2, 5  # all different, so that a swapped axis cannot pass


def randomise(module: nn.Module) -> None:
    """Give every parameter a value, B_i and the biases included."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.double))


def one_feature(state: dict[str, Tensor], x: Tensor, frozen: Tensor) -> Tensor:
    """Eq. 1 and 2 for one feature; `frozen` is W0 x."""
    hidden = state["router.0.weight"] @ x + state["router.0.bias"]
    scores = state["router.2.weight"] @ hidden.clamp(min=0) + state["router.2.bias"]
    gates = [math.exp(s) for s in scores.tolist()]
    h = frozen.clone()
    for i in range(len(gates)):
        update = state["up"][i] @ (state["down"][i] @ x)
        if "up_bias" in state:
            update = update + state["up_bias"][i]
        h += gates[i] / sum(gates) * update
    return h


@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("experts", [1, K])
def test_matches_the_equations(experts: int, expert_bias: bool) -> None:
    module = MoLRE(D, experts, R, HIDDEN, expert_bias).double()
    randomise(module)
    x = torch.randn(4, 6, D, dtype=torch.double)
    adapted = module(x)
    for b in range(4):
        for s in range(6):
            expected = one_feature(dict(module.state_dict()), x[b, s], x[b, s])
            assert_close(adapted[b, s], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("expert_bias", [False, True])
def test_wraps_a_linear_layer(expert_bias: bool) -> None:
    base = nn.Linear(D, OUT).double()
    module = MoLRELinear(
        base, experts=K, rank=R, router_hidden=HIDDEN, expert_bias=expert_bias
    ).double()
    x = torch.randn(4, D, dtype=torch.double)
    assert_close(module(x), base(x))
    randomise(module)
    for b in range(4):
        frozen = base.weight @ x[b] + base.bias
        expected = one_feature(dict(module.state_dict()), x[b], frozen.detach())
        assert_close(module(x)[b], expected, rtol=0, atol=1e-12)


def test_leaves_the_wrapped_layer_frozen() -> None:
    module = MoLRELinear(nn.Linear(D, OUT), experts=K, rank=R, router_hidden=HIDDEN)
    module(torch.randn(2, D)).sum().backward()
    assert module.base.weight.grad is None
    assert module.up.grad is not None
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trainable == K * R * (D + OUT) + (D + 1) * HIDDEN + (HIDDEN + 1) * K


@pytest.mark.parametrize("shape", [(D,), (4, D), (2, 3, 4, D)])
def test_is_the_identity_until_trained(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(MoLRE(D, K, R, HIDDEN, expert_bias=True)(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_takes_half_precision_and_gives_it_back(dtype: torch.dtype) -> None:
    module = MoLRE(D, K, R, HIDDEN)
    randomise(module)
    x = torch.randn(4, D).to(dtype)
    assert module(x).dtype == dtype
    assert_close(module(x).float(), module(x.float()), rtol=0.05, atol=0.2)


def test_names_its_parameters_as_documented() -> None:
    shapes = {name: tuple(t.shape) for name, t in MoLRE(D, K, R, HIDDEN, True).state_dict().items()}
    assert shapes == {
        "down": (K, R, D),
        "up": (K, D, R),
        "up_bias": (K, D),
        "router.0.weight": (HIDDEN, D),
        "router.0.bias": (HIDDEN,),
        "router.2.weight": (K, HIDDEN),
        "router.2.bias": (K,),
    }
    assert "up_bias" not in MoLRE(D, K, R, HIDDEN).state_dict()


@pytest.mark.parametrize(
    ("dim", "plain", "biased"),
    [(768, 272_134, 276_742), (1024, 362_246, 368_390), (1152, 407_302, 414_214)],
)
def test_counts_the_parameters_of_the_paper(dim: int, plain: int, biased: int) -> None:
    for bias, expected in ((False, plain), (True, biased)):
        assert parameter_count(dim, expert_bias=bias) == expected
        module = MoLRE(dim, expert_bias=bias)
        assert sum(parameter.numel() for parameter in module.parameters()) == expected


@pytest.mark.parametrize("experts", [0, 1, K])
def test_counts_parameters_of_any_size(experts: int) -> None:
    module = MoLRE(D, experts, R, HIDDEN, True) if experts else nn.Identity()
    count = parameter_count(D, experts, R, router_hidden=HIDDEN, expert_bias=True)
    assert count == sum(parameter.numel() for parameter in module.parameters())


def test_refuses_sizes_that_are_not_positive() -> None:
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        MoLRE(D, K, 0)
