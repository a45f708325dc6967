"""The feature store: round trips, resume, refusals, damage, and readers without ctfm."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_store import (
    SETTINGS,
    TOKENS,
    all_bytes,
    array_bytes,
    chunk_files,
    create,
    fill,
    folder,
    forbid,
    results_of,
    rows_of,
    to_store,
)

from ctfm.store import commits, embeddings, features, growth, layout, tables
from ctfm.store.errors import PlaceError, StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.layout import StoredDtype
from ctfm.store.places import LocalPlace
from ctfm.store.plan import STORE_SCHEMA, ScanToStore
from ctfm.store.reasons import Reason
from ctfm.store.results import ScanResult
from ctfm.store.strict_arrays import our_zarr

KILLED_WRITER = """
import os, pickle, signal, sys
from ctfm.store import features
path, work, moment = sys.argv[1:]
real = getattr(features, moment)

def killed(*args, **kwargs):
    if moment == "write_chunks" and args[1] == "cls":
        return real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(features, moment, killed)
features.FeatureStore.open(path).write_shard(*pickle.load(open(work, "rb")))
"""
quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stored(rows: np.ndarray, dtype: str) -> torch.Tensor:
    """What torch itself makes of rows in that type."""
    return torch.from_numpy(rows).to(getattr(torch, dtype))


def other_numbers(result: ScanResult) -> ScanResult:
    """What a process that rounds otherwise makes of the same scan."""
    assert result.rows is not None
    return replace(result, rows={name: rows + 1 for name, rows in result.rows.items()})


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return fill(create(tmp_path / "features" / "toy", to_store([4, 7, 3, 6, 5])))


class TestRoundTrip:
    @quick
    @given(
        max_rows=st.lists(st.integers(1, 9), min_size=1, max_size=12),
        views=st.integers(1, 3),
        shard_scans=st.integers(1, 5),
        dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
        compress=st.booleans(),
        piece_bytes=st.sampled_from([1, embeddings.PIECE_BYTES]),
        data=st.data(),
    )
    def test_gives_back_what_was_written_for_any_sizes(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        max_rows: list[int],
        views: int,
        shard_scans: int,
        dtype: StoredDtype,
        compress: bool,
        piece_bytes: int,
        data: st.DataObject,
    ) -> None:
        path = tmp_path_factory.mktemp("store") / "s"
        scans = to_store(max_rows, views=views)
        store = fill(create(path, scans, dtype=dtype, shard_scans=shard_scans, compress=compress))
        view = data.draw(st.integers(0, views - 1))
        wanted = data.draw(
            st.lists(st.sampled_from([scan for scan in scans if scan.view == view]), max_size=20)
        )
        for token in TOKENS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(embeddings, "PIECE_BYTES", piece_bytes)
                rows, offsets = store.load([scan.scan_id for scan in wanted], token, view=view)
            assert rows.dtype == getattr(torch, dtype)
            assert rows.shape == (int(offsets[-1]), TOKENS[token])
            assert offsets.dtype == torch.int64
            for i, scan in enumerate(wanted):
                expected = rows_of(scan, fewer=int(scan.scan_id[4:]) % 3)[token]
                assert torch.equal(rows[offsets[i] : offsets[i + 1]], stored(expected, dtype))
        assert store.verify().ok

    def test_reads_everything_in_table_order_by_default(self, store: FeatureStore) -> None:
        rows, offsets = store.load()
        again, _ = store.load(store.scans["scan_id"].to_pylist(), "cls")
        assert torch.equal(rows, again)
        assert offsets.tolist() == [0, 4, 10, 11, 17, 21]

    def test_positions_are_packed_like_the_rows(self, store: FeatureStore) -> None:
        ids = ["scan003", "scan000"]
        positions, offsets = store.positions(ids)
        assert offsets.tolist() == store.load(ids)[1].tolist() == [0, 6, 10]
        assert positions[6:].tolist() == [-2.0, -6.0, -10.0, -14.0]

    def test_a_kill_costs_a_small_cohort_four_scans(self, tmp_path: Path) -> None:
        scans = to_store([3] * 60)
        store = create(tmp_path / "s", scans, shard_scans=None)
        assert [len(shard.scans) for shard in store.pending_shards()] == [4] * 15
        again = create(tmp_path / "s", scans + to_store([3] * 200)[60:], shard_scans=None)
        assert again.pending_shards()[:15] == store.pending_shards()

    def test_a_scan_may_lie_across_chunks_and_pieces(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scans = to_store([9, 2, 3, 4, 7, 8, 5])
        store = create(tmp_path / "s", scans[:1], shard_scans=1)
        store = fill(create(tmp_path / "s", scans, shard_scans=7))
        monkeypatch.setattr(embeddings, "PIECE_BYTES", 1)
        for order in (scans, scans[::-1]):
            rows, _ = store.load([scan.scan_id for scan in order])
            expected = [rows_of(s, fewer=int(s.scan_id[4:]) % 3)["cls"] for s in order]
            assert torch.equal(rows, stored(np.concatenate(expected), "float16"))

    def test_asking_for_no_scan_gives_no_row(self, store: FeatureStore) -> None:
        rows, offsets = store.load([])
        assert rows.shape == (0, 5)
        assert offsets.tolist() == [0]

    def test_is_the_same_after_a_trip_to_another_process(self, store: FeatureStore) -> None:
        again: FeatureStore = pickle.loads(pickle.dumps(store))  # noqa: S301
        assert torch.equal(again.load()[0], store.load()[0])

    def test_uses_the_fused_pipeline_of_zarr_where_there_is_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def used() -> str:
            with our_zarr():
                return str(zarr.config.get("codec_pipeline.path"))

        fused = "zarr.core.codec_pipeline.FusedCodecPipeline"
        monkeypatch.setattr(fused, object, raising=False)
        assert used() == fused
        monkeypatch.delattr(fused)
        assert used() == "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def test_the_users_configuration_of_zarr_changes_nothing(self, tmp_path: Path) -> None:
        with zarr.config.set(
            {"codec_pipeline.path": "no.such.Pipeline", "array.write_empty_chunks": False}
        ):
            store = fill(create(tmp_path / "odd", to_store([4, 6])))
            read = store.load()[0]
        usual = fill(create(tmp_path / "usual", to_store([4, 6])))
        assert all_bytes(folder(store)) == all_bytes(folder(usual))
        assert torch.equal(read, usual.load()[0])

    def test_rounds_bfloat16_like_torch(self) -> None:
        bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
        rows = bits.view(np.float32)
        bits[:5000] = bits[:5000] & 0xFFFF0000 | 0x8000  # halfway between two bfloat16
        rows = rows[np.isfinite(rows)].reshape(-1, 1)
        kept = embeddings.encode(rows, dtype="bfloat16")
        assert torch.equal(
            torch.from_numpy(kept).view(torch.bfloat16), torch.from_numpy(rows).bfloat16()
        )


class TestFormat:
    def test_needs_only_zarr_and_pyarrow_to_be_read(self, store: FeatureStore) -> None:
        program = (
            "import sys, warnings, numpy, zarr, pyarrow.parquet\n"
            "warnings.simplefilter('error')\n"
            "group = zarr.open_group(sys.argv[1] + '/embeddings.zarr', mode='r')\n"
            "assert sorted(dict(group.members())) == ['cls', 'mean', 'position_mm']\n"
            "table = pyarrow.parquet.read_table(sys.argv[1] + '/scans.parquet')\n"
            "line = table.to_pylist()[3]\n"
            "rows = group['cls'][line['row_start'] : line['row_start'] + line['n_rows']]\n"
            "assert not [name for name in sys.modules if name.startswith('ctfm')]\n"
            "sys.stdout.buffer.write(numpy.ascontiguousarray(rows).tobytes())\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, str(folder(store))], capture_output=True, check=True
        )
        assert run.stdout == store.load(["scan003"])[0].numpy().tobytes()

    def test_describes_itself_in_the_attributes(self, store: FeatureStore) -> None:
        about = zarr.open_group(folder(store) / "embeddings.zarr", mode="r").attrs.asdict()["ctfm"]
        assert about["format"] == 2
        assert about["settings"] == SETTINGS
        assert about["tokens"] == TOKENS
        assert about["dtype"] == "float16"
        assert about["fingerprint"] == store.fingerprint

    def test_chunks_are_whole_rows_near_two_mib_with_a_checksum(self, tmp_path: Path) -> None:
        scans = to_store([40] * 70)
        store = create(tmp_path / "s", scans, tokens={"cls": 1024}, shard_scans=64)
        array = zarr.open_group(folder(store) / "embeddings.zarr", mode="r")["cls"]
        assert isinstance(array, zarr.Array)
        assert array.chunks == (1280, 1024)
        assert [type(codec).__name__ for codec in array.compressors] == ["Crc32cCodec"]
        assert [len(shard.scans) for shard in store.pending_shards()] == [64, 6]

    def test_the_table_has_the_documented_columns_and_no_others(self, store: FeatureStore) -> None:
        table = pq.read_table(folder(store) / "scans.parquet")
        assert table.schema.equals(STORE_SCHEMA, check_metadata=False)
        assert table["n_rows"].to_pylist() == [4, 6, 1, 6, 4]
        assert set(table["reason"].to_pylist()) == {"ok"}

    def test_the_folder_holds_what_the_format_says(self, store: FeatureStore) -> None:
        root = folder(store)
        arrays = ["cls", "mean", "position_mm"]
        assert {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()} == {
            "scans.parquet",
            "plan/000000.parquet",
            *(f"commits/00000{shard}.json" for shard in range(3)),
            "embeddings.zarr/zarr.json",
            *(f"embeddings.zarr/{name}/zarr.json" for name in arrays),
            *(f"embeddings.zarr/cls/c.{chunk}.0" for chunk in range(3)),
            *(f"embeddings.zarr/mean/c.{chunk}.0" for chunk in range(3)),
            *(f"embeddings.zarr/position_mm/c.{chunk}" for chunk in range(3)),
        }

    def test_importing_it_does_not_import_torch(self) -> None:
        program = "import sys, ctfm.store.features; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", program], check=True)

    def test_info_counts_scans_rows_and_failures(self, tmp_path: Path) -> None:
        store = create(tmp_path / "s", to_store([4, 7, 3, 6, 5]))
        first, *_ = store.pending_shards()
        store.write_shard(first, results_of(first, failed=["scan001"]))
        info = store.info()
        assert info["scans"] == {
            "ok": len(first.scans) - 1,
            "failed": 1,
            "pending": 5 - len(first.scans),
        }
        assert info["failures"] == {"not_a_head": 1}
        assert info["rows"] == sum(store.scans["n_rows"].to_pylist())


class TestAppend:
    def test_adds_new_scans_behind_what_is_there(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        before = fill(create(path, to_store([4, 7, 3]))).scans
        whole, _ = FeatureStore.open(path).load()
        store = create(path, to_store([4, 7, 3, 6, 5]))
        assert store.scans.slice(0, 3).equals(before)
        assert store.scans["status"].to_pylist()[3:] == ["pending", "pending"]
        fill(store)
        assert torch.equal(store.load(["scan000", "scan001", "scan002"])[0], whole)
        assert store.verify().ok

    def test_the_same_scans_again_change_nothing(self, tmp_path: Path) -> None:
        scans = to_store([4, 7, 3], views=2)
        fill(create(tmp_path / "s", scans))
        before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
        create(tmp_path / "s", scans, shard_scans=3, compress=True)
        assert before == {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}

    def test_number_and_tuple_spelling_does_not_matter(self, tmp_path: Path) -> None:
        create(tmp_path / "s", to_store([4]))
        same = {"weights": None, "windows_hu": ((0, 80), (-20, 180)), "backbone": "intensity"}
        create(tmp_path / "s", to_store([4]), settings=same)

    @pytest.mark.parametrize(
        ("other", "sentence"),
        [
            (
                {"settings": {**SETTINGS, "backbone": "dinov3-large"}},
                'backbone: "intensity" in the store, "dinov3-large" now',
            ),
            (
                {"settings": {**SETTINGS, "windows_hu": [[0, 80]]}},
                "windows_hu: [[0,80],[-20,180]] in the store, [[0,80]] now",
            ),
            ({"settings": {**SETTINGS, "seed": 3}}, "seed: not set in the store, 3 now"),
            ({"tokens": {"cls": 5}}, "tokens.mean: 3 in the store, not set now"),
            ({"dtype": "float32"}, 'dtype: "float16" in the store, "float32" now'),
        ],
    )
    def test_refuses_other_settings_and_names_each_with_both_values(
        self, tmp_path: Path, other: dict[str, Any], sentence: str
    ) -> None:
        create(tmp_path / "s", to_store([4]))
        with pytest.raises(StoreError) as refused:
            create(tmp_path / "s", to_store([4]), **other)
        assert sentence in str(refused.value)
        assert str(refused.value).count(" in the store, ") == 1

    def test_refuses_a_scan_that_now_belongs_to_another_patient(self, tmp_path: Path) -> None:
        (scan,) = to_store([4])
        create(tmp_path / "s", [scan])
        moved = ScanToStore(scan_id="scan000", study_id="study000", patient_id="x", max_rows=4)
        with pytest.raises(StoreError, match="'scan000' is in the store as study 'study000'"):
            create(tmp_path / "s", [moved])

    def test_refuses_a_folder_that_holds_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "thesis.txt").write_text("mine")
        with pytest.raises(StoreError, match="exists and is not a feature store"):
            create(tmp_path / "s", to_store([4]))

    def test_refuses_to_make_a_store_without_scans(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="no scan"):
            create(tmp_path / "s", [])

    def test_an_empty_folder_becomes_the_store(self, tmp_path: Path) -> None:
        (tmp_path / "s").mkdir()
        fill(create(tmp_path / "s", to_store([4])))
        assert [entry.name for entry in tmp_path.iterdir()] == ["s"]

    def test_two_processes_may_make_the_same_store_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scans, real = to_store([4, 7, 3]), tables.part_bytes

        def slower(*args: Any) -> bytes:
            monkeypatch.undo()
            fill(create(tmp_path / "s", scans))
            return real(*args)

        monkeypatch.setattr(growth, "part_bytes", slower)
        assert create(tmp_path / "s", scans).scans["status"].to_pylist() == ["ok"] * 3
        assert [entry.name for entry in tmp_path.iterdir()] == ["s"]

    def test_of_two_processes_with_other_keys_the_second_is_refused_before_it_plans(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = tables.part_bytes

        def slower(*args: Any) -> bytes:
            monkeypatch.undo()
            with pytest.raises(StoreError, match="another key"):
                create(tmp_path / "s", to_store([4, 7, 3]), ids="k2")
            return real(*args)

        monkeypatch.setattr(growth, "part_bytes", slower)
        store = create(tmp_path / "s", to_store([5, 6]), ids="k1")
        assert store.ids == ("k1",)
        assert store.scans["max_rows"].to_pylist() == [5, 6]

    @pytest.mark.parametrize("first", ["smaller", "larger"])
    def test_two_processes_may_add_other_scans_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
    ) -> None:
        scans, real = to_store([4, 7, 3, 6, 5]), tables.part_bytes
        create(tmp_path / "s", scans[:1])
        mine, theirs = scans[:3], scans[2:]
        if first == "larger":
            mine, theirs = theirs, mine

        def slower(*args: Any) -> bytes:
            monkeypatch.undo()
            create(tmp_path / "s", theirs)
            return real(*args)

        monkeypatch.setattr(growth, "part_bytes", slower)
        store = fill(create(tmp_path / "s", mine))
        assert sorted(store.scans["scan_id"].to_pylist()) == [scan.scan_id for scan in scans]
        assert store.verify().ok
        assert FeatureStore.open(tmp_path / "s").load()[1].shape == (6,)

    def test_a_kill_while_the_store_is_made_is_completed_by_the_next_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scans = to_store([4, 7, 3])
        whole = fill(create(tmp_path / "whole", scans))
        real = LocalPlace.add

        def killed_after(n: int) -> Callable[[LocalPlace, str, bytes], bool]:
            left = iter(range(n))

            def add(place: LocalPlace, name: str, data: bytes) -> bool:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return real(place, name, data)

            return add

        for n in range(5):
            monkeypatch.setattr(LocalPlace, "add", killed_after(n))
            with pytest.raises(KeyboardInterrupt):
                create(tmp_path / str(n), scans)
            monkeypatch.undo()
            assert FeatureStore.exists(tmp_path / str(n)) == (n > 0)  # from its plan on
            fill(create(tmp_path / str(n), scans))
            assert all_bytes(tmp_path / str(n)) == all_bytes(folder(whole))

    def test_removes_what_killed_writers_left_long_ago(self, tmp_path: Path) -> None:
        scans = to_store([4, 7])
        store = create(tmp_path / "s", scans)
        places = [
            folder(store) / "commits" / ".000000.json.ab",
            folder(store) / ".scans.parquet.cd",
        ]
        places.append(folder(store) / "embeddings.zarr" / "cls" / "c.0.ef")
        for place in places:
            place.with_name(f"{place.name}.partial").write_bytes(b"half")
            os.utime(place.with_name(f"{place.name}.partial"), (0, 0))
        create(tmp_path / "s", scans)
        assert not list(tmp_path.rglob("*.partial"))

    def test_what_a_killed_writer_left_is_no_foreign_file(self, tmp_path: Path) -> None:
        (tmp_path / "s" / "plan").mkdir(parents=True)
        (tmp_path / "s" / "plan" / ".000000.parquet.ab.partial").write_bytes(b"half")
        assert fill(create(tmp_path / "s", to_store([4]))).verify().ok

    def test_settings_must_be_finite_json(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"settings\.window is nan"):
            create(tmp_path / "s", to_store([4]), settings={"window": float("nan")})


class TestResume:
    @quick
    @given(
        max_rows=st.lists(st.integers(1, 9), min_size=1, max_size=10),
        shard_scans=st.integers(1, 4),
        data=st.data(),
    )
    def test_dropping_any_commits_and_extracting_again_gives_the_same_bytes(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        max_rows: list[int],
        shard_scans: int,
        data: st.DataObject,
    ) -> None:
        path = tmp_path_factory.mktemp("store") / "s"
        store = fill(create(path, to_store(max_rows), shard_scans=shard_scans), failed=["scan001"])
        before = {p: p.read_bytes() for p in path.rglob("*") if p.suffix in {".json", ".parquet"}}
        arrays = array_bytes(path)
        n_shards = len(list((path / "commits").glob("0*.json")))
        dropped = data.draw(st.sets(st.integers(0, n_shards - 1)))
        for shard in dropped:
            (path / "commits" / f"{shard:06d}.json").unlink()
        resumed = create(path, to_store(max_rows), shard_scans=shard_scans)
        assert {shard.index for shard in resumed.pending_shards()} == dropped
        for file in chunk_files(resumed):
            if data.draw(st.booleans()):
                file.write_bytes(b"what a kill may leave")
        fill(resumed, failed=["scan001"])
        assert array_bytes(path) == arrays
        after = {p: p.read_bytes() for p in before}
        assert {p for p in before if before[p] != after[p]} <= {path / "commits" / "scans.json"}
        assert store.verify().ok

    @pytest.mark.parametrize("moment", ["add_commit", "write_chunks"])
    def test_a_kill_between_chunks_and_commit_leaves_the_shard_pending(
        self, tmp_path: Path, moment: str
    ) -> None:
        path = tmp_path / "s"
        create(path, to_store([4, 7, 3, 6, 5]))
        shards = FeatureStore.open(path).pending_shards()
        (tmp_path / "work").write_bytes(pickle.dumps((shards[0], results_of(shards[0]))))
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_WRITER, str(path), str(tmp_path / "work"), moment],
            check=False,
        )
        assert killed.returncode == -9
        store = FeatureStore.open(path)
        assert chunk_files(store)[0].exists()
        assert store.pending_shards() == shards
        assert set(store.scans["status"].to_pylist()) == {"pending"}
        assert fill(store).verify().ok

    def test_a_commit_survives_without_finish(self, tmp_path: Path) -> None:
        store = create(tmp_path / "s", to_store([4, 7, 3, 6, 5]))
        first, *rest = store.pending_shards()
        store.write_shard(first, results_of(first))
        again = FeatureStore.open(folder(store))
        assert list(again.pending_shards()) == rest
        ids = [scan.scan_id for scan in first.scans]
        assert len(again.load(ids)[1]) == len(ids) + 1

    def test_committing_the_same_again_changes_nothing(self, store: FeatureStore) -> None:
        files = {p: p.stat().st_mtime_ns for p in folder(store).rglob("*") if p.is_file()}
        (folder(store) / "commits" / "000000.json").rename(folder(store) / "aside")
        (shard,) = store.pending_shards()
        (folder(store) / "aside").rename(folder(store) / "commits" / "000000.json")
        store.write_shard(shard, results_of(shard))
        store.finish()
        assert files == {p: p.stat().st_mtime_ns for p in folder(store).rglob("*") if p.is_file()}

    def test_refuses_other_results_for_a_committed_shard(self, tmp_path: Path) -> None:
        store = create(tmp_path / "s", to_store([4, 7]))
        (shard,) = store.pending_shards()
        store.write_shard(shard, results_of(shard))
        with pytest.raises(StoreError, match="committed with other results"):
            store.write_shard(shard, results_of(shard, failed=["scan001"]))

    @pytest.mark.parametrize("theirs_first", [True, False])
    def test_two_that_write_a_shard_at_once_and_differ_never_leave_a_mixture_under_a_record(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs_first: bool
    ) -> None:
        """The other process commits before this one's chunks, or between them and its record."""
        store = create(tmp_path / "s", to_store([4, 7]))
        (shard,) = store.pending_shards()
        mine, theirs = results_of(shard), [other_numbers(one) for one in results_of(shard)]
        step = "write_chunks" if theirs_first else "add_commit"
        real = getattr(features, step)

        def slower(*arguments: Any, **options: Any) -> Any:
            monkeypatch.undo()
            FeatureStore.open(tmp_path / "s").write_shard(shard, theirs)
            return real(*arguments, **options)

        monkeypatch.setattr(features, step, slower)
        said = "pending again" if theirs_first else "committed with other results"
        with pytest.raises(StoreError, match=said) as refused:
            store.write_shard(shard, mine)
        assert ("pending again" in str(refused.value)) == theirs_first
        assert store.verify().ok
        assert [one.index for one in store.pending_shards()] == ([0] if theirs_first else [])

    def test_two_that_write_a_shard_at_once_and_agree_both_succeed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = create(tmp_path / "s", to_store([4, 7]))
        (shard,) = store.pending_shards()
        real = commits.add_commit

        def slower(*arguments: Any) -> bool:
            monkeypatch.undo()
            FeatureStore.open(tmp_path / "s").write_shard(shard, results_of(shard))
            return real(*arguments)

        monkeypatch.setattr(features, "add_commit", slower)
        store.write_shard(shard, results_of(shard))
        assert store.scans["status"].to_pylist() == ["ok", "ok"]
        assert store.verify().ok

    def test_a_record_that_is_taken_back_while_it_is_read_makes_its_shard_pending(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = create(tmp_path / "s", to_store([4, 7, 3, 6]))
        for shard in store.pending_shards():
            store.write_shard(shard, results_of(shard))
        real = LocalPlace.read_many

        def slower(place: LocalPlace, names: Any) -> Any:
            monkeypatch.undo()
            FeatureStore.open(tmp_path / "s").take_back(["scan002"])
            return real(place, names)

        monkeypatch.setattr(LocalPlace, "read_many", slower)
        opened = FeatureStore.open(tmp_path / "s")
        assert opened.scans["status"].to_pylist() == ["ok", "ok", "pending", "pending"]

    def test_whoever_writes_the_table_last_has_what_all_processes_committed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, scans = tmp_path / "s", to_store([4, 7, 3, 6, 5])
        store, real = create(path, scans[:2]), tables.publish_scans
        (shard,) = store.pending_shards()
        store.write_shard(shard, results_of(shard))

        def slower(*arguments: Any) -> None:
            monkeypatch.undo()
            fill(create(path, scans))
            real(*arguments)

        monkeypatch.setattr(features, "publish_scans", slower)
        store.finish()
        assert pq.read_table(path / "scans.parquet")["status"].to_pylist() == ["ok"] * 5
        assert store.verify().ok

    def test_takes_back_the_shards_of_scans_only(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        store = fill(create(path, to_store([4, 7, 3, 6, 5])), failed=["scan004"])
        whole = fill(create(tmp_path / "undisturbed", to_store([4, 7, 3, 6, 5])))
        assert store.take_back(["scan004"]) == 1
        assert [shard.scans[-1].scan_id for shard in store.pending_shards()] == ["scan004"]
        fill(FeatureStore.open(path))
        assert array_bytes(path) == array_bytes(folder(whole))

    def test_a_kill_while_shards_are_taken_back_loses_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = fill(create(tmp_path / "s", to_store([4, 7, 3])), failed=["scan001"])
        before = store.scans

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("ctfm.store.features.drop_commits", killed)
        with pytest.raises(KeyboardInterrupt):
            store.take_back(["scan001"])
        assert FeatureStore.open(folder(store)).scans.equals(before)
        assert store.verify().ok

    def test_a_full_disk_is_one_clear_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = create(tmp_path / "s", to_store([4, 7]))
        (shard,) = store.pending_shards()

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ctfm.store.features.write_chunks", full)
        with pytest.raises(StoreError, match="the disk is full: free some space"):
            store.write_shard(shard, results_of(shard))
        assert store.pending_shards() == (shard,)


class TestWriteAgain:
    def test_brings_damaged_rows_back_to_the_same_bytes(self, tmp_path: Path) -> None:
        scans = to_store([4, 7, 3, 6, 5], views=2)
        store = fill(create(tmp_path / "s", scans, shard_scans=6), failed=["scan001"])
        before = all_bytes(tmp_path / "s")
        shard, *_ = store.shards()
        damaged = tmp_path / "s" / "embeddings.zarr" / "position_mm" / "c.0"
        damaged.write_bytes(b"gone")
        lost = store.verify().lost_scans
        assert lost == ("scan000", "scan002")
        results = results_of(shard, failed=["scan001"])
        assert store.write_again(shard, [one for one in results if one.scan_id in lost])
        assert all_bytes(tmp_path / "s") == before

    def test_leaves_everything_as_it_is_when_other_rows_come_out(self, tmp_path: Path) -> None:
        store = fill(create(tmp_path / "s", to_store([4, 7, 3])))
        before = all_bytes(tmp_path / "s")
        shard, *_ = store.shards()
        (result, *_) = results_of(shard)
        assert result.rows is not None
        result.rows["cls"][0, 0] += 1
        assert not store.write_again(shard, [result])
        failed = ScanResult(scan_id=result.scan_id, reason=Reason.VANISHED)
        assert not store.write_again(shard, [failed])
        assert all_bytes(tmp_path / "s") == before

    def test_does_not_take_damaged_rows_of_another_scan_for_good(self, tmp_path: Path) -> None:
        store = fill(create(tmp_path / "s", to_store([4, 7, 3])))
        shard, *_ = store.shards()
        (tmp_path / "s" / "embeddings.zarr" / "cls" / "c.0.0").write_bytes(b"gone")
        with pytest.raises(StoreError, match="is damaged"):
            store.write_again(shard, results_of(shard)[:1])


class TestRefuses:
    def test_loading_an_unfinished_store(self, tmp_path: Path) -> None:
        store = create(tmp_path / "s", to_store([4, 7, 3, 6, 5]))
        first, *_ = store.pending_shards()
        store.write_shard(first, results_of(first))
        n = 5 - len(first.scans)
        with pytest.raises(StoreError, match=rf"{n} of 5 scans .* pending: run `ctfm extract`"):
            store.load()

    @pytest.mark.parametrize(
        ("asked", "sentence"),
        [
            (["scan000", "nobody"], r"1 of 2 scans .* 'nobody' \(not in the store\)"),
            (["scan001", "scan001"], r"2 of 2 scans .* 'scan001' \(failed\)"),
        ],
    )
    def test_loading_a_scan_without_embeddings(
        self, tmp_path: Path, asked: list[str], sentence: str
    ) -> None:
        store = fill(create(tmp_path / "s", to_store([4, 7, 3])), failed=["scan001"])
        with pytest.raises(StoreError, match=sentence):
            store.load(asked)
        assert store.load()[1].tolist() == [0, 4, 5]

    def test_a_table_that_is_missing_cut_short_or_forbidden_each_by_its_name(
        self, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = folder(store) / "scans.parquet"
        table.write_bytes(table.read_bytes()[:-9])
        with pytest.raises(StoreError, match=r"scans\.parquet is damaged: .* --repair` writes it"):
            print(FeatureStore.open(folder(store)).scans)
        table.unlink()
        with pytest.raises(StoreError, match=r"scans\.parquet .* is missing.* --repair` writes it"):
            print(FeatureStore.open(folder(store)).scans)
        forbid(table, monkeypatch)
        with pytest.raises(PlaceError, match=r"scans\.parquet may not be read .* ask its owner"):
            print(FeatureStore.open(folder(store)).scans)

    def test_a_view_or_token_that_is_not_stored(self, store: FeatureStore) -> None:
        with pytest.raises(StoreError, match=r"view 3\).*not in the store"):
            store.load(["scan000"], view=3)
        with pytest.raises(StoreError, match="has no token 'pooler': it holds cls, mean"):
            store.load(token="pooler")

    def test_rows_that_are_not_finite(self, tmp_path: Path) -> None:
        store = create(tmp_path / "s", to_store([4]))
        (shard,) = store.pending_shards()
        (result,) = results_of(shard)
        assert result.rows is not None
        result.rows["mean"][1, 2] = np.nan
        with pytest.raises(StoreError, match="NaN or infinite rows"):
            store.write_shard(shard, [result])
        assert store.pending_shards() == (shard,)

    def test_too_large_for_the_type_is_a_failed_scan(self, tmp_path: Path) -> None:
        store = create(tmp_path / "s", to_store([4]))
        (shard,) = store.pending_shards()
        (result,) = results_of(shard)
        assert result.rows is not None
        result.rows["mean"][1, 2] = 7e4
        store.write_shard(shard, [result])
        assert store.scans["reason"].to_pylist() == ["not_finite_embedding"]
        assert not zarr.open_group(folder(store) / "embeddings.zarr", mode="r")["mean"][:].any()

    @pytest.mark.parametrize("wrong", ["missing", "twice", "rows", "width", "token", "empty"])
    def test_results_that_do_not_fit_the_plan(self, tmp_path: Path, wrong: str) -> None:
        scans = to_store([4, 7])
        store = create(tmp_path / "s", scans)
        (shard,) = store.pending_shards()
        last, first = results_of(shard)
        assert first.rows is not None
        position_mm = np.zeros(4, np.float32)
        rows = {name: np.zeros((4, width), np.float32) for name, width in TOKENS.items()}
        if wrong == "rows":
            rows, position_mm = (
                {n: np.ones((5, w), np.float32) for n, w in TOKENS.items()},
                (np.zeros(5, np.float32)),
            )
        elif wrong == "width":
            rows["cls"] = np.zeros((4, 6), np.float32)
        elif wrong == "token":
            del rows["mean"]
        elif wrong == "empty":
            rows, position_mm = (
                {n: np.ones((0, w), np.float32) for n, w in TOKENS.items()},
                (np.zeros(0, np.float32)),
            )
        bad = ScanResult(scan_id="scan000", rows=rows, position_mm=position_mm)
        results = {"missing": [last], "twice": [first, first]}.get(wrong, [last, bad])
        with pytest.raises(StoreError):
            store.write_shard(shard, results)
        assert store.pending_shards() == (shard,)

    def test_a_folder_that_is_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="is not a feature store"):
            FeatureStore.open(tmp_path)

    def test_a_store_of_a_newer_format(
        self, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layout, "FORMAT_VERSION", 1)
        with pytest.raises(StoreError, match="format 2, this ctfm reads format 1: use the"):
            FeatureStore.open(folder(store))

    def test_a_store_of_an_older_format(
        self, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layout, "FORMAT_VERSION", 3)
        with pytest.raises(StoreError, match="reads format 3: extract to a new store"):
            FeatureStore.open(folder(store))

    def test_settings_changed_by_hand(self, store: FeatureStore) -> None:
        about = folder(store) / "embeddings.zarr" / "zarr.json"
        about.write_text(about.read_text().replace("intensity", "intensitY"))
        with pytest.raises(StoreError, match="do not fit its fingerprint"):
            FeatureStore.open(folder(store))


def test_a_chunk_that_is_gone_is_refused_and_not_read_as_zeros(store: FeatureStore) -> None:
    (Path(store.path) / "embeddings.zarr" / "cls" / "c.0.0").unlink()
    with pytest.raises(StoreError, match=r"lacks 1 of the \d+ chunks .* e\.g\. c\.0\.0"):
        FeatureStore.open(store.path).load()


def test_a_chunk_that_vanishes_while_it_is_read_is_no_zeros(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = embeddings.read_rows

    def too_late(*args: Any, **options: Any) -> Any:
        chunk = folder(store) / "embeddings.zarr" / "cls" / "c.0.0"
        content = chunk.read_bytes()
        chunk.unlink()
        try:
            return read(*args, **options)
        finally:
            chunk.write_bytes(content)

    monkeypatch.setattr(embeddings, "read_rows", too_late)
    with pytest.raises(StoreError, match="could not be found for a moment"):
        FeatureStore.open(store.path).load()
