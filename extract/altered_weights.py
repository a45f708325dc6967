"""Tensors that have the names of a network, to whether they are its weights as it computes them.

Quantisation, pruning, reparametrisation and sharding leave tensors that are weights only together
with others, or none at all. Cast to float32 they would load, and be something else: integers
without their scales, an unmasked weight. Each is refused by its cause, whatever the library.

Sources: torch 2.15, nn/utils/prune.py, nn/utils/parametrize.py, nn/utils/weight_norm.py and
distributed/fsdp; bitsandbytes, functional.py (`QuantState.as_dict`); DeepSpeed, ZeRO stage 3.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ctfm.store.errors import BackboneError, some

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_COUNTS = re.compile(r"(?:.*[._])?(?:num_batches_tracked|ids|idxs?|index|indices|mask)")
"""Last part of the name of a tensor that is meant to hold whole numbers, such as the places of
relative positions."""
_FLAT = re.compile(r"(?:^|\.)(?:_flat_param|flat_param)(?:_\d+)?$")
_QUANTISED = re.compile(
    r"\.(?:absmax|nested_absmax|quant_map|quant_state\..*|SCB|qweight|qzeros|weight_scale(?:_inv)?"
    r"|weight_packed|(?:weight_)?zero_point|_packed_params.*)$"
)
_PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.")
_NORMED = (
    "reparametrised by a norm, and not the weights themselves",
    "call remove_weight_norm or remove_spectral_norm (torch.nn.utils)",
)
_PAIRED = (
    (
        *("_orig", "_mask", "pruned (torch.nn.utils.prune), and its masks are not applied"),
        "call prune.remove(module, 'weight')",
    ),
    ("_g", "_v", *_NORMED),
    ("_orig", "_u", *_NORMED),
)
"""Ends of two names that stand for one tensor, what that says of a network, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How a file keeps a tensor."""

    dtype: str
    """As torch calls it, without `torch.`."""

    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Kept":
        """How a tensor would be kept."""
        return cls(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def refuse_flat(names: Iterable[str]) -> None:
    """Refuse the names that FSDP gives to parameters that it laid end to end.

    Raises:
        BackboneError: If there are any.
    """
    if flat := [name for name in names if _FLAT.search(name)]:
        raise BackboneError(
            f"its tensors ({some(flat)}) are the flat ones of FSDP: save a full state dict "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict, full_state_dict=True)"
        )


def refuse_altered(kept: Mapping[str, Kept], *, own: Collection[str], source: Path) -> None:
    """Refuse tensors that are no weights as they are, by their names or their values.

    Args:
        kept: The tensors of a network, by its own names.
        own: Names that the network is known to have.
        source: What the user gave, for the message.

    Raises:
        BackboneError: Naming the cause, and the first of them.
    """
    for names, what, remedy in _by_names(kept.keys() - set(own)):
        if names:
            raise BackboneError(f"{source} is {what} ({some(sorted(names))}): {remedy}")
    refuse_rounded(kept, source=source)


def _by_names(names: Set[str]) -> Iterator[tuple[list[str], str, str]]:
    quantised = [name for name in names if _QUANTISED.search(name)]
    yield quantised, "quantised", "pass the checkpoint that it was made from"
    save = "on each module, and save it again"
    reparametrised = [name for name in names if _PARAMETRIZED.search(name)]
    remove = f"call remove_parametrizations (torch.nn.utils.parametrize) {save}"
    yield reparametrised, "reparametrised, and not the weights themselves", remove
    for one, other, what, remedy in _PAIRED:
        paired = [n for n in names if n.endswith(one) and n.removesuffix(one) + other in names]
        yield paired, what, f"{remedy} {save}"


def refuse_rounded(kept: Mapping[str, Kept], *, source: Path) -> None:
    """Refuse tensors of whole numbers, of eight bits, of complex numbers, or of none.

    Args:
        kept: The tensors of a network.
        source: What the user gave, for the message.

    Raises:
        BackboneError: Naming the cause, and the first of them.
    """
    if empty := sorted(name for name, one in kept.items() if 0 in one.shape):
        raise BackboneError(
            f"{source} holds {len(empty)} empty tensors ({some(empty)}), as ZeRO-3 of DeepSpeed "
            "leaves them where it saves one part of a model: run the zero_to_fp32.py of its "
            "checkpoint, or save with stage3_gather_16bit_weights_on_model_save"
        )
    if rounded := sorted(name for name, one in kept.items() if not _is_weight(name, one)):
        raise BackboneError(
            f"{source} does not fit the backbone: {len(rounded)} tensors ({some(rounded)}) are of "
            f"torch.{kept[rounded[0]].dtype}: quantised without their scales? Pass the checkpoint "
            "that it was made from"
        )


def _is_weight(name: str, kept: Kept) -> bool:
    """Whether a tensor can be cast to float32, or is one of whole numbers by its name."""
    if kept.dtype in _FLOATS:
        return True
    is_whole = kept.dtype.startswith(("int", "uint", "bool"))
    return is_whole and (not kept.shape or _COUNTS.fullmatch(name) is not None)
