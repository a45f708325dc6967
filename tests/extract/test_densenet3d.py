"""The 3-D DenseNet against MONAI's output, stored in `fixtures/`, and MONAI's parameter counts."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ctfm.extract.densenet3d import DenseNet3d, DenseShape, read_shape
from ctfm.store.errors import BackboneError

FIXTURE = Path(__file__).parent / "fixtures" / "densenet_parity.npz"
Recipe = Callable[[Mapping[str, tuple[int, ...]], int], dict[str, Tensor]]
SHAPE = DenseShape(channels=3, blocks=(2, 3, 1), growth=4, stem=10, bottleneck=3)


@pytest.fixture
def of_monai(recipe_tensors: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    """Every tensor of MONAI's network, classifier included, and its embedding of the volume."""
    with np.load(FIXTURE) as arrays:
        sizes = [tuple(int(n) for n in text.split(",") if n) for text in arrays["shapes"]]
        shapes = dict(zip(map(str, arrays["names"]), sizes, strict=True))
        return recipe_tensors(shapes, 5), torch.from_numpy(arrays["embedding"])


def test_gives_what_monai_gives(of_monai: tuple[dict[str, Tensor], Tensor]) -> None:
    tensors, expected = of_monai
    module = DenseNet3d(SHAPE).eval().requires_grad_(False)
    tower = {n: t for n, t in tensors.items() if not n.startswith("class_layers.")}
    module.load_state_dict(tower, strict=True)
    random = np.random.RandomState(6)
    volume = torch.from_numpy(random.random_sample((2, 3, 33, 36, 40)).astype(np.float32))
    embedded = module(volume)["cls"]
    assert embedded.shape == (2, SHAPE.dim) == (2, 14)
    assert_close(embedded, expected, rtol=1e-5, atol=1e-5)


def test_the_shape_is_read_off_the_tensors(of_monai: tuple[dict[str, Tensor], Tensor]) -> None:
    assert read_shape(of_monai[0]) == SHAPE


@pytest.mark.parametrize(
    ("shape", "parameters", "dim"),
    [
        (DenseShape(channels=3, blocks=(6, 12, 24, 16)), 11_286_528, 1024),
        (DenseShape(channels=3, blocks=(4, 8, 16, 12)), 6_771_920, 728),
        (DenseShape(channels=3, blocks=(6, 12, 24, 16), growth=24), 6_434_004, 770),
    ],
)
def test_the_full_size_has_monais_number_of_parameters(
    shape: DenseShape, parameters: int, dim: int
) -> None:
    with torch.device("meta"):
        module = DenseNet3d(shape).eval()
        volume = torch.empty(1, 3, 40, 224, 224)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert shape.dim == dim
    with torch.inference_mode():
        assert module(volume)["cls"].shape == (1, dim)


def test_tensors_of_another_network_are_refused(of_monai: tuple[dict[str, Tensor], Tensor]) -> None:
    with pytest.raises(BackboneError, match="not those of a 3-D DenseNet-BC"):
        read_shape({"conv1.weight": torch.zeros(4, 3, 7, 7)})
    flat = {n: t[..., 0] if t.ndim == 5 else t for n, t in of_monai[0].items()}
    with pytest.raises(BackboneError, match="with 5 axes"):
        read_shape(flat)
