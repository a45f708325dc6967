"""An image processor of transformers, to what a backbone has to do to channels in 0..1.

What a repository's file leaves out is what transformers' class for it does; a model whose folder
has no such file is refused, because nothing else says how the images of its training were made.
`processor_config.json` comes before `preprocessor_config.json`, as in transformers 5.23
(image_processing_base.py; 4.57 knows the latter alone). Code of a repository is not run for this.

A centre crop becomes a resize to its size, because a crop would cut the head off. Anything else
that a processor does and that is not done here, such as swapping red and blue, is refused by name,
and so is a processor of a repository's own code, whatever it calls its settings.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctfm.extract.backbone import Interpolation, interpolation_of
from ctfm.store.errors import BackboneError

FILES = ("processor_config.json", "preprocessor_config.json")
"""Best first; the former counts if it has an `image_processor`."""

_PIL_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""In the order of their numbers in `PIL.Image.Resampling`, which image processors write."""
_NEEDED = ("size", "resample", "image_mean", "image_std")
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop")
"""What is done here; a class of transformers without one of them, or None for it, does not do it.
What is of no known class is taken to resize, rescale and normalise."""
_HARMLESS = ("do_convert_rgb", "do_reduce_labels", "do_convert_annotations")
"""Of images in another mode, and of what is no image."""
_CHANGES = re.compile(
    r"do_\w+|offset|keep_aspect_ratio|size_divisor|crop_to_patches"
    r"|\w*(?:clahe|equali[sz]e|gamma|hist|blur|sharpen|contrast|grayscale|invert)\w*"
)
"""Names of settings that change an image, of transformers' classes and of others' own."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to channels in 0..1."""

    size_px: tuple[int, int]
    """(y, x)."""
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    interpolation: Interpolation


def read_preprocessing(folder: Path, config: Any) -> Preprocessing:
    """What the image processor of a model does.

    Args:
        folder: Of the model.
        config: Of its image tower.

    Raises:
        BackboneError: If no file tells it, or it is something that is not done here.
    """
    said = _said(folder)
    size = said["crop_size"] if said["do_center_crop"] else said["size"]
    if not said["do_resize"] and not said["do_center_crop"]:
        size = getattr(config, "image_size", None)
    mean, sd = _normalisation(said, channels=int(getattr(config, "num_channels", 3)))
    resample = int(said["resample"])
    name = dict(enumerate(_PIL_FILTERS)).get(resample, f"an unknown ({resample})")
    return Preprocessing(
        size_px=_size_px(size),
        mean=mean,
        sd=sd,
        interpolation=interpolation_of(name, source=f"the image processor of {folder}"),
    )


def _said(folder: Path) -> dict[str, Any]:
    """Everything about a processor: its file, and its class where that says nothing."""
    own = {name: value for name, value in _of_file(folder).items() if value is not None}
    _refuse_own_code(own, folder)
    of_class = _of_class(folder)
    if of_class is None and (name := own.get("image_processor_type")):
        raise BackboneError(
            f"the image processor of {folder} is a {name}, which transformers does not know: what "
            f"it does to an image cannot be told{_REMEDY}"
        )
    unsaid = dict.fromkeys(_STEPS, of_class is None) | {"do_center_crop": False}
    said = {**unsaid, **(of_class or {}), **own}
    _refuse_changes(said, folder)
    needed = _NEEDED if said["do_normalize"] else _NEEDED[:2]
    lacking = [name for name in needed if name not in said]
    if lacking:
        raise BackboneError(
            f"the image processor of {folder} does not say {lacking[0]}, and transformers knows no "
            "class that it is of: complete its preprocessor_config.json in a local copy"
        )
    return said


_REMEDY = (
    ". If size, resample, image_mean and image_std are all that it does, write these alone into "
    "preprocessor_config.json of a local copy; if not, save the model as a program that does the "
    "rest itself (`.pt2`), and pass that as --model"
)


def _refuse_own_code(own: Mapping[str, Any], folder: Path) -> None:
    classes = own.get("auto_map") or {}
    if name := classes.get("AutoImageProcessor") or classes.get("AutoFeatureExtractor"):
        raise BackboneError(
            f"the image processor of {folder} is code of its own ({name}), which is not run here, "
            f"also not with --trust-remote-code{_REMEDY}"
        )


def _refuse_changes(said: Mapping[str, Any], folder: Path) -> None:
    done = {*_STEPS, *_HARMLESS}
    changes = [n for n, value in said.items() if value and n not in done and _CHANGES.fullmatch(n)]
    if changes:
        named = ", ".join(f"{name}: {json.dumps(said[name], default=str)}" for name in changes)
        raise BackboneError(
            f"the image processor of {folder} does what is not done here ({named}){_REMEDY}"
        )


def _of_file(folder: Path) -> dict[str, Any]:
    nested, plain = (_read(folder / name) for name in FILES)
    said = plain if nested is None else nested.get("image_processor", plain)
    if said is None:
        raise BackboneError(
            f"no {FILES[1]} in {folder}: how images have to be sized and normalised for this model "
            "is not known. Copy the file from the model that it was made from"
        )
    return dict(said)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BackboneError(f"{file} is no image processor of transformers: {error}") from error


def _of_class(folder: Path) -> dict[str, Any] | None:
    """What transformers' class for the processor does unless told otherwise; None without one."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return dict(type(processor)().to_dict())
    except Exception:  # whatever a strange file makes of it; what is then lacking is an error above
        return None


def _normalisation(
    said: Mapping[str, Any], *, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and sd of channels in 0..1 that do what the processor does to bytes.

    EfficientNet's divides by its sd twice where its classifier is meant to follow (`include_top`).
    """
    if not said["do_normalize"]:
        mean, sd = (0.0,) * channels, (1.0,) * channels
    else:
        mean = _of_channels(said["image_mean"], channels=channels)
        sd = _of_channels(said["image_std"], channels=channels)
    if said.get("include_top"):
        own = _of_channels(said["image_std"], channels=channels)
        sd = tuple(s * o for s, o in zip(sd, own, strict=True))
    rescaled = bool(said["do_rescale"])
    scale = 255 * float(said.get("rescale_factor") or 1 / 255) if rescaled else 255.0
    offset = 1.0 if rescaled and said.get("rescale_offset") else 0.0
    if abs(scale - 1) < 1e-6 and not offset:
        return mean, sd  # to the bit
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in sd)


def _of_channels(value: float | Sequence[float], *, channels: int) -> tuple[float, ...]:
    """A value a channel; one for all may be written."""
    values = (value,) if isinstance(value, int | float) else tuple(value)
    if len(set(values)) == 1:
        values = values[:1] * channels
    if len(values) != channels:
        raise BackboneError(
            f"the image processor normalises {len(values)} channels, and the model takes "
            f"{channels}: write a mean and an sd of each into preprocessor_config.json of a local "
            "copy"
        )
    return tuple(map(float, values))


def _size_px(size: Any) -> tuple[int, int]:
    """(y, x) from the forms that image processors use: a number, a pair, named edges."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    named = size if isinstance(size, dict) else {}
    if "shortest_edge" in named:
        return int(named["shortest_edge"]), int(named["shortest_edge"])
    if "height" not in named:
        raise BackboneError(f"the image processor's size is {size}: only a fixed size will do")
    return int(named["height"]), int(named["width"])
