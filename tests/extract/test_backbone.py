"""What every loaded backbone does, with a module that shows what it was given."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ctfm.extract.augment import Jitter
from ctfm.extract.backbone import (
    Backbone,
    BackboneEntry,
    Loaded,
    default_settings,
    load_backbone,
    one_source,
    sample_positions,
)
from ctfm.extract.config import ExtractConfig, Grid
from ctfm.extract.windows import jitter_hu, to_channels
from ctfm.store.errors import BackboneError, ConfigError

WINDOWS = ((0.0, 80.0), (-20.0, 180.0), (-800.0, 2000.0))
S, Y, X = 2, 10, 14


class Show(nn.Module):
    """Its tokens are sums over its pixels, and the first pixel of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("inv_freq", torch.tensor([1 / 3]), persistent=False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {
            "mean": pixels.mean(dim=(2, 3)) * self.weight,
            "cls": pixels[:, :, 0, 0],
        }


def load_show(entry: BackboneEntry, weights: Path | None) -> Loaded:
    return Loaded(module=Show(), digest=f"of {weights}")


ENTRY = BackboneEntry(
    name="show",
    architecture="none",
    hub_id=None,
    revision=None,
    licence="none",
    gated=False,
    tokens={"cls": 3, "mean": 3},
    parameters=1,
    load=load_show,
    sources=one_source("this test"),
    size_px=(5, 7),
    mean=(0.1, 0.2, 0.3),
    sd=(0.5, 0.6, 0.7),
)


@pytest.fixture
def backbone() -> Backbone:
    return load_backbone(ENTRY)


@pytest.fixture
def hu() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1024, 2000, (S, Y, X), generator=generator, dtype=torch.int16)


def test_every_token_is_given_unless_some_are_asked_for(backbone: Backbone) -> None:
    channels = torch.rand(S, 3, Y, X)
    assert list(backbone.embed(channels)) == ["cls", "mean"]
    assert list(load_backbone(ENTRY, tokens=["mean"]).embed(channels)) == ["mean"]
    assert load_backbone(ENTRY, tokens=["mean"]).tokens == {"mean": 3}


def test_an_unknown_token_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(BackboneError, match=r"no token 'pooler'.*cls, mean"):
        load_backbone(ENTRY, tokens=["cls", "pooler"])


def test_weights_reach_the_loader_as_a_path() -> None:
    assert load_backbone(ENTRY, "a/folder").digest == f"of {Path('a/folder')}"


def test_channels_are_those_of_the_windows(backbone: Backbone, hu: Tensor) -> None:
    jitter = Jitter(1.01, 0.1, 5)
    assert torch.equal(backbone.channels(hu, WINDOWS), to_channels(hu, WINDOWS))
    assert torch.equal(
        backbone.channels(hu, WINDOWS, jitter), to_channels(hu, WINDOWS, jitter=jitter)
    )


def test_another_number_of_windows_is_an_error(backbone: Backbone, hu: Tensor) -> None:
    with pytest.raises(ConfigError, match="takes 3 channels, got 2 windows"):
        backbone.channels(hu, WINDOWS[:2])


def test_a_backbone_of_hu_gets_hu_whatever_the_windows(hu: Tensor) -> None:
    backbone = load_backbone(replace(ENTRY, input="hu", channels=1, mean=(), sd=(), size_px=None))
    assert torch.equal(backbone.channels(hu, WINDOWS), hu[:, None].float())
    jitter = Jitter(1.01, 0.1, 5)
    expected = jitter_hu(hu[:, None].float(), jitter, window_hu=(0.0, 80.0))
    assert_close(backbone.channels(hu, WINDOWS, jitter), expected)
    assert torch.equal(backbone.pixels(hu[:, None].float()), hu[:, None].float())


def test_pixels_are_resized_with_antialiasing_and_normalised(backbone: Backbone) -> None:
    channels = torch.rand(S, 3, 2 * 5, 2 * 7)
    pixels = backbone.pixels(channels)
    # Halving with a triangle filter of support 2: weights 1, 3, 3, 1 inside the image.
    row = torch.tensor([1.0, 3, 3, 1]) / 8
    inner = torch.einsum("smyx,y,x->sm", channels[:, :, 1:5, 3:7], row, row)
    mean, sd = torch.tensor(ENTRY.mean), torch.tensor(ENTRY.sd)
    assert pixels.shape == (S, 3, 5, 7)
    assert_close(pixels[:, :, 1, 2], (inner - mean) / sd)


def test_channels_are_not_changed_by_embedding(backbone: Backbone) -> None:
    channels = torch.rand(S, 3, 5, 7)
    before = channels.clone()
    backbone.embed(channels)
    assert torch.equal(channels, before)


def test_embeddings_are_float32_in_either_precision(backbone: Backbone) -> None:
    channels = torch.rand(S, 3, Y, X)
    single = backbone.embed(channels)["mean"]
    half = backbone.to("cpu", "bfloat16").embed(channels)["mean"]
    assert single.dtype == half.dtype == torch.float32
    assert_close(half, single, rtol=0.02, atol=0.02)
    assert not torch.equal(half, single)


def test_rotary_frequencies_are_not_rounded(backbone: Backbone) -> None:
    half = backbone.to("cpu", "bfloat16")
    assert half.module.weight.dtype == torch.bfloat16
    frequencies = dict(half.module.named_buffers())["inv_freq"]
    assert torch.equal(frequencies, torch.tensor([1 / 3]))
    assert half.digest == backbone.digest
    assert half.precision == "bfloat16"


def test_rounded_weights_do_not_become_float32_again(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="load it anew"):
        backbone.to("cpu", "bfloat16").to("cpu", "float32")


def test_a_precision_it_cannot_compute_in_is_an_error() -> None:
    backbone = load_backbone(replace(ENTRY, precisions=("float32",)))
    with pytest.raises(ConfigError, match="computes in float32, not bfloat16"):
        backbone.to("cpu", "bfloat16")


def test_the_module_can_be_differentiated_through(backbone: Backbone) -> None:
    backbone.module.requires_grad_(True)
    backbone.module(backbone.pixels(torch.rand(S, 3, Y, X)))["mean"].sum().backward()
    assert backbone.module.weight.grad is not None


def test_settings_tell_everything_done_after_windowing(backbone: Backbone) -> None:
    assert backbone.settings() == {
        "weights": "of None",
        "input": "windows",
        "size_px": [5, 7],
        "interpolation": "bilinear",
        "antialias": True,
        "mean": [0.1, 0.2, 0.3],
        "sd": [0.5, 0.6, 0.7],
    }


class ShowVolume(nn.Module):
    """Its token is the value of the middle voxel in each channel."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        z, y, x = (size // 2 for size in pixels.shape[2:])
        return {"cls": pixels[:, :, z, y, x]}


VOLUME_WINDOWS = ((0.0, 100.0), (-50.0, 50.0))
VOLUME = replace(
    ENTRY,
    name="show-volume",
    load=lambda entry, weights: Loaded(module=ShowVolume(), digest="none"),
    tokens={"cls": 3},
    unit="volume",
    size_px=(5, 4, 7),
    mean=(),
    sd=(),
    own_window=True,
    pad_hu=-1.0,
    native_windows_hu=VOLUME_WINDOWS,
    own_preprocessing=True,
    grid=Grid(in_plane_mm=2.0, slice_mm=3.0, size_px=7, max_slices=5),
)


def test_a_volume_is_one_sample_of_the_size_that_the_backbone_takes() -> None:
    hu = torch.arange(2 * 6 * 7, dtype=torch.int16).reshape(2, 6, 7)
    channels = load_backbone(VOLUME).channels(hu, VOLUME_WINDOWS)
    assert channels.shape == (1, 3, 5, 4, 7)
    padded = torch.full((5, 4, 7), -1.0)
    padded[1:3] = hu[:, 1:5].float()  # three slices are missing: one above, two below
    assert_close(channels[0, 0], (padded / 100).clamp(0, 1))
    assert_close(channels[0, 1], ((padded + 50) / 100).clamp(0, 1))
    own = (padded + 1) / (padded.max() + 1)
    assert_close(channels[0, 2], own)


def test_a_volume_gives_one_row_at_the_middle_of_its_slices() -> None:
    backbone = load_backbone(VOLUME)
    hu = torch.full((3, 6, 7), 25, dtype=torch.int16)
    embedded = backbone.embed(backbone.channels(hu, VOLUME_WINDOWS))
    assert_close(embedded["cls"], torch.tensor([[0.25, 0.75, 1.0]]))
    position_mm = np.array([-2, -6, -10, -14], np.float32)
    positions = sample_positions(VOLUME, position_mm)
    assert positions.dtype == np.float32
    np.testing.assert_array_equal(positions, [-8])
    np.testing.assert_array_equal(sample_positions(ENTRY, position_mm), position_mm)


def test_a_volume_that_is_all_one_value_has_no_nan() -> None:
    hu = torch.full((5, 4, 7), -1, dtype=torch.int16)
    assert load_backbone(VOLUME).channels(hu, VOLUME_WINDOWS).isfinite().all()


def test_the_scans_own_window_counts_as_a_channel() -> None:
    hu = torch.zeros(5, 4, 7, dtype=torch.int16)
    with pytest.raises(ConfigError, match="3 channels, one of them the scan's own range, got 3"):
        load_backbone(VOLUME).channels(hu, WINDOWS)


def test_a_backbone_decides_the_grid_and_may_decide_the_windows_unless_told() -> None:
    config = ExtractConfig(backbone="show-volume", **default_settings(VOLUME))
    assert (config.in_plane_mm, config.slice_mm, config.size_px, config.max_slices) == (2, 3, 7, 5)
    assert config.windows_hu == VOLUME_WINDOWS
    assert default_settings(ENTRY) == {}
    only_native = replace(ENTRY, native_windows_hu=WINDOWS)
    assert default_settings(only_native) == {}
    assert default_settings(replace(only_native, own_preprocessing=True)) == {"windows_hu": WINDOWS}


def test_settings_tell_which_code_of_the_model_ran() -> None:
    trusted = replace(ENTRY, remote_code="1a2b")
    assert load_backbone(trusted).settings() == {
        **load_backbone(ENTRY).settings(),
        "remote_code": "1a2b",
    }


def test_the_commit_is_that_of_the_snapshot_that_the_weights_are_in(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--show" / "snapshots" / ("4" * 40)
    snapshot.mkdir(parents=True)
    assert load_backbone(ENTRY, snapshot).commit == "4" * 40
    assert load_backbone(ENTRY, tmp_path).commit is None
    assert load_backbone(ENTRY).commit is None


def test_settings_of_a_volume_tell_how_it_is_padded() -> None:
    settings = load_backbone(VOLUME).settings()
    assert settings["unit"] == "volume"
    assert settings["size_px"] == [5, 4, 7]
    assert settings["own_window"] is True
    assert settings["pad_hu"] == -1.0


def test_a_checkpoint_may_correct_the_facts_of_the_registry() -> None:
    own = replace(VOLUME, size_px=(3, 4, 7))
    entry = replace(
        VOLUME,
        load=lambda entry, weights: Loaded(module=ShowVolume(), digest="none", entry=own),
    )
    assert load_backbone(entry).entry.size_px == (3, 4, 7)
