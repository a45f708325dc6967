"""Streams: feature stores, to the embeddings of the scans of a fit, resident or window by window.

If the embeddings fit into the memory that they may use, they are read once and stay, on the device
if they fit there too. Otherwise they pass by in windows: in each epoch the shards of the store are
shuffled and dealt into windows that fit, the next one is read while the present one is used, and
scans are shuffled inside a window only.

Several stores are joined slice by slice (their embeddings laid end to end, `Branch`), or each is a
branch of its own (`heads/branches.py`).

Axes: n scans of a cohort, r rows, d embedding, b scans of a batch, v views.
"""

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ctfm.heads.batches import Batch, PackedScans
from ctfm.store.errors import StoreError
from ctfm.store.features import FeatureStore

RESIDENT_SHARE = 0.6
"""Share of the memory that is free which embeddings may use if no budget is given."""

WINDOWS_IN_MEMORY = 4
"""The window in use, the one that is being read, and twice as much for what reading takes."""

_PIECE_ROWS = 1 << 16

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """What one adapter and pool read: a store, or several joined slice by slice.

    A store with one row a scan is repeated for each slice of the others.
    """

    stores: tuple[FeatureStore, ...]
    token: str

    @property
    def dim(self) -> int:
        """d, numbers of an embedding, of all stores together.

        Raises:
            StoreError: If a store has no such token.
        """
        for store in self.stores:
            if self.token not in store.tokens:
                raise StoreError(
                    f"{store.path} has no token {self.token!r}: it holds {', '.join(store.tokens)}"
                )
        return sum(store.tokens[self.token] for store in self.stores)

    def load(
        self, scan_ids: Sequence[str], *, view: int = 0
    ) -> tuple[Float[Tensor, "r d"], Int64[Tensor, " n1"]]:
        """Rows of scans in the order asked for, and their offsets (see `FeatureStore.load`).

        Raises:
            StoreError: If the stores disagree on the slices of a scan.
        """
        loaded = [store.load(scan_ids, self.token, view=view) for store in self.stores]
        if len(loaded) == 1:
            return loaded[0]
        offsets = max((one for _, one in loaded), key=lambda one: int(one[-1]))
        positions = self.positions(scan_ids, view=view)
        for store, (_, own) in zip(self.stores, loaded, strict=True):
            if len(own) == int(own[-1]) + 1:
                continue
            theirs, _ = store.positions(scan_ids, view=view)
            if not torch.equal(own, offsets) or not torch.equal(theirs, positions):
                raise StoreError(
                    f"{store.path} has other slices than {self.stores[0].path}, and embeddings are "
                    "joined slice by slice: extract both with the same grid, or join by scan "
                    "(--join scans)"
                )
        counts = offsets.diff()
        rows = [
            rows if torch.equal(own, offsets) else rows.repeat_interleave(counts, 0)
            for rows, own in loaded
        ]
        return torch.cat(rows, 1), offsets

    def positions(self, scan_ids: Sequence[str], *, view: int = 0) -> Float32[Tensor, " r"]:
        """Position in mm along z of each row of `load`."""
        each = [store.positions(scan_ids, view=view)[0] for store in self.stores]
        return max(each, key=len)

    def row_bytes(self, precision: str) -> int:
        """Bytes of a row in memory, kept for products of a precision (`in_precision`)."""
        kinds = {store.dtype for store in self.stores}
        wide = "float32" in kinds or (precision == "float32" and "bfloat16" in kinds)
        return self.dim * (4 if wide else 2)

    def rows_of(self, scan_ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """Rows of each scan, known without reading any."""
        most = np.zeros(len(scan_ids), np.int64)
        for store in self.stores:
            first = store.scans.filter(pc.equal(store.scans["view"], 0))
            pairs = zip(first["scan_id"].to_pylist(), first["n_rows"].to_pylist(), strict=True)
            known = dict(pairs)
            most = np.maximum(most, [known[one] for one in scan_ids])
        return most


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Scans of a cohort whose embeddings are in memory."""

    lines: Int64[np.ndarray, " w"]
    """Which, by their index in the cohort."""

    packed: tuple[PackedScans, ...]
    """Of each branch, all views: view v of the i-th scan is number i + v · w."""

    def batches(
        self,
        chosen: Int64[np.ndarray, " b"],
        *,
        view: Int64[np.ndarray, " b"],
        device: torch.device,
    ) -> tuple[Batch, ...]:
        """Of each branch the rows of some scans.

        Args:
            chosen: Indices in the cohort; all lie in the window.
            view: Which view of each.
            device: Where the batch goes.
        """
        place = np.searchsorted(self.lines, chosen) + view * len(self.lines)
        index = torch.from_numpy(place)
        return tuple(packed.batch(index, device=device) for packed in self.packed)


class Stream:
    """The embeddings of a cohort.

    Args:
        branches: What is read.
        scan_ids: Scans of the cohort.
        views: Views of each scan; 1 is view 0 alone.
        precision: Type of the products: rows are kept in bfloat16 if it is that.
        device: Where batches go.
        memory_bytes: What the embeddings may use; None is a share of what is free.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        scan_ids: Sequence[str],
        *,
        views: int,
        precision: str,
        device: torch.device,
        memory_bytes: int | None,
    ) -> None:
        self._branches, self._scan_ids = branches, np.asarray(scan_ids)
        self._views, self._precision, self._device = views, precision, device
        free = int(RESIDENT_SHARE * psutil.virtual_memory().available)
        budget = memory_bytes or free
        by_branch = [branch.rows_of(scan_ids) * branch.row_bytes(precision) for branch in branches]
        self._scan_bytes: Int64[np.ndarray, " n"] = np.stack(by_branch).sum(0) * views
        every = np.arange(len(scan_ids))
        joins = views > 1 or any(len(branch.stores) > 1 for branch in branches)
        self.resident = int(self._scan_bytes.sum()) * (2 if joins else 1) <= budget
        # What is free is never twice the same, and a fit that goes on must get the same windows.
        steady = memory_bytes or 1 << (free.bit_length() - 1)
        self.window_bytes = 0 if self.resident else steady // WINDOWS_IN_MEMORY
        self._whole = self._read(every, stays=True) if self.resident else None
        if not self.resident:
            _give_back_freed_memory()

    def windows(
        self, lines: Int64[np.ndarray, " n"], *, seed: tuple[int, int] | None = None
    ) -> list[Int64[np.ndarray, " _"]]:
        """Deal scans into groups that fit into memory; one group if everything is resident.

        Args:
            lines: Indices in the cohort, rising.
            seed: Shuffles the shards before they are dealt; None keeps their order.
        """
        if self.resident:
            return [lines]
        shards = np.split(lines, np.flatnonzero(np.diff(self._shard_of(lines))) + 1)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(len(shards))
            shards = [shards[i] for i in order]
        dealt: list[list[Int64[np.ndarray, " _"]]] = [[]]
        free = self.window_bytes
        for shard in shards:
            size = int(self._scan_bytes[shard].sum())
            if size > free and dealt[-1]:
                dealt.append([])
                free = self.window_bytes
            dealt[-1].append(shard)
            free -= size
        return [np.sort(np.concatenate(window)) for window in dealt if window]

    def open(self, windows: Iterable[Int64[np.ndarray, " _"]]) -> Iterator[Window]:
        """The windows, one after another; the next is read while one is in use."""
        if self._whole is not None:
            for _ in windows:
                yield self._whole
            return
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for lines in windows:
                reading = reader.submit(self._read, lines, stays=False)
                if coming is not None:
                    yield coming.result()
                coming = reading
            if coming is not None:
                yield coming.result()

    def _shard_of(self, lines: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        table = self._branches[0].stores[0].scans
        shard = dict(zip(table["scan_id"].to_pylist(), table["shard"].to_pylist(), strict=True))
        return np.array([shard[one] for one in self._scan_ids[lines].tolist()], np.int64)

    def _read(self, lines: Int64[np.ndarray, " w"], *, stays: bool) -> Window:
        ids = self._scan_ids[lines].tolist()
        return Window(
            lines=lines, packed=tuple(self._packed(one, ids, stays=stays) for one in self._branches)
        )

    def _packed(self, branch: Branch, ids: Sequence[str], *, stays: bool) -> PackedScans:
        loaded = [branch.load(ids, view=view) for view in range(self._views)]
        rows = loaded[0][0] if self._views == 1 else torch.cat([one for one, _ in loaded])
        counts = torch.cat([offsets.diff() for _, offsets in loaded])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        rows = in_precision(rows, self._precision)
        if stays and _fits(rows, self._device):
            rows = rows.to(self._device)
        return PackedScans(rows=rows, offsets=offsets)


def in_precision(rows: Float[Tensor, "r d"], precision: str) -> Float[Tensor, "r d"]:
    """Rows in the type in which they are kept for products of a precision.

    For bfloat16 that is bfloat16, converted in place where the size is the same; for float32 it is
    the type of the store, cast batch by batch, unless that is bfloat16.
    """
    if precision == "bfloat16" and rows.dtype == torch.float16:
        kept = rows.view(torch.bfloat16)
        for first in range(0, len(rows), _PIECE_ROWS):
            kept[first : first + _PIECE_ROWS] = rows[first : first + _PIECE_ROWS].bfloat16()
        return kept
    if precision == "bfloat16":
        return rows.bfloat16()
    return rows.float() if rows.dtype == torch.bfloat16 else rows


def _give_back_freed_memory() -> None:
    """Let glibc return large blocks to the system when they are freed, as it does not by itself.

    Its threshold grows with use up to 32 MB; below, freed blocks stay with the thread that had
    them, and windows come and go in several. Elsewhere than on glibc nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _fits(rows: Float[Tensor, "r d"], device: torch.device) -> bool:
    """Half of the free memory of a GPU is left to the batches."""
    return device.type != "cuda" or rows.nbytes < torch.cuda.mem_get_info(device)[0] / 2
