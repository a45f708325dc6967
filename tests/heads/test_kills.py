"""Killed between any two publications, a command on heads is ended by the same command again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kills import Killed, contents, killed_before, windows

from ctfm.heads.config import FitConfig
from ctfm.heads.ensemble import fit_ensemble
from ctfm.heads.fit import fit_head
from ctfm.heads.grid import read_grid
from ctfm.heads.report import report_run
from ctfm.heads.runs import Run
from ctfm.heads.sweep import sweep
from ctfm.store.errors import RunError
from ctfm.store.features import FeatureStore

CONFIG = FitConfig(
    experts=2,
    rank=1,
    router_hidden=3,
    batch_size=16,
    min_epochs=2,
    max_epochs=2,
    min_positives=2,
    split_fractions=(0.6, 0.2, 0.2),
)
Command = Callable[[Path], object]


@pytest.fixture
def fit(planted_store: FeatureStore, planted_labels: Path) -> Command:
    return lambda out: fit_head(planted_store, planted_labels, CONFIG, out=out)


@pytest.fixture
def sweep_two(planted_store: FeatureStore, planted_labels: Path) -> Command:
    grid = read_grid(["seed=0:2"], base=CONFIG)
    return lambda out: sweep([planted_store], planted_labels, grid, out=out)


@pytest.fixture
def fit_seeds(planted_store: FeatureStore, planted_labels: Path) -> Command:
    base = replace(CONFIG, experts=0)
    return lambda out: fit_ensemble([planted_store], planted_labels, base, seeds=2, out=out)


def without_times(place: Path) -> dict[str, object]:
    """Every file, but for how long it took and in how many pieces; that no table can say again."""
    told: dict[str, object] = dict(contents(place))
    for name, content in list(told.items()):
        assert isinstance(content, bytes)
        if name.endswith("metrics.jsonl"):
            records = [json.loads(line) for line in content.splitlines()]
            told[name] = [{**record, "seconds": 0} for record in records]
        elif name.endswith("summary.json"):
            summary = json.loads(content)
            summary["sha256"].pop("metrics.jsonl")
            untimed = dict.fromkeys(("seconds", "side_by_side"), 0)
            told[name] = {**summary, **untimed}
        elif name.endswith("sweep.parquet"):
            del told[name]
    return told


def says_what_is_true(place: Path) -> None:
    """A run folder is finished, unfinished, or none; never damaged."""
    try:
        Run.open(place).predictions()
    except RunError as error:
        assert "is an unfinished run" in str(error) or "is not a run" in str(error)  # noqa: PT017


@pytest.mark.slow
def test_a_fit_killed_in_any_window_is_ended_by_the_same_command(
    fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, ended = [], []
    for last, place in windows(fit, tmp_path, monkeypatch):
        seen.append(last)
        says_what_is_true(place)
        if last:
            fit(place)
        ended.append(without_times(place))
    assert {"config.toml", "checkpoint.safetensors", "head.safetensors"} <= {*seen}
    assert all(one == ended[-1] for one in ended)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep_two", "fit_seeds"])
def test_fits_side_by_side_killed_in_any_window_are_ended_by_the_same_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Up to rounding: of two heads one may be finished, and then the other is fitted alone."""
    command: Command = request.getfixturevalue(name)
    places: list[Path] = []
    for last, place in windows(command, tmp_path, monkeypatch):
        for folder in [place, *place.glob("runs/*")]:
            says_what_is_true(folder)
        if last:
            command(place)
        places.append(place)
    whole = places[-1]
    runs = [path.parent.relative_to(whole) for path in whole.rglob("summary.json")]
    assert len(runs) >= 2
    for place in places:
        assert contents(place).keys() == contents(whole).keys()
        for run in runs:
            mine, theirs = (Run.open(one / run) for one in (place, whole))
            assert (mine.config, mine.members) == (theirs.config, theirs.members)
            for finding in mine.findings:
                got, expected = (
                    one.predictions()[f"logit_{finding}"].to_numpy() for one in (mine, theirs)
                )
                np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_a_report_that_is_killed_leaves_the_one_of_before(
    fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path / "run")
    page = tmp_path / "report.html"
    page.write_text("the page of before")
    with pytest.raises(Killed), killed_before(0, monkeypatch):
        report_run(tmp_path / "run", page)
    assert page.read_text() == "the page of before"
