"""The scan catalogue: `scans.parquet`, one line a scan, and its private twin.

`scans.parquet` holds pseudonymous ids, geometry and reason codes: nothing in it names a patient,
and it may be shared. `scans.private.parquet`, written beside it with mode 600, holds what must
stay at the site: where each scan's files lie, a digest that tells them from others, and the key
that made the pseudonyms. Extraction needs both; a feature store takes over only the ids.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctfm.store.errors import StoreError, some
from ctfm.store.files import publish_table
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

PRIVATE_MODE = 0o600
_FORMAT = {"kind": "catalogue", "version": 1}
_FORMAT_KEY, _PSEUDONYM_KEY = b"ctfm", b"ctfm_pseudonym_key"


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
        lists = [
            {"scan_id": scan_id, "files": files, "digest": self.digests.get(scan_id)}
            for scan_id, files in self.files.items()
        ]
        metadata = {_FORMAT_KEY: json.dumps(_FORMAT).encode()}
        secret = {} if self.key is None else {_PSEUDONYM_KEY: self.key.hex().encode()}
        private = pa.Table.from_pylist(lists, schema=PRIVATE_SCHEMA)
        private = private.replace_schema_metadata({**metadata, **secret})
        publish_table(private_path(path), private, mode=PRIVATE_MODE)
        publish_table(path, self.scans.replace_schema_metadata(metadata))


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
    scans = _read(path, SCANS_SCHEMA)
    if not private:
        return Catalogue(scans=scans.replace_schema_metadata(None), files={}, key=None)
    if not private_path(path).exists():
        raise StoreError(
            f"{private_path(path).name} is missing beside {path}: it holds where the scans lie and "
            "the key of their ids. Bring it back from where `ctfm index` ran; to index again makes "
            "other ids, which the stores of before do not take"
        )
    twin = _read(private_path(path), PRIVATE_SCHEMA)
    catalogue = _with_private(scans, twin)
    unknown = sum(scan_id not in catalogue.files for scan_id in scans["scan_id"].to_pylist())
    if unknown:
        raise StoreError(
            f"{private_path(path)} lists no files for {unknown} of the {len(scans)} scans of "
            f"{path.name}: the two are not of one `ctfm index`. Run it again."
        )
    return catalogue


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
    return _key(_read(private_path(path), PRIVATE_SCHEMA))


def read_former(path: Path) -> Catalogue | None:
    """The catalogue at `path` that is to be replaced; None if it has no private twin.

    Raises:
        StoreError: If there is a private twin that cannot be read.
    """
    if not private_path(path).exists():
        return None
    scans = SCANS_SCHEMA.empty_table()
    with suppress(StoreError):  # missing or damaged: it is written anew
        scans = _read(path, SCANS_SCHEMA)
    return _with_private(scans, _read(private_path(path), PRIVATE_SCHEMA))


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


def _read(path: Path, schema: pa.Schema) -> pa.Table:
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
    _check_schema(path, table.schema, schema)
    return table


def _check_schema(path: Path, got: pa.Schema, wanted: pa.Schema) -> None:
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
