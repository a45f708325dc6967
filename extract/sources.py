"""Sources: from folders, files and zip archives, to files that can be opened by one name.

A name is an absolute path, or `archive.zip::member`. A member is unpacked in memory, never to
disk, so a hostile member name leads nowhere; how much a member may unpack to is bounded.

Files are told apart by name here, and by content only where they are read. What is plainly no
scan (text, tables, pictures, hidden files, a DICOMDIR) is counted and otherwise passed over. An
archive of another kind, or inside an archive, is not opened and gets a reason.
"""

import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Literal

from ctfm.extract.converted_names import copy_of
from ctfm.store.errors import ConfigError, ScanError
from ctfm.store.reasons import Reason

Format = Literal["dicom", "nifti", "nrrd", "metaimage", "other"]

_FORMATS: dict[str, Format] = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
}
_DICOM_ENDINGS = (".dcm", ".dicom", ".dic", ".ima")
_OTHER_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".dcm.gz")
# Files without one of these endings are opened to see whether they are DICOM.
_NO_SCANS = re.compile(
    r"\.(bmp|bval|bvec|bz2|c|cfg|csv|db|docx?|gif|gz|h5|hdf5|html?|ini|ipynb|jpe?g|js|jsonl?|log|md"
    r"|npy|npz|odt|parquet|pdf|pickle|pkl|png|pptx?|pt|pth|py|raw|rst|rtf|safetensors|sh|svg|tiff?"
    r"|toml|tsv|txt|xlsx?|xml|xz|ya?ml|zraw|zst)"
)
_BIDS_DESCRIPTION = "dataset_description.json"
_MEMBER = re.compile(r"(.+?\.zip)::(.+)", re.IGNORECASE | re.DOTALL)

# Deflate packs 1000 to 1 at best; CT about 3 to 1, an empty slice 1000 to 1 but it is small.
MAX_MEMBER_BYTES = 4 << 30
MAX_BYTES_AT_ANY_RATIO = 64 << 20
MAX_RATIO = 100

_CANNOT_UNPACK = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error)


@dataclass(frozen=True, slots=True)
class Source:
    """One file that may hold a scan."""

    file: str
    """Absolute path, or `archive.zip::member`."""
    root: str
    """The folder given to `find`, or that of the file given to it."""
    sidecar: str = ""
    """The JSON file beside a NIfTI file; "" if there is none."""

    @property
    def archive(self) -> str:
        """The archive that the file is in; the file itself if it is in none."""
        return split_member(self.file)[0]

    def relative(self) -> str:
        """The name as seen from the root, with forward slashes."""
        return os.path.relpath(self.file, self.root).replace(os.sep, "/")

    def relative_stem(self) -> str:
        """As `relative`, ending as `stem_of` does."""
        return self._as_stem(self.relative())

    def from_above_root(self, levels: int) -> str:
        """As `relative`, after the names of some folders above: the root is the first."""
        parts = self._parts()
        depth = self.relative().count("/") + 1 + levels
        return "/".join(parts[-depth:])

    def endings(self) -> Iterator[str]:
        """Every ending of its path, each as `stem_of` ends and whole, the shortest first."""
        yield from (stem_of(self.file), base_name(self.file))  # of a member of an archive, too
        parts = self._parts()
        for depth in range(1, len(parts) + 1):
            ending = "/".join(parts[-depth:])
            yield self._as_stem(ending)
            yield ending

    def _parts(self) -> list[str]:
        return self.file.replace(os.sep, "/").split("/")

    def _as_stem(self, name: str) -> str:
        return folder_of(name) + stem_of(self.file)


@dataclass(frozen=True, slots=True)
class Broken:
    """Files that cannot be used, and why; they share one line of the catalogue."""

    sources: tuple[Source, ...]
    reason: Reason
    detail: str


@dataclass
class Found:
    """What lies under the paths given to `find`."""

    sources: list[Source] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """How many files were passed over, by extension."""
    json_files: set[str] = field(default_factory=set)
    """Those of them that may lie beside a NIfTI file."""
    descriptions: list[str] = field(default_factory=list)
    """Each `dataset_description.json` of BIDS that was found."""


def find(paths: Sequence[Path]) -> Found:
    """List every file under some paths that may hold a scan, sorted by name.

    Links to folders are followed, each folder is visited once, archives are listed.

    Args:
        paths: Folders, archives and files.

    Raises:
        ConfigError: If a path does not exist.
    """
    found = Found()
    visited: set[tuple[int, int]] = set()
    for path in sorted({Path(os.path.abspath(path)) for path in paths}):
        if path.is_dir():
            _walk(path, found, visited)
        elif path.exists():
            _add_file(str(path), str(path.parent), found)
            found.json_files |= set(filter(os.path.isfile, sidecar_names(str(path))))
        else:
            raise ConfigError(f"no file or folder is at {path}: check the paths to index")
    found.broken = list({broken.sources: broken for broken in found.broken}.values())
    once = {source.file: source for source in reversed(found.sources)}
    found.sources = [_with_sidecar(once[file], found.json_files) for file in sorted(once)]
    return found


def format_of(file: str) -> Format:
    """The format that the name of a file stands for; DICOM, which needs no ending, if for none."""
    ending = ending_of(file)
    if ending in _OTHER_ARCHIVES or ending == ".zip":
        return "other"
    return _FORMATS.get(ending, "dicom")


def is_named_dicom(file: str) -> bool:
    """Whether the ending of a name promises DICOM."""
    return file.lower().endswith(_DICOM_ENDINGS)


def ending_of(file: str) -> str:
    """The ending that tells the format, in lower case; "" where there is none."""
    name = base_name(file).lower()
    for ending in (".nii.gz", *_OTHER_ARCHIVES):
        if name.endswith(ending):
            return ending
    return os.path.splitext(name)[1]


def stem_of(file: str) -> str:
    """A name without its folders; without its ending, too, where that tells the format."""
    name = base_name(file)
    ending = ending_of(name)
    known = ending in _FORMATS or ending in _DICOM_ENDINGS or ending == ".zip"
    return name[: -len(ending)] if known else name


def base_name(file: str) -> str:
    """The last part of a path or of the name of a member."""
    return file[max(file.rfind("/"), file.rfind("\\")) + 1 :].split("::")[-1]


def folder_of(file: str) -> str:
    """What stands before the `base_name`, with the separator; "" if nothing does."""
    return file[: len(file) - len(base_name(file))]


def sidecar_names(file: str) -> tuple[str, ...]:
    """Where the JSON file of a NIfTI file may lie: under its name, or that of its plain file."""
    stem = stem_of(file)
    stems = dict.fromkeys((stem, copy_of(stem)[0]))
    return tuple(f"{folder_of(file)}{one}.json" for one in stems)


def split_member(file: str) -> tuple[str, str | None]:
    """Part `archive.zip::member`; a plain path has no member."""
    match = _MEMBER.fullmatch(file)
    if match is None or not os.path.isfile(match[1]):
        return file, None
    return match[1], match[2]


def is_hostile_ratio(unpacked_bytes: int, packed_bytes: int) -> bool:
    """Whether so much from so little is no CT."""
    return unpacked_bytes > max(MAX_BYTES_AT_ANY_RATIO, MAX_RATIO * packed_bytes)


class Opener:
    """Opens sources. The last archive stays open, as its members are mostly read in a row."""

    def __init__(self) -> None:
        self._path = ""
        self._archive: zipfile.ZipFile | None = None

    def __enter__(self) -> "Opener":
        return self

    def __exit__(self, *_: object) -> None:
        if self._archive is not None:
            self._archive.close()

    def open(self, file: str) -> BufferedIOBase:
        """Open a source for reading from its start; a member is held in memory.

        Raises:
            OSError: If it is gone (FileNotFoundError) or cannot be read.
            ScanError: If a member is damaged, encrypted, or unpacks to too much.
        """
        path, member = split_member(file)
        if member is None:
            return open(path, "rb")
        archive = self._open_archive(path)
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise FileNotFoundError("the archive has no such member any more") from None
        fault = _member_fault(info)
        if fault is not None:
            raise fault
        try:
            return BytesIO(archive.read(info))
        except _CANNOT_UNPACK as error:
            raise ScanError(Reason.UNREADABLE, "it cannot be unpacked from its archive") from error

    def exists(self, file: str) -> bool:
        """Whether a regular file of this name is there, or such a member of an archive."""
        path, member = split_member(file)
        if member is None:
            return os.path.isfile(file)
        try:
            self._open_archive(path).getinfo(member)
        except (OSError, ScanError, KeyError):
            return False
        return True

    def _open_archive(self, path: str) -> zipfile.ZipFile:
        if self._archive is None or self._path != path:
            if self._archive is not None:
                self._archive.close()
            self._archive = None
            try:
                self._archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, ValueError) as error:
                raise ScanError(Reason.UNREADABLE, "the zip archive is damaged") from error
            self._path = path
        return self._archive


def can_be_opened(files: Sequence[str]) -> bool:
    """Whether these are sources, one or more, and all are there and may be read."""
    with Opener() as opener:
        try:
            for file in files:
                opener.open(file).close()
        except (OSError, ScanError):
            return False
    return len(files) > 0


def _with_sidecar(source: Source, json_files: Set[str]) -> Source:
    if not json_files or not source.file.lower().endswith((".nii", ".nii.gz")):
        return source
    beside = (name for name in sidecar_names(source.file) if name in json_files)
    return replace(source, sidecar=next(beside, ""))


def _walk(root: Path, found: Found, visited: set[tuple[int, int]]) -> None:
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        try:
            identity = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            _add_broken(Source(folder, str(root)), found, "a folder cannot be listed")
            continue
        if (identity.st_dev, identity.st_ino) in visited:
            continue
        visited.add((identity.st_dev, identity.st_ino))
        inner = []
        for entry in entries:
            if _is_hidden(entry.name):
                found.ignored["hidden"] += 1
            elif _is_folder(entry):
                inner.append(entry.path)
            else:
                _add_file(entry.path, str(root), found)
        folders += reversed(inner)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be entered
        return False


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in {".", ".."}) or name == "__MACOSX"


def _add_file(path: str, root: str, found: Found) -> None:
    if not _is_utf8(path):
        detail = "its path is not valid UTF-8: rename the file or its folder"
        _add_broken(Source(path, root), found, detail)
    elif not os.path.exists(path):
        detail = "a link that leads nowhere, or where it may not be followed"
        _add_broken(Source(path, root), found, detail)
    elif not os.path.isfile(path):
        found.ignored["no regular file"] += 1
    elif ending_of(path) == ".zip":
        _add_archive(path, root, found)
    else:
        _sort_in(Source(path, root), found)


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _add_broken(source: Source, found: Found, detail: str) -> None:
    printable = Source(source.file.encode(errors="replace").decode(), source.root)
    found.broken.append(Broken((printable,), Reason.UNREADABLE, detail))


def _sort_in(source: Source, found: Found) -> None:
    ending = ending_of(source.file)
    if base_name(source.file).upper() == "DICOMDIR":
        found.ignored["DICOMDIR"] += 1
    elif ending in _OTHER_ARCHIVES or (ending == ".zip" and "::" in source.file):
        detail = "an archive that is not opened: unpack it, or make it a plain zip archive"
        found.broken.append(Broken((source,), Reason.UNSUPPORTED_ENCODING, detail))
    elif _NO_SCANS.fullmatch(ending):
        found.ignored[ending] += 1
        if ending == ".json":
            found.json_files.add(source.file)
        if base_name(source.file) == _BIDS_DESCRIPTION:
            found.descriptions.append(source.file)
    else:
        found.sources.append(source)


def _add_archive(path: str, root: str, found: Found) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        detail = "the zip archive is damaged"
        found.broken.append(Broken((Source(path, root),), Reason.UNREADABLE, detail))
        return
    faulty: dict[tuple[Reason, str], list[Source]] = {}
    for name, info in members.items():
        source = Source(f"{path}::{name}", root)
        if any(_is_hidden(part) for part in re.split(r"[/\\]", name)):
            found.ignored["hidden"] += 1
        elif (fault := _member_fault(info)) is not None:
            faulty.setdefault((fault.reason, fault.detail), []).append(source)
        else:
            _sort_in(source, found)
    found.broken += _per_archive(faulty)


def _per_archive(faulty: dict[tuple[Reason, str], list[Source]]) -> Iterable[Broken]:
    for (reason, detail), sources in faulty.items():
        count = f"{len(sources)} files: " if len(sources) > 1 else ""
        yield Broken(tuple(sources), reason, count + detail)


def _member_fault(info: zipfile.ZipInfo) -> ScanError | None:
    if info.flag_bits & 1:
        return ScanError(Reason.ENCRYPTED, "encrypted inside its archive: unpack it first")
    if ".." in re.split(r"[/\\]", info.filename):
        detail = "its name leads out of the archive: unpack it first, and with care"
        return ScanError(Reason.UNREADABLE, detail)
    if info.file_size > MAX_MEMBER_BYTES or is_hostile_ratio(info.file_size, info.compress_size):
        detail = "unpacks to so much that the archive looks hostile: unpack it first"
        return ScanError(Reason.UNREADABLE, detail)
    return None
