"""`deepcntd`: a 3-D DenseNet for the user's own weights, a scan to one embedding.

DeepCNTD-Net (Yoo et al., MICCAI 2025, arXiv:2502.21106), one of the systems of the paper, has no
published code, weights, layer sizes or preprocessing. What stands here under its name is a 3-D
dense network of about its size, for weights that the user trained: it is NOT verified against
DeepCNTD, and its results are not DeepCNTD's. Side networks (haemorrhage, parcellation), which
the publication speaks of, are not part of it.

A folder holds one checkpoint with MONAI's names, and may hold a `deepcntd.toml` that says what the
network was trained on (`ctfm.extract.description`). The sizes of the network are read off its
tensors.

Token: `cls`, the pooled feature maps.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ctfm.extract.backbone import BackboneEntry, Loaded
from ctfm.extract.config import PAPER_WINDOWS_HU, Grid
from ctfm.extract.densenet3d import DenseNet3d, DenseShape, read_shape
from ctfm.extract.description import VOLUME, described
from ctfm.extract.network_part import Signature
from ctfm.extract.tower import fill
from ctfm.extract.weights import read_network
from ctfm.store.errors import BackboneError

DESCRIPTION = "deepcntd.toml"
"""Beside the weights; may have the fields `ctfm.extract.description.VOLUME`."""

DEFAULT_SHAPE = DenseShape(channels=3, blocks=(4, 8, 16, 12))
"""Chosen for its number of parameters, near the 6.9 M of the paper's table; nothing else."""

SIGNATURE = Signature(mark=re.compile(r"features\.conv0\.weight"))
"""What lies beside `features` in MONAI's networks is the classifier."""


def load_deepcntd(entry: BackboneEntry, weights: Path | None) -> Loaded:
    """Build the network that the weights are of and load it, completely or not at all.

    Args:
        entry: What holds unless `deepcntd.toml` says otherwise.
        weights: A checkpoint's file, or its folder.

    Raises:
        BackboneError: If there are none, they are not those of one whole 3-D DenseNet in MONAI's
            names, or `deepcntd.toml` does not fit.
    """
    if weights is None:
        raise BackboneError(
            f"{entry.name} has no published weights: it is an architecture for your own. Pass "
            "`--weights FOLDER` with a checkpoint of a 3-D DenseNet in MONAI's names"
        )
    found = read_network(weights, SIGNATURE, key=entry.weights_key)
    module = _network(read_shape(found.tensors))
    own = describe(entry, weights)
    if own.channels != module.shape.channels:
        raise BackboneError(
            f"the network takes {module.shape.channels} channels, {own.channels} windows are said: "
            f"write `windows_hu` with one [low, high] for each into {DESCRIPTION} beside the "
            "weights"
        )
    own = replace(
        own,
        tokens={"cls": module.shape.dim},
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )
    _check_size(module.shape, own.size_px or ())
    return fill(module, found, entry=own, source=weights)


def _network(shape: DenseShape) -> DenseNet3d:
    with torch.device("meta"):
        return DenseNet3d(shape)


def describe(entry: BackboneEntry, weights: Path) -> BackboneEntry:
    """What the user wrote of how the network was trained; the entry if nothing.

    Raises:
        BackboneError: If it cannot be read, or makes no sense.
    """
    file = (weights if weights.is_dir() else weights.parent) / DESCRIPTION
    return described(entry, file, fields=VOLUME) if file.is_file() else entry


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
                f"was trained on into {DESCRIPTION} beside the weights"
            ) from error


_NOT_PUBLISHED = "not published: the user's weights and deepcntd.toml decide"

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
        describe=describe,
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
            "lora_targets": "none: it has no attention",
        },
        unit="volume",
        skeleton=partial(_network, DEFAULT_SHAPE),
        size_px=(40, 224, 224),
        native_windows_hu=PAPER_WINDOWS_HU,
        own_preprocessing=True,
        grid=Grid(),
        batch_size=8,
    ),
)
