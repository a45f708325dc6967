"""Voxels: from what a header claims and what a file holds, to an array of that shape.

A claim that the file cannot keep is refused before memory is taken for it, and unpacking ends where
the claim does, so that a small file costs no more than a small multiple of itself.

Values of 16 bits may have lost their sign on the way, in DICOM and in every other format. Where it
is certain it is given back (`negative_values`); where a few values alone lie beyond 16 bits, they
are padding (63536 for -2000); else nobody knows what they are.

Axes: as in the file, the fastest first.
"""

import math
from collections.abc import Callable
from functools import partial
from io import BufferedIOBase

import numpy as np
from isal import isal_zlib
from jaxtyping import Bool, Float, Int16, Integer, Shaped

from ctfm.extract.sources import is_hostile_ratio
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_VOXELS = 1 << 29
"""A scan has no more: 2,000 slices of 512 x 512, or 500 of 1024 x 1024."""
PADDING_HU = -1024
"""What becomes of values that are no HU of anything."""
MAX_PADDING_VALUES = 2
"""Beyond 16 bits, that would be tissue if they had a sign; more of them are no padding."""
TISSUE_HU = (-900.0, 3071.0)
"""Padding inside this range is not told apart from what was scanned."""
AIR_HU = (-1100.0, -800.0)
NO_AIR_HU = -200.0
MIN_AIR_SHARE = 0.05
"""A scan of a head has 30% to 60% where the field of view holds it, 10% in a narrow one."""
MAX_METAL_SHARE = 0.01
GZIP_MAGIC = b"\x1f\x8b"
SIGNS_WERE_LOST = "tissue whose sign was lost where they were written"
_PERIOD = 1 << 16
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


def negative_values(
    counts: Integer[np.ndarray, " values"], signed_hu: Float[np.ndarray, " values"]
) -> Bool[np.ndarray, " values"] | None:
    """Which values are negative though all are stored without a sign, where nothing else is air.

    Air is in every scan of a head. Where nothing is air as long as the values have no sign, and
    with their highest bit as a sign much is, they have one. What then lies below air is one value
    of padding; the little else is metal, whose values reach into that bit. A picture with inverted
    grey levels, or air clipped to 0 beside metal, is not so.

    Args:
        counts: How often each value that the bits can hold occurs.
        signed_hu: What each would be if its highest bit were a sign.

    Returns:
        None if none is, as far as can be told.
    """
    n, has_bit = counts.sum(), np.arange(len(counts)) >= len(counts) // 2
    air = has_bit & (signed_hu >= AIR_HU[0]) & (signed_hu <= AIR_HU[1])
    below = np.where(has_bit & (signed_hu < AIR_HU[0]), counts, 0)
    padding = (below == below.max()) & (below > MAX_METAL_SHARE * n)
    if counts[air].sum() < MIN_AIR_SHARE * n or below[~padding].sum() > MAX_METAL_SHARE * n:
        return None
    # No metal reaches into the sixteenth bit.
    negative: Bool[np.ndarray, " values"] = has_bit & (
        (signed_hu >= AIR_HU[0]) | padding | (len(counts) == 1 << 16)
    )
    return negative


def to_hu(
    values: Shaped[np.ndarray, "x y z"], *, rescale: tuple[np.float32, np.float32] | None = None
) -> Int16[np.ndarray, "x y z"]:
    """Rescale stored values, slice by slice, as copies in between would be larger than the volume.

    Args:
        values: As stored; integers or reals.
        rescale: Slope and intercept; None where the values are HU.

    Raises:
        ScanError: `NOT_FINITE`, or `NOT_HU` where tissue may have lost its sign.
    """
    if values.dtype == np.int16 and rescale is None:
        return values
    slope, intercept = rescale or (np.float32(1), np.float32(0))
    has_signs = _lost_signs(values, slope=float(slope), intercept=float(intercept))
    hu = np.empty(values.shape, np.int16, order="F")
    limits = np.iinfo(np.int16)
    tissue_hu: set[float] = set()
    for k in range(values.shape[2]):
        image = _with_signs(values[:, :, k]) if has_signs else values[:, :, k]
        image = _whole(image if rescale is None else image * slope + intercept)
        hu[:, :, k] = image.clip(limits.min, limits.max)
        beyond = image > limits.max
        hu[:, :, k][beyond] = PADDING_HU
        if beyond.any() and len(tissue_hu) <= MAX_PADDING_VALUES:
            found = np.unique(image[beyond]).astype(float)
            tissue_hu.update(found[found - _PERIOD * float(slope) > TISSUE_HU[0]].tolist())
    if len(tissue_hu) > MAX_PADDING_VALUES:
        raise ScanError(
            Reason.NOT_HU, f"many values above {limits.max} HU: {SIGNS_WERE_LOST}, or another unit"
        )
    return hu


def _whole(image: Shaped[np.ndarray, "x y"]) -> Shaped[np.ndarray, "x y"]:
    if image.dtype.kind != "f":
        return image
    if not np.isfinite(image).all():
        raise ScanError(Reason.NOT_FINITE, "NaN or infinite voxels")
    return np.asarray(np.rint(image))


def _lost_signs(values: Shaped[np.ndarray, "x y z"], *, slope: float, intercept: float) -> bool:
    """Whether all values are from 0 to 65535, and those above 32767 are certainly negative."""
    if values.dtype.kind == "i" and values.dtype.itemsize <= 2:
        return False
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and _PERIOD // 2 <= high < _PERIOD) or low * slope + intercept < NO_AIR_HU:
        return False
    counts = np.zeros(_PERIOD, np.int64)
    for k in range(values.shape[2]):
        counts += np.bincount(values[:, :, k].ravel().astype(np.intp), minlength=_PERIOD)
    signed_hu = (np.arange(_PERIOD) - _PERIOD) * slope + intercept
    return negative_values(counts, signed_hu) is not None


def _with_signs(image: Shaped[np.ndarray, "x y"]) -> Shaped[np.ndarray, "x y"]:
    # A real is exact up to 2²⁴ in 32 bits.
    real = image.astype(np.float32)
    return np.asarray(np.where(real >= _PERIOD // 2, real - _PERIOD, real))
