"""The plan: every scan has its own rows, every shard its own chunks, and nothing ever moves."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctfm.store.errors import StoreError
from ctfm.store.plan import (
    CHUNK_BYTES,
    STORE_SCHEMA,
    ScanToStore,
    plan_shards,
    plan_table,
    planned_rows,
    rows_per_chunk,
    shard_of_lines,
    shard_scans_for,
    shard_slices,
)

scan_lists = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 3)), min_size=1, max_size=30
).map(
    lambda sizes: [
        ScanToStore(scan_id=f"c{i}", study_id=f"s{i}", patient_id="p", view=view, max_rows=n)
        for i, (n, views) in enumerate(sizes)
        for view in range(views)
    ]
)


@given(scans=scan_lists, chunk_rows=st.integers(1, 50), shard_scans=st.integers(1, 9))
def test_no_two_scans_share_a_row_and_no_two_shards_a_chunk(
    scans: list[ScanToStore], chunk_rows: int, shard_scans: int
) -> None:
    shards = plan_shards(scans, chunk_rows=chunk_rows, shard_scans=shard_scans)
    assert [scan for shard in shards for scan in shard.scans] == scans
    for shard in shards:
        assert shard.row_start % chunk_rows == shard.n_rows % chunk_rows == 0
        spans = list(zip(shard.row_starts(), shard.scans, strict=True))
        assert all(start + scan.max_rows == after for (start, scan), (after, _) in pairwise(spans))
        start, last = spans[-1]
        assert 0 <= shard.row_start + shard.n_rows - (start + last.max_rows) < chunk_rows
    assert all(one.row_start + one.n_rows == two.row_start for one, two in pairwise(shards))


@given(scans=scan_lists, chunk_rows=st.integers(1, 50), shard_scans=st.integers(1, 9))
def test_a_shard_is_full_and_holds_all_views_of_its_scans(
    scans: list[ScanToStore], chunk_rows: int, shard_scans: int
) -> None:
    shards = plan_shards(scans, chunk_rows=chunk_rows, shard_scans=shard_scans)
    assert all(len(shard.scans) >= shard_scans for shard in shards[:-1])
    home = {scan.scan_id: shard.index for shard in shards for scan in shard.scans}
    assert all(home[scan.scan_id] == shard.index for shard in shards for scan in shard.scans)


@given(scans=scan_lists, chunk_rows=st.integers(1, 50), shard_scans=st.integers(1, 9))
def test_the_table_gives_the_shards_back(
    scans: list[ScanToStore], chunk_rows: int, shard_scans: int
) -> None:
    shards = plan_shards(scans, chunk_rows=chunk_rows, shard_scans=shard_scans)
    table = plan_table(shards)
    assert table.schema.equals(STORE_SCHEMA)
    assert planned_rows(table, chunk_rows=chunk_rows) == sum(shard.n_rows for shard in shards)
    slices = shard_slices(table)
    lines = [table.slice(part.start, part.stop - part.start) for part in slices.values()]
    assert tuple(shard_of_lines(part, chunk_rows=chunk_rows) for part in lines) == shards


@pytest.mark.parametrize("chunk_rows", [7, 854, 1280])
def test_which_scans_share_a_shard_does_not_depend_on_the_width_of_a_row(chunk_rows: int) -> None:
    scans = [
        ScanToStore(scan_id=f"c{i}", study_id="s", patient_id="p", max_rows=40) for i in range(200)
    ]
    shards = plan_shards(scans, chunk_rows=chunk_rows)
    assert [len(shard.scans) for shard in shards] == [64, 64, 64, 8]


@pytest.mark.parametrize(("n_scans", "size"), [(1, 4), (60, 4), (160, 10), (1023, 63), (9999, 64)])
def test_a_small_cohort_has_about_sixteen_shards(n_scans: int, size: int) -> None:
    assert shard_scans_for(n_scans) == size


def test_new_shards_follow_the_old_ones() -> None:
    scan = ScanToStore(scan_id="c", study_id="s", patient_id="p", max_rows=5)
    (shard,) = plan_shards([scan], chunk_rows=4, first_index=3, first_row=12)
    assert (shard.index, shard.name, shard.row_start, shard.n_rows) == (3, "000003", 12, 8)


@pytest.mark.parametrize(
    ("row_bytes", "rows"), [(768 * 2, 1280), (1024 * 2, 1280), (1152 * 2, 854), (4096 * 4, 128)]
)
def test_a_chunk_divides_a_shard_and_is_close_to_two_mib(row_bytes: int, rows: int) -> None:
    assert rows_per_chunk(row_bytes, shard_rows=2560) == rows
    assert 2560 <= -(-2560 // rows) * rows < 2560 + 3
    assert 0.75 * CHUNK_BYTES < rows * row_bytes < 1.34 * CHUNK_BYTES


def test_a_chunk_is_no_larger_than_a_shard_and_never_empty() -> None:
    assert rows_per_chunk(10, shard_rows=80) == 80
    assert rows_per_chunk(3 * CHUNK_BYTES, shard_rows=80) == 1


@pytest.mark.parametrize(
    ("rows", "shard_scans", "sentence"),
    [([4, 0], 2, "would get 0 rows"), ([4], 0, "at least one scan"), ([4, 4], 2, "occurs twice")],
)
def test_refuses_what_cannot_be_planned(rows: list[int], shard_scans: int, sentence: str) -> None:
    scans = [ScanToStore(scan_id="c", study_id="s", patient_id="p", max_rows=n) for n in rows]
    with pytest.raises(StoreError, match=sentence):
        plan_shards(scans, chunk_rows=4, shard_scans=shard_scans)


def test_refuses_a_table_out_of_order() -> None:
    scans = [
        ScanToStore(scan_id=f"c{i}", study_id="s", patient_id="p", max_rows=3) for i in range(3)
    ]
    table = plan_table(plan_shards(scans, chunk_rows=3, shard_scans=1))
    with pytest.raises(StoreError, match="not in the order of the shards"):
        shard_slices(table.take([2, 0, 1]))
