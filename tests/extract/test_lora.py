"""LoRA: merged as PEFT applies it, in every layout; wrong adapters are refused by name."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ctfm.extract import dinov3 as dinov3_family
from ctfm.extract import siglip as siglip_family
from ctfm.extract.backbone import Backbone, load_backbone
from ctfm.extract.backbones import BACKBONES, get_backbone
from ctfm.extract.davit import DaViT, Sizes
from ctfm.extract.lora import merge_adapter
from ctfm.store.errors import BackboneError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

DINOV3 = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_register_tokens": 4,
}
SIGLIP = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 7,
    "image_size": 28,
    "vision_use_head": True,
}
DAVIT: Sizes = {
    "embed_dim": (8, 16, 24, 32),
    "num_heads": (2, 2, 3, 4),
    "num_groups": (2, 4, 3, 8),
    "depths": (1, 1, 2, 1),
    "window_size": 5,
    "projection_dim": 20,
}


def dinov3(folder: Path) -> Backbone:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**DINOV3)).save_pretrained(folder)
    entry = replace(
        BACKBONES["dinov3-base"],
        tokens={"cls": 24, "mean": 24},
        size_px=(48, 48),
        load=dinov3_family.tower(DINOV3).load,
    )
    return load_backbone(entry, folder)


def medsiglip(folder: Path) -> Backbone:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).save_pretrained(folder)
    entry = replace(
        BACKBONES["medsiglip"],
        tokens={"cls": 24, "mean": 24},
        size_px=(28, 28),
        load=siglip_family.tower(SIGLIP).load,
    )
    return load_backbone(entry, folder)


def medimageinsight(folder: Path) -> Backbone:
    torch.manual_seed(0)
    module = DaViT(DAVIT).eval().requires_grad_(False)
    nn.init.normal_(module.image_projection)
    return Backbone(
        entry=replace(BACKBONES["medimageinsight"], size_px=(72, 60)),
        module=module,
        digest="",
        tokens={"cls": 20, "mean": 32},
        device=torch.device("cpu"),
    )


def timm_vit(folder: Path) -> Backbone:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    return get_backbone("timm:vit_tiny_patch16_224", folder)


Make = Callable[[Path], Backbone]
CASES: dict[str, tuple[Make, str, str]] = {
    "dinov3": (dinov3, r".*layer\.\d+\.attention\.[qkvo]_proj", "embeddings.patch_embeddings"),
    "medsiglip": (
        medsiglip,
        r".*encoder\.layers\.\d+\.self_attn\.(?:[qkv]|out)_proj",
        "embeddings.patch_embedding",
    ),
    "medimageinsight": (medimageinsight, r".*_attn\.(?:qkv|proj)", "convs.0.conv"),
    "timm": (timm_vit, r"blocks\.\d+\.attn\.(?:qkv|proj)", "patch_embed.proj"),
}


def write_adapter(model: Any, targets: str, folder: Path, **settings: Any) -> Any:
    """A PEFT adapter with random weights, written by PEFT; the model that carries it."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets, **settings})
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped


def tokens_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    assert backbone.entry.size_px is not None
    channels = torch.rand(3, 3, *backbone.entry.size_px, generator=torch.Generator().manual_seed(9))
    return backbone.embed(channels)


@pytest.mark.parametrize("scaling", [{}, {"use_rslora": True}, {"alpha_pattern": {".*proj": 7}}])
@pytest.mark.parametrize("case", CASES)
def test_gives_the_tokens_that_peft_gives(
    case: str, scaling: dict[str, Any], tmp_path: Path
) -> None:
    make, attention, patches = CASES[case]
    carried = make(tmp_path / "base")
    write_adapter(
        carried.module.model,
        rf"(?:{attention}|(?:.*\.)?{re.escape(patches)})",
        tmp_path / "adapter",
        **scaling,
    )
    expected = tokens_of(carried)  # PEFT put its branches into the module
    plain = tokens_of(make(tmp_path / "base"))
    merged = merge_adapter(make(tmp_path / "base"), tmp_path / "adapter")
    for token, rows in tokens_of(merged).items():
        torch.testing.assert_close(rows, expected[token], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rows, plain[token], rtol=1e-2, atol=1e-2)
    assert merged.adapter is not None
    assert merged.adapter.max_relative_error < 1e-5


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the small DINOv3, in transformers' layout."""
    backbone = dinov3(tmp_path / "base")
    write_adapter(backbone.module.model, CASES["dinov3"][1], tmp_path / "adapter")
    return tmp_path / "adapter"


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def test_names_of_another_version_of_transformers_are_understood(
    adapter: Path, tmp_path: Path
) -> None:
    merged = merge_adapter(dinov3(tmp_path / "base"), adapter)
    rename(adapter, lambda name: name.replace(".model.model.layer.", ".model.layer."))
    other = merge_adapter(dinov3(tmp_path / "base"), adapter)
    assert torch.equal(tokens_of(merged)["cls"], tokens_of(other)["cls"])


def test_an_adapter_of_another_layout_is_refused_naming_both(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"transformers' names.*timm's names"):
        merge_adapter(timm_vit(tmp_path / "timm"), adapter)


def test_an_adapter_that_lacks_half_a_pair_is_refused(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, file)
    with pytest.raises(BackboneError, match="without a pair"):
        merge_adapter(dinov3(tmp_path / "base"), adapter)


def test_an_adapter_of_another_width_is_refused(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {
        name: tensor[:, :-1].contiguous() if "lora_A" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    with pytest.raises(BackboneError, match="do not fit"):
        merge_adapter(dinov3(tmp_path / "base"), adapter)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_dora", True), ("bias", "all"), ("modules_to_save", ["norm"]), ("peft_type", "IA3")],
)
def test_what_cannot_be_merged_is_refused_by_name(
    adapter: Path, tmp_path: Path, setting: str, value: Any
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    with pytest.raises(BackboneError, match=setting if setting != "peft_type" else "IA3"):
        merge_adapter(dinov3(tmp_path / "base"), adapter)


def test_a_pickled_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BackboneError, match="pickle"):
        merge_adapter(dinov3(tmp_path / "base"), adapter)


def test_a_merge_that_changes_the_tokens_is_refused(tmp_path: Path) -> None:
    # The pooling head's attention reads this weight past the module, so PEFT's branch has no
    # effect there, while a merged weight has one.
    backbone = medsiglip(tmp_path / "base")
    write_adapter(backbone.module.model, r".*head\.attention\.out_proj", tmp_path / "adapter")
    with pytest.raises(BackboneError, match="other tokens than unmerged"):
        merge_adapter(medsiglip(tmp_path / "base"), tmp_path / "adapter")


def test_a_second_adapter_on_top_is_refused(adapter: Path, tmp_path: Path) -> None:
    merged = merge_adapter(dinov3(tmp_path / "base"), adapter)
    with pytest.raises(ConfigError, match="freshly loaded"):
        merge_adapter(merged, adapter)


def test_the_adapter_decides_the_settings_and_says_what_it_saw(
    adapter: Path, tmp_path: Path
) -> None:
    (adapter / "ctfm_training.json").write_text(json.dumps({"scan_ids": ["c1"]}))
    merged = merge_adapter(dinov3(tmp_path / "base"), adapter)
    plain = dinov3(tmp_path / "base")
    assert merged.adapter is not None
    assert merged.settings() == {**plain.settings(), "adapter": merged.adapter.digest}
    assert merged.adapter.scan_ids == {"c1"}
    assert not merged.adapter.patient_ids
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 6}))
    other = merge_adapter(dinov3(tmp_path / "base"), adapter)
    assert other.adapter is not None
    assert other.adapter.digest != merged.adapter.digest
