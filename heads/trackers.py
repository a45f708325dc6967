"""Trackers: the epochs of a fit, to a service that draws them, if one is asked for.

A run's own files need none. A tracker gets the same numbers in four calls: start, scalars,
artifact, finish. Nothing is imported, and nothing leaves the machine, unless it was asked for by
name; a tracker that fails is warned of once and then left alone, and never stops a fit.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from ctfm.heads.config import FitConfig
from ctfm.heads.learner import EpochRecord
from ctfm.heads.runs import SUMMARY
from ctfm.store.errors import ConfigError

INSTALL = {
    "tensorboard": "pip install 'ctfm[tensorboard]'",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
    "mlflow": "pip install mlflow-skinny",
}
"""Trackers by name, and how to get each."""

PROJECT = "ctfm"


@runtime_checkable
class Tracker(Protocol):
    """Four calls that every tracker has."""

    def start(self, name: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin a run of that name, whose files are in a folder."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        ...

    def artifact(self, path: Path) -> None:
        """A file of the run."""
        ...

    def finish(self) -> None:
        """No more comes."""
        ...


class TensorBoard:
    """Event files beside the run (`<run>/tensorboard/`)."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def start(self, name: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Open a writer in the folder of the run."""
        self._writer = self._module.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"- {k}: {v}" for k, v in config.items()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One curve a number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def artifact(self, path: Path) -> None:
        """Its name; the file lies beside the events."""
        self._writer.add_text("artifact", path.name)

    def finish(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbShaped:
    """wandb, and trackio, which has the same calls."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def start(self, name: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin a run."""
        self._module.init(project=PROJECT, name=name, config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log them."""
        self._module.log(dict(values), step=step)

    def artifact(self, path: Path) -> None:
        """Log its name: files stay where they are."""
        self._module.log({"artifact": path.name})

    def finish(self) -> None:
        """End the run."""
        self._module.finish()


class MLflow:
    """MLflow, wherever its own settings say."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def start(self, name: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin a run in the experiment `ctfm`."""
        self._module.set_experiment(PROJECT)
        self._module.start_run(run_name=name)
        self._module.log_params({key: str(value) for key, value in config.items()})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log them."""
        self._module.log_metrics(dict(values), step=step)

    def artifact(self, path: Path) -> None:
        """Log the file."""
        self._module.log_artifact(str(path))

    def finish(self) -> None:
        """End the run."""
        self._module.end_run()


class Guarded:
    """A tracker whose failures are warned of once and then leave it silent."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._works = True

    def start(self, name: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        """As the tracker's."""
        self._try(lambda: self._tracker.start(name, folder=folder, config=config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As the tracker's."""
        self._try(lambda: self._tracker.scalars(step, values))

    def artifact(self, path: Path) -> None:
        """As the tracker's."""
        self._try(lambda: self._tracker.artifact(path))

    def finish(self) -> None:
        """As the tracker's."""
        self._try(self._tracker.finish)

    def _try(self, call: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            call()
        except Exception as error:
            self._works = False
            warnings.warn(
                f"{self._name} failed and is left alone from here on, the fit goes on: {error}",
                stacklevel=3,
            )


def get_tracker(name: str) -> Guarded:
    """The tracker of a name.

    Raises:
        ConfigError: If there is none of that name, or it is not installed.
    """
    if name not in INSTALL:
        raise ConfigError(f"no tracker is named {name!r}: choose {', '.join(INSTALL)}")
    try:
        module = importlib.import_module(
            "torch.utils.tensorboard" if name == "tensorboard" else name
        )
    except ImportError as error:
        raise ConfigError(f"{name} is not installed: {INSTALL[name]}") from error
    kinds: dict[str, Callable[[ModuleType], Tracker]] = {
        "tensorboard": TensorBoard,
        "mlflow": MLflow,
    }
    return Guarded(name, kinds.get(name, WandbShaped)(module))


@contextlib.contextmanager
def tracked(
    name: str | None, folder: Path, config: FitConfig
) -> Iterator[Callable[[EpochRecord], None]]:
    """Tell a tracker of a fit, from its start to its summary.

    Args:
        name: Of the tracker; None tells nobody.
        folder: Of the run, whose last part is the name of the run.
        config: What decides the head.

    Yields:
        What to call at the end of each epoch.
    """
    if name is None:
        yield lambda _: None
        return
    tracker = get_tracker(name)
    tracker.start(folder.name, folder=folder, config=config.as_dict())

    def told(record: EpochRecord) -> None:
        values = asdict(record)
        del values["epoch"]
        tracker.scalars(record.epoch, {key: float(value) for key, value in values.items()})

    try:
        yield told
        tracker.artifact(folder / SUMMARY)
    finally:
        tracker.finish()
