"""The demo's folder: it goes on where it was, with the same cohort only."""

from pathlib import Path
from typing import Any

import pytest

from ctfm.cli.demo import claim, make_cohort
from ctfm.extract import phantom_cohort
from ctfm.store.errors import ConfigError

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


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("other", ["scans", "matrix", "seed"])
def test_a_folder_is_for_one_cohort(tmp_path: Path, other: str) -> None:
    claim(tmp_path / "demo", COHORT)
    claim(tmp_path / "demo", COHORT)
    with pytest.raises(ConfigError, match=f"{other} {COHORT[other]}.* not of .*{other} 71"):
        claim(tmp_path / "demo", {**COHORT, other: 71})
