"""`hf:` models against transformers' own output, from local folders. No network."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from hf_folders import write_processor
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    BeitConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma3Config,
    Gemma3Model,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
    YolosConfig,
    YolosModel,
)

from ctfm.extract.backbones import get_backbone, get_entry
from ctfm.store.errors import BackboneError

# peft 0.21 reads it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

S, D = 2, 24
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 3}
WHOLE = {"do_center_crop": False, "resample": 2, "image_mean": 0.5, "image_std": 0.5}
"""An image processor that leaves nothing to its class."""
VIT = ViTConfig(**SIZES, intermediate_size=40, image_size=48, patch_size=16)


def saved(model: Any, folder: Path, **processor: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.eval().save_pretrained(folder)
    config = getattr(model.config, "vision_config", model.config)
    write_processor(folder, getattr(config, "image_size", 224), **processor)
    return model


def test_a_vit_gives_class_token_pooler_and_mean(tmp_path: Path) -> None:
    model = saved(ViTModel(VIT), tmp_path)
    backbone = get_backbone(f"hf:{tmp_path}")
    assert backbone.entry.size_px == (48, 48)
    assert backbone.tokens == {"cls": D, "mean": D, "pooler": D}
    pixels = torch.randn(S, 3, 48, 48)
    with torch.inference_mode():
        expected, got = model(pixels), backbone.module(pixels)
    assert_close(got["cls"], expected.last_hidden_state[:, 0])
    assert_close(got["mean"], expected.last_hidden_state[:, 1:].mean(dim=1))
    assert_close(got["pooler"], expected.pooler_output)


def test_preprocessing_is_that_of_the_image_processor(tmp_path: Path) -> None:
    saved(
        Dinov2Model(Dinov2Config(**SIZES, image_size=56, patch_size=14)),
        tmp_path,
        image_mean=[0.5307, 0.5307, 0.5307],
        image_std=[0.2583, 0.2583, 0.2583],
        size={"shortest_edge": 48},
        do_center_crop=True,
        crop_size={"height": 42, "width": 42},
        resample=3,
    )
    entry = get_backbone(f"hf:{tmp_path}").entry
    assert entry.size_px == (42, 42)
    assert entry.mean == (0.5307,) * 3
    assert entry.sd == (0.2583,) * 3
    assert entry.interpolation == "bicubic"


def test_a_processor_that_normalises_nothing_or_scales_otherwise_is_obeyed(tmp_path: Path) -> None:
    model = ViTModel(VIT)
    saved(model, tmp_path, do_normalize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    entry = get_backbone(f"hf:{tmp_path}").entry
    assert (entry.mean, entry.sd) == ((0.0,) * 3, (1.0,) * 3)
    saved(model, tmp_path, do_normalize=False, rescale_factor=1 / 127.5, rescale_offset=True)
    channels = torch.rand(S, 3, 48, 48)
    check_embeds(tmp_path, channels, model(channels * 255 / 127.5 - 1))
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    saved(model, tmp_path, do_rescale=False, **half)
    check_embeds(tmp_path, channels, model((channels * 255 - 0.5) / 0.25))
    saved(model, tmp_path, rescale_offset=True, **half)
    check_embeds(tmp_path, channels, model((channels - 1 - 0.5) / 0.25))
    saved(model, tmp_path, include_top=True, **half)
    check_embeds(tmp_path, channels, model((channels - 0.5) / 0.25 / 0.25))
    saved(model, tmp_path, image_mean=0.5, image_std=0.25, rescale_factor=None)
    check_embeds(tmp_path, channels, model((channels - 0.5) / 0.25))
    saved(model, tmp_path, do_normalize=False, image_mean=None, image_std=None)
    check_embeds(tmp_path, channels, model(channels))


def check_embeds(folder: Path, channels: torch.Tensor, expected: Any) -> None:
    got = get_backbone(f"hf:{folder}").embed(channels)["cls"]
    assert_close(got, expected.last_hidden_state[:, 0].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("resample", "name"), [(0, "nearest"), (1, "lanczos"), (7, r"an unknown \(7\)")]
)
def test_an_interpolation_that_there_is_not_is_refused(
    tmp_path: Path, resample: int, name: str
) -> None:
    saved(ViTModel(VIT), tmp_path, resample=resample)
    with pytest.raises(BackboneError, match=f"resizes by {name} "):
        get_backbone(f"hf:{tmp_path}")


def test_tokens_of_clip_which_pools_before_its_norm_are_after_it(tmp_path: Path) -> None:
    config = CLIPVisionConfig(**SIZES, intermediate_size=40, image_size=48, patch_size=16)
    own = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
    model = saved(CLIPVisionModel(config), tmp_path, **own)
    backbone = get_backbone(f"hf:{tmp_path}")
    pixels = torch.randn(S, 3, 48, 48)
    with torch.inference_mode():
        expected, got = model(pixels), backbone.module(pixels)
        normed = model.post_layernorm(expected.last_hidden_state)
    assert_close(got["cls"], expected.pooler_output)
    assert_close(got["cls"], got["pooler"])
    assert_close(got["mean"], normed[:, 1:].mean(dim=1))


def test_weights_may_lie_elsewhere_than_the_repository(tmp_path: Path) -> None:
    saved(ViTModel(VIT), tmp_path)
    backbone = get_backbone("hf:org/name", tmp_path)
    assert backbone.entry.hub_id == "org/name"
    assert backbone.name == "hf:org/name"


def test_of_two_towers_the_image_tower_is_kept(tmp_path: Path) -> None:
    tower = {**SIZES, "intermediate_size": 40}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**tower, "image_size": 48, "patch_size": 16},
    )
    model = saved(SiglipModel(config), tmp_path)
    backbone = get_backbone(f"hf:{tmp_path}")
    pixels = torch.randn(S, 3, 48, 48)
    with torch.inference_mode():
        expected = model.vision_model(pixel_values=pixels)
        got = backbone.module(pixels)
    assert_close(got["cls"], expected.pooler_output)
    assert_close(got["mean"], expected.last_hidden_state.mean(dim=1))
    assert backbone.entry.parameters == sum(p.numel() for p in model.vision_model.parameters())


def test_a_convolutional_net_gives_what_it_pools(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model = saved(ResNetModel(config), tmp_path, size=64, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    backbone = get_backbone(f"hf:{tmp_path}")
    channels = torch.rand(S, 3, 64, 64)
    with torch.inference_mode():
        expected = model(channels)
    assert_close(backbone.embed(channels)["cls"], expected.pooler_output.flatten(1))
    assert backbone.tokens["cls"] == 16


def test_a_classifier_is_left_over_and_an_absent_pooler_is_not_invented(tmp_path: Path) -> None:
    model = saved(ViTForImageClassification(VIT), tmp_path)
    backbone = get_backbone(f"hf:{tmp_path}")
    assert list(backbone.tokens) == ["cls", "mean"]
    pixels = torch.randn(S, 3, 48, 48)
    with torch.inference_mode():
        expected = model.vit(pixels).last_hidden_state[:, 0]
        assert_close(backbone.module(pixels)["cls"], expected)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_an_incomplete_or_foreign_checkpoint_is_an_error_that_names_the_tensor(
    tmp_path: Path, fault: str
) -> None:
    saved(ViTModel(VIT), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "embeddings.cls_token"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["decoder.cls_token"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(1, 1, 7)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"\.cls_token"):
        get_backbone(f"hf:{tmp_path}")


CODE = """
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

Path(__file__).with_name("ran").touch()


class OwnConfig(PretrainedConfig):
    model_type = "own"
    num_channels = 3
    image_size = 16


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(3, 7)
        self.post_init()

    def forward(self, pixel_values):
        return BaseModelOutput(last_hidden_state=self.linear(pixel_values.flatten(2).mT))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a model of its own code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(str(tmp_path / "m"))
    folder = tmp_path / "own"
    folder.mkdir()
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    config = {"model_type": "own", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    write_processor(folder, 16, image_mean=0.5, image_std=0.5, resample=2)
    torch.manual_seed(0)
    tensors = {"linear.weight": torch.randn(7, 3), "linear.bias": torch.randn(7)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_of_a_repository_does_not_run_unless_it_is_trusted(own: Path) -> None:
    with pytest.raises(BackboneError, match=r"read the \.py files there, and pass --trust-remote-"):
        get_backbone(f"hf:{own}")
    assert not list(own.parent.rglob("ran"))


def test_code_that_is_trusted_runs_and_its_digest_is_a_setting(own: Path) -> None:
    backbone = get_backbone(f"hf:{own}", trust_remote_code=True)
    assert list(own.parent.rglob("ran"))
    tensors = load_file(own / "model.safetensors")
    channels = torch.rand(S, 3, 16, 16)
    expected = backbone.pixels(channels).mean(dim=(2, 3)) @ tensors["linear.weight"].T
    assert_close(backbone.embed(channels)["mean"], expected + tensors["linear.bias"])
    before = backbone.settings()["remote_code"]
    (own / "own.py").write_text(CODE + "# changed")
    after = get_backbone(f"hf:{own}", trust_remote_code=True).settings()["remote_code"]
    assert len(before) == 64
    assert after != before


VARIANT = """
import torch
from transformers import ViTConfig, ViTModel


class OwnConfig(ViTConfig):
    model_type = "own"


class OwnModel(ViTModel):
    config_class = OwnConfig

    def forward(self, pixel_values):
        %s
"""


def variant(folder: Path, forward: str) -> Any:
    """Turn a repository's model into a ViT with its own way of reading an image; the ViT."""
    model = saved(ViTModel(VIT), folder, **WHOLE)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    own = {**config, "model_type": "own", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text(VARIANT % forward)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_model_that_draws_at_random_is_refused(own: Path) -> None:
    noisy = "torch.nn.functional.dropout(pixel_values, 0.1)"
    variant(own, f"return super().forward({noisy})")
    with pytest.raises(BackboneError, match="draws at random"):
        get_backbone(f"hf:{own}", trust_remote_code=True)


def test_a_model_that_reads_a_number_of_its_input_is_tried_with_its_weights(own: Path) -> None:
    model = variant(own, "return super().forward(pixel_values * float(pixel_values.amin() < 9))")
    pixels = torch.randn(S, 3, 48, 48)
    with torch.inference_mode():
        expected = model(pixels).last_hidden_state[:, 0]
        got = get_backbone(f"hf:{own}", trust_remote_code=True).module(pixels)
    assert_close(got["cls"], expected)


def test_trust_changes_nothing_where_there_is_no_code(tmp_path: Path) -> None:
    saved(ViTModel(VIT), tmp_path)
    trusted = get_backbone(f"hf:{tmp_path}", trust_remote_code=True)
    assert trusted.settings() == get_backbone(f"hf:{tmp_path}").settings()


LARGER = {**SIZES, "intermediate_size": 40, "patch_size": 8}


@pytest.mark.parametrize(
    ("model", "before"),
    [
        (ViTModel(ViTConfig(**LARGER, image_size=(40, 48))), 1),
        (ViTModel(ViTConfig(**LARGER, image_size=(32, 64))), 1),
        (DeiTModel(DeiTConfig(**LARGER, image_size=(32, 64))), 2),
        (
            Dinov2WithRegistersModel(
                Dinov2WithRegistersConfig(
                    **{**LARGER, "patch_size": 14}, image_size=28, num_register_tokens=4
                )
            ),
            5,
        ),
        (DINOv3ViTModel(DINOv3ViTConfig(**LARGER, image_size=24, num_register_tokens=2)), 3),
    ],
    ids=["40x48", "32x64", "deit", "2x2 and registers", "dinov3"],
)
def test_the_mean_is_that_of_every_patch_and_of_nothing_else(
    tmp_path: Path, model: Any, before: int
) -> None:
    saved(model, tmp_path, **WHOLE)
    backbone = get_backbone(f"hf:{tmp_path}")
    assert backbone.entry.size_px is not None
    y, x = backbone.entry.size_px
    pixels = torch.randn(S, 3, y, x)
    with torch.inference_mode():
        hidden, got = model(pixels).last_hidden_state, backbone.module(pixels)
    patch = model.config.patch_size
    patches = hidden[:, -(y // patch) * (x // patch) :]
    assert patches.shape[1] == hidden.shape[1] - before
    assert_close(got["mean"], patches.mean(dim=1))
    assert_close(got["cls"], hidden[:, 0])


def test_without_a_class_token_the_patches_are_summed_up_in_their_mean(tmp_path: Path) -> None:
    model = saved(IJepaModel(IJepaConfig(**LARGER, image_size=(32, 64))), tmp_path)
    backbone = get_backbone(f"hf:{tmp_path}")
    pixels = torch.randn(S, 3, 32, 64)
    with torch.inference_mode():
        hidden, got = model(pixels).last_hidden_state, backbone.module(pixels)
    assert hidden.shape[1] == 4 * 8
    assert_close(got["cls"], hidden.mean(dim=1))
    assert_close(got["mean"], hidden.mean(dim=1))


def test_patches_that_are_merged_on_the_way_are_places_too(tmp_path: Path) -> None:
    config = SwinConfig(
        image_size=(32, 48),
        patch_size=4,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    )
    model = saved(SwinModel(config), tmp_path)
    pixels = torch.randn(S, 3, 32, 48)
    with torch.inference_mode():
        expected = model(pixels)
        got = get_backbone(f"hf:{tmp_path}").module(pixels)
    assert expected.last_hidden_state.shape[1] == 4 * 6
    assert_close(got["mean"], expected.last_hidden_state.mean(dim=1))
    assert_close(got["cls"], expected.pooler_output)


def test_tokens_that_are_neither_patches_nor_known_are_refused(tmp_path: Path) -> None:
    model = YolosModel(YolosConfig(**LARGER, image_size=[32, 48], num_detection_tokens=5))
    saved(model, tmp_path, do_pad=False)
    with pytest.raises(BackboneError, match=r"\(30, 24\) for an image of 32 × 48 pixels: which of"):
        get_backbone(f"hf:{tmp_path}")


def gemma_3() -> Any:
    sizes = {**SIZES, "intermediate_size": 40}
    text = {**sizes, "vocab_size": 50, "head_dim": 8, "num_key_value_heads": 1}
    vision = {**sizes, "image_size": 28, "patch_size": 7}
    return Gemma3Model(Gemma3Config(text_config=text, vision_config=vision))


def siglip_2() -> Any:
    return Siglip2VisionModel(Siglip2VisionConfig(**LARGER, num_patches=16))


def v_jepa_2() -> Any:
    small = {"crop_size": 32, "frames_per_clip": 4, "patch_size": 16, "mlp_ratio": 2}
    pred = {"pred_hidden_size": 24, "pred_num_attention_heads": 3, "pred_num_hidden_layers": 1}
    return VJEPA2Model(VJEPA2Config(**SIZES, **small, **pred))


@pytest.mark.parametrize("model", [siglip_2, v_jepa_2, gemma_3])
def test_a_model_that_takes_more_than_an_image_is_refused_with_what_it_said(
    tmp_path: Path, model: Any
) -> None:
    saved(model(), tmp_path, **WHOLE, size=28)
    with pytest.raises(BackboneError, match=r"alone \((?:Type|Value)Error: .*one image at a time"):
        get_backbone(f"hf:{tmp_path}")


def test_a_size_that_the_model_refuses_is_an_error(tmp_path: Path) -> None:
    saved(ViTModel(VIT), tmp_path, size=64)
    with pytest.raises(BackboneError, match=r"\(3, 64, 64\) alone \(ValueError: .*64\*64"):
        get_backbone(f"hf:{tmp_path}")


def test_a_masked_autoencoder_is_refused_and_is_right_as_a_vit(tmp_path: Path) -> None:
    """Its encoder hides three patches of four at random; a ViT with the same weights hides none."""
    sizes = {**SIZES, "intermediate_size": 40, "image_size": 48, "patch_size": 16}
    model = saved(ViTMAEModel(ViTMAEConfig(**sizes, mask_ratio=0.75)), tmp_path)
    with pytest.raises(
        BackboneError, match=r'ViT-MAE, which hides patches.*write "model_type": "vit"'
    ):
        get_backbone(f"hf:{tmp_path}")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    model.config.mask_ratio = 0.0
    pixels = torch.randn(S, 3, 48, 48)
    with torch.inference_mode():
        whole = model(pixels, noise=torch.arange(9.0).expand(S, 9)).last_hidden_state
        got = get_backbone(f"hf:{tmp_path}").module(pixels)
    assert_close(got["cls"], whole[:, 0])
    assert_close(got["mean"], whole[:, 1:].mean(dim=1))


def with_adapter(folder: Path, *, merged: bool) -> Any:
    """A model's weights in the folder of its adapter, merged or not; and the model."""
    model = saved(ViTModel(VIT), folder)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped: Any = peft.get_peft_model(ViTModel(VIT), lora)
    wrapped.load_state_dict(
        {f"base_model.model.{n}": t for n, t in model.state_dict().items()}, strict=False
    )
    wrapped.save_pretrained(folder)
    if merged:
        wrapped.merge_and_unload().save_pretrained(folder)
    return model


@pytest.mark.parametrize("merged", [True, False])
def test_weights_beside_an_adapter_are_refused_with_both_ways_out(
    tmp_path: Path, merged: bool
) -> None:
    with_adapter(tmp_path, merged=merged)
    with pytest.raises(BackboneError, match=r"take adapter_config\.json out .*pass that as --adap"):
        get_backbone(f"hf:{tmp_path}")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    module: Any = get_backbone(f"hf:{tmp_path}").module
    assert not [name for name, _ in module.named_parameters() if "lora" in name]


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    with_adapter(tmp_path, merged=False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"is an adapter and no model: .*as --adapter"):
        get_backbone(f"hf:{tmp_path}")


def in_timms_layout(name: str, folder: Path, **changed: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    timm.models.save_for_hf(model, folder, model_config={"pretrained_cfg": changed})
    return model


def test_a_repository_in_timms_layout_is_what_timm_makes_of_it(tmp_path: Path) -> None:
    changed = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    model = in_timms_layout("test_vit", tmp_path, **changed)
    backbone = get_backbone("hf:org/name", tmp_path)
    assert (backbone.name, backbone.entry.hub_id) == ("hf:org/name", "org/name")
    assert backbone.entry.size_px == (160, 160)
    assert backbone.entry.mean == (0.1, 0.2, 0.3)
    assert backbone.entry.sd == (0.4, 0.5, 0.6)
    assert backbone.entry.interpolation == "bilinear"
    pixels = torch.randn(S, 3, 160, 160)
    with torch.inference_mode():
        features = model.forward_features(pixels)
        got = backbone.module(pixels)
    assert_close(got["cls"], features[:, 0])
    assert_close(got["mean"], features[:, 1:].mean(dim=1))


def test_of_registers_without_a_class_token_none_is_taken_for_one(tmp_path: Path) -> None:
    model = in_timms_layout("test_vit4", tmp_path)
    assert model.cls_token is None
    assert model.num_prefix_tokens == 1
    backbone = get_backbone(f"hf:{tmp_path}")
    pixels = torch.randn(S, 3, 160, 160)
    with torch.inference_mode():
        features = model.forward_features(pixels)
        got = backbone.module(pixels)
        assert_close(got["cls"], model.forward_head(features, pre_logits=True))
        assert_close(got["mean"], model.fc_norm(features[:, 1:].mean(dim=1)))


def test_a_timm_model_saved_by_transformers_is_one_too(tmp_path: Path) -> None:
    config = TimmWrapperConfig(architecture="test_vit")
    model = saved(TimmWrapperModel(config), tmp_path)
    with pytest.raises(BackboneError, match="has no whole pretrained_cfg"):
        get_backbone(f"hf:{tmp_path}")
    written = json.loads((tmp_path / "config.json").read_text())
    facts = {"input_size": [3, 160, 160], "mean": [0.1] * 3, "std": [0.2] * 3}
    (tmp_path / "config.json").write_text(json.dumps({**written, "pretrained_cfg": facts}))
    backbone = get_backbone(f"hf:{tmp_path}")
    assert backbone.entry.mean == (0.1,) * 3
    pixels = torch.randn(S, 3, 160, 160)
    with torch.inference_mode():
        expected = model(pixels).last_hidden_state[:, 0]
        assert_close(backbone.module(pixels)["cls"], expected)


def test_code_of_yet_another_repository_is_refused(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--own.OwnModel"
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"code of another repository \(someone/else--own"):
        get_backbone(f"hf:{own}", trust_remote_code=True)


def test_a_pickled_checkpoint_of_tensors_gives_the_same(tmp_path: Path) -> None:
    model = saved(ViTModel(VIT), tmp_path)
    backbone = get_backbone(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    pickled = get_backbone(f"hf:{tmp_path}")
    assert pickled.digest == backbone.digest
    torch.save({"model": model}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="holds more than tensors"):
        get_backbone(f"hf:{tmp_path}")


def test_a_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no config\.json"):
        get_backbone("hf:org/name", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"auto_map": 3}'])
def test_a_config_that_is_none_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BackboneError, match="is no configuration of transformers"):
        get_backbone(f"hf:{tmp_path}")


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved(ViTForImageClassification(VIT), tmp_path)
    capfd.readouterr()
    get_backbone(f"hf:{tmp_path}")
    assert capfd.readouterr() == ("", "")


TOWER = {**SIZES, "intermediate_size": 40, "image_size": 32, "patch_size": 16}
TEXT = {**SIZES, "intermediate_size": 40, "vocab_size": 50}


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_classifier_on_an_image_tower_needs_no_text_tower(tmp_path: Path, name: str) -> None:
    kind = getattr(transformers, f"{name}ForImageClassification")
    config = getattr(transformers, f"{name}Config")(vision_config=TOWER, text_config=TEXT)
    model = saved(kind(config), tmp_path, **WHOLE)
    backbone = get_backbone(f"hf:{tmp_path}")
    assert "left out: classifier.bias, classifier.weight" in backbone.remarks
    pixels = torch.randn(S, 3, 32, 32)
    with torch.inference_mode():
        expected = model.vision_model(pixels).pooler_output
        assert_close(backbone.module(pixels)["pooler"], expected)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(n for n in tensors if n.startswith("vision_model.") and n.endswith("fc1.bias"))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"1 missing \(vision_model"):
        get_backbone(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "base", "config"),
    [
        ("ViTForMaskedImageModeling", "vit", VIT),
        ("BeitForMaskedImageModeling", "beit", BeitConfig(**TOWER, vocab_size=20)),
    ],
)
def test_what_a_class_has_beside_its_base_is_left_out(
    tmp_path: Path, name: str, base: str, config: Any
) -> None:
    model = saved(getattr(transformers, name)(config), tmp_path, **WHOLE)
    backbone = get_backbone(f"hf:{tmp_path}")
    size = config.image_size
    pixels = torch.randn(S, 3, size, size)
    with torch.inference_mode():
        expected = getattr(model, base)(pixels).last_hidden_state[:, 0]
        assert_close(backbone.module(pixels)["cls"], expected)
    assert any(remark.startswith("left out: ") for remark in backbone.remarks)


def test_the_projection_of_a_clip_tower_is_left_out(tmp_path: Path) -> None:
    saved(transformers.CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER)), tmp_path, **WHOLE)
    assert "left out: visual_projection.weight" in get_backbone(f"hf:{tmp_path}").remarks


@pytest.mark.parametrize("sd", [0, [0.5, 0.0, 0.5], -1])
def test_a_deviation_of_zero_is_refused(tmp_path: Path, sd: Any) -> None:
    saved(ViTModel(VIT), tmp_path, **{**WHOLE, "image_std": sd})
    with pytest.raises(BackboneError, match="an sd more than 0"):
        get_entry(f"hf:{tmp_path}")
