"""Packed rows to blocks of scans."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctfm.heads.batches import MAX_PADDING, Batch, PackedScans
from ctfm.store.errors import StoreError

D = 3
COUNTS = (4, 1, 6, 2)
CPU = torch.device("cpu")


def packed(counts: tuple[int, ...] = COUNTS, dtype: torch.dtype = torch.float32) -> PackedScans:
    rows = torch.arange(sum(counts) * D).view(-1, D).to(dtype)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return PackedScans(rows=rows, offsets=offsets)


def scan(scans: PackedScans, index: int) -> Tensor:
    return scans.rows[scans.offsets[index] : scans.offsets[index + 1]]


def by_scan(batch: Batch) -> list[Tensor]:
    """The rows of each scan, without padding, in the order in which they were asked for."""
    in_blocks = []
    for part, mask in zip(batch.layout.split(batch.x), batch.layout.masks(), strict=True):
        shown = torch.ones(part.shape[:2], dtype=torch.bool) if mask is None else mask
        in_blocks += [rows[ok] for rows, ok in zip(part, shown, strict=True)]
    order = batch.layout.order
    return in_blocks if order is None else [in_blocks[place] for place in order.tolist()]


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    picks=st.lists(st.integers(0, 7), min_size=1, max_size=20),
)
@settings(max_examples=50, deadline=None)
def test_gathers_the_rows_of_the_chosen_scans(counts: list[int], picks: list[int]) -> None:
    scans, chosen = packed(tuple(counts)), [pick % len(counts) for pick in picks]
    batch = scans.batch(torch.tensor(chosen), device=CPU)
    for index, rows in zip(chosen, by_scan(batch), strict=True):
        assert torch.equal(rows, scan(scans, index))
    padding = len(batch.x) - sum(counts[index] for index in chosen)
    assert padding <= MAX_PADDING * len(batch.x)
    assert (batch.layout.valid is None) == (padding == 0)


def test_values_of_scans_come_back_in_the_order_asked_for() -> None:
    batch = packed().batch(torch.tensor([1, 2, 0]), device=CPU)
    first = torch.cat([part[:, 0] for part in batch.layout.split(batch.x)])
    expected = torch.stack([scan(packed(), index)[0] for index in (1, 2, 0)])
    assert torch.equal(batch.layout.restore(first), expected)


def test_pads_with_rows_of_the_same_scan_so_that_padding_is_finite() -> None:
    batch = packed((19, 18)).batch(torch.tensor([1, 0]), device=CPU)
    assert batch.layout.blocks == ((2, 19),)
    assert batch.layout.valid is not None
    assert torch.equal(batch.x[~batch.layout.valid], scan(packed((19, 18)), 1)[:1])


def test_keeps_the_stored_type() -> None:
    batch = packed(dtype=torch.float16).batch(torch.tensor([1]), device=CPU)
    assert batch.x.dtype == torch.float16


def test_counts_rows() -> None:
    assert packed().counts.tolist() == list(COUNTS)
    assert len(packed()) == len(COUNTS)


def test_refuses_a_scan_without_rows() -> None:
    with pytest.raises(StoreError, match="1 of 3 scans have no rows"):
        packed((2, 0, 1))
