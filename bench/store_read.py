"""Claim: a feature store is read in bulk at a fair share of the speed of `np.load`.

Writes the same random float16 rows as a store and as one .npy file, reads both warm in turn, and
prints the ratio of the medians. The page cache is warm for both; values are compared first.
"""

import tempfile
from pathlib import Path

import numpy as np
from measure import main_with_out, median_seconds

from ctfm.store.features import FeatureStore
from ctfm.store.plan import ScanToStore
from ctfm.store.results import ScanResult

SCANS, SLICES, DIM, REPEATS = 6000, 40, 1024, 7


def write(folder: Path) -> FeatureStore:
    """A store of random rows, and `rows.npy` with the same bytes."""
    rng = np.random.default_rng(0)
    scans = [
        ScanToStore(scan_id=f"c{i}", study_id=f"s{i}", patient_id=f"p{i}", view=0, max_rows=SLICES)
        for i in range(SCANS)
    ]
    store = FeatureStore.create(
        folder / "store", settings={}, tokens={"cls": DIM}, dtype="float16", scans=scans
    )
    position_mm = np.arange(SLICES, dtype=np.float32)
    for shard in store.pending_shards():
        store.write_shard(
            shard,
            [
                ScanResult(
                    scan_id=scan.scan_id,
                    view=0,
                    rows={"cls": rng.standard_normal((SLICES, DIM), dtype=np.float32)},
                    position_mm=position_mm,
                )
                for scan in shard.scans
            ],
        )
    store.finish()
    np.save(folder / "rows.npy", store.load()[0].numpy())
    return store


def measure() -> dict[str, object]:
    """Seconds and GB/s of both, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write(folder)
        same = np.array_equal(store.load()[0].numpy(), np.load(folder / "rows.npy"))
        assert same, "the two files must hold the same rows"
        seconds = median_seconds(
            {
                "store": lambda: store.load(),
                "np_load": lambda: np.load(folder / "rows.npy"),
            },
            repeats=REPEATS,
        )
    gigabytes = SCANS * SLICES * DIM * 2 / 1e9
    return {
        "claim": "bulk read of a feature store against np.load of the same bytes",
        "gigabytes": gigabytes,
        "seconds": seconds,
        "gigabytes_per_s": {name: gigabytes / s.median for name, s in seconds.items()},
        "ratio": seconds["np_load"].median / seconds["store"].median,
    }


if __name__ == "__main__":
    main_with_out(measure)
