"""`timm:` models against timm's own output, from local checkpoints. No network."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ctfm.extract.backbone import Asked
from ctfm.extract.backbones import get_backbone
from ctfm.extract.timm_models import _Model, load_timm, timm_entry
from ctfm.extract.timm_tokens import TimmTokens
from ctfm.store.errors import BackboneError

S = 2


def saved(name: str, folder: Path, *, num_classes: int = 0, **shape: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **shape).eval()
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


@pytest.mark.parametrize(
    ("shape", "fact"),
    [
        ({"img_size": 320}, r"pos_embed is \(1, 401, 64\) there, \(1, 101, 64\) here"),
        ({"img_size": (64, 256)}, r"pos_embed is \(1, 65, 64\) there"),
        ({"patch_size": 8}, "is .* there"),
        ({"patch_size": 8, "img_size": 80}, r"patch_embed.proj.weight is \(64, 3, 8, 8\) there"),
    ],
)
def test_a_checkpoint_of_another_size_is_refused_and_not_resampled(
    tmp_path: Path, shape: dict[str, Any], fact: str
) -> None:
    saved("test_vit", tmp_path, **shape)
    with pytest.raises(BackboneError, match=rf"of another image, patch or window size.*{fact}"):
        get_backbone("timm:test_vit", tmp_path)


def test_a_checkpoint_of_other_names_is_not_resampled_either(tmp_path: Path) -> None:
    """DINOv2's own names: registers and a position of the class token are timm's to rename."""
    name = "vit_small_patch14_reg4_dinov2"
    own = timm.create_model(name, num_classes=0, img_size=28, depth=1).eval()
    tensors = own.state_dict()
    register = tensors.pop("reg_token")
    for grid, fits in ((4, True), (9, False)):
        positions = torch.randn(1, 1 + grid, 384)
        meta = {**tensors, "register_tokens": register, "pos_embed": positions}
        meta |= {"mask_token": torch.zeros(1, 384), "cls_token": torch.zeros(1, 1, 384)}
        save_file(meta, tmp_path / "model.safetensors")
        about = _Model(name=name, args={"img_size": 28, "depth": 1})
        entry = replace(timm_entry(Asked(name=f"timm:{name}")), size_px=(28, 28))
        if not fits:
            with pytest.raises(BackboneError, match="timm would resample it"):
                load_timm(entry, tmp_path, about=about)
            continue
        module: Any = load_timm(entry, tmp_path, about=about).module
        assert_close(module.model.pos_embed, positions[:, 1:])
        assert_close(module.model.cls_token, positions[:, :1])


def test_a_table_of_positions_that_of_another_window_is_refused(tmp_path: Path) -> None:
    small: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "img_size": 32}
    name = "swin_tiny_patch4_window7_224"
    saved(name, tmp_path, window_size=8, **small)
    entry = timm_entry(Asked(name=f"timm:{name}"))
    about = _Model(name=name, args={**small, "window_size": 4})
    with pytest.raises(
        BackboneError, match=r"relative_position_bias_table is \(225, 1\) there, \(49"
    ):
        load_timm(entry, tmp_path, about=about)
    load_timm(entry, tmp_path, about=replace(about, args={**small, "window_size": 8}))


def test_the_config_beside_the_weights_tells_their_shape_and_preprocessing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5, img_size=(64, 96), in_chans=1).eval()
    facts = {"mean": [0.3], "std": [0.4]}
    timm.models.save_for_hf(model, tmp_path, model_config={"pretrained_cfg": facts})
    backbone = get_backbone("timm:test_vit", tmp_path)
    assert backbone.entry.size_px == (64, 96)
    assert (backbone.entry.channels, backbone.entry.mean, backbone.entry.sd) == (1, (0.3,), (0.4,))
    channels = torch.rand(S, 1, 64, 96)
    with torch.inference_mode():
        features = model.forward_features((channels - 0.3) / 0.4)
    embedded = backbone.embed(channels)
    assert_close(embedded["cls"], features[:, 0])
    assert_close(embedded["mean"], features[:, 1:].mean(dim=1))
    with pytest.raises(BackboneError, match=r"is of timm's test_vit, and not of test_vit2"):
        get_backbone("timm:test_vit2", tmp_path)


def test_an_interpolation_that_there_is_not_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=0)
    facts = {"interpolation": "lanczos"}
    timm.models.save_for_hf(model, tmp_path, model_config={"pretrained_cfg": facts})
    with pytest.raises(BackboneError, match="data config resizes by lanczos interpolation"):
        get_backbone("timm:test_vit", tmp_path)


def test_a_config_beside_weights_cannot_say_what_else_is_loaded(tmp_path: Path) -> None:
    model = saved("test_vit", tmp_path)
    args = {"checkpoint_path": "other.pth", "pretrained_strict": False, "pretrained_cfg": {}}
    facts = {"file": "other.pth", "custom_load": True, "mean": [0.1] * 3, "std": [0.2] * 3}
    facts |= {"input_size": [3, 160, 160], "fixed_input_size": True}
    config = {"architecture": "test_vit", "model_args": args, "pretrained_cfg": facts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = get_backbone("timm:test_vit", tmp_path)
    assert backbone.entry.mean == (0.1,) * 3
    assert_close(backbone.module.state_dict()["model.pos_embed"], model.pos_embed.detach())


def test_a_model_with_a_distillation_token_leaves_it_out_of_the_mean(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    model = saved(name, tmp_path)
    pixels = torch.randn(S, 3, 224, 224)
    with torch.inference_mode():
        features, got = model.forward_features(pixels), TimmTokens(model)(pixels)
    assert features.shape[1] == 2 + 196
    assert_close(got["cls"], features[:, 0])
    assert_close(got["mean"], features[:, 2:].mean(dim=1))


class Sequence(nn.Module):
    """As a timm model that keeps a sequence, with as many tokens as it is told."""

    def __init__(self, n_tokens: int, *, class_tokens: int) -> None:
        super().__init__()
        self.tokens = torch.randn(1, n_tokens, 5)
        if class_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, class_tokens, 5))

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.tokens.expand(len(pixels), -1, -1)

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features[:, 0]


def test_tokens_that_are_no_patches_are_not_averaged() -> None:
    pixels = torch.zeros(S, 3, 64, 96)
    coat = Sequence(1 + 2 * 3, class_tokens=0)  # has one, and does not say so
    assert_close(TimmTokens(coat)(pixels)["mean"], coat.tokens[:, 1:].mean(dim=1).expand(S, -1))
    for pit in (Sequence(1, class_tokens=1), Sequence(2, class_tokens=2)):
        got = TimmTokens(pit)(pixels)
        assert list(got) == ["cls"]
        assert_close(got["cls"], pit.tokens[:, 0].expand(S, -1))
    assert list(TimmTokens(Sequence(11, class_tokens=1))(pixels)) == ["cls"]  # of 2 × 5?


def test_a_model_that_gives_several_sequences_is_refused() -> None:
    with pytest.raises(BackboneError, match="CrossVit does not give one sequence or map"):
        timm_entry(Asked(name="timm:crossvit_tiny_240"))


def test_an_unknown_model_is_an_error_with_near_names() -> None:
    with pytest.raises(BackboneError, match=r"did you mean .*resnet50"):
        get_backbone("timm:resnet50x")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_integers_and_eight_bits_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved("test_vit", tmp_path)
    held = {n: t.to(dtype) if t.ndim == 2 else t for n, t in model.state_dict().items()}
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=f"are of {dtype}: quantised"):
        get_backbone("timm:test_vit", tmp_path)
