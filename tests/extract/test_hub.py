"""Repositories of the hub, from a cache that is laid out as huggingface_hub does. No network."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from ctfm.extract.hub import cached_folder, hub_folder
from ctfm.extract.weight_files import commit_of
from ctfm.store.errors import BackboneError


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"weight": torch.ones(3, 5)}


def cache_snapshot(cache: Path, hub_id: str, tensors: dict[str, Tensor]) -> Path:
    """The layout of a hub cache, as huggingface_hub writes it."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(tensors, snapshot / "model.safetensors")
    return snapshot


def test_the_cache_is_used_without_network(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = cache_snapshot(tmp_path, "org/toy", tensors)
    assert cached_folder("org/toy", revision=None) == snapshot
    assert hub_folder("org/toy", revision=None, gated=True) == snapshot
    assert cached_folder("org/toy", revision="0" * 40) == snapshot
    assert cached_folder("org/toy", revision="1" * 40) is None
    assert cached_folder("org/other", revision=None) is None


def test_a_half_downloaded_checkpoint_is_not_cached(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = cache_snapshot(tmp_path, "org/toy", tensors)
    (snapshot / "model.safetensors").unlink()
    assert cached_folder("org/toy", revision=None) is None


@pytest.mark.parametrize("gated", [True, False])
def test_without_cache_and_network_the_message_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="not in the hub cache") as caught:
        hub_folder("org/toy", revision=None, gated=gated)
    assert "--weights FOLDER" in str(caught.value)
    assert ("accept the licence" in str(caught.value)) == gated
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)


def test_another_revision_in_the_cache_is_named_and_not_used(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = cache_snapshot(tmp_path, "org/toy", tensors)
    with pytest.raises(BackboneError, match=r"org/toy at revision 1{40} are not") as caught:
        hub_folder("org/toy", revision="1" * 40, gated=True)
    assert f"holds another revision: {snapshot}" in str(caught.value)


def test_the_commit_of_a_snapshot_is_its_name(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    assert commit_of(cache_snapshot(tmp_path, "org/toy", tensors)) == "0" * 40
    assert commit_of(tmp_path / "snapshots" / "main") is None
    assert commit_of(tmp_path / ("0" * 40)) is None


TOWER = re.compile(r"vision\.")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A repository in shards, of which one holds nothing of the image tower."""
    folder = tmp_path / "remote"
    folder.mkdir()
    names = {"vision.a": "one.safetensors", "vision.b": "two.safetensors", "text": "3.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for name, file in names.items():
        save_file({name: torch.ones(1)}, folder / file)
    return folder


def test_of_a_tower_only_the_shards_that_hold_it_are_fetched(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"

    def download(hub_id: str, *, allow_patterns: list[str], **more: object) -> str:
        if "local_files_only" in more:
            raise OSError("nothing is cached")
        there.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in sharded.glob(pattern):
                shutil.copy(file, there)
        return str(there)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = hub_folder("org/toy", revision=None, gated=False, tower=TOWER)
    assert {file.name for file in folder.glob("*.safetensors")} == {
        "one.safetensors",
        "two.safetensors",
    }


def test_a_tower_is_cached_if_its_shards_are(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = cache_snapshot(tmp_path, "org/toy", {"a": torch.ones(1)})
    (snapshot / "model.safetensors").unlink()
    for name in ("model.safetensors.index.json", "one.safetensors"):
        shutil.copy(sharded / name, snapshot)
    assert cached_folder("org/toy", revision=None, tower=TOWER) is None
    shutil.copy(sharded / "two.safetensors", snapshot)
    assert cached_folder("org/toy", revision=None, tower=TOWER) == snapshot
    assert cached_folder("org/toy", revision=None) is None
