"""Weights of a transformers model in what training left around them: from its folder, to the model.

transformers reads its own names, with and without the name of the base model before them. Where
they lie in a file that it does not look for, or under other names (`module.`, `backbone.`, the key
of a mapping), the network is found as in any other checkpoint (`ctfm.extract.network_part`), and
its tensors are handed to transformers, which still translates the names of its older versions.

Source: transformers 5.23, modeling_utils.py, from_pretrained(None, config=…, state_dict=…).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctfm.extract.network_part import Signature
from ctfm.extract.weights import read_network
from ctfm.store.errors import BackboneError


def load_wrapped(
    folder: Path, model: Any, *, key: str | None, options: Mapping[str, bool]
) -> tuple[Any, Mapping[str, Any], tuple[str, ...]]:
    """Load a model whose names have something before them.

    Args:
        folder: With one checkpoint.
        model: One of the class and configuration, with any weights or none.
        key: Which part of the checkpoint is meant, as the user says.
        options: More arguments of its class.

    Returns:
        The model, what transformers says of the loading, and what was cut off or left out.

    Raises:
        BackboneError: If the network is not found, or is there more than once.
    """
    found = read_network(folder, _signature(model), key=key, published=True)
    loaded, info = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=found.tensors,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are named by the caller
        output_loading_info=True,
        **options,
    )
    return loaded, info, found.remarks


def _signature(model: nn.Module) -> Signature:
    """Of a vision model: its first convolution, whose name no version of transformers changed."""
    first = next((n for n, part in model.named_modules() if isinstance(part, nn.Conv2d)), None)
    if first is None:
        raise BackboneError(f"{type(model).__name__} has no convolution that sees the image")
    mark = re.compile(re.escape(f"{first}.weight"))
    return Signature(mark=mark, own=frozenset(model.state_dict()))
