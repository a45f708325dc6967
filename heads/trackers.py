"""Trackers: the numbers of a fit as they come, to a program that shows them.

A run holds all of them in `metrics.jsonl` with or without a tracker, so one that fails is switched
off and the fit goes on. No tracker is imported unless it is asked for, and none is given an account
or sends usage data: `wandb` writes to disk only, for `wandb sync` to send, unless the environment
variable WANDB_MODE says otherwise. Files go where the user lets them: an artifact is what the
caller names, and predictions of patients need not be among them.
"""

import importlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from ctfm.store.errors import ConfigError

PROJECT = "ctfm"
"""Project of `wandb` and `trackio`, experiment of `mlflow`."""

Status = Literal["finished", "failed", "killed"]
"""How a fit ended: by itself, by an error, or by the user."""


@runtime_checkable
class Tracker(Protocol):
    """What a fit tells; the four are called in this order."""

    def start(self, config: Mapping[str, Any], name: str) -> None:
        """Begin a run of that name with these settings."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step; steps rise."""

    def artifact(self, path: Path) -> None:
        """A file that belongs to the run."""

    def finish(self, status: Status) -> None:
        """End the run."""


class TensorBoard:
    """Event files for `tensorboard --logdir`; it keeps no files, so of an artifact only the name.

    Args:
        module: `torch.utils.tensorboard`.
        folder: Of the event files.
    """

    def __init__(self, module: Any, folder: Path) -> None:
        self._module, self._folder = module, folder

    def start(self, config: Mapping[str, Any], name: str) -> None:
        self._writer = self._module.SummaryWriter(str(self._folder))
        settings = json.dumps(dict(config), indent=1, ensure_ascii=False, default=str)
        # Four spaces make a block of code of it.
        self._writer.add_text(name, "\n".join(f"    {line}" for line in settings.splitlines()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def artifact(self, path: Path) -> None:
        self._writer.add_text("artifacts", path.name)

    def finish(self, status: Status) -> None:
        self._writer.add_text("status", status)
        self._writer.close()


class WandbShaped:
    """`wandb`, and `trackio`, which has its calls; several runs may be open at once.

    Args:
        module: What has `init`.
        opened: Further arguments of `init`.
        finished: Arguments of the run's `finish`.
    """

    def __init__(
        self,
        module: Any,
        *,
        opened: Mapping[str, Any],
        finished: Callable[[Status], Mapping[str, Any]],
    ) -> None:
        self._module, self._opened, self._finished = module, opened, finished

    def start(self, config: Mapping[str, Any], name: str) -> None:
        self._run = self._module.init(
            project=PROJECT, name=name, config=dict(config), **self._opened
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def artifact(self, path: Path) -> None:
        self._run.log_artifact(str(path), name=path.name, type="run")

    def finish(self, status: Status) -> None:
        self._run.finish(**self._finished(status))


class Mlflow:
    """MLflow, at the place that MLFLOW_TRACKING_URI names; several runs may be open at once.

    Args:
        module: `mlflow`.
    """

    def __init__(self, module: Any) -> None:
        self._mlflow = module

    def start(self, config: Mapping[str, Any], name: str) -> None:
        experiment = self._mlflow.set_experiment(PROJECT)
        self._client = self._mlflow.MlflowClient()
        run = self._client.create_run(experiment.experiment_id, run_name=name)
        self._id = run.info.run_id
        self._mlflow.log_params(dict(config), run_id=self._id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, run_id=self._id)

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._id, status.upper())


class Harmless:
    """A tracker that never stops a fit: at its first error it warns and is switched off.

    Args:
        tracker: The one that does the work.
        name: What the warning calls it.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker: Tracker | None = tracker
        self._name = name

    def start(self, config: Mapping[str, Any], name: str) -> None:
        self._try(lambda tracker: tracker.start(config, name))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda tracker: tracker.scalars(step, values))

    def artifact(self, path: Path) -> None:
        self._try(lambda tracker: tracker.artifact(path))

    def finish(self, status: Status) -> None:
        self._try(lambda tracker: tracker.finish(status))

    def _try(self, tell: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            tell(self._tracker)
        except Exception as error:
            self._tracker = None
            warnings.warn(
                f"{self._name} gets nothing more of this fit, which goes on; metrics.jsonl has it "
                f"all ({type(error).__name__}: {error})",
                stacklevel=3,
            )


@dataclass(frozen=True, kw_only=True)
class TrackerEntry:
    """A tracker that can be asked for by name."""

    name: str

    module: str
    """What has to be importable."""

    install: str
    """What to type where it is not."""

    make: Callable[[Any, Path], Tracker]
    """From the module and a folder for files of its own."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are set before it is imported, unless the user has set them."""


_ENTRIES = (
    TrackerEntry(
        name="tensorboard",
        module="torch.utils.tensorboard",
        install="pip install 'ctfm[tensorboard]'",
        make=TensorBoard,
    ),
    TrackerEntry(
        name="wandb",
        module="wandb",
        install="pip install wandb",
        make=lambda module, _: WandbShaped(
            module,
            opened={"reinit": "create_new"},
            finished=lambda status: {"exit_code": int(status != "finished")},
        ),
        environment={"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"},
    ),
    TrackerEntry(
        name="trackio",
        module="trackio",
        install="pip install trackio",
        make=lambda module, _: WandbShaped(module, opened={}, finished=lambda _: {}),
    ),
    TrackerEntry(
        name="mlflow",
        module="mlflow",
        install="pip install mlflow",
        make=lambda module, _: Mlflow(module),
        environment={"MLFLOW_DISABLE_TELEMETRY": "true"},
    ),
)

TRACKERS = {entry.name: entry for entry in _ENTRIES}


def get_tracker(name: str, *, folder: Path) -> Tracker:
    """A tracker by its name, imported but not started.

    Args:
        name: A name in `TRACKERS`.
        folder: Where `tensorboard` puts its event files; the others have places of their own.

    Raises:
        ConfigError: If no tracker has that name, or its package is not installed.
    """
    if name not in TRACKERS:
        raise ConfigError(f"no tracker is named {name!r}: choose {', '.join(TRACKERS)}")
    entry = TRACKERS[name]
    for variable, value in entry.environment.items():
        os.environ.setdefault(variable, value)
    try:
        module = importlib.import_module(entry.module)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed ({error}): {entry.install}") from error
    return Harmless(entry.make(module, folder), name)
