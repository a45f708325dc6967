"""Windows against values worked out by hand, and the jitter's determinism."""

import pytest
import torch
from torch.testing import assert_close

from ctfm.extract.augment import Jitter
from ctfm.extract.windows import fit_to, jitter_hu, noise_like, to_channels

PAPER = ((0.0, 80.0), (-20.0, 180.0), (-800.0, 2000.0))
S, Y, X = 2, 3, 5


def test_channels_match_values_worked_out_by_hand() -> None:
    hu = torch.tensor([[[-1000, -20, 0, 40, 3000]]], dtype=torch.int16)
    channels = to_channels(hu, PAPER)
    expected = torch.tensor(
        [
            [0, 0, 0, 0.5, 1],
            [0, 0, 0.1, 0.3, 1],
            [0, 780 / 2800, 800 / 2800, 840 / 2800, 1],
        ]
    )
    assert channels.shape == (1, 3, 1, 5)
    assert_close(channels[0, :, 0], expected)


def test_integer_and_float_hu_give_the_same_channels() -> None:
    hu = torch.randint(-1024, 2000, (S, Y, X), dtype=torch.int16)
    assert torch.equal(to_channels(hu, PAPER), to_channels(hu.double(), PAPER))


def test_the_dtype_is_that_asked_for() -> None:
    hu = torch.zeros(S, Y, X, dtype=torch.int16)
    assert to_channels(hu, PAPER, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_scan_is_not_changed() -> None:
    hu = torch.full((S, Y, X), 40.0)
    to_channels(hu, PAPER, jitter=Jitter(1.01, 0.1, 3))
    assert torch.equal(hu, torch.full((S, Y, X), 40.0))


def test_jitter_scales_adds_noise_and_clips() -> None:
    hu = torch.full((S, Y, X), 40, dtype=torch.int16)
    jitter = Jitter(1.01, 0.1, 3)
    clean = to_channels(hu, PAPER)
    expected = (clean * 1.01 + noise_like(clean, jitter)).clamp(0, 1)
    jittered = to_channels(hu, PAPER, jitter=jitter)
    assert_close(jittered, expected)
    assert jittered.min() >= 0
    assert jittered.max() <= 1


def test_noise_depends_on_the_seed_alone() -> None:
    like = torch.zeros(20, 3, 40, 40)
    assert torch.equal(noise_like(like, Jitter(1, 0.1, 3)), noise_like(like, Jitter(1, 0.1, 3)))
    assert not torch.equal(noise_like(like, Jitter(1, 0.1, 3)), noise_like(like, Jitter(1, 0.1, 4)))


def test_noise_has_the_standard_deviation_asked_for() -> None:
    noise = noise_like(torch.zeros(20, 3, 40, 40), Jitter(1, 0.1, 3))
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)


def test_a_jitter_of_nothing_changes_nothing() -> None:
    hu = torch.randint(-1024, 2000, (S, Y, X), dtype=torch.int16)
    none = Jitter(1, 0, 3)
    assert torch.equal(to_channels(hu, PAPER, jitter=none), to_channels(hu, PAPER))
    values = hu[:, None].float()
    assert_close(jitter_hu(values, none, window_hu=(0.0, 80.0)), values)


def test_jitter_of_hu_looks_the_same_through_its_window_as_jitter_of_the_channel() -> None:
    hu = torch.full((S, Y, X), 40.0)
    jitter = Jitter(0.99, 0.05, 8)
    jittered = jitter_hu(hu[:, None], jitter, window_hu=(0.0, 80.0))
    assert_close(
        to_channels(jittered[:, 0], ((0.0, 80.0),)), to_channels(hu, ((0.0, 80.0),), jitter=jitter)
    )


def test_fitting_is_about_the_middle_and_keeps_what_fits() -> None:
    hu = torch.arange(5 * 4 * 3, dtype=torch.int16).reshape(5, 4, 3)
    fitted = fit_to(hu, (3, 7, 3), fill=-9.0)
    assert fitted.shape == (3, 7, 3)
    assert torch.equal(fitted[:, 1:5], hu[1:4].float())
    assert (fitted[:, [0, 5, 6]] == -9).all()


def test_the_own_window_runs_from_the_least_to_the_greatest_of_all_slices() -> None:
    hu = torch.tensor([[[-100, 0]], [[300, 100]]], dtype=torch.int16)
    channels = to_channels(hu, [(0.0, 100.0)], own_window=True)
    assert channels.shape == (2, 2, 1, 2)
    assert_close(channels[:, 1].flatten(), torch.tensor([0, 0.25, 1, 0.5]))
    assert_close(channels[:, 0].flatten(), torch.tensor([0, 0, 1, 1.0]))
