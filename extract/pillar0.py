"""Pillar-0 head CT: a scan of eleven window channels to one embedding.

The released folder has a `config.json`, which decides the shape of the tower, and a
`model.safetensors` that also holds a text side. Tensors under `model.visual.` must be complete;
all others are left out. None of the repository's code is run (`ctfm.extract.atlas` is in its
place), and the embedding is left as long as it is, where the released code normalises it.

What goes in: ten windows and the scan's own range, each in 0..1, in the order of the authors'
preprocessing; the vertex first; a scan of fewer slices in the middle, with -1 HU around it.

Token: `cls`, the maxima over the tokens of each scale.
"""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ctfm.extract.atlas import Atlas
from ctfm.extract.atlas_config import AtlasConfig, read_config
from ctfm.extract.backbone import BackboneEntry, Loaded
from ctfm.extract.config import Grid
from ctfm.extract.network_part import Signature
from ctfm.extract.tower import fill
from ctfm.extract.weights import read_network
from ctfm.store.errors import BackboneError

SIGNATURE = Signature(mark=re.compile(".+"), belongs=re.compile(r"model\.visual\."))

_CENTRE_WIDTH_HU = {
    "lung": (-600, 1500),
    "mediastinum": (50, 400),
    "abdomen": (40, 400),
    "liver": (80, 150),
    "bone": (400, 1800),
    "brain": (40, 80),
    "subdural": (75, 215),
    "stroke": (40, 40),
    "temporal_bone": (600, 2800),
    "soft_tissue": (50, 350),
}

WINDOWS_HU = tuple(
    (centre - width / 2, centre + width / 2) for centre, width in _CENTRE_WIDTH_HU.values()
)
"""(low, high) in the order of the channels; the eleventh is the scan's own range."""


INFERRED = AtlasConfig(
    modality="brain_ct",
    channels=len(WINDOWS_HU) + 1,
    image=(128, 256, 256),
    width=384,
    heads=12,
    mlp_width=4 * 384,
    qkv_bias=True,
    depths=(2, 2, 10),
    window=(4, 4, 4),
    pool=(4, 4, 4),
)
"""From the sizes of exported weights; the `config.json` of a release decides."""


def load_pillar0(entry: BackboneEntry, weights: Path | None) -> Loaded:
    """Build the tower that the release describes and load it, completely or not at all.

    Args:
        entry: Its facts.
        weights: A folder with `config.json` and the safetensors, or the file beside its config.

    Raises:
        BackboneError: As `describe`, or if the tower's tensors are not exactly those that the
            configuration asks for.
    """
    assert weights is not None
    found = read_network(weights, SIGNATURE, key=entry.weights_key)
    module = _build(_config_beside(weights))
    return fill(module, found, entry=describe(entry, weights), source=weights)


def describe(entry: BackboneEntry, weights: Path) -> BackboneEntry:
    """The facts as `config.json` states them; the spacing is in no file of the release.

    Raises:
        BackboneError: If it is not there, or not that of a head CT tower with eleven channels.
    """
    config = _config_beside(weights)
    if config.channels != entry.channels:
        raise BackboneError(
            f"config.json asks for {config.channels} channels, {entry.name} has {entry.channels} "
            "windows: give the folder of the head CT release"
        )
    assert entry.grid is not None
    z, y, x = config.image
    return replace(
        entry,
        tokens={"cls": config.dim},
        parameters=sum(parameter.numel() for parameter in _build(config).parameters()),
        size_px=(z, y, x),
        grid=replace(entry.grid, size_px=max(y, x), max_slices=z),
    )


def _build(config: AtlasConfig) -> Atlas:
    with torch.device("meta"):
        return Atlas(config)


def _config_beside(weights: Path) -> AtlasConfig:
    file = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not file.is_file():
        raise BackboneError(
            f"no config.json in {file.parent}: it decides the shape of the tower, put it beside "
            "the weights"
        )
    try:
        return read_config(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise BackboneError(f"{file} is not JSON: {error}") from error


_INFERRED = "inferred, config.json of the release decides: "
_PREPROCESSING = "github.com/YalaLab/rate-evals, rve_brain_ct.yaml and pillar0.yaml: "

ENTRIES = (
    BackboneEntry(
        name="pillar0-headct",
        architecture="Atlas, 3 scales, max pooling",
        hub_id="YalaLab/Pillar0-HeadCT",
        revision=None,
        licence="ECL-2.0",
        gated=True,
        tokens={"cls": INFERRED.dim},
        parameters=92_216_768,
        load=load_pillar0,
        describe=describe,
        sources={
            "architecture": "released modules multimodal_atlas.py, multimodal_msa.py",
            "hub_id": "github.com/YalaLab/pillar-pretrain, scripts/demo.py",
            "revision": "not pinned: no public source names a commit; the store says which was "
            "used",
            "licence": "model page on the hub, as others report it",
            "gated": "model page on the hub, as others report it",
            "tokens": _INFERRED + "width 384 and 3 scales",
            "parameters": _INFERRED + "stages 2, 2, 10, width 384, windows of 4 x 4 x 4",
            "channels": _PREPROCESSING + "all CT windows",
            "size_px": _PREPROCESSING + "128 x 256 x 256, padded or cropped",
            "mean": _PREPROCESSING + "apply_normalization false",
            "sd": _PREPROCESSING + "apply_normalization false",
            "interpolation": "none: the grid has the spacing",
            "antialias": "none: the grid has the spacing",
            "native_windows_hu": "rad-vision-engine, CT windows; the last is minimum to maximum",
            "grid": "256 mm across and 1.25 mm slices as in scripts/demo.py (0.5 mm, 512 px), at "
            "the 256 px of rve_brain_ct.yaml; the spacing in training could not be confirmed",
            "own_window": "rad-vision-engine, CT windows: minimum to maximum is the last of eleven",
            "pad_hu": _PREPROCESSING + "pad_value -1",
            "lora_targets": "none listed: no adapter of this tower is published",
        },
        unit="volume",
        skeleton=partial(_build, INFERRED),
        channels=INFERRED.channels,
        size_px=INFERRED.image,
        native_windows_hu=WINDOWS_HU,
        own_preprocessing=True,
        own_window=True,
        grid=Grid(in_plane_mm=1.0, slice_mm=1.25, size_px=256, max_slices=128),
        pad_hu=-1.0,
        batch_size=2,
    ),
)
