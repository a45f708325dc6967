"""The embedded description: what it promises about shape, symmetry, exactness and lesions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ctfm.extract.backbone import Backbone
from ctfm.extract.backbones import get_backbone
from ctfm.extract.intensity import BRAIN_HU, INSIDE_BINS_HU, Histogram, Intensity
from ctfm.extract.weights import digest_tensors
from ctfm.store.errors import BackboneError, ConfigError

WINDOWS = ((0.0, 80.0), (-20.0, 180.0), (-800.0, 2000.0))
S, PX = 3, 224
D = 528
SIGNED = slice(D - 12, D)

ROWS, COLUMNS = np.mgrid[:PX, :PX]
Y_MM, X_MM = 111.5 - ROWS, 111.5 - COLUMNS


def ellipse(x_mm: float, y_mm: float, rx_mm: float, ry_mm: float) -> np.ndarray:
    inside: np.ndarray = ((X_MM - x_mm) / rx_mm) ** 2 + ((Y_MM - y_mm) / ry_mm) ** 2 < 1
    return inside


BRAIN = ellipse(0, 0, 65, 80)
SKULL = ellipse(0, 0, 71, 86) & ~BRAIN


def head() -> np.ndarray:
    """One symmetric slice: scalp, skull, brain, two ventricles."""
    hu = np.full((PX, PX), -1000.0)
    hu[ellipse(0, 0, 76, 91)] = 20
    hu[SKULL] = 1000
    hu[BRAIN] = 33
    for side in (-1, 1):
        hu[ellipse(side * 10, 10, 5, 20)] = 8
    return hu


def to_hu(slices: list[np.ndarray], *, noise_hu: float = 0.0) -> Tensor:
    rng = np.random.default_rng(0)
    hu = np.stack(slices) + noise_hu * rng.standard_normal((len(slices), PX, PX))
    return torch.from_numpy(hu.round().astype(np.int16))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return get_backbone("intensity")


def embed(backbone: Backbone, hu: Tensor) -> Tensor:
    return backbone.embed(backbone.channels(hu, WINDOWS))["cls"]


@pytest.fixture(scope="module")
def noisy() -> Tensor:
    hu = head()
    hu[ellipse(30, 20, 9, 12)] = 65
    return to_hu([head(), hu, np.roll(hu, 4, axis=0)], noise_hu=6)


def test_a_slice_becomes_finite_float32_numbers_of_order_one(
    backbone: Backbone, noisy: Tensor
) -> None:
    rows = embed(backbone, noisy)
    assert rows.shape == (S, D)
    assert backbone.tokens == {"cls": D}
    assert rows.dtype == torch.float32
    assert bool(rows.isfinite().all())
    assert 0.5 < rows.abs().mean() < 4
    assert rows.abs().max() <= 16


@pytest.mark.parametrize("hu", [-1024, 0, 40, 1000, 3071])
def test_a_slice_of_one_value_is_described_too(backbone: Backbone, hu: int) -> None:
    rows = embed(backbone, torch.full((1, PX, PX), hu, dtype=torch.int16))
    assert bool(rows.isfinite().all())


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (224, 224), (256, 256)])
def test_any_size_of_grid_will_do(backbone: Backbone, size: tuple[int, int]) -> None:
    hu = torch.randint(-1000, 1500, (2, *size), dtype=torch.int16)
    assert embed(backbone, hu).shape == (2, D)


def test_a_finer_grid_of_the_same_field_of_view_gives_the_same(
    backbone: Backbone, noisy: Tensor
) -> None:
    fine = noisy.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    assert_close(embed(backbone, fine), embed(backbone, noisy))


@pytest.mark.slow
def test_the_batch_does_not_matter(backbone: Backbone, noisy: Tensor) -> None:
    many = noisy.repeat(23, 1, 1)
    together = embed(backbone, many)
    assert torch.equal(embed(backbone, many), together)
    assert_close(together[:S], embed(backbone, noisy), rtol=0, atol=1e-5)
    assert_close(together[-1], embed(backbone, noisy[2:])[0], rtol=0, atol=1e-5)


def test_mirroring_changes_the_sign_of_the_signed_numbers_and_nothing_else(
    backbone: Backbone, noisy: Tensor
) -> None:
    rows, mirrored = embed(backbone, noisy), embed(backbone, noisy.flip(-1))
    assert_close(mirrored[:, : SIGNED.start], rows[:, : SIGNED.start], rtol=0, atol=1e-5)
    assert_close(mirrored[:, SIGNED], -rows[:, SIGNED], rtol=0, atol=1e-5)
    assert rows[1, SIGNED].abs().max() > 0.1


def test_a_symmetric_slice_has_no_differences_of_its_sides(backbone: Backbone) -> None:
    module = backbone.module
    assert isinstance(module, Intensity)
    rows = embed(backbone, to_hu([head()]))
    assert torch.equal(rows[:, SIGNED], torch.zeros(1, 12))
    one_side = torch.randint(0, 9, (1, 7, 3, 1, module.hu.n_levels)).float()
    _, areas, _, inside, _, bone, _, scalp = module._densities(one_side.expand(-1, -1, -1, 2, -1))
    assert not any(differences.any() for differences in (areas, inside, bone, scalp))


def test_inside_is_what_the_skull_encloses(backbone: Backbone) -> None:
    module = backbone.module
    assert isinstance(module, Intensity)
    hu = head()
    hu[ellipse(20, 20, 4, 4)] = 600  # calcification: dense, but inside
    hu[ellipse(-20, 20, 4, 4)] = -900  # air inside
    hu[(np.abs(Y_MM + 10) < 15) & (X_MM > 0) & SKULL] = 30  # craniotomy
    hu[ellipse(0, 0, 100, 109) & ~ellipse(0, 0, 96, 105) & (Y_MM < 40)] = 400  # couch
    mid = torch.from_numpy(hu.reshape(112, 2, 112, 2).mean(axis=(1, 3)))[None].float()
    inside, _ = module._inside(
        (mid > 250) & module._head(mid).repeat_interleave(2, 1).repeat_interleave(2, 2)
    )
    expected = torch.from_numpy(BRAIN.reshape(112, 2, 112, 2).mean(axis=(1, 3)))[None] > 0.5
    wrong = inside != expected
    assert wrong.float().mean() < 0.01
    assert not wrong[0, 40:72, 40:72].any()


def plant(kind: str) -> np.ndarray:
    """A slice with one finding, of the size and HU that textbooks give."""
    hu = head()
    if kind == "intraparenchymal hemorrhage":
        hu[ellipse(30, 20, 6, 6)] = 62
    elif kind == "subdural hemorrhage":
        hu[BRAIN & ~ellipse(-4, 0, 65, 80) & (np.abs(Y_MM) < 40)] = 60
    elif kind == "infarct":
        hu[ellipse(40, 10, 16, 20) & BRAIN & (hu > 20)] = 25
    elif kind == "hydrocephalus":
        for side in (-1, 1):
            hu[ellipse(side * 13, 10, 10, 26)] = 8
    elif kind == "midline shift":
        hu[BRAIN] = 33
        for side in (-1, 1):
            hu[ellipse(side * 10 + 7, 10, 5, 20)] = 8
    elif kind == "fracture":
        hu[SKULL & (np.abs(Y_MM - 0.4 * X_MM) < 0.8) & (X_MM > 0)] = 150
    elif kind == "pneumocephalus":
        hu[ellipse(10, 60, 3, 3)] = -950
    elif kind == "calcification":
        hu[ellipse(25, 0, 2, 2)] = 200
    elif kind == "scalp swelling":
        hu[ellipse(8, 30, 76, 70) & (hu == -1000)] = 50
    return hu


FINDINGS = (
    "intraparenchymal hemorrhage",
    "subdural hemorrhage",
    "infarct",
    "hydrocephalus",
    "midline shift",
    "fracture",
    "pneumocephalus",
    "calcification",
    "scalp swelling",
)


@pytest.mark.parametrize("kind", FINDINGS)
def test_a_finding_stands_out_of_the_noise(backbone: Backbone, kind: str) -> None:
    n = 12
    normal = embed(backbone, to_hu([head()] * n, noise_hu=6))
    found = embed(backbone, to_hu([plant(kind)], noise_hu=6))[0]
    z_scores = (found - normal.mean(dim=0)) / (normal.std(dim=0) + 0.1)
    assert z_scores.abs().topk(2).values.min() > 4


def test_histograms_share_a_value_between_the_two_bins_around_it() -> None:
    histogram = Histogram(range(0, 101), highest=100)
    values = torch.tensor([[10.0, 12.0, 20.0, 55.0, 200.0]])
    counts = histogram.count(values, torch.zeros(1, 5, dtype=torch.int32), n_cells=1)
    soft = counts[0, 0] @ histogram.bins((10, 20, 60))
    assert_close(soft, torch.tensor([1 + 0.8, 0.2 + 1 + 0.125, 0.875 + 1]), atol=0.01, rtol=0)


def test_histograms_keep_cells_and_slices_apart() -> None:
    histogram = Histogram(range(0, 11), highest=10)
    values = torch.tensor([[1.0, 1.0, 2.0], [3.0, 3.0, 3.0]])
    cells = torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.int32)
    counts = histogram.count(values, cells, n_cells=2)
    assert counts.shape == (2, 2, 11)
    assert counts[0, 0, 1] == counts[0, 1, 1] == counts[0, 1, 2] == 1
    assert counts[1, 0, 3] == 2
    assert counts.sum() == 6


def test_bins_of_the_brain_cover_blood_and_water() -> None:
    assert BRAIN_HU[0] < 0 < 80 < BRAIN_HU[1]
    assert list(INSIDE_BINS_HU) == sorted(INSIDE_BINS_HU)


def test_weights_are_refused() -> None:
    with pytest.raises(BackboneError, match="intensity has no weights"):
        get_backbone("intensity", Path("weights"))


def test_it_computes_in_float32_alone(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="computes in float32"):
        backbone.to("cpu", "bfloat16")


def test_the_digest_changes_with_a_table(backbone: Backbone) -> None:
    module = Intensity()
    tables = {**module.state_dict(), "version": torch.tensor(1)}
    assert digest_tensors(tables) == backbone.digest
    tables["inside_bins"] = tables["inside_bins"] * 2
    assert digest_tensors(tables) != backbone.digest
