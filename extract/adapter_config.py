"""The settings of a PEFT adapter: from its file, to whether it can be merged, and its scales.

A LoRA that computes something else than W + s B A is refused by the name of the setting; so is one
with a setting that only a later PEFT knows, as long as it is in use.

Source: peft 0.21, tuners/lora/config.py and utils/other.py.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ctfm.extract.backbone import Backbone
from ctfm.store.errors import BackboneError, some

CONFIG_NAME = "adapter_config.json"

_UNSUPPORTED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "layer_replication": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "arrow_config": None,
}
"""Settings that change what an adapter computes, with the one value that is understood."""
_HARMLESS = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
        *("lora_dropout", "use_rslora", "init_lora_weights", "layers_to_transform"),
        *("layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "target_parameters"),
        *("ensure_weight_tying", "runtime_config", "modules_to_save"),
    )
)
"""Settings of PEFT 0.21 that say how it was trained, or are understood."""
_OF_ONE_TOWER = frozenset(
    (
        *("vit", "deit", "beit", "data2vec", "dinov2", "dinov2_with_registers", "dinov3_vit"),
        *("vit_msn", "ijepa", "swin", "swinv2"),
    )
)
"""Folders of transformers' vision models that name their modules alike."""
_OWN_START = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations whose adapters belong to changed base weights."""


def read_config(adapter: Path) -> dict[str, Any]:
    """The settings of an adapter that can be merged.

    Raises:
        BackboneError: If it is no LoRA, or was trained with a setting that changes what it
            computes in a way that is not understood; it is named.
    """
    try:
        config: dict[str, Any] = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fact = f"no readable {CONFIG_NAME}{_within(adapter)}"
        raise BackboneError(f"{adapter} is no PEFT adapter: {fact}") from error
    if not isinstance(config, dict):
        raise BackboneError(f"{adapter / CONFIG_NAME} is no configuration of PEFT")
    if config.get("peft_type") != "LORA":
        raise BackboneError(
            f"{adapter} is an adapter of type {config.get('peft_type')}: only LORA can be merged"
        )
    for name, understood in _UNSUPPORTED.items():
        if config.get(name, understood) not in (understood, None, [], False):
            raise BackboneError(
                f"{adapter} was trained with {name}={config[name]!r}, which cannot be merged here: "
                "merge it with PEFT's merge_and_unload, and pass the result with --weights"
            )
    if unknown := _unknown(config):
        raise BackboneError(
            f"{adapter} was trained with {some(unknown)}, which is not known here and may change "
            "what it computes: merge it with PEFT's merge_and_unload, and pass the result with "
            "--weights"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_OWN_START):
        raise BackboneError(
            f"{adapter} was started with {start}, which changes the base weights: convert it to a "
            "plain adapter first (PEFT: path_initial_model_for_weight_conversion)"
        )
    return config


def _within(adapter: Path) -> str:
    """Where else it may be: a Trainer, and PEFT for named adapters, make folders below."""
    if adapter.is_file():
        return ". Pass the folder, not the file"
    found = sorted(file.parent.name for file in adapter.glob(f"*/{CONFIG_NAME}"))
    return f". There is one in {some(found)}: pass that folder" if found else ""


def _unknown(config: Mapping[str, Any]) -> list[str]:
    """Settings of a later PEFT that are in use; a number alone switches nothing on."""
    known = _HARMLESS | _UNSUPPORTED.keys()
    return [
        name
        for name, value in config.items()
        if name not in known and value and (value is True or not isinstance(value, int | float))
    ]


def check_family(config: Mapping[str, Any], *, backbone: Backbone, source: Path) -> None:
    """Refuse an adapter that says that it was trained on another network of transformers.

    Many of them name their modules alike, so that names and sizes alone would let it pass.

    Raises:
        BackboneError: Naming both.
    """
    said = config.get("auto_mapping") or {}
    trained_on = _family(str(said.get("parent_library")))
    classes = {type(module).__module__ for module in backbone.module.modules()}
    families = {family for name in classes if (family := _family(name)) is not None}
    # One that names several towers is a model around one of these.
    if trained_on in _OF_ONE_TOWER and families & _OF_ONE_TOWER and trained_on not in families:
        raise BackboneError(
            f"{source} was trained on {said.get('base_model_class')} of transformers, and "
            f"{backbone.name} is {some(sorted(families))}: load the backbone that it was trained on"
        )


def _family(module: str) -> str | None:
    match = re.match(r"transformers\.models\.(\w+)", module)
    return None if match is None else match[1]


def scale_of(config: Mapping[str, Any], name: str) -> Callable[[int], float]:
    """The scale of a pair, from its rank.

    Args:
        config: From `read_config`.
        name: Of its module, whole, as in the model that was trained.
    """
    usual = config.get("lora_alpha", 8)
    alpha = _by_pattern(config.get("alpha_pattern") or {}, name, default=usual)

    def of_rank(rank: int) -> float:
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return of_rank


def _by_pattern(patterns: Mapping[str, float], name: str, *, default: float) -> float:
    # As PEFT does (0.21, utils/other.py, get_pattern_key): a key is the end of the module's whole
    # name, or a regular expression for it; `^` binds to its start. PEFT takes the first, but
    # writes its file with sorted keys, so that the order of the training is lost.
    matching = {pattern: value for pattern, value in patterns.items() if _matches(pattern, name)}
    if len(set(matching.values())) > 1:
        keys = ", ".join(f"{pattern!r}: {value}" for pattern, value in matching.items())
        raise BackboneError(
            f"{name} matches several keys of the adapter's alpha_pattern or rank_pattern ({keys}), "
            f"and which came first in its training is not in {CONFIG_NAME}: keep the one in a copy"
        )
    return next(iter(matching.values()), default)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise BackboneError(
            f"the adapter's alpha_pattern or rank_pattern has the key {pattern!r}, which is no "
            f"regular expression: {error}"
        ) from error


def doubts(config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """What of an adapter's tensors is not as its settings say; for the user.

    Args:
        config: From `read_config`.
        parts: Its pairs, by the names of their modules.
    """
    return [
        *_other_ranks(config, parts),
        *_absent_targets(config, parts),
        *_without_effect(parts),
    ]


def _other_ranks(config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    ranks, patterns = {}, config.get("rank_pattern") or {}
    for name, pair in parts.items():
        said = _by_pattern(patterns, name, default=config.get("r", len(pair["A"])))
        if said != len(pair["A"]):
            ranks[name] = f"{len(pair['A'])} and not {said}"
    if not ranks:
        return []
    rank = next(iter(ranks.values()))
    return [f"the adapter's rank is {rank}, as its settings say, in {some(ranks)}"]


def _absent_targets(config: Mapping[str, Any], parts: Collection[str]) -> list[str]:
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return []
    absent = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in parts)]
    return [f"the adapter holds no pairs for its target_modules {some(absent)}"] if absent else []


def _without_effect(parts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    if all(not bool(pair["B"].any()) for pair in parts.values()):
        return ["the adapter changes nothing: all its lora_B are zero, as before training"]
    return []
