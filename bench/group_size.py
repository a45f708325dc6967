"""Claim: heads fitted side by side cost less each than alone, while caches hold their products.

A step (gather, forward, backward, AdamW) of 1 to 16 heads of one shape on one batch of scans of 40
slices, d = 1024, divided by the number of heads. `sweep.group_size` is the rule that is checked:
how many heads it would fit side by side, and what that costs against the best number measured.
"""

from collections.abc import Callable
from typing import Any

import torch
from measure import main_with_out, median_seconds
from torch.nn import functional

from ctfm.heads.batches import PackedScans
from ctfm.heads.config import FitConfig, Precision
from ctfm.heads.head import Head
from ctfm.heads.stack import HeadGroup
from ctfm.heads.sweep import group_size

SLICES, DIM, FINDINGS, STORED, REPEATS = 40, 1024, 75, 1024, 9
TOGETHER = (1, 2, 4, 8, 16)
SETTINGS: tuple[tuple[int, Precision], ...] = (
    (32, "float32"),
    (32, "bfloat16"),
    (256, "float32"),
    (256, "bfloat16"),
)


def group_step(scans: PackedScans, *, heads: int, batch: int) -> Callable[[], None]:
    """A step of so many heads side by side."""
    torch.manual_seed(0)
    group = [Head(DIM, FINDINGS) for _ in range(heads)]
    optimizers = [torch.optim.AdamW(head.parameters(), lr=1e-3, fused=True) for head in group]
    chosen, cpu = torch.randperm(STORED)[:batch], torch.device("cpu")
    y = torch.rand(batch, FINDINGS).round()

    def step() -> None:
        rows = scans.batch(chosen, device=cpu)
        outputs = HeadGroup(group)(rows.x, rows.layout, noise=[None] * heads)
        losses = [
            functional.binary_cross_entropy_with_logits(one.logits, y, reduction="mean")
            for one in outputs
        ]
        torch.autograd.backward(torch.stack(losses).sum())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure() -> dict[str, object]:
    """Milliseconds a head and step, for each number side by side."""
    torch.manual_seed(1)
    rows = torch.randn(STORED * SLICES, DIM).half()
    offsets = torch.arange(STORED + 1) * SLICES
    packed: dict[str, PackedScans] = {
        "float32": PackedScans(rows=rows, offsets=offsets),
        "bfloat16": PackedScans(rows=rows.bfloat16(), offsets=offsets),
    }
    results: dict[str, dict[str, Any]] = {}
    for batch, precision in SETTINGS:
        steps = {
            str(heads): group_step(packed[precision], heads=heads, batch=batch)
            for heads in TOGETHER
        }
        seconds = median_seconds(steps, repeats=REPEATS, warm_up=2)
        each = {int(n): 1000 * times.median / int(n) for n, times in seconds.items()}
        chosen = group_size(FitConfig(batch_size=batch, precision=precision), device="cpu")
        nearest = max(n for n in TOGETHER if n <= chosen)
        results[f"{batch} scans, {precision}"] = {
            "ms_a_head": each,
            "rule": chosen,
            "alone_over_rule": each[1] / each[nearest],
            "best_over_rule": min(each.values()) / each[nearest],
            "seconds": seconds,
        }
    gains = [float(one["alone_over_rule"]) for one in results.values()]
    losses = [float(one["best_over_rule"]) for one in results.values()]
    return {
        "claim": "a head alone / a head of a group of the chosen size, least of "
        f"{len(results)} settings (the best size measured takes {min(losses):.0%} of its time)",
        "ratio": min(gains),
        "shape": {"slices": SLICES, "dim": DIM, "findings": FINDINGS},
        "settings": results,
    }


if __name__ == "__main__":
    main_with_out(measure)
