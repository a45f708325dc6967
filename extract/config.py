"""What decides the bytes of an embedding, apart from the weights."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ctfm.store.errors import ConfigError

PAPER_WINDOWS_HU = ((0.0, 80.0), (-20.0, 180.0), (-800.0, 2000.0))
"""Brain, subdural and bone windows of Sec. 3.1 of the paper, as (low, high)."""

Alignment = Literal["head", "none"]
StoredType = Literal["float16", "bfloat16", "float32"]
Precision = Literal["float32", "bfloat16"]

PREPROCESSING_VERSION = 3
"""Raised whenever reading, alignment, resampling or windowing gives other numbers than before."""


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
        for low, high in self.windows_hu:
            if not low < high:
                raise ConfigError(f"a window must be LOW:HIGH with LOW < HIGH, got {low}:{high}")
        for name in ("in_plane_mm", "slice_mm", "size_px", "max_slices", "views"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
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

    def preparation(self) -> tuple[object, ...]:
        """What decides a prepared scan: two configs in which it is equal can share the reading."""
        grid = (self.in_plane_mm, self.slice_mm, self.size_px, self.max_slices)
        return (self.align, self.template, *grid, self.views, self.seed)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` turns it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExtractConfig":
        """Rebuild a config from what `as_dict` gave, after a trip through JSON or TOML."""
        windows = tuple((low, high) for low, high in values["windows_hu"])
        return cls(**{**values, "windows_hu": windows, "tokens": tuple(values["tokens"])})
