"""A 3-D DenseNet-BC: a volume of channels, to one vector.

Densely connected layers with bottlenecks and halving transitions (Huang et al. 2017,
arXiv:1608.06993) with one more axis, and with the tensor names of MONAI's `DenseNet`, so that a
network trained there loads here. The classifier is not part of it: the embedding is what MONAI's
classifier reads, the mean over places of the last feature maps after norm and ReLU.

The shape of a network is read off its tensors (`read_shape`); nothing has to be written down.

Axes: b volumes, m channels, z y x voxels, c feature maps, d embedding.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, relu

from ctfm.store.errors import BackboneError


@dataclass(frozen=True, kw_only=True)
class DenseShape:
    """Sizes of a network; the defaults of `growth` to `stem` are MONAI's."""

    channels: int
    """Channels of the input."""
    blocks: tuple[int, ...]
    """Layers of each dense block."""
    growth: int = 32
    """Feature maps that a layer adds."""
    stem: int = 64
    """Feature maps of the first convolution."""
    bottleneck: int = 4
    """Feature maps inside a layer, in multiples of `growth`."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Feature maps after each block."""
        widths: list[int] = []
        width = self.stem
        for layers in self.blocks:
            width += layers * self.growth
            widths.append(width)
            width //= 2
        return tuple(widths)

    @property
    def dim(self) -> int:
        """Numbers of the embedding."""
        return self.widths[-1]


class DenseLayer(nn.Module):
    """Norm, ReLU and a 1×1×1 convolution, the same with 3×3×3; the result joins what went in."""

    def __init__(self, width: int, shape: DenseShape) -> None:
        super().__init__()
        inside = shape.bottleneck * shape.growth
        self.layers = nn.Sequential()
        self.layers.add_module("norm1", nn.BatchNorm3d(width))
        self.layers.add_module("relu1", nn.ReLU())
        self.layers.add_module("conv1", nn.Conv3d(width, inside, 1, bias=False))
        self.layers.add_module("norm2", nn.BatchNorm3d(inside))
        self.layers.add_module("relu2", nn.ReLU())
        self.layers.add_module("conv2", nn.Conv3d(inside, shape.growth, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c2 z y x"]:
        """`growth` more feature maps."""
        return torch.cat([x, self.layers(x)], dim=1)


class Halving(nn.Module):
    """Means of 2×2×2 places, in float32, because a CPU has no such pooling in bfloat16."""

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z2 y2 x2"]:
        """Half the size."""
        return avg_pool3d(x.to(torch.float32), 2).to(x.dtype)


def _dense_block(layers: int, width: int, shape: DenseShape) -> nn.Sequential:
    block = nn.Sequential()
    for number in range(layers):
        block.add_module(
            f"denselayer{number + 1}", DenseLayer(width + number * shape.growth, shape)
        )
    return block


def _transition(width: int) -> nn.Sequential:
    transition = nn.Sequential()
    transition.add_module("norm", nn.BatchNorm3d(width))
    transition.add_module("relu", nn.ReLU())
    transition.add_module("conv", nn.Conv3d(width, width // 2, 1, bias=False))
    transition.add_module("pool", Halving())
    return transition


class DenseNet3d(nn.Module):
    """Pixels to one token, `cls`.

    Args:
        shape: From `read_shape`, or one's own.
    """

    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.shape = shape
        self.features = nn.Sequential()
        for name, module in self._parts():
            self.features.add_module(name, module)

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        shape, width = self.shape, self.shape.stem
        yield "conv0", nn.Conv3d(shape.channels, width, 7, stride=2, padding=3, bias=False)
        yield "norm0", nn.BatchNorm3d(width)
        yield "relu0", nn.ReLU()
        yield "pool0", nn.MaxPool3d(3, stride=2, padding=1)
        for number, (layers, after) in enumerate(zip(shape.blocks, shape.widths, strict=True), 1):
            yield f"denseblock{number}", _dense_block(layers, width, shape)
            if number < len(shape.blocks):
                yield f"transition{number}", _transition(after)
            width = after // 2
        yield "norm5", nn.BatchNorm3d(shape.dim)

    def forward(self, pixels: Float[Tensor, "b m z y x"]) -> dict[str, Float[Tensor, "b d"]]:
        """Mean over places of the last feature maps."""
        return {"cls": relu(self.features(pixels)).mean(dim=(2, 3, 4))}


_LAYER = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.layers\.conv1\.weight")


def read_shape(tensors: Mapping[str, Tensor]) -> DenseShape:
    """Sizes of the network that has these tensors; whether it has them all is not checked.

    Args:
        tensors: By MONAI's names. Only shapes are looked at.

    Raises:
        BackboneError: If they are not those of a 3-D DenseNet-BC.
    """
    layers = [match for name in tensors if (match := _LAYER.fullmatch(name))]
    first = tensors.get("features.conv0.weight")
    inner = tensors.get("features.denseblock1.denselayer1.layers.conv2.weight")
    if (
        first is None
        or inner is None
        or not layers
        or {first.ndim, inner.ndim} != {5}
        or not len(inner)
    ):
        raise BackboneError(
            "the tensors are not those of a 3-D DenseNet-BC in MONAI's names "
            "(features.conv0.weight with 5 axes, features.denseblock1.denselayer1.layers.…): "
            "give the state dict of such a network, or rename its tensors"
        )
    numbers = sorted({int(match[1]) for match in layers})
    return DenseShape(
        channels=first.shape[1],
        stem=first.shape[0],
        growth=inner.shape[0],
        bottleneck=inner.shape[1] // inner.shape[0],
        blocks=tuple(sum(int(match[1]) == number for match in layers) for number in numbers),
    )
