"""Schedules: how far a fit has come, to its learning rate and to the mean of its parameters.

The factor of the learning rates is a function of the epochs that have passed, in fractions: the
steps of an epoch vary in number with the rounding of repeats, its length in epochs does not. The
cosine is that of Loshchilov and Hutter 2017 (arXiv:1608.03983, Eq. 5) without restarts, the warm-up
the gradual one of Goyal et al. 2017 (arXiv:1706.02677, Sec. 2.2).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ctfm.store.errors import ConfigError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""Factor of the learning rates after the warm-up, over the progress of what is left: from 0 to 1.

- `constant`: 1.
- `cosine`: from 1 to 0 over `max_epochs`; a fit that stops early has not come to the end of it.
"""


def epochs_passed(epoch: int, *, step: int, steps: int) -> float:
    """Epochs that have passed at the middle of a step, in fractions.

    At the middle neither the first step of a warm-up nor the last of a cosine has a factor of 0.

    Args:
        epoch: Number of the epoch, from 1.
        step: Number of the step in it, from 0.
        steps: Number of steps in it.
    """
    return epoch - 1 + (step + 0.5) / steps


def rate_factor(
    passed: float, *, schedule: str, max_epochs: float, warmup_epochs: float = 0.0
) -> float:
    """What the learning rates are multiplied by.

    It rises in a line from 0 to 1 over the warm-up, and follows the schedule from there on.

    Args:
        passed: Epochs that have passed, from 0 to `max_epochs`; later, it is as at the end.
        schedule: A name in `SCHEDULES`.
        max_epochs: Where the schedule ends.
        warmup_epochs: At least 0 and below `max_epochs`; may be a fraction.

    Raises:
        ConfigError: If no schedule has that name, or the warm-up leaves nothing to it.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"no schedule is named {schedule!r}: choose {', '.join(SCHEDULES)}")
    if not 0 <= warmup_epochs < max_epochs:
        raise ConfigError(
            f"warmup_epochs must be at least 0 and below max_epochs, {max_epochs}, "
            f"got {warmup_epochs}"
        )
    if passed < warmup_epochs:
        return passed / warmup_epochs
    progress = (passed - warmup_epochs) / (max_epochs - warmup_epochs)
    return SCHEDULES[schedule](min(progress, 1.0))


class Ema:
    """Exponential moving average of the parameters of a fit.

        mean ← mean + (1 - δ) (parameter - mean),    δ = min(decay, (1 + t) / (10 + t))

    at update t from 0, so that the first values are soon forgotten: the decay of TensorFlow's
    `tf.train.ExponentialMovingAverage` with `num_updates`. Parameters of several heads stacked in
    one tensor are averaged each for itself.

    Args:
        parameters: By name, floating-point; they are copied, on their device.
        decay: From 0, no memory, to below 1.

    Raises:
        ConfigError: If the decay is out of its range.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of a moving average must be in 0..1, got {decay}")
        self.decay, self._updates = decay, 0
        self._means = {name: value.detach().clone() for name, value in parameters.items()}

    @property
    def means(self) -> Mapping[str, Tensor]:
        """The averages by name; the next update changes them in place."""
        return self._means

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Take in the parameters after a step; their names are those of the first."""
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        latest = [parameters[name].detach() for name in self._means]
        torch._foreach_lerp_(list(self._means.values()), latest, 1 - decay)
        self._updates += 1

    def state(self) -> dict[str, Tensor]:
        """All that a fit needs to go on, as tensors; copies."""
        means = {f"mean.{name}": value.clone() for name, value in self._means.items()}
        return {**means, "updates": torch.tensor(self._updates)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, for the same parameters.

        Raises:
            KeyError: If a parameter is missing from it.
        """
        for name, mean in self._means.items():
            mean.copy_(state[f"mean.{name}"])
        self._updates = int(state["updates"])
