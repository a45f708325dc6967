"""Results: what extraction made of the scans of a shard, to the rows and the record that are kept.

Axes: r rows (slices of many scans, packed), d embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from ctfm.store.embeddings import all_finite, encode
from ctfm.store.errors import StoreError
from ctfm.store.layout import POSITION, StoreHeader
from ctfm.store.plan import ScanToStore, Shard
from ctfm.store.reasons import Reason
from ctfm.store.shard_check import rows_sha256


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanResult:
    """What extraction made of one view of a scan: rows, or the reason why there are none."""

    scan_id: str
    view: int = 0
    rows: Mapping[str, Float32[np.ndarray, "r d"]] | None = None
    """Embeddings of each token, one row a slice; None if the scan failed."""
    position_mm: Float32[np.ndarray, " r"] | None = None
    """Position of each slice along z in the reference frame."""
    reason: Reason = Reason.OK
    detail: str = ""
    """One sentence for a person: why there are no rows, or what there is to know of those that are
    there. It must not hold a name, date, id or path."""
    source: str = ""
    """`Pseudonyms.files` of what it was made from, which tells when that has changed."""


def laid_out(
    shard: Shard, results: Sequence[ScanResult], *, header: StoreHeader
) -> tuple[dict[str, Shaped[np.ndarray, "r ..."]], dict[str, list[Any]]]:
    """The rows of a shard as they are kept, and its commit record.

    Args:
        shard: One of the plan.
        results: One for each scan and view of the shard, in any order.
        header: Tokens and type of the store.

    Returns:
        Of each array (token or position) the rows of the shard, and the columns of the record.

    Raises:
        StoreError: If results are missing, do not fit the plan or hold NaN or infinity.
    """
    ordered = _in_plan_order(shard, results)
    blocks = _empty_blocks(shard, header)
    columns: dict[str, list[Any]] = {
        "scan_id": [scan.scan_id for scan in shard.scans],
        "view": [scan.view for scan in shard.scans],
    }
    for scan, start, result in zip(shard.scans, shard.row_starts(), ordered, strict=True):
        line, kept = _kept(scan, result, header=header)
        for name, rows in kept.items():
            first = start - shard.row_start
            blocks[name][first : first + len(rows)] = rows
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
    return blocks, columns


def _empty_blocks(shard: Shard, header: StoreHeader) -> dict[str, Shaped[np.ndarray, "r ..."]]:
    blocks: dict[str, Shaped[np.ndarray, "r ..."]] = {
        name: encode(np.zeros((shard.n_rows, width), np.float32), dtype=header.dtype)
        for name, width in header.tokens.items()
    }
    blocks[POSITION] = np.zeros(shard.n_rows, dtype="<f4")
    return blocks


def _kept(
    scan: ScanToStore, result: ScanResult, *, header: StoreHeader
) -> tuple[dict[str, Any], dict[str, Shaped[np.ndarray, "r ..."]]]:
    """The line of a scan in the commit record, and its rows as they are kept."""
    if result.rows is None:
        return _failed(result, reason=result.reason, detail=result.detail), {}
    _check_rows(scan, result, tokens=header.tokens)
    kept: dict[str, Shaped[np.ndarray, "r ..."]] = {
        name: encode(rows, dtype=header.dtype) for name, rows in result.rows.items()
    }
    if not all(all_finite(rows) for rows in kept.values()):
        detail = f"an embedding is larger than the largest {header.dtype}: store another dtype"
        return _failed(result, reason=Reason.NOT_FINITE_EMBEDDING, detail=detail), {}
    kept[POSITION] = np.ascontiguousarray(result.position_mm, dtype="<f4")
    line = {
        "n_rows": len(kept[POSITION]),
        "status": "ok",
        "reason": Reason.OK.value,
        "detail": result.detail,
        "sha256": rows_sha256(kept),
        "source": result.source,
    }
    return line, kept


def _in_plan_order(shard: Shard, results: Sequence[ScanResult]) -> list[ScanResult]:
    found = {(result.scan_id, result.view): result for result in results}
    planned = [(scan.scan_id, scan.view) for scan in shard.scans]
    if len(results) != len(planned) or found.keys() != set(planned):
        missing = [key for key in planned if key not in found]
        raise StoreError(
            f"shard {shard.name} has {len(planned)} scans and views, got {len(results)} results, "
            f"{len(missing)} missing{f', e.g. {missing[0]}' if missing else ''}: give one for each"
        )
    return [found[key] for key in planned]


def _failed(result: ScanResult, *, reason: Reason, detail: str) -> dict[str, Any]:
    if reason is Reason.OK:
        raise StoreError("a result without rows must say the reason of the failure, got ok")
    said = {"status": "failed", "reason": reason.value, "detail": detail}
    return {"n_rows": 0, **said, "sha256": "", "source": result.source}


def _check_rows(scan: ScanToStore, result: ScanResult, *, tokens: Mapping[str, int]) -> None:
    """Refuse rows that do not fit the plan: a fault of the caller, not of the scan."""
    rows, position_mm = result.rows or {}, result.position_mm
    n = 0 if position_mm is None else len(position_mm)
    shapes = {name: block.shape for name, block in rows.items()}
    expected = {name: (n, width) for name, width in tokens.items()}
    if not 1 <= n <= scan.max_rows or shapes != expected:
        raise StoreError(
            f"scan {scan.scan_id!r} (view {scan.view}) has {n} positions and rows {shapes}: the "
            f"plan has 1 to {scan.max_rows} rows of {dict(tokens)}"
        )
    if (
        position_mm is None
        or not all_finite(position_mm)
        or not all(map(all_finite, rows.values()))
    ):
        raise StoreError(
            f"scan {scan.scan_id!r} (view {scan.view}) has NaN or infinite rows: record it as "
            f"failed with {Reason.NOT_FINITE_EMBEDDING.value}"
        )
