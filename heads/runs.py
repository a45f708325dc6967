"""Runs: a fitted head, to a folder that holds all about it, and back.

    config.toml            [head] dims and findings; [fit] the `FitConfig`; [[stores]] what made the
                           rows; [ensemble] only where several heads answer together
    metrics.jsonl          one line an epoch, written as it ends
    head.safetensors       parameters of the best epoch
    predictions.parquet    one line a scan: ids, split; logit, probability and label of each finding
    attention.parquet      one line a scan: position_mm and attention of each of its slices
    summary.json           written last, with a digest of every other file
    checkpoint.safetensors only while it is fitted: what the next epoch needs

A run without `summary.json` is unfinished: it does not open, and fitting the same into it goes on
from its checkpoint, anything else afresh. Each file is read back against its digest, so files of
two runs never pass for one.

Axes: n scans, c findings.
"""

import contextlib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import tomli_w
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from ctfm.heads.branches import branches_state, build_branches, load_branches, under
from ctfm.heads.config import FitConfig
from ctfm.heads.head import Head
from ctfm.heads.run_schema import (
    Summary,
    check_attention,
    check_config,
    check_epoch,
    check_predictions,
    check_summary,
)
from ctfm.store.errors import RunError
from ctfm.store.features import FeatureStore
from ctfm.store.files import parquet_bytes, publish_bytes, sync, table_of, writing
from ctfm.store.layout import GROUP

CONFIG, METRICS, HEAD = "config.toml", "metrics.jsonl", "head.safetensors"
PREDICTIONS, ATTENTION, SUMMARY = "predictions.parquet", "attention.parquet", "summary.json"
CHECKPOINT = "checkpoint.safetensors"

_FILES = (CONFIG, METRICS, HEAD, PREDICTIONS, ATTENTION)


@dataclass(frozen=True, kw_only=True)
class StoreRecord:
    """A feature store that a head was fitted on."""

    fingerprint: str
    """Rows of a store with another one do not fit the head."""

    settings: dict[str, Any]
    """What made its rows: backbone, weights, preprocessing. Settings that are None are left out."""

    @classmethod
    def of(cls, store: FeatureStore) -> "StoreRecord":
        """The record of a store."""
        return cls(fingerprint=store.fingerprint, settings=store.settings)


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One finished run; `Run.open` is the way to get one."""

    path: Path
    """Its folder."""

    config: FitConfig
    """What decided the head."""

    findings: tuple[str, ...]
    """Names of the findings, in the order of the head's logits."""

    dims: tuple[int, ...]
    """Numbers of an embedding that each branch of the head expects; usually there is one."""

    stores: tuple[StoreRecord, ...]
    """The feature stores that it was fitted on."""

    members: int
    """Heads that answer together, each with the same branches; usually 1."""

    summary: Summary
    """The content of `summary.json`."""

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Open a finished run.

        Raises:
            RunError: If there is none, it is unfinished or damaged.
        """
        path = Path(path)
        if not (path / SUMMARY).is_file():
            if (path / CONFIG).is_file():
                raise RunError(
                    f"{path} is an unfinished run (it has no {SUMMARY}): the `ctfm fit-head` that "
                    "began it goes on with it"
                )
            raise RunError(
                f"{path} is not a run (it has no {SUMMARY}): name one that `ctfm fit-head` made"
            )
        with _as_run_error(path):
            summary = json.loads((path / SUMMARY).read_bytes())
            check_summary(summary, SUMMARY)
            values = tomllib.loads(_checked(path, CONFIG, summary).decode())
            check_config(values, CONFIG)
            dims, stores = values["head"]["dims"], values["stores"]
            if len(dims) not in (1, len(stores)):
                raise ValueError(f"{len(dims)} branches of the head do not fit its stores")
            return cls(
                path=path,
                config=FitConfig.from_dict(values["fit"]),
                findings=tuple(values["head"]["findings"]),
                dims=tuple(dims),
                stores=tuple(
                    StoreRecord(fingerprint=one["fingerprint"], settings=one["settings"])
                    for one in stores
                ),
                members=values.get("ensemble", {}).get("members", 1),
                summary=Summary(summary),
            )

    def head(self, device: torch.device | str = "cpu") -> Head:
        """The head of the best epoch, ready to predict.

        Raises:
            RunError: If there are several, or the file is missing, damaged or does not fit.
        """
        members = self.heads(device)
        if len(members) > 1 or len(members[0]) > 1:
            raise RunError(f"{self.path} has several heads that answer together: use `heads`")
        return members[0][0]

    def heads(self, device: torch.device | str = "cpu") -> list[list[Head]]:
        """The branches of every member, ready to predict.

        The logit of a finding is the mean over members of the sum over branches.

        Raises:
            RunError: If the file is missing, damaged or does not fit the config.
        """
        with _as_run_error(self.path / HEAD):
            tensors = safetensors.torch.load(_checked(self.path, HEAD, self.summary))
        members = []
        for index in range(self.members):
            own = tensors if self.members == 1 else under(f"members.{index}.", tensors)
            try:
                with torch.device("meta"):  # a head takes no more memory than its file
                    wanted = branches_state(self._new_branches())
                _refuse_other_shapes(wanted, own)
                branches = self._new_branches()
                load_branches(branches, own)
            except (RuntimeError, TypeError, ValueError, OverflowError) as error:
                raise RunError(f"{self.path / HEAD} does not fit {CONFIG}: {error}") from error
            members.append([branch.to(device).eval() for branch in branches])
        return members

    def _new_branches(self) -> list[Head]:
        return build_branches(self.config, dims=self.dims, findings=len(self.findings))

    def predictions(self) -> pa.Table:
        """One line a scan, as `predictions_table` makes it.

        Raises:
            RunError: If the file is missing, damaged or not as the schema of runs says.
        """
        with _as_run_error(self.path / PREDICTIONS):
            table = table_of(_checked(self.path, PREDICTIONS, self.summary))
            check_predictions(table, self.findings)
        return table

    def attention(self) -> pa.Table:
        """One line a scan: scan_id, split, position_mm and attention (lists, one number a slice).

        Raises:
            RunError: If the file is missing, damaged or not as the schema of runs says.
        """
        with _as_run_error(self.path / ATTENTION):
            table = table_of(_checked(self.path, ATTENTION, self.summary))
            check_attention(table)
        return table

    def epochs(self) -> list[dict[str, Any]]:
        """What was recorded of each epoch, in order.

        Raises:
            RunError: If the file is missing, damaged or not as the schema of runs says.
        """
        with _as_run_error(self.path / METRICS):
            lines = _checked(self.path, METRICS, self.summary).decode().splitlines()
            records = [json.loads(line) for line in lines]
            for number, record in enumerate(records, start=1):
                check_epoch(record, f"line {number}")
        return records


class RunWriter:
    """Writes one run folder; killed at any point it leaves an unfinished run.

    Args:
        path: The folder; it is made if need be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha256: dict[str, str] = {}

    def checkpoint(self) -> bytes | None:
        """What an unfinished run has left to go on from, if anything."""
        if (self._path / SUMMARY).exists():
            return None
        try:
            return (self._path / CHECKPOINT).read_bytes()
        except OSError:
            return None

    def start(self) -> None:
        """Remove an older run from the folder, its `summary.json` first."""
        with writing(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            for name in (SUMMARY, CHECKPOINT, *_FILES):
                (self._path / name).unlink(missing_ok=True)
                sync(self._path)

    def write_config(
        self,
        config: FitConfig,
        *,
        dims: Sequence[int],
        findings: Sequence[str],
        stores: Sequence[StoreRecord],
        ensemble: Mapping[str, Any] | None = None,
    ) -> None:
        """Publish `config.toml`: with the stores and the labels it reproduces the head."""
        values = {
            "head": {"dims": list(dims), "findings": list(findings)},
            "fit": config.as_dict(),
            "stores": [_without_none(asdict(store)) for store in stores],
        }
        if ensemble is not None:
            values["ensemble"] = dict(ensemble)
        self._publish(CONFIG, tomli_w.dumps(values).encode())

    def write_epochs(self, records: Sequence[Mapping[str, Any]], *, checkpoint: bytes) -> None:
        """Publish `metrics.jsonl` and the checkpoint at the end of an epoch.

        Args:
            records: A line each epoch until now.
            checkpoint: What the next epoch needs.
        """
        self._publish(METRICS, "".join(json_text(one) + "\n" for one in records).encode())
        publish_bytes(self._path / CHECKPOINT, checkpoint)

    def finish(
        self,
        tensors: Mapping[str, Tensor],
        *,
        predictions: pa.Table,
        attention: pa.Table,
        summary: Mapping[str, Any],
    ) -> None:
        """Publish all that is left, `summary.json` last."""
        plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
        self._publish(HEAD, safetensors.torch.save(plain))
        self._publish(PREDICTIONS, parquet_bytes(predictions))
        self._publish(ATTENTION, parquet_bytes(attention))
        content = json_text({**summary, "sha256": self._sha256}, indent=2) + "\n"
        publish_bytes(self._path / SUMMARY, content.encode())
        (self._path / CHECKPOINT).unlink(missing_ok=True)

    def _publish(self, name: str, content: bytes) -> None:
        # The digest is of what is meant, not of what another writer may have put there.
        publish_bytes(self._path / name, content)
        self._sha256[name] = _sha256(content)


def settings_of(path: Path) -> FitConfig | None:
    """The settings of a run, finished or not; None if there is none that can be read."""
    try:
        values = tomllib.loads((path / CONFIG).read_text(encoding="utf-8"))
        return FitConfig.from_dict(values["fit"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None


def check_run_folder(path: Path, *, overwrite: bool) -> None:
    """Keep a finished run, or a folder of something else, from being fitted over by accident.

    Args:
        path: Where a run is to be written; it need not exist.
        overwrite: Whether a finished run may be replaced.

    Raises:
        RunError: If it must not be written there.
    """
    if (path / SUMMARY).exists() and not overwrite:
        raise RunError(
            f"{path} holds a finished run: choose another folder, or overwrite it with --overwrite"
        )
    if (path / GROUP).exists():
        raise RunError(f"{path} is a feature store: choose another folder for the run")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        text = (path / CONFIG).read_text(encoding="utf-8", errors="replace")
        if "[fit]" not in text:
            raise RunError(f"{path / CONFIG} is not a run's: choose an empty folder for the run")


def predictions_table(
    scans: pa.Table,
    *,
    findings: Sequence[str],
    logits: Float[np.ndarray, "n c"],
    labels: Float[np.ndarray, "n c"],
) -> pa.Table:
    """One line a scan, with three columns a finding.

    Args:
        scans: scan_id, study_id, patient_id and split of each scan.
        findings: Their names.
        logits: Of the head.
        labels: 1, 0 or NaN.

    Returns:
        The columns of `scans`; then for each finding `logit_<finding>` and
        `probability_<finding>` (float32) and `label_<finding>` (int8, null where unknown). The
        probability is the sigmoid of the logit. It ranks scans; it is not calibrated.
    """
    columns = {name: scans[name] for name in ("scan_id", "study_id", "patient_id", "split")}
    probabilities = torch.from_numpy(logits).sigmoid().numpy()
    for column, finding in enumerate(findings):
        known = ~np.isnan(labels[:, column])
        label = np.where(known, labels[:, column], 0).astype(np.int8)
        columns[f"logit_{finding}"] = pa.array(logits[:, column], type=pa.float32())
        columns[f"probability_{finding}"] = pa.array(probabilities[:, column], type=pa.float32())
        columns[f"label_{finding}"] = pa.array(label, mask=~known)
    return pa.table(columns)


def json_text(values: Any, *, indent: int | None = None) -> str:
    """JSON in which a number that is not finite (not estimable) is null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False, ensure_ascii=False)


@contextlib.contextmanager
def _as_run_error(path: Path) -> Iterator[None]:
    """Say of a run, or a file of one, that what is read from it cannot be right."""
    try:
        yield
    except RunError:
        raise
    # KeyError of a digest; those of the parsers of TOML, JSON, Parquet and safetensors.
    except (LookupError, ValueError, TypeError, RecursionError, OverflowError, SafetensorError,
            pa.ArrowException) as error:  # fmt: skip
        raise RunError(
            f"{path} is damaged, or of another version of ctfm ({error}): fit the run again"
        ) from error


def _checked(path: Path, name: str, summary: Mapping[str, Any]) -> bytes:
    try:
        content = (path / name).read_bytes()
    except FileNotFoundError:
        content = b""
    if _sha256(content) != summary["sha256"][name]:
        raise RunError(
            f"{path / name} is missing, or is not the file that the run wrote: fit it again"
        )
    return content


def _refuse_other_shapes(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with those of a head, which may have no numbers yet."""
    for name in sorted(wanted.keys() | got.keys()):
        shapes = [tuple(one[name].shape) if name in one else None for one in (wanted, got)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} must be of shape {shapes[0]}, got {shapes[1]}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_none(value: Any) -> Any:
    """TOML has no null; a setting that is None is left out."""
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
