"""Shared by the tests of `ctfm.extract`."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

Recipe = Callable[[Mapping[str, tuple[int, ...]], int], dict[str, Tensor]]


@pytest.fixture(scope="session")
def recipe_tensors() -> Recipe:
    """Weights that a fixture was made with, from names, shapes and a seed; see `fixtures/`."""
    return _recipe_tensors


def _recipe_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """One generator, tensors in the order of their names."""
    random = np.random.RandomState(seed)
    made = {}
    for name in sorted(shapes):
        noise = random.standard_normal(shapes[name])
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shapes[name], np.int64)
        elif name.endswith("running_var"):
            values = (1 + 0.3 * np.abs(noise)).astype(np.float32)
        elif len(shapes[name]) == 1:
            values = (0.2 * noise + name.endswith("weight")).astype(np.float32)
        else:
            values = (noise / np.sqrt(np.prod(shapes[name][1:]))).astype(np.float32)
        made[name] = torch.from_numpy(values)
    return made
