"""`hf:` models against transformers' own output, from local folders. No network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import write_processor
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from ctfm.extract.backbones import get_backbone
from ctfm.store.errors import BackboneError

S, D = 2, 24
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 3}
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


@pytest.mark.parametrize(("resample", "name"), [(0, "nearest"), (1, "lanczos"), (7, "7")])
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


def test_trust_changes_nothing_where_there_is_no_code(tmp_path: Path) -> None:
    saved(ViTModel(VIT), tmp_path)
    trusted = get_backbone(f"hf:{tmp_path}", trust_remote_code=True)
    assert trusted.settings() == get_backbone(f"hf:{tmp_path}").settings()


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
