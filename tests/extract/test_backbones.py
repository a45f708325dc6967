"""The registry, and the contract that every backbone keeps (`BackboneTests`). No network."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ctfm.extract.backbone import FACTS, Backbone, BackboneEntry
from ctfm.extract.backbones import BACKBONES, get_backbone, get_entry, list_backbones
from ctfm.extract.config import PAPER_WINDOWS_HU
from ctfm.store.errors import BackboneError
from ctfm.store.provenance import canonical_json

Z, Y, X = 5, 60, 72


class BackboneTests:
    """What each backbone does, whatever it is; a subclass names one.

    It is loaded from a small random checkpoint in its genuine layout.
    """

    name: str
    """As `--model` takes it."""

    checkpoint: str | None = "*.safetensors"
    """Pattern of the file with the tensors; None if there is none."""

    @pytest.fixture
    def folder(self, small_backbones: Any, tmp_path: Path) -> Path:
        small_backbones.write(self.name, tmp_path / "weights")
        return tmp_path / "weights"

    @pytest.fixture
    def backbone(self, small_backbones: Any, folder: Path) -> Backbone:
        loaded: Backbone = small_backbones.load(self.name, folder)
        return loaded

    @pytest.fixture
    def channels(self, backbone: Backbone) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        hu = torch.randint(-1000, 1500, (Z, Y, X), generator=generator, dtype=torch.int16)
        entry = backbone.entry
        own = entry.native_windows_hu if entry.own_preprocessing else None
        channels: Tensor = backbone.channels(hu, own or PAPER_WINDOWS_HU)
        return channels

    def test_every_token_has_the_promised_shape_and_is_finite_float32(
        self, backbone: Backbone, channels: Tensor
    ) -> None:
        n_samples = Z if backbone.entry.unit == "slice" else 1
        embedded = backbone.embed(channels)
        assert {name: values.shape for name, values in embedded.items()} == {
            name: (n_samples, d) for name, d in backbone.tokens.items()
        }
        assert all(values.dtype == torch.float32 for values in embedded.values())
        assert all(bool(values.isfinite().all()) for values in embedded.values())

    def test_the_class_token_is_the_first(self, backbone: Backbone) -> None:
        assert next(iter(backbone.tokens)) == "cls"

    def test_samples_do_not_see_each_other(self, backbone: Backbone, channels: Tensor) -> None:
        samples = torch.cat([channels, channels.flip(-1)])
        together = backbone.embed(samples)
        for s in range(len(samples)):
            for name, values in backbone.embed(samples[s : s + 1]).items():
                assert_close(values[0], together[name][s], rtol=1e-5, atol=1e-5)

    def test_loading_twice_gives_the_same_digest_and_embeddings(
        self, backbone: Backbone, channels: Tensor, small_backbones: Any, folder: Path
    ) -> None:
        again = small_backbones.load(self.name, folder)
        assert len(backbone.digest) == 64
        assert again.digest == backbone.digest
        assert torch.equal(again.embed(channels)["cls"], backbone.embed(channels)["cls"])

    def test_settings_are_plain_and_hold_the_digest(self, backbone: Backbone) -> None:
        settings = json.loads(canonical_json(backbone.settings()))
        assert settings["weights"] == backbone.digest
        assert "remote_code" not in settings

    def test_it_is_ready_for_inference_and_nothing_else(self, backbone: Backbone) -> None:
        module = backbone.module
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} <= {"cpu"}
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())

    def test_bfloat16_is_near_float32_where_it_can(
        self, backbone: Backbone, channels: Tensor
    ) -> None:
        if "bfloat16" not in backbone.entry.precisions:
            pytest.skip("it computes in float32 alone")
        single = backbone.embed(channels)["cls"]
        half = backbone.to("cpu", "bfloat16").embed(channels)["cls"]
        assert half.dtype == torch.float32
        assert float((half - single).norm() / single.norm()) < 0.05

    def test_it_loads_completely_or_not_at_all(self, small_backbones: Any, folder: Path) -> None:
        if self.checkpoint is None:
            pytest.skip("it has no weights")
        (file,) = folder.glob(self.checkpoint)
        tensors = load_file(file)
        tower = [name for name in tensors if "language_model" not in name]
        for name in (tower[0], tower[len(tower) // 2], tower[-1]):
            save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
            with pytest.raises(BackboneError):
                small_backbones.load(self.name, folder)
        stray = {f"{tower[len(tower) // 2]}.stray": torch.ones(1)}
        save_file(tensors | stray, file, {"format": "pt"})
        with pytest.raises(BackboneError):
            small_backbones.load(self.name, folder)
        save_file(tensors, file, {"format": "pt"})
        small_backbones.load(self.name, folder)


class TestIntensity(BackboneTests):
    name = "intensity"
    checkpoint = None


class TestDINOv3(BackboneTests):
    name = "dinov3-base"


class TestDINOv3Gated(BackboneTests):
    name = "dinov3-small-plus"


class TestDINOv3GatedWithoutBiases(BackboneTests):
    name = "dinov3-7b"


class TestMedGemma(BackboneTests):
    name = "medgemma"


class TestMedSigLIP(BackboneTests):
    name = "medsiglip"


class TestMedImageInsight(BackboneTests):
    name = "medimageinsight"
    checkpoint = "medimageinsigt-v1.0.0.pt"


class TestPillar0(BackboneTests):
    name = "pillar0-headct"


class TestDeepCNTD(BackboneTests):
    name = "deepcntd"


class TestTimm(BackboneTests):
    name = "timm:test_vit"


class TestHf(BackboneTests):
    name = "hf:org/name"


class TestOpenClip(BackboneTests):
    name = "openclip:org/name"

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("open_clip", reason="open_clip is not installed: ctfm[openclip]")


def test_every_registered_kind_keeps_the_contract() -> None:
    named = {suite.name for suite in BackboneTests.__subclasses__()}
    loaders = {BACKBONES[name].load.__qualname__ for name in named & BACKBONES.keys()}
    assert {entry.load.__qualname__ for entry in BACKBONES.values()} == loaders


@pytest.mark.parametrize("entry", BACKBONES.values(), ids=lambda entry: entry.name)
def test_every_fact_has_a_source(entry: BackboneEntry) -> None:
    usual = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in fields(BackboneEntry)
    }
    optional = {fact for fact in FACTS[-4:] if getattr(entry, fact) == usual[fact]}
    assert set(FACTS) <= usual.keys()
    assert set(FACTS) - optional <= entry.sources.keys() <= set(FACTS) | {"batch_size"}
    assert len(entry.mean) == len(entry.sd)
    assert len(entry.mean) in (0, entry.channels)


def test_a_mistyped_name_is_an_error_with_near_names() -> None:
    with pytest.raises(BackboneError, match="did you mean dinov3-large"):
        get_backbone("dinov3-larg")
    with pytest.raises(BackboneError, match=r"`ctfm models` lists them.*`timm:NAME`.*a \.pt2 or"):
        get_entry("zzz")


def test_the_list_tells_what_is_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = tmp_path / "models--facebook--dinov3-vitb16-pretrain-lvd1689m"
    snapshot = hub / "snapshots" / str(BACKBONES["dinov3-base"].revision)
    snapshot.mkdir(parents=True)
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
