"""The layout: from what a row of a store means, to the `zarr.json` files of its group, and back.

`attributes["ctfm"]` of the group says what a row means (`StoreHeader`), and each `zarr.json` has a
seal among its attributes. The same layout gives the same files, so a damaged one is made again.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from ctfm.store.errors import StoreError
from ctfm.store.places import Place
from ctfm.store.provenance import canonical_json, digest
from ctfm.store.seals import OPEN_SEAL, is_sealed, seal
from ctfm.store.strict_arrays import our_zarr

FORMAT_VERSION = 2
"""Of the feature store; raised when an older ctfm would misread a newer store."""

GROUP = "embeddings.zarr"
"""Name of the Zarr group in the folder of a store."""

POSITION = "position_mm"
"""Name of the array of slice positions, along z in the reference frame."""

StoredDtype = Literal["float16", "bfloat16", "float32"]

# Little-endian whatever the machine, so that digests of the bytes agree everywhere.
ON_DISK = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}


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
        return max(self.tokens.values()) * np.dtype(ON_DISK[self.dtype]).itemsize

    def to_attributes(self) -> dict[str, Any]:
        """As it is written to the group."""
        return {**self.meaning, "fingerprint": self.fingerprint}

    @classmethod
    def from_attributes(cls, about: Mapping[str, Any]) -> "StoreHeader":
        """As it is read from a group.

        Raises:
            StoreError: If a ctfm of another format wrote it, or its fingerprint is not its own.
        """
        if (version := about.get("format")) != FORMAT_VERSION:
            older = isinstance(version, int) and version < FORMAT_VERSION
            raise StoreError(
                f"it has format {version}, this ctfm reads format {FORMAT_VERSION}: "
                f"{'extract to a new store, or use' if older else 'use'} the ctfm that wrote it"
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


@dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """What all rows of a store share: enough to write the metadata of its Zarr group."""

    header: StoreHeader
    chunk_rows: int
    """Rows of a chunk."""
    compress: bool
    """Zstandard before the checksum; otherwise the bytes as they are."""

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays."""
        return [*self.header.tokens, POSITION]

    def to_json(self) -> dict[str, Any]:
        """As it is written beside every plan."""
        return {
            "header": self.header.to_attributes(),
            "chunk_rows": self.chunk_rows,
            "compress": self.compress,
        }

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> "StoreLayout":
        """As it is read.

        Raises:
            StoreError: If it was written by a newer ctfm, or does not fit its own fingerprint.
        """
        header = StoreHeader.from_attributes(about["header"])
        return cls(header=header, chunk_rows=about["chunk_rows"], compress=about["compress"])


def metadata_files(layout: StoreLayout, *, n_rows: int) -> dict[str, bytes]:
    """Every `zarr.json` of a store by name, that of the group last.

    Args:
        layout: Of the store.
        n_rows: Rows of every array, whole chunks.
    """
    made: dict[str, Buffer] = {}
    with our_zarr():
        _make_arrays(zarr.open_group(MemoryStore(made), mode="w-", zarr_format=3), layout, n_rows)
    files = [f"{name}/zarr.json" for name in layout.arrays] + ["zarr.json"]
    return {f"{GROUP}/{file}": _sealed(json.loads(made[file].to_bytes())) for file in files}


def _make_arrays(group: zarr.Group, layout: StoreLayout, n_rows: int) -> None:
    group.attrs["ctfm"] = layout.header.to_attributes()
    header = layout.header
    widths: dict[str, tuple[int, ...]] = {name: (d,) for name, d in header.tokens.items()}
    for name, width in {**widths, POSITION: ()}.items():
        group.create_array(
            name,
            shape=(n_rows, *width),
            chunks=(layout.chunk_rows, *width),
            dtype=ON_DISK["float32" if name == POSITION else header.dtype],
            compressors=[ZstdCodec(level=3), Crc32cCodec()] if layout.compress else [Crc32cCodec()],
            filters=None,
            fill_value=0,
            # One folder an array: with the default "/" every chunk would have its own.
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=_dimension_names(name),
            attributes={"dtype": header.dtype} if name != POSITION else {"unit": "mm"},
        )


def read_metadata(place: Place, name: str = "") -> dict[str, Any]:
    """The `zarr.json` of an array, or of the group.

    Raises:
        StoreError: If it is not, to the bit, what was published.
    """
    file = metadata_name(name)
    content = place.read(file)
    if not is_sealed(content):
        raise StoreError(
            f"{place.path}/{file} was changed or is damaged: `ctfm store verify --repair` writes "
            "it anew"
        )
    metadata: dict[str, Any] = json.loads(content)
    return metadata


def metadata_name(name: str = "") -> str:
    """File of the metadata of an array, or of the group."""
    return f"{GROUP}/{name}/zarr.json" if name else f"{GROUP}/zarr.json"


def read_header(place: Place) -> StoreHeader:
    """What the rows of a store mean.

    Raises:
        StoreError: If its group is none of ours, or damaged.
    """
    where = f"{place.path}/{GROUP}"
    content = place.read(metadata_name())
    try:
        return StoreHeader.from_attributes(json.loads(content)["attributes"]["ctfm"])
    except StoreError as error:
        raise StoreError(f"cannot use {where}: {error}") from error
    except Exception as error:
        raise StoreError(
            f"{where} cannot be read as a feature store ({type(error).__name__}: {error}): "
            "`ctfm store verify --repair` writes its zarr.json anew"
        ) from error


def grow(place: Place, *, names: Sequence[str], n_rows: int) -> None:
    """Give every array at least `n_rows` rows; rows that exist stay as they are."""
    for name in names:
        metadata = read_metadata(place, name)
        if metadata["shape"][0] < n_rows:
            metadata["shape"][0] = n_rows
            # Stores of ctfm before 0.2 have none; xarray cannot open an array without.
            metadata["dimension_names"] = _dimension_names(name)
            place.publish(metadata_name(name), _sealed(metadata))


def _dimension_names(name: str) -> list[str]:
    """Zarr v3's `dimension_names` of an array: tokens may differ in width, rows are shared."""
    return ["row"] if name == POSITION else ["row", f"{name}_width"]


def _sealed(metadata: Mapping[str, Any]) -> bytes:
    attributes = {**metadata.get("attributes", {}), "seal": OPEN_SEAL}
    return seal(json.dumps({**metadata, "attributes": attributes}, indent=2).encode())


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
