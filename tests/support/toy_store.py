"""Small feature stores whose rows depend on the scan alone, as those of an extraction do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from ctfm.store.features import FeatureStore
from ctfm.store.layout import StoredDtype
from ctfm.store.plan import ScanToStore, Shard
from ctfm.store.reasons import Reason
from ctfm.store.results import ScanResult

SETTINGS: dict[str, Any] = {
    "backbone": "intensity",
    "windows_hu": [[0.0, 80.0], [-20.0, 180.0]],
    "weights": None,
}
TOKENS = {"cls": 5, "mean": 3}


def to_store(max_rows: Sequence[int], *, views: int = 1) -> list[ScanToStore]:
    return [
        ScanToStore(
            scan_id=f"scan{i:03d}",
            study_id=f"study{i // 2:03d}",
            patient_id=f"patient{i // 3:03d}",
            view=view,
            max_rows=n,
        )
        for i, n in enumerate(max_rows)
        for view in range(views)
    ]


def rows_of(scan: ScanToStore, *, fewer: int = 0) -> dict[str, np.ndarray]:
    """Rows that depend on the scan and view alone, as extraction's do."""
    seed = int(scan.scan_id[4:]) * 10 + scan.view
    random = np.random.default_rng(seed)
    n = max(1, scan.max_rows - fewer)
    return {
        name: random.standard_normal((n, width)).astype(np.float32)
        for name, width in TOKENS.items()
    }


def result_of(scan: ScanToStore, *, fewer: int = 0, failed: bool = False) -> ScanResult:
    if failed:
        return ScanResult(
            scan_id=scan.scan_id, view=scan.view, reason=Reason.NOT_A_HEAD, detail="no head"
        )
    rows = rows_of(scan, fewer=fewer)
    position_mm = -4.0 * np.arange(len(rows["cls"]), dtype=np.float32) - 2.0
    return ScanResult(scan_id=scan.scan_id, view=scan.view, rows=rows, position_mm=position_mm)


def results_of(shard: Shard, *, failed: Sequence[str] = ()) -> list[ScanResult]:
    """Results in the opposite order of the plan; every third scan uses fewer rows."""
    return [
        result_of(scan, fewer=int(scan.scan_id[4:]) % 3, failed=scan.scan_id in failed)
        for scan in reversed(shard.scans)
    ]


def create(
    path: Path | str,
    scans: Sequence[ScanToStore],
    *,
    dtype: StoredDtype = "float16",
    **options: Any,
) -> FeatureStore:
    options = {"settings": SETTINGS, "tokens": TOKENS, "shard_scans": 2, **options}
    return FeatureStore.create(path, dtype=dtype, scans=scans, **options)


def fill(store: FeatureStore, *, failed: Sequence[str] = ()) -> FeatureStore:
    for shard in store.pending_shards():
        store.write_shard(shard, results_of(shard, failed=failed))
    store.finish()
    return store


def array_bytes(path: Path) -> dict[str, bytes]:
    """Every file of the Zarr group."""
    return all_bytes(path / "embeddings.zarr")


def all_bytes(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def folder(store: FeatureStore) -> Path:
    """Where a local store lies."""
    assert isinstance(store.path, Path)
    return store.path


def chunk_files(store: FeatureStore) -> list[Path]:
    """Files of the chunks of all pending shards."""
    cls = folder(store) / "embeddings.zarr" / "cls"
    chunk_rows = zarr.open_array(cls, mode="r").chunks[0]
    return [
        cls / f"c.{row // chunk_rows}.0"
        for shard in store.pending_shards()
        for row in range(shard.row_start, shard.row_start + shard.n_rows, chunk_rows)
    ]


def forbid(forbidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a file is refused, as to a user without the right; root is never refused."""
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
