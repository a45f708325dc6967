"""Voxels: from what a header claims and what a file holds, to an array of that shape.

A claim that the file cannot keep is refused before memory is taken for it, and unpacking ends where
the claim does, so that a small file costs no more than a small multiple of itself.

Axes: as in the file, the fastest first.
"""

import math
from io import BufferedIOBase

import numpy as np
from isal import igzip, isal_zlib
from jaxtyping import Shaped

from ctfm.extract.sources import is_hostile_ratio
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_VOXELS = 1 << 29
"""Of a scan: 2,000 slices of 512 x 512, or 500 of 1024 x 1024."""
_DEFLATE_RATIO = 1032
"""The most that deflate packs."""


def check_claim(claimed_bytes: int, held_bytes: int, *, packed: bool) -> None:
    """Refuse a file that cannot hold the voxels that its header claims.

    Args:
        claimed_bytes: Of the voxels.
        held_bytes: Of the file from the first voxel on.
        packed: Whether they are deflated.

    Raises:
        ScanError: `UNREADABLE`.
    """
    if claimed_bytes > held_bytes * (_DEFLATE_RATIO if packed else 1):
        raise ScanError(Reason.UNREADABLE, "the file ends before its voxels do")
    if packed and is_hostile_ratio(claimed_bytes, held_bytes):
        detail = "unpacks to so much that the file looks hostile: unpack it first"
        raise ScanError(Reason.UNREADABLE, detail)


def read_voxels(
    stream: BufferedIOBase, shape: tuple[int, ...], dtype: np.dtype, *, packed: bool
) -> Shaped[np.ndarray, "..."]:
    """Read voxels from where a stream stands.

    Raises:
        EOFError: If it ends too early.
        isal_zlib.error: If it is damaged; `gzip.BadGzipFile`, too.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    content = _unpacked(stream, n_bytes) if packed else stream.read(n_bytes)
    if len(content) < n_bytes:
        raise EOFError("the file ends before its voxels do")
    return np.frombuffer(content, dtype).reshape(shape, order="F")


def _unpacked(stream: BufferedIOBase, n_bytes: int) -> bytes:
    magic = stream.read(2)
    stream.seek(-len(magic), 1)
    if magic == b"\x1f\x8b":
        with igzip.IGzipFile(fileobj=stream) as unpacked:
            return bytes(unpacked.read(n_bytes))
    return isal_zlib.decompressobj().decompress(stream.read(), n_bytes)
