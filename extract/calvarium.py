"""Calvarium: from the coarse image of a head and its mid-sagittal plane, to the skull's ellipsoid.

An ellipsoid that is symmetric about the mid-sagittal plane is fitted to the upper skull: rays from
within meet the bone, or the outline of the head where there is none (a stripped brain, a plastic
head). The lower head has no part in it, so it does not matter where the scan ends below.

Axes: points are (x, y, z) mm in a trial head frame, r rays, p of which met the skull, k steps along
a ray.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy import ndimage

from ctfm.extract.coarse import CoarseScan
from ctfm.extract.dome import (
    DOME_PITCH_DEG,
    Missing,
    effect_of_missing,
    fit_dome,
    spread_directions,
)
from ctfm.extract.resample import OUTSIDE_HU
from ctfm.extract.symmetry import MirrorPlane, axes_from_head
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

BONE_HU = 150.0
BONE_CERTAIN_HU = 250.0
BONE_CLIP_HU = 750.0
SHELL_MM = 18.0
"""Of bone and what a block blurs it to, along a ray."""

SURFACE_HU = -500.0
"""Half way from scalp to air."""

MIN_BONE_SHARE = 0.5
"""Of the rays: with less bone, the outline of the head is used."""

_RAY_MM = np.arange(30.0, 132.0, 2.0)
_N_DIRECTIONS = 1400
_LOWEST_DIRECTION = -0.45
_MIN_RAYS = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class Calvarium:
    """An ellipsoid with one axis across the head and two in the mid-sagittal plane."""

    axes_from_dome: Float64[np.ndarray, "3 3"]
    """Directions of the ellipsoid's axes (across, long, short) in scan axes."""
    middle_mm: Float64[np.ndarray, "3"]
    """In scan axes."""
    semi_axes_mm: tuple[float, float, float]
    """Across, long, short."""
    pitch_deg: float
    """Of the long axis against the scan axes, about the axis across; positive is nose up."""
    own_mm: Float64[np.ndarray, "p 3"]
    """Where rays met the skull, along its axes from its middle; they end about 30 mm below it."""
    missing: Missing
    residual_mm: float
    """Median distance of the bone from the ellipsoid; 1.0 to 1.3 mm in heads."""
    share: float
    """Of the rays into the upper half that met the skull inside the scan."""

    @property
    def lowest_mm(self) -> float:
        """Down to where the skull is seen, along the short axis from the middle."""
        return float(np.percentile(self.own_mm[:, 2], 1))

    def radius_mm(self, directions: Float64[np.ndarray, "r 3"]) -> Float64[np.ndarray, " r"]:
        """From the middle to the ellipsoid, along directions in scan axes."""
        scaled = directions @ self.axes_from_dome / self.semi_axes_mm
        radius: Float64[np.ndarray, " r"] = 1 / np.linalg.norm(scaled, axis=1)
        return radius

    def height_mm(self, up: Float64[np.ndarray, "3"]) -> float:
        """How far the ellipsoid reaches from its middle along a direction in scan axes."""
        return float(np.linalg.norm((up @ self.axes_from_dome) * self.semi_axes_mm))


def fit_calvarium(scan: CoarseScan, plane: MirrorPlane) -> Calvarium:
    """Fit the ellipsoid of the upper skull.

    Raises:
        ScanError: `NOT_A_HEAD` if the rays meet nothing.
    """
    pitch_deg, middle_mm, share_missing = 0.0, plane.point_mm, 1.0
    for _ in range(2):  # the second time from the middle of the first
        axes = axes_from_head(plane.yaw_deg, plane.roll_deg, pitch_deg)
        directions = spread_directions(_N_DIRECTIONS)
        directions = directions[directions[:, 2] > _LOWEST_DIRECTION]
        radius_mm, met = _skull_radius(scan, middle_mm, directions @ axes.T)
        if met.sum() < _MIN_RAYS:
            raise ScanError(
                Reason.NOT_A_HEAD, "the largest object in the volume has no skull around it"
            )
        points = directions[met] * radius_mm[met, None]
        usual_deg = -DOME_PITCH_DEG - pitch_deg
        dome = fit_dome(points, usual_deg=usual_deg, missing=share_missing)
        missing = effect_of_missing(dome, points, rays=_N_DIRECTIONS)
        share_missing = missing.share
        middle_mm = middle_mm + axes @ np.array([0.0, *dome.middle_mm])
        pitch_deg += dome.angle_deg
    above = dome.height_mm(directions * 80.0) > 0
    return Calvarium(
        axes_from_dome=axes_from_head(plane.yaw_deg, plane.roll_deg, pitch_deg),
        middle_mm=middle_mm,
        semi_axes_mm=dome.semi_axes_mm,
        pitch_deg=pitch_deg,
        own_mm=dome.own_mm(points),
        missing=missing,
        residual_mm=dome.residual_mm(points),
        share=float(met[above].mean()),
    )


def outline_radius(
    scan: CoarseScan, middle_mm: Float64[np.ndarray, "3"], directions: Float64[np.ndarray, "r 3"]
) -> tuple[Float64[np.ndarray, " r"], Bool[np.ndarray, " r"]]:
    """Where rays leave the head, in mm, and whether they do so inside the scan."""
    inside = ndimage.binary_erosion(scan.inside, iterations=2)
    shell = np.where(ndimage.binary_dilation(scan.head), scan.hu, np.float32(OUTSIDE_HU))
    shell[ndimage.binary_erosion(scan.head)] = 0
    level = _profile(scan, shell, middle_mm=middle_mm, directions=directions) - SURFACE_HU
    last = level.shape[1] - 1 - (level[:, ::-1] > 0).argmax(axis=1)
    last = np.minimum(last, level.shape[1] - 2)
    ray = np.arange(len(level))
    before, after = level[ray, last], level[ray, last + 1]
    left = (before > 0) & (after <= 0)
    part = np.divide(before, before - after, out=np.zeros_like(before), where=left)
    radius_mm = _RAY_MM[last] + part * (_RAY_MM[1] - _RAY_MM[0])
    ends = scan.sample(
        inside.astype(np.float32), middle_mm + directions * radius_mm[:, None], beyond=0.0
    )
    return radius_mm.astype(np.float64), left & (ends > 0.5)


def _skull_radius(
    scan: CoarseScan, middle_mm: Float64[np.ndarray, "3"], directions: Float64[np.ndarray, "r 3"]
) -> tuple[Float64[np.ndarray, " r"], Bool[np.ndarray, " r"]]:
    """Middle of the bone along each ray, in mm, and whether there is any."""
    hu = np.where(scan.head, scan.hu, np.float32(OUTSIDE_HU))
    profile = _profile(scan, hu, middle_mm=middle_mm, directions=directions)
    bone = np.clip(profile, BONE_HU, BONE_CLIP_HU) - BONE_HU
    certain = bone > BONE_CERTAIN_HU - BONE_HU
    met = certain.any(axis=1)
    if met.mean() < MIN_BONE_SHARE:
        return outline_radius(scan, middle_mm, directions)
    beyond_mm = _RAY_MM - _RAY_MM[certain.argmax(axis=1)][:, None]
    bone = np.where((beyond_mm >= -SHELL_MM / 3) & (beyond_mm <= SHELL_MM), bone, 0)
    return (bone @ _RAY_MM) / np.maximum(bone.sum(axis=1), 1), met


def _profile(
    scan: CoarseScan,
    image: Float32[np.ndarray, "z y x"],
    *,
    middle_mm: Float64[np.ndarray, "3"],
    directions: Float64[np.ndarray, "r 3"],
) -> Float32[np.ndarray, "r k"]:
    points_mm = middle_mm + directions[:, None, :] * _RAY_MM[:, None]
    return scan.sample(image, points_mm, beyond=OUTSIDE_HU)
