"""The face, neck and skull base of the synthetic head: flesh, air spaces, orbits, their bone.

Axes: z slices, y rows, x columns of the lattice.
"""

import numpy as np

from ctfm.extract.phantom_canvas import Canvas, Ellipsoid, Field, Point

AIR_HU, FAT_HU, MUSCLE_HU, BONE_HU = -1000.0, -80.0, 52.0, 800.0
GLOBE_HU, LENS_HU, CORD_HU = 14.0, 75.0, 32.0


def _shape(centre_mm: Point, radii_mm: Point, lean: tuple[float, float] = (0, 0)) -> Ellipsoid:
    return Ellipsoid(centre_mm=centre_mm, radii_mm=radii_mm, lean=lean)


def _pair(centre_mm: Point, radii_mm: Point, lean: tuple[float, float] = (0, 0)) -> list[Ellipsoid]:
    right = _shape(centre_mm, radii_mm, lean)
    return [right, right.mirrored()]


FLESH = [
    _shape((0, 36, -124), (59, 62, 76)),  # face
    _shape((0, 98, -120), (12, 19, 19)),  # nose
    _shape((0, -26, -215), (60, 54, 130)),  # neck
    *_pair((75, -9, -112), (5, 16, 29), (-0.25, 0)),  # ears
]
_BONES = [
    _shape((0, 80, -86), (26, 7, 13)),  # around the frontal sinus
    _shape((0, 60, -109), (14, 25, 13)),  # ethmoid
    _shape((0, 24, -112), (17, 14, 11)),  # sphenoid
    *_pair((29, 56, -130), (17, 17.5, 17)),  # maxilla
    *_pair((31, 62, -106), (18.5, 23.5, 16.5)),  # orbit
    *_pair((50, 46, -120), (4, 15, 5), (-0.25, 0)),  # zygoma
    *_pair((50, -22, -121), (13, 16, 18)),  # mastoid
    _shape((0, 62, -148), (24, 30, 2.5)),  # palate
    *_pair((47, 16, -142), (3, 11, 24), (0.15, 0)),  # jaw
    _shape((0, 0, -126), (13, 9, 16), (0, 1.2)),  # clivus
    _shape((0, -27, -190), (25, 24, 45)),  # upper vertebrae
]
_AIR_SPACES = [
    *_pair((9, 81, -85), (8, 4, 9)),  # frontal sinus
    *_pair((7, 24, -112), (6, 10.5, 7.5)),  # sphenoid sinus
    *_pair((29, 56, -130), (14.5, 15.5, 15)),  # maxillary sinus
    *_pair((7, 62, -131), (6, 34, 15)),  # nasal cavity
    _shape((0, 20, -146), (12, 10, 18)),  # nasopharynx
    *_pair((66, -5, -117), (16, 3.5, 3.5)),  # ear canal
]
_CELLS = [
    _shape((0, 60, -108), (12, 22, 11)),  # ethmoid
    *_pair((51, -23, -121), (10, 12, 14)),  # mastoid
]
_TURBINATES = _pair((7.5, 58, -134), (2.5, 24, 6))
_ORBITS = _pair((31, 62, -106), (16.5, 22, 14.5))
_GLOBES = _pair((31, 73, -106), (12.2, 12.2, 12.2))
_LENSES = _pair((31, 82, -106), (4.5, 2, 4.5))
_NERVES = _pair((25, 48, -106), (2.2, 16, 2.2), (0.3, 0))
_CANAL = _shape((0, -25, -205), (14, 15, 55))
_CORD = _shape((0, -22, -205), (7, 6, 60))


def paint_face(canvas: Canvas) -> None:
    """Paint what lies below the brain, over flesh that is there already."""
    for bone in _BONES:
        _fill_outside_brain(canvas, bone, BONE_HU)
    for space in _AIR_SPACES:
        _fill_outside_brain(canvas, space, AIR_HU)
    for turbinate in _TURBINATES:
        canvas.fill_shape(turbinate, MUSCLE_HU)
    for cells in _CELLS:
        _paint_cells(canvas, cells)
    for parts, hu in ((_ORBITS, FAT_HU), (_GLOBES, GLOBE_HU), (_LENSES, LENS_HU)):
        for part in parts:
            _fill_outside_brain(canvas, part, hu)
    for nerve in _NERVES:
        canvas.fill_shape(nerve, MUSCLE_HU)
    _fill_outside_brain(canvas, _CANAL, GLOBE_HU)
    _fill_outside_brain(canvas, _CORD, CORD_HU)


def _fill_outside_brain(canvas: Canvas, shape: Ellipsoid, hu: float) -> None:
    view = canvas.around(shape)
    if view is not None:
        view.fill(hu, _outside_brain(view, shape))


def _outside_brain(view: Canvas, shape: Ellipsoid) -> Field:
    share = view.soft(view.reach(shape))
    share *= 1 - view.inside
    return share


def _paint_cells(canvas: Canvas, shape: Ellipsoid) -> None:
    """Small air cells with walls of bone."""
    view = canvas.around(shape)
    if view is not None:
        x, y, z = np.abs(view.x), view.y, view.z
        walls = np.sin(1.1 * x + 0.3 * y) * np.sin(0.9 * y - 0.4 * z) * np.sin(z + 0.3 * x)
        view.fill(AIR_HU, _outside_brain(view, shape) * view.soft(1.2 - 6 * walls))
