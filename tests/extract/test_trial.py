"""Tokens of an image that depend on chance or on other images are found when a model is loaded."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctfm.extract.trial import check_repeatable
from ctfm.store.errors import BackboneError

D = 6
PIXELS = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """A small network that ends in a layer of one's own."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(240, D)
        self.last = last

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"cls": self.last(self.first(pixels.flatten(1)))}


class OfTheBatch(nn.Module):
    """Scales by the largest number of the batch, as dynamic quantisation does."""

    def forward(self, values: Tensor) -> Tensor:
        scale = values.abs().max() / 7
        return (values / scale).round() * scale


class Calls(nn.Module):
    """Gives more each time."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, values: Tensor) -> Tensor:
        self.n += 1
        return values * self.n


class Divided(nn.Module):
    """Has lost its numbers."""

    def forward(self, values: Tensor) -> Tensor:
        return values / 0


class Joined(nn.Module):
    """Puts the images of a batch one behind the other, as Pixtral's tower does."""

    def forward(self, values: Tensor) -> Tensor:
        return values.reshape(1, -1)


def check(last: nn.Module, **tokens: int) -> None:
    check_repeatable(Tokens(last), PIXELS, tokens=tokens or {"cls": D}, name="model")


def training(layer: Any) -> nn.Module:
    trained: nn.Module = layer.train()
    return trained


@pytest.mark.parametrize("last", [nn.Identity(), nn.Dropout(0.5), nn.BatchNorm1d(D)])
def test_a_network_in_evaluation_mode_passes(last: nn.Module) -> None:
    check(last.eval())


@pytest.mark.parametrize("last", [training(nn.Dropout(0.1)), Calls()])
def test_one_that_changes_from_call_to_call_is_refused(last: nn.Module) -> None:
    with pytest.raises(BackboneError, match="other tokens each time that it sees the same image"):
        check(last)


def test_small_dropout_is_found() -> None:
    torch.manual_seed(0)
    with pytest.raises(BackboneError, match="draws at random"):
        check(nn.Sequential(nn.Linear(D, 1000), training(nn.Dropout(0.01)), nn.Linear(1000, D)))


def test_one_that_mixes_the_images_of_a_batch_is_refused() -> None:
    with pytest.raises(BackboneError, match="when another one is beside it in the batch"):
        check(OfTheBatch())
    over_places = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.BatchNorm1d(2), nn.Flatten())
    with pytest.raises(BackboneError, match="when another one is beside it in the batch"):
        check(training(over_places))


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(BackboneError, match="NaN or infinity as cls"):
        check(Divided())


def test_other_tokens_than_stated_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"gives \{'cls': \(1, 6\)\} for 1 samples"):
        check(nn.Identity(), cls=D + 1)
    with pytest.raises(BackboneError, match=r"stated to give.*pooler"):
        check(nn.Identity(), cls=D, pooler=D)
    with pytest.raises(BackboneError, match=r"gives \{'cls': \(1, 12\)\} for 2 samples"):
        check(Joined())


def test_an_error_of_the_network_is_told() -> None:
    with pytest.raises(BackboneError, match=r"does not run on 1 samples of \(3, 8, 10\): Runtime"):
        check(nn.Linear(D + 1, D))
