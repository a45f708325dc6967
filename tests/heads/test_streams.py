"""Embeddings of a cohort: resident, in windows, in several views, of several stores."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctfm.heads.config import FitConfig
from ctfm.heads.data import FitData
from ctfm.heads.fit import fit_head
from ctfm.heads.learner import EpochRecord
from ctfm.heads.runs import HEAD
from ctfm.heads.streams import Branch, Stream, in_precision
from ctfm.store.errors import RunError, StoreError
from ctfm.store.features import FeatureStore

Build = Any
N, D = 24, 4
CPU = torch.device("cpu")


def rows(index: int, *, view: int = 0, dim: int = D) -> np.ndarray:
    count = 1 + index % 5
    steps = np.arange(count, dtype=np.float32)[:, None] / 8
    return np.full((count, dim), index + 100 * view, np.float32) + steps


@pytest.fixture(scope="module")
def store(build_store: Build, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    path = tmp_path_factory.mktemp("streams") / "store"
    made: FeatureStore = build_store(path, [[rows(i)] for i in range(N)], shard_scans=3)
    return made


def stream(store: FeatureStore, memory_bytes: int | None, *, views: int = 1) -> Stream:
    ids = [f"scan{i:03d}" for i in range(N)]
    branch = Branch(stores=(store,), token="cls")
    return Stream(
        [branch], ids, views=views, precision="float32", device=CPU, memory_bytes=memory_bytes
    )


@pytest.mark.parametrize("memory_bytes", [None, 400])
def test_gives_every_scan_its_own_rows(store: FeatureStore, memory_bytes: int | None) -> None:
    made = stream(store, memory_bytes)
    assert made.resident == (memory_bytes is None)
    windows = made.windows(np.arange(N), seed=(0, 1))
    assert sorted(np.concatenate(windows)) == list(range(N))
    for lines, window in zip(windows, made.open(windows), strict=True):
        for line in lines.tolist():
            (batch,) = window.batches(np.array([line]), view=np.zeros(1, int), device=CPU)
            np.testing.assert_array_equal(batch.x.numpy(), rows(line))


def test_windows_are_whole_shards_that_fit_shuffled_anew_each_epoch(store: FeatureStore) -> None:
    made = stream(store, 400)
    first, again, second = (made.windows(np.arange(N), seed=(0, e)) for e in (1, 1, 2))
    assert len(first) > 3
    assert [one.tolist() for one in first] == [one.tolist() for one in again]
    assert [one.tolist() for one in first] != [one.tolist() for one in second]
    for window in first:
        size = sum(len(rows(i)) * D * 2 for i in window.tolist())
        assert size <= 400 / 4 or len(window) == 3
        assert all(3 * (i // 3) + j in window for i in window.tolist() for j in range(3))


def test_without_a_seed_windows_keep_the_order(store: FeatureStore) -> None:
    lines = np.arange(1, N, 2)
    assert np.concatenate(stream(store, 400).windows(lines)).tolist() == lines.tolist()


def test_a_view_is_its_own_rows(build_store: Build, tmp_path: Path) -> None:
    scans = [[rows(i, view=v) for v in range(3)] for i in range(N)]
    made = stream(build_store(tmp_path / "views", scans), None, views=3)
    (window,) = made.open([np.arange(N)])
    chosen, view = np.array([7, 2, 7]), np.array([2, 0, 1])
    (batch,) = window.batches(chosen, view=view, device=CPU)
    firsts = torch.cat([part[:, 0] for part in batch.layout.split(batch.x)])
    expected = [rows(i, view=v)[0] for i, v in zip(chosen.tolist(), view.tolist(), strict=True)]
    np.testing.assert_array_equal(batch.layout.restore(firsts).numpy(), np.stack(expected))


def test_stores_are_joined_slice_by_slice_and_one_row_is_repeated(
    store: FeatureStore, build_store: Build, tmp_path: Path
) -> None:
    volume = build_store(tmp_path / "v", [[rows(i, dim=2)[:1]] for i in range(N)], name="volume")
    branch = Branch(stores=(store, volume), token="cls")
    assert branch.dim == D + 2
    joined, offsets = branch.load(["scan003", "scan001"])
    assert offsets.tolist() == [0, 4, 6]
    np.testing.assert_array_equal(joined[:4, :D].numpy(), rows(3))
    np.testing.assert_array_equal(joined[:4, D:].numpy(), np.repeat(rows(3, dim=2)[:1], 4, 0))


def test_stores_of_other_slices_are_not_joined_slice_by_slice(
    store: FeatureStore, build_store: Build, tmp_path: Path
) -> None:
    other = build_store(tmp_path / "o", [[rows(i + 1)] for i in range(N)], name="other")
    with pytest.raises(StoreError, match="has other slices than"):
        Branch(stores=(store, other), token="cls").load(["scan003", "scan001"])


@pytest.mark.parametrize(("stored", "precision", "kept"), [
    (torch.float16, "bfloat16", torch.bfloat16),
    (torch.float32, "bfloat16", torch.bfloat16),
    (torch.bfloat16, "float32", torch.float32),
    (torch.float16, "float32", torch.float16),
])  # fmt: skip
def test_rows_are_kept_in_the_type_of_the_products(
    stored: torch.dtype, precision: str, kept: torch.dtype
) -> None:
    values = torch.randn(70_000, 3).to(stored)
    expected = values.float()
    found = in_precision(values.clone(), precision)
    assert found.dtype == kept
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


QUICK = FitConfig(
    experts=2, rank=1, router_hidden=3, batch_size=16, min_epochs=6, max_epochs=6,
    lr_head=0.03, min_positives=2, split_fractions=(0.6, 0.2, 0.2),
)  # fmt: skip


def test_a_fit_of_windows_learns_as_well_as_a_resident_one(
    planted_labels: Path, build_store: Build, planted_rows_of: Any, tmp_path: Path
) -> None:
    store = build_store(tmp_path / "s", [[planted_rows_of(i)] for i in range(90)], shard_scans=4)
    size = store.info()["rows"] * 6 * 2
    longer = replace(QUICK, min_epochs=15, max_epochs=15)
    runs = [
        fit_head(store, planted_labels, longer, out=tmp_path / str(memory), memory_bytes=memory)
        for memory in (None, size // 4)
    ]
    resident, streamed = (run.summary["macro_auc"]["validation"] for run in runs)
    assert abs(resident - streamed) < 0.05
    data = FitData([store], planted_labels, QUICK, memory_bytes=size // 4)
    assert not data.stream.resident
    seen = sum(len(y) for _, y, _ in data.epoch(1))
    assert seen >= len(data.train)


def test_an_interrupted_fit_goes_on_in_the_same_windows_and_views_or_not_at_all(
    planted_labels: Path, build_store: Build, planted_rows_of: Any, tmp_path: Path
) -> None:
    views = [[planted_rows_of(i), planted_rows_of(i) + 1] for i in range(90)]
    store = build_store(tmp_path / "s", views, shard_scans=4)
    little = store.info()["rows"] * 6 * 2 // 4

    def fit(
        name: str, memory_bytes: int, *, stop_after: int = 0, overwrite: bool = False
    ) -> tuple[bytes, list[int]]:
        seen: list[int] = []

        def progress(record: EpochRecord) -> None:
            seen.append(record.epoch)
            if record.epoch == stop_after:
                raise KeyboardInterrupt

        run = fit_head(
            store,
            planted_labels,
            QUICK,
            out=tmp_path / name,
            memory_bytes=memory_bytes,
            overwrite=overwrite,
            progress=progress,
        )
        return (run.path / HEAD).read_bytes(), seen

    whole, _ = fit("whole", little)
    with pytest.raises(KeyboardInterrupt):
        fit("same", little, stop_after=2)
    assert fit("same", little) == (whole, [3, 4, 5, 6])
    with pytest.raises(KeyboardInterrupt):
        fit("other", little // 2, stop_after=2)
    with pytest.raises(RunError, match="windows of another size"):
        fit("other", little)
    assert fit("other", little, overwrite=True) == (whole, [1, 2, 3, 4, 5, 6])


PEAK = """
import sys
from pathlib import Path
from ctfm.heads.config import FitConfig
from ctfm.heads.fit import fit_head
from ctfm.store.features import FeatureStore

config = FitConfig(experts=2, batch_size=64, min_epochs=2, max_epochs=2, repeat_threshold=0.0)
store, labels, out, memory = sys.argv[1:]
fit_head(FeatureStore.open(store), labels, config, out=out, memory_bytes=int(memory))
# Not getrusage, whose peak is at least that of the process that started this one.
(peak,) = (line for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_stays_below_the_budget_and_a_gigabyte_with_a_store_four_times_as_large(
    build_store: Build, tmp_path: Path
) -> None:
    scans, slices, dim = 16000, 25, 1024
    random = np.random.default_rng(0)
    block = random.normal(size=(slices, dim)).astype(np.float32)
    y = (random.random(scans) < 0.3).astype(int)
    made = [[block + np.float32(0.05) * np.float32(y[i])] for i in range(scans)]
    store = build_store(tmp_path / "store", made)
    budget = scans * slices * dim * 2 // 4
    ids = [f"scan{i:03d}" for i in range(scans)]
    pq.write_table(pa.table({"scan_id": ids, "mass": y}), tmp_path / "labels.parquet")
    command = [sys.executable, "-c", PEAK, store.path, tmp_path / "labels.parquet"]
    ran = subprocess.run(
        [*map(str, command), str(tmp_path / "run"), str(budget)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak = int(ran.stdout.split()[-1])
    assert peak < budget + 2**30, f"{peak:,} of {budget + 2**30:,}"


@pytest.mark.parametrize("join", ["slices", "scans"])
def test_a_fit_on_two_stores_uses_both(
    planted_labels: Path, build_store: Build, planted_rows_of: Any, tmp_path: Path, join: Any
) -> None:
    halves = [
        build_store(
            tmp_path / f"half{half}",
            [[planted_rows_of(i)[:, 3 * half : 3 * half + 3]] for i in range(90)],
            name=f"half{half}",
        )
        for half in (1, 0)
    ]
    config = replace(QUICK, join=join)
    run = fit_head(halves, planted_labels, config, out=tmp_path / "run")
    one = fit_head(halves[0], planted_labels, QUICK, out=tmp_path / "one")
    assert run.dims == ((6,) if join == "slices" else (3, 3))
    assert [store.settings["backbone"] for store in run.stores] == ["half1", "half0"]
    # Half 0 has the signal, half 1 is noise.
    assert run.summary["macro_auc"]["validation"] > one.summary["macro_auc"]["validation"] + 0.1
    lists = run.attention().to_pylist()[3]
    assert len(lists["position_mm"]) == len(lists["attention"])
    assert sum(lists["attention"]) == pytest.approx(1, abs=1e-5)


def test_a_fit_sees_a_random_view_and_validates_on_the_clean_one(
    planted_labels: Path, build_store: Build, planted_rows_of: Any, tmp_path: Path
) -> None:
    scans = [[planted_rows_of(i), planted_rows_of(i) + 50] for i in range(90)]
    store = build_store(tmp_path / "views", scans)
    data = FitData([store], planted_labels, QUICK)
    parts = [(batch.x.float().mean(1) > 25).float().mean() for (batch,), _, _ in data.epoch(1)]
    assert 0.2 < float(torch.stack(parts).mean()) < 0.8
    for _, (batch,) in data.in_order(data.validation):
        assert (batch.x.float().mean(1) < 25).all()
    clean = FitData([store], planted_labels, replace(QUICK, views="clean"))
    for (batch,), _, _ in clean.epoch(1):
        assert (batch.x.float().mean(1) < 25).all()
