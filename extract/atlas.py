"""Atlas: a volume of window channels, to one vector, through attention within windows of tokens.

The vision tower of the Pillar-0 models (YalaLab, 2025), written from its published behaviour and
with the names of its released tensors. A convolutional stem makes tokens; max pooling makes
coarser copies of them (`Scale`), each cut into windows. In a block every scale hears from all
coarser ones, then each from the next finer one. After each stage the finest scale leaves. What
left, each scale's maximum over its tokens, side by side, is the embedding; it is not normalised.

Three habits of the original are kept, because the weights grew up with them: windows that share a
coarser window are the next ones in raster order, wherever they lie; the coordinates of a position
run (y, x, z) over tokens that run (z, y, x); and tensors of scales that a stage has already let go
are part of a checkpoint, though nothing uses them. Dropout at inference (the original's attention
drops where its configuration says so) is not kept.

Axes: b volumes, m channels, z y x voxels or tokens, w windows of all volumes (b times the grid), n
tokens of a window, h heads, c numbers of a token, d embedding.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool3d, scaled_dot_product_attention

from ctfm.extract.atlas_config import AtlasConfig, Scale

STEM_WIDTH = 64
POSITION_WIDTH = 512


class Residual(nn.Module):
    """Two convolutions and what went in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.norm1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm3d(width)

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        """Same size in and out."""
        y: Tensor = self.norm2(self.conv2(gelu(self.norm1(self.conv1(x)))))
        return x + y


class Halving(nn.Module):
    """Norm over channels, then a convolution that halves every axis and doubles the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        convolution = nn.Conv3d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.reduction = nn.Sequential(convolution)

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c2 z2 y2 x2"]:
        """Half the size, twice the channels."""
        normed: Tensor = self.reduction(self.norm(x.movedim(1, -1)).movedim(-1, 1))
        return normed


def _strided(
    channels: int, width: int, stride: int | tuple[int, int, int]
) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv3d(channels, width, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm3d(width, eps=1e-4), nn.ReLU()


class Stem(nn.Module):
    """Voxels to tokens: 4 voxels along z, 8 along y and x, are one."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            *_strided(channels, STEM_WIDTH, (1, 2, 2)),
            *_strided(STEM_WIDTH, width, 2),
            *_strided(width, width, 1),
        )
        self.conv1 = nn.Sequential(*(Residual(width) for _ in range(3)))
        self.ds1 = Halving(width)

    def forward(self, pixels: Float[Tensor, "b m z y x"]) -> Float[Tensor, "b c z2 y2 x2"]:
        """Tokens on their grid."""
        tokens: Tensor = self.ds1(self.conv1(self.conv_down(pixels)))
        return tokens


def cut(volume: Float[Tensor, "b z y x c"], scale: Scale) -> Float[Tensor, "w n c"]:
    """Tokens on their grid, to windows in raster order."""
    (z, y, x), (k, j, i) = scale.grid, scale.window
    parts = volume.reshape(-1, z, k, y, j, x, i, volume.shape[-1])
    return parts.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, k * j * i, volume.shape[-1])


def join(windows: Float[Tensor, "w n c"], scale: Scale) -> Float[Tensor, "b z y x c"]:
    """What `cut` took apart."""
    (z, y, x), (k, j, i) = scale.grid, scale.window
    parts = windows.reshape(-1, z, y, x, k, j, i, windows.shape[-1])
    return parts.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, z * k, y * j, x * i, parts.shape[-1])


class Attention(nn.Module):
    """The projections of an attention whose queries and keys may come from different scales."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.kv = nn.Linear(config.width, 2 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(
        self, queries: Float[Tensor, "w n c"], keys_values: Float[Tensor, "w n2 c2"]
    ) -> Float[Tensor, "w n c"]:
        """Attend, where `keys_values` is `kv` of the tokens that are listened to."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(queries), *keys_values.chunk(2, dim=-1))
        )
        heard: Tensor = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return heard


class Mlp(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "w n c"]) -> Float[Tensor, "w n c"]:
        """Same size in and out."""
        y: Tensor = self.fc2(gelu(self.fc1(x)))
        return y


class ScaleLayer(nn.Module):
    """A transformer layer of one scale."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.norm1_q = nn.LayerNorm(config.width)
        self.norm1_kv = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_width)

    def keys_values(self, tokens: Float[Tensor, "w n c"]) -> Float[Tensor, "w n c2"]:
        """What these tokens say to those that listen, keys before values."""
        said: Tensor = self.attn.kv(self.norm1_kv(tokens))
        return said

    def hear(
        self, tokens: Float[Tensor, "w n c"], keys_values: Float[Tensor, "w n2 c2"]
    ) -> Float[Tensor, "w n c"]:
        """What these tokens take from the keys and values of their window."""
        heard: Tensor = self.attn(self.norm1_q(tokens), keys_values)
        return heard

    def settle(
        self, tokens: Float[Tensor, "w n c"], heard: Float[Tensor, "w n c"]
    ) -> Float[Tensor, "w n c"]:
        """Tokens after what they heard and the MLP."""
        tokens = tokens + heard
        settled: Tensor = tokens + self.mlp(self.norm2(tokens))
        return settled


class Position(nn.Module):
    """A learnt function of where a token lies in its window."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cpb_mlp = nn.Sequential(
            nn.Linear(3, POSITION_WIDTH), nn.ReLU(), nn.Linear(POSITION_WIDTH, width, bias=False)
        )

    def forward(self, window: tuple[int, int, int]) -> Float[Tensor, "n c"]:
        """One row a token of a window of that size (z y x)."""
        z, y, x = window
        hidden = self.cpb_mlp[0]
        assert isinstance(hidden, nn.Linear)
        # In this order over tokens in (z, y, x) order, as in the original.
        places = torch.cartesian_prod(*(_centred(size) for size in (y, x, z)))
        rows: Tensor = self.cpb_mlp(places.to(hidden.weight))
        return rows


def _centred(size: int) -> Float[Tensor, " size"]:
    """Places along one side of a window, about -1 to 1."""
    return (torch.arange(size) - size // 2) / max(1, size // 2)


class Block(nn.Module):
    """All scales once: position, finer into coarser by pooling, down, and up again."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        n_scales = len(config.depths)
        self.pool = config.pool
        self.blocks = nn.ModuleList(ScaleLayer(config) for _ in range(n_scales))
        self.posemb = nn.ModuleList(Position(config.width) for _ in range(n_scales))

    def forward(
        self, tokens: Sequence[Float[Tensor, "..."]], scales: Sequence[Scale]
    ) -> list[Float[Tensor, "..."]]:
        """Tokens of each scale (w n c), finest first, to the same."""
        placed = [
            own + position(scale.window)
            for own, position, scale in zip(tokens, self.posemb, scales, strict=False)
        ]
        for finer, coarser in pairwise(range(len(scales))):
            pooled = max_pool3d(join(placed[finer], scales[finer]).movedim(-1, 1), self.pool)
            placed[coarser] = placed[coarser] + cut(pooled.movedim(1, -1), scales[coarser])
        return self._up(self._down(placed), scales)

    def _down(self, tokens: list[Float[Tensor, "..."]]) -> list[Float[Tensor, "..."]]:
        """From the coarsest on, each scale attends to its own window and to all coarser ones."""
        tokens = list(tokens)
        coarser: list[Tensor] = []
        for number in reversed(range(len(tokens))):
            if number + 1 < len(tokens):
                coarser.append(self._layer(number + 1).keys_values(tokens[number + 1]))
            layer, own = self._layer(number), tokens[number]
            said = [layer.keys_values(own)]
            said += [each.repeat_interleave(len(own) // len(each), dim=0) for each in coarser]
            tokens[number] = layer.settle(own, layer.hear(own, torch.cat(said, dim=1)))
        return tokens

    def _up(
        self, tokens: list[Float[Tensor, "..."]], scales: Sequence[Scale]
    ) -> list[Float[Tensor, "..."]]:
        """From the second finest on, each scale attends to the finer one where it lies."""
        for finer, number in pairwise(range(len(tokens))):
            layer, scale, own = self._layer(number), scales[number], tokens[number]
            there = scale.regrouped(scales[finer].grid)
            asking = cut(join(own, scale), there)
            heard = layer.hear(asking, self._layer(finer).keys_values(tokens[finer]))
            tokens[number] = layer.settle(own, cut(join(heard, there), scale))
        return tokens

    def _layer(self, number: int) -> ScaleLayer:
        layer = self.blocks[number]
        assert isinstance(layer, ScaleLayer)
        return layer


class Stage(nn.Module):
    """Some blocks, one after the other."""

    def __init__(self, config: AtlasConfig, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))

    def forward(
        self, tokens: list[Float[Tensor, "..."]], scales: Sequence[Scale]
    ) -> list[Float[Tensor, "..."]]:
        """Tokens of each scale (w n c), finest first, to the same."""
        for block in self.blocks:
            tokens = block(tokens, scales)
        return tokens


class Atlas(nn.Module):
    """Pixels to one token, `cls`.

    Args:
        config: From the checkpoint's `config.json`.
    """

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.config = config
        stem = Stem(config.channels, config.width // 2)
        self.patch_embeds = nn.ModuleDict({config.modality: stem})
        self.atlas_models = nn.ModuleList(Stage(config, depth) for depth in config.depths)

    def forward(self, pixels: Float[Tensor, "b m z y x"]) -> dict[str, Float[Tensor, "b d"]]:
        """The maximum over the tokens of each scale, finest scale first."""
        scales = self.config.scales
        volume = self.patch_embeds[self.config.modality](pixels)
        tokens = [
            cut(max_pool3d(volume, scale.pooling).movedim(1, -1), scale)  # of the stem's own
            for scale in scales
        ]
        maxima = []
        for number, stage in enumerate(self.atlas_models):
            finest, *tokens = stage(tokens, scales[number:])
            maxima.append(finest.reshape(len(pixels), -1, finest.shape[-1]).amax(dim=1))
        return {"cls": torch.cat(maxima, dim=1)}
