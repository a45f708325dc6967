"""What decides the bytes of an embedding, apart from the weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ctfm.store.errors import ConfigError

PAPER_WINDOWS_HU = ((0.0, 80.0), (-20.0, 180.0), (-800.0, 2000.0))
"""Brain, subdural and bone windows of Sec. 3.1 of the paper, as (low, high)."""

Alignment = Literal["head", "none"]
StoredType = Literal["float16", "bfloat16", "float32"]
Precision = Literal["float32", "bfloat16"]

PREPROCESSING_VERSION = 3
"""Raised whenever reading, alignment, resampling or windowing gives other numbers than before."""


_BOUNDS: dict[str, tuple[float, float]] = {
    "in_plane_mm": (0.01, 100),
    "slice_mm": (0.01, 1000),
    "size_px": (1, 4096),
    "max_slices": (1, 4096),
    "views": (1, 4096),
    "seed": (-(2**63), 2**63 - 1),
    "preprocessing": (1, PREPROCESSING_VERSION),
}
"""What no CT of any body region comes near to, and this machine can still hold: settings may be
someone else's."""

MOST_VOXELS = 1 << 30
"""Of a prepared scan, 2 bytes each."""

MOST_NAMED = 64
"""Windows, or tokens."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grid that scans are resampled to; a backbone may ask for another than the paper's."""

    in_plane_mm: float = 1.0
    """Pixel size (Sec. 3.1)."""

    slice_mm: float = 4.0
    """Distance, and thickness, of the slices (Sec. 3.1)."""

    size_px: int = 224
    """Rows and columns."""

    max_slices: int = 40
    """Most slices of a scan, counted down from the vertex."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Everything that decides the bytes of an embedding, and nothing that does not.

    Written to the attributes of every store, together with the digest of the weights. Device,
    workers and batch size change only the speed: they are arguments of `extract`.
    """

    backbone: str
    """Name as `ctfm models` lists it, or `timm:<name>`, `hf:<repository>`."""

    windows_hu: tuple[tuple[float, float], ...] = PAPER_WINDOWS_HU
    """(low, high) of each channel; a slice is clipped to it and scaled to 0..1 (Sec. 3.1)."""

    align: Alignment = "head"
    """`head`: rigidly to the standard head frame (or to `template`); `none`: the scanner's axes."""

    template: str | None = None
    """SHA-256 of the template volume that scans are registered to, in place of the head frame."""

    in_plane_mm: float = Grid.in_plane_mm
    """Pixel size of the grid (Sec. 3.1)."""

    slice_mm: float = Grid.slice_mm
    """Distance, and thickness, of the slices of the grid (Sec. 3.1)."""

    size_px: int = Grid.size_px
    """Rows and columns of the grid."""

    max_slices: int = Grid.max_slices
    """Most slices of a scan, counted down from the vertex."""

    tokens: tuple[str, ...] = ("cls",)
    """Which embeddings of a slice are kept."""

    dtype: StoredType = "float16"
    """Type of the stored embeddings."""

    precision: Precision = "float32"
    """Type in which the backbone computes."""

    views: int = 1
    """Copies of a scan: view 0 is the clean one, the others are augmented (Sec. 3.1)."""

    seed: int = 0
    """Of the augmentation; view v of a scan depends on (seed, scan_id, v) alone."""

    preprocessing: int = PREPROCESSING_VERSION
    """Version of the algorithm; not a choice."""

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("windows_hu", "tokens"):
            if not 1 <= len(getattr(self, name)) <= MOST_NAMED:
                raise ConfigError(f"{name} must be 1 to {MOST_NAMED}, got {getattr(self, name)!r}")
        for low, high in self.windows_hu:
            if not -math.inf < low < high < math.inf:
                raise ConfigError(f"a window must be LOW:HIGH with LOW < HIGH, got {low}:{high}")
        for name, choices in (
            ("align", Alignment),
            ("dtype", StoredType),
            ("precision", Precision),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        # JSON tells 0 from 0.0, and the fingerprint must not.
        windows = tuple((float(low), float(high)) for low, high in self.windows_hu)
        object.__setattr__(self, "windows_hu", windows)
        object.__setattr__(self, "in_plane_mm", float(self.in_plane_mm))
        object.__setattr__(self, "slice_mm", float(self.slice_mm))

    def _check_numbers(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        if self.max_slices * self.size_px**2 > MOST_VOXELS:
            raise ConfigError(
                f"a grid may have {MOST_VOXELS} voxels, got {self.max_slices} slices of "
                f"{self.size_px} x {self.size_px}: lower max_slices or size_px"
            )

    def preparation(self) -> tuple[object, ...]:
        """What decides a prepared scan: two configs in which it is equal can share the reading."""
        grid = (self.in_plane_mm, self.slice_mm, self.size_px, self.max_slices)
        return (self.align, self.template, *grid, self.views, self.seed)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` turns it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExtractConfig":
        """Rebuild a config from what `as_dict` gave, after a trip through JSON or TOML.

        Raises:
            ConfigError: If a setting is missing, of another type or out of its range.
        """
        for name in ("backbone", "windows_hu", "tokens"):
            if name not in values:
                raise ConfigError(f"the settings of an extraction have no {name}")
        kinds = {field.name: field.type for field in fields(cls)}
        for name, value in values.items():
            _check_type(name, value, kinds.get(name))
        windows = tuple((float(low), float(high)) for low, high in values["windows_hu"])
        return cls(**{**values, "windows_hu": windows, "tokens": tuple(values["tokens"])})


def _check_type(name: str, value: object, kind: object) -> None:
    """Refuse a value that came from a file and is of another type than the setting's."""
    if kind is float:
        right, what = _is_number(value), "a number"
    elif kind is int:
        right, what = type(value) is int, "a whole number"
    elif name == "windows_hu":
        right, what = _is_list_of(value, _is_pair), "pairs of LOW and HIGH"
    elif name == "tokens":
        right, what = _is_list_of(value, _is_text), "a list of names"
    else:
        right, what = _is_text(value) or (name == "template" and value is None), "text"
    if not right:
        raise ConfigError(f"{name} must be {what}, got {repr(value)[:80]}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_pair(value: object) -> bool:
    return _is_list_of(value, _is_number) and len(value) == 2  # type: ignore[arg-type]


def _is_list_of(value: object, is_one: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(is_one, value))
