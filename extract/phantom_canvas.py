"""The canvas of the synthetic head: sample points, what is known of them, and ways to fill shapes.

Every edge is a ramp as wide as a pixel, which is the mean over that width: a layer thinner than a
pixel keeps its weight. Shapes touch only the box of points around them, which is where the speed
comes from.

Axes: z slices, y rows, x columns of the lattice.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Float64

Field: TypeAlias = Float32[np.ndarray, "z y x"]
Point: TypeAlias = tuple[float, float, float]
Samples: TypeAlias = Float32[np.ndarray, "..."]
Box: TypeAlias = tuple[slice, slice, slice]

_STEP_MM = 0.125
_START_MM = -6.0
_STOP_MM = 24.0
"""Of the table of layers; no layer starts outside."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lattice:
    """Evenly spaced sample points: `origin_mm + z * step 0 + y * step 1 + x * step 2`."""

    origin_mm: Float64[np.ndarray, "3"]
    steps_mm: Float64[np.ndarray, "3 3"]
    """A row each: from slice to slice, from row to row, from column to column."""
    shape: tuple[int, int, int]

    def scaled(self, factors: Sequence[float]) -> "Lattice":
        """The same points with each coordinate multiplied."""
        by = np.array(factors)
        return replace(self, origin_mm=self.origin_mm * by, steps_mm=self.steps_mm * by)

    def part(self, box: Box) -> "Lattice":
        """The points of a box of indices."""
        start = np.array([axis.start for axis in box], np.float64)
        z, y, x = (axis.stop - axis.start for axis in box)
        return replace(self, origin_mm=self.origin_mm + start @ self.steps_mm, shape=(z, y, x))

    def box(self, low_mm: Point, high_mm: Point) -> Box | None:
        """The smallest box of indices with every point between two corners; None if empty."""
        low, high = np.array(low_mm), np.array(high_mm)
        to_index = _inverse(self.steps_mm.tobytes())
        middle = ((low + high) / 2 - self.origin_mm) @ to_index
        reach = (high - low) / 2 @ np.abs(to_index)
        start = np.maximum(np.ceil(middle - reach), 0).astype(int).tolist()
        stop = np.minimum(np.floor(middle + reach) + 1, self.shape).astype(int).tolist()
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2])

    def coordinates(self) -> Iterator[Field]:
        """x, then y, then z of every point."""
        counts = [np.arange(n, dtype=np.float64) for n in self.shape]
        for axis in range(3):
            steps_mm = self.steps_mm[:, axis]
            z, y, x = (count * step for count, step in zip(counts, steps_mm, strict=True))
            plane = (y[:, None] + x).astype(np.float32)
            yield plane + (z + self.origin_mm[axis]).astype(np.float32)[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Ellipsoid:
    """A shape, in the coordinates of the canvas."""

    centre_mm: Point
    radii_mm: Point
    lean: tuple[float, float] = (0.0, 0.0)
    """How far the centre moves along x, and along z, per mm of y."""

    def mirrored(self) -> "Ellipsoid":
        """Its mirror image on the other side of the head."""
        (x, y, z), (lean_x, lean_z) = self.centre_mm, self.lean
        return replace(self, centre_mm=(-x, y, z), lean=(-lean_x, lean_z))

    @property
    def half_mm(self) -> float:
        """Half of its mean radius (the harmonic mean)."""
        rx, ry, rz = self.radii_mm
        return 1.5 / (1 / rx + 1 / ry + 1 / rz)

    def grown(self, by_mm: float) -> "Ellipsoid":
        """The similar one where `Canvas.reach` is this much below zero."""
        factor = math.sqrt(1 + by_mm / self.half_mm)
        rx, ry, rz = (radius * factor for radius in self.radii_mm)
        return replace(self, radii_mm=(rx, ry, rz))

    @property
    def corners(self) -> tuple[Point, Point]:
        """Of the box around it."""
        (x, y, z), (rx, ry, rz), (lean_x, lean_z) = self.centre_mm, self.radii_mm, self.lean
        rx, rz = math.hypot(rx, lean_x * ry), math.hypot(rz, lean_z * ry)
        return (x - rx, y - ry, z - rz), (x + rx, y + ry, z + rz)


@dataclass(kw_only=True, eq=False)
class Canvas:
    """What is known of the points of a lattice while they are painted; a view shares its arrays."""

    lattice: Lattice
    edge_mm: float
    """Width of a soft edge."""
    slack_mm: float = 0.0
    """How far `x` may be from the lattice's own."""
    x: Field
    """Where a midline shift pushes, the coordinate of the tissue that came here."""
    y: Field
    z: Field
    hu: Field
    depth: Field
    """Below the scalp, mm; the skull base counts as skull."""
    inside: Field
    """Share of the point within the inner table."""
    cistern: Field
    """Share of cerebrospinal fluid around the brain."""
    ventricle: Field
    """Share of ventricle."""

    @classmethod
    def blank(cls, lattice: Lattice, *, edge_mm: float) -> "Canvas":
        """Coordinates, and nothing painted yet."""
        x, y, z = lattice.coordinates()
        hu, depth, inside, cistern, ventricle = np.zeros((5, *lattice.shape), np.float32)
        return cls(
            lattice=lattice,
            edge_mm=edge_mm,
            x=x,
            y=y,
            z=z,
            hu=hu,
            depth=depth,
            inside=inside,
            cistern=cistern,
            ventricle=ventricle,
        )

    def within(self, corners: tuple[Point, Point]) -> "Canvas | None":
        """A view of the points around a box; None if there are none."""
        (x0, y0, z0), (x1, y1, z1) = corners
        slack = self.slack_mm
        box = self.lattice.box((x0 - slack, y0, z0), (x1 + slack, y1, z1))
        if box is None:
            return None
        return Canvas(
            lattice=self.lattice.part(box),
            edge_mm=self.edge_mm,
            slack_mm=self.slack_mm,
            x=self.x[box],
            y=self.y[box],
            z=self.z[box],
            hu=self.hu[box],
            depth=self.depth[box],
            inside=self.inside[box],
            cistern=self.cistern[box],
            ventricle=self.ventricle[box],
        )

    def around(self, shape: Ellipsoid, *, margin_mm: float = 0.0) -> "Canvas | None":
        """A view of the points where a shape reaches, soft edge included; None if none."""
        return self.within(shape.grown(margin_mm + self.edge_mm / 2).corners)

    def soft(self, signed_mm: Samples) -> Samples:
        """Share of each point on the positive side of an edge, from the distance to it."""
        share = signed_mm * np.float32(1 / self.edge_mm)
        share += np.float32(0.5)
        return np.clip(share, np.float32(0), np.float32(1), out=share)

    def reach(self, shape: Ellipsoid) -> Field:
        """About the distance to the surface of a shape, positive inside."""
        (cx, cy, cz), (rx, ry, rz) = shape.centre_mm, shape.radii_mm
        lean_x, lean_z = shape.lean
        x, y, z = self.x - np.float32(cx), self.y - np.float32(cy), self.z - np.float32(cz)
        if lean_x:
            x -= np.float32(lean_x) * y
        if lean_z:
            z -= np.float32(lean_z) * y
        # (1 - q²) / 2 is 1 - q near the surface, which is where it matters.
        half_mm = shape.half_mm
        for axis, radius in ((x, rx), (y, ry), (z, rz)):
            np.square(axis, out=axis)
            axis *= np.float32(-half_mm / radius**2)
        x += y
        x += z
        x += np.float32(half_mm)
        return x

    def fill(self, hu: float | Field, share: Field) -> None:
        """Replace a share of every point."""
        self.hu += share * (hu - self.hu)

    def fill_shape(self, shape: Ellipsoid, hu: float) -> None:
        """Replace what lies in a shape."""
        view = self.around(shape)
        if view is not None:
            view.fill(hu, view.soft(view.reach(shape)))

    def layers(self, depth: Field, layers: Sequence[tuple[float, float]]) -> Field:
        """HU at each depth, averaged over an edge, of layers given as (HU, depth of their end)."""
        at = np.arange(_START_MM, _STOP_MM, _STEP_MM)
        table = np.full(at.shape, layers[0][0])
        for (above, end), (below, _) in pairwise(layers):
            table += (below - above) * np.clip((at - end) / self.edge_mm + 0.5, 0.0, 1.0)
        index = depth * np.float32(1 / _STEP_MM)
        index -= np.float32(_START_MM / _STEP_MM - 0.5)
        return table.astype(np.float32).take(index.astype(np.intp), mode="clip")


@lru_cache(maxsize=8)
def _inverse(steps_mm: bytes) -> Float64[np.ndarray, "3 3"]:
    # Hundreds of boxes of one lattice are asked for.
    inverse: Float64[np.ndarray, "3 3"] = np.linalg.inv(np.frombuffer(steps_mm).reshape(3, 3))
    return inverse
