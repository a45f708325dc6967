"""MedImageInsight's encoder: the released modules' output, from the released file's layout."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ctfm.extract.backbone import load_backbone
from ctfm.extract.backbones import BACKBONES
from ctfm.extract.davit import SIZES, DaViT, Sizes, tower
from ctfm.store.errors import BackboneError

FIXTURE = Path(__file__).parent / "fixtures" / "davit_parity.npz"
SMALL: Sizes = {
    "embed_dim": (8, 16, 24, 32),
    "num_heads": (2, 2, 3, 4),
    "num_groups": (2, 4, 3, 8),
    "depths": (1, 1, 2, 1),
    "window_size": 5,
    "projection_dim": 20,
}
ENTRY = replace(
    BACKBONES["medimageinsight"],
    tokens={"cls": 20, "mean": 32},
    load=tower(SMALL).load,
)


@pytest.fixture
def released(recipe_tensors) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """The released file in small, text side and all."""
    with np.load(FIXTURE) as fixture:
        shapes = {
            str(name): tuple(map(int, str(shape).split(",")))
            for name, shape in zip(fixture["names"], fixture["shapes"], strict=True)
        }
    text = {
        "lang_encoder.token_embedding.weight": torch.ones(5, 3),
        "lang_projection": torch.ones(3, 2),
    }
    return {**recipe_tensors(shapes, 7), **text}


def saved(tensors: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "2024.09.27" / "vision_model" / "medimageinsigt-v1.0.0.pt"
    path.parent.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def older_name(name: str) -> str:
    """A name of the released file in the generation before it."""
    for pattern, replacement in (
        (r"^image_projection$", "vision_projection"),
        (r"^image_encoder\.", "visual."),
        (r"\.convs\.", ".conv_embeds."),
        (r"\.blocks\.", ".main_blocks."),
        (r"(window|channel)_attn\.norm\.", "norm1."),
        (r"(window|channel)_attn\.fn\.", "attn."),
        (r"\.ffn\.norm\.", ".norm2."),
        (r"\.ffn\.fn\.net\.", ".mlp."),
        (r"\.conv1\.fn\.dw\.", ".cpe.0.proj."),
        (r"\.conv2\.fn\.dw\.", ".cpe.1.proj."),
        (r"\.spatial_block\.", ".0."),
        (r"\.channel_block\.", ".1."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def check_parity(weights: Path) -> None:
    backbone = load_backbone(ENTRY, weights)
    pixels = np.random.RandomState(8).random_sample((2, 3, 72, 60)).astype(np.float32)
    with np.load(FIXTURE) as fixture, torch.no_grad():
        tokens = backbone.module(torch.from_numpy(pixels))
        np.testing.assert_allclose(tokens["cls"], fixture["embedding"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(tokens["mean"], fixture["mean"], rtol=1e-5, atol=1e-5)


def test_gives_what_the_released_modules_give(released: dict[str, Tensor], tmp_path: Path) -> None:
    check_parity(saved(released, tmp_path))


def test_finds_the_released_file_in_its_folder(released: dict[str, Tensor], tmp_path: Path) -> None:
    saved(released, tmp_path)
    check_parity(tmp_path)


def test_reads_the_older_names(released: dict[str, Tensor], tmp_path: Path) -> None:
    check_parity(saved({older_name(name): value for name, value in released.items()}, tmp_path))


def test_the_digest_does_not_depend_on_the_generation_of_names(
    released: dict[str, Tensor], tmp_path: Path
) -> None:
    older = {older_name(name): value for name, value in released.items()}
    one, two = (
        load_backbone(ENTRY, saved(tensors, tmp_path / name)).digest
        for name, tensors in (("a", released), ("b", older))
    )
    assert one == two


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_loads_completely_or_not_at_all(
    released: dict[str, Tensor], tmp_path: Path, change: str
) -> None:
    name = "image_encoder.blocks.2.1.channel_block.ffn.fn.net.fc2.bias"
    if change == "missing":
        del released[name]
    else:
        name = "image_encoder.blocks.2.2.channel_block.ffn.fn.net.fc2.bias"
        released[name] = torch.ones(24)
    with pytest.raises(BackboneError, match=change) as caught:
        load_backbone(ENTRY, saved(released, tmp_path))
    assert name.removeprefix("image_encoder.") in str(caught.value)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"medimageinsigt\*\.pt"):
        load_backbone(ENTRY, tmp_path)


def test_at_full_size_it_has_the_stated_parameters_and_width() -> None:
    with torch.device("meta"):
        module = DaViT(SIZES)
        entry = BACKBONES["medimageinsight"]
        assert sum(parameter.numel() for parameter in module.parameters()) == entry.parameters
        assert entry.size_px is not None
        tokens = module.eval()(torch.empty(2, 3, *entry.size_px))
    assert {name: tuple(rows.shape) for name, rows in tokens.items()} == {
        name: (2, width) for name, width in entry.tokens.items()
    }


def test_its_lora_targets_are_the_attention_projections() -> None:
    with torch.device("meta"):
        names = [name for name, _ in DaViT(SIZES).named_modules()]
    pattern = BACKBONES["medimageinsight"].lora_targets["hf"]
    hit = [name for name in names if re.fullmatch(pattern, name)]
    assert len(hit) == 12 * 2 * 2
    assert all(name.endswith(("_attn.qkv", "_attn.proj")) for name in hit)
