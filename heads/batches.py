"""Batches: packed rows of many scans, to the rows of some of them in blocks of almost equal length.

A feature store hands over the rows of all scans in one tensor (`FeatureStore.load`). It stays
where it is; a batch gathers the rows of its scans. Scans differ in their number of slices, and a
batch padded to its longest scan can be half padding. So the scans of a batch are laid out from the
longest to the shortest and cut into blocks, each padded to its own longest scan and at most a
tenth of it padding; padding repeats a row of its scan and is masked.

Axes: r rows (slices of many scans, packed), n scans, b scans of a batch, s slices, d embedding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ctfm.store.errors import StoreError

MAX_PADDING = 0.1
"""Largest share of the rows of a block that is padding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """How the rows of a batch belong to its scans."""

    blocks: tuple[tuple[int, int], ...]
    """Scans and slices of each block; the rows of a block follow those of the one before."""

    valid: Bool[Tensor, " r"] | None = None
    """True at slices, False at padding; None if there is no padding."""

    order: Int64[Tensor, " b"] | None = None
    """Place among the blocks of each scan as it was asked for; None if the places are the same."""

    @property
    def _sizes(self) -> list[int]:
        return [scans * slices for scans, slices in self.blocks]

    def split(self, rows: Float[Tensor, "*v r q"]) -> list[Float[Tensor, "*v _ _ q"]]:
        """Rows as one (scans, slices) array a block; nothing is copied."""
        parts = torch.split(rows, self._sizes, dim=-2)
        return [
            part.reshape(*part.shape[:-2], *block, part.shape[-1])
            for part, block in zip(parts, self.blocks, strict=True)
        ]

    def masks(self) -> list[Bool[Tensor, "_ _"] | None]:
        """`valid` of each block, None where a block has no padding."""
        if self.valid is None:
            return [None] * len(self.blocks)
        parts = torch.split(self.valid, self._sizes)
        return [part.view(block) for part, block in zip(parts, self.blocks, strict=True)]

    def restore(self, scans: Float[Tensor, "*v b c"]) -> Float[Tensor, "*v b c"]:
        """From the order of the blocks to the order in which the scans were asked for."""
        return scans if self.order is None else scans.index_select(-2, self.order)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The rows of some scans, and how they belong to them."""

    x: Float[Tensor, "r d"]
    layout: Layout


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedScans:
    """The embeddings of many scans, as `FeatureStore.load` packs them.

    Raises:
        StoreError: If a scan has no rows; there is nothing to pool in it.
    """

    rows: Float[Tensor, "r d"]
    """Slice embeddings, scan after scan."""

    offsets: Int64[Tensor, " n1"]
    """Scan i has `rows[offsets[i] : offsets[i + 1]]`; on the CPU, which decides the layout."""

    def __post_init__(self) -> None:
        if empty := int((self.counts < 1).sum()):
            raise StoreError(
                f"{empty} of {len(self)} scans have no rows: ask for scans that are ok"
            )

    def __len__(self) -> int:
        """Number of scans."""
        return len(self.offsets) - 1

    @property
    def dim(self) -> int:
        """d, numbers of an embedding."""
        return int(self.rows.shape[1])

    @property
    def counts(self) -> Int64[Tensor, " n"]:
        """Number of rows of each scan."""
        return self.offsets.diff()

    def batch(self, chosen: Int64[Tensor, " b"], *, device: torch.device) -> Batch:
        """Gather scans by their index.

        Args:
            chosen: Indices of scans, on the CPU; repeats are fine.
            device: Where the batch goes.
        """
        places, layout = arrange(self.offsets[chosen], self.offsets[chosen + 1])
        gathered = self.rows.index_select(0, places.to(self.rows.device, non_blocking=True))
        return Batch(x=gathered.to(device, non_blocking=True), layout=_on(layout, device))


def arrange(
    starts: Int64[Tensor, " b"], ends: Int64[Tensor, " b"]
) -> tuple[Int64[Tensor, " r"], Layout]:
    """Lay scans out in blocks.

    Args:
        starts: First row of each scan.
        ends: Row after the last one.

    Returns:
        The row that each row of the batch is a copy of, and the layout.
    """
    counts = ends - starts
    longest_first = torch.argsort(counts, descending=True, stable=True)
    sizes = counts[longest_first]
    places, valid, blocks = [], [], []
    for first, last in _cuts(sizes.numpy()):
        members = longest_first[first:last]
        steps = torch.arange(int(sizes[first]))
        inside = steps < counts[members].unsqueeze(1)
        places.append((starts[members].unsqueeze(1) + torch.where(inside, steps, 0)).flatten())
        valid.append(inside.flatten())
        blocks.append((last - first, len(steps)))
    mask = torch.cat(valid)
    order = torch.argsort(longest_first)
    layout = Layout(blocks=tuple(blocks), valid=None if bool(mask.all()) else mask, order=order)
    return torch.cat(places), layout


def _cuts(sizes: Int64[np.ndarray, " b"]) -> list[tuple[int, int]]:
    """Ranges of falling sizes, each as long as padding to its first one wastes at most a tenth."""
    cuts, first = [], 0
    while first < len(sizes):
        used = np.cumsum(sizes[first:])
        padded = sizes[first] * np.arange(1, len(used) + 1)
        wasteful = used < (1 - MAX_PADDING) * padded
        length = int(wasteful.argmax()) if wasteful.any() else len(used)
        cuts.append((first, first + length))
        first += length
    return cuts


def _on(layout: Layout, device: torch.device) -> Layout:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return Layout(blocks=layout.blocks, valid=moved(layout.valid), order=moved(layout.order))
