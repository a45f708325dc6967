"""Files that look like weights and are not read, to what each is and how to get at its tensors.

Training leaves checkpoints in parts (DeepSpeed, torch's distributed checkpoints), in formats of
other frameworks, and beside files that are no weights at all. None of them is opened here: names,
and the first bytes of a file, tell what they are.

Sources: torch 2.15, torch/distributed/checkpoint/format_utils.py; DeepSpeed,
deepspeed/utils/zero_to_fp32.py; the Git LFS specification, version 1; transformers 5.23,
trainer.py; accelerate 1.15, utils/constants.py.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ctfm.store.errors import some

_DISTRIBUTED = (
    "a distributed checkpoint of torch: make one file of its folder with `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt`, and pass that"
)
_DEEPSPEED = (
    "a part of a DeepSpeed checkpoint: run the zero_to_fp32.py that lies in the folder above "
    "(`python zero_to_fp32.py FOLDER OUT`), and pass what it wrote"
)
_NAMES = (
    (r".*\.distcp|\.metadata", _DISTRIBUTED),
    (r".*zero_pp_rank_\d+_mp_rank_\d+.*\.pt", _DEEPSPEED),
    (
        r".*\.ckpt\.(?:index|meta|data-\d+-of-\d+)|.*\.h5|.*\.keras|saved_model\.pb",
        "of TensorFlow or Keras: convert it to PyTorch, best to safetensors",
    ),
    (r".*\.msgpack", "of Flax: convert it to PyTorch, best to safetensors"),
    (r".*\.onnx", "an ONNX graph: pass the checkpoint that it was exported from"),
    (r".*\.gguf", "of llama.cpp, and rounded: pass the checkpoint that it was made from"),
    (r".*\.npz", "an archive of NumPy: convert it to PyTorch, best to safetensors"),
)
"""Whole names of files, with what they are and what to do."""

_STARTS = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS and not the file itself: run `git lfs pull` where it was cloned",
    ),
    (b"<", "a web page and not weights: download it again, logged in"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"\x89HDF", "of TensorFlow or Keras: convert it to PyTorch, best to safetensors"),
    (b"GGUF", "of llama.cpp, and rounded: pass the checkpoint that it was made from"),
    (b"\x93NUMPY", "one array of NumPy: a checkpoint maps names to tensors"),
)

NO_WEIGHTS = re.compile(
    r"(?:optimizer|optimizer_\d+|scheduler|scheduler_\d+|scaler|sampler|training_args|rng_state)"
    r"(?:_\d+)?\.(?:pt|pth|bin)"
)
"""What transformers' Trainer and accelerate write beside a checkpoint under suffixes of weights."""

ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
"""As PEFT names the weights of an adapter."""


def foreign_name(name: str) -> str | None:
    """What a file of this name is and what to do about it; None if it may be weights."""
    return next((fact for pattern, fact in _NAMES if re.fullmatch(pattern, name)), None)


def foreign_start(file: Path) -> str | None:
    """What a file is by its first bytes, and what to do about it; None if they tell nothing."""
    with file.open("rb") as stream:
        start = stream.read(32).lstrip()
    return next((fact for begin, fact in _STARTS if start.startswith(begin)), None)


def foreign_folder(folder: Path) -> str | None:
    """Why no checkpoint can be taken from a folder as it is; None if nothing in it tells.

    Looked at are its own files and, one level below, folders that hold weights.
    """
    names = sorted(path.name for path in folder.iterdir())
    if (folder / "zero_to_fp32.py").is_file() or any(map(_is_deepspeed, names)):
        return f"it is or holds {_DEEPSPEED}"
    for name in names:
        if (fact := foreign_name(name)) is not None:
            return f"{name} is {fact}"
    within = [name for name in names if _holds_weights(folder / name)]
    if within:
        return f"it holds checkpoints in {some(_in_order(within))}: pass one of these folders"
    return None


def _is_deepspeed(name: str) -> bool:
    return re.fullmatch(r"(?:.*zero_pp_rank_\d+_)?mp_rank_\d+_\w+\.pt", name) is not None


def _holds_weights(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(
        path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".distcp")
        and not NO_WEIGHTS.fullmatch(path.name)
        for path in folder.iterdir()
    )


def _in_order(names: Iterable[str]) -> list[str]:
    """checkpoint-20 before checkpoint-100."""
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
