"""`hf:<repository or folder>`: any vision model that transformers' `AutoModel` builds.

Code from a repository runs only if the user says that it may (`--trust-remote-code`); its digest is
then in the store's settings. A model that needs it is refused otherwise. Of a model with an image
and a text tower (CLIP, SigLIP) the image tower is kept, and must be complete; so must any other
model. Left over may be only a head: a classifier, or what the class that `config.json` names has
beside the model.

Size, mean, sd and interpolation are those of the repository's image processor
(`ctfm.extract.hf_processors`), tokens those of `ctfm.extract.hf_tokens`. A repository in timm's
layout is built by timm (`ctfm.extract.timm_models`).

A folder that holds an adapter beside whole weights is refused: transformers would merge it, and
nothing tells whether the weights have it already.
"""

import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctfm.extract import timm_models
from ctfm.extract.altered_weights import refuse_rounded
from ctfm.extract.backbone import Asked, BackboneEntry, Loaded, one_line, one_source
from ctfm.extract.checkpoints import kind_of
from ctfm.extract.foreign_weights import NO_WEIGHTS, foreign_folder
from ctfm.extract.hf_processors import read_preprocessing
from ctfm.extract.hf_tokens import HfTokens, trial
from ctfm.extract.hf_wrapped import load_wrapped
from ctfm.extract.hub import WANTED, hub_folder
from ctfm.extract.weight_files import USUAL, files_beside, shards_of, weight_files
from ctfm.extract.weights import digest_tensors, read_kept, read_tensors
from ctfm.store.errors import BackboneError, some
from ctfm.store.provenance import digest, file_sha256

PREFIX = "hf:"


def hf_entry(asked: Asked) -> BackboneEntry:
    """The facts about a transformers model, from its config files; no weights are loaded.

    Args:
        asked: `hf:<organisation>/<name>`; weights are a folder to read in place of it.

    Raises:
        BackboneError: If it is not to be had, transformers alone cannot build it, it takes more
            than images, or how images are prepared for it is not known.
    """
    repository = asked.name.removeprefix(PREFIX)
    hub_id = repository if "/" in repository else None
    source = _Source.find(asked)
    if timm_models.is_timm_config(source.config):
        entry = timm_models.folder_entry(asked.name, source.folder)
        return replace(entry, hub_id=hub_id)
    if source.config.get("model_type") == "vit_mae":
        raise BackboneError(
            f"{source.folder} is a ViT-MAE, which hides patches at random whenever it is read: "
            'write "model_type": "vit" into config.json of a local copy, and pass its folder; the '
            "same weights are then a ViT that sees every patch"
        )
    with torch.device("meta"), _as_backbone_error(source), _quiet():
        model = HfTokens(_from_config(source)).eval()
    with _quiet():
        preprocessing = read_preprocessing(source.folder, model.model.config)
    size_px, channels = preprocessing.size_px, len(preprocessing.mean)
    return BackboneEntry(
        name=asked.name,
        architecture=type(model.model).__name__,
        hub_id=hub_id,
        revision=None,
        licence="see its model card",
        gated=False,
        tokens=_try(model, (channels, *size_px), source),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        load=partial(load_hf, source=source, norm_is_due=model.norm_is_due),
        sources=one_source("config.json and image processor of the model"),
        channels=channels,
        size_px=size_px,
        mean=preprocessing.mean,
        sd=preprocessing.sd,
        interpolation=preprocessing.interpolation,
        remote_code=source.code,
        foreign=True,
    )


def _try(model: HfTokens, shape: tuple[int, int, int], source: "_Source") -> dict[str, int]:
    """Width of each token; sets whether the norm is due."""
    try:
        return trial(model, shape)
    except BackboneError:
        raise
    except Exception as error:  # what a network makes of an image is up to its author
        if isinstance(error, RuntimeError) and _NEEDS_NUMBERS.search(str(error)):
            return _try_whole(model, shape, source)
        raise BackboneError(
            f"transformers' {type(model.model).__name__} does not run on `pixel_values` of "
            f"{shape} alone ({type(error).__name__}: {one_line(error)}): a backbone is shown one "
            "image at a time, and nothing else. If it has an image tower that takes just this, "
            "save that alone (save_pretrained), and pass its folder"
        ) from error


_NEEDS_NUMBERS = re.compile(r"\bmeta\b|autocast|scalarType")
"""What torch says where a network reads a number, or asks for a type of the device, that the meta
device does not have; the latter is DINOv3 of transformers 4.57 to 5.0."""


def _try_whole(model: HfTokens, shape: tuple[int, int, int], source: "_Source") -> dict[str, int]:
    whole = HfTokens(_load(source)[0]).eval()
    widths = _try(whole, shape, source)
    model.norm_is_due = whole.norm_is_due
    return widths


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a model is, and whether its own code runs."""

    folder: Path
    config: Mapping[str, Any]
    """Its `config.json`."""
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
            folder = hub_folder(repository, revision=None, gated=False, download=asked.download)
        _refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise BackboneError(_no_config(folder))
        config, own = _read_config(folder / "config.json")
        _refuse_quantised(config, folder)
        if own and asked.trust_remote_code and asked.weights is None:
            folder = hub_folder(
                repository,
                revision=None,
                gated=False,
                files=(*WANTED, "*.py"),
                download=asked.download,
            )
        runs = bool(own) and asked.trust_remote_code
        code = _digest_code(folder, own) if runs else None
        return cls(folder=folder, config=config, code=code, brings_code=bool(own))


def _refuse_adapter(folder: Path) -> None:
    """Refuse an adapter where a model should be.

    transformers merges one that lies beside whole weights, without a word and even if
    `merge_and_unload` has done so already.
    """
    if not (folder / "adapter_config.json").is_file():
        return
    whole = [
        file.name
        for file in folder.iterdir()
        if file.suffix in USUAL
        and not file.name.startswith("adapter_model")
        and not NO_WEIGHTS.fullmatch(file.name)
    ]
    if not whole:
        raise BackboneError(
            f"{folder} is an adapter and no model: pass the model that it was trained on as "
            "--model, and this folder as --adapter"
        )
    raise BackboneError(
        f"{folder} holds an adapter (adapter_config.json) beside whole weights ({some(whole)}), "
        "and nothing tells whether the weights have it already. If they have "
        "(merge_and_unload), take adapter_config.json out of a copy of the folder; if not, move "
        "adapter_config.json and adapter_model.* to a folder of their own, and pass that as "
        "--adapter"
    )


def _no_config(folder: Path) -> str:
    """Why there is no model at a place, and what to pass instead."""
    if folder.is_file():
        return (
            f"{folder} is a file, and `{PREFIX}` needs config.json and preprocessor_config.json "
            "beside it: put it into a copy of the model's folder, in place of its "
            f"{USUAL['.safetensors']}, and pass the folder as --weights"
        )
    fact = foreign_folder(folder) if folder.is_dir() else None
    return f"no config.json in {folder}: {fact or 'not a transformers model'}"


def _refuse_quantised(config: Mapping[str, Any], folder: Path) -> None:
    said = config.get("quantization_config")
    if said:
        method = said.get("quant_method") if isinstance(said, dict) else None
        raise BackboneError(
            f"{folder} is quantised ({method or 'quantization_config in config.json'}): pass the "
            "model that it was made from"
        )


def _read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's configuration, and which classes it brings itself."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return dict(config), dict(config.get("auto_map") or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise BackboneError(f"{file} is no configuration of transformers: {error}") from error


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
    model, remarks = _load(source, key=entry.weights_key)
    module = HfTokens(model, norm_is_due=norm_is_due)
    digest_of = digest_tensors(module.model.state_dict())
    return Loaded(module=module, digest=digest_of, entry=entry, remarks=remarks)


def _load(source: _Source, *, key: str | None = None) -> tuple[Any, tuple[str, ...]]:
    """The whole model, with its weights, and what of these was cut off, left out or chosen."""
    files = weight_files(source.folder, published=True)
    pickled = any(kind_of(file) == "torch.save" for file in files)
    if pickled:
        read_tensors(files)  # refused here if they hold anything else, and not read by transformers
    remarks, said = files_beside(source.folder, files), "not read"
    if _is_named_as_usual(files, source.folder) or source.code is not None:
        model, info = _from_folder(source, pickled=pickled)
        said = _faults(info, model, source)
        if not said:
            kept = read_kept(files)
            read = {n: one for n, one in kept.items() if n not in info["unexpected_keys"]}
            refuse_rounded(read, source=source.folder)
    if (said or key is not None) and source.code is None:
        with _as_backbone_error(source), _quiet():
            with torch.device("meta"):
                model = _from_config(source)
            model, info, remarks = load_wrapped(
                source.folder, model, key=key, options=_options(source)
            )
        said = _faults(info, model, source)
    if said:
        raise BackboneError(f"{source.folder} does not fit its config.json: {said}")
    if left_out := sorted(info["unexpected_keys"]):
        remarks = (*remarks, f"left out: {some(left_out)}")
    return model, remarks


def _is_named_as_usual(files: Collection[Path], folder: Path) -> bool:
    """Whether transformers finds the files of a checkpoint by itself."""
    usual = {USUAL[".safetensors"], USUAL[".bin"]}
    return shards_of(folder) is not None or any(file.name in usual for file in files)


def _from_folder(source: _Source, *, pickled: bool) -> tuple[Any, Mapping[str, Any]]:
    """The model as transformers loads it, and what it says of that."""
    from transformers import AutoModel

    with _as_backbone_error(source), _quiet():
        model, info = AutoModel.from_pretrained(
            source.folder,
            dtype=torch.float32,
            use_safetensors=not pickled,
            ignore_mismatched_sizes=True,  # to name them, in `_faults`
            output_loading_info=True,
            **_trust(source),
            **_options(source),
        )
    return model, info


def _faults(info: Mapping[str, Any], model: Any, source: _Source) -> str:
    """What of the part that is kept is missing, unexpected or misshapen; a head is not."""
    tower = "vision_model." if hasattr(model, "vision_model") else ""
    faults = {
        "missing": set(info["missing_keys"]),
        "unexpected": {n for n in info["unexpected_keys"] if not _HEAD.match(n)},
        "of another shape": {n if isinstance(n, str) else n[0] for n in info["mismatched_keys"]},
    }
    faults = {what: {n for n in names if n.startswith(tower)} for what, names in faults.items()}
    if faults["unexpected"]:
        faults["unexpected"] -= _beside_base(model, source)
    return "; ".join(
        f"{len(names)} {what} ({some(sorted(names))})" for what, names in faults.items() if names
    )


_HEAD = re.compile(r"classifier\.|(?:.*\.)?embeddings\.mask_token$")
"""A classifier, and what stands for a patch that pretraining hides, and for none of an image."""


def _beside_base(model: Any, source: _Source) -> set[str]:
    """Tensors that the class named in `config.json` has beside the model that is its base."""
    import transformers

    (name, *_) = source.config.get("architectures") or [""]
    whole_class = getattr(transformers, str(name), None)
    if whole_class is None or whole_class is type(model) or not hasattr(model, "config"):
        return set()
    try:
        with torch.device("meta"):
            whole = whole_class(model.config)
    except Exception:  # a class for another configuration; then nothing is known to be a head
        return set()
    start = f"{whole.base_model_prefix}."
    return {tensor for tensor in whole.state_dict() if not tensor.startswith(start)}


def _trust(source: _Source) -> dict[str, bool]:
    return {"trust_remote_code": source.code is not None, "local_files_only": True}


def _from_config(source: _Source) -> Any:
    from transformers import AutoConfig, AutoModel

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
    names = read_kept(weight_files(source.folder, published=True))
    has_none = not any("pooler." in name for name in names)
    return {"add_pooling_layer": False} if can_do_without and has_none else {}


@contextmanager
def _as_backbone_error(source: _Source) -> Iterator[None]:
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # whatever transformers makes of a strange folder
        if source.brings_code and source.code is None:
            raise BackboneError(
                f"{source.folder} brings code of its own, and transformers cannot build it without "
                "running that: read the .py files there, and pass --trust-remote-code if they may "
                "do on this machine whatever they like"
            ) from error
        # What follows is a list of every class that transformers has.
        fact = one_line(error).partition(" Model type should be one of")[0]
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
