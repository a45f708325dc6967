"""`timm:` models against timm's own output, from local checkpoints. No network."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from ctfm.extract.backbone import Asked
from ctfm.extract.backbones import get_backbone
from ctfm.extract.timm_models import timm_entry
from ctfm.store.errors import BackboneError

S = 2


def saved(name: str, folder: Path, *, num_classes: int = 0) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def test_a_vit_gives_its_class_token_and_the_mean_of_its_patches(tmp_path: Path) -> None:
    model = saved("test_vit", tmp_path)
    backbone = get_backbone("timm:test_vit", tmp_path)
    pixels = torch.randn(S, 3, *backbone.entry.size_px or ())
    with torch.inference_mode():
        features = model.forward_features(pixels)
        got = backbone.module(pixels)
    assert features.shape[1] == 1 + 100
    assert_close(got["cls"], features[:, 0])
    assert_close(got["mean"], features[:, 1:].mean(dim=1))
    assert backbone.tokens == {"cls": features.shape[2], "mean": features.shape[2]}


def test_a_model_that_pools_by_attention_gives_what_it_pools(tmp_path: Path) -> None:
    model = saved("test_vit4", tmp_path)
    backbone = get_backbone("timm:test_vit4", tmp_path)
    pixels = torch.randn(S, 3, *backbone.entry.size_px or ())
    with torch.inference_mode():
        assert_close(backbone.module(pixels)["cls"], model(pixels))


def test_a_dinov3_gives_its_class_token_though_timm_would_average(tmp_path: Path) -> None:
    model = saved("vit_tiny_patch16_dinov3_qkvb", tmp_path)
    assert model.global_pool == "avg"
    backbone = get_backbone("timm:vit_tiny_patch16_dinov3_qkvb", tmp_path, tokens=["cls"])
    assert backbone.entry.size_px == (256, 256)
    pixels = torch.randn(S, 3, 64, 64)
    with torch.inference_mode():
        assert_close(backbone.module(pixels)["cls"], model.forward_features(pixels)[:, 0])
    assert backbone.tokens == {"cls": 192}


def test_a_convolutional_net_gives_what_it_pools(tmp_path: Path) -> None:
    model = saved("test_resnet", tmp_path)
    backbone = get_backbone("timm:test_resnet", tmp_path)
    channels = torch.rand(S, 3, 50, 70)
    embedded = backbone.embed(channels)
    with torch.inference_mode():
        assert_close(embedded["cls"], model(backbone.pixels(channels)))
    assert list(embedded) == ["cls"]


def test_facts_are_those_of_timms_data_config() -> None:
    entry = timm_entry(Asked(name="timm:vit_base_patch16_siglip_224"))
    assert entry.size_px == (224, 224)
    assert entry.mean == entry.sd == (0.5, 0.5, 0.5)
    assert entry.interpolation == "bicubic"
    assert entry.hub_id is not None
    assert entry.hub_id.startswith("timm/")
    assert entry.licence == "apache-2.0"
    assert entry.tokens == {"cls": 768, "mean": 768}


def test_a_bicubic_resize_stays_within_0_and_1(tmp_path: Path) -> None:
    saved("test_vit", tmp_path)
    backbone = get_backbone("timm:test_vit", tmp_path)
    channels = (torch.rand(S, 3, 40, 40) > 0.5).float()
    mean, sd = (
        torch.tensor(values).view(3, 1, 1) for values in (backbone.entry.mean, backbone.entry.sd)
    )
    pixels = backbone.pixels(channels) * sd + mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6


def test_the_classifier_of_a_checkpoint_is_dropped(tmp_path: Path) -> None:
    model = saved("test_resnet", tmp_path, num_classes=7)
    backbone = get_backbone("timm:test_resnet", tmp_path)
    held = backbone.module.state_dict()
    assert {name.removeprefix("model.") for name in held} == {
        name for name in model.state_dict() if not name.startswith("fc.")
    }


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_an_incomplete_or_foreign_checkpoint_is_an_error_that_names_the_tensor(
    tmp_path: Path, fault: str
) -> None:
    tensors = timm.create_model("test_vit", num_classes=0).state_dict()
    if fault == "missing":
        del tensors["blocks.0.attn.qkv.bias"]
    else:
        tensors["blocks.99.attn.qkv.bias"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"blocks\.\d+\.attn\.qkv\.bias"):
        get_backbone("timm:test_vit", tmp_path)


def test_an_unknown_model_is_an_error_with_near_names() -> None:
    with pytest.raises(BackboneError, match=r"did you mean .*resnet50"):
        get_backbone("timm:resnet50x")
