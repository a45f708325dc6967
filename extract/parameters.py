"""Parameters: a backbone's module, to how many numbers it has and how many LoRA would train.

As in Table 2 of the paper, whose totals come out with LoRA of rank 8 on every attention projection
and on the first convolution of the patch embedding. Counted on the meta device: no weights.
"""

import re
from dataclasses import dataclass

from torch import nn

from ctfm.extract.backbone import BackboneEntry
from ctfm.store.errors import BackboneError


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many numbers."""

    backbone: int
    """All of the backbone, frozen."""
    lora_attention: int
    """Of low-rank pairs on the attention projections; 0 if the entry states no targets."""
    lora_patches: int
    """Of the pair on the first convolution."""


def count_parameters(entry: BackboneEntry, *, rank: int = 8) -> Parameters:
    """Count the parameters of a backbone, and of LoRA on it.

    Args:
        entry: One with a `skeleton`.
        rank: r of the pairs.

    Raises:
        BackboneError: If only a checkpoint tells the shape of the backbone.
    """
    if entry.skeleton is None:
        raise BackboneError(f"the shape of {entry.name} is known only from a checkpoint")
    module = entry.skeleton()
    targets = entry.lora_targets.get("hf")
    attention = [
        part
        for name, part in module.named_modules()
        if targets is not None and re.fullmatch(targets, name)
    ]
    patches = [part for part in module.modules() if isinstance(part, nn.Conv2d)][:1]
    return Parameters(
        backbone=sum(parameter.numel() for parameter in module.parameters()),
        lora_attention=sum(_pair_size(part, rank) for part in attention),
        lora_patches=sum(_pair_size(part, rank) for part in patches),
    )


def _pair_size(module: nn.Module, rank: int) -> int:
    """A: r × (numbers that an output sees); B: outputs × r."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return rank * (weight[0].numel() + weight.shape[0])
