"""The shape of an Atlas tower: from the `config.json` of a release, to sizes of modules and tokens.

Read are the fields that the released code reads: `stages` and `atlas_args` of the model, and of
the modality its channels, width, image and patch size, and how tokens are windowed (`merge_ratio`)
and pooled (`local2global`). A configuration that does not describe a tower which could run is
refused with the reason; a forward pass never has to be tried to find out.

Axes: z y x, of voxels, tokens or windows; the file's own image and patch sizes are (y, x, z).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ctfm.store.errors import BackboneError

MODALITIES = ("brain_ct", "head_ct")
"""Names under which the stem of head CT may lie in a checkpoint."""

STRIDE = (4, 8, 8)
"""Voxels of a token in that stem."""

ZYX = tuple[int, int, int]


@dataclass(frozen=True)
class Scale:
    """Tokens of one coarseness, and how they are cut into windows."""

    pooling: ZYX
    """Tokens of the stem that are one here."""

    grid: ZYX
    """Number of windows."""

    window: ZYX
    """Tokens of a window."""

    def regrouped(self, grid: ZYX) -> "Scale":
        """The same tokens in other windows: those of the parts of another scale's grid."""
        size = [n * k for n, k in zip(self.grid, self.window, strict=True)]
        return Scale(self.pooling, grid, _zyx(a // b for a, b in zip(size, grid, strict=True)))


@dataclass(frozen=True, kw_only=True)
class AtlasConfig:
    """Sizes of a tower."""

    modality: str
    """Name of the stem in the checkpoint."""
    channels: int
    """Window channels of the input."""
    image: ZYX
    """Voxels of the input."""
    width: int
    """Numbers of a token."""
    heads: int
    mlp_width: int
    qkv_bias: bool
    depths: tuple[int, ...]
    """Blocks of each stage; there are as many scales."""
    window: ZYX
    """Tokens of a window; the coarsest scale may have fewer."""
    pool: ZYX
    """Tokens that are one in the next coarser scale."""

    def __post_init__(self) -> None:
        if math.prod(self.pool) < 2:
            raise BackboneError(f"config.json: local2global {self.pool} pools nothing")
        if len(self.scales) != len(self.depths):
            raise BackboneError(
                f"config.json gives {len(self.scales)} scales of tokens for {len(self.depths)} "
                "stages: they must be as many"
            )

    @property
    def dim(self) -> int:
        """Numbers of the embedding."""
        return self.width * len(self.depths)

    @cached_property
    def scales(self) -> tuple[Scale, ...]:
        """Every scale, finest first.

        Raises:
            BackboneError: If tokens cannot be cut or pooled evenly.
        """
        tokens = _divided(self.image, STRIDE, "image size by the stem's stride")
        _divided(self.window, self.pool, "merge_ratio by local2global")
        ratio = math.log2(math.prod(tokens) / math.prod(self.window))
        count = max(1, math.ceil(ratio / math.log2(math.prod(self.pool))) + 1)
        found: list[Scale] = []
        while len(found) < count and not (found and found[-1].grid == (1, 1, 1)):
            pooling = _zyx(step ** len(found) for step in self.pool)
            size = _divided(tokens, pooling, "tokens by local2global")
            whole = all(a >= b for a, b in zip(size, self.window, strict=True))
            window = self.window if whole else size
            found.append(Scale(pooling, _divided(size, window, "tokens by merge_ratio"), window))
        return tuple(found)


def read_config(config: Mapping[str, Any]) -> AtlasConfig:
    """Find the tower's sizes in the content of a `config.json`.

    Args:
        config: All of the file. The part that has both `model` and `modalities` may lie anywhere
            in it (`vision_cfg`, or a `model_config` below that).

    Raises:
        BackboneError: If a field is missing, is not what it should be, or does not go together
            with the others.
    """
    found = next((part for part in _parts(config) if {"model", "modalities"} <= part.keys()), None)
    if found is None:
        raise BackboneError("config.json has no part with `model` and `modalities`: not an Atlas")
    try:
        modality = next((name for name in MODALITIES if name in found["modalities"]), None)
        if modality is None:
            raise ValueError(f"needed is one of {MODALITIES}, there is {[*found['modalities']]}")
        return _from_fields(modality, found["model"], found["modalities"][modality])
    except BackboneError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BackboneError(
            f"config.json does not tell the shape of a head CT tower: {type(error).__name__}, "
            f"{error}"
        ) from error


def _from_fields(modality: str, model: Mapping[str, Any], own: Mapping[str, Any]) -> AtlasConfig:
    arguments = model["atlas_args"]
    width, heads = int(arguments["dim"]), int(arguments["num_heads"])
    y, x, z = (int(size) for size in own["image_size"])
    patch_y, patch_x, patch_z = (int(size) for size in own["patch_size"])
    if (patch_z, patch_y, patch_x) != STRIDE:
        raise ValueError(f"patch_size {own['patch_size']}, the stem of head CT has [8, 8, 4]")
    if 2 * int(own.get("num_features", 192)) != width or width % heads:
        raise ValueError(f"dim {width} must be twice num_features and divisible by num_heads")
    return AtlasConfig(
        modality=modality,
        channels=int(own.get("in_chans", 1)),
        image=(z, y, x),
        width=width,
        heads=heads,
        mlp_width=int(width * float(arguments.get("mlp_ratio", 4.0))),
        qkv_bias=bool(arguments.get("qkv_bias", True)),
        depths=tuple(int(depth) for depth in model["stages"]),
        window=_zyx(own["merge_ratio"]),
        pool=_zyx(own["local2global"]),
    )


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _zyx(values: Any) -> ZYX:
    z, y, x = (int(value) for value in values)
    return z, y, x


def _divided(of: ZYX, by: ZYX, what: str) -> ZYX:
    if any(a % b for a, b in zip(of, by, strict=True)):
        raise BackboneError(f"config.json: {what} leaves a rest, {of} by {by}")
    return _zyx(a // b for a, b in zip(of, by, strict=True))
