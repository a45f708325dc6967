"""Strict arrays: Zarr's stores and settings, with a chunk that is gone as an error, not as zeros.

To Zarr a missing chunk is one of fill values. Every chunk of ours is written, so a missing one is
damage: also one that vanishes while it is read, or that a network file system denies for a moment.
Zarr 3.4 can be told so (`array.read_missing_chunks`), 3.1 cannot; this works for both.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr
import zarr.core.codec_pipeline
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

_FUSED_PIPELINE = "FusedCodecPipeline"  # zarr >= 3.3; zarr-python pull request 3885


class _MissingIsAnError:
    """Before a store class: no chunk is passed over."""

    async def get(self, key: str, *args: Any, **options: Any) -> Buffer | None:
        return _there(key, await super().get(key, *args, **options))  # type: ignore[misc]

    def get_sync(self, key: str, **options: Any) -> Buffer | None:
        """As `get`, for the fused pipeline of zarr >= 3.3."""
        return _there(key, super().get_sync(key, **options))  # type: ignore[misc]


class _StrictLocalStore(_MissingIsAnError, LocalStore):  # type: ignore[misc]
    pass


def local_arrays(folder: Path) -> Store:
    """The arrays of a folder."""
    return _StrictLocalStore(folder)


def remote_arrays(bucket: "Bucket") -> Store:
    """The arrays of a prefix in a bucket."""
    from zarr.storage import ObjectStore

    class StrictObjectStore(_MissingIsAnError, ObjectStore):  # type: ignore[misc]
        pass

    return StrictObjectStore(bucket)


@contextlib.contextmanager
def our_zarr() -> Iterator[None]:
    """Zarr's settings for our arrays, in the one place that has them.

    The fused codec pipeline reads local chunks twice as fast; it is opt-in. What the user's own
    configuration names is not used: another pipeline may not go through the store that tells a
    missing chunk from zeros, or may write no file for a chunk of zeros.
    """
    has_fused = hasattr(zarr.core.codec_pipeline, _FUSED_PIPELINE)
    pipeline = _FUSED_PIPELINE if has_fused else "BatchedCodecPipeline"
    settings: dict[str, Any] = {
        "array.write_empty_chunks": True,
        "codec_pipeline.path": f"zarr.core.codec_pipeline.{pipeline}",
    }
    with zarr.config.set(settings):
        yield


def _there(key: str, value: Buffer | None) -> Buffer | None:
    """Refuse a chunk (`cls/c.3.0`) without bytes; metadata may be absent."""
    if value is None and key.rpartition("/")[2].startswith("c."):
        raise FileNotFoundError(2, "the chunk is missing", key)
    return value
