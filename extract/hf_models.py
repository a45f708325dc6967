"""`hf:<repository or folder>`: any vision model that transformers' `AutoModel` builds.

Code from a repository runs only if the user says that it may (`--trust-remote-code`); its digest is
then in the store's settings. A model that needs it is refused otherwise. Of a model with an image
and a text tower (CLIP, SigLIP) the image tower is kept, after the whole was loaded. The weights
must be complete; a classifier that is left over is the only tensor that may be.

Size, mean, sd and interpolation are those of the repository's image processor; its centre crop
becomes a resize, because a crop would cut the head off.

Tokens, all after the final norm: `cls` is the first token of a model that has one more than a
square of patch tokens, else what its pooling gives, else the mean; `mean` is that of the patch
tokens or places; `pooler` is the output of the pooling layer, if the checkpoint has one.

Axes: s slices, m channels, y rows, x columns, n tokens, d embedding.
"""

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.backbone import (
    IMAGENET_MEAN,
    IMAGENET_SD,
    Asked,
    BackboneEntry,
    Loaded,
    one_source,
)
from ctfm.extract.checkpoints import kind_of
from ctfm.extract.hub import WANTED, hub_folder
from ctfm.extract.weights import digest_tensors, read_names, read_tensors, weight_files
from ctfm.store.errors import BackboneError, some
from ctfm.store.provenance import digest, file_sha256

PREFIX = "hf:"
_PIL_FILTERS = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
"""Numbers of `PIL.Image.Resampling`, which image processors write; bilinear and bicubic apart."""


class HfTokens(nn.Module):
    """Pixels to tokens.

    Args:
        model: A transformers vision model, or one with a `vision_model`.
        norm_is_due: Whether the last hidden state still lacks the norm, as `norm_is_due` tells.
    """

    def __init__(self, model: Any, *, norm_is_due: bool = False) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)
        self.norm_is_due = norm_is_due

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s _"]]:
        """Every token that the outputs allow."""
        output = self.model(pixel_values=pixels)
        hidden = output.last_hidden_state
        if self.norm_is_due:
            hidden = self.model.post_layernorm(hidden)
        if hidden.ndim == 4:  # a map of places, of any shape, and nothing else
            hidden, prefix = hidden.flatten(2).transpose(1, 2), 0
        else:
            prefix = hidden.shape[1] - math.isqrt(hidden.shape[1]) ** 2
        tokens = {"mean": hidden[:, prefix:].mean(dim=1)}
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            tokens["pooler"] = pooled.flatten(1)
        own = hidden[:, 0] if prefix else tokens.get("pooler", tokens["mean"])
        return {"cls": own, **tokens}


def norm_is_due(model: Any, pixels: Float[Tensor, "s m y x"]) -> bool:
    """Whether a model gives its tokens before the final norm, as CLIP does, which pools first.

    Args:
        model: Of transformers.
        pixels: What it takes; both may be on the meta device.
    """
    norm = getattr(model, "post_layernorm", None)
    if norm is None:
        return False
    axes: list[int] = []
    with norm.register_forward_hook(lambda module, given, normed: axes.append(normed.ndim)):
        model(pixel_values=pixels)
    return axes == [2]


def hf_entry(asked: Asked) -> BackboneEntry:
    """The facts about a transformers model, from its config files; no weights are loaded.

    Args:
        asked: `hf:<organisation>/<name>`; weights are a folder to read in place of it.

    Raises:
        BackboneError: If it is not to be had, or transformers alone cannot build it.
    """
    repository = asked.name.removeprefix(PREFIX)
    source = _Source.find(asked)
    with torch.device("meta"):
        model = HfTokens(_from_config(source)).eval()
    size_px, mean, sd, interpolation = _processor(source.folder, model.model.config)
    with torch.inference_mode():
        pixels = torch.empty(1, len(mean), *size_px, device="meta")
        model.norm_is_due = norm_is_due(model.model, pixels)
        tokens = model(pixels)
    return BackboneEntry(
        name=asked.name,
        architecture=type(model.model).__name__,
        hub_id=repository if "/" in repository else None,
        revision=None,
        licence="see its model card",
        gated=False,
        tokens={token: values.shape[1] for token, values in tokens.items()},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        load=partial(load_hf, source=source, norm_is_due=model.norm_is_due),
        sources=one_source("config.json and preprocessor_config.json of the model"),
        channels=len(mean),
        size_px=size_px,
        mean=mean,
        sd=sd,
        interpolation=interpolation,
        takes_key=False,
        remote_code=source.code,
    )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a model is, and whether its own code runs."""

    folder: Path
    code: str | None
    """SHA-256 of the code that runs; None if none does."""
    brings_code: bool
    """Whether the repository has code of its own."""

    @classmethod
    def find(cls, asked: Asked) -> "_Source":
        """The folder of a model, from the user, the cache or the hub.

        Raises:
            BackboneError: If it is not to be had, is no transformers model, or runs code of yet
                another repository.
        """
        repository = asked.name.removeprefix(PREFIX)
        folder = asked.weights
        if folder is None:
            folder = hub_folder(repository, revision=None, gated=False)
        if not (folder / "config.json").is_file():
            raise BackboneError(f"no config.json in {folder}: not a transformers model")
        own = _auto_map(folder / "config.json")
        if own and asked.trust_remote_code and asked.weights is None:
            folder = hub_folder(repository, revision=None, gated=False, files=(*WANTED, "*.py"))
        runs = bool(own) and asked.trust_remote_code
        code = _digest_code(folder, own) if runs else None
        return cls(folder=folder, code=code, brings_code=bool(own))


def _auto_map(config: Path) -> dict[str, Any]:
    """Which classes a model brings itself."""
    try:
        return dict(json.loads(config.read_text()).get("auto_map") or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise BackboneError(f"{config} is no configuration of transformers: {error}") from error


def _digest_code(folder: Path, auto_map: Mapping[str, Any]) -> str:
    elsewhere = [str(place) for place in auto_map.values() if "--" in str(place)]
    if elsewhere:
        raise BackboneError(
            f"{folder} runs code of another repository ({elsewhere[0]}), which is not pinned by "
            "this one: copy it beside the config, and name it there without the `--`"
        )
    files = sorted(folder.rglob("*.py"))
    return digest({str(file.relative_to(folder)): file_sha256(file) for file in files})


def load_hf(
    entry: BackboneEntry, weights: Path | None, *, source: _Source, norm_is_due: bool
) -> Loaded:
    """Load a transformers model, completely or not at all.

    Raises:
        BackboneError: If the weights are not to be had, or do not fit exactly.
    """
    del weights  # found with the entry
    from transformers import AutoModel

    files = weight_files(source.folder)
    pickled = any(kind_of(file) == "torch.save" for file in files)
    if pickled:
        read_tensors(files)  # refused here if they hold anything else, and not read by transformers
    with _as_backbone_error(source), _quiet():
        model, info = AutoModel.from_pretrained(
            source.folder,
            dtype=torch.float32,
            use_safetensors=not pickled,
            ignore_mismatched_sizes=True,  # to name them, below
            output_loading_info=True,
            **_trust(source),
            **_options(source),
        )
    faults = {
        "missing": set(info["missing_keys"]),
        "unexpected": {n for n in info["unexpected_keys"] if not n.startswith("classifier.")},
        "of another shape": {n if isinstance(n, str) else n[0] for n in info["mismatched_keys"]},
    }
    said = [
        f"{len(names)} {what} ({some(sorted(names))})" for what, names in faults.items() if names
    ]
    if said:
        raise BackboneError(f"{source.folder} does not fit its config.json: {'; '.join(said)}")
    module = HfTokens(model, norm_is_due=norm_is_due)
    return Loaded(module=module, digest=digest_tensors(module.model.state_dict()), entry=entry)


def _trust(source: _Source) -> dict[str, bool]:
    return {"trust_remote_code": source.code is not None, "local_files_only": True}


def _from_config(source: _Source) -> Any:
    from transformers import AutoConfig, AutoModel

    with _as_backbone_error(source), _quiet():
        config = AutoConfig.from_pretrained(source.folder, **_trust(source))
        options = _options(source)
        return AutoModel.from_config(config, trust_remote_code=source.code is not None, **options)


def _options(source: _Source) -> dict[str, bool]:
    """No pooling layer where the class can do without one and the checkpoint has none."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = AutoConfig.from_pretrained(source.folder, **_trust(source))
    if type(config) not in MODEL_MAPPING:
        return {}
    model_class = MODEL_MAPPING[type(config)]
    can_do_without = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    has_none = not any("pooler." in name for name in read_names(weight_files(source.folder)))
    return {"add_pooling_layer": False} if can_do_without and has_none else {}


def _processor(
    folder: Path, config: Any
) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...], Literal["bilinear", "bicubic"]]:
    """Size, mean, sd and interpolation, from the image processor's file or the config."""
    said: dict[str, Any] = {}
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if file.is_file():
            values = json.loads(file.read_text())
            said |= values.get("image_processor", values)
    size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
    mean, sd = _normalisation(said, channels=int(getattr(config, "num_channels", 3)))
    size_px = _size_px(size or getattr(config, "image_size", 224))
    return size_px, mean, sd, _interpolation(said.get("resample", 2))


def _normalisation(
    said: Mapping[str, Any], *, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and sd of channels in 0..1 that do what the processor does to bytes.

    EfficientNet's divides by its sd twice where its classifier is meant to follow (`include_top`).
    """
    plain = (0.0,) * channels, (1.0,) * channels
    usual = (IMAGENET_MEAN, IMAGENET_SD) if channels == 3 else plain
    own_mean, own_sd = (
        _of_channels(said.get(key), usual=fallback, channels=channels)
        for key, fallback in zip(("image_mean", "image_std"), usual, strict=True)
    )
    mean, sd = plain if said.get("do_normalize") is False else (own_mean, own_sd)
    if said.get("include_top"):
        sd = tuple(s * own for s, own in zip(sd, own_sd, strict=True))
    rescaled = said.get("do_rescale") is not False
    scale = 255 * float(said.get("rescale_factor") or 1 / 255) if rescaled else 255.0
    offset = 1.0 if rescaled and said.get("rescale_offset") else 0.0
    if abs(scale - 1) < 1e-6 and not offset:
        return mean, sd  # to the bit
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in sd)


def _of_channels(
    value: float | Sequence[float] | None, *, usual: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """A value a channel; one for all, or none, may be written."""
    if value is None:
        return usual
    values = (value,) * channels if isinstance(value, int | float) else value
    return tuple(map(float, values))


def _interpolation(resample: int) -> Literal["bilinear", "bicubic"]:
    usable: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
    if resample in usable:
        return usable[resample]
    name = _PIL_FILTERS.get(resample, str(resample))
    raise BackboneError(
        f"the image processor resizes by {name} (resample: {resample}), and slices are resized by "
        "bilinear (2) or bicubic (3) interpolation: write one of these into "
        "preprocessor_config.json of a local copy, and pass its folder, if that will do"
    )


def _size_px(size: Any) -> tuple[int, int]:
    """(y, x) from the forms that image processors use: a number, a pair, named edges."""
    if isinstance(size, int):
        return size, size
    if not isinstance(size, dict):
        height, width = size
        return int(height), int(width)
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    if "height" not in size:
        raise BackboneError(f"the image processor's size is {size}: only a fixed size will do")
    return int(size["height"]), int(size["width"])


@contextmanager
def _as_backbone_error(source: _Source) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        if source.brings_code and source.code is None:
            raise BackboneError(
                f"{source.folder} brings code of its own, and transformers cannot build it without "
                "running that: read the .py files there, and pass --trust-remote-code if they may "
                "do on this machine whatever they like"
            ) from error
        fact = " ".join(str(error).split())[:500]
        raise BackboneError(f"transformers cannot load {source.folder}: {fact}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load report and progress bar; what matters becomes an error."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
