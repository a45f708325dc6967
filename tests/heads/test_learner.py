"""Steps of a learner against plain AdamW, with clipping and a moving average written out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ctfm.heads.config import FitConfig
from ctfm.heads.learner import Learner, new_learner

D, C = 5, 3
CONFIG = FitConfig(experts=2, rank=1, router_hidden=3, lr_head=0.05, lr_molre=0.02)


def learner_of(config: FitConfig) -> Learner:
    prevalence, known = torch.tensor([0.3, 0.2, 0.1]), torch.tensor([50, 40, 30])
    device = torch.device("cpu")
    return new_learner(config, dims=[D], prevalence=prevalence, known=known, device=device)


def gradients(module: nn.Module, *, step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [3 * torch.randn(one.shape, generator=random) for one in module.parameters()]


def take_steps(learner: Learner, count: int) -> None:
    learner.begin_epoch(1)
    for step in range(count):
        for parameter, gradient in zip(
            learner.branches[0].parameters(), gradients(learner.branches[0], step=step), strict=True
        ):
            parameter.grad = gradient
        learner.step(epochs_done=0.0)


def clipped(values: list[Tensor], largest: float) -> list[Tensor]:
    norm = sum(float(one.square().sum()) for one in values) ** 0.5
    return [one * min(1.0, largest / norm) for one in values]


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_step_is_one_of_adamw_on_gradients_no_longer_than_allowed(clip_norm: float) -> None:
    learner, plain = learner_of(replace(CONFIG, clip_norm=clip_norm)), learner_of(CONFIG)
    head = plain.branches[0]
    rates = {
        name: CONFIG.lr_molre if name.startswith("molre.") else CONFIG.lr_head
        for name, _ in head.named_parameters()
    }
    undecayed = [n for n in rates if n.endswith("bias") or n == "pool.query"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [one], "lr": rates[n], "weight_decay": 0.0 if n in undecayed else 0.01}
            for n, one in head.named_parameters()
        ]
    )
    take_steps(learner, 4)
    for step in range(4):
        given = gradients(head, step=step)
        given = clipped(given, clip_norm) if clip_norm else given
        for parameter, gradient in zip(head.parameters(), given, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for (name, mine), expected in zip(
        learner.branches[0].named_parameters(), head.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_moving_average_forgets_at_its_rate_and_faster_at_first() -> None:
    learner, plain = learner_of(replace(CONFIG, ema=0.4)), learner_of(CONFIG)
    average = [one.detach().clone() for one in plain.branches[0].parameters()]
    for steps in range(1, 6):
        again = learner_of(CONFIG)
        take_steps(again, steps)
        decay = min(0.4, (1 + steps) / (10 + steps))
        now = again.branches[0].parameters()
        average = [decay * old + (1 - decay) * new for old, new in zip(average, now, strict=True)]
    take_steps(learner, 5)
    for mine, expected in zip(learner.judged[0].parameters(), average, strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=1e-7)
    for mine, other in zip(learner.branches[0].parameters(), average, strict=True):
        assert not torch.equal(mine, other)
    assert plain.judged is plain.branches


def test_a_checkpoint_brings_back_all_that_the_next_step_needs() -> None:
    config = replace(CONFIG, ema=0.9, clip_norm=1.0)
    first, second = learner_of(config), learner_of(config)
    take_steps(first, 3)
    assert second.restore(first.checkpoint("one"), "one")
    assert not second.restore(first.checkpoint("other"), "one")
    for learner in (first, second):
        take_steps(learner, 2)
    for a, b in zip(first.judged[0].parameters(), second.judged[0].parameters(), strict=True):
        assert torch.equal(a, b)
