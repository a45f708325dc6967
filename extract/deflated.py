"""Deflated DICOM: from the start of a file, to whether it may be inflated.

pydicom inflates a whole file in one go, and 3 MB of zeros become 3 GB. So the meta header is walked
as pydicom walks it (PS3.10 7.1), and what follows a deflated transfer syntax is inflated up to a
limit first.
"""

import zlib
from io import BufferedIOBase

from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

DEFLATED = "1.2.840.10008.1.2.1.99"
MAX_DEFLATED_BYTES = 4 << 20
MAX_INFLATED_BYTES = 64 << 20
MAX_META_BYTES = 1 << 20


def check_deflated(stream: BufferedIOBase, head: bytes) -> None:
    """Refuse a file that pydicom would inflate to more than a header with its pixels can be.

    Args:
        stream: The file, read up to the end of `head`.
        head: Its first bytes.

    Raises:
        ScanError: `UNREADABLE` or `UNSUPPORTED_ENCODING`.
    """
    start, syntax = _after_meta(head)
    if start >= len(head):
        head += stream.read(MAX_META_BYTES)
        start, syntax = _after_meta(head)
    if start > len(head) or start >= MAX_META_BYTES:
        raise ScanError(Reason.UNREADABLE, "the meta header does not end")
    if syntax == DEFLATED:
        _check_inflated(stream, start)


def _after_meta(head: bytes) -> tuple[int, str]:
    """Where the meta header ends (beyond `head` if it goes on), and the transfer syntax in it."""
    at = 132 if head[128:132] == b"DICM" else 0
    syntax = b""
    while head[at : at + 2] == b"\x02\x00":
        kind = head[at + 4 : at + 6]
        long = kind.decode("latin-1") in EXPLICIT_VR_LENGTH_32
        explicit = b"AA" <= kind <= b"ZZ"
        start = at + (12 if long else 8)
        length = head[at + 6 : at + 8] if explicit and not long else head[start - 4 : start]
        end = start + int.from_bytes(length, "little")
        if head[at + 2 : at + 4] == b"\x10\x00":
            syntax = head[start:end]
        at = end
    return at, syntax.decode("latin-1").strip(" \0")


def _check_inflated(stream: BufferedIOBase, start: int) -> None:
    size_bytes = stream.seek(0, 2)
    if size_bytes > MAX_DEFLATED_BYTES:
        detail = f"deflated and {size_bytes >> 20} MiB long: convert it to another syntax"
        raise ScanError(Reason.UNSUPPORTED_ENCODING, detail)
    stream.seek(start)
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(), MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise ScanError(Reason.UNREADABLE, "what was deflated is damaged") from error
    if len(inflated) == MAX_INFLATED_BYTES:
        raise ScanError(Reason.UNREADABLE, "deflated from so much that the file looks hostile")
