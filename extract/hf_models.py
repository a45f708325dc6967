"""`hf:<repository or folder>`: any vision model that transformers' `AutoModel` builds.

Code from a repository is never run: a model that needs it is refused. Of a model with an image
and a text tower (CLIP, SigLIP) the image tower is kept, after the whole was loaded. The weights
must be complete; a classifier that is left over is the only tensor that may be.

Size, mean, sd and interpolation are those of the repository's image processor; its centre crop
becomes a resize, because a crop would cut the head off.

Tokens: `cls` is the first token of a model that has one more than a square of patch tokens, else
what its pooling gives, else the mean; `mean` is that of the patch tokens or places; `pooler` is
the output of the pooling layer, if the checkpoint has one.

Axes: s slices, m channels, y rows, x columns, n tokens, d embedding.
"""

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctfm.extract.backbone import IMAGENET_MEAN, IMAGENET_SD, BackboneEntry, Loaded, one_source
from ctfm.extract.weights import (
    digest_tensors,
    hub_folder,
    read_names,
    some,
    weight_files,
)
from ctfm.store.errors import BackboneError

PREFIX = "hf:"
PIL_BILINEAR = 2


class HfTokens(nn.Module):
    """Pixels to tokens.

    Args:
        model: A transformers vision model, or one with a `vision_model`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)

    def forward(self, pixels: Float[Tensor, "s m y x"]) -> dict[str, Float[Tensor, "s _"]]:
        """Every token that the outputs allow."""
        output = self.model(pixel_values=pixels)
        hidden = output.last_hidden_state
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        n = hidden.shape[1]
        prefix = n - math.isqrt(n) ** 2
        tokens = {"mean": hidden[:, prefix:].mean(dim=1)}
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            tokens["pooler"] = pooled.flatten(1)
        own = hidden[:, 0] if prefix else tokens.get("pooler", tokens["mean"])
        return {"cls": own, **tokens}


def hf_entry(name: str, weights: Path | None = None) -> BackboneEntry:
    """The facts about a transformers model, from its config files; no weights are loaded.

    Args:
        name: `hf:<organisation>/<name>` or `hf:<folder>`.
        weights: A folder to read in place of the repository.

    Raises:
        BackboneError: If it is not to be had, or transformers alone cannot build it.
    """
    folder = _folder(name, weights)
    with torch.device("meta"):
        model = HfTokens(_from_config(folder)).eval()
    size_px, mean, sd, interpolation = _processor(folder, model.model.config)
    with torch.inference_mode():
        tokens = model(torch.empty(1, len(mean), *size_px, device="meta"))
    repository = name.removeprefix(PREFIX)
    return BackboneEntry(
        name=name,
        architecture=type(model.model).__name__,
        hub_id=None if Path(repository).is_dir() else repository,
        revision=None,
        licence="see its model card",
        gated=False,
        tokens={token: values.shape[1] for token, values in tokens.items()},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        load=load_hf,
        sources=one_source("config.json and preprocessor_config.json of the model"),
        channels=len(mean),
        size_px=size_px,
        mean=mean,
        sd=sd,
        interpolation=interpolation,
    )


def load_hf(entry: BackboneEntry, weights: Path | None) -> Loaded:
    """Load a transformers model, completely or not at all.

    Raises:
        BackboneError: If the weights are not to be had, or do not fit exactly.
    """
    from transformers import AutoModel

    folder = _folder(entry.name, weights)
    with _as_backbone_error(folder), _quiet():
        model, info = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # to name them, below
            output_loading_info=True,
            **_options(folder),
        )
    faults = {
        "missing": set(info["missing_keys"]),
        "unexpected": {n for n in info["unexpected_keys"] if not n.startswith("classifier.")},
        "of another shape": {n if isinstance(n, str) else n[0] for n in info["mismatched_keys"]},
    }
    said = [f"{len(names)} {what} ({some(names)})" for what, names in faults.items() if names]
    if said:
        raise BackboneError(f"{folder} does not fit its config.json: {'; '.join(said)}")
    module = HfTokens(model)
    return Loaded(module=module, digest=digest_tensors(module.model.state_dict()))


def _folder(name: str, weights: Path | None) -> Path:
    repository = name.removeprefix(PREFIX)
    folder = weights or Path(repository)
    if not folder.is_dir():
        if weights is not None:
            raise BackboneError(f"{name} needs a folder with config.json, got {weights}")
        folder = hub_folder(repository, revision=None, gated=False)
    if not (folder / "config.json").is_file():
        raise BackboneError(f"no config.json in {folder}: not a transformers model")
    return folder


def _from_config(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModel

    with _as_backbone_error(folder), _quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return AutoModel.from_config(config, trust_remote_code=False, **_options(folder))


def _options(folder: Path) -> dict[str, bool]:
    """No pooling layer where the class can do without one and the checkpoint has none."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if type(config) not in MODEL_MAPPING:
        return {}
    model_class = MODEL_MAPPING[type(config)]
    can_do_without = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    has_none = not any("pooler." in name for name in read_names(weight_files(folder)))
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
    channels = int(getattr(config, "num_channels", 3))
    default = (IMAGENET_MEAN, IMAGENET_SD) if channels == 3 else ((0.0,), (1.0,))
    mean, sd = (
        tuple(float(value) for value in said.get(key, fallback))
        for key, fallback in zip(("image_mean", "image_std"), default, strict=True)
    )
    bilinear = said.get("resample", PIL_BILINEAR) == PIL_BILINEAR
    return (
        _size_px(size or getattr(config, "image_size", 224)),
        mean,
        sd,
        "bilinear" if bilinear else "bicubic",
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
def _as_backbone_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        fact = " ".join(str(error).split())[:500]
        raise BackboneError(
            f"transformers cannot load {folder} (code of a repository is never run): {fact}"
        ) from error


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
