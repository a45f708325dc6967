"""Pillar-0 head CT from a small folder in the released layout, text side and all."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ctfm.extract.atlas import Atlas
from ctfm.extract.atlas_config import read_config
from ctfm.extract.backbone import default_settings
from ctfm.extract.backbones import get_backbone, get_entry
from ctfm.extract.config import ExtractConfig
from ctfm.extract.prepare import prepare_volume
from ctfm.extract.volume import Volume
from ctfm.store.errors import BackboneError

FIXTURE = Path(__file__).parent / "fixtures" / "atlas_parity.npz"
TEXT = {"model.text.projection.weight": torch.zeros(3, 2), "model.logit_scale": torch.ones(1)}


@pytest.fixture
def config() -> dict[str, object]:
    with np.load(FIXTURE) as arrays:
        described = json.loads(str(arrays["even_config"]))
    return {"model_type": "clip_multimodal_atlas", "vision_cfg": {"model_config": described}}


@pytest.fixture
def reference(config: dict[str, object]) -> Atlas:
    """Its forward is checked against the released modules in test_atlas.py."""
    torch.manual_seed(0)
    return Atlas(read_config(config)).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path, config: dict[str, object], reference: Atlas) -> Path:
    tensors = {f"model.visual.{n}": t.clone() for n, t in reference.state_dict().items()}
    save_file(tensors | TEXT, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def ball(shape: tuple[int, int, int] = (50, 40, 40)) -> Volume:
    """A head of water in a skull, 2.6 mm slices and 5 mm pixels, top 5 mm below the last slice."""
    z, y, x = np.indices(shape, dtype=float)
    radius = np.hypot(np.hypot((z - 20) * 2.6, (y - 20) * 5), (x - 20) * 5)
    hu = np.where(radius < 66, 30, np.where(radius < 72, 900, -1000)).astype(np.int16)
    origin = np.array([[100.0, 100.0, 2.6 * i] for i in range(shape[0])])
    return Volume(
        hu=hu,
        slice_origin_mm=origin,
        row_step_mm=np.array([0, -5.0, 0]),
        column_step_mm=np.array([-5.0, 0, 0]),
    )


def test_the_released_layout_loads_and_the_text_side_is_left_out(
    folder: Path, reference: Atlas
) -> None:
    backbone = get_backbone("pillar0-headct", folder)
    pixels = torch.rand(2, 11, 32, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(backbone.embed(pixels)["cls"], reference(pixels)["cls"])
    assert {t.device.type for t in backbone.module.state_dict().values()} == {"cpu"}
    assert not backbone.module.training


def test_a_file_beside_its_config_loads_to_the_same_digest(folder: Path) -> None:
    of_folder = get_backbone("pillar0-headct", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in TEXT}, folder / "tower.safetensors")
    of_file = get_backbone("pillar0-headct", folder / "tower.safetensors")
    assert of_folder.digest == of_file.digest


def test_the_configuration_decides_size_and_width(folder: Path) -> None:
    backbone = get_backbone("pillar0-headct", folder)
    assert backbone.tokens == backbone.entry.tokens == {"cls": 36}
    assert backbone.entry.size_px == (32, 64, 64)
    assert backbone.entry.parameters == sum(p.numel() for p in backbone.module.parameters())
    config = ExtractConfig(backbone="pillar0-headct", **default_settings(backbone.entry))
    assert (config.size_px, config.max_slices) == (64, 32)
    assert (config.in_plane_mm, config.slice_mm) == (1.0, 1.25)


def test_the_configuration_is_known_before_the_weights_are_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = get_backbone("pillar0-headct", folder).entry
    assert default_settings(get_entry("pillar0-headct", folder)) == default_settings(loaded)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get_entry("pillar0-headct").size_px == (128, 256, 256)
    with pytest.raises(BackboneError, match="not in the hub cache"):
        get_entry("pillar0-headct", download=True)


def test_the_embedding_is_not_normalised(folder: Path) -> None:
    backbone = get_backbone("pillar0-headct", folder)
    embedded = backbone.embed(torch.rand(1, 11, 32, 64, 64))["cls"]
    assert abs(float(embedded.norm()) - 1) > 0.1


def test_a_scan_becomes_eleven_channels_and_one_row(folder: Path) -> None:
    backbone = get_backbone("pillar0-headct", folder)
    defaults = default_settings(backbone.entry) | {"in_plane_mm": 4.0, "slice_mm": 5.0}
    config = ExtractConfig(backbone="pillar0-headct", align="none", **defaults)
    (scan,) = prepare_volume(ball(), config, scan_id="a")
    rows = len(scan.hu)
    assert 15 < rows < 32
    channels = backbone.channels(torch.from_numpy(scan.hu), config.windows_hu)
    assert channels.shape == (1, 11, 32, 64, 64)
    start = (32 - rows) // 2
    outside = (-1 - -1350) / 1500  # -1 HU in the lung window
    assert_close(channels[0, 0, :start], torch.full((start, 64, 64), outside))
    brain = channels[0, 5, start + rows // 2, 32, 32]
    assert_close(brain, torch.tensor(30 / 80))
    assert channels[0, 10].min() == 0
    assert channels[0, 10].max() == 1
    assert backbone.embed(channels)["cls"].shape == (1, 36)


def test_windows_are_in_the_order_of_the_authors() -> None:
    """Centre and width of rad-vision-engine's CT windows, written down as low and high."""
    assert get_entry("pillar0-headct").native_windows_hu == (
        (-1350, 150),
        (-150, 250),
        (-160, 240),
        (5, 155),
        (-500, 1300),
        (0, 80),
        (-32.5, 182.5),
        (20, 60),
        (-800, 2000),
        (-125, 225),
    )


FIRST_LAYER = "atlas_models.0.blocks.0.blocks.2.norm2.weight"


def lose(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"model.visual.{name}")


def gain(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"model.visual.{name}": torch.zeros(2)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose(FIRST_LAYER), rf"1 missing \({FIRST_LAYER}\)"),
        (gain("head.weight"), r"1 unexpected \(head.weight\)"),
        (gain(FIRST_LAYER), rf"1 of another shape \({FIRST_LAYER}\)"),
        (lambda tensors: tensors.clear(), "holds no tensor of this backbone"),
    ],
)
def test_a_tower_that_is_not_complete_is_an_error_that_names_the_tensor(
    folder: Path, damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors | TEXT, folder / "model.safetensors")
    with pytest.raises(BackboneError, match=message):
        get_backbone("pillar0-headct", folder)


def test_without_its_config_nothing_is_guessed(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"no config\.json.*decides the shape"):
        get_backbone("pillar0-headct", folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="is not JSON"):
        get_backbone("pillar0-headct", folder)


def test_a_tower_of_other_channels_is_refused(folder: Path) -> None:
    text = (folder / "config.json").read_text().replace('"in_chans": 11', '"in_chans": 1')
    (folder / "config.json").write_text(text)
    with pytest.raises(BackboneError, match="asks for 1 channels, pillar0-headct has 11"):
        get_backbone("pillar0-headct", folder)


def test_without_weights_the_error_says_how_to_get_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"huggingface\.co/YalaLab/Pillar0-HeadCT"):
        get_backbone("pillar0-headct")
