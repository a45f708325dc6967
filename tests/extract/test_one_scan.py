"""One scan for prediction, with a slice backbone and with a volume backbone."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim
from torch.testing import assert_close

from ctfm.extract import prepare as preparation
from ctfm.extract.augment import View, draw_view
from ctfm.extract.backbone import default_settings
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.densenet3d import DenseNet3d, DenseShape
from ctfm.extract.one_scan import embed_scan
from ctfm.extract.pipeline import store_settings
from ctfm.extract.prepare import prepare
from ctfm.store.errors import BackboneError

SHAPE = DenseShape(channels=2, blocks=(1, 1), growth=4, stem=8, bottleneck=2)
TRAINED_ON = {
    "windows_hu": [[0, 100], [-500, 500]],
    "in_plane_mm": 4,
    "slice_mm": 6,
    "size_px": [24, 48, 56],
    "pad_hu": -1000,
}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ball of water in a skull, off the middle of the matrix."""
    affine = np.diag([4.0, 4.0, 5.0, 1.0])
    affine[:3, 3] = -100
    x, y, z = np.indices((52, 54, 40)) * np.array([4, 4, 5])[:, None, None, None] - 100
    radius = np.sqrt((x - 4) ** 2 + y**2 + (z - 5) ** 2)
    hu = np.where(radius < 68, 30, np.where(radius < 75, 900, -1000)).astype(np.int16)
    image = nib.Nifti1Image(hu, affine)
    image.header.set_xyzt_units("mm")
    path = tmp_path_factory.mktemp("scan") / "head.nii.gz"
    nib.save(image, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(DenseNet3d(SHAPE).state_dict(), folder / "mine.safetensors")
    (folder / "deepcntd.toml").write_text(tomli_w.dumps(TRAINED_ON))
    return folder


def test_a_volume_backbone_gives_one_row_in_the_middle_of_the_scan(
    scan: Path, weights: Path
) -> None:
    backbone = get_backbone("deepcntd", weights)
    config = ExtractConfig(
        backbone="deepcntd",
        align="none",
        dtype="float32",
        **default_settings(backbone.entry),
    )
    settings = store_settings(config, backbone)
    rows, position_mm = embed_scan(scan, settings, weights=weights)
    (prepared,) = prepare([str(scan)], config, scan_id="any")
    assert 10 < len(prepared.hu) <= 24
    volume = torch.full((24, 48, 56), -1000.0)
    start = (24 - len(prepared.hu)) // 2
    volume[start : start + len(prepared.hu)] = torch.from_numpy(prepared.hu)[:, 4:52].float()
    channels = torch.stack([volume / 100, (volume + 500) / 1000]).clamp(0, 1)
    with torch.inference_mode():
        expected = backbone.module(channels[None])["cls"]
    assert rows.shape == (1, SHAPE.dim)
    assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    middle_mm = (prepared.position_mm[0] + prepared.position_mm[-1]) / 2
    assert position_mm.tolist() == [pytest.approx(middle_mm)]


def test_a_slice_backbone_gives_a_row_a_slice(scan: Path) -> None:
    backbone = get_backbone("intensity")
    config = ExtractConfig(backbone="intensity", align="none", in_plane_mm=4.0, size_px=56)
    rows, position_mm = embed_scan(scan, store_settings(config, backbone))
    assert len(rows) == len(position_mm) > 20
    assert (np.diff(position_mm) == -config.slice_mm).all()


def test_of_a_store_with_augmented_views_only_the_clean_one_is_made(
    scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExtractConfig(backbone="intensity", align="none", in_plane_mm=4.0, size_px=56)
    backbone = get_backbone("intensity")
    expected, _ = embed_scan(scan, store_settings(config, backbone))
    drawn: list[int] = []

    def draw(seed: int, scan_id: str, view: int) -> View:
        drawn.append(view)
        return draw_view(seed, scan_id, view)

    monkeypatch.setattr(preparation, "draw_view", draw)
    rows, _ = embed_scan(scan, store_settings(replace(config, views=3), backbone))
    assert drawn == [0]
    assert torch.equal(rows, expected)


def test_a_network_of_other_padding_is_refused(scan: Path, weights: Path) -> None:
    backbone = get_backbone("deepcntd", weights)
    config = ExtractConfig(backbone="deepcntd", **default_settings(backbone.entry))
    settings = store_settings(config, backbone) | {"backbone_pad_hu": 0.0}
    with pytest.raises(BackboneError, match=r"backbone_pad_hu is -1000, of the store 0"):
        embed_scan(scan, settings, weights=weights)


def test_a_scan_without_the_adapter_of_the_store_is_refused(scan: Path) -> None:
    config = ExtractConfig(backbone="intensity")
    settings = {**store_settings(config, get_backbone("intensity")), "backbone_adapter": "1a2b"}
    with pytest.raises(BackboneError, match="--adapter"):
        embed_scan(scan, settings)


def test_a_program_is_run_for_prediction_only_if_it_is_trusted_anew(
    scan: Path, tmp_path: Path
) -> None:
    """The settings say that its code ran at extraction; but they may be someone else's."""
    program = tmp_path / "model.pt2"
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    example = torch.zeros(2, 3, 24, 24)
    samples = ({0: Dim("samples", min=1, max=4096)},)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=samples), program)
    program.with_suffix(".toml").write_text("size_px = [24, 24]\ntokens = { cls = 12 }")
    backbone = get_backbone(str(program), trust_remote_code=True)
    defaults = default_settings(backbone.entry)
    settings = store_settings(ExtractConfig(backbone=backbone.name, **defaults), backbone)
    assert settings["backbone"] == "model.pt2"
    with pytest.raises(BackboneError, match="--trust-remote-code"):
        embed_scan(scan, settings, weights=program)
    with pytest.raises(BackboneError, match="no program at"):
        embed_scan(scan, settings, trust_remote_code=True)
    rows, positions = embed_scan(scan, settings, weights=program, trust_remote_code=True)
    assert rows.shape == (len(positions), 12)
