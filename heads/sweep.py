"""Sweeps: one grid over one feature store, to a run for each variant and a table of them all.

    runs/<variant>/   a run like any other
    sweep.parquet     one line a variant: how it ended, settings, seconds, parameters, macro AUC

Variants that see the same batches are fitted side by side, as many at once as the caches of the
device bear (`group_size`). A finished variant is never fitted again, and one that was killed goes
on from its last epoch, so a sweep is resumed by being run again.

Axes: v variants.
"""

import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ctfm.heads.cohort import Labels, gather_cohort, store_records
from ctfm.heads.config import FitConfig
from ctfm.heads.data import FitData
from ctfm.heads.fit import Ending, Variant, fit_group
from ctfm.heads.grid import Grid
from ctfm.heads.learner import EpochRecord
from ctfm.heads.runs import Run, check_run_folder, settings_of
from ctfm.store.errors import RunError
from ctfm.store.features import FeatureStore
from ctfm.store.files import publish_table
from ctfm.store.label_join import JoinedLabels
from ctfm.store.provenance import canonical_json

RUNS, TABLE = "runs", "sweep.parquet"

CACHE_BYTES = 2 * 1024 * 1024
"""What the first products of a group may take on a CPU: beyond, they leave its caches, and a head
of a group costs more than one alone (`bench/group_size.py`)."""

GPU_SHARE = 0.05
"""Share of the free memory of a GPU that they may take there."""

MOST_SIDE_BY_SIDE = 64

TYPICAL_SLICES = 40

Progress = Callable[[str, EpochRecord | None], None]
"""Called with the name of a variant and each epoch of it, and with None when it is finished."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Variants that are fitted side by side, wherever that is done."""

    stores: tuple[Path | str, ...]
    labels: JoinedLabels
    variants: tuple[Variant, ...]
    device: str | None
    memory_bytes: int | None
    command: tuple[str, ...]


def sweep(
    stores: Sequence[FeatureStore],
    labels: Labels,
    grid: Grid,
    *,
    out: Path | str,
    device: str | None = None,
    command: Sequence[str] = (),
    memory_bytes: int | None = None,
    side_by_side: int | None = None,
    executor: Executor | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """Fit every variant of a grid that is not finished yet.

    Args:
        stores: Finished feature stores.
        labels: See `fit_head`.
        grid: Which variants.
        out: Folder of the sweep.
        device: Where heads compute; None is the GPU if there is one, else the CPU.
        command: What the user typed.
        memory_bytes: What the embeddings may use; None is a share of what is free.
        side_by_side: Variants fitted at once; None is `group_size`.
        executor: Where groups are fitted, such as a Dask client's; None is here. Stores and `out`
            must then be reachable under the same paths.
        only: Names of the variants to fit; None is all.
        progress: See `Progress`; with an executor only finished variants are told.

    Returns:
        `sweep.parquet` (see `sweep_table`).

    Raises:
        RunError: If `out` holds runs of other stores or labels, or something else.
    """
    folder, variants = Path(out), grid.variants()
    first = next(iter(variants.values()))
    joined = gather_cohort(stores, labels, first).labels
    todo = {
        name: config
        for name, config in variants.items()
        if (only is None or name in only)
        and not is_finished(folder / RUNS / name, config, stores=stores, labels=joined)
    }
    # A worker may have been started in another folder.
    places = tuple(p.absolute() if isinstance(p := store.path, Path) else p for store in stores)
    runs = (folder / RUNS).absolute()
    parts = [
        Part(
            stores=places,
            labels=joined,
            variants=tuple(Variant(config=todo[n], out=runs / n) for n in names),
            device=device,
            memory_bytes=memory_bytes,
            command=tuple(command),
        )
        for names in groups_of(todo, device=device, most=side_by_side)
    ]
    endings = _fit_all(parts, executor=executor, progress=progress)
    table = sweep_table(folder, grid, endings)
    publish_table(folder / TABLE, table)
    return table


def is_finished(
    path: Path, config: FitConfig, *, stores: Sequence[FeatureStore], labels: JoinedLabels
) -> bool:
    """Whether a variant has its run.

    Raises:
        RunError: If it has the run of something else.
    """
    try:
        run = Run.open(path)
    except RunError:
        check_run_folder(path, overwrite=False)
        before = settings_of(path)
        if before is not None and before.canonical() != config:
            raise RunError(
                f"{path} is an interrupted fit of other settings: run that command again to go on "
                "with it, or choose another folder"
            ) from None
        return False
    scans = gather_cohort(stores, labels, config).scans
    same = (
        run.config.canonical() == config
        and run.summary["stores"] == store_records(stores, scans)
        and run.summary["labels"]["digest"] == labels.digest
    )
    if not same:
        raise RunError(
            f"{path} is a finished run of other settings, stores, labels or rows (scans were added "
            "since, or extracted again): choose another folder for this sweep"
        )
    return True


def group_size(config: FitConfig, *, device: str | None) -> int:
    """How many variants are fitted side by side.

    The products of the rows of a batch with the first factors of all of them should stay in the
    caches of a CPU, and in a small part of the memory of a GPU.
    """
    columns = config.experts * config.rank + config.router_hidden + 1
    need = config.batch_size * TYPICAL_SLICES * columns * 4
    have = CACHE_BYTES
    if torch.cuda.is_available() and device != "cpu":
        have = int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return max(1, min(MOST_SIDE_BY_SIDE, have // need))


def groups_of(
    variants: Mapping[str, FitConfig], *, device: str | None, most: int | None
) -> list[list[str]]:
    """Names of variants that are fitted side by side; those of equal shape together."""
    by_data: dict[str, list[str]] = {}
    for name, config in variants.items():
        by_data.setdefault(canonical_json(config.data_settings()), []).append(name)
    groups = []
    for names in by_data.values():
        names = sorted(names, key=lambda name: _shape(variants[name]))
        while names:
            size = most or group_size(variants[names[0]], device=device)
            groups.append(names[:size])
            names = names[size:]
    return groups


_RESULTS = {
    "best_epoch": pa.int64(),
    "last_epoch": pa.int64(),
    "seconds": pa.float64(),
    "parameters": pa.int64(),
    "adapter_parameters": pa.int64(),
    "validation_macro_auc": pa.float64(),
    "test_macro_auc": pa.float64(),
    "validation_findings": pa.int64(),
    "test_findings": pa.int64(),
}


def sweep_table(folder: Path, grid: Grid, endings: Mapping[str, Ending]) -> pa.Table:
    """One line a variant that was tried.

    Args:
        folder: Of the sweep.
        grid: Its grid.
        endings: How the fits ended that were done now, by the names of their variants.

    Returns:
        name; status (`ok`, `given up`, `diverged`) and reason, which is null where it is ok; a
        column for each factor of the grid, and seed; best_epoch, last_epoch, seconds (of the
        group, divided by its heads), parameters, adapter_parameters, validation_macro_auc,
        test_macro_auc, validation_findings, test_findings, which are null where it is not.
    """
    factors, lines = list(dict.fromkeys([*grid.factors, "seed"])), []
    for name, config in grid.variants().items():
        ending = endings.get(name, Ending(status="ok"))
        results: dict[str, Any] = dict.fromkeys(_RESULTS)
        if ending.status == "ok":
            try:
                results |= _results(Run.open(folder / RUNS / name).summary)
            except RunError:
                continue
        about = {"name": name, "status": ending.status, "reason": ending.reason or None}
        lines.append({**about, **{one: getattr(config, one) for one in factors}, **results})
    kinds = {**dict.fromkeys(("name", "status", "reason"), pa.string()), **_RESULTS}
    columns = {
        key: _column([line[key] for line in lines], kinds.get(key))
        for key in ("name", "status", "reason", *factors, *_RESULTS)
    }
    return pa.table(columns)


def _results(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "best_epoch": summary["best_epoch"],
        "last_epoch": summary["last_epoch"],
        "seconds": summary["seconds"] / summary["side_by_side"],
        "parameters": summary["parameters"]["head"],
        "adapter_parameters": summary["parameters"]["adapter"],
        **{f"{split}_macro_auc": auc for split, auc in summary["macro_auc"].items()},
        **{f"{split}_findings": n for split, n in summary["macro_findings"].items()},
    }


def _column(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
    """A column; texts where the values of a setting are of several kinds (`auto` and 0.001)."""
    if kind is None and len({type(value) for value in values}) > 1:
        values = [str(value) for value in values]
    return pa.array(values, kind)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one value of one factor does, over all other factors."""

    factor: str
    value: Any

    variants: int
    """Combinations of the other factors that were averaged, seeds counted once."""

    mean: float
    """Mean over them of the macro AUC."""

    seed_sd: float
    """Standard deviation over seeds within a combination, pooled; NaN with one seed."""


def marginal_effects(
    folder: Path | str, grid: Grid, *, metric: str = "validation_macro_auc"
) -> list[Effect]:
    """The marginal effect of every value of every factor that varies.

    Combinations that are the same head count wherever the grid has them, so in a grid whose
    variants are all fitted every value is averaged over the same combinations of the others. Where
    some are not (a random search, a head that diverged), the effects of factors mix.

    Args:
        folder: Of the sweep.
        grid: Its grid.
        metric: A column of `sweep.parquet`.
    """
    table = pq.read_table(Path(folder) / TABLE)
    known = dict(zip(table["name"].to_pylist(), table[metric].to_pylist(), strict=True))
    effects = []
    for factor, values in grid.factors.items():
        if factor == "seed" or len(values) < 2:
            continue
        for value in values:
            cells: dict[str, list[float]] = {}
            for point in grid.points():
                score = known.get(grid.name(grid.config(point)))
                if point[factor] == value and score is not None:
                    others = {name: point[name] for name in point if name != "seed"}
                    cells.setdefault(canonical_json(others), []).append(score)
            if cells:
                effects.append(_effect(factor, value, list(cells.values())))
    return effects


def _effect(factor: str, value: Any, cells: Sequence[Sequence[float]]) -> Effect:
    spreads = [statistics.variance(cell) for cell in cells if len(cell) > 1]
    return Effect(
        factor=factor,
        value=value,
        variants=len(cells),
        mean=statistics.fmean(statistics.fmean(cell) for cell in cells),
        seed_sd=statistics.fmean(spreads) ** 0.5 if spreads else float("nan"),
    )


def _fit_all(
    parts: Sequence[Part], *, executor: Executor | None, progress: Progress | None
) -> dict[str, Ending]:
    endings: dict[str, Ending] = {}
    if executor is None:
        for part in parts:
            endings |= fit_part(part, progress=progress)
        return endings
    waiting = {executor.submit(fit_part, part): part for part in parts}
    for future in as_completed(waiting):
        endings |= future.result()
        if progress is not None:
            for variant in waiting[future].variants:
                progress(variant.out.name, None)
    return endings


def fit_part(part: Part, *, progress: Progress | None = None) -> dict[str, Ending]:
    """Fit the variants of a part, and say how each ended; a worker of a cluster runs this."""
    data = _Loaded.data_of(part)

    def report(index: int, record: EpochRecord) -> bool:
        if progress is not None:
            progress(part.variants[index].out.name, record)
        return False

    endings = fit_group(data, part.variants, command=part.command, stop_early=report)
    names = [variant.out.name for variant in part.variants]
    if progress is not None:
        for name in names:
            progress(name, None)
    return dict(zip(names, endings, strict=True))


class _Loaded:
    """The data of the last part of this process: the next one often has the same."""

    _lock = threading.Lock()  # a worker may fit parts in several threads
    _key: str | None = None
    _data: FitData | None = None

    @classmethod
    def data_of(cls, part: Part) -> FitData:
        config = part.variants[0].config
        stores = [FeatureStore.open(path) for path in part.stores]
        key = canonical_json(
            {
                "stores": [str(path) for path in part.stores],
                "rows": [store_records([store], store.scans) for store in stores],
                "labels": part.labels.digest,
                "data": config.data_settings(),
                "device": part.device,
                "memory": part.memory_bytes,
            }
        )
        with cls._lock:
            if cls._data is None or cls._key != key:
                cls._data = None  # free the old rows before the new ones are read
                cls._data = FitData(
                    stores,
                    part.labels,
                    config,
                    device=part.device,
                    memory_bytes=part.memory_bytes,
                )
                cls._key = key
            return cls._data


def _shape(config: FitConfig) -> str:
    """Sorts variants whose parameters have equal sizes next to each other."""
    names = [field.name for field in fields(FitConfig) if field.name not in ("seed", "lr_head")]
    return canonical_json([getattr(config, name) for name in names])
