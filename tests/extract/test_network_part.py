"""A network is found in what training leaves around it, or the reason is named. No network."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ctfm.extract.backbone import Backbone, load_backbone
from ctfm.extract.backbones import BACKBONES, get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.dinov3 import tower
from ctfm.extract.network_part import Signature, find_part
from ctfm.extract.pipeline import store_settings
from ctfm.extract.recorded import load_recorded
from ctfm.store.errors import BackboneError, ChoiceError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

SIZES: dict[str, int | bool | str] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_register_tokens": 4,
}
ENTRY = replace(
    BACKBONES["dinov3-base"],
    tokens={"cls": 24, "mean": 24},
    size_px=(32, 32),
    load=tower(SIZES).load,
)
Tensors = dict[str, Tensor]


def tensors_of(seed: int) -> Tensors:
    """A tiny DINOv3 as the hub has it."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(seed)
    held = DINOv3ViTModel(DINOv3ViTConfig(**SIZES)).state_dict()
    return {name.removeprefix("model."): tensor.clone() for name, tensor in held.items()}


@pytest.fixture(scope="module")
def plain() -> Tensors:
    return tensors_of(0)


@pytest.fixture(scope="module")
def other() -> Tensors:
    return tensors_of(1)


@pytest.fixture(scope="module")
def digest(plain: Tensors, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the bare checkpoint."""
    file = tmp_path_factory.mktemp("plain") / "model.safetensors"
    save_file(plain, file)
    return load_backbone(ENTRY, file).digest


def under(start: str, tensors: Tensors) -> Tensors:
    return {start + name: tensor.clone() for name, tensor in tensors.items()}


def saved(held: Mapping[str, Any], folder: Path, name: str = "model.pt") -> Path:
    torch.save(held, folder / name)
    return folder / name


def load(held: Mapping[str, Any], folder: Path, key: str | None = None) -> Backbone:
    return load_backbone(ENTRY, saved(held, folder), weights_key=key)


HEAD = {"weight": torch.ones(5, 24), "bias": torch.zeros(5)}


@pytest.mark.parametrize(
    "start",
    [
        *("module.", "model.", "backbone.", "net.", "encoder.", "_forward_module.", "_orig_mod."),
        *("module._orig_mod.", "model.backbone.", "model.vit.", "module.backbone.model.", "0."),
    ],
)
def test_what_stands_before_all_names_is_cut_off_and_said(
    plain: Tensors, digest: str, tmp_path: Path, start: str
) -> None:
    save_file(under(start, plain), tmp_path / "model.safetensors")
    loaded = load_backbone(ENTRY, tmp_path / "model.safetensors")
    assert loaded.digest == digest
    assert loaded.remarks
    assert all(part in " ".join(loaded.remarks) for part in start.split("."))


@pytest.mark.parametrize(
    "keys", [("state_dict",), ("model",), ("teacher",), ("ema_state_dict",), ("checkpoint", "net")]
)
def test_a_network_is_found_below_the_keys_of_a_mapping(
    plain: Tensors, digest: str, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    held: dict[str, Any] = under("module.", plain)
    for name in reversed(keys):
        held = {name: held, "epoch": 3, "best": 0.5, "optimizer": {"state": {0: torch.ones(2)}}}
    assert load(held, tmp_path).digest == digest


@pytest.mark.parametrize(
    "between", ["_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"]
)
def test_wrappers_of_single_layers_are_cut_out_of_the_names(
    plain: Tensors, digest: str, tmp_path: Path, between: str
) -> None:
    held = {
        f"{between}.backbone." + re.sub(r"(layer.\d+)", rf"\1.{between}", name): tensor
        for name, tensor in plain.items()
    }
    loaded = load(held, tmp_path)
    assert loaded.digest == digest
    assert any(between in remark for remark in loaded.remarks)


@pytest.mark.parametrize(
    ("network", "beside"),
    [
        ("", "classifier"),
        ("", "head"),
        ("", "fc"),
        ("backbone.", "classifier"),
        ("backbone.", "cls_head.0"),
        ("model.backbone.", "model.classifier"),
        ("model.backbone.", "criterion"),
        ("module.encoder.", "module.projector"),
        ("0.", "1"),
        ("model.0.", "model.2"),
    ],
)
def test_a_head_beside_it_is_left_out_and_said(
    plain: Tensors, digest: str, tmp_path: Path, network: str, beside: str
) -> None:
    loaded = load(under(network, plain) | under(f"{beside}.", HEAD), tmp_path)
    assert loaded.digest == digest
    assert f"left out: {beside}.bias, {beside}.weight" in loaded.remarks


@pytest.mark.parametrize(
    ("network", "beside"),
    [
        ("backbone.", "adapt_input"),
        ("1.", "0"),
        ("model.vit.", "model.decoder.0"),
        ("net.", "x_net"),
    ],
)
def test_what_its_input_may_have_gone_through_needs_a_key(
    plain: Tensors, digest: str, tmp_path: Path, network: str, beside: str
) -> None:
    held = under(network, plain) | under(f"{beside}.", HEAD)
    with pytest.raises(ChoiceError, match="no head") as caught:
        load(held, tmp_path)
    assert caught.value.keys == (network.rstrip("."),)
    assert f"--weights-key {network.rstrip('.')}" in str(caught.value)
    assert load(held, tmp_path, key=caught.value.keys[0]).digest == digest


@pytest.mark.parametrize("name", ["decoder.0.weight", "layer.2.norm1.weight", "extra"])
def test_a_strange_tensor_in_the_network_is_an_error(
    plain: Tensors, tmp_path: Path, name: str
) -> None:
    with pytest.raises(BackboneError, match=re.escape(f"1 unexpected ({name})")):
        load({**plain, name: torch.ones(3)}, tmp_path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model", "model_ema"),
        ("state_dict", "state_dict_ema"),
        ("student", "teacher"),
        ("online_model", "ema_model"),
    ],
)
@pytest.mark.parametrize("below", ["", "module.", "backbone."])
def test_two_networks_are_not_guessed_between_and_a_key_chooses(
    plain: Tensors, other: Tensors, digest: str, tmp_path: Path, first: str, second: str, below: str
) -> None:
    held = {first: under(below, other), second: under(below, plain), "epoch": 3}
    with pytest.raises(ChoiceError, match=r"2 times.*--weights-key") as caught:
        load(held, tmp_path)
    assert sorted(caught.value.keys) == sorted((first, second))
    assert load(held, tmp_path, key=first).digest != digest
    chosen = load(held, tmp_path, key=second)
    assert chosen.digest == digest
    assert f"taken: {second}" in chosen.remarks
    assert load(held, tmp_path, key=f"{second}.{below}").digest == digest


def test_of_one_network_in_another_the_keys_name_both(
    plain: Tensors, other: Tensors, digest: str, tmp_path: Path
) -> None:
    held = {**plain, "ema": other}
    with pytest.raises(ChoiceError) as caught:
        load(held, tmp_path)
    assert set(caught.value.keys) == {".", "ema"}
    assert load(held, tmp_path, key=".").digest == digest
    assert load(held, tmp_path, key="ema").digest != digest


def test_a_key_chooses_in_safetensors_and_below_a_key(
    plain: Tensors, other: Tensors, digest: str, tmp_path: Path
) -> None:
    names = under("a.x.", plain) | under("a.y.", other) | under("b.z.", other)
    save_file(names, tmp_path / "model.safetensors")
    with pytest.raises(ChoiceError) as caught:
        load_backbone(ENTRY, tmp_path, weights_key="a")
    assert caught.value.keys == ("a.x", "a.y")
    assert load_backbone(ENTRY, tmp_path, weights_key="a.x").digest == digest


def test_a_key_that_is_not_there_says_which_are(plain: Tensors, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no tensors under 'ema'.*at its top are model"):
        load({"model": plain}, tmp_path, key="ema")


def test_an_average_of_models_is_loaded(plain: Tensors, digest: str, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)).state_dict()
    assert {"n_averaged", "module.weight"} <= averaged.keys()  # so torch names them
    held = under("module.", plain) | {"n_averaged": torch.tensor(3)}
    loaded = load(held, tmp_path)
    assert loaded.digest == digest
    assert "left out, of the training: n_averaged" in loaded.remarks


@pytest.mark.parametrize("targets", [["q_proj"], ["patch_embeddings"]])
def test_an_adapter_that_is_not_merged_is_named(
    plain: Tensors, tmp_path: Path, targets: list[str]
) -> None:
    import peft
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    base: Any = DINOv3ViTModel(DINOv3ViTConfig(**SIZES))
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    with pytest.raises(BackboneError, match=r"not merged.*merge_and_unload.*--adapter"):
        load(wrapped.state_dict(), tmp_path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: {n: v[..., :20] for n, v in t.items()}, "another size of the network"),
        (lambda t: {f"other_{n}": v for n, v in t.items()}, "another network"),
        (lambda t: {**t, "layer.0.mlp.up_proj.weight.absmax": torch.ones(1)}, "quantised"),
        (lambda t: {**t, "layer.0.mlp.up_proj.SCB": torch.ones(1)}, "quantised"),
        (lambda t: {"_flat_param": torch.ones(9)}, "flat ones of FSDP"),
        (
            lambda t: {n: v.to(torch.int8) if "mlp" in n else v for n, v in t.items()},
            "of torch.int8: quantised",
        ),
    ],
)
def test_the_likely_cause_is_named(plain: Tensors, tmp_path: Path, change: Any, cause: str) -> None:
    with pytest.raises(BackboneError, match=cause):
        load(change(plain), tmp_path)


@pytest.mark.parametrize(
    "beside",
    [
        {"callbacks": {"EarlyStopping{}": {"best_score": torch.tensor(0.3)}}},
        {"callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3)}}},
        {"hyper_parameters": {"class_weights": torch.ones(5)}},
        {"optimizer": {"state": {"layer.0.norm1.weight": {"step": torch.tensor(1.0)}}}},
        {"rng_state": torch.get_rng_state(), "torch_rng_states": {"0": torch.get_rng_state()}},
        {"loss_history": torch.ones(9), "best_score": torch.tensor(0.5)},
        {"train_loss": torch.tensor(0.1), "anything": torch.tensor(3)},
        {"lr_scheduler": {"base_lr": torch.tensor(1.0)}, "scaler": {"scale": torch.tensor(2.0)}},
    ],
)
@pytest.mark.parametrize("key", ["state_dict", None])
def test_what_a_training_keeps_of_itself_is_left_out_and_said(
    plain: Tensors, digest: str, tmp_path: Path, beside: dict[str, Any], key: str | None
) -> None:
    held = {key: under("model.", plain)} if key else plain
    loaded = load({**held, **beside}, tmp_path)
    assert loaded.digest == digest
    assert f"left out, of the training: {', '.join(sorted(beside))}" in loaded.remarks


@pytest.mark.parametrize("start", ["exp_avg", "optimizer.exp_avg", "optimizer.state.exp_avg"])
def test_moments_of_an_optimizer_are_not_offered_as_a_network(
    plain: Tensors, digest: str, tmp_path: Path, start: str
) -> None:
    moments = under(f"{start}.", plain) | under(f"{start}_sq.", plain)
    assert load({"model": plain, **moments}, tmp_path).digest == digest


def test_a_lightning_checkpoint_with_plain_settings_is_loaded(
    plain: Tensors, digest: str, tmp_path: Path
) -> None:
    """As pytorch-lightning 2.6 writes it."""
    held = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": under("model.backbone.", plain)
        | under("model.classifier.", HEAD)
        | {"criterion.pos_weight": torch.ones(5), "val_auroc.confmat": torch.ones(2, 2)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-3, "name": "vit"},
    }
    saved(held, tmp_path, "epoch=1-step=20.ckpt")
    loaded = load_backbone(ENTRY, tmp_path)
    assert loaded.digest == digest
    assert any("state_dict.model.classifier.bias" in remark for remark in loaded.remarks)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (Path("a"), "pathlib"),
        (np.float64(0.5), "numpy"),
    ],
)
def test_settings_that_are_objects_are_refused_by_name(
    plain: Tensors, tmp_path: Path, value: object, named: str
) -> None:
    with pytest.raises(BackboneError, match=rf"more than tensors \({named}"):
        load({"state_dict": plain, "hyper_parameters": {"args": value}}, tmp_path)


def test_what_deepspeed_keeps_whole_is_loaded(plain: Tensors, digest: str, tmp_path: Path) -> None:
    held = {"module": plain, "optimizer": None, "ds_version": "0.18", "dp_world_size": 2}
    file = saved(held, tmp_path, "mp_rank_00_model_states.pt")
    assert load_backbone(ENTRY, file).digest == digest


def test_a_tower_of_a_larger_model_is_found_in_what_wraps_the_model(
    small_backbones: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    for name in ("medgemma", "medsiglip", "medimageinsight", "openclip:one", "timm:test_vit"):
        folder = tmp_path / name.replace(":", "-")
        small_backbones.write(name, folder)
        bare = small_backbones.load(name, folder)
        file = next(f for f in folder.iterdir() if f.suffix in (".safetensors", ".pt"))
        tensors = load_file(file)
        save_file(under("module.net.", tensors) | under("head.", HEAD), file)
        wrapped = small_backbones.load(name, folder)
        assert wrapped.digest == bare.digest
        assert not bare.remarks
        assert "cut off the names: module.net." in wrapped.remarks
        assert "left out: head.bias, head.weight" in wrapped.remarks
        save_file(under("net.", tensors) | under("net_ema.", tensors), file)
        with pytest.raises(ChoiceError, match="2 times"):
            small_backbones.load(name, folder)


def test_a_head_of_the_network_itself_is_not_left_out() -> None:
    own = ("stem.weight", "head.norm.weight")
    part = find_part(
        ["m.stem.weight", "m.head.norm.weight", "m.head.fc.weight"],
        Signature(mark=re.compile(r"stem\.weight"), own=own),
        None,
    )
    assert part.names == {name: f"m.{name}" for name in own}
    assert part.remarks == ("cut off the names: m.", "left out: m.head.fc.weight")


def test_a_model_without_a_checkpoint_takes_no_key() -> None:
    with pytest.raises(BackboneError, match="takes no --weights-key"):
        get_backbone("intensity", weights_key="ema")


def test_a_recorded_extraction_finds_the_part_that_made_it_by_its_digest(
    small_backbones: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    small_backbones.write("deepcntd", tmp_path)
    tensors = load_file(tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").unlink()
    ema = {name: tensor * 2 for name, tensor in tensors.items()}
    saved({"model": tensors, "model_ema": ema}, tmp_path, "mine.pt")
    made = get_backbone("deepcntd", tmp_path, weights_key="model_ema")
    entry = made.entry
    config = ExtractConfig(backbone="deepcntd", windows_hu=entry.native_windows_hu or ())
    settings = store_settings(config, made)
    found = load_recorded(settings, weights=tmp_path)
    assert found.backbone.digest == made.digest
    assert found.backbone.remarks == made.remarks
    with pytest.raises(BackboneError, match="under model, model_ema, and none of them has the"):
        load_recorded({**settings, "backbone_weights": "of neither"}, weights=tmp_path)
