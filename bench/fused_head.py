"""Claim: a training step of the fused head is several times faster than the literal Algorithm 1.

A step is forward, backward and AdamW on 256 scans of 40 slices. The literal form and a DataLoader
before it are in `baselines.py`; the logits of the two forms are compared first. `fit` steps gather
their batch from packed float16 rows, as a fit does; the other steps have theirs in memory already.

`gemm` is the least that the fused form has to do: the product of the batch with all first factors,
and the one that gives their gradient, as bare matrix products in the same type.
"""

from collections.abc import Callable

import torch
from baselines import forever, literal_logits, loaded, optimizer_of, train_step
from measure import main_with_out, median_seconds
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from ctfm.heads.batches import Batch, PackedScans
from ctfm.heads.head import Head

SCANS, SLICES, DIM, FINDINGS, EXPERTS, RANK, REPEATS = 256, 40, 1024, 75, 6, 8, 9
STORED, WORKERS, RATE = 2048, 2, 1e-3

Step = Callable[[], None]
bce = functional.binary_cross_entropy_with_logits


def make_head() -> Head:
    """A head in which no parameter is zero."""
    torch.manual_seed(0)
    head = Head(DIM, FINDINGS, EXPERTS, RANK)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.02)
    return head


def literal_step(batches: Callable[[], tuple[Tensor, Tensor]]) -> Step:
    """A step of the literal form."""
    head = make_head()
    optimizer = optimizer_of([head], rate=RATE)
    return lambda: train_step([head], optimizer, batches(), loss=bce)


def fused_step(batches: Callable[[], Batch], y: Tensor) -> Step:
    """A step of the fused form."""
    head = make_head()
    optimizer = optimizer_of([head], rate=RATE)

    def step() -> None:
        batch = batches()
        optimizer.zero_grad()
        torch.autograd.backward(bce(head.of_rows(batch.x, batch.layout).logits, y))
        optimizer.step()

    return step


def gemm(x: Tensor) -> Step:
    """The product of rows with all first factors, and that of the rows with its gradient."""
    factors = make_head().factors().detach().to(x.dtype)
    factors = functional.pad(factors, (0, 0, 0, -len(factors) % 16))
    gradient = torch.randn(len(x), len(factors)).to(x.dtype)

    def products() -> None:
        functional.linear(x, factors)
        gradient.T @ x

    return products


def steps_to_time() -> dict[str, Step]:
    """Every form of a step, on the same scans, after the two forms were seen to agree."""
    torch.manual_seed(1)
    stored = torch.randn(STORED, SLICES, DIM).half()
    y = torch.rand(STORED, FINDINGS).round()
    offsets = torch.arange(STORED + 1) * SLICES
    cpu, here = torch.device("cpu"), torch.arange(SCANS)
    x = stored[:SCANS].float()
    packed = {
        "float32": PackedScans(rows=stored.flatten(0, 1), offsets=offsets),
        "bfloat16": PackedScans(rows=stored.flatten(0, 1).bfloat16(), offsets=offsets),
    }
    batch = packed["float32"].batch(here, device=cpu)
    head = make_head()
    with torch.inference_mode():
        fused = head.of_rows(batch.x, batch.layout).logits
        assert_close(fused, literal_logits(head, x), rtol=1e-3, atol=1e-3)
    loader = forever(loaded(stored, y, batch=SCANS, workers=WORKERS))
    steps = {
        "literal_float32": literal_step(lambda: (x, y[:SCANS])),
        "dataloader_float32": literal_step(lambda: next(loader)),
    }
    for kind, scans in packed.items():
        resident = Batch(x=x.flatten(0, 1).to(getattr(torch, kind)), layout=batch.layout)
        chosen = torch.randperm(STORED)[:SCANS]
        steps |= {
            f"fused_{kind}": fused_step(lambda one=resident: one, y[:SCANS]),  # type: ignore[misc]
            f"fit_{kind}": fused_step(
                lambda scans=scans, chosen=chosen: scans.batch(chosen, device=cpu),  # type: ignore[misc]
                y[:SCANS],
            ),
            f"gemm_{kind}": gemm(resident.x),
        }
    return steps


def measure() -> dict[str, object]:
    """Seconds of each form, and how often the fused one fits into the literal ones."""
    seconds = median_seconds(steps_to_time(), repeats=REPEATS, warm_up=2)
    median = {name: times.median for name, times in seconds.items()}
    literal, fair = median["literal_float32"], median["dataloader_float32"]
    ratios = {
        kind: {
            "literal_over_fused": literal / median[f"fused_{kind}"],
            "dataloader_over_fit": fair / median[f"fit_{kind}"],
            "gemm_share": median[f"gemm_{kind}"] / median[f"fused_{kind}"],
        }
        for kind in ("float32", "bfloat16")
    }
    half = ratios["bfloat16"]
    return {
        "claim": "literal step / fused step in float32 "
        f"({half['literal_over_fused']:.1f}x fused in bfloat16; bare products are "
        f"{ratios['float32']['gemm_share']:.0%} and {half['gemm_share']:.0%} of the step)",
        "ratio": ratios["float32"]["literal_over_fused"],
        "ratios": ratios,
        "shape": {"scans": SCANS, "slices": SLICES, "dim": DIM, "experts": EXPERTS, "rank": RANK},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main_with_out(measure)
