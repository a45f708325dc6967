"""The demo's folder: it goes on where it was, with the same cohort only."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctfm.cli import demo
from ctfm.cli.demo import claim, make_cohort
from ctfm.extract import phantom_cohort
from ctfm.extract.phantom_findings import FINDINGS
from ctfm.heads.config import FitConfig
from ctfm.store.errors import ConfigError
from ctfm.store.splits import split_patients

COHORT = {"scans": 60, "matrix": 64, "seed": 3}


def test_a_demo_that_was_killed_among_its_phantoms_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size: dict[str, Any] = {"scans": 4, "matrix": 32, "seed": 0, "workers": 1}
    monkeypatch.setattr(phantom_cohort, "_publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_cohort(tmp_path / "cohort", **size)
    monkeypatch.undo()
    assert not (tmp_path / "cohort" / "labels.parquet").exists()
    assert (make_cohort(tmp_path / "cohort", **size) / "labels.parquet").exists()


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_cohort_has_a_finding_to_choose_the_epoch_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(phantom_cohort, "_write_images", lambda _, folder: folder.mkdir())
    size: dict[str, Any] = {"scans": demo.FEWEST_SCANS, "matrix": 64, "seed": seed, "workers": 1}
    labels = pq.read_table(make_cohort(tmp_path / "cohort", **size) / "labels.parquet")
    split = split_patients(labels["patient_id"].to_pylist(), fractions=demo.SPLIT)
    y = np.array([labels[name].to_numpy() for name in FINDINGS])
    positive, negative = (y[:, split == "validation"] == value for value in (1, 0))
    fewest = np.minimum(positive.sum(axis=1), negative.sum(axis=1))
    assert fewest.max() >= FitConfig.min_positives


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("other", ["scans", "matrix", "seed"])
def test_a_folder_is_for_one_cohort(tmp_path: Path, other: str) -> None:
    claim(tmp_path / "demo", COHORT)
    claim(tmp_path / "demo", COHORT)
    with pytest.raises(ConfigError, match=f"{other} {COHORT[other]}.* not of .*{other} 71"):
        claim(tmp_path / "demo", {**COHORT, other: 71})
