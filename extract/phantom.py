"""The synthetic head: from an anatomy, to HU at the points of a lattice in the head frame.

A schematic adult head: layers below an ellipsoid (scalp, skull with diploe, subarachnoid space,
cortex), folded inwards along a skull base, then brain and face. HU of tissues are textbook values.
It is no model of disease or of a scanner: findings, noise and couch are added elsewhere.

Everything is computed in the millimetres of the reference head (`phantom_anatomy`).

Axes: z slices, y rows, x columns of the lattice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ctfm.extract.phantom_anatomy import Anatomy, dome, skull_base_mm
from ctfm.extract.phantom_brain import paint_brain
from ctfm.extract.phantom_canvas import Canvas, Field, Lattice
from ctfm.extract.phantom_face import AIR_HU, FAT_HU, FLESH, MUSCLE_HU, paint_face

SKIN_HU, GALEA_HU, TABLE_HU, DIPLOE_HU = 45.0, 20.0, 1250.0, 650.0

_SKIN_MM, _FAT_MM = 2.0, 4.5
_CORTEX_MM = 3.2
_HEAD = ((-96.0, -112.0, -260.0), (96.0, 124.0, 18.0))
_LOWER = ((-96.0, -112.0, -260.0), (96.0, 124.0, -68.0))
"""Skull base, face and neck."""
_POINTS_AT_ONCE = 1 << 17
"""Few enough for the cache, many enough for numpy."""


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """A change of a head; what it is and does, its subclasses say."""

    finding: str | None
    """None if it is too slight to be called one."""
    focal: bool
    """Whether it lies at one place, not in or around the whole brain."""
    z_min_mm: float
    z_max_mm: float
    """In the head frame; nothing changes beyond."""

    def reshape(self, anatomy: Anatomy) -> Anatomy:
        """The head with the lesion's effect on form."""
        return anatomy

    def paint(self, canvas: Canvas, anatomy: Anatomy) -> None:
        """Change the HU of the finished head, in place."""


def head_hu(
    anatomy: Anatomy, lattice: Lattice, *, lesions: Sequence[Lesion] = (), edge_mm: float = 0.8
) -> Field:
    """HU of a head at sample points.

    Args:
        anatomy: The head.
        lattice: Points in the head frame.
        lesions: Applied in order.
        edge_mm: Width of the ramps at edges: the distance of neighbouring pixels, 0.8 at least.

    Returns:
        float32 HU, air outside the head.
    """
    for lesion in lesions:
        anatomy = lesion.reshape(anatomy)
    hu = np.full(lattice.shape, AIR_HU, np.float32)
    reference = lattice.scaled([1 / factor for factor in anatomy.stretch])
    n_slices, n_rows, n_columns = lattice.shape
    at_once = max(1, _POINTS_AT_ONCE // (n_rows * n_columns))
    for start in range(0, n_slices, at_once):
        stop = min(start + at_once, n_slices)
        chunk = reference.part((slice(start, stop), slice(0, n_rows), slice(0, n_columns)))
        box = chunk.box(*_HEAD)
        if box is not None:
            canvas = Canvas.blank(chunk.part(box), edge_mm=edge_mm)
            _paint_head(canvas, anatomy)
            for lesion in lesions:
                lesion.paint(canvas, anatomy)
            hu[start:stop][box] = canvas.hu
    return hu


def _paint_head(canvas: Canvas, anatomy: Anatomy) -> None:
    scalp_depth, radius = dome(canvas.x, canvas.y, canvas.z)
    canvas.depth[...] = scalp_depth
    skin = _skin(canvas, anatomy)
    _paint_layers(canvas, anatomy)
    if skin is not None:
        _paint_flesh(canvas, anatomy, skin)
    _push_midline(canvas, anatomy)
    paint_brain(canvas, anatomy, scalp_depth=scalp_depth, radius=radius)
    paint_face(canvas)


def _skin(canvas: Canvas, anatomy: Anatomy) -> Canvas | None:
    """Face and neck, with `depth` below their skin; folds the skull base into the canvas' own."""
    lower = canvas.within(_LOWER)
    if lower is None:
        return None
    skin = replace(lower, depth=lower.depth.copy())
    for shape in FLESH:
        view = skin.around(shape)
        if view is not None:
            np.maximum(view.depth, view.reach(shape), out=view.depth)
    depth = lower.z - skull_base_mm(np.abs(lower.x), lower.y)
    depth += np.float32(anatomy.inner_mm)
    np.minimum(lower.depth, depth, out=lower.depth)
    return skin


def _paint_layers(canvas: Canvas, anatomy: Anatomy) -> None:
    scalp_mm, inner_mm = anatomy.scalp_mm, anatomy.inner_mm
    brain_mm, table_mm = inner_mm + anatomy.csf_mm, 0.28 * anatomy.skull_mm
    scalp = [(AIR_HU, 0.0), (SKIN_HU, _SKIN_MM), (FAT_HU, _FAT_MM), (GALEA_HU, scalp_mm)]
    tables = [(TABLE_HU, scalp_mm + table_mm), (DIPLOE_HU, inner_mm - table_mm)]
    brain = [(anatomy.csf_hu, brain_mm), (anatomy.grey_hu, brain_mm + _CORTEX_MM)]
    layers = [*scalp, *tables, (TABLE_HU, inner_mm), *brain, (anatomy.white_hu, math.inf)]
    canvas.hu[...] = canvas.layers(canvas.depth, layers)
    canvas.inside[...] = canvas.soft(canvas.depth - np.float32(inner_mm))
    canvas.cistern[...] = canvas.inside - canvas.soft(canvas.depth - np.float32(brain_mm))


def _paint_flesh(canvas: Canvas, anatomy: Anatomy, skin: Canvas) -> None:
    layers = [(AIR_HU, 0.0), (SKIN_HU, _SKIN_MM), (FAT_HU, _FAT_MM), (MUSCLE_HU, math.inf)]
    lower = canvas.within(_LOWER)
    if lower is not None:
        share = 1 - lower.soft(lower.depth - np.float32(anatomy.scalp_mm))
        lower.fill(skin.layers(skin.depth, layers), share)


def _push_midline(canvas: Canvas, anatomy: Anatomy) -> None:
    shift = anatomy.shift
    if shift is None:
        return
    y0, y1 = shift.y_mm - shift.half_y_mm, shift.y_mm + shift.half_y_mm
    z0, z1 = shift.z_mm - shift.half_z_mm, shift.z_mm + shift.half_z_mm
    view = canvas.within(((-66, y0, z0), (66, y1, z1)))
    canvas.slack_mm = abs(shift.amount_mm)
    if view is not None:
        push = _bump((view.y - np.float32(shift.y_mm)) * np.float32(1 / shift.half_y_mm))
        push *= _bump((view.z - np.float32(shift.z_mm)) * np.float32(1 / shift.half_z_mm))
        push *= _bump(view.x * np.float32(1 / 66))
        push *= np.clip((view.depth - np.float32(anatomy.inner_mm)) * np.float32(1 / 22), 0, 1)
        view.x -= np.float32(shift.amount_mm) * push


def _bump(t: Field) -> Field:
    """1 at 0, smoothly to 0 at ±1 and beyond."""
    height: Field = np.maximum(1 - np.square(t), 0)
    np.square(height, out=height)
    return height
