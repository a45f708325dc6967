"""Weights: the files of a checkpoint to tensors, all of them or an error.

Which files are meant is said elsewhere (`ctfm.extract.weight_files`). Read are safetensors,
whatever the file is called, and files of torch.save as far as they hold tensors and nothing else
(`ctfm.extract.checkpoints`). Nothing here knows a model: a family's file says what tells its
network from the rest (`ctfm.extract.network_part`) and names the tensors it expects.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ctfm.extract.altered_weights import Kept, refuse_altered, refuse_flat
from ctfm.extract.checkpoints import kind_of, read_saved_tensors
from ctfm.extract.foreign_weights import foreign_start
from ctfm.extract.network_part import Part, Signature, find_part, likely_cause
from ctfm.extract.weight_files import chosen_shards, files_beside, shards_of, weight_files
from ctfm.store.errors import BackboneError, ChoiceError, some


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


def read_network(
    weights: Path, signature: Signature, *, key: str | None = None, published: bool = False
) -> Found:
    """The tensors of one network of a checkpoint; the rest is neither read nor needed.

    Args:
        weights: A file of any suffix, or a folder with one checkpoint, of whose shards only those
            that hold the network have to be there.
        signature: Of the network.
        key: Which part of the checkpoint is meant, where it is there more than once (`find_part`).
        published: As for `weight_files`.

    Raises:
        BackboneError: If there is no such tensor, a shard is missing, or a file cannot be read
            safely or is damaged.
        ChoiceError: If a key is needed.
    """
    files, part = _found(weights, signature, key=key, published=published)
    own_names = {raw: own for own, raw in part.names.items()}
    tensors: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as opened:
            tensors |= {
                own_names[raw]: opened.tensor(raw) for raw in opened.names & own_names.keys()
            }
    if not tensors:
        raise BackboneError(f"{weights} holds no tensor of this backbone: another model's weights?")
    own_kept = {name: Kept.of(tensor) for name, tensor in tensors.items()}
    refuse_altered(own_kept, own=signature.own, source=weights)
    return Found(tensors=tensors, remarks=(*files_beside(weights, files), *part.remarks))


def _found(
    weights: Path, signature: Signature, *, key: str | None, published: bool
) -> tuple[list[Path], Part]:
    """The files to read, and which of their tensors are the network's."""
    find = partial(_part, signature=signature, key=key, source=weights)
    file_of = shards_of(weights) if weights.is_dir() else None
    if file_of is not None:
        part = find(file_of)
        shards = {file_of[raw] for raw in part.names.values()}
        return chosen_shards(weights, shards, published=published), part
    files = weight_files(weights, published=published)
    kept = read_kept(files)
    return files, find(kept, scalars={name for name, one in kept.items() if not one.shape})


def _part(
    names: Collection[str],
    *,
    signature: Signature,
    key: str | None,
    source: Path,
    scalars: Collection[str] = (),
) -> Part:
    try:
        refuse_flat(names)
        return find_part(names, signature, key, scalars=scalars)
    except ChoiceError as error:
        raise ChoiceError(f"{source}: {error}", error.keys) from error
    except BackboneError as error:
        raise BackboneError(f"{source}: {error}") from error


def _read(file: Path) -> dict[str, Tensor]:
    with _opened(file) as opened:
        return {name: opened.tensor(name) for name in opened.names}


def read_kept(files: Sequence[Path]) -> dict[str, Kept]:
    """The tensors of whole checkpoint files, without reading their values.

    Raises:
        BackboneError: If a file cannot be read safely, is damaged, or repeats a name of another.
    """
    kept: dict[str, Kept] = {}
    for file in files:
        with _opened(file) as opened:
            _refuse_repeated(kept.keys() & opened.names, file)
            kept |= {name: opened.kept(name) for name in opened.names}
    return kept


def _refuse_repeated(repeated: Collection[str], file: Path) -> None:
    if repeated:
        raise BackboneError(f"{file} repeats {some(sorted(repeated))} of another file: name one")


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A checkpoint file that is open."""

    names: Set[str]
    tensor: Callable[[str], Tensor]
    kept: Callable[[str], Kept]


@contextmanager
def _opened(file: Path) -> Iterator[_Opened]:
    kind = kind_of(file)
    if kind == "torch.save":
        held = read_saved_tensors(file)
        yield _Opened(
            names=held.keys(), tensor=held.__getitem__, kept=lambda name: Kept.of(held[name])
        )
        return
    if kind not in ("safetensors", "none"):
        raise BackboneError(_refusal(file, kind))
    try:
        with safe_open(file, framework="pt") as opened:
            yield _Opened(
                names=set(opened.keys()),
                tensor=opened.get_tensor,
                kept=lambda name: _kept(opened.get_slice(name)),
            )
    except SafetensorError as error:
        fact = foreign_start(file) or f"not a whole safetensors file: {error}"
        raise BackboneError(f"{file} is {fact}") from error


_SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64"},
    **{
        f"{start}{bits}": f"{name}{bits}"
        for start, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}
"""What torch calls the types of safetensors."""


def _kept(one: Any) -> Kept:
    dtype = str(one.get_dtype())
    return Kept(dtype=_SAFETENSORS.get(dtype, dtype.lower()), shape=tuple(one.get_shape()))


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
