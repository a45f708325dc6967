"""Parts of DICOM files as they lie on disk, where a library would write them rightly."""


def with_meta_header_of(named: bytes, lying_as: bytes) -> bytes:
    """The data set of one file under the meta header of another, transfer syntax and all."""
    return named[: _end_of_meta(named)] + lying_as[_end_of_meta(lying_as) :]


def _end_of_meta(content: bytes) -> int:
    """PS3.10 7.1: preamble, `DICM`, and first of all the length of the group."""
    return 144 + int.from_bytes(content[140:144], "little")
