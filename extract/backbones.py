"""The registry: from a backbone's name to its facts, or to itself with its weights loaded.

Adding a backbone is one file with `ENTRIES`, and one line below. A family (`timm:`, `hf:`,
`openclip:`) makes the entry of any of its models when it is asked for, and so does the path of a
program.
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
    openclip_models,
    pillar0,
    programs,
    siglip,
    timm_models,
)
from ctfm.extract.backbone import Asked, Backbone, BackboneEntry, load_backbone
from ctfm.extract.hub import cached_folder, hub_folder
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

EMBEDDED = frozenset(entry.name for entry in _ENTRIES if entry.parameters == 0)
"""Names of those that need no weights."""

FAMILIES: dict[str, Callable[[Asked], BackboneEntry]] = {
    timm_models.PREFIX: timm_models.timm_entry,
    hf_models.PREFIX: hf_models.hf_entry,
    openclip_models.PREFIX: openclip_models.openclip_entry,
}


Weights = Literal["built in", "cached", "not downloaded", "not published"]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One line of `ctfm models`."""

    entry: BackboneEntry
    weights: Weights


def get_entry(
    name: str,
    weights: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    download: bool = False,
) -> BackboneEntry:
    """The facts about a backbone, as what lies beside its weights states them where that does.

    Args:
        name: A name of `BACKBONES`, `timm:<name>`, `hf:<repository or folder>`,
            `openclip:<name or repository>`, or the path of a program.
        weights: What will be loaded; a family may read its config from there.
        trust_remote_code: Whether code that comes with an `hf:` model or a program may run.
        download: Whether what is not on this machine may be fetched, for the facts that stand
            beside weights; without, a registered backbone is what the registry says.

    Raises:
        BackboneError: If there is no such backbone; the message offers near names.
    """
    name, place = split_path(name)
    asked = Asked(
        name=name,
        weights=place if weights is None else Path(weights),
        trust_remote_code=trust_remote_code,
        download=download,
    )
    for prefix, entry_of in FAMILIES.items():
        if name.startswith(prefix):
            return entry_of(asked)
    if name in BACKBONES:
        return _described(BACKBONES[name], asked.weights, download=download)
    if name.endswith(programs.SUFFIXES):
        return programs.program_entry(asked)
    near = get_close_matches(name, BACKBONES, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "`ctfm models` lists them"
    families = ", ".join(f"`{prefix}NAME`" for prefix in FAMILIES)
    raise BackboneError(
        f"no backbone is named {name!r}: {hint} ({families} and the path of a "
        f"{' or '.join(programs.SUFFIXES)} file work too)"
    )


def _described(entry: BackboneEntry, weights: Path | None, *, download: bool) -> BackboneEntry:
    if entry.describe is None:
        return entry
    if weights is None and entry.hub_id is not None:
        weights = (
            hub_folder(entry.hub_id, revision=entry.revision, gated=entry.gated, files=entry.files)
            if download
            else cached_folder(entry.hub_id, revision=entry.revision, files=entry.files)
        )
    return entry if weights is None else entry.describe(entry, weights)


def split_path(model: str) -> tuple[str, Path | None]:
    """The name under which a model is recorded, and its place if it was given as a path.

    A path says where something lies on one machine; in a store, only the name it ends in is kept.
    """
    prefix = next((prefix for prefix in FAMILIES if model.startswith(prefix)), "")
    path = Path(model.removeprefix(prefix))
    if path.is_dir() if prefix else model.endswith(programs.SUFFIXES):
        return f"{prefix}{path.resolve().name}", path
    return model, None


def get_backbone(
    name: str,
    weights: str | Path | None = None,
    *,
    tokens: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    weights_key: str | None = None,
    download: bool = True,
) -> Backbone:
    """Load a backbone by its name, completely or not at all, on the CPU in float32.

    Args:
        name: As for `get_entry`.
        weights: A checkpoint's file, or a folder with one; None takes the hub cache, else the hub.
        tokens: Which tokens it is to give; None is all it has.
        trust_remote_code: Whether code that comes with an `hf:` model or a program may run.
        weights_key: Which part of a checkpoint that holds the network more than once.
        download: Whether the network may be used.

    Raises:
        ChoiceError: If a key is needed.
        BackboneError: If there is no such backbone or token, or the weights do not load.
    """
    entry = get_entry(name, weights, trust_remote_code=trust_remote_code, download=download)
    place = split_path(name)[1] if weights is None else weights
    return load_backbone(entry, place, tokens=tokens, weights_key=weights_key, download=download)


def list_backbones() -> list[Listed]:
    """Every registered backbone, and whether its weights are on this machine; no network."""
    return [Listed(entry=entry, weights=_weights_of(entry)) for entry in BACKBONES.values()]


def _weights_of(entry: BackboneEntry) -> Weights:
    if entry.hub_id is None:
        return "built in" if entry.parameters == 0 else "not published"
    cached = cached_folder(
        entry.hub_id, revision=entry.revision, files=entry.files, tower=entry.tower
    )
    return "not downloaded" if cached is None else "cached"
