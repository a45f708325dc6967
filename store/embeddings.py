"""Embeddings on disk: from rows in float32, to chunks of the arrays of a Zarr group, and back.

`<token>` (rows, d) and `position_mm` (rows,), all with the same rows in a chunk and CRC-32C behind
each chunk, are all there is. bfloat16, which Zarr does not know, is kept as its bits in uint16.
Which rows belong to which scan is not known here.

Axes: r rows (slices of many scans), d embedding.
"""

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Literal

import numpy as np
import zarr
from jaxtyping import Float32, Int64, Shaped

from ctfm.store.errors import PlaceError, StoreError
from ctfm.store.layout import GROUP, ON_DISK, StoredDtype
from ctfm.store.places import Place
from ctfm.store.strict_arrays import our_zarr

PIECE_BYTES = 16 * 1024 * 1024
"""A bulk read goes in pieces of this size: larger ones cost page faults, smaller ones overhead."""


def open_array(place: Place, name: str, *, mode: Literal["r", "r+"] = "r") -> zarr.Array:
    """One array of a store, set up for speed.

    Raises:
        StoreError: If its metadata cannot be read.
    """
    try:
        with our_zarr(), place.reading():
            return zarr.open_array(place.arrays(GROUP), path=name, mode=mode, zarr_format=3)
    except PlaceError:
        raise
    except Exception as error:
        raise StoreError(
            f"{place.path}/{GROUP}/{name} cannot be read as a Zarr array ({type(error).__name__}: "
            f"{error}): `ctfm store verify --repair` writes its zarr.json anew"
        ) from error


def write_chunks(
    place: Place, name: str, block: Shaped[np.ndarray, "r ..."], *, start: int
) -> None:
    """Write whole chunks and wait until they are on the disk.

    Args:
        place: Of the store.
        name: Of the array.
        block: Rows as they are kept, whole chunks of them.
        start: First row, at a chunk boundary.
    """
    array = open_array(place, name, mode="r+")
    chunk_rows, stop = array.chunks[0], start + len(block)
    with our_zarr():
        array[start:stop] = block
    chunks = range(start // chunk_rows, stop // chunk_rows)
    place.sync(f"{GROUP}/{name}/{chunk_name(chunk, ndim=array.ndim)}" for chunk in chunks)


def chunk_name(chunk: int, *, ndim: int) -> str:
    """File of a chunk of rows in the folder of its array."""
    return f"c.{chunk}" + ".0" * (ndim - 1)


def needed_chunks(
    array: zarr.Array, starts: Int64[np.ndarray, " b"], *, counts: Int64[np.ndarray, " b"]
) -> list[str]:
    """Files of the chunks that hold rows of some scans; arguments as `read_rows`."""
    size = array.chunks[0]
    first, last = starts // size, (starts + counts - 1) // size
    ranges = (range(low, high + 1) for low, high in zip(first, last, strict=True))
    return [chunk_name(int(chunk), ndim=array.ndim) for chunk in {*chain.from_iterable(ranges)}]


def read_rows(
    array: zarr.Array, starts: Int64[np.ndarray, " b"], *, counts: Int64[np.ndarray, " b"]
) -> Shaped[np.ndarray, "r ..."]:
    """Read the rows of many scans at once, packed in the order asked for.

    Every chunk that holds a wanted row is read once, in the order of the disk.

    Args:
        array: Of a token, or the positions.
        starts: First row of each scan. Two scans are the same or do not overlap.
        counts: Rows of each scan, at least 1.
    """
    packed = np.empty((int(counts.sum()), *array.shape[1:]), dtype=array.dtype)
    order = np.argsort(starts, kind="stable")
    goes_to = (np.cumsum(counts) - counts)[order]
    starts, stops = starts[order], (starts + counts)[order]
    for low, high in _pieces(starts, stops, array=array):
        piece = array[low:high]
        first, last = np.searchsorted(stops, low, "right"), np.searchsorted(starts, high, "left")
        for i in range(int(first), int(last)):
            begin, end = max(int(starts[i]), low), min(int(stops[i]), high)
            to = int(goes_to[i]) + begin - int(starts[i])
            packed[to : to + end - begin] = piece[begin - low : end - low]
    return packed


def encode(rows: Float32[np.ndarray, "r d"], *, dtype: StoredDtype) -> Shaped[np.ndarray, "r d"]:
    """Rows as they are kept: rounded to nearest, ties to even; too large a number is infinite."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(rows, dtype="<f4").view("<u4")
        odd = (bits >> 16) & 1
        return np.asarray((bits + 0x7FFF + odd) >> 16, dtype="<u2")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows, dtype=ON_DISK[dtype])


def decode(kept: Shaped[np.ndarray, "r d"], *, dtype: StoredDtype) -> Float32[np.ndarray, "r d"]:
    """Rows in float32, exactly as they are kept."""
    if dtype == "bfloat16":
        return (kept.astype("<u4") << 16).view("<f4")
    return kept.astype("<f4")


def all_finite(kept: Shaped[np.ndarray, "r ..."]) -> bool:
    """Whether rows, as they are kept, hold no NaN and no infinity."""
    if kept.dtype == np.uint16:
        return bool(np.all((kept & 0x7F80) != 0x7F80))
    return bool(np.isfinite(kept).all())


def _pieces(
    starts: Int64[np.ndarray, " b"], stops: Int64[np.ndarray, " b"], *, array: zarr.Array
) -> Iterator[tuple[int, int]]:
    """Row ranges of whole chunks that cover what is wanted, at most `PIECE_BYTES` each."""
    if len(starts) == 0:
        return
    chunk_rows = array.chunks[0]
    edges = np.zeros(int(stops.max() - 1) // chunk_rows + 2, dtype=np.int64)
    np.add.at(edges, starts // chunk_rows, 1)
    np.add.at(edges, (stops - 1) // chunk_rows + 1, -1)
    wanted = np.flatnonzero(np.cumsum(edges))
    chunk_bytes = int(np.prod(array.chunks)) * array.dtype.itemsize
    most = max(1, PIECE_BYTES // chunk_bytes)
    for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
        for first in range(int(run[0]), int(run[-1]) + 1, most):
            last = min(first + most, int(run[-1]) + 1)
            yield first * chunk_rows, min(last * chunk_rows, array.shape[0])


def read_packed(
    place: Place, name: str, starts: Int64[np.ndarray, " b"], *, counts: Int64[np.ndarray, " b"]
) -> Shaped[np.ndarray, "r ..."]:
    """The rows of some scans of an array in one, one scan after the other.

    Args:
        place: Of the store.
        name: Of the array.
        starts: First row of each scan.
        counts: Rows of each scan.

    Raises:
        StoreError: If a chunk that is needed is gone or damaged.
    """
    array = open_array(place, name)
    try:
        with place.reading():
            return read_rows(array, starts, counts=counts)
    except FileNotFoundError:
        raise _missing_chunks(place, name, needed_chunks(array, starts, counts=counts)) from None
    except PlaceError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise StoreError(
            f"{place.path}/{GROUP}/{name} is damaged ({error}): `ctfm store verify` names the "
            "scans that are touched"
        ) from error


def _missing_chunks(place: Place, name: str, needed: Collection[str]) -> StoreError:
    """What to say where one of these chunks could not be found."""
    missing = sorted(set(needed) - set(place.names(f"{GROUP}/{name}")))
    if not missing:  # there again: a file system that comes and goes, or a copy under way
        return StoreError(
            f"a chunk of {place.path}/{GROUP}/{name} could not be found for a moment: is the "
            "store being copied, or the disk busy? Run the same command again"
        )
    return StoreError(
        f"{place.path}/{GROUP}/{name} lacks {len(missing)} of the {len(needed)} chunks that "
        f"are asked for, e.g. {missing[0]}: copy the store again, or see `ctfm store "
        "verify --repair`"
    )
