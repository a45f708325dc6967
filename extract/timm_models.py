"""`timm:<name>`: any image model of timm, with timm's own weights or a local checkpoint.

Size, mean, sd and interpolation are those of timm's data config, or of the `config.json` that timm
writes beside weights (`save_for_hf`), which `hf:` models in timm's layout are read from too; its
centre crop is not taken, because it would cut the head off. timm's filter of checkpoint names is
used, its habit of loading what fits is not: the classifier is dropped, every other tensor must be
there, and one of another image or patch size is not resampled.

Tokens are those of `ctfm.extract.timm_tokens`.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctfm.extract.backbone import (
    Asked,
    BackboneEntry,
    Loaded,
    interpolation_of,
    one_line,
    one_source,
)
from ctfm.extract.network_part import Signature
from ctfm.extract.timm_tokens import TimmTokens
from ctfm.extract.weights import digest_tensors, read_network
from ctfm.store.errors import BackboneError

PREFIX = "timm:"

_FACTS = (
    *("input_size", "fixed_input_size", "interpolation", "mean", "std"),
    *("classifier", "first_conv", "pool_size", "license"),
)
"""What is taken of a `pretrained_cfg` beside weights: facts, and no place to load from."""

_INTERPOLATES = ("upsample", "grid_sampler", "bucketize", "searchsorted")
"""Parts of the names of the operations of torch with which timm 1.0.31 resamples patches, positions
and tables of relative positions (`timm.layers`: patch_embed, pos_embed, pos_embed_rel)."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What timm has to be told to build a model."""

    name: str
    """`<architecture>` or `<architecture>.<tag>`, as timm lists them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What differs from timm's own `pretrained_cfg`."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the network."""


def is_timm_config(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is in timm's layout, or that of transformers' wrapper of timm."""
    wrapper = config.get("model_type", "timm_wrapper") == "timm_wrapper"
    return wrapper and "architecture" in config


def timm_entry(asked: Asked) -> BackboneEntry:
    """The facts about a timm model, asked of timm itself and of what lies beside its weights.

    Nothing is loaded.

    Args:
        asked: `timm:<model>` or `timm:<model>.<tag>`; if weights are a folder with timm's
            `config.json`, the facts are those that stand there.

    Raises:
        BackboneError: If timm has no such model, or the folder is of another one.
    """
    name = asked.name.removeprefix(PREFIX)
    described = None if asked.weights is None else _of_folder(asked.weights)
    if described is not None and described.name != name.partition(".")[0]:
        raise BackboneError(
            f"{asked.weights} is of timm's {described.name}, and not of {name}: pass "
            f"`--model {PREFIX}{described.name}`"
        )
    return _entry(asked.name, _Model(name=name) if described is None else described)


def folder_entry(name: str, folder: Path) -> BackboneEntry:
    """The facts about a model in a folder of timm's layout, whatever it is called.

    Raises:
        BackboneError: If timm has no such model.
    """
    described = _of_folder(folder)
    if described is None:
        raise BackboneError(
            f"{folder / 'config.json'} has no whole pretrained_cfg: how images have to be sized "
            f"and normalised for it is not known. Pass `--model {PREFIX}NAME --weights FILE` if "
            "timm's own facts about a model of that name hold"
        )
    return _entry(name, described)


def _of_folder(folder: Path) -> _Model | None:
    """What timm's `config.json` of a folder says; None without one."""
    try:
        said = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        own = dict(said.get("pretrained_cfg") or said)  # an older form is all in one
        args = dict(said.get("model_args") or {})
    except (OSError, ValueError, TypeError):
        return None
    if not is_timm_config(said) or not own.keys() >= {"input_size", "mean", "std"}:
        return None
    facts = {key: _as_tuple(own[key]) for key in _FACTS if own.get(key) is not None}
    if "model_type" not in said:  # transformers' wrapper builds what timm lists, whatever this says
        facts.setdefault("fixed_input_size", False)
    else:
        facts.pop("fixed_input_size", None)
    args = {key: _as_tuple(value) for key, value in args.items() if _is_of_network(key, value)}
    return _Model(name=str(said["architecture"]), facts=facts, args=args)


def _is_of_network(name: str, value: Any) -> bool:
    """Whether an argument that was saved shapes the network, and does not say what to load."""
    import timm

    of_factory = {"num_classes", *inspect.signature(timm.create_model).parameters}
    return value is not None and name not in of_factory and not name.startswith("pretrained")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _entry(name: str, about: _Model) -> BackboneEntry:
    from timm.data import resolve_model_data_config

    with torch.device("meta"):
        model = TimmTokens(_create(about)).eval()
    config = model.model.pretrained_cfg
    data = resolve_model_data_config(model.model)
    channels, *size_px = data["input_size"]
    if "img_size" in about.args:
        size_px = _pair(about.args["img_size"])
    return BackboneEntry(
        name=name,
        architecture=type(model.model).__name__,
        hub_id=config.get("hf_hub_id"),
        revision=None,
        licence=config.get("license") or "not stated",
        gated=False,
        tokens=_trial(model, (channels, *size_px)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        load=partial(load_timm, about=about),
        sources=one_source("timm: pretrained_cfg and data config of the model"),
        channels=channels,
        size_px=(int(size_px[0]), int(size_px[1])),
        mean=_of_channels(data["mean"], channels=channels),
        sd=_of_channels(data["std"], channels=channels),
        interpolation=interpolation_of(data["interpolation"], source="timm's data config"),
        foreign=True,
    )


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _of_channels(said: Sequence[float], *, channels: int) -> tuple[float, ...]:
    values = tuple(said)
    if len(set(values)) == 1:
        values = values[:1] * channels
    if len(values) != channels:
        raise BackboneError(
            f"the pretrained_cfg normalises {len(values)} channels, and the model takes {channels}:"
            " write a mean and a std of each into config.json of a local copy"
        )
    return tuple(map(float, values))


def _trial(model: TimmTokens, shape: tuple[int, ...]) -> dict[str, int]:
    """Width of each token, from an image without numbers."""
    try:
        with torch.inference_mode():
            tokens = model(torch.empty(1, *shape, device="meta"))
    except Exception as error:  # what a network makes of an image is up to its author
        raise BackboneError(
            f"timm's {type(model.model).__name__} does not give one sequence or map of an image of "
            f"{shape} pixels ({type(error).__name__}: {one_line(error)}): name another model, or "
            "save what you need of it as a program (`.pt2`), and pass that as --model"
        ) from error
    return {token: int(values.shape[1]) for token, values in tokens.items()}


def load_timm(entry: BackboneEntry, weights: Path | None, *, about: _Model) -> Loaded:
    """Build a timm model and load it, completely or not at all.

    Args:
        entry: From `timm_entry`.
        weights: A checkpoint in timm's layout, with or without classifier.
        about: What to build.

    Raises:
        BackboneError: If the weights are not to be had, or do not fit exactly.
    """
    if weights is None:
        raise BackboneError(f"timm has no weights for {entry.name}: pass `--weights FILE`")
    found = read_network(weights, _signature(about), key=entry.weights_key)
    try:
        with _NoResampling():  # type: ignore[no-untyped-call]
            model = _create(about, tensors=found.tensors)
    except _ResamplingError as error:
        raise BackboneError(
            f"{weights} is of another image, patch or window size than {entry.name}"
            f"{_misshapen(about, found.tensors)}: timm would resample it. Give the checkpoint of "
            "this very model, name the model of that size, or give a folder with the config.json "
            "that timm saved it with"
        ) from error
    except BackboneError:
        raise
    except Exception as error:  # whatever timm's filter makes of strange tensors
        raise BackboneError(
            f"{weights} does not fit {entry.name}: {one_line(error)}. Give the checkpoint of this "
            "very model"
        ) from error
    digest = digest_tensors(model.state_dict())
    return Loaded(module=TimmTokens(model), digest=digest, remarks=found.remarks)


def _signature(about: _Model) -> Signature:
    """Of a model in timm's layout: its longest name, which no part of it is likely to repeat."""
    with torch.device("meta"):
        own = _create(about).state_dict()
    return Signature(mark=re.compile(re.escape(max(own, key=len))), own=frozenset(own))


class _ResamplingError(Exception):
    """Values of a checkpoint were about to be interpolated."""


class _NoResampling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to interpolate: while it is active, that raises `_ResamplingError`.

    Names do not tell what timm's filters do to a tensor: they also rename, cut off the position of
    a class token, or turn matrices, and all of that is right.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(kind in func.name() for kind in _INTERPOLATES):
            raise _ResamplingError(func.name())
        return func(*args, **(kwargs or {}))


def _misshapen(about: _Model, tensors: Mapping[str, Tensor]) -> str:
    """The first tensor whose shape is another in the model, for a message; not all keep a name."""
    with torch.device("meta"):
        expected = _create(about).state_dict()
    for name in tensors.keys() & expected.keys():
        there, here = tuple(tensors[name].shape), tuple(expected[name].shape)
        if there != here:
            return f" ({name} is {there} there, {here} here)"
    return ""


def _create(about: _Model, *, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """A timm model without classifier: random, or with `tensors` loaded strictly."""
    import timm

    if not timm.is_model(about.name):
        near = get_close_matches(about.name, timm.list_models(pretrained=True), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise BackboneError(f"timm has no model {about.name!r}: {hint}")
    overlay = dict(about.facts)
    if tensors is not None:
        config = timm.get_pretrained_cfg(about.name)
        known = None if config is None else config.classifier
        classifiers = overlay.get("classifier", known) or ()
        names = (classifiers,) if isinstance(classifiers, str) else classifiers
        heads = {f"{head}.{part}" for head in names for part in ("weight", "bias")}
        tower = {key: tensor for key, tensor in tensors.items() if key not in heads}
        # timm loads strictly only if both sides agree on the number of classes: none.
        overlay |= {"state_dict": tower, "num_classes": 0, "custom_load": False, "source": ""}
    model = timm.create_model(
        about.name,
        pretrained=tensors is not None,
        num_classes=0,
        pretrained_cfg_overlay=overlay,
        **about.args,
    )
    model.pretrained_cfg.pop("state_dict", None)
    return model
