"""A file on disk, to what kind it is by its content; and one of torch.save, to its tensors.

What torch.save writes is a pickle, which can run any code when it is opened. It is read by
torch's restricted unpickler alone (`weights_only=True`), which builds tensors and plain containers
and looks up no name that a file may choose, and only by a torch in which what was found wrong with
that unpickler is mended (`SAFE_TORCH`). Older forms of the format are not read.

Source: torch 2.15, torch/serialization.py; SECURITY.md of pytorch.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ctfm.store.errors import BackboneError

Kind = Literal["safetensors", "torch.save", "old pickle", "TorchScript", "exported program", "none"]

SAFE_TORCH = (2, 10)
"""In older ones the restricted unpickler can be made to run code (CVE-2025-32434, mended in 2.6)
or to write past its memory (CVE-2026-24747, mended in 2.10)."""

DEEPEST = 8
"""Mappings below each other that are followed: a file may be made to hold one that holds itself."""


def kind_of(file: Path) -> Kind:
    """What a file is, whatever it is called; MedImageInsight's safetensors end in `.pt`."""
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:9] == b"{":
        return "safetensors"
    if start[:1] == b"\x80":
        return "old pickle"
    if start[:4] != b"PK\x03\x04":
        return "none"
    return _kind_of_archive(file)


def _kind_of_archive(file: Path) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile:
        return "none"
    # Every name is below one folder, that of the archive.
    names = {record.filename.partition("/")[2] for record in records}
    if "constants.pkl" in names:
        return "TorchScript"
    if "archive_format" in names:
        return "exported program"
    # torch.save compresses nothing, so that what is compressed may be a bomb.
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    return "torch.save" if "data.pkl" in names and stored else "none"


def read_saved_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of torch.save, mapped from the file and not copied.

    Names of mappings below each other are joined by dots: what lies under `state_dict` begins with
    `state_dict.`. Other values, such as settings of the training, are left out.

    Args:
        file: Of the kind `torch.save`.

    Raises:
        BackboneError: If this torch is too old to read it safely, it holds what the unpickler does
            not build, or no tensor has a name.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE_TORCH:
        least = ".".join(map(str, SAFE_TORCH))
        raise BackboneError(
            f"{file} is a pickle, and torch {torch.__version__} cannot read one without running "
            f"code that may be in it (CVE-2026-24747): install torch {least} or newer, or convert "
            "the file to safetensors"
        )
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a damaged file, whatever its bytes lead the unpickler to
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        fact = f"holds more than tensors ({named[1]})" if named else "is damaged"
        raise BackboneError(
            f"{file} {fact} and is refused: save the state dict alone, best as safetensors "
            "(safetensors.torch.save_file), where the file was made"
        ) from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in _named(held, depth=DEEPEST):
        if name in tensors:
            raise BackboneError(f"{file} holds two tensors as {name}: save one state dict alone")
        tensors[name] = tensor
    if not tensors:
        raise BackboneError(
            f"{file} is not a state dict: it must map names to tensors, by itself or below a name"
        )
    return tensors


def _named(held: Any, *, depth: int) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(held, Mapping) or not depth:
        return
    for name, value in held.items():
        if not isinstance(name, str):
            continue  # an optimizer numbers what it keeps
        if isinstance(value, Tensor):
            yield name, value
        else:
            for below, tensor in _named(value, depth=depth - 1):
                yield f"{name}.{below}", tensor
