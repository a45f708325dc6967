"""Folders of transformers models whose weights training wrapped, or wrote beside others."""

import json
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


def changed(
    plain: Path, folder: Path, change: Change, *, pickled: bool = False, name: str | None = None
) -> Path:
    for file in plain.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    held = change(load_file(plain / "model.safetensors"))
    if pickled:
        torch.save(held, folder / (name or "pytorch_model.bin"))
    else:
        save_file(held, folder / (name or "model.safetensors"))
    return folder


def same(held: dict[str, Tensor]) -> dict[str, Any]:
    return held


def load(folder: Path, key: str | None = None) -> Backbone:
    return get_backbone(f"hf:{folder}", weights_key=key)


def test_a_classifier_that_is_left_over_is_said(plain: Path) -> None:
    assert load(plain).remarks == ("left out: classifier.bias, classifier.weight",)


@pytest.mark.parametrize(
    ("start", "base", "pickled"),
    [
        ("module.", "dinov2.", False),
        ("_orig_mod.", "", True),
        ("model.", "", False),
        ("state_dict.net.", "dinov2.", True),
    ],
)
def test_what_stands_before_all_names_is_cut_off(
    plain: Path, tmp_path: Path, start: str, base: str, pickled: bool
) -> None:
    def change(held: dict[str, Tensor]) -> dict[str, Any]:
        return {start + name.replace("dinov2.", base): tensor for name, tensor in held.items()}

    loaded = load(changed(plain, tmp_path, change, pickled=pickled))
    assert loaded.digest == load(plain).digest
    said = " ".join(loaded.remarks)
    assert all(part in said for part in (*start.split("."), "left out", "classifier.weight"))


def test_a_head_of_ones_own_is_left_out(plain: Path, tmp_path: Path) -> None:
    head = "cls_head"

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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: {n: t.to(torch.int8) if t.ndim == 2 else t for n, t in held.items()}, "int8"),
        (lambda held: {n: t.to(torch.float8_e4m3fn) for n, t in held.items()}, "float8"),
        (lambda held: {n: torch.empty(0) if "fc1" in n else t for n, t in held.items()}, "ZeRO-3"),
        (lambda held: {"_flat_param": torch.ones(9)}, "flat ones of FSDP"),
    ],
)
def test_what_is_no_weights_as_it_is_is_refused_by_its_cause(
    plain: Path, tmp_path: Path, change: Change, says: str
) -> None:
    with pytest.raises(BackboneError, match=says):
        load(changed(plain, tmp_path, change))


@pytest.mark.parametrize(
    ("name", "pickled"),
    [
        ("model.pt", True),
        ("model.fp16.safetensors", False),
        ("model-00001-of-00001.safetensors", False),
    ],
)
def test_a_checkpoint_that_transformers_does_not_look_for_is_read(
    plain: Path, tmp_path: Path, name: str, pickled: bool
) -> None:
    folder = changed(plain, tmp_path, same, pickled=pickled, name=name)
    assert load(folder).digest == load(plain).digest


def test_what_lies_beside_the_model_that_transformers_reads_is_said(
    plain: Path, tmp_path: Path
) -> None:
    folder = changed(plain, tmp_path, same)
    save_file({"x": torch.ones(1)}, folder / "dino_head.safetensors")
    remarks = load(folder).remarks
    assert "read: model.safetensors; not read, beside it: dino_head.safetensors" in remarks


def test_a_place_without_a_model_says_what_it_is(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"is a file.*into a copy of the model's folder"):
        get_backbone(f"hf:{plain}", plain / "model.safetensors")
    (tmp_path / "checkpoint-20").mkdir()
    changed(plain, tmp_path / "checkpoint-20", same)
    with pytest.raises(BackboneError, match="it holds checkpoints in checkpoint-20"):
        load(tmp_path)


def test_a_quantised_model_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path, same)
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(BackboneError, match=r"is quantised \(compressed-tensors\)"):
        load(folder)


def test_what_a_training_keeps_of_itself_is_left_out(plain: Path, tmp_path: Path) -> None:
    folder = changed(
        plain,
        tmp_path,
        lambda held: {"model": held, "rng_state": torch.get_rng_state(), "epoch": torch.tensor(3)},
        pickled=True,
    )
    loaded = load(folder)
    assert loaded.digest == load(plain).digest
    assert "left out, of the training: epoch, rng_state" in loaded.remarks
