"""Coarse image: from a scan, to a small isotropic image and the mask of its head.

Alignment needs shapes of centimetres to a millimetre: means over about 4 mm keep them, and make
every later step cheap. The image lies along the axes of the scan's own slices, so what alignment
finds does not depend on where a scanner or a converter puts its origin and its axes.

Axes: z slices, y rows, x columns of the coarse image. "Scan axes" are x, y, z in mm along the
columns, rows and normal of the scan's slices, in the order and direction nearest to RAS.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ctfm.extract.placement import Placement, trilinear
from ctfm.extract.resample import OUTSIDE_HU, block_mean, block_starts
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

STEP_MM = 4.0
BODY_HU = -300.0
"""Above it lies what is neither air nor foam."""

BACKGROUND_SHARE = 0.25
"""A value above -500 HU that is more frequent stands for what was stripped away around a brain."""

MIN_HEAD_ML = 250.0
MIN_SOLID_ML = 800.0
"""Below it a head may be hollow: a plastic one with air inside."""
WALL_HU = -700.0
"""A block with a wall of such a head in it is above."""

HEAD_DEPTH_MM = 110.0
"""From the highest point of a head, along the normal of the slices, to about the skull base."""

_BEYOND_HU = -4000.0
_BRAIN_HU = 30.0
_BALL = ndimage.generate_binary_structure(3, 1)
IN_PLANE = _BALL & (np.arange(3) == 1)[:, None, None]
"""The four neighbours of a voxel in its own slice: a structure that leaves slices apart."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CoarseScan:
    """A scan as means over about 4 mm, on an isotropic grid along the scan axes."""

    hu: Float32[np.ndarray, "z y x"]
    """-1000 outside the scan, and where a background of another value was."""
    inside: Bool[np.ndarray, "z y x"]
    head: Bool[np.ndarray, "z y x"]
    """Scalp and all within it, or the brain if that is all there is; no couch, no head rest."""
    corner_mm: Float64[np.ndarray, "3"]
    """Scan axes of the centre of the first voxel."""
    world_from_axes: Float64[np.ndarray, "3 3"]

    def points_mm(self, mask: Bool[np.ndarray, "z y x"]) -> Float64[np.ndarray, "n 3"]:
        """Scan axes (x, y, z) of the voxels of a mask."""
        points: Float64[np.ndarray, "n 3"] = self.corner_mm + STEP_MM * np.argwhere(mask)[:, ::-1]
        return points

    def places(self, points_mm: Float64[np.ndarray, "*n 3"]) -> Float64[np.ndarray, "3 ..."]:
        """Where points in scan axes lie on the grid, as fractional (z, y, x)."""
        voxels: Float64[np.ndarray, "... 3"] = (points_mm - self.corner_mm) / STEP_MM
        return np.moveaxis(voxels, -1, 0)[::-1]

    def sample(
        self,
        image: Float32[np.ndarray, "z y x"],
        points_mm: Float64[np.ndarray, "*n 3"],
        *,
        beyond: float,
    ) -> Float32[np.ndarray, "*n"]:
        """Look points in scan axes up in an image on this grid; `beyond` outside the grid."""
        values, inside = trilinear(image, self.places(points_mm))
        return np.where(inside, values, np.float32(beyond))

    def upper_head_mm(self) -> Float64[np.ndarray, "n 3"]:
        """Scan axes of the voxels of the head down to about the skull base."""
        points = self.points_mm(self.head)
        upper: Float64[np.ndarray, "n 3"] = points[
            points[:, 2] > points[:, 2].max() - HEAD_DEPTH_MM
        ]
        return upper


def coarse_scan(volume: Volume) -> CoarseScan:
    """Reduce a scan to its coarse image, and find the head in it.

    Raises:
        ScanError: `EMPTY` if nothing but air is in it; `NOT_A_HEAD` if what there is is too small.
    """
    world_from_axes = _scan_axes(volume)
    hu, corner_mm = _sample_isotropic(_reduce(volume), world_from_axes)
    inside = hu > _BEYOND_HU + 1
    background = _background_hu(volume)
    if background is not None:
        # Partial volume of brain and background, drawn as brain and air.
        share = np.clip((hu - background) / _BRAIN_HU, 0, 1)
        hu = np.where(share < 1, OUTSIDE_HU * (1 - share), hu)
    hu = np.where(inside, hu, np.float32(OUTSIDE_HU)).astype(np.float32)
    return CoarseScan(
        hu=hu,
        inside=inside,
        head=_head_mask(hu),
        corner_mm=corner_mm,
        world_from_axes=world_from_axes,
    )


def _reduce(volume: Volume) -> Volume:
    pixel_mm = np.linalg.norm(volume.row_step_mm), np.linalg.norm(volume.column_step_mm)
    n_rows, n_columns = (max(1, int(0.8 * STEP_MM / mm)) for mm in pixel_mm)
    starts = block_starts(Placement.of(volume).gaps_mm, most_mm=0.8 * STEP_MM)
    return block_mean(volume, starts=starts, n_rows=n_rows, n_columns=n_columns)


def _scan_axes(volume: Volume) -> Float64[np.ndarray, "3 3"]:
    """World directions of the scan axes, as columns."""
    column = volume.column_step_mm / np.linalg.norm(volume.column_step_mm)
    row = volume.row_step_mm / np.linalg.norm(volume.row_step_mm)
    own = np.stack([column, row, np.cross(column, row)], axis=1).astype(np.float64)
    turns = own @ Rotation.create_group("O").as_matrix()
    nearest: Float64[np.ndarray, "3 3"] = turns[np.trace(turns, axis1=1, axis2=2).argmax()]
    return nearest


def _sample_isotropic(
    volume: Volume, world_from_axes: Float64[np.ndarray, "3 3"]
) -> tuple[Float32[np.ndarray, "z y x"], Float64[np.ndarray, "3"]]:
    stack = Placement.of(volume)
    last_row = volume.row_step_mm * (volume.hu.shape[1] - 1)
    last_column = volume.column_step_mm * (volume.hu.shape[2] - 1)
    ends = volume.slice_origin_mm[[0, -1]]
    corners = np.concatenate(
        [ends, ends + last_row, ends + last_column, ends + last_row + last_column]
    )
    low, high = (f(corners @ world_from_axes, axis=0) for f in (np.min, np.max))
    low_mm = low - STEP_MM
    x, y, z = (np.arange(a, b + STEP_MM, STEP_MM) for a, b in zip(low_mm, high, strict=True))
    matrix = stack.stack_from_world @ world_from_axes
    place = (
        np.multiply.outer(matrix[:, 2], z)[:, :, None, None]
        + np.multiply.outer(matrix[:, 1], y)[:, None, :, None]
        + np.multiply.outer(matrix[:, 0], x)[:, None, None, :]
    )
    hu, inside = trilinear(volume.hu, stack.voxels(place))
    return np.where(inside, hu, np.float32(_BEYOND_HU)), low_mm.astype(np.float64)


def _background_hu(volume: Volume) -> int | None:
    few = volume.hu[:, ::4, ::4]
    counts = np.bincount(few[few > -500].astype(np.intp) + 499, minlength=1)
    return None if counts.max() < BACKGROUND_SHARE * few.size else int(counts.argmax()) - 499


def _head_mask(hu: Float32[np.ndarray, "z y x"]) -> Bool[np.ndarray, "z y x"]:
    """The largest thing that is thicker than a head rest, with its thin parts and its cavities."""
    body = hu > BODY_HU
    if not body.any():
        raise ScanError(Reason.EMPTY, "the volume holds nothing but air")
    solid = _largest(ndimage.binary_opening(body, _BALL))
    if _ml(solid) < MIN_SOLID_ML:
        # Its walls are thinner than a block: fill it before thin things are removed.
        body = ndimage.binary_fill_holes(hu > WALL_HU, IN_PLANE)
        solid = _largest(ndimage.binary_opening(body, _BALL))
    grown = ndimage.binary_dilation(solid, _BALL, iterations=2) & body
    head: Bool[np.ndarray, "z y x"] = ndimage.binary_fill_holes(grown, IN_PLANE)
    if _ml(head) < MIN_HEAD_ML:
        detail = (
            f"the largest object in the volume has {_ml(head):.0f} ml, a head {MIN_HEAD_ML:.0f}"
        )
        raise ScanError(Reason.NOT_A_HEAD, detail)
    return head


def _ml(mask: Bool[np.ndarray, "z y x"]) -> float:
    return float(mask.sum()) * STEP_MM**3 / 1000


def _largest(mask: Bool[np.ndarray, "z y x"]) -> Bool[np.ndarray, "z y x"]:
    labels, n_found = ndimage.label(mask)
    if n_found < 2:
        return mask
    largest: Bool[np.ndarray, "z y x"] = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    return largest
