"""The Atlas tower against outputs of the released modules, and at full size. See `fixtures/`."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ctfm.extract.atlas import Atlas, cut, join
from ctfm.extract.atlas_config import Scale, read_config
from ctfm.extract.pillar0 import INFERRED
from ctfm.store.errors import BackboneError

FIXTURE = Path(__file__).parent / "fixtures" / "atlas_parity.npz"
CASES = ("even", "uneven")
Recipe = Callable[[Mapping[str, tuple[int, ...]], int], dict[str, Tensor]]


def recipe_volume(shape: tuple[int, ...], seed: int = 4) -> Tensor:
    """Voxels that the fixture was made with."""
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape).astype(np.float32))


def of_fixture(case: str) -> tuple[dict[str, Any], Tensor]:
    with np.load(FIXTURE) as arrays:
        config = json.loads(str(arrays[f"{case}_config"]))
        return config, torch.from_numpy(arrays[f"{case}_embedding"])


@pytest.fixture
def built(recipe_tensors: Recipe) -> Callable[[dict[str, Any]], Atlas]:
    def build(config: dict[str, Any]) -> Atlas:
        module = Atlas(read_config(config)).eval().requires_grad_(False)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        module.load_state_dict(recipe_tensors(shapes, 3))
        return module

    return build


@pytest.mark.parametrize("case", CASES)
def test_gives_what_the_released_modules_give(
    case: str, built: Callable[[dict[str, Any]], Atlas]
) -> None:
    config, expected = of_fixture(case)
    module = built(config)
    volume = recipe_volume((2, 11, *module.config.image))
    with torch.inference_mode():
        embedded = module(volume)["cls"]
    assert embedded.shape == (2, module.config.dim)
    assert_close(embedded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_has_the_tensor_names_of_the_released_modules(case: str) -> None:
    with np.load(FIXTURE) as arrays:
        config, names = json.loads(str(arrays[f"{case}_config"])), arrays[f"{case}_names"]
    assert sorted(Atlas(read_config(config)).state_dict()) == list(names)


def test_volumes_of_a_batch_do_not_see_each_other(
    built: Callable[[dict[str, Any]], Atlas],
) -> None:
    config, expected = of_fixture("uneven")
    module = built(config)
    volume = recipe_volume((2, 11, *module.config.image))
    with torch.inference_mode():
        assert_close(module(volume[1:])["cls"], expected[1:], rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near_float32(built: Callable[[dict[str, Any]], Atlas]) -> None:
    config, expected = of_fixture("even")
    module = built(config).to(torch.bfloat16)
    with torch.inference_mode():
        half = module(recipe_volume((2, 11, *module.config.image)).bfloat16())["cls"]
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(half.float(), expected).min() > 0.995


def test_joining_undoes_cutting_and_windows_come_in_raster_order() -> None:
    scale = Scale((1, 1, 1), grid=(2, 3, 1), window=(1, 2, 5))
    volume = torch.arange(2 * 2 * 6 * 5 * 7).reshape(2, 2, 6, 5, 7).float()
    windows = cut(volume, scale)
    assert windows.shape == (2 * 6, 10, 7)
    assert torch.equal(windows[6 + 4], volume[1, 1, 2:4].reshape(10, 7))
    assert torch.equal(join(windows, scale), volume)


def full_config() -> dict[str, Any]:
    """Inferred from the sizes of exported weights; the release's own config.json decides."""
    return {
        "model": {"stages": [2, 2, 10], "atlas_args": {"dim": 384, "num_heads": 12}},
        "modalities": {
            "brain_ct": {
                "in_chans": 11,
                "num_features": 192,
                "image_size": [256, 256, 128],
                "patch_size": [8, 8, 4],
                "merge_ratio": [4, 4, 4],
                "local2global": [4, 4, 4],
            }
        },
    }


def test_the_full_size_has_the_inferred_parameters_and_gives_1152_numbers() -> None:
    config = read_config(full_config())
    assert config == INFERRED
    with torch.device("meta"):
        module = Atlas(config).eval()
        volume = torch.empty(1, 11, 128, 256, 256)
    assert [scale.grid for scale in config.scales] == [(8, 8, 8), (2, 2, 2), (1, 1, 1)]
    assert sum(parameter.numel() for parameter in module.parameters()) == 92_216_768
    with torch.inference_mode():
        assert module(volume)["cls"].shape == (1, 1152)


@pytest.mark.parametrize("place", ["vision_cfg", "model_config"])
def test_the_shape_is_found_wherever_the_file_has_it(place: str) -> None:
    nested = {"model_type": "clip_multimodal_atlas", place: {"embed_dim": 1, "x": full_config()}}
    assert read_config(nested) == read_config(full_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model", "stages", [2, 2]), "3 scales of tokens for 2 stages"),
        (("model", "atlas_args", {"dim": 384}), "KeyError, 'num_heads'"),
        (("model", "atlas_args", {"dim": 256, "num_heads": 8}), "twice num_features"),
        (("model", "atlas_args", {"dim": 384, "num_heads": 0}), "ZeroDivisionError"),
        (("brain_ct", "image_size", [256, 250, 128]), "image size by the stem's stride"),
        (("brain_ct", "merge_ratio", [4, 4, 5]), "merge_ratio by local2global"),
        (("brain_ct", "image_size", [256, 256, 144]), "leaves a rest"),
        (("brain_ct", "local2global", [1, 1, 1]), "pools nothing"),
        (("brain_ct", "local2global", [4, 4]), "ValueError"),
        (("brain_ct", "patch_size", [16, 16, 8]), r"has \[8, 8, 4\]"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused_with_the_reason(
    change: tuple[str, str, Any], message: str
) -> None:
    config = deepcopy(full_config())
    part, field, value = change
    (config["model"] if part == "model" else config["modalities"][part])[field] = value
    with pytest.raises(BackboneError, match=message):
        read_config(config)


def test_the_configuration_of_another_body_part_or_model_is_refused() -> None:
    config = full_config()
    config["modalities"]["chest_ct"] = config["modalities"].pop("brain_ct")
    with pytest.raises(BackboneError, match=r"there is \['chest_ct'\]"):
        read_config(config)
    with pytest.raises(BackboneError, match="not an Atlas"):
        read_config({"vision_cfg": {"model": "vit"}})
