"""Packed rows to padded batches."""

import pytest
import torch
from torch import Tensor

from ctfm.heads.batches import PackedScans
from ctfm.store.errors import StoreError

D = 3
COUNTS = (4, 1, 6, 2)


def packed(counts: tuple[int, ...] = COUNTS, dtype: torch.dtype = torch.float32) -> PackedScans:
    rows = torch.arange(sum(counts) * D).view(-1, D).to(dtype)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return PackedScans(rows=rows, offsets=offsets)


def scan(scans: PackedScans, index: int) -> Tensor:
    return scans.rows[scans.offsets[index] : scans.offsets[index + 1]]


@pytest.mark.parametrize("chosen", [[0], [3, 1], [1, 1, 3], [2, 0, 3, 1, 2]])
def test_gathers_the_rows_of_the_chosen_scans(chosen: list[int]) -> None:
    scans = packed()
    x, valid = scans.batch(torch.tensor(chosen), device=torch.device("cpu"))
    assert x.shape == (len(chosen), max(COUNTS[i] for i in chosen), D)
    for line, index in enumerate(chosen):
        assert valid[line].tolist() == [s < COUNTS[index] for s in range(x.shape[1])]
        assert torch.equal(x[line, valid[line]], scan(scans, index))


def test_pads_with_rows_of_the_same_scan_so_that_padding_is_finite() -> None:
    x, valid = packed().batch(torch.tensor([1, 2]), device=torch.device("cpu"))
    assert (x[0][~valid[0]] == x[0, 0]).all()


def test_keeps_the_stored_type() -> None:
    x, _ = packed(dtype=torch.float16).batch(torch.tensor([1]), device=torch.device("cpu"))
    assert x.dtype == torch.float16


def test_counts_rows() -> None:
    assert packed().counts.tolist() == list(COUNTS)
    assert len(packed()) == len(COUNTS)


def test_refuses_a_scan_without_rows() -> None:
    with pytest.raises(StoreError, match="1 of 3 scans have no rows"):
        packed((2, 0, 1))
