"""Voxels: from what a header claims and what a file holds, to an array of that shape.

A claim that the file cannot keep is refused before memory is taken for it, and unpacking ends where
the claim does, so that a small file costs no more than a small multiple of itself.

Axes: as in the file, the fastest first.
"""

import math
from collections.abc import Callable
from functools import partial
from io import BufferedIOBase

import numpy as np
from isal import isal_zlib
from jaxtyping import Shaped

from ctfm.extract.sources import is_hostile_ratio
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_VOXELS = 1 << 29
"""Of a scan: 2,000 slices of 512 x 512, or 500 of 1024 x 1024."""
PADDING_HU = -1024
"""What becomes of values that are no HU of anything."""
GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 18
_LEAST_BYTES = 1 << 12
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
    stream: BufferedIOBase,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    packed: bool,
    skip_bytes: int = 0,
) -> Shaped[np.ndarray, "..."]:
    """Read voxels from where a stream stands.

    Args:
        stream: The file.
        shape: How many there are along each axis.
        dtype: Of one.
        packed: Whether they are deflated.
        skip_bytes: Unpacked bytes before the first of them.

    Raises:
        EOFError: If it ends too early.
        isal_zlib.error: If it is damaged.
    """
    n_bytes = skip_bytes + math.prod(shape) * dtype.itemsize
    content = unpack(stream, n_bytes) if packed else stream.read(n_bytes)
    if len(content) < n_bytes:
        raise EOFError("the file ends before its voxels do")
    return np.frombuffer(content, dtype, offset=skip_bytes).reshape(shape, order="F")


def unpack(stream: BufferedIOBase, n_bytes: int) -> bytearray:
    """Unpack the first bytes of what was deflated, with or without a gzip header.

    A gzip file may have several members, with zeros between them (RFC 1952, and gzip itself). What
    follows the last byte that is asked for is not looked at, but for the checksum of its member.

    Returns:
        `n_bytes`, or fewer where there are no more.

    Raises:
        EOFError: If it ends within a member.
        isal_zlib.error: If it is damaged.
    """
    read = partial(stream.read, min(_CHUNK_BYTES, max(_LEAST_BYTES, n_bytes)))
    content = bytearray()
    packed = b""
    while len(content) < n_bytes and (packed := packed or read()):
        packed = packed.lstrip(b"\0")
        if packed:
            packed = _unpack_member(packed, read, content, n_bytes=n_bytes)
    del content[n_bytes:]
    return content


def _unpack_member(
    packed: bytes, read: Callable[[], bytes], content: bytearray, *, n_bytes: int
) -> bytes:
    """Add a member to the content, and return what was read beyond it."""
    member = isal_zlib.decompressobj(wbits=31 if packed.startswith(GZIP_MAGIC) else 15)
    # One byte more than is asked for, so that the checksum behind the last one is compared.
    while not member.eof and (wanted := n_bytes + 1 - len(content)) > 0:
        packed = packed or read()
        if not packed:
            raise EOFError("the file ends before its voxels do")
        content += member.decompress(packed, wanted)
        packed = member.unused_data if member.eof else member.unconsumed_tail
    return packed
