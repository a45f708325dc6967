"""One lesion of each finding, drawn: where findings lie, how large they are, and their HU.

Places and sizes are those of textbooks, in millimetres of the reference head.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypedDict

import numpy as np
from numpy.random import Generator

from ctfm.extract.phantom import Lesion
from ctfm.extract.phantom_anatomy import Anatomy, Shift, surface_point
from ctfm.extract.phantom_brain import ventricle_shapes
from ctfm.extract.phantom_canvas import Ellipsoid, Point
from ctfm.extract.phantom_lesions import (
    LUCENT_MM,
    CisternBlood,
    Crescent,
    Fracture,
    Infarct,
    Lens,
    Mass,
    MidlineShift,
    ScalpSwelling,
    VentricleBlood,
    WideVentricles,
)

SHIFT_LABEL_MM = 5.0
"""A smaller shift of the midline is not called one."""

_LOBES: tuple[Point, ...] = ((30, 42, -52), (36, -28, -46), (27, -58, -62), (44, 2, -97))
_TERRITORIES = (
    Ellipsoid(centre_mm=(44, 2, -66), radii_mm=(21, 34, 26)),  # middle cerebral artery
    Ellipsoid(centre_mm=(44, 14, -50), radii_mm=(20, 24, 18)),  # its upper division
    Ellipsoid(centre_mm=(20, -62, -70), radii_mm=(17, 22, 16)),  # posterior
    Ellipsoid(centre_mm=(10, 40, -48), radii_mm=(9, 28, 24)),  # anterior
    Ellipsoid(centre_mm=(24, -52, -112), radii_mm=(21, 22, 12)),  # cerebellar
)


class _Where(TypedDict):
    z_min_mm: float
    z_max_mm: float


def _range(anatomy: Anatomy, low: float, high: float) -> _Where:
    """A z-range of the reference head as that of a head."""
    stretch = anatomy.stretch[2]
    return {"z_min_mm": (low - 0.5) * stretch, "z_max_mm": min(high + 0.5, 0) * stretch}


def _hull(anatomy: Anatomy, shapes: Sequence[Ellipsoid], *, margin_mm: float = 0) -> _Where:
    corners = [shape.grown(margin_mm).corners for shape in shapes]
    return _range(anatomy, min(low[2] for low, _ in corners), max(high[2] for _, high in corners))


def _lump(rng: Generator, centre_mm: Point, radius_mm: float, *, spread_mm: float = 4) -> Ellipsoid:
    x, y, z = (centre + rng.uniform(-spread_mm, spread_mm) for centre in centre_mm)
    rx, ry, rz = (radius_mm * rng.uniform(0.8, 1.2) for _ in range(3))
    return Ellipsoid(centre_mm=(x, y, z), radii_mm=(rx, ry, rz))


def _lobe(rng: Generator, side: int, *, large: bool) -> Point:
    x, y, z = _LOBES[rng.integers(3 if large else 4)]
    return side * x, y, z


def _scaled(shape: Ellipsoid, side: int, by: float) -> Ellipsoid:
    (x, y, z), (rx, ry, rz) = shape.centre_mm, shape.radii_mm
    return Ellipsoid(centre_mm=(side * x, y, z), radii_mm=(rx * by, ry * by, rz * by))


def _on_skull(rng: Generator, side: int, depth_mm: float) -> Point:
    """A point of the side of the dome, from forehead to occiput."""
    angle = rng.uniform(math.radians(-60), math.radians(65))
    direction = (side * math.cos(angle), math.sin(angle), rng.uniform(0.05, 0.75))
    return surface_point(direction, depth_mm=depth_mm)


def _draw_hemorrhage(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    kind, radius_mm = rng.random(), float(np.clip(rng.lognormal(2.55, 0.3), 7, 24))
    places: tuple[tuple[float, Point, float], ...] = (
        (0.40, (26 * side, 4, -76), 24),  # basal ganglia
        (0.80, _lobe(rng, side, large=large), 24),
        (0.88, (13 * side, -10, -78), 12),  # thalamus
        (0.96, (22 * side, -50, -110), 16),  # cerebellum
        (1.00, (3 * side, -10, -106), 9),  # pons
    )
    if large:
        kind, radius_mm = 0.8 * kind, max(radius_mm, 17) * rng.uniform(1.0, 1.25)
    _, centre_mm, most_mm = next(place for place in places if kind <= place[0])
    shape = _lump(rng, centre_mm, radius_mm if large else min(radius_mm, most_mm), spread_mm=3)
    edema_mm = rng.uniform(3, 7)
    return Mass(
        finding="intraparenchymal_hemorrhage",
        focal=True,
        **_hull(anatomy, [shape], margin_mm=edema_mm + 1.5),
        shapes=(shape,),
        hu=rng.uniform(58, 76),
        edema_mm=edema_mm,
        wobble_mm=1.5,
    )


def _draw_tumor(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    radius_mm = rng.uniform(19, 24) if large else rng.uniform(11, 19)
    shape = _lump(rng, _lobe(rng, side, large=large), radius_mm)
    edema_mm = rng.uniform(9, 15)
    return Mass(
        finding="intracranial_tumor",
        focal=True,
        **_hull(anatomy, [shape], margin_mm=edema_mm + 2.0),
        shapes=(shape,),
        hu=rng.uniform(42, 50),
        core_hu=rng.uniform(14, 20) if rng.random() < 0.6 else None,
        edema_mm=edema_mm,
        edema_hu=rng.uniform(16, 20),
        wobble_mm=2.0,
    )


def _draw_calcification(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    places: tuple[tuple[Point, bool], ...] = (
        ((22, 5, -76), True),  # basal ganglia
        ((24, -38, -70), True),  # choroid plexus
        ((0, -22, -80), False),  # pineal gland
        (_lobe(rng, side, large=False), False),
        ((0, 36, -36), False),  # falx
    )
    (x, y, z), paired = places[rng.integers(len(places))]
    radius_mm = float(np.clip(rng.lognormal(math.log(5.0), 0.25), 3, 8))
    shape = _lump(rng, (x, y, z), radius_mm, spread_mm=1.5)
    return Mass(
        finding="intracranial_calcification",
        focal=True,
        **_hull(anatomy, [shape]),
        shapes=(shape, shape.mirrored()) if paired else (shape,),
        hu=rng.uniform(250, 600),
    )


def _draw_acute_infarct(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    territory = _TERRITORIES[0 if large else rng.integers(len(_TERRITORIES))]
    shape = _scaled(territory, side, rng.uniform(1.1, 1.25) if large else rng.uniform(0.85, 1.1))
    return Infarct(
        finding="acute_infarct",
        focal=True,
        **_hull(anatomy, [shape]),
        shape=shape,
        change_hu=-rng.uniform(6, 10),
    )


def _draw_chronic_infarct(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    territory = _TERRITORIES[rng.integers(len(_TERRITORIES))]
    shape = _scaled(territory, side, rng.uniform(0.65, 1.0))
    return Infarct(
        finding="chronic_infarct",
        focal=True,
        **_hull(anatomy, [shape]),
        shape=shape,
        scar_hu=rng.uniform(7, 13),
    )


def _draw_subdural(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    z_mm, half_z_mm = rng.uniform(-56, -48), rng.uniform(29, 38)
    top_mm = -anatomy.inner_mm
    return Crescent(
        finding="subdural_hematoma",
        focal=True,
        **_range(anatomy, z_mm - half_z_mm, min(z_mm + half_z_mm, top_mm)),
        side=side,
        y_mm=rng.uniform(-15, 20),
        z_mm=z_mm,
        half_y_mm=rng.uniform(50, 75),
        half_z_mm=half_z_mm,
        thick_mm=rng.uniform(14, 20) if large else rng.uniform(5, 12),
        hu=rng.uniform(55, 75),
    )


def _draw_epidural(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    centre_mm = _on_skull(rng, side, anatomy.inner_mm)
    radius_mm = rng.uniform(34, 40) if large else rng.uniform(24, 33)
    return Lens(
        finding="epidural_hematoma",
        focal=True,
        **_range(
            anatomy,
            centre_mm[2] - radius_mm,
            min(centre_mm[2] + radius_mm, -anatomy.inner_mm),
        ),
        centre_mm=centre_mm,
        radius_mm=radius_mm,
        thick_mm=rng.uniform(22, 28) if large else rng.uniform(11, 20),
        hu=rng.uniform(58, 76),
    )


def _draw_subarachnoid(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    basal = Ellipsoid(centre_mm=(0, 6, -90), radii_mm=(66, 40, 24))
    one_side = Ellipsoid(
        centre_mm=(44 * side, rng.uniform(-20, 25), rng.uniform(-62, -48)), radii_mm=(34, 42, 26)
    )
    region = basal if rng.random() < 0.6 else one_side
    return CisternBlood(
        finding="subarachnoid_hemorrhage",
        focal=True,
        **_hull(anatomy, [region]),
        region=region,
        hu=rng.uniform(58, 72),
        density=rng.uniform(0.85, 1.0),
    )


def _draw_intraventricular(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    shapes = ventricle_shapes(anatomy)
    right, left, middle = shapes[:5], shapes[5:10], shapes[10:]
    own = right if side > 0 else left
    kind = rng.random()
    if kind < 0.5:  # settled in both atria and occipital horns
        chosen, level_y_mm = [*right[2:4], *left[2:4]], rng.uniform(-42, -34)
    elif kind < 0.8:  # a cast of one lateral ventricle
        chosen, level_y_mm = own[:4], 100.0
    else:
        chosen, level_y_mm = [*middle, *own[2:4]], 100.0
    return VentricleBlood(
        finding="intraventricular_hemorrhage",
        focal=True,
        **_hull(anatomy, chosen),
        shapes=tuple(chosen),
        level_y_mm=level_y_mm,
        hu=rng.uniform(58, 75),
    )


def _draw_hydrocephalus(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    ventricles = rng.uniform(1.9, 2.5)
    wide = ventricle_shapes(replace(anatomy, ventricles=ventricles))
    return WideVentricles(
        finding="hydrocephalus",
        focal=False,
        **_hull(anatomy, wide, margin_mm=LUCENT_MM),
        ventricles=ventricles,
    )


def _draw_fracture(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    centre_mm = _on_skull(rng, side, anatomy.scalp_mm + anatomy.skull_mm / 2)
    outwards = np.array(centre_mm) - (0, 0, centre_mm[2])
    outwards /= np.linalg.norm(outwards)
    along = np.cross((0, 0, 1), outwards)
    # The line runs within 50 degrees of the vertical: a level one hides between thick slices.
    angle = math.radians(rng.uniform(-50, 50))
    nx, ny, nz = (math.cos(angle) * along + math.sin(angle) * np.array((0, 0, 1))).tolist()
    half_length_mm = rng.uniform(22, 40)
    return Fracture(
        finding="skull_fracture",
        focal=True,
        **_range(anatomy, centre_mm[2] - half_length_mm, centre_mm[2] + half_length_mm),
        centre_mm=centre_mm,
        half_length_mm=half_length_mm,
        normal=(nx, ny, nz),
        gap_mm=rng.uniform(1.8, 3.5),
        step_mm=rng.uniform(4, 8) if rng.random() < 0.4 else 0.0,
    )


def _draw_pneumocephalus(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    direction = (0.3 * side, 1.0, rng.uniform(0.15, 0.7))
    centre_mm = surface_point(direction, depth_mm=anatomy.inner_mm)
    radius_mm = rng.uniform(18, 32)
    x, y, z = centre_mm
    bubbles = [
        _lump(rng, (x + rng.uniform(-15, 15), y - rng.uniform(12, 30), z), rng.uniform(1.5, 3.5))
        for _ in range(rng.integers(1, 5))
    ]
    return Lens(
        finding="pneumocephalus",
        focal=True,
        **_range(anatomy, z - radius_mm, min(z + radius_mm, -anatomy.inner_mm)),
        centre_mm=centre_mm,
        radius_mm=radius_mm,
        thick_mm=rng.uniform(4, 11),
        hu=-1000.0,
        bubbles=tuple(bubbles),
    )


def _draw_scalp_hematoma(rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
    centre_mm = _on_skull(rng, side, 0.0)
    radius_mm = rng.uniform(24, 40)
    return ScalpSwelling(
        finding="scalp_hematoma",
        focal=True,
        **_range(anatomy, centre_mm[2] - radius_mm, centre_mm[2] + radius_mm),
        centre_mm=centre_mm,
        radius_mm=radius_mm,
        thick_mm=rng.uniform(6, 14),
        hu=rng.uniform(52, 66),
    )


def draw_shift(rng: Generator, anatomy: Anatomy, *, away_from: int, called: bool) -> Lesion:
    """Draw a shift to the other side, of `SHIFT_LABEL_MM` at least if it is called one."""
    amount_mm = rng.uniform(SHIFT_LABEL_MM, 13) if called else rng.uniform(0, 3.5)
    shift = Shift(amount_mm=-away_from * amount_mm, y_mm=rng.uniform(0, 12), z_mm=-70)
    return MidlineShift(
        finding="midline_shift" if called else None,
        focal=False,
        **_range(anatomy, shift.z_mm - shift.half_z_mm, shift.z_mm + shift.half_z_mm),
        shift=shift,
    )


class Draw(Protocol):
    """Draws the lesion of one finding."""

    def __call__(self, rng: Generator, anatomy: Anatomy, *, side: int, large: bool) -> Lesion:
        """Draw it.

        Args:
            rng: Of this lesion alone.
            anatomy: The head, with the form that lesions before gave it.
            side: Of the head, where it has one; 1 is the patient's right.
            large: Large enough to shift the midline.
        """


DRAW: dict[str, Draw] = {
    "hydrocephalus": _draw_hydrocephalus,
    "chronic_infarct": _draw_chronic_infarct,
    "acute_infarct": _draw_acute_infarct,
    "intracranial_tumor": _draw_tumor,
    "intraparenchymal_hemorrhage": _draw_hemorrhage,
    "intraventricular_hemorrhage": _draw_intraventricular,
    "subarachnoid_hemorrhage": _draw_subarachnoid,
    "subdural_hematoma": _draw_subdural,
    "epidural_hematoma": _draw_epidural,
    "intracranial_calcification": _draw_calcification,
    "pneumocephalus": _draw_pneumocephalus,
    "skull_fracture": _draw_fracture,
    "scalp_hematoma": _draw_scalp_hematoma,
}
"""In the order of painting; the midline shift is drawn by `draw_shift`."""
