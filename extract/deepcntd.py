"""`deepcntd`: a 3-D DenseNet for the user's own weights, a scan to one embedding.

DeepCNTD-Net (Yoo et al., MICCAI 2025, arXiv:2502.21106), one of the systems of the paper, has no
published code, weights, layer sizes or preprocessing. What stands here under its name is a 3-D
dense network of about its size, for weights that the user trained: it is NOT verified against
DeepCNTD, and its results are not DeepCNTD's. Side networks (haemorrhage, parcellation), which
the publication speaks of, are not part of it.

A folder holds one safetensors file with MONAI's names, and may hold a `deepcntd.json` that says
what the network was trained on. The sizes of the network are read off its tensors.

Token: `cls`, the pooled feature maps.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctfm.extract.backbone import BackboneEntry, Loaded
from ctfm.extract.config import PAPER_WINDOWS_HU, Grid
from ctfm.extract.densenet3d import DenseNet3d, DenseShape, read_shape
from ctfm.extract.weights import digest_tensors, load_completely, read_tensors, weight_files
from ctfm.store.errors import BackboneError

CONFIG_NAME = "deepcntd.json"
FIELDS = ("windows_hu", "in_plane_mm", "slice_mm", "size_px", "pad_hu")
"""Of `deepcntd.json`, each optional: [[low, high], …], mm, mm, [z, y, x], HU."""

DEFAULT_SHAPE = DenseShape(channels=3, blocks=(4, 8, 16, 12))
"""Chosen for its number of parameters, near the 6.9 M of the paper's table; nothing else."""

CLASSIFIER = "class_layers."


def load_deepcntd(entry: BackboneEntry, weights: Path | None) -> Loaded:
    """Build the network that the weights are of and load it, completely or not at all.

    Args:
        entry: What holds unless `deepcntd.json` says otherwise.
        weights: A safetensors file, or its folder; never None, because none are published.

    Raises:
        BackboneError: If there are none, they are not those of one whole 3-D DenseNet in MONAI's
            names, or `deepcntd.json` does not fit.
    """
    if weights is None:
        raise BackboneError(
            f"{entry.name} has no published weights: it is an architecture for your own. Pass "
            "`--weights FOLDER` with a safetensors file of a 3-D DenseNet in MONAI's names"
        )
    tensors = _tower(read_tensors(weight_files(weights)))
    with torch.device("meta"):
        module = DenseNet3d(read_shape(tensors))
    load_completely(module, tensors, source=f"{weights} as {entry.name}")
    own = replace(
        entry,
        tokens={"cls": module.shape.dim},
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        channels=module.shape.channels,
        **_preprocessing(entry, weights if weights.is_dir() else weights.parent),
    )
    _check_size(module.shape, own.size_px or ())
    windows = len(own.native_windows_hu or ())
    if windows != own.channels:
        raise BackboneError(
            f"the network takes {own.channels} channels, {windows} windows are said: write "
            f"`windows_hu` with one [low, high] for each into {CONFIG_NAME} beside the weights"
        )
    return Loaded(module=module, digest=digest_tensors(module.state_dict()), entry=own)


def _check_size(shape: DenseShape, size_px: Sequence[int]) -> None:
    """Refuse a volume that the network pools to nothing, by trying it without any numbers."""
    with torch.device("meta"), torch.inference_mode():
        network, volume = DenseNet3d(shape).eval(), torch.empty(1, shape.channels, *size_px)
        try:
            network(volume)
        except RuntimeError as error:
            size = " x ".join(map(str, size_px))
            raise BackboneError(
                f"a volume of {size} is too small for this network: write the `size_px` that it "
                f"was trained on into {CONFIG_NAME} beside the weights"
            ) from error


def _tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers leave, and without the classifier."""
    renamed = {
        re.sub(r"^(?:module\.|model\.|backbone\.)+", "", name): tensor
        for name, tensor in tensors.items()
    }
    return {name: t for name, t in renamed.items() if not name.startswith(CLASSIFIER)}


def _preprocessing(entry: BackboneEntry, folder: Path) -> dict[str, Any]:
    """Fields of the entry as `deepcntd.json` has them."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        return {}
    assert entry.grid is not None
    assert entry.size_px is not None
    try:
        said = json.loads(file.read_text())
        if unknown := sorted(said.keys() - set(FIELDS)):
            raise ValueError(f"unknown field {unknown[0]}, known are {', '.join(FIELDS)}")
        z, y, x = (int(size) for size in said.get("size_px", entry.size_px))
        windows = said.get("windows_hu", entry.native_windows_hu)
        return {
            "size_px": (z, y, x),
            "native_windows_hu": tuple((float(low), float(high)) for low, high in windows),
            "pad_hu": float(said.get("pad_hu", entry.pad_hu)),
            "grid": Grid(
                in_plane_mm=float(said.get("in_plane_mm", entry.grid.in_plane_mm)),
                slice_mm=float(said.get("slice_mm", entry.grid.slice_mm)),
                size_px=max(y, x),
                max_slices=z,
            ),
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise BackboneError(f"{file} does not say how the network was trained: {error}") from error


_NOT_PUBLISHED = "not published: the user's weights and deepcntd.json decide"

ENTRIES = (
    BackboneEntry(
        name="deepcntd",
        architecture="3-D DenseNet for your weights; not verified against DeepCNTD",
        hub_id=None,
        revision=None,
        licence="yours",
        gated=False,
        tokens={"cls": DEFAULT_SHAPE.dim},
        parameters=6_771_920,
        load=load_deepcntd,
        sources={
            "architecture": "arXiv:2502.21106 calls it a 3-D network; dense blocks are a choice",
            "hub_id": "none found, nor code or data",
            "revision": "no repository",
            "licence": "of the user's weights",
            "gated": "no repository",
            "tokens": f"blocks {DEFAULT_SHAPE.blocks}, growth 32; the weights decide",
            "parameters": f"counted for blocks {DEFAULT_SHAPE.blocks}, growth 32; the weights "
            "decide",
            "channels": _NOT_PUBLISHED,
            "size_px": _NOT_PUBLISHED,
            "mean": _NOT_PUBLISHED,
            "sd": _NOT_PUBLISHED,
            "interpolation": "none: the grid has the spacing",
            "antialias": "none: the grid has the spacing",
            "native_windows_hu": _NOT_PUBLISHED + "; without it, the paper's three",
            "grid": _NOT_PUBLISHED + "; without it, the paper's",
            "pad_hu": _NOT_PUBLISHED + "; without it, air",
        },
        unit="volume",
        size_px=(40, 224, 224),
        native_windows_hu=PAPER_WINDOWS_HU,
        grid=Grid(),
        batch_size=8,
    ),
)
