"""`openclip:<name>`: the image tower of any model that open_clip describes, to its embedding.

A name is `<architecture>.<tag>` of open_clip's own list (`ViT-B-32.laion2b_s34b_b79k`), an
architecture alone for weights of one's own, or a repository of the hub, or a folder, with an
`open_clip_config.json`. Only the image tower is built and read: the text tower of many models
would have to be downloaded to be thrown away. Its tensors must be complete.

Size, mean, sd and interpolation are those of the model's configuration; where it crops the middle
of an image, the whole image is resized, because a crop would cut the head off.

Token: `cls`, the image embedding in the space that the towers share, not scaled to length one.

Axes: s slices, m channels, y rows, x columns, d embedding.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.backbone import Asked, BackboneEntry, interpolation_of, one_source
from ctfm.extract.hub import hub_folder
from ctfm.extract.network_part import Signature
from ctfm.extract.tower import Tower
from ctfm.extract.weights import Found, read_network
from ctfm.store.errors import BackboneError, some

PREFIX = "openclip:"
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAMES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
)
"""Best first, as open_clip 3.3 takes them (factory.py); beside them a repository may have the same
weights in transformers' layout."""
FILES = (CONFIG_NAME, WEIGHTS_NAMES[0])
SIGNATURE = Signature(mark=re.compile(".+"), belongs=re.compile(r"visual\."))

_DEFAULTS: Mapping[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
}
"""Of open_clip 3.3 (constants.py, transform.py: those of OpenAI's CLIP)."""


class OpenClipTokens(nn.Module):
    """Pixels to tokens.

    Args:
        visual: An image tower of open_clip.
    """

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual: Any = visual

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s d"]]:
        """The image embedding."""
        return {"cls": self.visual(pixels)}


def openclip_entry(asked: Asked) -> BackboneEntry:
    """The facts about a model, from open_clip's list or the model's own configuration.

    Raises:
        BackboneError: If open_clip is not installed or knows no such model, or the configuration
            is not to be had.
    """
    _library()
    about = _about(asked)
    skeleton = partial(_skeleton, about.config)
    module = skeleton()
    size = module.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    preprocessing = {**_DEFAULTS, **about.preprocessing}
    return BackboneEntry(
        name=asked.name,
        architecture="image tower of open_clip",
        hub_id=about.hub_id,
        revision=None,
        licence="see its model card",
        gated=False,
        tokens={"cls": int(about.config["embed_dim"])},
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        load=Tower(build=partial(build, about.config), read=read, released=_bare).load,
        skeleton=skeleton,
        sources=one_source("open_clip: configuration of the model and of its weights"),
        size_px=(int(height), int(width)),
        mean=tuple(map(float, preprocessing["mean"])),
        sd=tuple(map(float, preprocessing["std"])),
        interpolation=interpolation_of(preprocessing["interpolation"], source=CONFIG_NAME),
        files=FILES,
        foreign=True,
    )


def build(config: Mapping[str, Any]) -> OpenClipTokens:
    """The image tower of a model configuration, with random weights."""
    # create_model would make the text tower too, and fetch what that needs from the hub.
    from open_clip.model import _build_vision_tower

    vision = {**config["vision_cfg"], "output_tokens": False, "timm_model_pretrained": False}
    visual = _build_vision_tower(
        config["embed_dim"], vision, quick_gelu=bool(config.get("quick_gelu"))
    )
    return OpenClipTokens(visual)


def _skeleton(config: Mapping[str, Any]) -> OpenClipTokens:
    with torch.device("meta"):
        return build(config)


def read(weights: Path, key: str | None = None) -> Found:
    """The image tower of a checkpoint of open_clip."""
    named = [weights / name for name in WEIGHTS_NAMES if (weights / name).is_file()]
    return read_network(named[0] if named else weights, SIGNATURE, key=key)


def _bare(name: str) -> str:
    return name.removeprefix("visual.")


@dataclass(frozen=True, kw_only=True)
class _About:
    """What is known of a model before its weights."""

    config: Mapping[str, Any]
    """`model_cfg` of open_clip."""
    preprocessing: Mapping[str, Any]
    """What differs from open_clip's defaults."""
    hub_id: str | None


def _about(asked: Asked) -> _About:
    name = asked.name.removeprefix(PREFIX)
    if asked.weights is not None and (asked.weights / CONFIG_NAME).is_file():
        return _of_folder(asked.weights, hub_id=None)
    if "/" in name:
        folder = hub_folder(
            name, revision=None, gated=False, files=(CONFIG_NAME,), download=asked.download
        )
        return _of_folder(folder, hub_id=name)
    return _of_list(name)


def _of_folder(folder: Path, *, hub_id: str | None) -> _About:
    try:
        said = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        preprocessing = said.get("preprocess_cfg", {})
        return _About(config=said["model_cfg"], preprocessing=preprocessing, hub_id=hub_id)
    except (ValueError, LookupError, AttributeError) as error:
        raise BackboneError(f"{folder / CONFIG_NAME} has no model_cfg: {error}") from error


def _of_list(name: str) -> _About:
    """Of an architecture, and of a tag of it, as open_clip lists them."""
    import open_clip

    architecture, _, tag = name.partition(".")
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise _unknown("architecture", architecture, open_clip.list_models())
    if not tag:
        return _About(config=config, preprocessing={}, hub_id=None)
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in known:
        raise _unknown(f"tag of {architecture}", tag, known)
    facts = open_clip.get_pretrained_cfg(architecture, tag)
    quick = bool(facts.get("quick_gelu", config.get("quick_gelu")))
    return _About(
        config={**config, "quick_gelu": quick},
        preprocessing=facts,
        hub_id="/".join(facts["hf_hub"].split("/")[:2]) if facts.get("hf_hub") else None,
    )


def _unknown(what: str, name: str, known: Sequence[str]) -> BackboneError:
    near = get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {some(known)}"
    return BackboneError(f"open_clip has no {what} {name!r}: {hint}")


def _library() -> None:
    try:
        import_module("open_clip")
    except ImportError as error:
        raise BackboneError(f"`{PREFIX}` needs open_clip: pip install 'ctfm[openclip]'") from error
