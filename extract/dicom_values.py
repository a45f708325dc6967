"""DICOM values: from the elements of a parsed header, to plain Python values.

A header may hold anything: a missing value and a malformed one are the same here (None, "" or what
the caller says), and nothing raises. DICOM's LPS becomes RAS.
"""

import math
import struct
from collections.abc import MutableSequence
from functools import cache
from typing import Any

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

_BINARY = {
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
}
"""Stored as an integer of two bytes, not as text; read without regard to its sign."""
MAX_VALUE_BYTES = 1 << 16
"""Of an element that is no sequence; a longer one is malformed."""
_tag = cache(Tag)


def value_of(dataset: Dataset, keyword: str) -> Any:
    """A value, or None if it is missing or malformed.

    The values of a plain file are taken from their bytes, which halves the time of an index:
    pydicom would check and convert each of them.
    """
    try:
        tag = _tag(keyword)
        if tag not in dataset:  # cheaper than the error that asking for it would raise
            return None
        element = dataset.get_item(tag, keep_deferred=True)
        if not isinstance(element, RawDataElement) or element.length == 0:
            return dataset.get(keyword)
        if element.value is None:  # so long that it was skipped
            return None
        if keyword in _BINARY:
            little = element.is_little_endian
            return int.from_bytes(element.value[:2], "little" if little else "big")
        if keyword.endswith("Sequence"):
            return dataset.get(keyword)
        if len(element.value) > MAX_VALUE_BYTES:
            return None
        if not element.value.isascii():
            return dataset.get(keyword)
        values = [value.strip(" \0") for value in element.value.decode("ascii").split("\\")]
        return values[0] if len(values) == 1 else values
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, struct.error):
        return None


def items_of(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none if it is missing, or if `keyword` is empty."""
    value = value_of(dataset, keyword) if keyword else None
    return list(value) if isinstance(value, Sequence) else []


def as_text(value: Any) -> str:
    """Without padding; "" for a missing value."""
    if isinstance(value, MutableSequence):
        return "\\".join(map(as_text, value))
    return "" if value is None else str(value).strip(" \0\t\r\n")


def as_texts(value: Any) -> tuple[str, ...]:
    """Every value that is not empty."""
    values = value if isinstance(value, MutableSequence) else [value]
    return tuple(text for item in values if (text := as_text(item)))


def as_whole(value: Any) -> int | None:
    """An integer of 32 bits; None where it is missing or malformed."""
    try:
        number = int(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return number if abs(number) < 1 << 31 else None


def _numbers(value: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(item) for item in ([value] if isinstance(value, str) else value))
    except (ValueError, TypeError, OverflowError):
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def as_number(value: Any, *, missing: float) -> float:
    """A finite number, or `missing`."""
    return (*_numbers([value]), missing)[0]


def as_pair(value: Any) -> tuple[float, float] | None:
    """Two finite numbers."""
    numbers = _numbers(value)
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def as_position(value: Any) -> tuple[float, float, float] | None:
    """A position in LPS mm, turned to RAS."""
    numbers = _numbers(value)
    return (-numbers[0], -numbers[1], numbers[2]) if len(numbers) == 3 else None


def as_axes(value: Any) -> tuple[float, ...] | None:
    """Two unit vectors in LPS, turned to RAS."""
    along_row, along_column = _numbers(value)[:3], _numbers(value)[3:]
    lengths = (math.hypot(*along_row), math.hypot(*along_column))
    if len(along_column) != 3 or not all(abs(length - 1) < 0.01 for length in lengths):
        return None
    x, y, z = along_row
    u, v, w = along_column
    return (-x, -y, z, -u, -v, w)
