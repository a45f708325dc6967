"""Weights: a folder or a file to tensors, all of them or an error.

Read are safetensors, whatever the file is called, and files of torch.save as far as they hold
tensors and nothing else (`ctfm.extract.checkpoints`). Nothing here knows a model: a family's file
says what tells its network from the rest (`ctfm.extract.network_part`) and names the tensors it
expects.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ctfm.extract.checkpoints import kind_of, read_saved_tensors
from ctfm.extract.foreign_weights import (
    ADAPTER_NAMES,
    NO_WEIGHTS,
    foreign_folder,
    foreign_name,
    foreign_start,
)
from ctfm.extract.network_part import Part, Signature, find_part, likely_cause
from ctfm.store.errors import BackboneError, ChoiceError, some

USUAL = {
    ".safetensors": "model.safetensors",
    ".bin": "pytorch_model.bin",
    ".pth": "model.pth",
    ".pt": "model.pt",
    ".ckpt": "model.ckpt",
}
"""Suffixes of checkpoints, best first, and the name that is taken where there are several."""


def weight_files(weights: Path) -> list[Path]:
    """The files of a checkpoint.

    Args:
        weights: A file, or a folder with one checkpoint: shards with their index, or one file.
            Safetensors come before what torch.save wrote, and a file of the usual name before
            others.

    Raises:
        BackboneError: If there is none, a shard is missing, or several could be meant.
    """
    if weights.is_file():
        return [_alone(weights)]
    if not weights.is_dir():
        raise BackboneError(f"no weights at {weights}: give a checkpoint's file or its folder")
    if (names := _index(weights)) is not None:
        return _present(weights, set(names.values()))
    for suffix, usual in USUAL.items():
        files = filter(Path.is_file, weights.glob(f"*{suffix}"))
        found = sorted(file for file in files if not NO_WEIGHTS.fullmatch(file.name))
        if weights / usual in found:
            return [weights / usual]
        if found:
            return _only(found, weights)
    fact = foreign_folder(weights) or "give the .safetensors file or its folder"
    raise BackboneError(f"no checkpoint in {weights}: {fact}")


_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def _alone(file: Path) -> Path:
    if (fact := foreign_name(file.name)) is not None:
        raise BackboneError(f"{file} is {fact}")
    if file.name in ADAPTER_NAMES:
        raise BackboneError(_is_adapter(file.parent))
    return file


def _is_adapter(folder: Path) -> str:
    return (
        f"{folder} holds an adapter: pass it with --adapter, and with --weights, if not from the "
        "hub, the weights that it was trained on"
    )


def _only(found: Sequence[Path], folder: Path) -> list[Path]:
    """The one checkpoint of a folder without an index: a file, or shards that say they are all."""
    shards = [match for file in found if (match := _SHARD.fullmatch(file.name))]
    if len(shards) == len(found) and len({m["stem"] + m["count"] for m in shards}) == 1:
        one, count = shards[0], int(shards[0]["count"])
        start, end = one["stem"], f"of-{one['count']}{one['suffix']}"
        return _present(folder, {f"{start}-{i:05d}-{end}" for i in range(1, count + 1)})
    if len(found) > 1:
        names_found = some([path.name for path in found])
        fact = foreign_folder(folder) or "name the file"
        raise BackboneError(f"{folder} holds {len(found)} checkpoints ({names_found}): {fact}")
    if found[0].name in ADAPTER_NAMES:
        raise BackboneError(_is_adapter(folder))
    return [*found]


def _index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor of a checkpoint in shards; None if it is not in shards."""
    for usual in USUAL.values():
        file = folder / f"{usual}.index.json"
        if not file.is_file():
            continue
        try:
            return {
                str(n): str(of)
                for n, of in json.loads(file.read_text(encoding="utf-8"))["weight_map"].items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BackboneError(f"{file} is no index of shards: download it again") from error
    return None


def _present(folder: Path, names: Collection[str]) -> list[Path]:
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise BackboneError(f"the index of {folder} names {outside[0]!r}, which is not in it")
    shards = sorted(folder / name for name in names)
    absent = [path.name for path in shards if not path.is_file()]
    if absent:
        raise BackboneError(
            f"{folder} lacks {len(absent)} of the {len(shards)} shards that are needed "
            f"({some(absent)}): download the rest"
        )
    return shards


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Every tensor of the files, by name.

    Raises:
        BackboneError: If a file cannot be read safely, is damaged, or repeats a tensor of another.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        of_file = _read(file)
        _refuse_repeated(tensors.keys() & of_file.keys(), file)
        tensors |= of_file
    return tensors


@dataclass(frozen=True, kw_only=True)
class Found:
    """A network's tensors in a checkpoint."""

    tensors: dict[str, Tensor]
    """By the network's own names, in the layout of the file."""

    remarks: tuple[str, ...]
    """What was cut off, left out or chosen, for the user."""


def read_network(weights: Path, signature: Signature, *, key: str | None = None) -> Found:
    """The tensors of one network of a checkpoint; the rest is neither read nor needed.

    Args:
        weights: A file of any suffix, or a folder with one checkpoint, of whose shards only those
            that hold the network have to be there.
        signature: Of the network.
        key: Which part of the checkpoint is meant, where it is there more than once (`find_part`).

    Raises:
        BackboneError: If there is no such tensor, a shard is missing, or a file cannot be read
            safely or is damaged.
        ChoiceError: If a key is needed.
    """
    file_of = _index(weights) if weights.is_dir() else None
    if file_of is None:
        files = weight_files(weights)
        part = _part(read_names(files), signature, key=key, source=weights)
    else:
        part = _part(file_of, signature, key=key, source=weights)
        files = _present(weights, {file_of[raw] for raw in part.names.values()})
    own_names = {raw: own for own, raw in part.names.items()}
    tensors: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as (names, tensor_of):
            tensors |= {own_names[raw]: tensor_of(raw) for raw in names if raw in own_names}
    if not tensors:
        raise BackboneError(f"{weights} holds no tensor of this backbone: another model's weights?")
    return Found(tensors=tensors, remarks=part.remarks)


def _part(names: Collection[str], signature: Signature, *, key: str | None, source: Path) -> Part:
    try:
        return find_part(names, signature, key)
    except ChoiceError as error:
        raise ChoiceError(f"{source}: {error}", error.keys) from error
    except BackboneError as error:
        raise BackboneError(f"{source}: {error}") from error


def tower_files(weights: Path, belongs: re.Pattern[str]) -> list[Path]:
    """The files that hold a tower: of a checkpoint in shards, those that its index names.

    Raises:
        BackboneError: As `weight_files`, but for shards that hold nothing of it.
    """
    shards = tower_shards(weights, belongs)
    return weight_files(weights) if shards is None else _present(weights, shards)


def tower_shards(folder: Path, belongs: re.Pattern[str]) -> set[str] | None:
    """Names of the shards that hold a tower, there or not; None without an index of shards."""
    names = _index(folder)
    if names is None:
        return None
    return {file for name, file in names.items() if belongs.match(name)}


def _read(file: Path) -> dict[str, Tensor]:
    with _opened(file) as (names, tensor_of):
        return {name: tensor_of(name) for name in names}


def read_names(files: Sequence[Path]) -> set[str]:
    """Names of the tensors of whole checkpoint files, without reading their values.

    Raises:
        BackboneError: If a file cannot be read safely, is damaged, or repeats a name of another.
    """
    names: set[str] = set()
    for file in files:
        with _opened(file) as (of_file, _):
            _refuse_repeated(names & set(of_file), file)
            names |= set(of_file)
    return names


def _refuse_repeated(repeated: Collection[str], file: Path) -> None:
    if repeated:
        raise BackboneError(f"{file} repeats {some(sorted(repeated))} of another file: name one")


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Collection[str], Callable[[str], Tensor]]]:
    """The names of a checkpoint's tensors, and what reads one of them."""
    kind = kind_of(file)
    if kind == "torch.save":
        held = read_saved_tensors(file)
        yield held, held.__getitem__
        return
    if kind not in ("safetensors", "none"):
        raise BackboneError(_refusal(file, kind))
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened.keys(), opened.get_tensor
    except SafetensorError as error:
        fact = foreign_start(file) or f"not a whole safetensors file: {error}"
        raise BackboneError(f"{file} is {fact}") from error


def _refusal(file: Path, kind: str) -> str:
    if kind == "old pickle":
        return (
            f"{file} is a pickle in the form before torch 1.6, which is not read here because code "
            "in it may run: load it where you trust it, and save it as safetensors "
            "(safetensors.torch.save_file)"
        )
    return f"{file} is a program ({kind}) and not a checkpoint: pass it as `--model`"


def check_complete(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str
) -> None:
    """Check that a checkpoint has every expected tensor, in its shape, and no other.

    Args:
        tensors: What the checkpoint holds.
        expected: What the model needs; only the shapes are looked at, so meta tensors do.
        source: What the user gave, for the message.

    Raises:
        BackboneError: Naming the first tensors that are missing, unexpected or misshapen, with
            counts.
    """
    common = tensors.keys() & expected.keys()
    faults = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "of another shape": {n for n in common if tensors[n].shape != expected[n].shape},
    }
    said = [
        f"{len(names)} {what} ({some(sorted(names))})" for what, names in faults.items() if names
    ]
    if said:
        cause = likely_cause(
            missing=faults["missing"],
            unexpected=faults["unexpected"],
            expected=len(expected),
            misshapen=len(faults["of another shape"]),
        )
        raise BackboneError(
            f"{source} does not fit the backbone: {len(expected)} tensors expected, "
            f"{'; '.join(said)}. {cause}"
        )
    numbers = {
        n for n in common if tensors[n].is_floating_point() == expected[n].is_floating_point()
    }
    if rounded := sorted(common - numbers):
        raise BackboneError(
            f"{source} does not fit the backbone: {len(rounded)} tensors ({some(rounded)}) are of "
            f"{tensors[rounded[0]].dtype}: quantised? Pass the checkpoint that it was made from"
        )


def load_completely(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Put a checkpoint into a module in float32, completely or not at all.

    The module may be on the meta device; its persistent tensors are replaced by copies, so the
    file may change afterwards.

    Args:
        module: What to load.
        tensors: What the checkpoint holds.
        source: What the user gave, for the message.
        names: The module's name of each tensor of a whole checkpoint; None if they are the same.

    Raises:
        BackboneError: As `check_complete`, in the checkpoint's names.
    """
    held = module.state_dict()
    names = names or {name: name for name in held}
    check_complete(tensors, {of_file: held[name] for of_file, name in names.items()}, source=source)
    copies = {
        names[of_file]: tensor.to(torch.float32, copy=True)
        if tensor.is_floating_point()
        else tensor.clone()
        for of_file, tensor in tensors.items()
    }
    module.load_state_dict(copies, strict=True, assign=True)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of the tensors, sorted by name.

    It is the content's, not the file's: sharding, order and metadata do not change it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
