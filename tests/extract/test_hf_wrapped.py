"""Folders of transformers models whose weights training wrapped, or wrote beside others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import write_processor
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctfm.extract.backbone import Backbone
from ctfm.extract.backbones import get_backbone
from ctfm.store.errors import BackboneError, ChoiceError

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 16,
}
Change = Callable[[dict[str, Tensor]], dict[str, Any]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of DINOv2, as transformers saves it."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    Dinov2ForImageClassification(Dinov2Config(**SIZES)).save_pretrained(folder)
    write_processor(folder, 32, do_center_crop=False)
    return folder


def changed(plain: Path, folder: Path, change: Change, *, pickled: bool = False) -> Path:
    for file in plain.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    held = change(load_file(plain / "model.safetensors"))
    if pickled:
        torch.save(held, folder / "pytorch_model.bin")
    else:
        save_file(held, folder / "model.safetensors")
    return folder


def load(folder: Path, key: str | None = None) -> Backbone:
    return get_backbone(f"hf:{folder}", weights_key=key)


def test_a_classifier_that_is_left_over_is_said(plain: Path) -> None:
    assert load(plain).remarks == ("left out: classifier.bias, classifier.weight",)


@pytest.mark.parametrize("start", ["module.", "_orig_mod.", "model.", "state_dict.net."])
@pytest.mark.parametrize("base", ["dinov2.", ""])
@pytest.mark.parametrize("pickled", [False, True])
def test_what_stands_before_all_names_is_cut_off(
    plain: Path, tmp_path: Path, start: str, base: str, pickled: bool
) -> None:
    def change(held: dict[str, Tensor]) -> dict[str, Any]:
        return {start + name.replace("dinov2.", base): tensor for name, tensor in held.items()}

    loaded = load(changed(plain, tmp_path, change, pickled=pickled))
    assert loaded.digest == load(plain).digest
    said = " ".join(loaded.remarks)
    assert all(part in said for part in (*start.split("."), "left out", "classifier.weight"))


@pytest.mark.parametrize("head", ["head", "fc", "cls_head"])
def test_a_head_of_ones_own_is_left_out(plain: Path, tmp_path: Path, head: str) -> None:
    def change(held: dict[str, Tensor]) -> dict[str, Any]:
        return {
            name.replace("dinov2.", "backbone.").replace("classifier.", f"{head}."): tensor
            for name, tensor in held.items()
        }

    loaded = load(changed(plain, tmp_path, change))
    assert loaded.digest == load(plain).digest
    assert f"left out: {head}.bias, {head}.weight" in loaded.remarks


def test_of_two_networks_a_key_chooses(plain: Path, tmp_path: Path) -> None:
    def change(held: dict[str, Tensor]) -> dict[str, Any]:
        return {"model": {n: tensor + 1 for n, tensor in held.items()}, "model_ema": held}

    folder = changed(plain, tmp_path, change, pickled=True)
    with pytest.raises(ChoiceError, match="under model, model_ema"):
        load(folder)
    chosen = load(folder, key="model_ema")
    assert chosen.digest == load(plain).digest
    assert "taken: model_ema" in chosen.remarks


@pytest.mark.parametrize(
    "change",
    [
        lambda held: {n: t for n, t in held.items() if "layer.1.mlp.fc1.bias" not in n},
        lambda held: {f"module.{n}": t for n, t in held.items() if "layer.1.mlp.fc1.bias" not in n},
        lambda held: {**held, "dinov2.encoder.layer.2.norm1.weight": torch.ones(24)},
        lambda held: {f"module.{n}": t for n, t in {**held, "dinov2.x": torch.ones(24)}.items()},
        lambda held: {n: t[:7] if "fc1" in n else t for n, t in held.items()},
    ],
)
def test_what_is_not_whole_is_refused(plain: Path, tmp_path: Path, change: Change) -> None:
    with pytest.raises(BackboneError, match="does not fit its config"):
        load(changed(plain, tmp_path, change))
