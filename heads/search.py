"""Searches: which variants of a grid are fitted, and when one is given up.

`grid` fits all of them, `random` some, drawn by seed. `optuna` (an optional extra) proposes them
from what it has seen (TPE, Bergstra et al. 2011) and gives up a head that lags behind the median
of the others at the same epoch; it asks for as many proposals at once as are fitted side by side.
Every variant is a run like any other, so a search is gone on with by being run again.
"""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pyarrow as pa

from ctfm.heads.cohort import Labels, gather_cohort
from ctfm.heads.config import FitConfig
from ctfm.heads.data import FitData
from ctfm.heads.fit import Ending, Variant, fit_group
from ctfm.heads.grid import Grid
from ctfm.heads.learner import EpochRecord
from ctfm.heads.runs import Run
from ctfm.heads.sweep import (
    RUNS,
    TABLE,
    Progress,
    group_size,
    is_finished,
    sweep,
    sweep_table,
)
from ctfm.store.errors import ConfigError
from ctfm.store.features import FeatureStore
from ctfm.store.files import publish_table

METHODS = ("grid", "random", "optuna")

WARM_UP_EPOCHS = 5
"""Epochs before which no head is given up."""


def search(
    stores: Sequence[FeatureStore],
    labels: Labels,
    grid: Grid,
    *,
    out: Path | str,
    method: str = "grid",
    trials: int = 20,
    device: str | None = None,
    command: Sequence[str] = (),
    memory_bytes: int | None = None,
    side_by_side: int | None = None,
    executor: Executor | None = None,
    begin: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """Fit variants of a grid as a method chooses them.

    Args:
        stores: Finished feature stores.
        labels: See `fit_head`.
        grid: Which variants there are.
        out: Folder of the sweep.
        method: One of `METHODS`.
        trials: Variants of `random` and `optuna`.
        device: Where heads compute.
        command: What the user typed.
        memory_bytes: What the embeddings may use.
        side_by_side: Variants fitted at once.
        executor: Where groups are fitted; None is here, as `optuna` must.
        begin: Called with the number of variants.
        progress: See `Progress`.

    Raises:
        ConfigError: If there is no such method, Optuna is not installed, or is to use a cluster.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "optuna" and executor is not None:
        raise ConfigError(
            "optuna asks for the next heads when it knows the last, and fits in this process: "
            "leave out --scheduler, or choose the method grid or random"
        )
    count = len(grid.variants()) if method == "grid" else min(trials, len(grid.variants()))
    if begin is not None:
        begin(count)
    if method == "optuna":
        proposals = _Proposals(
            stores, labels, grid, out=Path(out), device=device, memory_bytes=memory_bytes
        )
        return proposals.run(count, side_by_side=side_by_side, command=command, progress=progress)
    chosen = None if method == "grid" else drawn(grid, count)
    return sweep(
        stores,
        labels,
        grid,
        out=out,
        only=chosen,
        device=device,
        command=command,
        memory_bytes=memory_bytes,
        side_by_side=side_by_side,
        executor=executor,
        progress=progress,
    )


def drawn(grid: Grid, count: int) -> list[str]:
    """Names of variants drawn without repetition, the same each time for the same grid."""
    return sorted(random.Random(grid.base.seed).sample(list(grid.variants()), count))


class _Proposals:
    """Optuna's study of a grid, and the heads that it asks for."""

    def __init__(
        self,
        stores: Sequence[FeatureStore],
        labels: Labels,
        grid: Grid,
        *,
        out: Path,
        device: str | None,
        memory_bytes: int | None,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                "the method optuna needs Optuna: pip install 'ctfm[optuna]', or choose random"
            ) from error
        self._optuna, self._stores, self._grid, self._out = optuna, stores, grid, out
        first = next(iter(grid.variants().values()))
        self._labels = gather_cohort(stores, labels, first).labels
        self._device, self._memory_bytes = device, memory_bytes
        self._data: FitData | None = None
        self._endings: dict[str, Ending] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=grid.base.seed, multivariate=False),
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=WARM_UP_EPOCHS),
        )
        self._distributions = {
            name: optuna.distributions.CategoricalDistribution(values)
            for name, values in grid.factors.items()
        }

    def run(
        self,
        count: int,
        *,
        side_by_side: int | None,
        command: Sequence[str],
        progress: Progress | None,
    ) -> pa.Table:
        """Fit so many variants; finished ones are told to the study, not fitted again."""
        left = count
        while left > 0:
            asked = [
                self._study.ask(self._distributions)
                for _ in range(min(left, side_by_side or self._size()))
            ]
            self._fit(asked, command=command, progress=progress)
            left -= len(asked)
        table = sweep_table(self._out, self._grid, self._endings)
        publish_table(self._out / TABLE, table)
        return table

    def _size(self) -> int:
        return group_size(self._grid.base, device=self._device)

    def _fit(
        self, trials: Sequence[Any], *, command: Sequence[str], progress: Progress | None
    ) -> None:
        by_name: dict[str, list[Any]] = {}
        configs: dict[str, FitConfig] = {}
        for trial in trials:
            config = self._grid.config(trial.params)
            name = self._grid.name(config)
            by_name.setdefault(name, []).append(trial)
            configs[name] = config
        todo = [name for name in configs if not self._is_finished(name, configs[name])]
        by_data: dict[str, list[str]] = {}
        for name in todo:
            by_data.setdefault(str(configs[name].data_settings()), []).append(name)
        for names in by_data.values():
            self._fit_side_by_side(names, configs, by_name, command=command)
        for name, own in by_name.items():
            value = self._value(name, configs[name])
            for trial in own:
                state = self._optuna.trial.TrialState
                pruned = value is None
                self._study.tell(trial, value, state=state.PRUNED if pruned else state.COMPLETE)
                if progress is not None:
                    progress(name, None)

    def _fit_side_by_side(
        self,
        names: Sequence[str],
        configs: dict[str, FitConfig],
        trials: dict[str, list[Any]],
        *,
        command: Sequence[str],
    ) -> None:
        first = configs[names[0]]
        if self._data is None or self._data.config.data_settings() != first.data_settings():
            self._data = FitData(
                self._stores,
                self._labels,
                first,
                device=self._device,
                memory_bytes=self._memory_bytes,
            )

        def give_up(index: int, record: EpochRecord) -> bool:
            own = trials[names[index]][0]
            own.report(record.validation_macro_auc, record.epoch)
            return bool(own.should_prune())

        variants = [Variant(config=configs[n], out=self._out / RUNS / n) for n in names]
        endings = fit_group(self._data, variants, command=command, stop_early=give_up)
        self._endings |= dict(zip(names, endings, strict=True))

    def _is_finished(self, name: str, config: FitConfig) -> bool:
        return is_finished(
            self._out / RUNS / name, config, stores=self._stores, labels=self._labels
        )

    def _value(self, name: str, config: FitConfig) -> float | None:
        if not self._is_finished(name, config):
            return None
        found: float = Run.open(self._out / RUNS / name).summary["macro_auc"]["validation"]
        return found
