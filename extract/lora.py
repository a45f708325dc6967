"""LoRA: a PEFT adapter, merged into a backbone in float32 and checked.

    W ← W + s · B A        s = α / r, or α / √r with rank-stabilised scaling

Each low-rank pair must find its module, or nothing is merged. Before the
weights change, the backbone is run on a probe batch with the pairs as side branches, and after it
with the merged weights: the two must agree. Only then may anyone cast to a smaller type; merging
in bfloat16 would lose the update (huggingface/peft#1388).

Source: Hu et al. 2021 (arXiv:2106.09685), Sec. 4.1; the file format of PEFT 0.21.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from ctfm.extract.adapter_config import check_family, doubts, read_config, scale_of
from ctfm.extract.adapter_names import all_outside, place
from ctfm.extract.altered_weights import Kept, refuse_rounded
from ctfm.extract.backbone import Backbone, MergedAdapter
from ctfm.extract.foreign_weights import ADAPTER_NAMES
from ctfm.extract.weights import digest_tensors, read_tensors
from ctfm.store.errors import BackboneError, ConfigError, some
from ctfm.store.provenance import digest

TRAINING_NAME = "ctfm_training.json"
"""Written by whoever trained the adapter: {"scan_ids": […], "patient_ids": […]}."""

TOLERANCE = 1e-4
"""Largest difference of merged and unmerged tokens, relative to the largest token."""
PROBE_SAMPLES = 2

_PAIR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight"
)
"""PEFT cuts the adapter's name, `default`, out when it saves; a state dict saved by hand has it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pair:
    """One low-rank update, and its module."""

    module: nn.Linear | nn.Conv2d
    down: Tensor
    up: Tensor
    scale: float

    def branch(self, inputs: Tensor) -> Tensor:
        """What the update adds to the output of the module."""
        if isinstance(self.module, nn.Conv2d):
            module = self.module
            narrow = conv2d(inputs, self.down, None, module.stride, module.padding, module.dilation)
            return self.scale * conv2d(narrow, self.up)
        return self.scale * linear(linear(inputs, self.down), self.up)

    def add_branch(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook of the module: its output as an unmerged adapter would make it."""
        return output + self.branch(inputs[0])

    def delta(self) -> Tensor:
        """What the update adds to the weight of the module."""
        if isinstance(self.module, nn.Conv2d):
            return self.scale * torch.einsum("or,rikl->oikl", self.up[:, :, 0, 0], self.down)
        return self.scale * (self.up @ self.down)


def merge_adapter(backbone: Backbone, adapter: Path) -> Backbone:
    """Merge a PEFT LoRA adapter into a backbone, completely or not at all.

    Args:
        backbone: In float32; its module is changed, so it must not be used any more.
        adapter: A folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`,
            if it holds nothing but tensors), and with `ctfm_training.json` if it is known which
            scans it was trained on.

    Returns:
        The backbone with the adapter in its weights, and a record of it in `adapter`.

    Raises:
        BackboneError: If the folder is no LoRA adapter, is one of a kind that cannot be merged,
            was made for another backbone or layout, or the merged backbone gives other tokens
            than the unmerged one.
        ConfigError: If the backbone is not in float32, or has an adapter already.
    """
    if backbone.precision != "float32" or backbone.adapter is not None:
        raise ConfigError(f"{backbone.name} must be freshly loaded and in float32 to be merged")
    config = read_config(adapter)
    tensors = _read_weights(adapter)
    pairs, remarks = _pairs(tensors, config, backbone=backbone, source=adapter)
    probe = _probe(backbone)
    with torch.inference_mode(), _side_branches(pairs):
        unmerged = backbone.module(probe)
    with torch.no_grad():
        for pair in pairs:
            pair.module.weight += pair.delta()
    with torch.inference_mode():
        merged = backbone.module(probe)
    errors = [_relative_error(merged[token], unmerged[token]) for token in backbone.tokens]
    error = float(torch.tensor(errors).max())  # unlike Python's max, NaN if any is
    if not error <= TOLERANCE:
        raise BackboneError(
            f"{backbone.name} merged with {adapter} gives other tokens than unmerged: relative "
            f"difference {error:.1e}, at most {TOLERANCE:.0e} is rounding. Was the adapter trained "
            "on a module that the backbone does not call?"
        )
    scaling = {name: config.get(name) for name in ("lora_alpha", "use_rslora", "alpha_pattern")}
    record = MergedAdapter(
        digest=digest({"tensors": digest_tensors(tensors), **scaling}),
        max_relative_error=error,
        **_trained_on(adapter),
    )
    return replace(backbone, adapter=record, remarks=(*backbone.remarks, *remarks))


def _read_weights(adapter: Path) -> dict[str, Tensor]:
    files = [adapter / name for name in ADAPTER_NAMES if (adapter / name).is_file()]
    if not files:
        raise BackboneError(f"{adapter} has no {ADAPTER_NAMES[0]}: is it a whole adapter?")
    tensors = read_tensors(files[:1])
    refuse_rounded({name: Kept.of(one) for name, one in tensors.items()}, source=files[0])
    if faulty := sorted(name for name, one in tensors.items() if not bool(one.isfinite().all())):
        raise BackboneError(
            f"{files[0]} holds NaN or infinity in {len(faulty)} tensors ({some(faulty)}): its "
            "training diverged, or the file is damaged; take an earlier checkpoint"
        )
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _pairs(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    backbone: Backbone,
    source: Path,
) -> tuple[list[_Pair], tuple[str, ...]]:
    parts: dict[str, dict[str, Tensor]] = {}
    whole = []
    for name, tensor in tensors.items():
        if matched := _PAIR.fullmatch(name):
            pair = parts.setdefault(matched["module"], {})
            _put(pair, matched["part"], tensor, source=f"{source}: {name}")
        else:
            whole.append(name.removeprefix("base_model.model."))
    halves = [name for name, pair in parts.items() if len(pair) < 2]
    saved = config.get("modules_to_save") or ()
    left_out = sorted(whole) if all_outside(whole, saved, backbone) else None
    if left_out is None and saved:
        raise BackboneError(
            f"{source} was trained with modules_to_save={saved!r}, which cannot be merged here: "
            "merge it with PEFT's merge_and_unload, and pass the result with --weights"
        )
    if left_out is None or halves or not parts:
        fault = some(sorted(halves or whole)) or "nothing"
        raise BackboneError(
            f"{source} is not a whole LoRA adapter: it holds {fault} without a pair"
        )
    check_family(config, backbone=backbone, source=source)
    placed = place(parts, backbone, source=source)
    pairs = [
        _pair(module, parts[name], scale=scale_of(config, name), source=f"{source}: {name}")
        for name, module in placed.modules.items()
    ]
    more = (f"left out of the adapter: {some(left_out)}",) if left_out else ()
    said = doubts(config, {name: parts[name] for name in placed.modules})
    absent = _absent(placed.modules, config, backbone)
    return pairs, (*placed.remarks, *more, *said, *absent)


def _absent(
    placed: Mapping[str, nn.Module], config: Mapping[str, Any], backbone: Backbone
) -> tuple[str, ...]:
    """What is said where some layers have pairs, and their like have none."""
    targets, settings = config.get("target_modules"), ("layers_to_transform", "exclude_modules")
    chosen = any(config.get(name) for name in settings) or not isinstance(targets, list)
    if chosen or any(re.search(r"\d", str(target)) for target in targets or ()):
        return ()
    names = {module: name for name, module in backbone.module.named_modules()}
    changed = {names[module] for module in placed.values()}
    alike = {_without_numbers(name) for name in changed}
    absent = {n for n in names.values() if _without_numbers(n) in alike} - changed
    if not absent:
        return ()
    of = f"{len(changed)} of {len(changed) + len(absent)} such modules"
    return (f"the adapter changes {of}, and not {some(sorted(absent))}",)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _put(pair: dict[str, Tensor], part: str, tensor: Tensor, *, source: str) -> None:
    if part in pair:
        raise BackboneError(f"{source} is there twice, with and without `.default`: keep one")
    pair[part] = tensor


def _pair(
    module: nn.Linear | nn.Conv2d,
    parts: Mapping[str, Tensor],
    *,
    scale: Callable[[int], float],
    source: str,
) -> _Pair:
    down, up = parts["A"], parts["B"]
    pair = _Pair(module=module, down=down, up=up, scale=scale(len(down)) if len(down) else 0.0)
    fits = down.ndim == up.ndim == module.weight.ndim and up.shape[1] == len(down)
    if not fits or pair.delta().shape != module.weight.shape:
        raise BackboneError(
            f"{source} has the shapes {tuple(down.shape)} and {tuple(up.shape)}, which do not fit "
            f"a weight of {tuple(module.weight.shape)}: an adapter of another size of the backbone?"
        )
    return pair


def _probe(backbone: Backbone) -> Tensor:
    entry = backbone.entry
    size = entry.size_px or (224, 224)
    generator = torch.Generator().manual_seed(0)
    channels = torch.rand(PROBE_SAMPLES, entry.channels, *size, generator=generator)
    return backbone.pixels(channels.to(backbone.device))


@contextmanager
def _side_branches(pairs: Sequence[_Pair]) -> Iterator[None]:
    hooks = [pair.module.register_forward_hook(pair.add_branch) for pair in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _relative_error(merged: Tensor, unmerged: Tensor) -> float:
    return float((merged - unmerged).abs().max() / unmerged.abs().max())


def _trained_on(adapter: Path) -> dict[str, frozenset[str]]:
    file = adapter / TRAINING_NAME
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: frozenset(map(str, said.get(name, []))) for name in ("scan_ids", "patient_ids")
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise BackboneError(
            f'{file} must be {{"scan_ids": […], "patient_ids": […]}}, with ids as in scans.parquet'
        ) from error
