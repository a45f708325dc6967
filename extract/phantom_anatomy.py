"""The anatomy of a synthetic head: what one patient's head is like, and the form of its skull.

Shapes are in millimetres of a reference head of half axes `REFERENCE_MM`; a patient's head is that
one stretched along x, y and z. Origin and axes are those of the head frame.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy.random import Generator

from ctfm.extract.phantom_canvas import Point, Samples

REFERENCE_MM: Point = (74.0, 93.0, 88.0)
"""Half width, half length and height of the reference head, scalp included."""

Wave = tuple[float, float, float, float]
"""x, y and z in radians per mm, and a phase."""

_HALF_MM: Point = (74.0, 94.0, 75.0)
"""Half axes of the reference dome, an ellipsoid: across, long, short."""
_TIP_RAD = math.radians(17.5)
"""How far its long axis points down at the front. With taper and lower half, the whole skull is
then tipped as real ones are in the head frame (`ctfm.extract.dome.DOME_PITCH_DEG`)."""
_COS, _SIN = math.cos(_TIP_RAD), math.sin(_TIP_RAD)
_CENTRE_MM: Point = (0.0, 2.0, -math.hypot(_HALF_MM[1] * _SIN, _HALF_MM[2] * _COS))
"""Its top is at z = 0."""
_BELOW = 1.44
"""The skull reaches this much farther below its long axis than above it."""
_TAPER = 0.07
"""How much narrower than the middle the forehead is."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """The midline pushed sideways, most of all at one place."""

    amount_mm: float
    """To the patient's right if positive."""
    y_mm: float
    z_mm: float
    half_y_mm: float = 75.0
    half_z_mm: float = 46.0
    """Where it has faded to nothing."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One patient's head."""

    half_axes_mm: Point
    """Half width, half length, and height of the head as `REFERENCE_MM` means it."""
    scalp_mm: float
    skull_mm: float
    csf_mm: float
    """Between skull and brain."""
    sulcus_mm: float
    """Half the width of a sulcus at its mouth."""
    ventricles: float
    """Width of the ventricles; 1 is that of a young adult."""
    grey_hu: float
    white_hu: float
    csf_hu: float
    folds: tuple[Wave, ...]
    """Their sum is zero along the sulci."""
    texture: tuple[Wave, ...]
    """Slow waves that make the brain uneven."""
    texture_hu: float = 0.7
    """Their height; with 0 the head is its own mirror image."""
    shift: Shift | None = None

    @property
    def stretch(self) -> Point:
        """Of the reference head, along x, y and z."""
        (a, b, c), (reference_a, reference_b, reference_c) = self.half_axes_mm, REFERENCE_MM
        return a / reference_a, b / reference_b, c / reference_c

    @property
    def inner_mm(self) -> float:
        """Depth of the inner table."""
        return self.scalp_mm + self.skull_mm


def draw_anatomy(rng: Generator) -> Anatomy:
    """Draw a head: its size, the thickness of its layers, its age (ventricles and sulci), folds."""
    age, uniform = float(rng.beta(2.0, 2.0)), rng.uniform
    half_length_mm = uniform(88, 98)
    return Anatomy(
        # Height goes with length, or else the skull would tip.
        half_axes_mm=(uniform(70, 78), half_length_mm, half_length_mm * uniform(0.93, 0.97)),
        scalp_mm=uniform(5.5, 7.5),
        skull_mm=uniform(6.0, 9.0),
        csf_mm=0.8 + 1.8 * age + uniform(0, 0.5),
        sulcus_mm=0.6 + 1.0 * age + uniform(0, 0.3),
        ventricles=0.85 + 0.35 * age + uniform(0, 0.15),
        grey_hu=uniform(36.5, 39.5),
        white_hu=uniform(26.0, 29.0),
        csf_hu=uniform(4.0, 9.0),
        folds=tuple(_draw_wave(rng, length_mm=uniform(21, 29)) for _ in range(5)),
        texture=tuple(_draw_wave(rng, length_mm=uniform(40, 90)) for _ in range(2)),
    )


def _draw_wave(rng: Generator, *, length_mm: float) -> Wave:
    direction = rng.standard_normal(3)
    x, y, z = (direction * (2 * math.pi / length_mm / np.linalg.norm(direction))).tolist()
    return x, y, z, float(rng.uniform(0, 2 * math.pi))


def dome(x: Samples, y: Samples, z: Samples) -> tuple[Samples, Samples]:
    """Depth below the ellipsoid of the scalp to first order (mm), and the relative radius."""
    a, b, c = _HALF_MM
    forward, up = y - np.float32(_CENTRE_MM[1]), z - np.float32(_CENTRE_MM[2])
    v = forward * np.float32(_COS / b) - up * np.float32(_SIN / b)
    u = x / (np.float32(a) - np.float32(a * _TAPER) * v)
    w = up * np.float32(_COS / c) + forward * np.float32(_SIN / c)
    np.maximum(w, w * np.float32(1 / _BELOW), out=w)
    radius, gradient = np.full_like(u, 1e-6), np.full_like(u, 1e-10)
    for axis, half_mm in ((u, a), (v, b), (w, c)):
        np.square(axis, out=axis)
        radius += axis
        axis *= np.float32(1 / half_mm**2)
        gradient += axis
    depth = np.sqrt(np.divide(radius, gradient, out=gradient), out=gradient)
    np.sqrt(radius, out=radius)
    depth *= 1 - radius
    return depth, radius


def dome_reach_mm(anatomy: Anatomy, direction: Float64[np.ndarray, "3"]) -> float:
    """How far a head's dome reaches in a direction, from the origin of the head frame."""
    stretched = direction * anatomy.stretch
    across, forward, up = stretched.tolist()
    a, b, c = _HALF_MM
    short = up * _COS + forward * _SIN
    c *= 1.0 if short > 0 else _BELOW
    radius_mm = math.hypot(a * across, b * (forward * _COS - up * _SIN), c * short)
    return radius_mm + float(stretched @ _CENTRE_MM)


def skull_base_mm(ax: Samples, y: Samples) -> Samples:
    """Height of the skull base at |x| and y: fossae, petrous ridges, clivus, foramen magnum."""
    central = np.clip((20 - ax) * 0.125, 0, 1)
    beyond_ridge = y - ridge_y_mm(ax)
    front = np.clip((y - 26) * (1 / 12), 0, 1)
    back = np.clip(-beyond_ridge / (10 + 14 * central), 0, 1)
    base = 0.016 * (np.square(ax - 34) + np.square(y - 8)) - 117
    base += central * (-103 - base)
    orbital_roof = 8 * np.maximum(1 - np.square((ax - 31) * (1 / 26)), 0)
    base += front * (orbital_roof - 0.15 * (y - 60) - 96 - base)
    base += back * (0.006 * (np.square(ax) + np.square(y + 40)) - 135 - base)
    ridge = np.clip((62 - ax) * (1 / 16), 0, 1) - central
    base += 11 * np.maximum(1 - np.square(beyond_ridge * 0.1), 0) * np.maximum(ridge, 0)
    hole = 1 - np.square(ax * (1 / 16)) - np.square((y + 25) * (1 / 18))
    base -= 24 * np.clip(hole * 4, 0, 1)
    return np.asarray(base, np.float32)


def ridge_y_mm(ax: Samples) -> Samples:
    """Place along y of the petrous ridge, the border of middle and posterior fossa."""
    ridge: Samples = np.asarray(10 - 0.65 * ax, np.float32)
    return ridge


def surface_point(direction: Point, *, depth_mm: float) -> Point:
    """Where a ray from the middle of the reference head's dome has a depth below the scalp."""
    ray = np.array(direction) / np.linalg.norm(direction)
    points = np.array(_CENTRE_MM) + np.arange(150.0, 0.0, -0.25)[:, None] * ray
    x, y, z = points.T.astype(np.float32)
    x, y, z = points[int(np.argmax(dome(x, y, z)[0] >= depth_mm))].tolist()
    return x, y, z
