"""A folder or a file that a user gives, to the files of the one checkpoint that it holds.

Two checkpoints are not guessed between: of `model.safetensors` and `model_ema.safetensors` only the
user knows which is meant. What is known to be no other network may lie beside one: the same
weights in another format, what an optimizer keeps, an adapter. A repository of the hub, and a
folder that transformers is to read, follow its rule: `model.safetensors` is the model.

Source: transformers 5.23, modeling_utils.py, _get_resolved_checkpoint_files.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from ctfm.extract.foreign_weights import (
    ADAPTER_NAMES,
    NO_WEIGHTS,
    foreign_folder,
    foreign_name,
)
from ctfm.store.errors import BackboneError, some

USUAL = {
    ".safetensors": "model.safetensors",
    ".bin": "pytorch_model.bin",
    ".pth": "model.pth",
    ".pt": "model.pt",
    ".ckpt": "model.ckpt",
}
"""Suffixes of checkpoints, best first, and the name that is taken where there are several."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_SAME = re.compile(
    r"pytorch_model(?:-\d{5}-of-\d{5})?\.bin|(?:model|pytorch_model)\.(?:fp16|bf16)\.\w+"
    r"|open_clip_(?:pytorch_)?model\.\w+"
)
"""Beside `model.safetensors`: the same network in another format, rounded, or as open_clip names
it, as repositories of the hub have it."""


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub cache is a snapshot of; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def weight_files(weights: Path, *, published: bool = False) -> list[Path]:
    """The files of a checkpoint.

    Args:
        weights: A file, or a folder with one checkpoint: one file, or shards with or without their
            index. Safetensors come before what torch.save wrote.
        published: Whether a file of the usual name is the one that is meant, whatever lies beside
            it; it always is in a snapshot of the hub.

    Raises:
        BackboneError: If there is none, a shard is missing, or several could be meant.
    """
    if weights.is_file():
        return [_alone(weights)]
    if not weights.is_dir():
        raise BackboneError(f"no weights at {weights}: give a checkpoint's file or its folder")
    for suffix, usual in USUAL.items():
        files = _of_suffix(weights, suffix, usual)
        if files and not published and commit_of(weights) is None:
            _refuse_rivals(files, weights)
        if files:
            return files
    fact = foreign_folder(weights) or "give the .safetensors file or its folder"
    raise BackboneError(f"no checkpoint in {weights}: {fact}")


def files_beside(weights: Path, files: Collection[Path]) -> tuple[str, ...]:
    """What is said of checkpoints that lie in a folder beside the files that are read."""
    if not weights.is_dir() or not (beside := _others(weights, files)):
        return ()
    adapters = [name for name in beside if name in ADAPTER_NAMES]
    rest = [name for name in beside if name not in adapters]
    read = some(sorted(file.name for file in files))
    return (
        *((f"read: {read}; not read, beside it: {some(rest)}",) if rest else ()),
        *((f"not merged: the adapter beside {read}, in {adapters[0]}",) if adapters else ()),
    )


def _candidates(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in USUAL and file.is_file() and not NO_WEIGHTS.fullmatch(file.name)
    )


def _of_suffix(folder: Path, suffix: str, usual: str) -> list[Path]:
    """The one checkpoint of a folder whose files have this suffix; [] if there is none."""
    if (folder / usual).is_file():
        return [folder / usual]
    if (shard_of := _read_index(folder / f"{usual}.index.json")) is not None:
        return _present(folder, set(shard_of.values()))
    found = [file for file in _candidates(folder) if file.suffix == suffix]
    return _only(found, folder) if found else []


def _others(folder: Path, files: Collection[Path]) -> list[str]:
    return [file.name for file in _candidates(folder) if file not in files]


def _refuse_rivals(files: Sequence[Path], folder: Path) -> None:
    usual = (USUAL[".safetensors"], f"{USUAL['.safetensors']}.index.json")
    same = _SAME if any((folder / name).is_file() for name in usual) else re.compile("$^")
    rivals = [
        name
        for name in _others(folder, files)
        if name not in ADAPTER_NAMES and not same.fullmatch(name)
    ]
    if rivals:
        _refuse_several([*(file.name for file in files), *rivals], folder)


def _refuse_several(names: Sequence[str], folder: Path) -> None:
    fact = foreign_folder(folder) or "name the file"
    raise BackboneError(f"{folder} holds {len(names)} checkpoints ({some(sorted(names))}): {fact}")


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
    """The one checkpoint among files without an index: a file, or shards that say they are all."""
    found = [file for file in found if file.name not in ADAPTER_NAMES] or found
    shards = [match for file in found if (match := _SHARD.fullmatch(file.name))]
    if len(shards) == len(found) and len({m["stem"] + m["count"] for m in shards}) == 1:
        one, count = shards[0], int(shards[0]["count"])
        start, end = one["stem"], f"of-{one['count']}{one['suffix']}"
        return _present(folder, {f"{start}-{i:05d}-{end}" for i in range(1, count + 1)})
    if len(found) > 1:
        _refuse_several([path.name for path in found], folder)
    if found[0].name in ADAPTER_NAMES:
        raise BackboneError(_is_adapter(folder))
    return [*found]


def shards_of(folder: Path) -> dict[str, str] | None:
    """The file of each tensor of a checkpoint in shards with an index; None for any other."""
    for usual in USUAL.values():
        if (folder / usual).is_file():
            return None
        if (shard_of := _read_index(folder / f"{usual}.index.json")) is not None:
            return shard_of
    return None


def _read_index(file: Path) -> dict[str, str] | None:
    if not file.is_file():
        return None
    try:
        return {
            str(n): str(of)
            for n, of in json.loads(file.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BackboneError(f"{file} is no index of shards: download it again") from error


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


def chosen_shards(folder: Path, names: Collection[str], *, published: bool) -> list[Path]:
    """Some shards of a folder with an index, all of which have to be there.

    Args:
        folder: Of the checkpoint.
        names: Of the shards.
        published: As for `weight_files`.

    Raises:
        BackboneError: If one is missing, or something else in the folder could be meant.
    """
    files = _present(folder, names)
    if not published and commit_of(folder) is None:
        every = set((shards_of(folder) or {}).values())
        _refuse_rivals([folder / name for name in every], folder)
    return files


def tower_files(weights: Path, belongs: re.Pattern[str]) -> list[Path]:
    """The files that hold a tower: of a checkpoint in shards, those that its index names.

    Raises:
        BackboneError: As `weight_files`, but for shards that hold nothing of it.
    """
    shards = tower_shards(weights, belongs)
    return weight_files(weights) if shards is None else _present(weights, shards)


def tower_shards(folder: Path, belongs: re.Pattern[str]) -> set[str] | None:
    """Names of the shards that hold a tower, there or not; None without an index of shards."""
    names = shards_of(folder)
    if names is None:
        return None
    return {file for name, file in names.items() if belongs.match(name)}
