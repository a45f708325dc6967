"""Fitting: a feature store and labels, to a run.

The protocol of Sec. 2.2 of the MoLRE paper on cached embeddings: AdamW with a rate of its own for
MoLRE, focal loss with prevalence weights, repeat-factor sampling, at least 20 epochs, a stop after
5 without a better validation macro AUC, the best epoch kept. The embeddings are read once and stay
in memory; an epoch only gathers rows. The backbone is frozen: this is not the paper's end-to-end
training, and its tables do not compare with ours one to one.

One seed gives one head on one device.

Axes: n scans, b scans of a batch, s slices, c findings.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from ctfm.heads.batches import PackedScans
from ctfm.heads.cohort import (
    Cohort,
    Labels,
    gather_cohort,
    selecting_findings,
    taught_findings,
)
from ctfm.heads.config import FitConfig
from ctfm.heads.head import Head
from ctfm.heads.losses import AlphaWeights, alpha_weights, focal_loss, prevalence, prevalence_logit
from ctfm.heads.metrics import auc_per_finding, average_precision_per_finding
from ctfm.heads.runs import Run, RunWriter, build_head, check_run_folder, predictions_table
from ctfm.heads.sampling import automatic_threshold, epoch_order, repeat_factors
from ctfm.store.errors import RunError
from ctfm.store.features import FeatureStore
from ctfm.store.provenance import machine, versions
from ctfm.store.splits import SPLITS

PREDICT_SCANS = 256
"""Scans of a batch where nothing is learnt."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One line of `metrics.jsonl`."""

    epoch: int
    """From 1."""

    train_loss: float
    """Mean over the visits of the epoch, while the parameters moved."""

    validation_loss: float
    """With the parameters at the end of the epoch."""

    validation_macro_auc: float
    """Over the findings that choose the epoch, which are the same in every epoch."""

    validation_macro_ap: float
    """Average precision over the same findings."""

    best: bool
    """Whether no epoch before had as high a validation macro AUC."""

    visits: int
    """Scans seen, repeats included."""

    seconds: float
    """Wall time of the epoch."""


def fit_head(
    store: FeatureStore,
    labels: Labels,
    config: FitConfig,
    *,
    out: Path | str,
    device: torch.device | str | None = None,
    command: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[EpochRecord], None] | None = None,
) -> Run:
    """Fit a head and write its run.

    Interrupted or killed at any point it leaves an unfinished run, which does not open; fitting
    into it again starts afresh.

    Args:
        store: A finished feature store.
        labels: A label table, its path, or labels that are joined to the store already.
        config: What decides the head.
        out: Folder of the run.
        device: Where it computes; None is the GPU if there is one, else the CPU.
        command: What the user typed, for `summary.json`.
        overwrite: Whether a finished run in `out` is replaced.
        progress: Called at the end of each epoch.

    Raises:
        RunError: If `out` holds a finished run and `overwrite` is False, or something else, or
            the loss diverges.
        StoreError: If the store is unfinished, damaged or has no such token.
        LabelError: If the labels do not fit the store, or are too few to choose an epoch by.
    """
    started_s, out = time.perf_counter(), Path(out)
    check_run_folder(out, overwrite=overwrite)
    cohort = gather_cohort(store, labels, config)
    fitting = _Fitting(cohort, config, device=_device(device))
    with RunWriter(out) as writer:
        writer.write_config(
            config,
            dim=cohort.packed.rows.shape[1],
            findings=cohort.findings,
            fingerprint=store.fingerprint,
            store_settings=store.settings,
        )
        for record in fitting.epochs():
            writer.write_epoch(asdict(record))
            if progress is not None:
                progress(record)
        about = {"command": list(command or []), "store": {"fingerprint": store.fingerprint}}
        _finish(writer, fitting, cohort, about=about, started_s=started_s)
    return Run.open(out)


def parameter_groups(head: Head, config: FitConfig) -> list[dict[str, Any]]:
    """Parameters for AdamW: the router learns at the rate of the experts, being part of MoLRE.

    Biases and the query do not decay.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in head.named_parameters():
        rate = config.lr_molre if name.startswith("molre.") else config.lr_head
        decays = not name.endswith("bias") and name != "pool.query"
        groups.setdefault((rate, config.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


class _Fitting:
    """A head while it is fitted, with the data on the device."""

    def __init__(
        self,
        cohort: Cohort,
        config: FitConfig,
        *,
        device: torch.device,
    ) -> None:
        self.device, self._cohort, self._config = device, cohort, config
        self._selecting = selecting_findings(cohort, min_positives=config.min_positives)
        self._packed = _placed(cohort.packed, device, config=config)
        self._y = torch.from_numpy(cohort.y).to(device)
        self._train = cohort.lines("train")
        self._validation = cohort.lines("validation")
        self._prevalence = prevalence(torch.from_numpy(cohort.y[self._train]))
        weights = alpha_weights(self._prevalence, form=config.alpha)
        self._weights = AlphaWeights(*(weight.to(device) for weight in weights))
        self._threshold = _threshold(config, cohort.y[self._train])
        self._factors = repeat_factors(cohort.y[self._train], threshold=self._threshold)
        self.head = _new_head(cohort, config, bias=prevalence_logit(self._prevalence, weights))
        self.head.to(device)
        self._optimizer = torch.optim.AdamW(parameter_groups(self.head, config), fused=True)
        self._records: list[EpochRecord] = []

    def epochs(self) -> Iterator[EpochRecord]:
        """Fit until it is time to stop; the head is then that of the best epoch."""
        best_epoch, best_auc, best_state = 0, -math.inf, self._state()
        for epoch in range(1, self._config.max_epochs + 1):
            record = self._epoch(epoch, best_auc=best_auc)
            self._records.append(record)
            if record.best:
                best_epoch, best_auc = epoch, record.validation_macro_auc
                best_state = self._state()
            yield record
            if epoch >= self._config.min_epochs and epoch - best_epoch >= self._config.patience:
                break
        self.head.load_state_dict(best_state)

    def predict(
        self, lines: Int64[np.ndarray, " n"]
    ) -> tuple[Float32[np.ndarray, "n c"], Float32[np.ndarray, " rows"]]:
        """Logits of scans, and the attention of their slices, packed scan after scan."""
        logits, attention = [], []
        with torch.inference_mode():
            for chosen in torch.split(torch.from_numpy(lines), PREDICT_SCANS):
                x, valid = self._packed.batch(chosen, device=self.device)
                output = self.head.explain(x, valid)
                logits.append(output.logits.float().cpu())
                attention.append(output.attention[:, 0][valid].float().cpu())
        return torch.cat(logits).numpy(), torch.cat(attention).numpy()

    def summary(self, logits: Float32[np.ndarray, "n c"]) -> dict[str, Any]:
        """What `summary.json` says of the fit.

        Args:
            logits: Of all scans of the cohort, from the best epoch.
        """
        best = max(self._records, key=lambda record: record.validation_macro_auc)
        patients = self._cohort.scans["patient_id"].to_numpy()
        lines: dict[str, Int64[np.ndarray, " lines"]] = {
            split: self._cohort.lines(split) for split in SPLITS
        }
        macro = {split: self._macro_auc(lines[split], logits) for split in ("validation", "test")}
        return {
            "labels": {
                "digest": self._cohort.labels.digest,
                "unmatched_scans": self._cohort.labels.unmatched_scans.count,
                "unmatched_labels": self._cohort.labels.unmatched_labels.count,
            },
            "scans": {split: len(chosen) for split, chosen in lines.items()},
            "patients": {split: len(set(patients[chosen])) for split, chosen in lines.items()},
            "best_epoch": best.epoch,
            "last_epoch": self._records[-1].epoch,
            "macro_auc": {split: mean for split, (mean, _) in macro.items()},
            "macro_findings": {split: count for split, (_, count) in macro.items()},
            "repeats": {
                "threshold": self._threshold,
                "expected_visits": float(self._factors.sum()),
            },
            "parameters": {"head": _size(self.head), "molre": _size(self.head.molre)},
            "findings": self._about_findings(lines),
        }

    def _state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.head.state_dict().items()}

    def _epoch(self, epoch: int, *, best_auc: float) -> EpochRecord:
        started_s = time.perf_counter()
        order = epoch_order(self._factors, seed=self._config.seed, epoch=epoch)
        train_loss = self._learn(torch.from_numpy(self._train[order]))
        if not math.isfinite(train_loss):
            raise RunError(f"the loss is {train_loss} in epoch {epoch}: lower lr_head and lr_molre")
        logits, _ = self.predict(self._validation)
        y = self._cohort.y[self._validation]
        loss = self._loss(torch.from_numpy(logits).to(self.device), self._y[self._validation])
        auc = auc_per_finding(y, logits)[self._selecting].mean()
        return EpochRecord(
            epoch=epoch,
            train_loss=train_loss,
            validation_loss=float(loss),
            validation_macro_auc=float(auc),
            validation_macro_ap=float(
                average_precision_per_finding(y, logits)[self._selecting].mean()
            ),
            best=bool(auc > best_auc),
            visits=len(order),
            seconds=time.perf_counter() - started_s,
        )

    def _learn(self, order: Int64[Tensor, " visits"]) -> float:
        """One pass over the scans; the mean loss is fetched from the device at its end only."""
        total = torch.zeros((), device=self.device)
        for chosen in torch.split(order, self._config.batch_size):
            x, valid = self._packed.batch(chosen, device=self.device)
            y = self._y.index_select(0, chosen.to(self.device, non_blocking=True))
            loss = self._loss(self.head(x, valid), y)
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()
            total += loss.detach() * len(chosen)
        return float(total) / len(order)

    def _loss(self, logits: Float[Tensor, "b c"], y: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
        return focal_loss(logits, y, weights=self._weights, gamma=self._config.gamma)

    def _macro_auc(
        self, lines: Int64[np.ndarray, " lines"], logits: Float32[np.ndarray, "n c"]
    ) -> tuple[float, int]:
        """Mean over the estimable findings that train has taught, NaN if none; their number."""
        aucs = auc_per_finding(
            self._cohort.y[lines], logits[lines], min_positives=self._config.min_positives
        )
        known = aucs[np.isfinite(aucs) & taught_findings(self._cohort)]
        return (float(known.mean()) if known.size else math.nan), known.size

    def _about_findings(self, lines: dict[str, Int64[np.ndarray, " lines"]]) -> dict[str, Any]:
        """What each finding had to learn from; a finding that could not is said to be so here."""
        labels = {split: self._cohort.y[chosen] for split, chosen in lines.items()}
        taught = taught_findings(self._cohort)
        return {
            finding: {
                "positives": {split: int((y[:, c] == 1).sum()) for split, y in labels.items()},
                "negatives": {split: int((y[:, c] == 0).sum()) for split, y in labels.items()},
                "prevalence": float(self._prevalence[c]),
                "alpha_positive": float(self._weights.positive[c]),
                "alpha_negative": float(self._weights.negative[c]),
                "taught": bool(taught[c]),
                "selects_epoch": bool(self._selecting[c]),
            }
            for c, finding in enumerate(self._cohort.findings)
        }


def _finish(
    writer: RunWriter,
    fitting: _Fitting,
    cohort: Cohort,
    *,
    about: Mapping[str, Any],
    started_s: float,
) -> None:
    """Predict every scan with the best epoch, and publish the run."""
    logits, attention = fitting.predict(np.arange(cohort.scans.num_rows))
    writer.finish(
        fitting.head,
        predictions=predictions_table(
            cohort.scans, findings=cohort.findings, logits=logits, labels=cohort.y
        ),
        attention=_attention_table(cohort, attention),
        summary={
            **about,
            **fitting.summary(logits),
            "seconds": time.perf_counter() - started_s,
            "versions": versions(),
            "machine": {**machine(), "device": str(fitting.device)},
        },
    )


def _new_head(cohort: Cohort, config: FitConfig, *, bias: Float[Tensor, " c"]) -> Head:
    """An untrained head on the CPU, the same for the same seed whatever the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = build_head(config, dim=cohort.packed.rows.shape[1], findings=len(cohort.findings))
    with torch.no_grad():
        head.classifier.bias.copy_(bias)
    return head


def _threshold(config: FitConfig, y: Float32[np.ndarray, "n c"]) -> float:
    if config.repeat_threshold == "auto":
        return automatic_threshold(y)
    return config.repeat_threshold


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _placed(packed: PackedScans, device: torch.device, *, config: FitConfig) -> PackedScans:
    """Rows in the type of the products: on the device if they fit, else where they are."""
    rows = packed.rows
    if config.precision == "bfloat16":
        rows = rows.bfloat16()
    elif rows.dtype == torch.bfloat16:
        rows = rows.float()
    # Half of the free memory is left to the batches.
    if device.type != "cuda" or rows.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        rows = rows.to(device)
    return PackedScans(rows=rows, offsets=packed.offsets)


def _attention_table(cohort: Cohort, attention: Float32[np.ndarray, " r"]) -> pa.Table:
    offsets = cohort.packed.offsets.to(torch.int32).numpy()

    def lists(values: Float32[np.ndarray, " r"]) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values, pa.float32()))

    return pa.table(
        {
            "scan_id": cohort.scans["scan_id"],
            "split": cohort.scans["split"],
            "position_mm": lists(cohort.position_mm),
            "attention": lists(attention),
        }
    )


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
