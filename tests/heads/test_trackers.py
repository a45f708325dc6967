"""Trackers: TensorBoard's files read back, the others against modules with the same calls."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctfm.heads.trackers import TRACKERS, Harmless, Status, Tracker, get_tracker
from ctfm.store.errors import ConfigError

CONFIG = {"experts": 6, "findings": ["stroke", "fracture"], "repeat_threshold": "auto"}


def tell(tracker: Tracker, file: Path, *, status: Status = "finished") -> None:
    tracker.start(CONFIG, "k6")
    tracker.scalars(1, {"train_loss": 0.5, "validation_macro_auc": 0.75})
    tracker.scalars(2, {"train_loss": 0.25, "validation_macro_auc": 0.875})
    tracker.artifact(file)
    tracker.finish(status)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    file = tmp_path / "head.safetensors"
    file.write_bytes(b"tensors")
    return file


@pytest.fixture(autouse=True)
def same_environment_after() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


class FakeRun:
    def __init__(self, calls: list[object]) -> None:
        self.calls = calls

    def log(self, data: dict[str, float], step: int) -> None:
        self.calls.append((step, data))

    def log_artifact(self, artifact_or_path: str, name: str, type: str) -> None:
        self.calls.append((Path(artifact_or_path).read_bytes(), name, type))


class FakeWandbRun(FakeRun):
    def finish(self, exit_code: int) -> None:
        self.calls.append(("exit code", exit_code))


class FakeTrackioRun(FakeRun):
    def finish(self) -> None:
        self.calls.append("finish")


def fake_wandb(calls: list[object]) -> ModuleType:
    def init(*, project: str, name: str, config: dict[str, Any], reinit: str) -> FakeWandbRun:
        calls.append((project, name, config, reinit))
        return FakeWandbRun(calls)

    module: Any = ModuleType("wandb")
    module.init = init
    return module  # type: ignore[no-any-return]


def fake_trackio(calls: list[object]) -> ModuleType:
    def init(project: str, name: str, config: dict[str, Any]) -> FakeTrackioRun:
        calls.append((project, name, config))
        return FakeTrackioRun(calls)

    module: Any = ModuleType("trackio")
    module.init = init
    return module  # type: ignore[no-any-return]


class FakeMlflow(ModuleType):
    def __init__(self, calls: list[object]) -> None:
        super().__init__("mlflow")
        self.calls, self.open = calls, 0

    def MlflowClient(self) -> "FakeMlflow":
        return self

    def set_experiment(self, experiment_name: str) -> SimpleNamespace:
        self.calls.append(experiment_name)
        return SimpleNamespace(experiment_id="7")

    def create_run(self, experiment_id: str, *, run_name: str) -> SimpleNamespace:
        self.open += 1
        self.calls.append((experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run {self.open}"))

    def log_params(self, params: dict[str, Any], *, run_id: str) -> None:
        self.calls.append((run_id, params))

    def log_metrics(self, metrics: dict[str, float], *, step: int, run_id: str) -> None:
        self.calls.append((run_id, step, metrics))

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self.calls.append((run_id, Path(local_path).read_bytes()))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.calls.append((run_id, status))


STEPS = [
    (1, {"train_loss": 0.5, "validation_macro_auc": 0.75}),
    (2, {"train_loss": 0.25, "validation_macro_auc": 0.875}),
]


def test_tensorboard_reads_back_what_was_told(head: Path, tmp_path: Path) -> None:
    tell(get_tracker("tensorboard", folder=tmp_path / "events"), head)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 0.5), (2, 0.25)]
    assert [e.value for e in events.Scalars("validation_macro_auc")] == [0.75, 0.875]
    texts = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[0].tensor_proto.string_val[0]
        for tag in events.Tags()["tensors"]
    }
    assert b'"experts": 6' in texts["k6"]
    assert (texts["artifacts"], texts["status"]) == (b"head.safetensors", b"finished")


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), ("killed", 1)])
def test_wandb_gets_config_numbers_files_and_how_it_ended(
    status: Status, code: int, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    tell(get_tracker("wandb", folder=head.parent), head, status=status)
    file = (b"tensors", "head.safetensors", "run")
    started = ("ctfm", "k6", CONFIG, "create_new")
    assert calls == [started, *STEPS, file, ("exit code", code)]


def test_trackio_is_wandb_shaped(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio(calls))
    tell(get_tracker("trackio", folder=head.parent), head)
    file = (b"tensors", "head.safetensors", "run")
    assert calls == [("ctfm", "k6", CONFIG), *STEPS, file, "finish"]


def test_mlflow_gets_config_numbers_files_and_how_it_ended(
    head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setitem(sys.modules, "mlflow", FakeMlflow(calls))
    tell(get_tracker("mlflow", folder=head.parent), head, status="killed")
    assert calls == [
        "ctfm",
        ("7", "k6"),
        ("run 1", CONFIG),
        *(("run 1", step, values) for step, values in STEPS),
        ("run 1", b"tensors"),
        ("run 1", "KILLED"),
    ]


def test_two_runs_of_mlflow_may_be_open_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setitem(sys.modules, "mlflow", FakeMlflow(calls))
    one, other = (get_tracker("mlflow", folder=tmp_path) for _ in range(2))
    one.start(CONFIG, "k6")
    other.start(CONFIG, "k1")
    one.scalars(1, {"train_loss": 0.5})
    other.scalars(1, {"train_loss": 0.25})
    assert calls[-2:] == [("run 1", 1, {"train_loss": 0.5}), ("run 2", 1, {"train_loss": 0.25})]


def test_no_account_and_no_usage_data_unless_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        get_tracker(name, folder=tmp_path)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert os.environ["WANDB_MODE"] == "online"
    monkeypatch.delenv("WANDB_MODE")
    get_tracker("wandb", folder=tmp_path)
    assert os.environ["WANDB_MODE"] == "offline"


class Failing:
    """Fails in one method and counts what reaches it."""

    def __init__(self, method: str) -> None:
        self.method, self.reached = method, 0

    def _reach(self, method: str) -> None:
        self.reached += 1
        if method == self.method:
            raise OSError("disk full")

    def start(self, config: Mapping[str, Any], name: str) -> None:
        self._reach("start")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._reach("scalars")

    def artifact(self, path: Path) -> None:
        self._reach("artifact")

    def finish(self, status: Status) -> None:
        self._reach("finish")


@pytest.mark.parametrize(
    ("method", "reached"), [("start", 1), ("scalars", 2), ("artifact", 4), ("finish", 5)]
)
def test_a_tracker_that_fails_warns_once_and_is_left_alone(
    method: str, reached: int, head: Path
) -> None:
    failing = Failing(method)
    with pytest.warns(UserWarning, match=r"blackboard .*goes on.*\(OSError: disk full\)") as caught:
        tell(Harmless(failing, "blackboard"), head)
    assert len(caught) == 1
    assert failing.reached == reached


def test_a_fit_that_the_user_stops_is_not_kept_alive_by_a_tracker() -> None:
    class Stopped(Failing):
        def _reach(self, method: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Harmless(Stopped("start"), "blackboard").start(CONFIG, "k6")


def test_a_tracker_that_works_warns_of_nothing(head: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell(Harmless(Failing("nowhere"), "blackboard"), head)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_says_what_to_type(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed .*pip install"):
        get_tracker(name, folder=tmp_path)


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose tensorboard, wandb, trackio, mlflow"):
        get_tracker("blackboard", folder=tmp_path)


def test_no_tracker_is_imported_unless_asked_for() -> None:
    code = "import sys, ctfm.heads.trackers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "tensorboard", "wandb", "trackio", "mlflow"}
