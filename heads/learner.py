"""Learners: one head while it is fitted, with its optimiser, its best epoch and its checkpoint.

Several learners can see the same batches (`heads/fit.py`); none knows of the others. A learner's
state after an epoch, with its config and its data, is all that decides the rest of its fit, so one
that is restored from a checkpoint ends with the same bytes.

Axes: r rows of a batch, k experts, b scans, c findings.
"""

import copy
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ctfm.heads.batches import Batch
from ctfm.heads.branches import branches_state, build_branches, load_branches, under
from ctfm.heads.config import FitConfig
from ctfm.heads.head import Head, RowOutput
from ctfm.heads.losses import (
    AlphaWeights,
    Focusing,
    alpha_weights,
    focusing_of,
    multilabel_loss,
    prevalence_logit,
)
from ctfm.heads.routing import RoutingPenalties
from ctfm.heads.schedule import rate_factor
from ctfm.store.errors import RunError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One line of `metrics.jsonl`."""

    epoch: int
    """From 1."""

    train_loss: float
    """Mean over the visits of the epoch, while the parameters moved."""

    validation_loss: float
    """With the parameters at the end of the epoch."""

    validation_macro_auc: float
    """Over the findings that choose the epoch, which are the same in every epoch."""

    validation_macro_ap: float
    """Average precision over the same findings."""

    best: bool
    """Whether no epoch before had as high a validation macro AUC."""

    visits: int
    """Scans seen, repeats included."""

    seconds: float
    """Wall time of the epoch, shared with the heads that were fitted side by side."""


def identity_of(checkpoint: bytes) -> str | None:
    """Of which fit a checkpoint is; None if it cannot be read."""
    try:
        return _metadata(checkpoint).get("identity")
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None


class Learner:
    """One head while it is fitted.

    Args:
        branches: The head, or one head a store whose logits add up.
        config: What decides it.
        weights: α of the two classes of each finding.
        device: Where it computes.
    """

    def __init__(
        self,
        branches: Sequence[Head],
        config: FitConfig,
        *,
        weights: AlphaWeights,
        device: torch.device,
    ) -> None:
        self.branches = [branch.to(device) for branch in branches]
        self.config, self.weights, self._device = config, weights, device
        self._average = copy.deepcopy(self.branches) if config.ema else None
        self._focusing = _focusing(config)
        self._penalties = RoutingPenalties(
            load_balance=config.load_balance, z_loss=config.router_z, entropy=config.router_entropy
        )
        self._optimizer = torch.optim.AdamW(parameter_groups(self.branches, config), fused=True)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._noise = torch.Generator(device)
        self._loss_sum = torch.zeros((), device=device)
        self._visits = 0
        self._steps = 0
        self.records: list[EpochRecord] = []
        self._best = self._state(self.judged)

    @property
    def judged(self) -> list[Head]:
        """What is validated and kept: the moving average if there is one."""
        return self.branches if self._average is None else self._average

    @property
    def best(self) -> EpochRecord:
        """The best epoch so far; the first of equal ones."""
        return max(self.records, key=lambda record: record.validation_macro_auc)

    @property
    def finished(self) -> bool:
        """Whether it is time to stop."""
        if not self.records:
            return False
        last, config = self.records[-1].epoch, self.config
        if last >= config.max_epochs:
            return True
        return last >= config.min_epochs and last - self.best.epoch >= config.patience

    def begin_epoch(self, epoch: int) -> None:
        """Set what is drawn in an epoch apart from all others."""
        self._noise.manual_seed(self.config.seed * 1_000_003 + epoch)
        self._loss_sum.zero_()
        self._visits = 0

    def noise(self, batches: Sequence[Batch]) -> list[Float[Tensor, "r k"] | None]:
        """For each branch standard normal numbers for noisy routing, or None."""
        if not self.config.router_noise or self.config.adapter != "molre":
            return [None] * len(batches)
        size = self.config.experts
        return [
            torch.randn(len(batch.x), size, generator=self._noise, device=self._device)
            for batch in batches
        ]

    def loss(
        self,
        outputs: Sequence[RowOutput],
        y: Float[Tensor, "b c"],
        *,
        batches: Sequence[Batch],
    ) -> Float[Tensor, ""]:
        """What a step makes smaller: the loss of the labels and the penalties of the routing."""
        labels = self.label_loss(torch.stack([one.logits for one in outputs]).sum(0), y)
        self._loss_sum += labels.detach() * len(y)
        self._visits += len(y)
        if not self._penalties:
            return labels
        return labels + sum(
            self._penalties(one.routed.gates, one.routed.scores, valid=batch.layout.valid)
            for one, batch in zip(outputs, batches, strict=True)
        )

    def label_loss(
        self, logits: Float[Tensor, "b c"], y: Float[Tensor, "b c"]
    ) -> Float[Tensor, ""]:
        """The loss of the labels alone."""
        return multilabel_loss(logits, y, weights=self.weights, focusing=self._focusing)

    def step(self, *, epochs_done: float) -> None:
        """One step of the optimiser along the gradients that are there.

        Args:
            epochs_done: Epochs until now, the present one in part: the schedule's clock.
        """
        factor = rate_factor(
            epochs_done,
            schedule=self.config.schedule,
            warmup_epochs=self.config.warmup_epochs,
            max_epochs=self.config.max_epochs,
        )
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        parameters = self._parameters(self.branches)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        if self._average is not None:
            # The average of few steps forgets faster (Tan and Le 2019, as in TensorFlow's).
            decay = min(self.config.ema, (1 + self._steps) / (10 + self._steps))
            with torch.no_grad():
                torch._foreach_lerp_(self._parameters(self._average), parameters, 1 - decay)

    def end_epoch(self, epoch: int, *, validation: "Validation", seconds: float) -> EpochRecord:
        """Write an epoch down, and keep its parameters if it is the best.

        Raises:
            RunError: If the loss is not a number.
        """
        train_loss = float(self._loss_sum) / self._visits
        if not math.isfinite(train_loss):
            raise RunError(f"the loss is {train_loss} in epoch {epoch}: lower lr_head and lr_molre")
        is_best = not self.records or validation.macro_auc > self.best.validation_macro_auc
        record = EpochRecord(
            epoch=epoch,
            train_loss=train_loss,
            validation_loss=validation.loss,
            validation_macro_auc=validation.macro_auc,
            validation_macro_ap=validation.macro_ap,
            best=is_best,
            visits=self._visits,
            seconds=seconds,
        )
        self.records.append(record)
        if is_best:
            self._best = self._state(self.judged)
        return record

    def best_branches(self) -> list[Head]:
        """The head of the best epoch."""
        load_branches(self.judged, self._best)
        return self.judged

    def checkpoint(self, identity: str) -> bytes:
        """Everything that the next epoch needs, as a safetensors file.

        Args:
            identity: Digest of what decides the fit; `restore` refuses another one.
        """
        tensors = {f"now.{name}": value for name, value in self._state(self.branches).items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        if self._average is not None:
            average = self._state(self._average)
            tensors |= {f"average.{name}": value for name, value in average.items()}
        for index, parameter in enumerate(self._parameters(self.branches)):
            state = self._optimizer.state.get(parameter, {})
            tensors |= {f"adam.{index}.{name}": state[name] for name in _MOMENTS if name in state}
        about = {
            "identity": identity,
            "steps": str(self._steps),
            "records": json.dumps([asdict(record) for record in self.records]),
        }
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        content: bytes = safetensors.torch.save(plain, metadata=about)
        return content

    def restore(self, content: bytes, identity: str) -> bool:
        """Go on from a checkpoint.

        Returns:
            False, with nothing changed, if it is of another fit or cannot be read.
        """
        try:
            tensors, about = safetensors.torch.load(content), _metadata(content)
            if about.get("identity") != identity:
                return False
            records = [EpochRecord(**record) for record in json.loads(about["records"])]
            steps = int(about["steps"])
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError):
            return False
        load_branches(self.branches, under("now.", tensors))
        if self._average is not None:
            load_branches(self._average, under("average.", tensors))
        self._best = {
            name: value.to(self._device) for name, value in under("best.", tensors).items()
        }
        for index, parameter in enumerate(self._parameters(self.branches)):
            moments = under(f"adam.{index}.", tensors)
            if moments:
                self._optimizer.state[parameter] = {
                    name: value.to(self._device) for name, value in moments.items()
                }
        self.records, self._steps = records, steps
        return True

    @staticmethod
    def _parameters(branches: Iterable[Head]) -> list[Tensor]:
        return [parameter for branch in branches for parameter in branch.parameters()]

    @staticmethod
    def _state(branches: Sequence[Head]) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in branches_state(branches).items()}


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What the validation split says of a head."""

    loss: float
    macro_auc: float
    macro_ap: float


def new_learner(
    config: FitConfig,
    *,
    dims: Sequence[int],
    prevalence: Float[Tensor, " c"],
    known: Int64[Tensor, " c"],
    device: torch.device,
) -> Learner:
    """A head that has learnt nothing yet, the same for the same seed whatever the device.

    Args:
        config: What decides it.
        dims: Numbers of an embedding of each branch.
        prevalence: π of each finding in train.
        known: Labelled scans of each finding in train.
        device: Where it computes.
    """
    weights = alpha_weights(prevalence, form=config.alpha, known=known)
    bias = prevalence_logit(prevalence, weights, focusing=_focusing(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        branches = build_branches(config, dims=dims, findings=len(prevalence))
    with torch.no_grad():
        for branch in branches:
            branch.classifier.bias.copy_(bias / len(branches))
    on_device = AlphaWeights(*(weight.to(device) for weight in weights))
    return Learner(branches, config, weights=on_device, device=device)


def _focusing(config: FitConfig) -> Focusing:
    return focusing_of(
        config.loss,
        gamma=config.gamma,
        gamma_positive=config.gamma_positive,
        gamma_negative=config.gamma_negative,
        margin=config.margin,
    )


def parameter_groups(branches: Sequence[Head], config: FitConfig) -> list[dict[str, Any]]:
    """Parameters for AdamW: the router learns at the rate of the experts, being part of MoLRE.

    Biases and the queries do not decay.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    named = [pair for branch in branches for pair in branch.named_parameters()]
    for name, parameter in named:
        adapting = name.startswith(("molre.", "adapter."))
        rate = config.lr_molre if adapting else config.lr_head
        decays = not name.endswith("bias") and name != "pool.query"
        groups.setdefault((rate, config.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def _metadata(content: bytes) -> dict[str, str]:
    """The text that a safetensors file carries: its header is JSON behind 8 bytes of length."""
    length = int.from_bytes(content[:8], "little")
    about: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return about
