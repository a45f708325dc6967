"""Heads side by side give what each gives alone."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ctfm.heads.batches import PackedScans
from ctfm.heads.branches import build_branches
from ctfm.heads.config import FitConfig
from ctfm.heads.head import Head
from ctfm.heads.stack import HeadGroup

D, C = 8, 3
COUNTS = (5, 1, 4, 8)
SETTINGS: list[dict[str, Any]] = [
    {"experts": 3, "rank": 2},
    {"experts": 3, "rank": 2, "seed": 1},
    {"experts": 3, "rank": 2, "seed": 2},
    {"experts": 2, "rank": 3, "expert_bias": True},
    {"experts": 0},
    {"experts": 0, "seed": 1},
    {"adapter": "mlp", "experts": 2, "pool": "gated"},
    {"adapter": "mlp", "experts": 2, "pool": "gated", "seed": 1},
    {"adapter": "linear", "pool": "multihead"},
    {"adapter": "linear", "pool": "multihead", "seed": 1},
    {"adapter": "lora", "pool": "per-finding"},
    {"adapter": "lora", "pool": "per-finding", "seed": 1},
    {"experts": 3, "rank": 2, "pool": "max"},
    {"experts": 3, "rank": 2, "pool": "max", "seed": 1},
    {"experts": 3, "rank": 2, "top_k": 2},
    {"experts": 3, "rank": 2, "top_k": 2, "seed": 1},
    {"experts": 3, "rank": 2, "router_noise": 0.5},
    {"experts": 3, "rank": 2, "router_noise": 0.5, "seed": 1},
]


def heads(dtype: torch.dtype = torch.double) -> list[Head]:
    made = []
    for index, setting in enumerate(SETTINGS):
        config = FitConfig.from_dict({"router_hidden": 5, **setting})
        (head,) = build_branches(config, dims=[D], findings=C)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.append(head.to(dtype))
    return made


def noise(rows: int) -> list[torch.Tensor | None]:
    return [
        torch.randn(rows, 3, dtype=torch.double) if "router_noise" in setting else None
        for setting in SETTINGS
    ]


@pytest.mark.parametrize("kind", [torch.double, torch.bfloat16])
def test_equals_each_head_alone_in_values_and_gradients(kind: torch.dtype) -> None:
    near = {torch.double: 1e-10, torch.bfloat16: 0.3}[kind]
    rows = torch.randn(sum(COUNTS), D, generator=torch.Generator().manual_seed(3)).to(kind)
    data = PackedScans(rows=rows, offsets=torch.tensor([0, *COUNTS]).cumsum(0))
    batch = data.batch(torch.tensor([3, 1, 0, 2]), device=torch.device("cpu"))
    together = heads(torch.double if kind == torch.double else torch.float32)
    drawn = noise(len(batch.x))
    outputs = HeadGroup(together)(batch.x, batch.layout, noise=drawn)
    weights = [torch.randn(output.logits.shape).to(output.logits.dtype) for output in outputs]
    loss = torch.stack([(o.logits * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum()
    every = [parameter for head in together for parameter in head.parameters()]
    gradients = iter(torch.autograd.grad(loss, every))
    for head, output, weight, own in zip(together, outputs, weights, drawn, strict=True):
        alone = head.of_rows(batch.x, batch.layout, noise=own)
        assert_close(output.logits, alone.logits, rtol=near, atol=near)
        assert_close(output.attention, alone.attention, rtol=near, atol=near)
        assert_close(output.routed.gates, alone.routed.gates, rtol=near, atol=near)
        parameters = list(head.parameters())
        for wanted in torch.autograd.grad((alone.logits * weight).sum(), parameters):
            got = next(gradients)
            if kind == torch.double:
                assert_close(got, wanted, rtol=0, atol=near)
