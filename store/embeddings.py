"""Embeddings on disk: from rows in float32, to the arrays of a plain Zarr v3 group, and back.

`<token>` (rows, d) and `position_mm` (rows,), all with the same rows in a chunk and CRC-32C behind
each chunk, are all there is; `attributes["ctfm"]` says what a row means (`StoreHeader`). bfloat16,
which Zarr does not know, is kept as its bits in uint16. Which rows belong to which scan is not
known here.

Axes: r rows (slices of many scans), d embedding.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import zarr
import zarr.core.codec_pipeline
from jaxtyping import Float32, Int64, Shaped
from zarr.codecs import Crc32cCodec, ZstdCodec

from ctfm.store.errors import StoreError
from ctfm.store.files import sync
from ctfm.store.provenance import canonical_json, digest

FORMAT_VERSION = 1
"""Of the feature store; raised when an older ctfm would misread a newer store."""

GROUP = "embeddings.zarr"
"""Name of the Zarr group in the folder of a store."""

POSITION = "position_mm"
"""Name of the array of slice positions, along z in the reference frame."""

StoredDtype = Literal["float16", "bfloat16", "float32"]

PIECE_BYTES = 16 * 1024 * 1024
"""A bulk read goes in pieces of this size: larger ones cost page faults, smaller ones overhead."""

# Little-endian whatever the machine, so that digests of the bytes agree everywhere.
_ON_DISK = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
_FUSED_PIPELINE = "FusedCodecPipeline"  # zarr >= 3.3; zarr-python pull request 3885


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What a row of a store means: `attributes["ctfm"]` of its Zarr group."""

    settings: Mapping[str, Any]
    """Everything that decides the numbers: backbone, weights, adapter, preprocessing …"""

    tokens: Mapping[str, int]
    """Width d of each token."""

    dtype: StoredDtype
    """Type of the embeddings; `position_mm` is always float32."""

    def __post_init__(self) -> None:
        if self.dtype not in get_args(StoredDtype):
            raise StoreError(
                f"dtype must be one of {', '.join(get_args(StoredDtype))}, got {self.dtype}"
            )
        if not self.tokens:
            raise StoreError("a store needs at least one token, such as cls, got none")
        for name, width in self.tokens.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == POSITION or width < 1:
                raise StoreError(
                    f"a token has a lower-case name other than {POSITION} and at least one "
                    f"number, got {name}: {width}"
                )

    @property
    def meaning(self) -> dict[str, Any]:
        """What the fingerprint is the digest of."""
        return {
            "format": FORMAT_VERSION,
            "settings": dict(self.settings),
            "tokens": dict(self.tokens),
            "dtype": self.dtype,
        }

    @property
    def fingerprint(self) -> str:
        """Equal for two stores exactly when their rows can be mixed."""
        return digest(self.meaning)

    @property
    def row_bytes(self) -> int:
        """Of the widest token."""
        return max(self.tokens.values()) * np.dtype(_ON_DISK[self.dtype]).itemsize

    def to_attributes(self) -> dict[str, Any]:
        """As it is written to the group."""
        return {**self.meaning, "fingerprint": self.fingerprint}

    @classmethod
    def from_attributes(cls, about: Mapping[str, Any]) -> "StoreHeader":
        """As it is read from a group.

        Raises:
            StoreError: If it was written by a newer ctfm, or does not fit its own fingerprint.
        """
        if about.get("format") != FORMAT_VERSION:
            raise StoreError(
                f"it has format {about.get('format')}, this ctfm reads format {FORMAT_VERSION}: "
                "use the ctfm that wrote it, or a newer one"
            )
        header = cls(settings=about["settings"], tokens=about["tokens"], dtype=about["dtype"])
        if header.fingerprint != about.get("fingerprint"):
            raise StoreError(
                "its settings do not fit its fingerprint: zarr.json was changed or is damaged. "
                "Restore it, or extract again to a new store"
            )
        return header

    def differences(self, other: "StoreHeader") -> list[str]:
        """One phrase a setting that differs: `name: mine in the store, theirs now`."""
        mine, theirs = _flat(self.meaning), _flat(other.meaning)
        missing = object()
        return [
            f"{name}: {_shown(mine, name)} in the store, {_shown(theirs, name)} now"
            for name in sorted({*mine, *theirs})
            if mine.get(name, missing) != theirs.get(name, missing)
        ]


def create_group(
    path: Path, header: StoreHeader, *, n_rows: int, chunk_rows: int, compress: bool
) -> None:
    """Make the group and its arrays, without a single chunk.

    Args:
        path: The group's folder, which does not exist.
        header: Goes into the attributes.
        n_rows: Rows of every array, whole chunks.
        chunk_rows: Rows of a chunk.
        compress: Zstandard before the checksum; otherwise the bytes as they are.
    """
    group = zarr.open_group(path, mode="w-", zarr_format=3)
    group.attrs["ctfm"] = header.to_attributes()
    compressors = [ZstdCodec(level=3), Crc32cCodec()] if compress else [Crc32cCodec()]
    widths: dict[str, tuple[int, ...]] = {name: (d,) for name, d in header.tokens.items()}
    for name, width in {**widths, POSITION: ()}.items():
        group.create_array(
            name,
            shape=(n_rows, *width),
            chunks=(chunk_rows, *width),
            dtype=_ON_DISK["float32" if name == POSITION else header.dtype],
            compressors=compressors,
            filters=None,
            fill_value=0,
            # One folder an array: with the default "/" every chunk would have its own.
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes={"dtype": header.dtype} if name != POSITION else {"unit": "mm"},
        )


def read_header(path: Path) -> StoreHeader:
    """What the rows of a group mean.

    Raises:
        StoreError: If it is no group of ours, or damaged.
    """
    try:
        about = zarr.open_group(path, mode="r").attrs["ctfm"]
        return StoreHeader.from_attributes(about)
    except StoreError as error:
        raise StoreError(f"cannot use {path}: {error}") from error
    except Exception as error:
        raise StoreError(
            f"{path} cannot be read as a feature store ({type(error).__name__}: {error}): "
            "restore its zarr.json, or extract again to a new store"
        ) from error


def open_array(path: Path, name: str, *, mode: Literal["r", "r+"] = "r") -> zarr.Array:
    """One array of a group, set up for speed.

    Raises:
        StoreError: If its metadata cannot be read.
    """
    try:
        with _fast_zarr():
            return zarr.open_array(path / name, mode=mode, zarr_format=3)
    except Exception as error:
        raise StoreError(
            f"{path / name} cannot be read as a Zarr array ({type(error).__name__}: {error}): "
            "restore its zarr.json, or extract again to a new store"
        ) from error


def grow(path: Path, *, names: Sequence[str], n_rows: int) -> None:
    """Give every array at least `n_rows` rows; rows that exist stay as they are."""
    for name in names:
        array = open_array(path, name, mode="r+")
        if array.shape[0] < n_rows:
            array.resize((n_rows, *array.shape[1:]))
            sync(path / name / "zarr.json")
            sync(path / name)


def write_chunks(path: Path, name: str, block: Shaped[np.ndarray, "r ..."], *, start: int) -> None:
    """Write whole chunks and wait until they are on the disk.

    Args:
        path: The group.
        name: Of the array.
        block: Rows as they are kept, whole chunks of them.
        start: First row, at a chunk boundary.
    """
    array = open_array(path, name, mode="r+")
    chunk_rows = array.chunks[0]
    with _fast_zarr():
        array[start : start + len(block)] = block
    for chunk in range(start // chunk_rows, (start + len(block)) // chunk_rows):
        sync(path / name / chunk_name(chunk, ndim=array.ndim))
    sync(path / name)


def chunk_name(chunk: int, *, ndim: int) -> str:
    """File of a chunk of rows in the folder of its array."""
    return f"c.{chunk}" + ".0" * (ndim - 1)


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
        return np.ascontiguousarray(rows, dtype=_ON_DISK[dtype])


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


@contextlib.contextmanager
def _fast_zarr() -> Iterator[None]:
    """Zarr's settings for our arrays, in the one place that has them.

    The fused codec pipeline reads local chunks twice as fast; it is opt-in, and a pipeline that
    the user chose stays. Chunks of zeros are written like all others: a missing file is damage.
    """
    settings: dict[str, Any] = {"array.write_empty_chunks": True}
    chosen = str(zarr.config.get("codec_pipeline.path"))
    has_fused = hasattr(zarr.core.codec_pipeline, _FUSED_PIPELINE)
    if has_fused and chosen.endswith(".BatchedCodecPipeline"):
        settings["codec_pipeline.path"] = f"zarr.core.codec_pipeline.{_FUSED_PIPELINE}"
    with zarr.config.set(settings):
        yield


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names; the outer `settings` is not part of a name."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        path = "" if not prefix and name == "settings" else f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}." if path else "")
        else:
            flat[path] = canonical_json(value)
    return flat


def _shown(flat: Mapping[str, str], name: str) -> str:
    return flat.get(name, "not set")
