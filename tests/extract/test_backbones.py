"""The registry, and the contract that every registered kind of backbone keeps. No network."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from ctfm.extract.backbone import FACTS, Backbone, BackboneEntry, load_backbone
from ctfm.extract.backbones import BACKBONES, get_backbone, get_entry, list_backbones
from ctfm.extract.dinov3 import load_dinov3
from ctfm.store.errors import BackboneError

WINDOWS = ((0.0, 80.0), (-20.0, 180.0), (-800.0, 2000.0))
S, Y, X = 5, 60, 72
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_register_tokens": 4}


def dinov3(folder: Path) -> Backbone:
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**TINY)).save_pretrained(folder)
    entry = replace(
        BACKBONES["dinov3-base"],
        tokens={"cls": 32, "mean": 32},
        size_px=(64, 64),
        load=partial(load_dinov3, sizes=TINY),
    )
    return load_backbone(entry, folder)


def hf(folder: Path) -> Backbone:
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**TINY, image_size=64)).save_pretrained(folder)
    return get_backbone(f"hf:{folder}")


def timm_model(folder: Path) -> Backbone:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    return get_backbone("timm:test_vit", folder)


def intensity(folder: Path) -> Backbone:
    return get_backbone("intensity")


KINDS: list[Callable[[Path], Backbone]] = [dinov3, hf, timm_model, intensity]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Backbone]:
    return lambda: request.param(tmp_path)


@pytest.fixture
def hu() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-1000, 1500, (S, Y, X), generator=generator, dtype=torch.int16)


def test_every_token_has_the_promised_shape_and_is_finite_float32(
    load: Callable[[], Backbone], hu: Tensor
) -> None:
    backbone = load()
    embedded = backbone.embed(backbone.channels(hu, WINDOWS))
    assert {name: values.shape for name, values in embedded.items()} == {
        name: (S, d) for name, d in backbone.tokens.items()
    }
    assert all(values.dtype == torch.float32 for values in embedded.values())
    assert all(bool(values.isfinite().all()) for values in embedded.values())


def test_the_class_token_is_the_first(load: Callable[[], Backbone]) -> None:
    assert next(iter(load().tokens)) == "cls"


def test_slices_do_not_see_each_other(load: Callable[[], Backbone], hu: Tensor) -> None:
    backbone = load()
    channels = backbone.channels(hu, WINDOWS)
    together = backbone.embed(channels)
    for s in range(S):
        alone = backbone.embed(channels[s : s + 1])
        for name, values in alone.items():
            assert_close(values[0], together[name][s], rtol=1e-5, atol=1e-5)


def test_loading_twice_gives_the_same_digest_and_embeddings(
    load: Callable[[], Backbone], hu: Tensor
) -> None:
    first, second = load(), load()
    assert len(first.digest) == 64
    assert first.digest == second.digest
    channels = first.channels(hu, WINDOWS)
    assert torch.equal(first.embed(channels)["cls"], second.embed(channels)["cls"])


@pytest.mark.parametrize("entry", BACKBONES.values(), ids=lambda entry: entry.name)
def test_every_fact_has_a_source(entry: BackboneEntry) -> None:
    assert set(FACTS) <= entry.sources.keys()
    assert set(FACTS) <= {field.name for field in fields(BackboneEntry)}
    assert len(entry.mean) == len(entry.sd)
    assert len(entry.mean) in (0, entry.channels)


def test_a_mistyped_name_is_an_error_with_near_names() -> None:
    with pytest.raises(BackboneError, match="did you mean dinov3-large"):
        get_backbone("dinov3-larg")
    with pytest.raises(BackboneError, match=r"`ctfm models` lists them.*`timm:NAME`"):
        get_entry("zzz")


def test_the_list_tells_what_is_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = tmp_path / "models--facebook--dinov3-vitb16-pretrain-lvd1689m"
    snapshot = hub / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    save_file({"a": torch.zeros(1)}, snapshot / "model.safetensors")
    listed = {line.entry.name: line.weights for line in list_backbones()}
    assert listed == {
        **dict.fromkeys(BACKBONES, "not downloaded"),
        "intensity": "built in",
        "dinov3-base": "cached",
        "pillar0-headct": "not downloaded",
        "deepcntd": "not published",
    }


def test_weights_that_are_not_to_be_had_are_an_error_that_says_how_to_get_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"accept the licence at https://huggingface\.co/face"):
        get_backbone("dinov3-base")
