"""Identity: from the files of a scan, to a digest that tells whether they are still those.

A catalogue may be weeks old when its scans are read. What was indexed under an id must not be
embedded under it if other files lie in its place by then. DICOM tells from its headers, which are
read at both times anyway: ids, place and rescaling of every image. Another format keeps no ids, so
its size and some of its bytes are taken: the first, which are its header, and blocks all over it,
and likewise of the file of voxels that it may name. Of a JSON file beside it only what decides the
distance of slices is taken (`formats.image_digest`).

Two files that were packed differently hold the same image if what gzip says of its content agrees:
CRC-32 and length (RFC 1952), which only one member in the file tells, and the first bytes, which
are the header.

Not every byte is read. Pixels that were edited in place under the same header are not noticed.
Digests are made of original ids and stay in the private table of the catalogue.
"""

import hashlib
import zlib
from collections.abc import Iterable
from io import BufferedIOBase, BytesIO

from ctfm.extract.dicom import Plane
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

BLOCKS, BLOCK_BYTES = 32, 4096
HEADER_BYTES = 352
"""The header of NIfTI-1 with the four of its extensions; the greater part of that of NIfTI-2."""
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fraction, times 2⁶⁴


def planes_digest(planes: Iterable[Plane]) -> str:
    """Digest of the image planes of a DICOM scan, in whatever order they come.

    The series is left out: where the header has none, the index takes the folder for it.
    """
    lines = sorted(map(_identity, planes))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _identity(plane: Plane) -> str:
    facts = plane.facts
    ids = (facts.patient, facts.study, plane.sop, plane.frame)
    place = (plane.position_mm, facts.axes, facts.pixel_mm, facts.rows, facts.columns)
    return repr((ids, place, plane.slope, plane.intercept))


def file_digest(stream: BufferedIOBase) -> str:
    """Digest of the size of a file and of blocks of it, the first of them at its start.

    Blocks lie at multiples of the golden ratio: even, and in step with no slice or row, as else
    all might fall into the air above a head.
    """
    size_bytes = stream.seek(0, 2)
    if size_bytes <= BLOCKS * BLOCK_BYTES:  # one read is cheaper than many
        stream.seek(0)
        stream = BytesIO(stream.read())
    content = hashlib.sha256(str(size_bytes).encode())
    for i in range(BLOCKS):
        stream.seek((i * _GOLDEN_RATIO % (1 << 64)) * size_bytes >> 64)
        content.update(stream.read(BLOCK_BYTES))
    return content.hexdigest()


def content_digest(stream: BufferedIOBase, *, least_bytes: int) -> str | None:
    """Digest of what a file holds, the same whether it is packed with gzip or plain.

    A packed file is not unpacked, a plain one is read to its end.

    Args:
        stream: The file.
        least_bytes: That it holds; where the end of a gzip file tells of fewer, it has several
            members.

    Returns:
        None where it cannot be told.
    """
    stream.seek(0)
    start = stream.read(BLOCK_BYTES)
    if not start.startswith(b"\x1f\x8b"):
        stream.seek(0)
        return _plain_content(stream)
    header = zlib.decompressobj(wbits=31).decompress(start, HEADER_BYTES)
    stream.seek(-8, 2)
    crc, size_bytes = (int.from_bytes(stream.read(4), "little") for _ in range(2))
    if len(header) < HEADER_BYTES or size_bytes < least_bytes:
        return None
    return _digest_of(header, crc, size_bytes)


def _plain_content(stream: BufferedIOBase) -> str:
    header = stream.read(HEADER_BYTES)
    crc, size_bytes = zlib.crc32(header), len(header)
    while block := stream.read(1 << 20):
        crc, size_bytes = zlib.crc32(block, crc), size_bytes + len(block)
    return _digest_of(header, crc, size_bytes % (1 << 32))


def _digest_of(header: bytes, crc: int, size_bytes: int) -> str:
    return hashlib.sha256(header + repr((crc, size_bytes)).encode()).hexdigest()


def check_unchanged(got: str, indexed: str | None) -> None:
    """Refuse files that are not those that were indexed.

    Args:
        got: The digest of what lies there now.
        indexed: That of the catalogue; None is not compared.

    Raises:
        ScanError: `CHANGED`.
    """
    if indexed is not None and got != indexed:
        detail = "another image lies where the indexed one was: run `ctfm index` again"
        raise ScanError(Reason.CHANGED, detail)
