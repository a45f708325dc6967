"""What the commands on runs print of results that are known."""

import hashlib
import json
import sys
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest

from ctfm.cli.app import main
from ctfm.cli.runs import print_prediction
from ctfm.extract.config import ExtractConfig
from ctfm.heads.branches import branches_state, build_branches
from ctfm.heads.config import FitConfig
from ctfm.heads.predict import ScanPrediction
from ctfm.heads.runs import RunWriter, StoreRecord


def prediction() -> ScanPrediction:
    """Two slices, 42 and 46 mm below the vertex, that speak for `air` and for `mass`."""
    return ScanPrediction(
        findings=("mass", "atrophy", "air"),
        logits=np.array([-1.0, 3.0, 1.0], np.float32),
        probabilities=np.array([0.269, 0.953, 0.731], np.float32),
        position_mm=np.array([-42.0, -46.0], np.float32),
        attention=np.array([0.75, 0.25], np.float32),
        contributions=np.array([[0.1, 0.3, 0.5], [0.2, 0.1, 0.4]], np.float32),
        untaught={"atrophy": "no positive in train"},
    )


def test_a_finding_that_train_never_taught_gets_no_probability(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_prediction(prediction(), title="scan", slices=1)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[-1] == "atrophy not taught: no positive in train"
    assert len(lines) == 3


def test_the_slices_that_add_most_are_named_with_their_attention(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_prediction(prediction(), title="scan", slices=2)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[:2] == ["air 0.731 42 (75%), 46 (25%)", "mass 0.269 46 (25%), 42 (75%)"]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A run whose record names a backbone of somebody's repository."""
    path, findings = tmp_path / "run", ("mass",)
    config = FitConfig(experts=0)
    settings = ExtractConfig(backbone="hf:somebody/planted").as_dict()
    writer = RunWriter(path)
    writer.start()
    record = StoreRecord(fingerprint="f", settings=settings)
    writer.write_config(config, dims=[3], findings=findings, stores=[record])
    writer.write_epochs([], checkpoint=b"")
    head = branches_state(build_branches(config, dims=[3], findings=1))
    writer.finish(head, predictions=pa.table({}), attention=pa.table({}), summary={})
    return path


def test_a_foreign_run_fetches_nothing_unless_it_is_told_to(
    foreign: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[bool] = []

    def snapshot_download(hub_id: str, *, local_files_only: bool = False, **_: object) -> NoReturn:
        asked.append(not local_files_only)
        raise FileNotFoundError(hub_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(sys, "argv", ["ctfm", "predict", str(foreign), str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1
    assert "https://huggingface.co/somebody/planted" in said
    assert "--allow-download" in said
    assert not any(asked)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--allow-download"])
    with pytest.raises(SystemExit):
        main()
    assert any(asked)


@pytest.mark.parametrize(
    ("was", "tampered"),
    [
        ('backbone = "hf:somebody/planted"', ""),
        ("max_slices = 40", "max_slices = 1000000000"),
        ("max_slices = 40", "max_slices = 1e9"),
        ('tokens = [\n    "cls",\n]', "tokens = []"),
    ],
)
def test_a_tampered_run_ends_in_a_sentence(
    foreign: Path,
    tmp_path: Path,
    was: str,
    tampered: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = (foreign / "config.toml").read_text()
    assert was in config
    content = config.replace(was, tampered).encode()
    (foreign / "config.toml").write_bytes(content)
    summary = json.loads((foreign / "summary.json").read_text())
    summary["sha256"]["config.toml"] = hashlib.sha256(content).hexdigest()
    (foreign / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(sys, "argv", ["ctfm", "predict", str(foreign), str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "the recorded settings are damaged" in " ".join(capsys.readouterr().err.split())
