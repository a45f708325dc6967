"""Codestreams: from a compressed frame, to the size of the image that it says it holds.

Sources: ITU-T T.81 B.2.2 (JPEG), T.87 C.2.2 (JPEG-LS), T.800 A.5.1 and I.4 (JPEG 2000, JP2).
Decoders believe the codestream and not the header around it: 4 kB that claim 60000 x 60000 pixels
cost OpenJPEG 7 GB, and CharLS ends the process. So what it says is read before it is decoded.
"""

import struct
from collections.abc import Iterator

_START_OF_FRAME = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_JP2 = b"\x00\x00\x00\x0cjP  "


def claimed_size(frame: bytes) -> tuple[int, int, int]:
    """Rows, columns and samples a pixel of a JPEG, JPEG-LS or JPEG 2000 frame.

    Raises:
        ValueError: If it does not say.
    """
    try:
        if frame[:2] == b"\xff\xd8":
            return _jpeg_size(frame)
        return _jpeg_2000_size(frame)
    except (struct.error, IndexError):
        raise ValueError("the frame ends before it says its size") from None


def is_cut_short(frame: bytes) -> bool:
    """Whether a JPEG frame lacks its end, in the place of which libjpeg would invent pixels.

    The end is a marker, which entropy-coded data cannot hold (T.81 B.1.1.5). Whatever follows it
    is padding: PS3.5 A.4 does not say of which bytes, and zeros, FF and blanks are all in use.
    """
    try:
        scan = next(at for marker, at in _jpeg_segments(frame) if marker == _START_OF_SCAN)
    except (struct.error, IndexError, StopIteration):
        return True
    return frame.find(_END_OF_IMAGE, scan) < 0


def _jpeg_size(frame: bytes) -> tuple[int, int, int]:
    for marker, at in _jpeg_segments(frame):
        if marker in _START_OF_FRAME:
            rows, columns, samples = struct.unpack_from(">HHB", frame, at + 3)
            return rows, columns, samples
    raise ValueError("no frame header where one should be")


def _jpeg_segments(frame: bytes) -> Iterator[tuple[int, int]]:
    """The markers before the entropy-coded data, and where the length that follows each lies."""
    at = 2
    while frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        yield marker, at + 2
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]


def _jpeg_2000_size(frame: bytes) -> tuple[int, int, int]:
    at = _codestream_at(frame) if frame.startswith(_JP2) else 0
    if frame[at : at + 4] != b"\xff\x4f\xff\x51":
        raise ValueError("neither JPEG nor JPEG 2000")
    right, bottom, left, top = struct.unpack_from(">4I", frame, at + 8)
    return bottom - top, right - left, struct.unpack_from(">H", frame, at + 40)[0]


def _codestream_at(frame: bytes) -> int:
    at = 0
    while True:
        length, kind = struct.unpack_from(">I4s", frame, at)
        if kind == b"jp2c":
            return at + 8
        if length < 8:  # pydicom would wait here for ever
            raise ValueError("a JP2 box without an end")
        at += length
