"""Export: from a feature store, to a file or folder that other tools read.

    parquet     one file, a line a slice: ids, view, slice, position_mm, a list of float32 a token
    npy         a folder: <token>.npy and position_mm.npy (rows, …), scans.parquet with row_start
    h5          one file: the same arrays, and of each scan ids, view and its range in `offsets`
    hf-dataset  a folder that `datasets.load_from_disk` opens, with the columns of parquet

Scans with status ok are written, in the order of the table, without the gaps of the plan; each is
compared with its digest on the way. One shard at a time is in memory. What is written has its name
only when it is whole.

Axes: r rows (slices of many scans, packed), d embedding.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64, Shaped

from ctfm.store.embeddings import decode
from ctfm.store.errors import ConfigError, StoreError
from ctfm.store.extras import optional
from ctfm.store.features import FeatureStore
from ctfm.store.files import partial_path, publish_table, remove_leftovers, sync, writing
from ctfm.store.layout import ON_DISK, POSITION
from ctfm.store.plan import shard_slices
from ctfm.store.provenance import canonical_json

IDS = ("scan_id", "study_id", "patient_id", "view")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Scans of one shard that are ok."""

    lines: pa.Table
    arrays: Mapping[str, Shaped[np.ndarray, "r ..."]]
    """Tokens (bfloat16 as float32, which NumPy has) and positions, packed."""

    @property
    def counts(self) -> Sequence[int]:
        """Rows of each scan."""
        counts: list[int] = self.lines["n_rows"].to_pylist()
        return counts


def export_store(
    store: FeatureStore,
    out: Path,
    *,
    to: str,
    progress: Callable[[int], None] = lambda n_scans: None,
) -> int:
    """Write the rows of a store in another format.

    Args:
        store: Finished; scans that failed are left out.
        out: File or folder, which does not exist.
        to: parquet, npy, h5 or hf-dataset.
        progress: Told the scans of every shard that is written.

    Returns:
        How many rows it has.

    Raises:
        ConfigError: If the format is unknown, or needs a package that is not installed.
        StoreError: If the store is unfinished, damaged or without any row, or `out` exists or
            cannot be written.
    """
    if to not in _WRITERS:
        raise ConfigError(f"format must be one of {', '.join(_WRITERS)}, got {to!r}")
    if out.exists():
        raise StoreError(f"{out} exists: choose another name, or remove it")
    scans = store.finished_scans()
    if scans.num_rows == 0:
        raise StoreError(f"{store.path} has no scan with embeddings: there is nothing to export")
    pieces = _pieces(store, scans, progress)
    with _published(out) as partial:
        _WRITERS[to](store, scans, partial, pieces=pieces)
    return _n_rows(scans)


def _pieces(
    store: FeatureStore, scans: pa.Table, progress: Callable[[int], None]
) -> Iterator[_Piece]:
    for own in shard_slices(scans).values():
        lines = scans[own]
        kept = store.checked_rows(lines)
        arrays = {name: np.concatenate([rows[name] for rows in kept]) for name in kept[0]}
        if store.dtype == "bfloat16":
            arrays |= {name: decode(arrays[name], dtype=store.dtype) for name in store.tokens}
        yield _Piece(lines=lines, arrays=arrays)
        progress(lines.num_rows)


def _to_parquet(
    store: FeatureStore, scans: pa.Table, path: Path, *, pieces: Iterator[_Piece]
) -> None:
    # float32 whatever the store holds: not every reader of Parquet knows half precision.
    schema = pa.schema(
        [
            *(scans.schema.field(name) for name in IDS),
            pa.field("slice", pa.int32(), nullable=False),
            pa.field(POSITION, pa.float32(), nullable=False),
            *(pa.field(name, pa.list_(pa.float32(), d)) for name, d in store.tokens.items()),
        ],
        metadata={"ctfm": canonical_json(_about(store))},
    )
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=list(IDS)) as file:
        for piece in pieces:
            file.write_table(_slice_lines(piece, schema))


def _slice_lines(piece: _Piece, schema: pa.Schema) -> pa.Table:
    """A line a slice."""
    counts = piece.counts
    columns: dict[str, Any] = {
        name: piece.lines[name].take(pa.array(np.repeat(np.arange(len(counts)), counts)))
        for name in IDS
    }
    columns["slice"] = pa.array(np.concatenate([np.arange(n, dtype=np.int32) for n in counts]))
    for name, rows in piece.arrays.items():
        flat = pa.array(np.asarray(rows, dtype=np.float32).ravel())
        columns[name] = (
            flat if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
        )
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _to_npy(store: FeatureStore, scans: pa.Table, path: Path, *, pieces: Iterator[_Piece]) -> None:
    path.mkdir()
    with ExitStack() as stack:
        files = {}
        for name, (shape, dtype) in _arrays(store, scans).items():
            files[name] = stack.enter_context(open(path / f"{name}.npy", "wb"))
            about = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(files[name], about)
        for piece in pieces:
            for name, rows in piece.arrays.items():
                files[name].write(np.ascontiguousarray(rows).data)
    columns = {name: scans[name] for name in IDS}
    starts = pa.array(_offsets(scans)[:-1])
    index = pa.table({**columns, "row_start": starts, "n_rows": scans["n_rows"]})
    about_store = {"ctfm": canonical_json(_about(store))}
    publish_table(path / "scans.parquet", index.replace_schema_metadata(about_store))


def _to_h5(store: FeatureStore, scans: pa.Table, path: Path, *, pieces: Iterator[_Piece]) -> None:
    h5py = optional("h5py", extra="h5", what="an export to h5")
    with h5py.File(path, "w") as file:
        file.attrs["ctfm"] = canonical_json(_about(store))
        for name in IDS:
            values = scans[name].to_pylist()
            file.create_dataset(
                name,
                (len(values),),
                dtype=np.int32 if name == "view" else h5py.string_dtype(),
                data=values,
            )
        file["offsets"] = _offsets(scans)
        for name, (shape, dtype) in _arrays(store, scans).items():
            file.create_dataset(name, shape, dtype=dtype)
        start = 0
        for piece in pieces:
            stop = start + sum(piece.counts)
            for name, rows in piece.arrays.items():
                file[name][start:stop] = rows
            start = stop


def _to_hf(store: FeatureStore, scans: pa.Table, path: Path, *, pieces: Iterator[_Piece]) -> None:
    datasets = optional("datasets", extra="hf-dataset", what="an export to hf-dataset")
    datasets.disable_progress_bars()
    work = path / "work"
    work.mkdir(parents=True)
    _to_parquet(store, scans, work / "rows.parquet", pieces=pieces)
    rows = datasets.Dataset.from_parquet(str(work / "rows.parquet"), cache_dir=str(work / "cache"))
    rows.save_to_disk(path)
    shutil.rmtree(work)


_WRITERS = {"parquet": _to_parquet, "npy": _to_npy, "h5": _to_h5, "hf-dataset": _to_hf}


def _arrays(store: FeatureStore, scans: pa.Table) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every array that is written."""
    n_rows = _n_rows(scans)
    dtype = "<f4" if store.dtype == "bfloat16" else ON_DISK[store.dtype]
    shapes = {name: ((n_rows, d), dtype) for name, d in store.tokens.items()}
    return {**shapes, POSITION: ((n_rows,), "<f4")}


def _n_rows(scans: pa.Table) -> int:
    return int(pc.sum(scans["n_rows"]).as_py() or 0)


def _offsets(scans: pa.Table) -> Int64[np.ndarray, " b1"]:
    """Scan i has the rows from the i-th to the next."""
    counts = scans["n_rows"].to_numpy().astype(np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _about(store: FeatureStore) -> dict[str, Any]:
    return {"fingerprint": store.fingerprint, "settings": store.settings, "dtype": store.dtype}


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A name to write to, which becomes `out` when the body is done."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out.parent, name=out.name)
        partial = partial_path(out)
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            partial.rename(out)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
        sync(out.parent)
