"""A description: a small TOML file beside weights, to the facts about them that they cannot tell.

    size_px = [256, 256]                   # input (y, x), or (z, y, x) of a whole scan
    tokens = { cls = 768 }                 # name and width of each output, in their order
    windows_hu = [[0, 80], [-20, 180], [-800, 2000]]
    mean = [0.485, 0.456, 0.406]
    sd = [0.229, 0.224, 0.225]

The user writes it. A field may be left out where its default holds; one that is not known is an
error, so that a slip of the pen does not become a default.
"""

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctfm.extract.backbone import BackboneEntry
from ctfm.extract.config import Grid
from ctfm.store.errors import BackboneError


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _interpolation(value: Any) -> str:
    if value not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation must be bilinear or bicubic, got {value!r}")
    return str(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"true or false is needed, got {value!r}")
    return value


_PLAIN: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "tokens": ("tokens", lambda value: {str(name): int(width) for name, width in value.items()}),
    "windows_hu": (
        "native_windows_hu",
        lambda value: tuple((float(low), float(high)) for low, high in value),
    ),
    "size_px": ("size_px", lambda value: tuple(int(size) for size in value)),
    "mean": ("mean", _floats),
    "sd": ("sd", _floats),
    "interpolation": ("interpolation", _interpolation),
    "antialias": ("antialias", _flag),
    "pad_hu": ("pad_hu", float),
    "licence": ("licence", str),
}
"""Field of the file to the fact it states, and how its value is read."""

_SPACING = ("in_plane_mm", "slice_mm")
"""Of the grid of a backbone that takes whole scans."""

VOLUME = ("windows_hu", "size_px", "pad_hu", *_SPACING)
"""Fields that describe how a whole scan goes in."""

ALL = (*_PLAIN, *_SPACING)


def described(entry: BackboneEntry, file: Path, *, fields: Collection[str] = ALL) -> BackboneEntry:
    """The facts of an entry as a description has them.

    Args:
        entry: What holds where the file says nothing.
        file: TOML.
        fields: Which it may have.

    Raises:
        BackboneError: If it cannot be read, has a field that is not one of these, or a value that
            makes no sense.
    """
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
        if unknown := sorted(said.keys() - set(fields)):
            raise ValueError(f"unknown field {unknown[0]}, known are {', '.join(fields)}")
        facts = {fact: read(said[name]) for name, (fact, read) in _PLAIN.items() if name in said}
        return _with_grid(replace(entry, **facts), said)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise BackboneError(f"{file} does not describe {entry.name}: {error}") from error


def _with_grid(entry: BackboneEntry, said: Mapping[str, Any]) -> BackboneEntry:
    """With the unit that the size implies, the grid of a volume, and a channel a window."""
    size_px, channels = entry.size_px or (), len(entry.native_windows_hu or ())
    if len(size_px) == 2 and entry.unit == "slice":
        if spacing := sorted(said.keys() & set(_SPACING)):
            raise ValueError(f"{spacing[0]} is of whole scans, whose size_px is [z, y, x]")
        return _checked(replace(entry, channels=channels))
    if len(size_px) != 3:
        forms = "[z, y, x]" if entry.unit == "volume" else "[y, x], or [z, y, x] of a whole scan"
        raise ValueError(f"size_px must be {forms}, got {[*size_px]}")
    default = entry.grid or Grid()
    mm = {name: float(said.get(name, getattr(default, name))) for name in _SPACING}
    grid = Grid(**mm, size_px=max(size_px[1:]), max_slices=size_px[0])
    return _checked(replace(entry, unit="volume", grid=grid, channels=channels))


def _checked(entry: BackboneEntry) -> BackboneEntry:
    if not entry.tokens or min(entry.tokens.values()) < 1:
        raise ValueError("tokens must name each output and its width, such as { cls = 768 }")
    if min(entry.size_px or (0,)) < 1:
        raise ValueError(f"size_px must be positive, got {[*(entry.size_px or ())]}")
    if len(entry.mean) != len(entry.sd) or len(entry.mean) not in (0, entry.channels):
        raise ValueError(f"mean and sd need a number for each of the {entry.channels} windows")
    if not all(deviation > 0 for deviation in entry.sd):
        raise ValueError(f"sd must be positive, got {[*entry.sd]}")
    return entry
