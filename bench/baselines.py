"""What others would write: the baselines that fitting is measured against.

`literal_logits` is Algorithm 1 of the MoLRE paper as it reads: every adapted slice is made, one
expert after the other. `loaded` is a dataset that is all in RAM behind a DataLoader with worker
processes, which fetch scan by scan and collate. A sweep without ctfm is one such fit after the
other, or one loop over all heads on each batch with a single optimiser (`train_step`).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from ctfm.heads.head import Head
from ctfm.heads.pooling import AttentionPool, MeanPool

Loss = Callable[[Tensor, Tensor], Tensor]


def literal_logits(head: Head, x: Tensor) -> Tensor:
    """Algorithm 1 with every adapted slice made, expert by expert; x (b, s, d) without padding."""
    adapted = x
    if (adapter := head.molre) is not None:
        gates = adapter.router(x).softmax(-1)
        for i in range(adapter.experts):
            update = functional.linear(functional.linear(x, adapter.down[i]), adapter.up[i])
            adapted = adapted + gates[..., i : i + 1] * update
    if isinstance(head.pool, MeanPool):
        return classified(head, adapted.mean(1))
    assert isinstance(head.pool, AttentionPool)
    products = (adapted @ head.pool.query[0]) / math.sqrt(x.shape[-1])
    attention = products.softmax(-1)
    return classified(head, (attention.unsqueeze(1) @ adapted).squeeze(1))


def classified(head: Head, pooled: Tensor) -> Tensor:
    """Logits of pooled scans (b, d)."""
    logits: Tensor = head.classifier(pooled)
    return logits


class InMemory(Dataset[tuple[Tensor, Tensor]]):
    """Scans that lie in RAM, handed over one by one in float32."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._x[index].float(), self._y[index]


def loaded(x: Tensor, y: Tensor, *, batch: int, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of scans (n, s, d) in random order."""
    return DataLoader(
        InMemory(x, y), batch_size=batch, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip


def forever(
    loader: DataLoader[tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def optimizer_of(heads: Sequence[Head], *, rate: float) -> torch.optim.Optimizer:
    """One AdamW over all heads."""
    parameters = [parameter for head in heads for parameter in head.parameters()]
    return torch.optim.AdamW(parameters, lr=rate, fused=True)


def train_step(
    heads: Sequence[Head],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    *,
    loss: Loss,
) -> None:
    """Every head on one batch, one after the other, and one step."""
    x, y = batch
    optimizer.zero_grad()
    total = sum((loss(literal_logits(head, x), y) for head in heads), start=torch.zeros(()))
    torch.autograd.backward(total)
    optimizer.step()
