"""What `fit-head` says about its labels before it fits."""

from pathlib import Path

import pytest
from toy_store import create, to_store
from typer.testing import CliRunner

from ctfm.cli.app import app
from ctfm.cli.fit import join_table, note_near_names
from ctfm.store.errors import ConfigError


def test_a_finding_that_is_almost_one_of_the_taxonomy_is_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    note_near_names(["intraparenchymal_hemorhage", "midline_shift", "our_own_finding"])
    (note,) = capsys.readouterr().err.splitlines()
    assert note.endswith("hemorhage: did you mean intraparenchymal_hemorrhage?")


def test_findings_without_a_name_are_not_all_findings(tmp_path: Path) -> None:
    store = create(tmp_path / "s", to_store([3]))
    (tmp_path / "l.csv").write_text("scan_id,mass\nscan000,1\n")
    with pytest.raises(ConfigError, match="--findings takes names"):
        join_table(tmp_path / "l.csv", store, findings="", catalogue=tmp_path / "scans.parquet")


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.split(".")[0].isdigit()
