"""`deepcntd` from a folder of the user's own weights."""

from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ctfm.extract.backbone import default_settings
from ctfm.extract.backbones import get_backbone, get_entry
from ctfm.extract.config import PAPER_WINDOWS_HU, ExtractConfig
from ctfm.extract.deepcntd import DEFAULT_SHAPE
from ctfm.extract.densenet3d import DenseNet3d, DenseShape
from ctfm.store.errors import BackboneError

SHAPE = DenseShape(channels=2, blocks=(1, 2), growth=4, stem=8, bottleneck=2)
TRAINED_ON = {
    "windows_hu": [[0, 100], [-500, 500]],
    "in_plane_mm": 2,
    "slice_mm": 5,
    "size_px": [12, 20, 24],
    "pad_hu": 0,
}


@pytest.fixture
def network() -> DenseNet3d:
    torch.manual_seed(0)
    return DenseNet3d(SHAPE).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path, network: DenseNet3d) -> Path:
    tensors = {f"module.{n}": t.clone() for n, t in network.state_dict().items()}
    tensors["module.class_layers.out.weight"] = torch.zeros(16, SHAPE.dim)
    tensors["module.class_layers.out.bias"] = torch.zeros(16)
    save_file(tensors, tmp_path / "mine.safetensors")
    (tmp_path / "deepcntd.toml").write_text(tomli_w.dumps(TRAINED_ON))
    return tmp_path


def test_loads_the_users_weights_with_what_they_were_trained_on(
    folder: Path, network: DenseNet3d
) -> None:
    backbone = get_backbone("deepcntd", folder)
    assert backbone.tokens == {"cls": SHAPE.dim}
    config = ExtractConfig(backbone="deepcntd", **default_settings(backbone.entry))
    assert (config.in_plane_mm, config.slice_mm) == (2.0, 5.0)
    assert (config.size_px, config.max_slices) == (24, 12)
    assert config.windows_hu == ((0.0, 100.0), (-500.0, 500.0))
    hu = torch.full((7, 24, 24), 50, dtype=torch.int16)
    channels = backbone.channels(hu, config.windows_hu)
    assert channels.shape == (1, 2, 12, 20, 24)
    assert_close(channels[0, :, [0, 6], 0, 0], torch.tensor([[0, 0.5], [0.5, 0.55]]))
    assert torch.equal(backbone.embed(channels)["cls"], network(channels)["cls"])


def test_the_description_is_known_before_the_weights_are_loaded(folder: Path) -> None:
    entry = get_entry("deepcntd", folder)
    assert default_settings(entry) == default_settings(get_backbone("deepcntd", folder).entry)
    assert default_settings(entry)["windows_hu"] == ((0.0, 100.0), (-500.0, 500.0))


def test_without_a_description_the_papers_preprocessing_holds(tmp_path: Path) -> None:
    shape = DenseShape(channels=3, blocks=(1, 1), growth=4, stem=8)
    save_file(DenseNet3d(shape).state_dict(), tmp_path / "mine.safetensors")
    backbone = get_backbone("deepcntd", tmp_path / "mine.safetensors")
    config = ExtractConfig(backbone="deepcntd", **default_settings(backbone.entry))
    assert config == ExtractConfig(backbone="deepcntd")
    assert backbone.entry.native_windows_hu == PAPER_WINDOWS_HU


def test_without_weights_the_error_says_that_none_are_published() -> None:
    with pytest.raises(BackboneError, match="no published weights: it is an architecture"):
        get_backbone("deepcntd")


def test_the_entry_says_that_it_is_not_verified() -> None:
    entry = get_entry("deepcntd")
    assert "not verified against DeepCNTD" in entry.architecture
    with torch.device("meta"):
        module = DenseNet3d(DEFAULT_SHAPE)
    assert entry.parameters == sum(parameter.numel() for parameter in module.parameters())


def test_weights_that_lack_a_tensor_are_an_error_that_names_it(folder: Path) -> None:
    tensors = load_file(folder / "mine.safetensors")
    del tensors["module.features.norm5.bias"]
    save_file(tensors, folder / "mine.safetensors")
    with pytest.raises(BackboneError, match=r"1 missing \(features.norm5.bias\)"):
        get_backbone("deepcntd", folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"windows_hu": [[0, 80]]}, "takes 2 channels, 1 windows are said"),
        ({**TRAINED_ON, "size_px": [3, 20, 24]}, "3 x 20 x 24 is too small"),
        ({"window": 3}, "unknown field window"),
        ({"size_px": [4, 5]}, r"size_px must be \[z, y, x\], got \[4, 5\]"),
        ({"tokens": {"cls": 3}}, "unknown field tokens"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    folder: Path, said: dict[str, object], message: str
) -> None:
    (folder / "deepcntd.toml").write_text(tomli_w.dumps(said))
    with pytest.raises(BackboneError, match=message):
        get_backbone("deepcntd", folder)
