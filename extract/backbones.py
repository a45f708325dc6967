"""The registry: from a backbone's name to its facts, or to itself with its weights loaded.

Adding a backbone is one file with `ENTRIES`, and one line below. A family (`timm:`, `hf:`) makes
the entry of any of its models when it is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from ctfm.extract import (
    davit,
    deepcntd,
    dinov3,
    hf_models,
    intensity,
    pillar0,
    siglip,
    timm_models,
)
from ctfm.extract.backbone import Backbone, BackboneEntry, load_backbone
from ctfm.extract.weights import cached_folder
from ctfm.store.errors import BackboneError

_ENTRIES: tuple[BackboneEntry, ...] = (
    *intensity.ENTRIES,
    *dinov3.ENTRIES,
    *siglip.ENTRIES,
    *davit.ENTRIES,
    *pillar0.ENTRIES,
    *deepcntd.ENTRIES,
)

BACKBONES: dict[str, BackboneEntry] = {entry.name: entry for entry in _ENTRIES}

FAMILIES: dict[str, Callable[[str, Path | None], BackboneEntry]] = {
    timm_models.PREFIX: timm_models.timm_entry,
    hf_models.PREFIX: hf_models.hf_entry,
}


Weights = Literal["built in", "cached", "not downloaded", "not published"]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One line of `ctfm models`."""

    entry: BackboneEntry
    weights: Weights


def get_entry(name: str, weights: str | Path | None = None) -> BackboneEntry:
    """The facts about a backbone.

    Args:
        name: A name of `BACKBONES`, `timm:<name>` or `hf:<repository or folder>`.
        weights: What will be loaded; a family may read its config from there.

    Raises:
        BackboneError: If there is no such backbone; the message offers near names.
    """
    for prefix, entry_of in FAMILIES.items():
        if name.startswith(prefix):
            return entry_of(name, None if weights is None else Path(weights))
    if name not in BACKBONES:
        near = get_close_matches(name, BACKBONES, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`ctfm models` lists them"
        families = " and ".join(f"`{prefix}NAME`" for prefix in FAMILIES)
        raise BackboneError(f"no backbone is named {name!r}: {hint} ({families} work too)")
    return BACKBONES[name]


def get_backbone(
    name: str, weights: str | Path | None = None, *, tokens: Sequence[str] | None = None
) -> Backbone:
    """Load a backbone by its name, completely or not at all, on the CPU in float32.

    Args:
        name: A name of `BACKBONES`, `timm:<name>` or `hf:<repository or folder>`.
        weights: A safetensors file, or a folder with one checkpoint; None takes the hub cache,
            else the hub.
        tokens: Which tokens it is to give; None is all it has.

    Raises:
        BackboneError: If there is no such backbone or token, or the weights do not load.
    """
    return load_backbone(get_entry(name, weights), weights, tokens=tokens)


def list_backbones() -> list[Listed]:
    """Every registered backbone, and whether its weights are on this machine; no network."""
    return [Listed(entry=entry, weights=_weights_of(entry)) for entry in BACKBONES.values()]


def _weights_of(entry: BackboneEntry) -> Weights:
    if entry.hub_id is None:
        return "built in" if entry.parameters == 0 else "not published"
    cached = cached_folder(entry.hub_id, revision=entry.revision, files=entry.files)
    return "not downloaded" if cached is None else "cached"
