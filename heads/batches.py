"""Batches: packed rows of many scans, to padded batches of some of them.

A feature store hands over the rows of all scans in one tensor (`FeatureStore.load`). It stays
where it is; a batch gathers the rows of its scans, padded to the longest scan of that batch. Only
two index vectors are made per batch, on the device of the rows, without waiting for it.

Axes: r rows (slices of all scans, packed), n scans, b scans of a batch, s slices, d embedding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ctfm.store.errors import StoreError


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedScans:
    """The embeddings of many scans, as `FeatureStore.load` packs them.

    Raises:
        StoreError: If a scan has no rows; there is nothing to pool in it.
    """

    rows: Float[Tensor, "r d"]
    """Slice embeddings, scan after scan."""

    offsets: Int64[Tensor, " n1"]
    """Scan i has `rows[offsets[i] : offsets[i + 1]]`; on the CPU, which decides the padding."""

    def __post_init__(self) -> None:
        if empty := int((self.counts < 1).sum()):
            raise StoreError(
                f"{empty} of {len(self)} scans have no rows: ask for scans that are ok"
            )

    def __len__(self) -> int:
        """Number of scans."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> Int64[Tensor, " n"]:
        """Number of rows of each scan."""
        return self.offsets.diff()

    def batch(
        self, chosen: Int64[Tensor, " b"], *, device: torch.device
    ) -> tuple[Float[Tensor, "b s d"], Bool[Tensor, "b s"]]:
        """Gather scans by their index.

        Args:
            chosen: Indices of scans, on the CPU; repeats are fine.
            device: Where the batch goes.

        Returns:
            x, padded to the longest chosen scan with copies of each scan's first row, and the mask
            that is True at slices and False at padding.
        """
        home = self.rows.device
        starts, ends = self.offsets[chosen], self.offsets[chosen + 1]
        steps = torch.arange(int((ends - starts).max()))
        places = starts.unsqueeze(1) + steps
        valid = places < ends.unsqueeze(1)
        places = torch.where(valid, places, starts.unsqueeze(1))
        gathered = self.rows.index_select(0, places.flatten().to(home, non_blocking=True))
        x = gathered.view(*places.shape, -1)
        return x.to(device, non_blocking=True), valid.to(device, non_blocking=True)
