"""Pooling weights against line 7 of Algorithm 1, one scan at a time."""

import math

import pytest
import torch
from torch.testing import assert_close

from ctfm.heads.pooling import AttentionPool, MeanPool, build_pool
from ctfm.store.errors import ConfigError

B, S, D = 3, 5, 7
COUNTS = (5, 1, 4)


def mask() -> torch.Tensor:
    return torch.arange(S) < torch.tensor(COUNTS).unsqueeze(1)


def test_attention_is_the_softmax_of_the_scaled_products() -> None:
    products = torch.randn(B, S, 1, dtype=torch.double) * 9
    weights = AttentionPool(D)(products, mask())
    for b, count in enumerate(COUNTS):
        raised = [math.exp(products[b, s, 0].item() / math.sqrt(D)) for s in range(count)]
        expected = [value / sum(raised) for value in raised] + [0.0] * (S - count)
        assert_close(weights[b], torch.tensor(expected, dtype=torch.double))


def test_mean_weighs_every_slice_the_same() -> None:
    weights = MeanPool(D)(torch.empty(B, S, 0), mask())
    for b, count in enumerate(COUNTS):
        assert_close(weights[b], torch.tensor([1 / count] * count + [0.0] * (S - count)))


def test_attention_ignores_whatever_padding_holds() -> None:
    products = torch.randn(B, S, 1)
    spoilt = products.masked_fill(~mask().unsqueeze(-1), torch.nan)
    assert torch.equal(AttentionPool(D)(products, mask()), AttentionPool(D)(spoilt, mask()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    weights = AttentionPool(D)(torch.randn(B, S, 1).to(dtype), mask())
    assert weights.dtype == torch.float32


def test_only_attention_learns_a_query() -> None:
    assert {k: tuple(v.shape) for k, v in AttentionPool(D).state_dict().items()} == {
        "query": (1, D)
    }
    assert MeanPool(D).state_dict() == {}


def test_an_unknown_pool_is_refused() -> None:
    assert isinstance(build_pool("attention", D), AttentionPool)
    assert isinstance(build_pool("mean", D), MeanPool)
    with pytest.raises(ConfigError, match="no pool is named 'max'"):
        build_pool("max", D)
