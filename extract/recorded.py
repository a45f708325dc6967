"""A recorded extraction: from the settings of a store, to the backbone and template that made it.

A backbone whose weights, or a template whose digest, differ from the record are refused, not used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ctfm.extract.backbone import Backbone
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import PREPROCESSING_VERSION, ExtractConfig
from ctfm.extract.lora import merge_adapter
from ctfm.extract.pipeline import check_same_backbone, store_settings
from ctfm.extract.reading import read_template
from ctfm.extract.volume import Volume
from ctfm.store.errors import BackboneError, ChoiceError, ConfigError, some


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """What made the rows of a store."""

    config: ExtractConfig
    backbone: Backbone
    template: Volume | None


def load_recorded(
    settings: Mapping[str, Any],
    *,
    weights: Path | None = None,
    adapter: Path | None = None,
    template: Path | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
) -> Recorded:
    """Load what the settings of a store name.

    Args:
        settings: `FeatureStore.settings`, or `Run.store_settings`, which leaves out what is None.
        weights: Where the backbone's weights are, unless in the hub cache.
        adapter: The LoRA adapter, if the store was made with one.
        template: The volume that the scans of the store were registered to, if they were.
        trust_remote_code: Whether code of the backbone may run; settings may be someone else's.
        download: Whether weights that are not on this machine may be fetched from where the
            settings, which may be someone else's, say that they are.

    Raises:
        BackboneError: If the backbone is not the one of the store, or its weights are not here.
        ConfigError: If the template is missing or another, or the settings are none of ours.
    """
    config = recorded_config(settings)
    load = partial(
        get_backbone,
        config.backbone,
        weights,
        tokens=config.tokens,
        trust_remote_code=trust_remote_code,
        download=download,
    )
    backbone = _of_digest(load, settings.get("backbone_weights"))
    if adapter is not None:
        backbone = merge_adapter(backbone, adapter)
    check_same_backbone(settings, store_settings(config, backbone))
    volume, digest = (None, None) if template is None else read_template(template)
    if digest != config.template:
        wanted = "no template" if config.template is None else f"the template {config.template}"
        raise ConfigError(f"the store was made with {wanted}, got {digest}: pass --template")
    return Recorded(config=config, backbone=backbone, template=volume)


def recorded_config(settings: Mapping[str, Any]) -> ExtractConfig:
    """What the settings of a store, or of a run, say of the extraction; they are checked.

    Raises:
        ConfigError: If one is missing, of another type or out of its range, or preprocessing has
            changed since.
    """
    names = {field.name for field in fields(ExtractConfig)}
    try:
        config = ExtractConfig.from_dict({k: v for k, v in settings.items() if k in names})
    except ConfigError as error:
        raise ConfigError(
            f"the recorded settings are damaged, or of another version of ctfm: {error}"
        ) from error
    if config.preprocessing != PREPROCESSING_VERSION:
        raise ConfigError(
            f"the recorded rows were made by preprocessing {config.preprocessing}, and this ctfm "
            f"has {PREPROCESSING_VERSION}: use the ctfm that made them, or extract and fit again"
        )
    return config


def _of_digest(load: Callable[..., Backbone], digest: str | None) -> Backbone:
    """The part of a checkpoint that made the rows, where it holds several: their digest tells."""
    try:
        return load()
    except ChoiceError as error:
        parts = (load(weights_key=key) for key in error.keys)
        found = next((part for part in parts if part.digest == digest), None)
        if found is None:
            raise BackboneError(
                f"the checkpoint holds the network under {some(error.keys)}, and none of them has "
                "the digest of the store: pass the weights that it was made with"
            ) from error
        return found
