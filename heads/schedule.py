"""Schedules: how far a fit has come, to the factor of its learning rates.

The clock is in epochs, not in steps: repeat-factor sampling makes epochs of slightly different
length, and a schedule should not notice.
"""

import math


def rate_factor(
    epochs_done: float, *, schedule: str, warmup_epochs: float, max_epochs: int
) -> float:
    """What learning rates are multiplied with.

    Args:
        epochs_done: Epochs until now, the present one in part.
        schedule: `constant`, or `cosine`: half a cosine from 1 to 0 over `max_epochs`
            (Loshchilov and Hutter 2017, arXiv:1608.03983, Eq. 5, without restarts).
        warmup_epochs: Epochs over which the factor also rises linearly from 0.
        max_epochs: Length of the schedule; a fit that stops earlier does not reach its end.
    """
    warm = min(1.0, epochs_done / warmup_epochs) if warmup_epochs > 0 else 1.0
    if schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, epochs_done / max_epochs)))
    return warm
