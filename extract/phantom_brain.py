"""The brain of the synthetic head: cortical folds, deep grey matter, fissures, ventricles.

Painters fill one structure after another over the layers of `phantom`; each touches only the box
around it. They also keep account of where fluid is, for blood to follow.

Axes: z slices, y rows, x columns of the lattice; n points.
"""

from dataclasses import replace

import numpy as np

from ctfm.extract.phantom_anatomy import Anatomy, Wave, ridge_y_mm
from ctfm.extract.phantom_canvas import Canvas, Ellipsoid, Field, Samples

STEM_HU, DURA_HU = 31.0, 56.0

_FOLD_DEPTH_MM = 16.0
_CORTEX_MM = 3.0
_BRAIN = ((-68.0, -88.0, -136.0), (68.0, 88.0, -6.0))

_FRONTAL_HORN = Ellipsoid(centre_mm=(8.5, 27, -68), radii_mm=(5, 14, 8), lean=(0.25, 0))
_BODY = Ellipsoid(centre_mm=(11, -4, -60), radii_mm=(5.5, 28, 6), lean=(-0.12, 0))
_ATRIUM = Ellipsoid(centre_mm=(22, -36, -69), radii_mm=(7, 12, 11), lean=(-0.3, 0.2))
_OCCIPITAL_HORN = Ellipsoid(centre_mm=(24, -54, -74), radii_mm=(4, 14, 5.5), lean=(0.1, 0.1))
_TEMPORAL_HORN = Ellipsoid(centre_mm=(34, -10, -93), radii_mm=(2.5, 17, 3), lean=(0.1, -0.2))
LATERAL_VENTRICLE = (_FRONTAL_HORN, _BODY, _ATRIUM, _OCCIPITAL_HORN, _TEMPORAL_HORN)
"""Of the patient's right side, where x is positive."""
THIRD_VENTRICLE = Ellipsoid(centre_mm=(0, 2, -80), radii_mm=(2.2, 15, 10))
FOURTH_VENTRICLE = Ellipsoid(centre_mm=(0, -31, -110), radii_mm=(6.5, 5, 10))

DEEP_GREY = (
    Ellipsoid(centre_mm=(14.5, 24, -71), radii_mm=(5.5, 10, 10), lean=(0.25, 0)),
    Ellipsoid(centre_mm=(24.5, 5, -78), radii_mm=(7, 18, 12), lean=(-0.12, 0)),
    Ellipsoid(centre_mm=(11.5, -11, -78), radii_mm=(8.5, 15, 10), lean=(-0.2, 0)),
    Ellipsoid(centre_mm=(38, 6, -80), radii_mm=(2.2, 20, 13)),
)
"""Caudate, lentiform, thalamus and insula of the right side."""

CEREBELLUM = (
    Ellipsoid(centre_mm=(22, -49, -111), radii_mm=(33, 33, 22)),
    Ellipsoid(centre_mm=(-22, -49, -111), radii_mm=(33, 33, 22)),
    Ellipsoid(centre_mm=(0, -50, -107), radii_mm=(16, 26, 19)),
)
BRAINSTEM = (  # midbrain, pons, medulla, peduncles
    Ellipsoid(centre_mm=(0, -12, -93), radii_mm=(15, 12, 11)),
    Ellipsoid(centre_mm=(0, -10, -108), radii_mm=(17, 13, 13)),
    Ellipsoid(centre_mm=(0, -20, -131), radii_mm=(8, 7, 22)),
    Ellipsoid(centre_mm=(18, -22, -109), radii_mm=(13, 11, 8)),
    Ellipsoid(centre_mm=(-18, -22, -109), radii_mm=(13, 11, 8)),
)
AMBIENT_CISTERN = Ellipsoid(centre_mm=(0, -13, -94), radii_mm=(21, 18, 12))
SUPRASELLAR_CISTERN = Ellipsoid(centre_mm=(0, 14, -98), radii_mm=(15, 11, 6))


def paint_brain(canvas: Canvas, anatomy: Anatomy, *, scalp_depth: Field, radius: Field) -> None:
    """Paint everything within the skull.

    Args:
        canvas: With layers and depths.
        anatomy: The head.
        scalp_depth: As the depth of the canvas, but without the skull base.
        radius: Relative radius, which makes sulci run towards the middle of the head.
    """
    _paint_folds(canvas, anatomy, scalp_depth=scalp_depth, radius=radius)
    for shape in DEEP_GREY:
        canvas.fill_shape(shape, anatomy.grey_hu)
        canvas.fill_shape(shape.mirrored(), anatomy.grey_hu)
    _paint_fissure(canvas, anatomy)
    for sign in (-1.0, 1.0):
        _paint_sylvian(canvas, anatomy, sign=sign)
    _paint_posterior_fossa(canvas, anatomy)
    _paint_ventricles(canvas, anatomy)
    _paint_texture(canvas, anatomy)


def ventricle_shapes(anatomy: Anatomy) -> list[Ellipsoid]:
    """All ventricles at the width that they have in a head."""
    right = [_widened(shape, anatomy.ventricles) for shape in LATERAL_VENTRICLE]
    third = _widened(THIRD_VENTRICLE, anatomy.ventricles)
    fourth = _widened(FOURTH_VENTRICLE, anatomy.ventricles**0.4)
    return [*right, *(shape.mirrored() for shape in right), third, fourth]


def tentorium_mm(ax: Samples, y: Samples) -> Samples:
    """Height of the tentorium at |x| and y."""
    return np.float32(0.35) * np.minimum(y + np.float32(30), 0) - np.float32(0.42) * ax - 80


def waves(x: Samples, y: Samples, z: Samples, *, of: tuple[Wave, ...]) -> Samples:
    """Sum of waves."""
    total = np.zeros_like(x)
    for kx, ky, kz, phase in of:
        angle = x * np.float32(kx)
        angle += y * np.float32(ky)
        angle += z * np.float32(kz)
        angle += np.float32(phase)
        total += np.sin(angle, out=angle)
    return total


def _widened(shape: Ellipsoid, by: float) -> Ellipsoid:
    (x, y, z), (rx, ry, rz) = shape.centre_mm, shape.radii_mm
    return replace(shape, centre_mm=(x * by**0.4, y, z), radii_mm=(rx * by, ry * by**0.4, rz * by))


def _paint_folds(canvas: Canvas, anatomy: Anatomy, *, scalp_depth: Field, radius: Field) -> None:
    first_mm, last_mm = anatomy.inner_mm + anatomy.csf_mm, anatomy.inner_mm + _FOLD_DEPTH_MM
    n = np.flatnonzero((canvas.depth > first_mm) & (scalp_depth < last_mm))
    fields = (canvas.x, canvas.y, canvas.z, scalp_depth, radius)
    x, y, z, depth, r = (field.ravel()[n] for field in fields)
    np.reciprocal(r, out=r)
    total = waves(np.abs(x) * r, y * r, (z + 88) * r, of=anatomy.folds)
    # Half a wave is 12.5 mm and the sum of five has a slope of about 0.4 per mm at its zeros.
    to_sulcus_mm = np.abs(total, out=total) * np.float32(2.4)
    fading = np.float32(anatomy.inner_mm + _FOLD_DEPTH_MM) - depth
    fading *= np.float32(1 / _FOLD_DEPTH_MM)
    half_mm = fading * np.float32(anatomy.sulcus_mm)
    grey = canvas.soft(half_mm + np.float32(_CORTEX_MM) - to_sulcus_mm)
    grey *= np.minimum(fading * 4, 1)
    fluid = canvas.soft(half_mm - to_sulcus_mm)
    hu = canvas.hu.ravel()[n]
    hu += grey * np.maximum(anatomy.grey_hu - hu, 0)
    hu += fluid * (anatomy.csf_hu - hu)
    canvas.hu.ravel()[n] = hu
    canvas.cistern.ravel()[n] = np.maximum(canvas.cistern.ravel()[n], fluid)


def _paint_fluid(view: Canvas, share: Field, hu: float) -> None:
    view.fill(hu, share)
    np.maximum(view.cistern, share, out=view.cistern)


def _paint_tissue(view: Canvas, share: Field, hu: float) -> None:
    view.fill(hu, share)
    view.cistern *= 1 - share


def _paint_fissure(canvas: Canvas, anatomy: Anatomy) -> None:
    """The fissure between the hemispheres, the falx in it, and the sagittal sinus."""
    view = canvas.within(((-9, -90, -112), (9, 90, -6)))
    if view is None:
        return
    ax = np.abs(view.x)
    above_callosum = np.square((view.y + 2) * np.float32(1 / 44))
    above_callosum += np.square((view.z + 74) * np.float32(1 / 28))
    share = view.soft((above_callosum - 1) * 14) * view.inside
    share *= np.maximum(view.soft(view.z - tentorium_mm(ax, view.y)), view.soft(view.y - 20))
    _paint_tissue(view, share * view.soft(4.5 - ax), anatomy.grey_hu)
    _paint_fluid(view, share * view.soft(0.5 + 0.5 * anatomy.csf_mm - ax), anatomy.csf_hu)
    _paint_tissue(view, share * view.soft(0.6 - ax), DURA_HU)
    sinus = view.soft(anatomy.inner_mm + 6 - view.depth - ax) * share * view.soft(50 - view.y)
    _paint_tissue(view, sinus, DURA_HU)


def _paint_sylvian(canvas: Canvas, anatomy: Anatomy, *, sign: float) -> None:
    """The fluid over the insula, and the cleft from there to the surface."""
    right = ((32.0, -24.0, -103.0), (70.0, 36.0, -59.0))
    left = ((-70.0, -24.0, -103.0), (-32.0, 36.0, -59.0))
    view = canvas.within(right if sign > 0 else left)
    if view is None:
        return
    ax, along = np.abs(view.x), view.y - 6
    half_mm = 0.4 + 0.6 * anatomy.sulcus_mm
    over_insula = 1 - np.square(along * (1 / 22)) - np.square((view.z + 80) * (1 / 15))
    sheet = np.minimum(half_mm - np.abs(ax - 43 + 0.01 * np.square(along)), over_insula * 6)
    cleft = np.minimum(half_mm - 0.8 * np.abs(view.z + 80 - 0.6 * along), ax - 42)
    cleft = np.minimum(cleft, 20 - np.abs(along))
    reach = np.maximum(sheet, cleft)
    _paint_tissue(view, view.soft(reach + _CORTEX_MM) * view.inside, anatomy.grey_hu)
    _paint_fluid(view, view.soft(reach) * view.inside, anatomy.csf_hu)


def _paint_posterior_fossa(canvas: Canvas, anatomy: Anatomy) -> None:
    view = canvas.within(((-66, -92, -160), (66, 14, -72)))
    if view is None:
        return
    ax = np.abs(view.x)
    below_tent = tentorium_mm(ax, view.y) - view.z
    behind_ridge = ridge_y_mm(ax) - view.y
    share = view.soft(below_tent) * view.soft(behind_ridge + 2) * view.inside
    _paint_fluid(view, share, anatomy.csf_hu)
    share *= view.soft(below_tent - 2)
    reach = _union(view, CEREBELLUM)
    _paint_tissue(view, view.soft(reach) * share, anatomy.grey_hu - 1)
    _paint_tissue(view, view.soft(reach - 10) * share, anatomy.white_hu + 2)
    leaf = view.soft(0.7 - np.abs(below_tent)) * view.soft(np.maximum(-32 - view.y, ax - 17))
    _paint_tissue(view, leaf * view.soft(behind_ridge) * view.inside, DURA_HU)
    for cistern in (AMBIENT_CISTERN, SUPRASELLAR_CISTERN):
        around = canvas.around(cistern)
        if around is not None:
            _paint_fluid(around, around.soft(around.reach(cistern)) * around.inside, anatomy.csf_hu)
    for part in BRAINSTEM:
        stem = canvas.around(part)
        if stem is not None:
            _paint_tissue(stem, stem.soft(stem.reach(part)) * stem.inside, STEM_HU)


def _union(canvas: Canvas, shapes: tuple[Ellipsoid, ...]) -> Field:
    reach = canvas.reach(shapes[0])
    for shape in shapes[1:]:
        np.maximum(reach, canvas.reach(shape), out=reach)
    return reach


def _paint_ventricles(canvas: Canvas, anatomy: Anatomy) -> None:
    for shape in ventricle_shapes(anatomy):
        view = canvas.around(shape)
        if view is None:
            continue
        share = view.soft(view.reach(shape)) * view.inside
        if shape.centre_mm[0]:
            share *= view.soft(np.abs(view.x) - 0.8)  # the septum
        np.maximum(view.ventricle, share, out=view.ventricle)
        view.fill(anatomy.csf_hu, share)


def _paint_texture(canvas: Canvas, anatomy: Anatomy) -> None:
    view = canvas.within(_BRAIN)
    if view is not None and anatomy.texture_hu:
        height = np.float32(anatomy.texture_hu) * view.inside
        view.hu += height * waves(view.x, view.y, view.z, of=anatomy.texture)
