"""Schedules against their formulas, and averages against a sum written out."""

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.testing import assert_close

from ctfm.heads.schedule import SCHEDULES, Ema, epochs_passed, rate_factor
from ctfm.store.errors import ConfigError


def test_constant_is_one_after_the_warm_up() -> None:
    for passed in (0.0, 0.3, 7.0, 20.0):
        assert rate_factor(passed, schedule="constant", max_epochs=20) == 1
    assert rate_factor(1.0, schedule="constant", max_epochs=20, warmup_epochs=4.0) == 0.25
    assert rate_factor(4.0, schedule="constant", max_epochs=20, warmup_epochs=4.0) == 1


def test_cosine_falls_to_zero_over_all_epochs() -> None:
    def cosine(passed: float) -> float:
        return rate_factor(passed, schedule="cosine", max_epochs=12)

    assert [cosine(passed) for passed in (0, 4, 6, 8, 12, 13)] == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0, 0], abs=1e-15
    )


def test_cosine_begins_where_the_warm_up_ends() -> None:
    def warmed(passed: float) -> float:
        return rate_factor(passed, schedule="cosine", max_epochs=10.5, warmup_epochs=0.5)

    assert [warmed(passed) for passed in (0, 0.125, 0.25, 0.5, 5.5, 10.5)] == pytest.approx(
        [0, 0.25, 0.5, 1, 0.5, 0], abs=1e-15
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_epoch_weighs_the_same_however_many_steps_it_has(schedule: str) -> None:
    def mean(epoch: int, steps: int) -> float:
        factors = [
            rate_factor(
                epochs_passed(epoch, step=step, steps=steps),
                schedule=schedule,
                max_epochs=7,
                warmup_epochs=2,
            )
            for step in range(steps)
        ]
        return math.fsum(factors) / steps

    for epoch in range(1, 8):
        assert mean(epoch, 50) == pytest.approx(mean(epoch, 53), abs=1e-4)


def test_no_step_is_taken_with_a_rate_of_zero() -> None:
    passed = [epochs_passed(epoch, step=s, steps=3) for epoch in (1, 2) for s in range(3)]
    assert passed == pytest.approx([1 / 6, 3 / 6, 5 / 6, 7 / 6, 9 / 6, 11 / 6])
    factors = [rate_factor(p, schedule="cosine", max_epochs=2, warmup_epochs=1) for p in passed]
    assert min(factors) > 0


@pytest.mark.parametrize("warmup", [-1.0, 5.0, 6.0, math.nan])
def test_a_warm_up_that_leaves_nothing_is_refused(warmup: float) -> None:
    with pytest.raises(ConfigError, match="below max_epochs, 5"):
        rate_factor(0, schedule="cosine", max_epochs=5, warmup_epochs=warmup)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose constant, cosine"):
        rate_factor(0, schedule="step", max_epochs=5)


def drawn(updates: int) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(3)
    return [
        {
            "query": torch.randn(3, generator=random, dtype=torch.double),
            "classifier.weight": torch.randn(2, 5, generator=random, dtype=torch.double),
        }
        for _ in range(updates + 1)
    ]


def averaged(values: list[dict[str, Tensor]], *, decay: float) -> Ema:
    ema = Ema(values[0], decay=decay)
    for value in values[1:]:
        ema.update(value)
    return ema


def test_the_average_weighs_every_update_by_the_decays_after_it() -> None:
    values, decay = drawn(30), 0.6
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(30)]
    assert decays[0] == 0.1
    assert decays[29] == 0.6
    weights = [math.prod(decays)] + [
        (1 - decays[t]) * math.prod(decays[t + 1 :]) for t in range(30)
    ]
    assert math.fsum(weights) == pytest.approx(1)
    means = averaged(values, decay=decay).means
    for name, mean in means.items():
        terms = [weight * value[name] for weight, value in zip(weights, values, strict=True)]
        assert_close(mean, torch.stack(terms).sum(0), rtol=0, atol=1e-12)


def test_the_average_leaves_the_parameters_alone_and_learns_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    ema = Ema({"p": parameter}, decay=0.5)
    with torch.no_grad():
        parameter.add_(1)
    ema.update({"p": parameter})
    assert_close(ema.means["p"], torch.full((3,), 1.9))
    assert_close(parameter.detach(), torch.full((3,), 2.0))
    assert not ema.means["p"].requires_grad


def test_an_average_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    values = drawn(8)
    whole = averaged(values, decay=0.99)
    safetensors.torch.save_file(averaged(values[:4], decay=0.99).state(), tmp_path / "ema")
    resumed = Ema(values[0], decay=0.99)
    resumed.load(safetensors.torch.load_file(tmp_path / "ema"))
    for value in values[4:]:
        resumed.update(value)
    for name, mean in whole.means.items():
        assert torch.equal(resumed.means[name], mean)


def test_a_state_does_not_change_with_the_next_update() -> None:
    values = drawn(2)
    ema = averaged(values[:2], decay=0.9)
    state = ema.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    ema.update(values[2])
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_that_cannot_be_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="decay"):
        Ema({}, decay=decay)
