"""Placeholder."""

import math


def rate_factor(
    epochs_done: float, *, schedule: str, warmup_epochs: float, max_epochs: int
) -> float:
    warm = min(1.0, epochs_done / warmup_epochs) if warmup_epochs else 1.0
    return warm * (
        0.5 * (1 + math.cos(math.pi * min(1.0, epochs_done / max_epochs)))
        if schedule == "cosine"
        else 1.0
    )
