"""Trackers: what each is told, and that none of them can stop a fit."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ctfm.heads.trackers import get_tracker
from ctfm.store.errors import ConfigError


def fake(name: str, calls: list[tuple[str, Any, Any]]) -> ModuleType:
    """A module that writes down whatever is called of it."""

    def recorded(attribute: str) -> Callable[..., None]:
        return lambda *args, **options: calls.append((attribute, args, options))

    module = ModuleType(name)
    module.__getattr__ = recorded  # type: ignore[method-assign]
    return module


def track(name: str, folder: Path) -> None:
    tracker = get_tracker(name)
    tracker.start("run", folder=folder, config={"experts": 6})
    tracker.scalars(1, {"validation_macro_auc": 0.75})
    tracker.artifact(folder / "summary.json")
    tracker.finish()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_same_calls(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any, Any]] = []
    monkeypatch.setitem(sys.modules, name, fake(name, calls))
    track(name, tmp_path)
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"]
    assert calls[0][2] == {"project": "ctfm", "name": "run", "config": {"experts": 6}}
    assert calls[1][1:] == (({"validation_macro_auc": 0.75},), {"step": 1})


def test_mlflow_gets_its_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any, Any]] = []
    monkeypatch.setitem(sys.modules, "mlflow", fake("mlflow", calls))
    track("mlflow", tmp_path)
    assert [call[0] for call in calls] == [
        "set_experiment", "start_run", "log_params", "log_metrics", "log_artifact", "end_run"
    ]  # fmt: skip


def test_tensorboard_writes_events_beside_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an optional extra")
    track("tensorboard", tmp_path)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"validation_macro_auc" in events.read_bytes()


def test_a_tracker_that_fails_is_warned_of_once_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any, Any]] = []
    module = fake("wandb", calls)

    def init(**_: Any) -> None:
        raise OSError("no network")

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.warns(UserWarning, match="wandb failed and is left alone .* no network") as said:
        track("wandb", tmp_path)
    assert len(said) == 1
    assert calls == []


def test_an_unknown_or_missing_tracker_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no tracker is named 'aim': choose tensorboard"):
        get_tracker("aim")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="mlflow is not installed: pip install mlflow-skinny"):
        get_tracker("mlflow")
