"""Headers: from the files that were found, to what each of them is.

A file is the planes of a DICOM object, a volume in one file, broken with a reason, or none of our
business. Whatever a parser does with a file stays with that file. Processes read chunks of files;
results come in the order of the files, however many processes there are.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ctfm.extract.dicom import Plane, is_dicom, read_planes
from ctfm.extract.formats import check_sampling, look_at_image
from ctfm.extract.geometry import Stack, check_head_stack
from ctfm.extract.sidecars import Sidecar, read_sidecar
from ctfm.extract.sources import (
    Broken,
    Opener,
    Source,
    ending_of,
    format_of,
    is_named_dicom,
)
from ctfm.store.errors import ScanError
from ctfm.store.isolation import process_pool
from ctfm.store.reasons import Reason

FILES_AT_ONCE = 64
"""A worker process is handed so many together."""
MEMBERS_AT_ONCE = 2048
"""As many members of archives: each time, the list of the archive is read anew."""
HEAD_BYTES = 4096
"""From which a file is told to be DICOM or not."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A NIfTI, NRRD or MetaImage file that could be read."""

    source: Source
    columns: dict[str, Any]
    reason: Reason
    detail: str
    digest: str
    content: str | None
    """As `ImageLook.content`."""
    sidecar: Sidecar


@dataclass(frozen=True, slots=True)
class Ignored:
    """A file that is no scan and does not claim to be one."""

    kind: str


Look = list[Plane] | ImageFile | Broken | Ignored


def look_at_all(
    sources: Sequence[Source], *, workers: int, progress: Callable[[int, int], None]
) -> Iterator[Look]:
    """Read the header of every file.

    Args:
        sources: The files.
        workers: Processes; 1 reads in this one.
        progress: Called with how many files are done, and of how many.
    """
    chunks = list(_chunks(sources))
    done = 0
    several = workers > 1 and len(chunks) > 1
    for looks in _in_processes(chunks, workers) if several else map(_look_at_chunk, chunks):
        done += len(looks)
        progress(done, len(sources))
        yield from looks


def _in_processes(chunks: Sequence[Sequence[Source]], workers: int) -> Iterator[list[Look]]:
    """In order. Where a process dies, its chunk is read again file by file, to find the culprit."""
    done = 0
    while done < len(chunks):
        with process_pool(min(workers, len(chunks) - done)) as pool:
            futures = [pool.submit(_look_at_chunk, chunk) for chunk in chunks[done:]]
            try:
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenProcessPool:
                pass
        if done < len(chunks):
            yield _look_one_by_one(chunks[done])
            done += 1


def _look_one_by_one(sources: Sequence[Source]) -> list[Look]:
    looks: list[Look] = []
    while len(looks) < len(sources):
        with process_pool(1) as pool:
            try:
                for source in sources[len(looks) :]:
                    looks += pool.submit(_look_at_chunk, [source]).result()
            except BrokenProcessPool:
                detail = "the process that read its header died (a crashing decoder, or no memory)"
                looks.append(Broken((sources[len(looks)],), Reason.READER_CRASHED, detail))
    return looks


def _chunks(sources: Sequence[Source]) -> Iterator[Sequence[Source]]:
    start = 0
    while start < len(sources):
        at_once = MEMBERS_AT_ONCE if "::" in sources[start].file else FILES_AT_ONCE
        yield sources[start : start + at_once]
        start += at_once


def _look_at_chunk(sources: Sequence[Source]) -> list[Look]:
    with Opener() as opener, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, on values that are then taken as missing
        return [_look_at(opener, source) for source in sources]


def _look_at(opener: Opener, source: Source) -> Look:
    """Read one header. Any exception is caught: no file may stop the index of the others."""
    try:
        if format_of(source.file) != "dicom":
            return _look_at_image(opener, source)
        with opener.open(source.file) as stream:
            head = stream.read(HEAD_BYTES)
            stream.seek(0)
            if is_dicom(head):
                planes = read_planes(stream, source.file)
                return [_in_a_series(plane, source) for plane in planes] or Ignored("DICOMDIR")
        if is_named_dicom(source.file):
            raise ScanError(Reason.UNREADABLE, "not DICOM, though its name says so")
        return Ignored(ending_of(source.file) or "no extension")
    except ScanError as error:
        return Broken((source,), error.reason, error.detail)
    except Exception as error:
        detail = f"the file cannot be read ({type(error).__name__})"
        return Broken((source,), Reason.UNREADABLE, detail)


def _in_a_series(plane: Plane, source: Source) -> Plane:
    """Without a SeriesInstanceUID, the images of one folder are one series."""
    if plane.facts.series:
        return plane
    folder = os.path.dirname(source.from_above_root(1))
    facts = replace(plane.facts, series=folder, series_is_folder=True)
    return replace(plane, facts=facts)


def _look_at_image(opener: Opener, source: Source) -> ImageFile:
    look = look_at_image(opener, source.file)
    header = look.header
    stack = header.stack()
    x_mm, y_mm, _ = np.linalg.norm(header.affine[:3, :3], axis=0).tolist()
    columns = {
        **stack_columns(stack),
        "columns": header.shape[0],
        "rows": header.shape[1],
        "spacing_x_mm": round(x_mm, 6),
        "spacing_y_mm": round(y_mm, 6),
    }
    reason, detail = Reason.OK, header.note
    try:
        check_sampling(header)
        check_head_stack(stack)
    except ScanError as error:
        reason, detail = error.reason, error.detail
    return ImageFile(
        source=source,
        columns=columns,
        reason=reason,
        detail=detail,
        digest=look.digest,
        content=look.content,
        sidecar=read_sidecar(opener, source.sidecar),
    )


def stack_columns(stack: Stack) -> dict[str, Any]:
    """The geometry of a stack as columns of the catalogue."""
    columns = {
        "n_slices": len(stack.order),
        "tilt_deg": round(stack.tilt_deg, 3) + 0.0,
        "coverage_mm": round(stack.coverage_mm, 4),
    }
    if stack.gap_mm.size:
        columns["spacing_z_mm"] = round(stack.spacing_mm, 4)
        columns["spacing_z_min_mm"] = round(float(stack.gap_mm.min()), 4)
        columns["spacing_z_max_mm"] = round(float(stack.gap_mm.max()), 4)
    return columns
