"""Names of an adapter's modules, to the modules of a backbone that they change.

A name says where a module was in what was trained, which may have been the backbone, a classifier
around it (`vit.`, `backbone.`), or a model of image and text (`vision_tower.`, `language_model.`).
What stands before the backbone's own names is cut off, if it is the same for all. Left out are
modules that its tokens do not depend on: whatever lies outside a vision tower that is called one,
text towers and decoders, and a classifier. Everything else must be found.

transformers 5 renamed the projections of ViT, DeiT, BEiT, DINOv2, Swin and their like; both
generations of names are understood, on both sides.

Source: transformers 5.23, conversion_mapping.py; names of models as transformers 4.57 saves them.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ctfm.extract.backbone import Backbone
from ctfm.store.errors import BackboneError, some

Changeable = nn.Linear | nn.Conv2d

_VISION = re.compile(
    r"(?:^|\.)(?:vision_model|vision_tower|visual|image_encoder|vision_encoder|vision)\."
)
_OTHER = re.compile(
    r"(?:^|\.)(?:text\w*|language_model|lang_encoder|llm|lm_head|bert|decoder|\w+_decoder"
    r"|multi_modal_projector|(?:text|visual)_projection)(?:\.|$)"
)
"""What has no part in the embedding of an image alone."""
_HEAD = re.compile(
    r"(?:.*\.)?(?:classifier|heads?|fc|linear|score|probe|\w+_head)(?:\.(?:\d+|fc))?"
)
"""The whole name of a classifier's layer."""
_OUTER = re.compile(r"^(?:(?:model|vision_model|vision_tower|image_encoder|visual)\.)+")

_SINCE_5 = (
    (r"\.attention\.(?:attention|self)\.query$", ".attention.q_proj"),
    (r"\.attention\.(?:attention|self)\.key$", ".attention.k_proj"),
    (r"\.attention\.(?:attention|self)\.value$", ".attention.v_proj"),
    (r"\.attention\.output\.dense$", ".attention.o_proj"),
    (r"\.intermediate\.dense$", ".mlp.fc1"),
    (r"(?<!\.attention)\.output\.dense$", ".mlp.fc2"),
)
"""From the names of transformers 4 to those of 5."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What the modules of an adapter are in a backbone."""

    modules: Mapping[str, Changeable]
    """By the adapter's names."""

    remarks: tuple[str, ...]
    """What was cut off or left out, for the user."""


def place(names: Collection[str], backbone: Backbone, *, source: object) -> Placed:
    """Find the modules that an adapter changes.

    Args:
        names: Of its modules, without `base_model.model.`.
        backbone: What it is to be merged into.
        source: What the user gave, for the message.

    Raises:
        BackboneError: If it has none, one of them is not found, or they could be several.
    """
    modules = modules_of(backbone)
    inside = [n for n in names if not _is_outside(n, names=names, modules=modules)]
    outside = sorted(set(names) - set(inside))
    if not inside:
        raise BackboneError(
            f"{source} changes nothing of an image's embedding: it was made for {some(outside)}. "
            "Train it on the image tower"
        )
    found = {name: _find(name, modules) for name in inside}
    if lost := sorted(name for name, one in found.items() if one is None):
        raise BackboneError(_lost_message(lost, inside, backbone, source=source))
    placed = {name: one for name, one in found.items() if one is not None}
    starts = sorted({start for start, _ in placed.values()})
    if len(starts) > 1:
        raise BackboneError(
            f"{source} changes this network in several places ({some(starts)}): keep the pairs of "
            "the one that is meant"
        )
    _refuse_twice(placed, source=source)
    remarks = (
        *((f"cut off the adapter's names: {starts[0]}",) if starts[0] else ()),
        *((f"left out of the adapter: {some(outside)}",) if outside else ()),
    )
    return Placed(modules={n: modules[key] for n, (_, key) in placed.items()}, remarks=remarks)


def all_outside(tensors: Collection[str], listed: Collection[str], backbone: Backbone) -> bool:
    """Whether whole tensors that came with an adapter have no part in what the backbone gives.

    Args:
        tensors: Their names, without `base_model.model.`.
        listed: `modules_to_save` of its configuration.
        backbone: What the adapter is to be merged into.
    """
    modules = modules_of(backbone)
    own = {_OUTER.sub("", name.partition(".")[2]) for name in backbone.module.state_dict()}
    own |= {_OUTER.sub("", backbone.entry.released(name)) for name in backbone.module.state_dict()}
    known = [name for name in listed if any(name in one.split(".") for one in tensors)]
    if not all(_HEAD.fullmatch(name) or name in known for name in listed):
        return False
    return all(
        _is_outside(name.rpartition(".")[0], names=tensors, modules=modules)
        and not any(name == one or name.endswith(f".{one}") for one in own)
        for name in tensors
    )


def _is_outside(name: str, *, names: Iterable[str], modules: Mapping[str, Changeable]) -> bool:
    """Whether a module has certainly no part in what the backbone gives."""
    if any(map(_VISION.search, names)):
        return not _VISION.search(name)
    if _OTHER.search(name):
        return True
    return _HEAD.fullmatch(name) is not None and _find(name, modules) is None


def _find(name: str, modules: Mapping[str, Changeable]) -> tuple[str, str] | None:
    """What stands before a module's name, and the name in the backbone's table."""
    for alias in aliases(_OUTER.sub("", name)):
        parts = alias.split(".")
        for count in range(len(parts)):
            key = ".".join(parts[count:])
            start = "".join(f"{part}." for part in parts[:count])
            if key in modules and not _is_other_encoder(start, key):
                return _OUTER.sub("", start), key
    return None


def _is_other_encoder(start: str, key: str) -> bool:
    """`encoder.layer.N` is how DINOv2 names its blocks: not DINOv3's `layer.N` in an encoder."""
    return start.endswith("encoder.") and key.startswith("layer.")


def modules_of(backbone: Backbone) -> dict[str, Changeable]:
    """What an adapter may change, under every name that it may have for it."""
    found: dict[str, Changeable] = {}
    twice: set[str] = set()
    for name, module in backbone.module.named_modules():
        if not isinstance(module, Changeable):
            continue
        released = backbone.entry.released(f"{name}.weight").removesuffix(".weight")
        for own in {_OUTER.sub("", name), _OUTER.sub("", released)}:
            for alias in aliases(own):
                if found.setdefault(alias, module) is not module:
                    twice.add(alias)
    return {name: module for name, module in found.items() if name not in twice}


def aliases(name: str) -> list[str]:
    """A module's name, and what other generations of transformers call it."""
    newer = name
    for old, new in _SINCE_5:
        newer = re.sub(old, new, newer)
    if newer == name:
        return [name]
    # ViT and its like lost `encoder.` and the number of the noun as well, DINOv2 did not.
    return [name, newer, re.sub(r"\bencoder\.layer\.(\d+)\.", r"layers.\1.", newer)]


def _refuse_twice(placed: Mapping[str, tuple[str, str]], *, source: object) -> None:
    keys = [key for _, key in placed.values()]
    twice = sorted(name for name, (_, key) in placed.items() if keys.count(key) > 1)
    if twice:
        raise BackboneError(
            f"{source} changes one module by {some(twice)}: keep the pairs of the one that is meant"
        )


def _lost_message(
    lost: Collection[str], names: Collection[str], backbone: Backbone, *, source: object
) -> str:
    modules = modules_of(backbone)
    theirs, ours = layout_of(names), layout_of(modules)
    has = f"{backbone.name}, which has {ours} ({some(sorted(lost))}; there are {some(modules)})"
    fact = (
        f"{source} was made for {theirs}: {len(lost)} of its {len(names)} modules are not in {has}"
    )
    if theirs != ours:
        return f"{fact}. Train it on this layout, or load the backbone in the other one"
    if len(lost) < len(names):
        return f"{fact}. It was trained on more than this network, or on one with more layers"
    return f"{fact}. It was trained on another network of this library"


_LAYOUTS = (
    (r"_attn\.fn\.(?:qkv|proj)\b", "the names of the released MedImageInsight"),
    (r"_attn\.(?:qkv|proj)\b", "DaViT's names in transformers (window_attn.qkv)"),
    (r"\bblocks\.\d+\.attn\.(?:qkv|proj)\b", "timm's names (blocks.N.attn.qkv)"),
    (r"\bresblocks\.\d+\.", "open_clip's names (resblocks.N)"),
    (r"\battention\.(?:attention|self)\.query\b", "names of transformers 4 (attention.query)"),
    (r"\b(?:q|query)(?:_proj)?\b", "transformers' names (q_proj, k_proj, v_proj)"),
)


def layout_of(names: Iterable[str]) -> str:
    """Which library names modules like these, for a message."""
    text = " ".join(names)
    found = (layout for pattern, layout in _LAYOUTS if re.search(pattern, text))
    return next(found, "names of another kind")
