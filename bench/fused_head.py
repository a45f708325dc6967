"""Claim: a training step of the fused head is several times faster than the literal Algorithm 1.

A step is forward, backward and AdamW on a batch that is in memory already. The literal form makes
every adapted slice, one expert after the other, as Algorithm 1 of the MoLRE paper reads. Logits of
the two are compared first.
"""

import math
from collections.abc import Callable

import torch
from measure import main_with_out, median_seconds
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from ctfm.heads.head import Head

SCANS, SLICES, DIM, FINDINGS, EXPERTS, RANK, REPEATS = 256, 40, 1024, 75, 6, 8, 7


def literal_logits(head: Head, x: Tensor, valid: Tensor) -> Tensor:
    """Algorithm 1 with every adapted slice made, expert by expert."""
    adapter = head.molre
    assert adapter is not None
    gates = adapter.router(x).softmax(-1)
    adapted = x
    for i in range(adapter.experts):
        update = functional.linear(functional.linear(x, adapter.down[i]), adapter.up[i])
        adapted = adapted + gates[..., i : i + 1] * update
    products = (adapted @ dict(head.pool.named_parameters())["query"][0]) / math.sqrt(x.shape[-1])
    attention = products.masked_fill(~valid, -torch.inf).softmax(-1)
    logits: Tensor = head.classifier((attention.unsqueeze(1) @ adapted).squeeze(1))
    return logits


def make_step(
    logits: Callable[[Head, Tensor, Tensor], Tensor], x: Tensor, valid: Tensor
) -> Callable[[], None]:
    """One training step of a head of its own."""
    head = make_head()
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)
    y = torch.rand(len(x), FINDINGS).round()

    def step() -> None:
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(logits(head, x, valid), y)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def make_head() -> Head:
    """A head in which no parameter is zero."""
    torch.manual_seed(0)
    head = Head(DIM, FINDINGS, EXPERTS, RANK)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.02)
    return head


def measure() -> dict[str, object]:
    """Seconds of each form, and how often the fused one fits into the literal one."""
    torch.manual_seed(1)
    x = torch.randn(SCANS, SLICES, DIM)
    valid = torch.arange(SLICES) < torch.randint(SLICES // 2, SLICES + 1, (SCANS, 1))
    head = make_head()
    with torch.inference_mode():
        assert_close(head(x, valid), literal_logits(head, x, valid), rtol=1e-3, atol=1e-3)
    seconds = median_seconds(
        {
            "literal_float32": make_step(literal_logits, x, valid),
            "fused_float32": make_step(Head.forward, x, valid),
            "fused_bfloat16": make_step(Head.forward, x.bfloat16(), valid),
        },
        repeats=REPEATS,
    )
    median = {name: times.median for name, times in seconds.items()}
    half = median["literal_float32"] / median["fused_bfloat16"]
    return {
        "claim": f"literal step / fused step in float32 ({half:.1f}x fused in bfloat16)",
        "ratio": median["literal_float32"] / median["fused_float32"],
        "ratio_bfloat16": half,
        "shape": {"scans": SCANS, "slices": SLICES, "dim": DIM, "experts": EXPERTS, "rank": RANK},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main_with_out(measure)
