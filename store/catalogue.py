"""The scan catalogue: `scans.parquet`, one line a scan, and its private twin.

`scans.parquet` holds pseudonymous ids, geometry and reason codes: nothing in it names a patient,
and it may be shared. `scans.private.parquet`, written beside it with mode 600, holds what must
stay at the site: where each scan's files lie, a digest that tells them from others, and the key
that made the pseudonyms. Extraction needs both; a feature store takes over only the ids.

The two are one publication, which is the `rename` of the private table: it holds the lines of the
shared one, too. Whoever reads between the two renames, or after a writer died there, takes these
lines; of several writers at once, all leave both files of the one that was last. Each file says in
its metadata which publication it is of; the private one also which it replaces.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctfm.store.errors import StoreError, some
from ctfm.store.files import parquet_bytes, publish_table
from ctfm.store.pseudonyms import new_key

SCANS_SCHEMA = pa.schema(
    [
        pa.field("scan_id", pa.string(), nullable=False),
        pa.field("study_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("usable", pa.bool_(), nullable=False),  # chosen for extraction
        pa.field("reason", pa.string(), nullable=False),  # a `Reason` value
        pa.field("detail", pa.string(), nullable=False),  # one sentence, or ""
        pa.field("format", pa.string(), nullable=False),  # dicom | nifti | nrrd | metaimage | other
        pa.field("n_slices", pa.int32()),
        pa.field("rows", pa.int32()),
        pa.field("columns", pa.int32()),
        pa.field("spacing_x_mm", pa.float64()),  # between columns
        pa.field("spacing_y_mm", pa.float64()),  # between rows
        pa.field("spacing_z_mm", pa.float64()),  # median distance of neighbouring slices
        pa.field("spacing_z_min_mm", pa.float64()),
        pa.field("spacing_z_max_mm", pa.float64()),
        pa.field("thickness_mm", pa.float64()),  # SliceThickness as the header says
        pa.field("tilt_deg", pa.float64()),  # from geometry, not from the tag
        pa.field("coverage_mm", pa.float64()),  # first to last slice, along their normal
        pa.field("vendor", pa.string()),
        pa.field("kernel", pa.string()),
        pa.field("kvp", pa.float64()),
    ]
)

PRIVATE_SCHEMA = pa.schema(
    [
        pa.field("scan_id", pa.string(), nullable=False),
        # Absolute paths in slice order; `archive.zip::member` for a file inside a zip archive.
        pa.field("files", pa.list_(pa.string()), nullable=False),
        pa.field("digest", pa.string()),  # of the files as they were; null if they were not read
    ]
)

# The lines of the shared table, all null for files of a scan that it does not list.
_PUBLISHED = [field.with_nullable(True) for field in SCANS_SCHEMA if field.name != "scan_id"]
_PRIVATE_PUBLISHED = pa.schema([*PRIVATE_SCHEMA, *_PUBLISHED])

PRIVATE_MODE = 0o600
_FORMAT = {"kind": "catalogue", "version": 1}
_FORMAT_KEY, _PSEUDONYM_KEY = b"ctfm", b"ctfm_pseudonym_key"
_PUBLICATION_KEY, _REPLACES_KEY = b"ctfm_publication", b"ctfm_replaces"

READS = 5
"""Of a pair that is being replaced again and again, until it is called one that does not match."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """What `ctfm index` found."""

    scans: pa.Table
    """One line a scan; may be shared."""

    files: dict[str, list[str]]
    """Where each scan lies, by `scan_id`; empty if read without the private table."""

    key: bytes | None
    """Of the pseudonyms; None if ids are the originals, or if read without the private table."""

    digests: dict[str, str] = field(default_factory=dict)
    """What tells the files of a scan from others, by `scan_id`, for those that could be read."""

    ignored: dict[str, int] = field(default_factory=dict)
    """Files that were passed over as no scans, by extension. Not written."""

    studies_without_patient: int = 0
    """Usable ones whose patient no header and no name tells: each is its own. Not written."""

    def write(self, path: Path) -> None:
        """Publish both tables, the private one first and with mode 600.

        Args:
            path: Of the table that may be shared; its folder exists.

        Raises:
            StoreError: If one cannot be written.
        """
        scans = self.scans.replace_schema_metadata(None)
        publication = hashlib.sha256(parquet_bytes(scans)).hexdigest()
        metadata = {
            _FORMAT_KEY: json.dumps(_FORMAT).encode(),
            _PUBLICATION_KEY: publication.encode(),
            _REPLACES_KEY: _publication_at(path).encode() if path.exists() else b"nothing",
        }
        if self.key is not None:
            metadata[_PSEUDONYM_KEY] = self.key.hex().encode()
        private = self._private_table().replace_schema_metadata(metadata)
        publish_table(private_path(path), private, mode=PRIVATE_MODE)
        _publish_shared(path, scans, publication)

    def _private_table(self) -> pa.Table:
        lines = {line["scan_id"]: line for line in self.scans.to_pylist()}
        order = [*(scan for scan in lines if scan in self.files), *self.files]
        rows = [
            {**lines.get(scan, {}), "scan_id": scan, "files": self.files[scan]}
            | {"digest": self.digests.get(scan)}
            for scan in dict.fromkeys(order)
        ]
        return pa.Table.from_pylist(rows, schema=_PRIVATE_PUBLISHED)


def private_path(path: Path) -> Path:
    """Where the private twin of a catalogue lies: `scans.private.parquet` beside it."""
    return path.with_suffix(".private.parquet")


def read_catalogue(path: Path, *, private: bool = True) -> Catalogue:
    """Read what `Catalogue.write` wrote.

    Args:
        path: Of the table that may be shared.
        private: Read the private twin, too; extraction needs it.

    Raises:
        StoreError: If a table is missing, damaged, or not of a catalogue of this version, or if
            the two do not belong together.
    """
    if not private:
        scans = _read(path, SCANS_SCHEMA)
        return Catalogue(scans=scans.replace_schema_metadata(None), files={}, key=None)
    for _ in range(READS):
        scans = _read(path, SCANS_SCHEMA)
        if not private_path(path).exists():
            raise StoreError(
                f"{private_path(path).name} is missing beside {path}: it holds where the scans "
                "lie and the key of their ids. Bring it back from where `ctfm index` ran; to index "
                "again makes other ids, which the stores of before do not take"
            )
        catalogue = _pair(scans, _read_private(path))
        if catalogue is not None:
            return catalogue
    raise StoreError(
        f"{private_path(path)} and {path.name} do not belong together: the two are not of one "
        "`ctfm index`. Run it again."
    )


def key_for(path: Path) -> bytes:
    """The key of the catalogue at `path`, so that a new index keeps its ids; else a new key.

    Raises:
        StoreError: If there is a private table that cannot be read.
    """
    return read_key(path) or new_key()


def read_key(path: Path) -> bytes | None:
    """The key of the catalogue at `path`; None if it has no private twin, or kept original ids.

    Raises:
        StoreError: If there is a private table that cannot be read.
    """
    if not private_path(path).exists():
        return None
    return _key(_read_private(path))


def check_key(path: Path, key: bytes | None) -> None:
    """Refuse to replace a catalogue that came to be, with another key, while ours was made.

    Raises:
        StoreError: If there is one: stores may have its ids by now, and nobody could make them
            again.
    """
    if key is not None and read_key(path) not in (None, key):
        raise StoreError(
            f"another `ctfm index` wrote {path} meanwhile, with a key of its own: nothing was "
            "written. Run the command again, and it takes that key"
        )


def read_former(path: Path) -> Catalogue | None:
    """The catalogue at `path` that is to be replaced; None if it has no private twin.

    Raises:
        StoreError: If there is a private twin that cannot be read.
    """
    if not private_path(path).exists():
        return None
    private = _read_private(path)
    scans = SCANS_SCHEMA.empty_table()
    with suppress(StoreError):  # missing or damaged: it is written anew
        scans = _read(path, SCANS_SCHEMA)
    return _pair(scans, private) or _with_private(scans, private)


def _publish_shared(path: Path, scans: pa.Table, publication: str) -> None:
    """Publish the lines of the private table that is there: another writer's, if it was later."""
    while True:
        metadata = {
            _FORMAT_KEY: json.dumps(_FORMAT).encode(),
            _PUBLICATION_KEY: publication.encode(),
        }
        publish_table(path, scans.replace_schema_metadata(metadata))
        latest = _publication_at(private_path(path))
        if latest in ("", publication):
            return
        private = _read_private(path)
        scans, publication = _published_scans(private), _said(private, _PUBLICATION_KEY)


def _pair(scans: pa.Table, private: pa.Table) -> Catalogue | None:
    """The catalogue of two tables; None if they are of two publications."""
    publication = _said(private, _PUBLICATION_KEY)
    own = _said(scans, _PUBLICATION_KEY)
    if publication and own != publication:
        if own != _said(private, _REPLACES_KEY):
            return None
        scans = _published_scans(private)  # the shared table is about to be replaced, or was not
    catalogue = _with_private(scans, private)
    listed = scans["scan_id"].to_pylist()
    return catalogue if catalogue.files.keys() >= set(listed) else None


def _published_scans(private: pa.Table) -> pa.Table:
    lines = private.filter(pc.is_valid(private["usable"])).select(SCANS_SCHEMA.names)
    return lines.replace_schema_metadata(None).cast(SCANS_SCHEMA)


def _publication_at(path: Path) -> str:
    """Which publication a table is of; "" if there is none, or it does not say."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return ""
    return str(metadata.get(_PUBLICATION_KEY, b"").decode())


def _said(table: pa.Table, key: bytes) -> str:
    return str((table.schema.metadata or {}).get(key, b"").decode())


def _with_private(scans: pa.Table, private: pa.Table) -> Catalogue:
    scan_ids = private["scan_id"].to_pylist()
    digests = dict(zip(scan_ids, private["digest"].to_pylist(), strict=True))
    return Catalogue(
        scans=scans.replace_schema_metadata(None),
        files=dict(zip(scan_ids, private["files"].to_pylist(), strict=True)),
        key=_key(private),
        digests={scan_id: digest for scan_id, digest in digests.items() if digest is not None},
    )


def _key(private: pa.Table) -> bytes | None:
    secret = private.schema.metadata.get(_PSEUDONYM_KEY)
    return None if secret is None else bytes.fromhex(secret.decode())


def _read_private(path: Path) -> pa.Table:
    """The private twin of the catalogue at `path`, as this version or an older one wrote it."""
    return _read(private_path(path), PRIVATE_SCHEMA, also=_PUBLISHED)


def _read(path: Path, schema: pa.Schema, *, also: Sequence[pa.Field] = ()) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise StoreError(f"no catalogue is at {path}: make it with `ctfm index`") from None
    except PermissionError:
        raise StoreError(f"{path} may not be read by this user: ask its owner for access") from None
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{path} cannot be read as a Parquet table ({type(error).__name__}): make it again "
            "with `ctfm index`"
        ) from error
    present = set(table.schema.names)
    known = [*schema, *also] if present >= {field.name for field in also} else [*schema]
    _check_schema(path, table.schema, known)
    return table


def _check_schema(path: Path, got: pa.Schema, wanted: Sequence[pa.Field]) -> None:
    expected = {field.name: field.type for field in wanted}
    present = {field.name: field.type for field in got}
    wrong = [name for name in expected if present.get(name) != expected[name]]
    wrong += [name for name in present if name not in expected]
    if wrong:
        raise StoreError(
            f"{path} is not a catalogue of this version: columns {some(wrong)} are missing, "
            "unknown or of another type. `ctfm index` makes one."
        )
    written = json.loads((got.metadata or {}).get(_FORMAT_KEY, b"{}"))
    if written != _FORMAT:
        raise StoreError(
            f"{path} was not written by this version of `ctfm index` (it says {written}, not "
            f"{_FORMAT}): make it again"
        )
