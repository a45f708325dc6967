"""Runs: a fitted head, to a folder that holds all about it, and back.

    config.toml          [head] dim and findings; [fit] the `FitConfig`; [store] what made its rows
    metrics.jsonl        one line an epoch, written as it ends
    head.safetensors     parameters of the best epoch
    predictions.parquet  one line a scan: ids, split; logit, probability and label of each finding
    attention.parquet    one line a scan: position_mm and attention of each of its slices
    summary.json         written last, with a digest of every other file

A run without `summary.json` is unfinished: it does not open, and fitting into it starts afresh.
Each file is read back against its digest, so files of two runs never pass for one.

Axes: n scans, c findings.
"""

import contextlib
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import tomli_w
import torch
from jaxtyping import Float

from ctfm.heads.config import FitConfig
from ctfm.heads.head import Head
from ctfm.store.errors import RunError
from ctfm.store.files import parquet_bytes, publish_bytes, sync, writing

CONFIG, METRICS, HEAD = "config.toml", "metrics.jsonl", "head.safetensors"
PREDICTIONS, ATTENTION, SUMMARY = "predictions.parquet", "attention.parquet", "summary.json"

_FILES = (CONFIG, METRICS, HEAD, PREDICTIONS, ATTENTION)


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One finished run; `Run.open` is the way to get one."""

    path: Path
    """Its folder."""

    config: FitConfig
    """What decided the head."""

    findings: tuple[str, ...]
    """Names of the findings, in the order of the head's logits."""

    dim: int
    """Numbers of an embedding that the head expects."""

    fingerprint: str
    """Of the feature store that it was fitted on: rows of another one do not fit."""

    store_settings: dict[str, Any]
    """What made the rows of that store: backbone, weights, preprocessing. Settings that were None
    are left out."""

    summary: dict[str, Any]
    """The content of `summary.json`."""

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Open a finished run.

        Raises:
            RunError: If there is none, it is unfinished or damaged.
        """
        path = Path(path)
        if not (path / SUMMARY).is_file():
            state = "is an unfinished run" if (path / CONFIG).is_file() else "is not a run"
            raise RunError(
                f"{path} {state} (it has no {SUMMARY}): `ctfm fit-head --out {path}` makes one"
            )
        try:
            summary = json.loads((path / SUMMARY).read_bytes())
            values = tomllib.loads(_checked(path, CONFIG, summary).decode())
            return cls(
                path=path,
                config=FitConfig.from_dict(values["fit"]),
                findings=tuple(values["head"]["findings"]),
                dim=values["head"]["dim"],
                fingerprint=values["store"]["fingerprint"],
                store_settings=values["store"]["settings"],
                summary=summary,
            )
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"{path} is a damaged run, or one of another version ({error}): fit it again"
            ) from error

    def head(self, device: torch.device | str = "cpu") -> Head:
        """The head of the best epoch, ready to predict.

        Raises:
            RunError: If its file is missing, damaged or does not fit the config.
        """
        head = build_head(self.config, dim=self.dim, findings=len(self.findings))
        tensors = safetensors.torch.load(_checked(self.path, HEAD, self.summary))
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            raise RunError(f"{self.path / HEAD} does not fit {CONFIG}: {error}") from error
        return head.to(device).eval()

    def predictions(self) -> pa.Table:
        """One line a scan, as `predictions_table` makes it.

        Raises:
            RunError: If the file is missing or damaged.
        """
        return pq.read_table(BytesIO(_checked(self.path, PREDICTIONS, self.summary)))

    def attention(self) -> pa.Table:
        """One line a scan: scan_id, split, position_mm and attention (lists, one number a slice).

        Raises:
            RunError: If the file is missing or damaged.
        """
        return pq.read_table(BytesIO(_checked(self.path, ATTENTION, self.summary)))

    def epochs(self) -> list[dict[str, Any]]:
        """What was recorded of each epoch, in order.

        Raises:
            RunError: If the file is missing or damaged.
        """
        lines = _checked(self.path, METRICS, self.summary).decode().splitlines()
        return [json.loads(line) for line in lines]


class RunWriter:
    """Writes one run folder; to be used in a `with` block, closed or killed at any point.

    Entering removes an older run from the folder, its `summary.json` first. Only `finish` makes a
    run of it.

    Args:
        path: The folder; it is made if need be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metrics: TextIO

    def __enter__(self) -> "RunWriter":
        with writing(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            for name in (SUMMARY, *_FILES):
                (self._path / name).unlink(missing_ok=True)
                sync(self._path)
            self._metrics = open(self._path / METRICS, "w", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._metrics.close()

    def write_config(
        self,
        config: FitConfig,
        *,
        dim: int,
        findings: Sequence[str],
        fingerprint: str,
        store_settings: Mapping[str, Any],
    ) -> None:
        """Publish `config.toml`: with the store and the labels it reproduces the head."""
        values = {
            "head": {"dim": dim, "findings": list(findings)},
            "fit": config.as_dict(),
            "store": {"fingerprint": fingerprint, "settings": _without_none(store_settings)},
        }
        publish_bytes(self._path / CONFIG, tomli_w.dumps(values).encode())

    def write_epoch(self, record: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`, there to be read at once."""
        with writing(self._path / METRICS):
            self._metrics.write(json_text(record) + "\n")
            self._metrics.flush()

    def finish(
        self,
        head: Head,
        *,
        predictions: pa.Table,
        attention: pa.Table,
        summary: Mapping[str, Any],
    ) -> None:
        """Publish all that is left, `summary.json` last."""
        tensors = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
        publish_bytes(self._path / HEAD, safetensors.torch.save(tensors))
        publish_bytes(self._path / PREDICTIONS, parquet_bytes(predictions))
        publish_bytes(self._path / ATTENTION, parquet_bytes(attention))
        self._metrics.close()
        sync(self._path / METRICS)
        digests = {name: _sha256((self._path / name).read_bytes()) for name in _FILES}
        content = json_text({**summary, "sha256": digests}, indent=2) + "\n"
        publish_bytes(self._path / SUMMARY, content.encode())


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
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        text = (path / CONFIG).read_text(encoding="utf-8", errors="replace")
        if "[fit]" not in text:
            raise RunError(f"{path / CONFIG} is not a run's: choose an empty folder for the run")


def build_head(config: FitConfig, *, dim: int, findings: int) -> Head:
    """A new head as the config says.

    Args:
        config: Its sizes and pool.
        dim: d, numbers of an embedding.
        findings: C, number of findings.
    """
    return Head(
        dim,
        findings,
        experts=config.experts,
        rank=config.rank,
        router_hidden=config.router_hidden,
        pool=config.pool,
        expert_bias=config.expert_bias,
    )


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
