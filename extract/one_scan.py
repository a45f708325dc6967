"""One scan, embedded as the rows of a store were: for prediction.

Everything is taken from the store's settings: preprocessing, backbone, token types. A backbone
whose weights differ from those of the store is refused, not used.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ctfm.extract.backbone import sample_positions
from ctfm.extract.index import index
from ctfm.extract.prepare import prepare
from ctfm.extract.recorded import load_recorded
from ctfm.store.errors import ConfigError


def embed_scan(
    path: Path,
    settings: Mapping[str, Any],
    *,
    token: str = "cls",
    weights: Path | None = None,
    adapter: Path | None = None,
    template: Path | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
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
        download: Whether weights that are not on this machine may be fetched from where the
            settings say that they are.
        device: A torch device.

    Returns:
        Rows in float32, rounded as the store rounds them, and the position of each in mm.

    Raises:
        ScanError: If the scan cannot be used.
        BackboneError: If the backbone is not the one of the store.
        ConfigError: If not exactly one scan is usable, or the template is missing or another.
    """
    made = load_recorded(
        settings,
        weights=weights,
        adapter=adapter,
        template=template,
        trust_remote_code=trust_remote_code,
        download=download,
    )
    config, backbone, volume = made.config, made.backbone, made.template
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
