"""Preparation: from a file to views on the grid, on a small drawn head written as NIfTI."""

import pickle
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctfm.extract.config import ExtractConfig
from ctfm.extract.prepare import prepare, prepare_volume
from ctfm.extract.reading import read_volume
from ctfm.extract.resample import OUTSIDE_HU
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

CONFIG = ExtractConfig(backbone="none", in_plane_mm=2.0, slice_mm=5.0, size_px=112, max_slices=30)
TOP_MM = 70.0


def drawn_hu(shape: tuple[int, int, int] = (96, 110, 40)) -> tuple[np.ndarray, np.ndarray]:
    """(x, y, z) HU of a head of shells with its top at `TOP_MM`, and the affine in RAS mm."""
    affine = np.diag([2.2, 2.3, 4.0, 1.0])
    affine[:3, 3] = -np.array([95 * 2.2, 109 * 2.3, 39 * 4.0]) / 2
    x, y, z = (
        offset + step * index
        for offset, step, index in zip(
            affine[:3, 3], (2.2, 2.3, 4.0), np.indices(shape), strict=True
        )
    )
    hu = np.full(shape, -1000.0)
    for grown, value in ((13, 20.0), (7, 900.0), (0, 33.0)):
        a, b, c = 66 + grown, 84 + grown, TOP_MM - 13 + grown
        hu[(x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1] = value
    hu[(np.hypot(x, y + 15) < 55) & (z < -45)] = 50
    hu[(np.abs(x) < 60) & (np.abs(y) < 70) & (np.abs(z + 40) < 4)] = 700
    hu[(np.abs(np.abs(x) - 15) < 7) & (np.abs(y) < 28) & (np.abs(z - 8) < 14)] = 6
    hu += np.random.default_rng(1).normal(0, 6, shape)
    return hu, affine


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> str:
    hu, affine = drawn_hu()
    image = nib.Nifti1Image(np.rint(hu).astype(np.int16), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    path = tmp_path_factory.mktemp("scan") / "head.nii.gz"
    nib.save(image, path)
    return str(path)


def test_gives_the_clean_view_on_the_grid(scan: str) -> None:
    (view,) = prepare([scan], CONFIG, scan_id="a")
    rows = len(view.position_mm)
    assert view.hu.dtype == np.int16
    assert view.hu.shape == (rows, 112, 112)
    assert 20 < rows <= 30
    np.testing.assert_allclose(np.diff(view.position_mm), -5.0)
    assert view.jitter is None
    assert view.hu.min() >= OUTSIDE_HU - 30
    assert np.median(view.hu[8:16, 50:60, 40:70]) == pytest.approx(33, abs=15)
    assert view.quality["similarity"] > 0.9


def test_the_scanner_frame_keeps_the_axes_and_counts_from_the_top_of_the_head(scan: str) -> None:
    (view,) = prepare([scan], replace(CONFIG, align="none"), scan_id="a")
    np.testing.assert_array_equal(view.world_from_head[:3, :3], np.eye(3))
    np.testing.assert_allclose(view.world_from_head[:3, 3], [0, 0, TOP_MM], atol=4.5)
    assert view.quality == {}


def test_every_view_has_the_rows_of_the_clean_one_and_its_own_jitter(scan: str) -> None:
    views = prepare([scan], replace(CONFIG, views=3), scan_id="a")
    assert len(views) == 3
    for view in views[1:]:
        np.testing.assert_array_equal(view.position_mm, views[0].position_mm)
        assert view.jitter is not None
        assert (view.hu != views[0].hu).mean() > 0.2
    assert views[1].jitter != views[2].jitter


def test_preparing_twice_gives_the_same_bytes(scan: str) -> None:
    config = replace(CONFIG, views=2)
    first, second = (prepare([scan], config, scan_id="a") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.hu, b.hu)
        np.testing.assert_array_equal(a.world_from_head, b.world_from_head)
        assert a.jitter == b.jitter


def test_another_seed_or_id_gives_another_augmented_view(scan: str) -> None:
    config = replace(CONFIG, views=2)
    base = prepare([scan], config, scan_id="a")[1]
    for other in (
        prepare([scan], config, scan_id="b")[1],
        prepare([scan], replace(config, seed=9), scan_id="a")[1],
    ):
        assert (other.hu != base.hu).mean() > 0.2


def test_a_template_decides_the_frame(scan: str) -> None:
    template = read_volume([scan])
    (view,) = prepare([scan], CONFIG, scan_id="a", template=template)
    np.testing.assert_allclose(view.world_from_head[:3, :3], np.eye(3), atol=0.01)
    np.testing.assert_allclose(view.world_from_head[:3, 3], [0, 0, TOP_MM], atol=4.5)


def test_a_prepared_scan_goes_through_a_pipe_at_the_size_of_its_voxels(scan: str) -> None:
    (view,) = prepare([scan], CONFIG, scan_id="a")
    message = pickle.dumps(view)
    assert len(message) < view.hu.nbytes + 5_000
    np.testing.assert_array_equal(pickle.loads(message).hu, view.hu)  # noqa: S301


def test_a_grid_that_the_scan_does_not_reach_is_a_reason_not_a_row(scan: str) -> None:
    volume = read_volume([scan])
    cut = Volume(  # 20 mm of the top are missing
        hu=volume.hu[:33],
        slice_origin_mm=volume.slice_origin_mm[:33],
        row_step_mm=volume.row_step_mm,
        column_step_mm=volume.column_step_mm,
    )
    with pytest.raises(ScanError) as caught:
        prepare_volume(cut, replace(CONFIG, max_slices=2), scan_id="a")
    assert caught.value.reason == Reason.EMPTY


def test_values_that_are_not_hu_are_refused_before_anything_is_aligned(tmp_path: Path) -> None:
    hu, affine = drawn_hu()
    image = nib.Nifti1Image((np.rint(hu) + 1024).astype(np.int16), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    path = tmp_path / "unscaled.nii"
    nib.save(image, path)
    with pytest.raises(ScanError) as caught:
        prepare([str(path)], CONFIG, scan_id="a")
    assert caught.value.reason == Reason.NOT_HU
