"""Ensembles: folds of a cross-validation and seeds, to one run whose heads answer together.

The members are the runs of a sweep over `fold` and `seed` (`<out>/runs/`). The run on top of them
has a logit that is the mean of theirs. With folds, each scan is predicted only by the members that
had its patient in their test part, so every scan is a test scan and none is predicted by a head
that has seen it; a new scan is predicted by all.

Axes: n scans, c findings, e members, r slices of all scans, packed.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ctfm.heads.cohort import Labels, gather_cohort
from ctfm.heads.config import FitConfig
from ctfm.heads.evaluate import labels_and_logits
from ctfm.heads.grid import Grid
from ctfm.heads.metrics import auc_per_finding
from ctfm.heads.runs import HEAD, SUMMARY, Run, RunWriter, check_run_folder, predictions_table
from ctfm.heads.sweep import RUNS, Progress, is_finished, sweep
from ctfm.store.errors import ConfigError, RunError
from ctfm.store.features import FeatureStore
from ctfm.store.provenance import machine, versions
from ctfm.store.splits import SPLITS


def fit_ensemble(
    stores: Sequence[FeatureStore],
    labels: Labels,
    config: FitConfig,
    *,
    folds: int = 0,
    seeds: int = 1,
    out: Path | str,
    device: str | None = None,
    command: Sequence[str] = (),
    overwrite: bool = False,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Run:
    """Fit the members that are not finished yet, and the run on top of them.

    Args:
        stores: Finished feature stores.
        labels: See `fit_head`.
        config: Of the members, but for `folds`, `fold` and `seed`.
        folds: Parts of the cross-validation, by patient; 0 is the config's split.
        seeds: Heads a fold, whose seeds follow the config's.
        out: Folder of the run.
        device: Where heads compute; None is the GPU if there is one, else the CPU.
        command: What the user typed, for `summary.json`.
        overwrite: Whether a finished run in `out` is replaced.
        memory_bytes: What the embeddings may use; None is a share of what is free.
        progress: Called as by `sweep`.

    Raises:
        ConfigError: If there would be fewer than two members.
        RunError: If `out` holds a finished run and `overwrite` is False, or something else, or
            the loss of a member diverges.
    """
    if max(folds, 1) * seeds < 2:
        raise ConfigError(f"an ensemble needs several members, got {folds} folds and {seeds} seeds")
    folder = Path(out)
    check_run_folder(folder, overwrite=overwrite)
    grid = Grid(
        base=replace(config, folds=folds),
        factors={
            **({"fold": tuple(range(folds))} if folds else {}),
            "seed": tuple(range(config.seed, config.seed + seeds)),
        },
    )
    if overwrite:
        _clear(folder, grid, stores=stores, labels=labels)
    elif RunWriter(folder).checkpoint():
        raise RunError(
            f"{folder} holds an interrupted fit of one head: run that command again to go on with "
            "it, choose another folder (--out), or replace it with --overwrite"
        )
    table = sweep(
        stores,
        labels,
        grid,
        out=folder,
        device=device,
        command=command,
        memory_bytes=memory_bytes,
        progress=progress,
    )
    for line in table.to_pylist():
        if line["status"] != "ok":
            raise RunError(f"member {line['name']}: {line['reason']}")
    members = [Run.open(folder / RUNS / name) for name in grid.variants()]
    return join_runs(members, out=folder, folds=folds, command=command)


def _clear(folder: Path, grid: Grid, *, stores: Sequence[FeatureStore], labels: Labels) -> None:
    """Remove a finished run, and members of another one; what was interrupted is gone on with."""
    members = grid.variants()
    joined = gather_cohort(stores, labels, next(iter(members.values()))).labels
    try:
        for name, config in members.items():
            is_finished(folder / RUNS / name, config, stores=stores, labels=joined)
        replaced = (folder / SUMMARY).exists()
    except RunError:
        replaced = True
    if replaced:
        (folder / SUMMARY).unlink(missing_ok=True)
        shutil.rmtree(folder / RUNS, ignore_errors=True)


def join_runs(members: Sequence[Run], *, out: Path, folds: int, command: Sequence[str]) -> Run:
    """One run of several, over the same scans and findings, that answers with their mean."""
    tables = [member.predictions() for member in members]
    first = members[0]
    says = _says(tables, folds=folds)
    y, _ = labels_and_logits(tables[0], first.findings)
    each = np.stack([labels_and_logits(table, first.findings)[1] for table in tables])
    logits = np.einsum("en,enc->nc", says / says.sum(0), each).astype(np.float32)
    scans = tables[0].select(["scan_id", "study_id", "patient_id", "split"])
    if folds:
        everywhere = pa.array(["test"] * scans.num_rows, pa.string())
        scans = scans.set_column(scans.column_names.index("split"), "split", everywhere)
    writer = RunWriter(out)
    writer.start()
    writer.write_config(
        first.config,
        dims=first.dims,
        findings=first.findings,
        stores=first.stores,
        ensemble={"members": len(members), "folds": folds},
    )
    records = [
        {"member": member.path.name, **record} for member in members for record in member.epochs()
    ]
    writer.write_epochs(records, checkpoint=b"")
    writer.finish(
        _tensors(members),
        predictions=predictions_table(scans, findings=first.findings, logits=logits, labels=y),
        attention=_attention(members, scans=scans, says=says),
        summary={
            **_summary(members, scans=scans, y=y, logits=logits),
            "command": list(command),
            "versions": versions(),
            "machine": machine(),
        },
    )
    return Run.open(out)


def _says(tables: Sequence[pa.Table], *, folds: int) -> Bool[np.ndarray, "e n"]:
    """Which member predicts which scan."""
    if not folds:
        return np.ones((len(tables), tables[0].num_rows), dtype=bool)
    return np.stack([table["split"].to_numpy() == "test" for table in tables])


def _tensors(members: Sequence[Run]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, member in enumerate(members):
        own = safetensors.torch.load_file(member.path / HEAD)
        tensors |= {f"members.{index}.{name}": value for name, value in own.items()}
    return tensors


def _attention(
    members: Sequence[Run], *, scans: pa.Table, says: Bool[np.ndarray, "e n"]
) -> pa.Table:
    """The mean attention of the members that predict a scan; each gives every slice a number."""
    tables = [member.attention() for member in members]
    columns = {"scan_id": scans["scan_id"], "split": scans["split"]}
    columns["position_mm"] = tables[0]["position_mm"]
    for name in tables[0].column_names:
        if name.startswith("attention"):
            columns[name] = _mean_lists([table[name] for table in tables], says=says)
    return pa.table(columns)


def _mean_lists(columns: Sequence[pa.ChunkedArray], *, says: Bool[np.ndarray, "e n"]) -> pa.Array:
    lists = [column.combine_chunks() for column in columns]
    lengths = lists[0].value_lengths().fill_null(0).to_numpy()
    values: Float64[np.ndarray, "e r"] = np.stack([one.flatten().to_numpy() for one in lists])
    weights = np.repeat(says / says.sum(0), lengths, axis=1)
    mean = (weights * values).sum(0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(mean, pa.float32()), mask=lists[0].is_null())


def _summary(
    members: Sequence[Run],
    *,
    scans: pa.Table,
    y: Float[np.ndarray, "n c"],
    logits: Float[np.ndarray, "n c"],
) -> dict[str, Any]:
    """What is said of all members together; of folds there is one split, in which every scan is."""
    first, patients = members[0], scans["patient_id"].to_numpy()
    splits = ("test",) if first.config.folds else SPLITS
    inside = {name: scans["split"].to_numpy() == name for name in splits}
    findings = _about_findings(members, {name: y[lines] for name, lines in inside.items()})
    taught = np.array([findings[name]["taught"] for name in first.findings])
    macro, counts = {}, {}
    for name, lines in inside.items():
        auc = auc_per_finding(y[lines], logits[lines], min_positives=first.config.min_positives)
        known = auc[np.isfinite(auc) & taught]
        macro[name] = float(known.mean()) if known.size else float("nan")
        counts[name] = int(known.size)
    return {
        **{name: first.summary[name] for name in ("stores", "labels")},
        "scans": {name: int(lines.sum()) for name, lines in inside.items()},
        "patients": {name: len(set(patients[lines])) for name, lines in inside.items()},
        "parameters": {
            part: sum(member.summary["parameters"][part] for member in members)
            for part in ("head", "adapter")
        },
        "findings": findings,
        "macro_auc": macro,
        "macro_findings": counts,
        "members": [_about_member(member) for member in members],
        "seconds": sum(
            member.summary["seconds"] / member.summary["side_by_side"] for member in members
        ),
    }


def _about_member(member: Run) -> dict[str, Any]:
    own = ("scans", "best_epoch", "last_epoch", "macro_auc")
    warnings = [said for branch in member.summary["routing"] for said in branch["warnings"]]
    return {
        "name": member.path.name,
        **{name: member.summary[name] for name in own},
        "warnings": warnings,
    }


def _about_findings(
    members: Sequence[Run], labels: Mapping[str, Float[np.ndarray, "_ c"]]
) -> dict[str, dict[str, Any]]:
    """Labels of each finding by split, and whether every member could learn it."""
    return {
        finding: {
            "positives": {split: int((y[:, c] == 1).sum()) for split, y in labels.items()},
            "negatives": {split: int((y[:, c] == 0).sum()) for split, y in labels.items()},
            "taught": all(member.summary["findings"][finding]["taught"] for member in members),
        }
        for c, finding in enumerate(members[0].findings)
    }
