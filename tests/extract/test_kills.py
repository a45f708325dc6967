"""Killed between any two publications, an extraction is ended by the same command again."""

from pathlib import Path

import pytest
from kills import contents, windows

from ctfm.extract.config import ExtractConfig
from ctfm.extract.estimate import estimate
from ctfm.extract.index import index
from ctfm.extract.options import Options
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import extract_all
from ctfm.extract.targets import TargetSpec
from ctfm.store.catalogue import Catalogue
from ctfm.store.features import FeatureStore
from ctfm.store.places import place_of
from ctfm.store.verify import verify_store

CONFIG = ExtractConfig(backbone="intensity", size_px=14, in_plane_mm=16.0, max_slices=8)
OPTIONS = Options(batch_size=4, workers=0, shard_scans=2)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("cohort") / "cohort"
    write_cohort(folder, scans=3, seed=1, matrix=64, slices=9, extras=0.0)
    return index([folder], key=bytes(32))


def spec(place: Path) -> TargetSpec:
    return TargetSpec(config=CONFIG, store=str(place))


@pytest.mark.slow
def test_an_extraction_killed_in_any_window_is_forecast_verified_and_ended(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(place: Path) -> None:
        extract_all(catalogue, [spec(place).load()], options=OPTIONS)

    seen, ended = [], []
    for last, place in windows(extract, tmp_path, monkeypatch):
        seen.append(last)
        forecast = estimate(catalogue, spec(place).load(), options=OPTIONS)
        if FeatureStore.exists(place):
            report = verify_store(place_of(place))
            assert report.ok, (last, report.problems)
            assert forecast.scans == report.pending
        else:
            assert forecast.scans == 3
        if last:
            extract(place)
        ended.append(contents(place))
    assert {"ids.json", "000000.parquet", "zarr.json", "scans.parquet", "000001.json"} <= {*seen}
    assert all(one == ended[-1] for one in ended)


def test_a_phantom_cohort_killed_in_any_window_is_ended_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(out: Path) -> None:
        write_cohort(out, scans=2, seed=1, matrix=16, slices=3, extras=0.0, resume=True)

    ended = []
    for last, place in windows(write, tmp_path, monkeypatch):
        if last:
            write(place)
        ended.append(contents(place))
    assert len(ended) > 2
    assert all(one == ended[-1] for one in ended)
