"""What a store or a run recorded may be someone else's: it is checked, and fetches nothing."""

import socket
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
from huggingface_hub import constants

from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.one_scan import embed_scan
from ctfm.extract.pipeline import store_settings
from ctfm.extract.recorded import load_recorded, recorded_config
from ctfm.store.errors import BackboneError, ConfigError

SETTINGS = store_settings(ExtractConfig(backbone="intensity"), get_backbone("intensity"))


@pytest.fixture
def asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Repositories that were asked of a hub that has none of them; the cache is empty."""
    asked: list[str] = []

    def snapshot_download(hub_id: str, *, local_files_only: bool = False, **_: Any) -> NoReturn:
        if not local_files_only:
            asked.append(hub_id)
        raise FileNotFoundError(hub_id)

    def no_network(*_: Any) -> NoReturn:
        raise AssertionError("the network was used")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    return asked


FOREIGN = {
    "hf:somebody/planted": "somebody/planted",
    "openclip:somebody/planted": "somebody/planted",
    "openclip:ViT-B-32.laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "timm:vit_tiny_patch16_224.augreg_in21k": "timm/vit_tiny_patch16_224.augreg_in21k",
    "dinov3-small": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "pillar0-headct": "",
}


@pytest.mark.parametrize("backbone", FOREIGN)
def test_weights_that_are_not_here_are_fetched_only_if_the_user_says_so(
    backbone: str, asked_for: list[str]
) -> None:
    settings = {**SETTINGS, "backbone": backbone}
    for package in ("timm", "open_clip"):
        pytest.importorskip(package)
    with pytest.raises(BackboneError, match=r"nothing was fetched.*--allow-download") as caught:
        load_recorded(settings)
    assert asked_for == []
    assert f"https://huggingface.co/{FOREIGN[backbone]}" in str(caught.value)
    with pytest.raises(BackboneError, match="could not be downloaded"):
        load_recorded(settings, download=True)
    assert {FOREIGN[backbone] or asked_for[0]} == {*asked_for}


@pytest.mark.parametrize(
    "backbone", ["timm:hf_hub:somebody/planted", "http://somewhere/x", "x.pt2"]
)
def test_names_that_are_none_of_a_repository_fetch_nothing(
    backbone: str, asked_for: list[str]
) -> None:
    with pytest.raises(BackboneError):
        load_recorded({**SETTINGS, "backbone": backbone}, download=True)
    assert asked_for == []


def test_a_backbone_without_weights_needs_no_permission(asked_for: list[str]) -> None:
    assert load_recorded(SETTINGS).backbone.name == "intensity"
    assert asked_for == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_slices", 10**9),
        ("max_slices", 1e9),
        ("windows_hu", [["a", "b"]]),
        ("windows_hu", [0, 80]),
        ("backbone", 7),
        ("tokens", []),
        ("slice_mm", "4"),
        ("views", None),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_scan_is_read(
    setting: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"recorded settings are damaged.*{setting}"):
        embed_scan(tmp_path / "no scan", {**SETTINGS, setting: value})


def test_settings_without_a_backbone_are_refused() -> None:
    with pytest.raises(ConfigError, match="have no backbone"):
        recorded_config({name: value for name, value in SETTINGS.items() if name != "backbone"})


def test_rows_of_another_preprocessing_are_not_predicted_with_this_one() -> None:
    with pytest.raises(ConfigError, match="made by preprocessing 1, and this ctfm has 3"):
        recorded_config({**SETTINGS, "preprocessing": 1})


def test_settings_that_ctfm_added_since_do_not_matter() -> None:
    assert recorded_config({**SETTINGS, "of_later": 1}).backbone == "intensity"
