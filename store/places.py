"""Places: where the files of a feature store lie, a local folder or a URL of object storage.

Both do the same few things by relative names such as `commits/000000.json`. Publication is write,
fsync and rename in a folder (`ctfm.store.files`), and one PUT on object storage: every reader sees
the old bytes or the new ones. `add` publishes only what is not there yet (a hard link; a
conditional PUT), which is how two processes that know nothing of each other agree on one plan.

Object storage goes through obstore, an optional extra: `s3://`, `gs://`, `az://`. Credentials and
endpoint come from the environment, as its documentation lists them.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from zarr.abc.store import Store

from ctfm.store.errors import ConfigError, PlaceError, StoreError
from ctfm.store.extras import optional
from ctfm.store.files import (
    PARTIAL_SUFFIX,
    add_bytes,
    publish_bytes,
    remove_leftovers,
    sync,
    writing,
)
from ctfm.store.strict_arrays import local_arrays, remote_arrays

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

REQUESTS = 16
"""Small objects that are read at once."""

RETRY_TIMEOUT_S = 60.0
"""How long one request is tried again while a server does not answer."""

SCHEMES = ("s3", "gs", "az")

_NONE_THERE = (
    "it is missing. `ctfm store verify --repair` writes it anew where the rest of the store tells "
    "what was in it"
)


class Url(str):
    """A place on object storage, without a slash at its end."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The last part, as of a `Path`."""
        return self.rpartition("/")[2]


@runtime_checkable
class Place(Protocol):
    """Files by relative names, with `/` between folders."""

    @property
    def path(self) -> Path | Url:
        """As a person knows it."""

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""

    def read(self, name: str) -> bytes:
        """The whole content; a `StoreError` if there is no such file, or it cannot be read."""

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        """The contents of many small files, in that order."""

    def publish(self, name: str, data: bytes) -> None:
        """Write a file as a whole, in place of an older one."""

    def add(self, name: str, data: bytes) -> bool:
        """Publish a file unless one of that name is there; whether it was."""

    def delete(self, name: str) -> None:
        """Remove a file, if there is one."""

    def names(self, folder: str) -> list[str]:
        """Of the files in a folder, without those below it, sorted."""

    def files(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every published file."""

    def prepare(self, folders: Iterable[str]) -> None:
        """Make ready for writing into these folders: they exist, without what dead writers left."""

    def sync(self, names: Iterable[str]) -> None:
        """Wait until files that were written through `arrays` are on the disk."""

    def arrays(self, folder: str) -> Store:
        """A folder as Zarr wants it, in which a chunk that is gone is a `FileNotFoundError`."""

    def reading(self) -> AbstractContextManager[None]:
        """Turn a place that refuses or does not answer, but no missing file, into `PlaceError`."""

    def writing(self) -> AbstractContextManager[None]:
        """Turn what goes wrong while writing into a `StoreError` that says what to do."""


def place_of(location: Path | str) -> Place:
    """The place at a path or URL, whether or not anything lies there.

    Raises:
        ConfigError: If it is a URL and obstore is not installed, or does not know its kind.
    """
    if isinstance(location, Path) or "://" not in location:
        return LocalPlace(Path(location))
    remote = RemotePlace(location.rstrip("/"))
    remote.connect()
    return remote


@dataclass(frozen=True)
class LocalPlace:
    """A folder."""

    path: Path

    def has(self, name: str) -> bool:
        with self.reading():
            return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        path = self.path / name
        try:
            with self.reading():
                return path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"{path} cannot be read: {_NONE_THERE}") from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        return map(self.read, names)

    def publish(self, name: str, data: bytes) -> None:
        publish_bytes(self.path / name, data)

    def add(self, name: str, data: bytes) -> bool:
        return add_bytes(self.path / name, data)

    def delete(self, name: str) -> None:
        with self.writing():
            (self.path / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        path = self.path / folder
        try:
            with self.reading(), os.scandir(path) as entries:
                found = [entry.name for entry in entries if entry.is_file()]
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error.strerror}): a feature store needs that folder. "
                "Restore it, or extract again to a new store"
            ) from error
        return sorted(name for name in found if not name.endswith(PARTIAL_SUFFIX))

    def files(self) -> Iterator[tuple[str, int]]:
        for path in [self.path] if self.path.is_file() else sorted(self.path.rglob("*")):
            if path.is_file() and path.suffix != PARTIAL_SUFFIX:
                yield path.relative_to(self.path).as_posix(), path.stat().st_size

    def prepare(self, folders: Iterable[str]) -> None:
        with self.writing():
            for folder in folders:
                path = self.path / folder
                if not path.is_dir():
                    path.mkdir(parents=True, exist_ok=True)
                    sync(path.parent)
                remove_leftovers(path)

    def sync(self, names: Iterable[str]) -> None:
        paths = [self.path / name for name in names]
        for path in [*paths, *dict.fromkeys(path.parent for path in paths)]:
            sync(path)

    def arrays(self, folder: str) -> Store:
        return local_arrays(self.path / folder)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise PlaceError(
                f"{error.filename or self.path} may not be read by this user: ask its owner for "
                "access, then run the same command again"
            ) from error

    def writing(self) -> AbstractContextManager[None]:
        return writing(self.path)


@dataclass(frozen=True)
class RemotePlace:
    """A prefix in a bucket."""

    url: str

    @property
    def path(self) -> Url:
        return Url(self.url)

    def __reduce__(self) -> tuple[type["RemotePlace"], tuple[str]]:
        """Leave the connection behind: another process makes its own."""
        return type(self), (self.url,)

    def has(self, name: str) -> bool:
        with self.reading():
            try:
                self._bucket.head(name)
            except FileNotFoundError:
                return False
        return True

    def read(self, name: str) -> bytes:
        with self.reading():
            try:
                return bytes(self._bucket.get(name).bytes())
            except FileNotFoundError as error:
                raise StoreError(f"{self.url}/{name} cannot be read: {_NONE_THERE}") from error

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            yield from pool.map(self.read, names)

    def publish(self, name: str, data: bytes) -> None:
        with self.writing():
            self._bucket.put(name, data, use_multipart=False)

    def add(self, name: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        with self.writing():
            try:
                self._bucket.put(name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        with self.writing(), contextlib.suppress(FileNotFoundError):
            self._bucket.delete(name)

    def names(self, folder: str) -> list[str]:
        with self._requests("read"):
            listed = self._bucket.list_with_delimiter(folder)["objects"]
        return sorted(found["path"].rpartition("/")[2] for found in listed)

    def files(self) -> Iterator[tuple[str, int]]:
        with self._requests("read"):
            for found in (one for some in self._bucket.list() for one in some):
                yield found["path"], found["size"]

    def prepare(self, folders: Iterable[str]) -> None:
        """Object storage has no folders, and an unfinished PUT leaves nothing."""

    def sync(self, names: Iterable[str]) -> None:
        """A PUT that was answered is durable."""

    def arrays(self, folder: str) -> Store:
        return remote_arrays(self.connect(folder))

    def reading(self) -> AbstractContextManager[None]:
        return self._requests("read", passing=(FileNotFoundError,))

    def writing(self) -> AbstractContextManager[None]:
        return self._requests("write")

    def connect(self, folder: str = "") -> "Bucket":
        """What obstore has for the place, or for a folder of it.

        Raises:
            ConfigError: If obstore is not installed, or the URL is not one of object storage.
        """
        scheme, _, rest = self.url.partition("://")
        if scheme not in SCHEMES or not rest:
            raise ConfigError(
                f"{self.url} is no place for a store: give a folder, or a URL such as "
                f"s3://bucket/features/NAME (also {', '.join(SCHEMES[1:])})"
            )
        obstore = optional("obstore.store", extra="object-store", what=f"a store at {self.url}")
        bucket: Bucket = obstore.from_url(
            f"{self.url}/{folder}",
            client_options={"allow_http": True},  # of an endpoint that the user gave as http://
            retry_config={"retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)},
        )
        return bucket

    @cached_property
    def _bucket(self) -> "Bucket":
        return self.connect()

    @contextlib.contextmanager
    def _requests(self, verb: str, *, passing: tuple[type[OSError], ...] = ()) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except passing:
            raise
        except (BaseError, OSError) as error:
            raise PlaceError(
                f"cannot {verb} {self.url}: {_first_line(error)}. Check the bucket, the network, "
                "and credentials and endpoint in the environment (docs/store-format.md lists "
                "them), then run the same command again"
            ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
