"""Fitting: a feature store and labels, to heads, each with its run.

Heads that see the same batches are fitted side by side (`fit_group`; `fit_head` is a group of
one): each batch is gathered once and multiplied once with the factors of all of them, while each
head has a loss, an optimiser, a stop and a best epoch of its own (`heads/learner.py`). A head
fitted in a group is the one that is fitted alone, up to rounding.

All that is drawn comes from (seed, epoch), so an epoch can be done again by itself: a run that was
killed goes on from its last whole epoch, to the same bytes.

Axes: n scans of a cohort, b scans of a batch, r rows, c findings, k experts.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ctfm.heads.branches import branches_state
from ctfm.heads.cohort import Labels, store_records
from ctfm.heads.config import FitConfig
from ctfm.heads.data import FitData
from ctfm.heads.diagnostics import diagnose
from ctfm.heads.learner import EpochRecord, Learner, identity_of
from ctfm.heads.outputs import (
    ScanOutputs,
    attention_table,
    group_outputs,
    head_groups,
    outputs_of,
    validate,
)
from ctfm.heads.runs import (
    SUMMARY,
    Run,
    RunWriter,
    StoreRecord,
    check_run_folder,
    predictions_table,
)
from ctfm.heads.summary import summary_of
from ctfm.heads.trackers import Status, get_tracker
from ctfm.store.errors import RunError
from ctfm.store.features import FeatureStore
from ctfm.store.provenance import machine, versions

Stores = FeatureStore | Sequence[FeatureStore]
"""One store, or several whose embeddings are joined."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A head to fit, and where its run goes."""

    config: FitConfig
    out: Path


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the fit of one head of a group ended."""

    status: Literal["ok", "given up", "diverged"]
    """Only with `ok` there is a finished run."""

    reason: str = ""
    """What happened, where it is not `ok`."""


def fit_head(
    store: Stores,
    labels: Labels,
    config: FitConfig,
    *,
    out: Path | str | None = None,
    device: torch.device | str | None = None,
    command: Sequence[str] | None = None,
    overwrite: bool = False,
    memory_bytes: int | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
) -> Run:
    """Fit a head and write its run.

    Interrupted or killed at any point it leaves an unfinished run, which does not open; fitting
    the same into it again goes on from its last epoch.

    Args:
        store: A finished feature store, or several.
        labels: A label table, its path, or labels that are joined to the store already.
        config: What decides the head.
        out: Folder of the run; None is `runs/<store>-<adapter>`.
        device: Where it computes; None is the GPU if there is one, else the CPU.
        command: What the user typed, for `summary.json`.
        overwrite: Whether a finished run in `out`, or an unfinished one of another fit, is
            replaced.
        memory_bytes: What the embeddings may use; None is a share of what is free.
        progress: Called at the end of each epoch.

    Raises:
        RunError: If `out` holds a finished run, or an unfinished one of another fit, and
            `overwrite` is False, or something else, or the loss diverges.
        StoreError: If the store is unfinished, damaged or has no such token.
        LabelError: If the labels do not fit the store, or are too few to choose an epoch by.
    """
    stores = (store,) if isinstance(store, FeatureStore) else tuple(store)
    folder = Path(out) if out is not None else default_folder(stores, config)
    check_run_folder(folder, overwrite=overwrite)
    data = FitData(stores, labels, config, device=device, memory_bytes=memory_bytes)
    if not overwrite:
        _refuse_other_fit(folder, identity=data.identity(config))

    def report(_: int, record: EpochRecord) -> bool:
        if progress is not None:
            progress(record)
        return False

    variant = Variant(config=config, out=folder)
    (ending,) = fit_group(data, [variant], command=command, stop_early=report)
    if ending.status != "ok":
        raise RunError(ending.reason)
    return Run.open(folder)


def _refuse_other_fit(folder: Path, *, identity: str) -> None:
    """Keep an interrupted fit from being lost to another one in its folder."""
    content = RunWriter(folder).checkpoint()
    if content is not None and identity_of(content) not in (None, identity):
        raise RunError(
            f"{folder} holds an interrupted fit of other settings, labels or scans (or in windows "
            "of another size): run that command again to go on with it, choose another folder "
            "(--out), or replace it with --overwrite"
        )


def default_folder(stores: Sequence[FeatureStore], config: FitConfig) -> Path:
    """`runs/<store>-<adapter>`, with the number of experts of a molre."""
    kind = f"molre{config.experts}" if config.adapter == "molre" else config.adapter
    return Path("runs") / f"{'+'.join(store.path.name for store in stores)}-{kind}"


def fit_group(
    data: FitData,
    variants: Sequence[Variant],
    *,
    command: Sequence[str] | None = None,
    stop_early: Callable[[int, EpochRecord], bool] | None = None,
) -> list[Ending]:
    """Fit heads side by side and write their runs.

    Heads whose checkpoints are of different epochs go on apart until they stop. One whose loss
    diverges is left, and does not keep the others from going on.

    Args:
        data: What they see.
        variants: The heads.
        command: What the user typed, for `summary.json`.
        stop_early: Called with the index of a head and its record at the end of each of its
            epochs; True gives the head up, and its run stays unfinished.

    Returns:
        For each head how it ended.
    """
    group = _Group(data, variants, stop_early=stop_early)
    group.begin()
    for epoch in sorted({len(learner.records) for learner in group.learners}):
        group.run(from_epoch=epoch)
    return group.finish(command=command)


class _Group:
    """Heads of one group while they are fitted."""

    def __init__(
        self,
        data: FitData,
        variants: Sequence[Variant],
        *,
        stop_early: Callable[[int, EpochRecord], bool] | None,
    ) -> None:
        self._data, self._variants = data, variants
        self._stop_early = stop_early
        self.learners = [data.learner(variant.config) for variant in variants]
        self._identities = [data.identity(variant.config) for variant in variants]
        self._writers = [RunWriter(variant.out) for variant in variants]
        self._left: dict[int, Ending] = {}

    def begin(self) -> None:
        """Go on from the checkpoint of each head, or start it afresh."""
        data = self._data
        for index, (writer, learner) in enumerate(zip(self._writers, self.learners, strict=True)):
            content = writer.checkpoint()
            if content is not None and learner.restore(content, self._identities[index]):
                self._write_epochs(index, checkpoint=content)
            else:
                writer.start()
            writer.write_config(
                learner.config,
                dims=[branch.dim for branch in data.branches],
                findings=data.cohort.findings,
                stores=[StoreRecord.of(store) for store in data.stores],
            )

    def run(self, *, from_epoch: int) -> None:
        """Fit the heads that have done so many epochs, until all of them have stopped."""
        active = [
            index
            for index, learner in enumerate(self.learners)
            if len(learner.records) == from_epoch
        ]
        epoch = from_epoch
        while active := [
            index
            for index in active
            if not self.learners[index].finished and index not in self._left
        ]:
            epoch += 1
            self._epoch(epoch, active)

    def _epoch(self, epoch: int, active: Sequence[int]) -> None:
        started_s = time.perf_counter()
        learners = [self.learners[index] for index in active]
        learn_epoch(self._data, learners, epoch=epoch)
        validations = validate(self._data, learners)
        seconds = time.perf_counter() - started_s
        for index, learner, validation in zip(active, learners, validations, strict=True):
            try:
                record = learner.end_epoch(epoch, validation=validation, seconds=seconds)
            except RunError as error:
                self._left[index] = Ending(status="diverged", reason=str(error))
                continue
            self._write_epochs(index, checkpoint=learner.checkpoint(self._identities[index]))
            if self._stop_early is not None and self._stop_early(index, record):
                self._left[index] = Ending(status="given up", reason=f"after epoch {epoch}")

    def finish(self, *, command: Sequence[str] | None) -> list[Ending]:
        """Predict every scan with the best epoch of each head, and publish the runs."""
        indices = range(len(self.learners))
        if kept := [index for index in indices if index not in self._left]:
            heads = [self.learners[index].best_branches() for index in kept]
            every = np.arange(self._data.cohort.scans.num_rows)
            for index, outputs in zip(kept, outputs_of(self._data, heads, every), strict=True):
                self._publish(index, outputs, command=command)
        return [self._left.get(index, Ending(status="ok")) for index in indices]

    def _write_epochs(self, index: int, *, checkpoint: bytes) -> None:
        records = [asdict(record) for record in self.learners[index].records]
        self._writers[index].write_epochs(records, checkpoint=checkpoint)

    def _publish(self, index: int, outputs: ScanOutputs, *, command: Sequence[str] | None) -> None:
        data, cohort = self._data, self._data.cohort
        learner = self.learners[index]
        self._writers[index].finish(
            branches_state(learner.judged),
            predictions=predictions_table(
                cohort.scans, findings=cohort.findings, logits=outputs.logits, labels=cohort.y
            ),
            attention=attention_table(data, outputs),
            summary={
                "command": list(command or []),
                "stores": store_records(data.stores, cohort.scans),
                **summary_of(data, learner, outputs),
                "routing": diagnose(data, learner.judged, outputs),
                "seconds": sum(record.seconds for record in learner.records),
                "side_by_side": len(self.learners),
                "versions": versions(),
                "machine": {**machine(), "device": str(data.device)},
            },
        )


def learn_epoch(data: FitData, learners: Sequence[Learner], *, epoch: int) -> None:
    """One pass over the scans; losses are fetched from the device at its end only."""
    groups = head_groups([learner.branches for learner in learners])
    for learner in learners:
        learner.begin_epoch(epoch)
    for batches, y, done in data.epoch(epoch):
        noise = [learner.noise(batches) for learner in learners]
        outputs = group_outputs(groups, batches, noise=noise)
        losses = [
            learner.loss(own, y, batches=batches)
            for learner, own in zip(learners, outputs, strict=True)
        ]
        torch.autograd.backward(torch.stack(losses).sum())
        for learner in learners:
            learner.step(epochs_done=epoch - 1 + done)


@contextlib.contextmanager
def tracked(
    name: str | None, folder: Path, config: FitConfig
) -> Iterator[Callable[[EpochRecord], None]]:
    """Tell a tracker of a fit, from its start to its end.

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
    tracker = get_tracker(name, folder=folder / "tensorboard")
    tracker.start(config.as_dict(), folder.name)
    status: Status = "failed"
    try:
        yield lambda record: tracker.scalars(record.epoch, _numbers(record))
        tracker.artifact(folder / SUMMARY)
        status = "finished"
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        tracker.finish(status)


def _numbers(record: EpochRecord) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(record).items() if name != "epoch"}
