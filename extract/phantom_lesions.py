"""The forms that lesions take in the synthetic head.

Each is painted over the finished head and follows its parts: blood keeps to the space that it is
in, an infarct to brain, a fracture to bone. Numbers are in millimetres of the reference head.

Axes: z slices, y rows, x columns of the lattice.
"""

from dataclasses import dataclass, replace

import numpy as np

from ctfm.extract.phantom import Lesion
from ctfm.extract.phantom_anatomy import Anatomy, Shift
from ctfm.extract.phantom_brain import ventricle_shapes
from ctfm.extract.phantom_canvas import Canvas, Ellipsoid, Field, Point

_BLUR_MM = 4.0
"""Width of the border of an infarct, and of where blood thins out."""
LUCENT_MM = 5.0
"""Of the white matter around ventricles under pressure."""


@dataclass(frozen=True, kw_only=True)
class Mass(Lesion):
    """One or more lumps in the brain, with edema around them."""

    shapes: tuple[Ellipsoid, ...]
    hu: float
    core_hu: float | None = None
    """Of the inner half of the radius, where it differs (necrosis)."""
    edema_mm: float = 0.0
    edema_hu: float = 18.0
    wobble_mm: float = 0.0
    """How far its surface departs from the ellipsoid."""

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        for shape in self.shapes:
            view = canvas.around(shape, margin_mm=self.edema_mm + self.wobble_mm)
            if view is None:
                continue
            reach = view.reach(shape)
            if self.wobble_mm:
                reach += self.wobble_mm * np.sin(0.3 * view.x) * np.cos(0.25 * view.y + view.z / 5)
            if self.edema_mm:
                share = np.clip(2 + reach * (2 / self.edema_mm), 0, 1) * _brain(view)
                view.hu += share * np.minimum(self.edema_hu - view.hu, 0)
            view.fill(self.hu, view.soft(reach) * view.inside)
            if self.core_hu is not None:
                core = view.soft(reach - 0.4 * min(shape.radii_mm))
                view.fill(self.core_hu, core * view.inside)


@dataclass(frozen=True, kw_only=True)
class Infarct(Lesion):
    """A territory that has lost density, or tissue."""

    shape: Ellipsoid
    change_hu: float = 0.0
    """Of brain, in an acute one."""
    scar_hu: float | None = None
    """Of what is left in its place, in an old one."""

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        view = canvas.around(self.shape)
        if view is None:
            return
        share = np.clip(view.reach(self.shape) * (1 / _BLUR_MM), 0, 1)
        if self.scar_hu is None:
            view.hu += share * _brain(view) * self.change_hu
        else:
            view.fill(self.scar_hu, share * view.inside)


@dataclass(frozen=True, kw_only=True)
class Crescent(Lesion):
    """A layer below the skull of one side, thinning out to its ends."""

    side: int
    """1 is the patient's right."""
    y_mm: float
    z_mm: float
    half_y_mm: float
    half_z_mm: float
    thick_mm: float
    hu: float

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        x = sorted((2.0 * self.side, 70.0 * self.side))
        y = (self.y_mm - self.half_y_mm, self.y_mm + self.half_y_mm)
        z = (self.z_mm - self.half_z_mm, self.z_mm + self.half_z_mm)
        view = canvas.within(((x[0], y[0], z[0]), (x[1], y[1], z[1])))
        if view is None:
            return
        along = np.square((view.y - np.float32(self.y_mm)) * np.float32(1 / self.half_y_mm))
        along += np.square((view.z - np.float32(self.z_mm)) * np.float32(1 / self.half_z_mm))
        thick = np.sqrt(np.maximum(1 - along, 0)) * np.float32(self.thick_mm)
        share = _layer(view, anatomy, thick) * view.soft(view.x * self.side - 4)
        view.fill(self.hu, share)


@dataclass(frozen=True, kw_only=True)
class Lens(Lesion):
    """A layer below the skull around one point, thickest there; bubbles may go with it."""

    centre_mm: Point
    radius_mm: float
    thick_mm: float
    hu: float
    bubbles: tuple[Ellipsoid, ...] = ()

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        view = canvas.within(_cube(self.centre_mm, self.radius_mm))
        if view is not None:
            thick = _cap(view, self.centre_mm, self.radius_mm) * np.float32(self.thick_mm)
            view.fill(self.hu, _layer(view, anatomy, thick))
        for bubble in self.bubbles:
            view = canvas.around(bubble)
            if view is not None:
                view.fill(self.hu, view.soft(view.reach(bubble)) * view.inside)


@dataclass(frozen=True, kw_only=True)
class CisternBlood(Lesion):
    """Blood in the fluid around the brain, within a region."""

    region: Ellipsoid
    hu: float
    density: float
    """Share of the fluid that it replaces."""

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        view = canvas.around(self.region)
        if view is not None:
            share = np.clip(view.reach(self.region) * (1 / _BLUR_MM), 0, self.density)
            view.fill(self.hu, share * view.cistern * (1 - view.ventricle))


@dataclass(frozen=True, kw_only=True)
class VentricleBlood(Lesion):
    """Blood in some ventricles, up to a level: it settles at the back of a lying patient."""

    shapes: tuple[Ellipsoid, ...]
    level_y_mm: float
    hu: float

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        for shape in self.shapes:
            view = canvas.around(shape)
            if view is not None:
                share = np.minimum(view.soft(view.reach(shape)), view.ventricle)
                view.fill(self.hu, share * view.soft(self.level_y_mm - view.y))


@dataclass(frozen=True, kw_only=True)
class Fracture(Lesion):
    """A gap through the skull along a plane, and perhaps a fragment that was driven inwards."""

    centre_mm: Point
    half_length_mm: float
    normal: Point
    """Of the plane of the gap, a unit vector."""
    gap_mm: float
    step_mm: float = 0.0
    """How far the fragment, half as long as the gap, was driven in."""

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        view = canvas.within(_cube(self.centre_mm, self.half_length_mm))
        if view is None:
            return
        scalp_mm, inner_mm = anatomy.scalp_mm, anatomy.inner_mm
        if self.step_mm:
            near = _cap(view, self.centre_mm, 0.6 * self.half_length_mm)
            step = self.step_mm * np.minimum(near * 4, 1)
            above = view.soft(view.depth - scalp_mm) - view.soft(view.depth - scalp_mm - step)
            view.fill(40.0, above)
            below = view.soft(view.depth - inner_mm) - view.soft(view.depth - inner_mm - step)
            view.fill(1000.0, below)
        nx, ny, nz = self.normal
        x, y, z = self.centre_mm
        across = nx * (view.x - x) + ny * (view.y - y) + nz * (view.z - z)
        across += np.sin((view.y + view.z) * 0.35)
        gap = view.soft(self.gap_mm / 2 - np.abs(across))
        bone = view.soft(view.depth - scalp_mm) - view.soft(view.depth - inner_mm - self.step_mm)
        ends = np.minimum(_cap(view, self.centre_mm, self.half_length_mm) * 8, 1)
        view.fill(40.0, gap * bone * ends)


@dataclass(frozen=True, kw_only=True)
class ScalpSwelling(Lesion):
    """Blood between skull and scalp, which it lifts."""

    centre_mm: Point
    radius_mm: float
    thick_mm: float
    hu: float

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        view = canvas.within(_cube(self.centre_mm, self.radius_mm))
        if view is None:
            return
        thick = _cap(view, self.centre_mm, self.radius_mm) * np.float32(self.thick_mm)
        lifted = np.minimum(thick, 1)
        share = view.soft(view.depth + thick) * view.soft(anatomy.scalp_mm - view.depth) * lifted
        view.fill(self.hu, share)


@dataclass(frozen=True, kw_only=True)
class WideVentricles(Lesion):
    """Ventricles under pressure, with a dark seam in the white matter around them."""

    ventricles: float
    """As `Anatomy.ventricles`."""

    def reshape(self, anatomy: Anatomy) -> Anatomy:
        return replace(anatomy, ventricles=self.ventricles)

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        for shape in ventricle_shapes(anatomy):
            view = canvas.around(shape, margin_mm=LUCENT_MM)
            if view is not None:
                share = np.clip(0.6 + view.reach(shape) * (0.6 / LUCENT_MM), 0, 0.6) * _brain(view)
                view.hu += share * np.minimum(anatomy.white_hu - 10 - view.hu, 0)


@dataclass(frozen=True, kw_only=True)
class MidlineShift(Lesion):
    """The midline pushed to one side."""

    shift: Shift

    def reshape(self, anatomy: Anatomy) -> Anatomy:
        return replace(anatomy, shift=self.shift)


def _brain(view: Canvas) -> Field:
    share: Field = (1 - view.cistern) * (1 - view.ventricle)
    share *= view.inside
    return share


def _layer(view: Canvas, anatomy: Anatomy, thick_mm: Field) -> Field:
    """Share of a layer of this thickness below the inner table."""
    share = view.soft(thick_mm - view.depth + np.float32(anatomy.inner_mm))
    share *= view.inside
    share *= np.minimum(thick_mm, 1)
    return share


def _cap(view: Canvas, centre_mm: Point, radius_mm: float) -> Field:
    """1 at a point, as a parabola to 0 at a distance and beyond."""
    x, y, z = centre_mm
    away: Field = np.square(view.x - np.float32(x))
    away += np.square(view.y - np.float32(y))
    away += np.square(view.z - np.float32(z))
    away *= np.float32(-1 / radius_mm**2)
    away += 1
    np.maximum(away, 0, out=away)
    return away


def _cube(centre_mm: Point, half_mm: float) -> tuple[Point, Point]:
    x, y, z = centre_mm
    return (x - half_mm, y - half_mm, z - half_mm), (x + half_mm, y + half_mm, z + half_mm)
