"""One scan, embedded as the rows of a store were: for prediction.

Everything is taken from the store's settings: preprocessing, backbone, token types. A backbone
whose weights differ from those of the store is refused, not used.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ctfm.extract.backbone import sample_positions
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.index import index
from ctfm.extract.lora import merge_adapter
from ctfm.extract.pipeline import store_settings
from ctfm.extract.prepare import prepare
from ctfm.extract.reading import read_template
from ctfm.store.errors import BackboneError, ConfigError
from ctfm.store.provenance import canonical_json


def embed_scan(
    path: Path,
    settings: Mapping[str, Any],
    *,
    token: str = "cls",
    weights: Path | None = None,
    adapter: Path | None = None,
    template: Path | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> tuple[Float[Tensor, "s d"], Float32[np.ndarray, " s"]]:
    """Embed one scan exactly as a store with these settings holds it: a row a slice, or one.

    Args:
        path: A DICOM folder, a zip archive, or a volume file; exactly one scan of it is usable.
        settings: `FeatureStore.settings`, or `Run.store_settings`, which leaves out what is None.
        token: Which embedding.
        weights: Where the backbone's weights are, unless in the hub cache.
        adapter: The LoRA adapter, if the store was made with one.
        template: The volume that the scans of the store were registered to, if they were.
        trust_remote_code: Whether code of the backbone may run; settings may be someone else's.
        device: A torch device.

    Returns:
        Rows in float32, rounded as the store rounds them, and the position of each in mm.

    Raises:
        ScanError: If the scan cannot be used.
        BackboneError: If the backbone is not the one of the store.
        ConfigError: If not exactly one scan is usable, or the template is missing or another.
    """
    names = {field.name for field in fields(ExtractConfig)}
    config = ExtractConfig.from_dict({k: v for k, v in settings.items() if k in names})
    backbone = get_backbone(
        config.backbone, weights, tokens=config.tokens, trust_remote_code=trust_remote_code
    )
    if adapter is not None:
        backbone = merge_adapter(backbone, adapter)
    _check_same(settings, store_settings(config, backbone))
    volume, digest = (None, None) if template is None else read_template(template)
    if digest != config.template:
        wanted = "no template" if config.template is None else f"the template {config.template}"
        raise ConfigError(f"the store was made with {wanted}, got {digest}: pass --template")
    files = _only_scan(path)
    clean = replace(config, views=1)
    (scan,) = prepare(files, clean, scan_id="", template=volume)
    channels = backbone.to(device, config.precision).channels(
        torch.from_numpy(scan.hu), config.windows_hu
    )
    rows = backbone.embed(channels)[token]
    positions = sample_positions(backbone.entry, scan.position_mm)
    return rows.to(getattr(torch, config.dtype)).float(), positions


def _only_scan(path: Path) -> list[str]:
    found = index([path], key=None)
    usable = [line["scan_id"] for line in found.scans.to_pylist() if line["usable"]]
    if len(usable) == 1:
        return found.files[usable[0]]
    failed = [line for line in found.scans.to_pylist() if not line["usable"]]
    reasons = "; ".join(sorted({f"{line['reason']}: {line['detail']}" for line in failed}))
    why = "" if usable else f" ({reasons or 'no scan'})"
    raise ConfigError(
        f"{path} must hold exactly one usable scan, it holds {len(usable)}{why}: "
        "name the folder of one series, or one file"
    )


def _check_same(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    # As JSON holds them: tuples are lists, and 0.0 is 0. What is None was left out.
    wanted, got = (json.loads(canonical_json(settings)) for settings in (wanted, got))
    differing = [
        f"{name} is {got.get(name)!r}, of the store {wanted.get(name)!r}"
        for name in sorted(wanted.keys() | got.keys())
        if got.get(name) != wanted.get(name)
    ]
    if differing:
        raise BackboneError(
            f"the backbone is not the one that the head was fitted on: {'; '.join(differing)}. "
            "Pass the same weights with --weights, and the same LoRA adapter with --adapter"
        )
