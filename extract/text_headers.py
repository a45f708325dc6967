"""Text headers: from a NRRD or MetaImage file, to the type and the place of its voxels.

Sources: the definition of NRRD (version 5, teem) and the tags of MetaIO. Read is what a scan can be
kept in: one volume of plain numbers, raw or deflated, in the file itself or in one beside it. ITK
is not used: a damaged header kills its process (`NDims = 9999993`), and it opens any path that a
header names. What is missing or malformed raises `LookupError` or `ValueError`.

Axes: i j k as in the file, the fastest first. Both formats are LPS and in
millimetres unless they say otherwise (`space units`, `DistanceUnits`).
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase

import numpy as np
from jaxtyping import Float

from ctfm.extract.sources import folder_of, format_of, split_member
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_HEADER_BYTES = 1 << 18
MAX_DIMENSIONS = 8

_LPS = (-1.0, -1.0, 1.0)
_SPACES = {
    "left-posterior-superior": _LPS,
    "lps": _LPS,
    "right-anterior-superior": (1.0, 1.0, 1.0),
    "ras": (1.0, 1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0),
    "las": (-1.0, 1.0, 1.0),
}
"""Factors that turn a position into RAS."""
_UNITS_MM = {
    "mm": 1.0,
    "millimeter": 1.0,
    "millimetre": 1.0,
    "cm": 10.0,
    "centimeter": 10.0,
    "centimetre": 10.0,
    "m": 1000.0,
    "meter": 1000.0,
    "metre": 1000.0,
    "um": 0.001,
    "µm": 0.001,
    "micron": 0.001,
    "micrometer": 0.001,
    "micrometre": 0.001,
    "": 1.0,
    "?": 1.0,
    "???": 1.0,
}
"""Unknown units are millimetres, as most writers leave them unknown."""
_NRRD_TYPES = {
    "i1": "signed char|int8|int8_t",
    "u1": "uchar|unsigned char|uint8|uint8_t",
    "i2": "short|short int|signed short|signed short int|int16|int16_t",
    "u2": "ushort|unsigned short|unsigned short int|uint16|uint16_t",
    "i4": "int|signed int|int32|int32_t",
    "u4": "uint|unsigned int|uint32|uint32_t",
    "f4": "float",
    "f8": "double",
}
_METAIMAGE_TYPES = {
    "i1": "MET_CHAR",
    "u1": "MET_UCHAR",
    "i2": "MET_SHORT",
    "u2": "MET_USHORT",
    "i4": "MET_INT|MET_LONG",  # MetaIO: a long has four bytes
    "u4": "MET_UINT|MET_ULONG",
    "f4": "MET_FLOAT",
    "f8": "MET_DOUBLE",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TextHeader:
    """What a NRRD or MetaImage header says."""

    shape: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]
    """From voxel (i, j, k) to RAS mm; the identity where there are fewer than three axes."""
    dtype: np.dtype
    packed: bool
    """Deflated, with or without a gzip header."""
    data: str
    """The source that holds the voxels."""
    start: int | None
    """Its byte at which they begin; None if they are what it ends with."""

    @property
    def claimed_bytes(self) -> int:
        """Of all voxels, unpacked."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_text_header(stream: BufferedIOBase, file: str) -> TextHeader:
    """Read the header of a NRRD or MetaImage file.

    Args:
        stream: The file from its start.
        file: Its name, which tells the format and where its voxels may be.

    Raises:
        ScanError: If its voxels are of a kind or at a place that is not read.
        LookupError: If a field is missing.
        ValueError: If a field is malformed.
    """
    if format_of(file) == "nrrd":
        return _nrrd(dict(_nrrd_fields(stream)), file, stream.tell())
    return _metaimage(dict(_metaimage_fields(stream)), file, stream.tell())


def _lines(stream: BufferedIOBase) -> Iterator[str]:
    while stream.tell() < MAX_HEADER_BYTES and (line := stream.readline(MAX_HEADER_BYTES)):
        yield line.decode("latin-1").rstrip()


def _nrrd_fields(stream: BufferedIOBase) -> Iterator[tuple[str, str]]:
    lines = _lines(stream)
    if not next(lines, "").startswith("NRRD000"):
        raise ValueError("no NRRD")
    for line in lines:
        if not line:
            return
        name, _, value = line.partition(":")
        if not line.startswith("#") and not value.startswith("="):
            yield name.lower().replace(" ", ""), value.strip()


def _nrrd(fields: Mapping[str, str], file: str, end: int) -> TextHeader:
    sizes = _wholes(fields["sizes"])
    if int(fields["dimension"]) != len(sizes):
        raise ValueError("sizes for another number of dimensions")
    shape, affine = (sizes, np.eye(4)) if len(sizes) < 3 else _nrrd_geometry(fields, sizes)
    encoding = fields["encoding"].lower()
    skip = int(fields.get("byteskip", "0"))
    packed = encoding in ("gzip", "gz")
    if not (packed or encoding == "raw") or (packed and skip) or int(fields.get("lineskip", "0")):
        raise _unsupported("voxels that are neither raw nor gzip, or that follow something else")
    name = fields.get("datafile")
    return TextHeader(
        shape=shape,
        affine=affine,
        dtype=_dtype(_NRRD_TYPES, fields["type"].lower(), big=fields.get("endian") == "big"),
        packed=packed,
        data=file if name is None else _beside(file, name),
        start=None if skip == -1 else _whole(skip) + (end if name is None else 0),
    )


def _nrrd_geometry(
    fields: Mapping[str, str], sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], Float[np.ndarray, "4 4"]]:
    to_ras = _SPACES.get(fields.get("space", "").lower())
    if to_ras is None or "spacedirections" not in fields:
        detail = "neither `space` nor `space directions` says where the voxels lie"
        raise ScanError(Reason.BAD_GEOMETRY, detail)
    vectors = re.findall(r"none|\([^()]*\)", fields["spacedirections"])
    others = [size for size, vector in zip(sizes, vectors, strict=True) if vector == "none"]
    if others[:1] > [1] and vectors[0] == "none":
        raise ScanError(Reason.COLOUR, "several values a voxel")
    if max(others, default=1) > 1:
        raise _unsupported(f"{len(sizes)} dimensions, where a scan has three")
    affine = np.eye(4)
    columns = [vector for vector in vectors if vector != "none"]
    affine[:3, :3] = np.transpose([_reals(vector.strip("()"), 3) for vector in columns])
    affine[:3, 3] = _reals(fields.get("spaceorigin", "(0,0,0)").strip("()"), 3)
    units = re.findall('"([^"]*)"', fields.get("spaceunits", "")) or ["mm"] * 3
    affine[:3] *= np.array(to_ras)[:, None] * np.reshape([_unit_mm(unit) for unit in units], (3, 1))
    return tuple(n for n, vector in zip(sizes, vectors, strict=True) if vector != "none"), affine


def _metaimage_fields(stream: BufferedIOBase) -> Iterator[tuple[str, str]]:
    for line in _lines(stream):
        name, _, value = line.partition("=")
        yield name.strip(), value.strip()
        if name.strip() == "ElementDataFile":
            return


def _metaimage(fields: Mapping[str, str], file: str, end: int) -> TextHeader:
    sizes = _wholes(fields["DimSize"])
    if int(fields["NDims"]) != len(sizes):
        raise ValueError("sizes for another number of dimensions")
    if int(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise ScanError(Reason.COLOUR, "several values a voxel")
    if not _is_true(fields.get("BinaryData", "True")):
        raise _unsupported("voxels that are written as text")
    big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))
    name = fields["ElementDataFile"]
    local = name.upper() == "LOCAL"
    skip = int(fields.get("HeaderSize", "0"))
    return TextHeader(
        shape=sizes,
        affine=np.eye(4) if len(sizes) < 3 else _metaimage_affine(fields, len(sizes)),
        dtype=_dtype(_METAIMAGE_TYPES, fields["ElementType"], big=_is_true(big)),
        packed=_is_true(fields.get("CompressedData", "False")),
        data=file if local else _beside(file, name),
        start=None if skip == -1 else _whole(skip) + (end if local else 0),
    )


def _metaimage_affine(fields: Mapping[str, str], n: int) -> Float[np.ndarray, "4 4"]:
    eye, ones, zeros = " ".join(map(str, np.eye(n).ravel())), "1 " * n, "0 " * n
    turn = _first_of(fields, "TransformMatrix", "Rotation", "Orientation", missing=eye)
    spacing_mm = _first_of(fields, "ElementSpacing", "ElementSize", missing=ones)
    origin_mm = _first_of(fields, "Offset", "Position", "Origin", missing=zeros)
    steps = np.reshape(_reals(turn, n * n), (n, n)) * np.reshape(_reals(spacing_mm, n), (n, 1))
    affine = np.eye(4)
    affine[:3, :3] = steps[:3, :3].T
    affine[:3, 3] = _reals(origin_mm, n)[:3]
    affine[:3] *= np.array(_LPS)[:, None] * _unit_mm(fields.get("DistanceUnits", "mm"))
    return affine


def _first_of(fields: Mapping[str, str], *names: str, missing: str) -> str:
    return next((fields[name] for name in names if name in fields), missing)


def _unit_mm(name: str) -> float:
    if (unit_mm := _UNITS_MM.get(name.strip().lower().removesuffix("s"))) is None:
        raise ScanError(Reason.BAD_GEOMETRY, "a unit of length that is not known: write it in mm")
    return unit_mm


def _dtype(types: Mapping[str, str], name: str, *, big: bool) -> np.dtype:
    for code, names in types.items():
        if name in names.split("|"):
            return np.dtype(code).newbyteorder(">" if big else "<")
    raise _unsupported("voxels that are not plain numbers")


def _beside(file: str, name: str) -> str:
    """The source of a data file: of the folder of its header, and no other."""
    if re.search(r"[/\\%]|::|^LIST\b|^$", name):
        raise _unsupported("its voxels are in several files, or in another folder")
    data = folder_of(file) + name
    if split_member(data)[1] is None and not os.path.isfile(data):
        raise ScanError(Reason.UNREADABLE, "the file with its voxels is not beside its header")
    return data


def _unsupported(what: str) -> ScanError:
    return ScanError(Reason.UNSUPPORTED_ENCODING, f"{what}: write it as one plain file")


def _is_true(value: str) -> bool:
    return value[:1] in ("T", "t", "1")


def _whole(number: int) -> int:
    if number < 0:
        raise ValueError("a negative number")
    return number


def _wholes(text: str) -> tuple[int, ...]:
    numbers = tuple(_whole(int(word)) for word in text.split())
    if len(numbers) > MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    return numbers


def _reals(text: str, count: int) -> tuple[float, ...]:
    numbers = tuple(float(word) for word in text.replace(",", " ").split())
    if len(numbers) != count:
        raise ValueError("another number of values")
    return numbers
