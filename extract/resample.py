"""Resampling: a scan with the true place of every slice, to the grid of the head frame.

One trilinear interpolation per point of the grid, in the sheared and unevenly spaced stack as it
is. What is finer than the grid is averaged, not skipped: source pixels and slices are first
averaged in blocks that stay below the grid's own spacing (where slices are thin; thick ones in the
same stack stay as they are), and a slab is the mean of enough planes across its thickness that no
source slice falls between two of them. Nothing here overshoots, as a spline would, and nothing is
extrapolated: outside the scan the grid holds -1000 HU.

Grid (see "Promises between the parts" in the architecture page): row i is the slab centred at
z = -(i + 1/2) slice_mm; pixel (y, x) lies at ((size - 1) / 2 - x, (size - 1) / 2 - y) in_plane_mm.

Axes: s slabs, z slices, y rows, x columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Float64, Int16

from ctfm.extract.augment import ElasticField, Warp
from ctfm.extract.placement import Placement, trilinear
from ctfm.extract.volume import Volume

OUTSIDE_HU = -1000
HEAD_RADIUS_MM = 70.0
"""Of the disc around the z axis that decides whether a slab lies inside the scan."""

_SLAB_PARTS = 3
"""Source slices are averaged in blocks of at most `slice_mm` over this."""
_MOST_PARTS = 2 * _SLAB_PARTS
"""Planes of a slab: two blocks lie no closer, but where two slices were almost one."""


def resample(
    volume: Volume,
    world_from_head: Float64[np.ndarray, "4 4"],
    *,
    size_px: int,
    in_plane_mm: float,
    slice_mm: float,
    max_slices: int,
    warp: Warp | None = None,
) -> tuple[Int16[np.ndarray, "s y x"], Float32[np.ndarray, " s"]]:
    """Look the grid up in the scan.

    A slab becomes a row if at least half of a disc of `HEAD_RADIUS_MM` around the z axis, in the
    middle of the slab, lies inside the scan; from the first such slab to the last. A warp keeps
    these rows, turns about the middle of their block, and so takes values from beyond it.

    Args:
        volume: The scan, from `reduce_volume`: what is much finer than the grid is skipped.
        world_from_head: Rigid, head frame to RAS mm.
        size_px: Rows and columns of the grid.
        in_plane_mm: Pixel size of the grid.
        slice_mm: Distance and thickness of the slabs.
        max_slices: Most slabs, counted down from z = 0.
        warp: Geometric part of a view.

    Returns:
        HU, where a slab that is partly outside is the mean of its part inside; and z of the middle
        of each slab in the head frame (mm). Both of length 0 if no slab lies inside the scan.

    Raises:
        ScanError: `TOO_FEW_SLICES` if the scan has fewer than two slices.
    """
    stack = Placement.of(volume)
    rows = _rows_inside(stack, world_from_head, slice_mm=slice_mm, max_slices=max_slices)
    position_mm = -(rows + 0.5) * slice_mm
    planes = _planes(
        stack,
        world_from_head,
        middle_mm=float(position_mm.mean()) if len(rows) else 0.0,
        voxel_mm=(slice_mm, in_plane_mm, in_plane_mm),
        shape=(len(rows), size_px, size_px),
        warp=warp,
    )
    parts = round(slice_mm / max(slice_mm / _MOST_PARTS, stack.gaps_mm.min()) + 0.49)
    return _look_up(volume, stack, planes, parts=parts), position_mm.astype(np.float32)


def reduce_volume(volume: Volume, *, in_plane_mm: float, slice_mm: float) -> Volume:
    """Average blocks of voxels that are much finer than a grid; the volume itself if none are.

    In plane a block is at most `in_plane_mm` wide, along the stack at most a third of `slice_mm`.

    Raises:
        ScanError: `TOO_FEW_SLICES` if the scan has fewer than two slices.
    """
    pixel_mm = (
        float(np.linalg.norm(volume.row_step_mm)),
        float(np.linalg.norm(volume.column_step_mm)),
    )
    return block_mean(
        volume,
        starts=block_starts(Placement.of(volume).gaps_mm, most_mm=slice_mm / _SLAB_PARTS),
        n_rows=max(1, int(in_plane_mm / pixel_mm[0] + 0.01)),
        n_columns=max(1, int(in_plane_mm / pixel_mm[1] + 0.01)),
    )


def block_starts(gaps_mm: Float64[np.ndarray, " gaps"], *, most_mm: float) -> list[int]:
    """The first slice of each block of neighbours that are together at most so thick.

    A slice counts as thick as the widest gap inside its block: slices of 0.6 and of 5 mm in one
    stack each get blocks of their own.

    Args:
        gaps_mm: Distance of each slice to the next.
        most_mm: Of a block of several; a single slice may be thicker.
    """
    starts, widest_mm = [0], 0.0
    for last, gap_mm in enumerate(gaps_mm.tolist(), 1):
        widest_mm = max(widest_mm, gap_mm)
        # Positions are rounded in headers: an eighth of 5 mm may be 0.62 or 0.63.
        if (last - starts[-1] + 1) * widest_mm > most_mm * 1.01:
            starts.append(last)
            widest_mm = 0.0
    return starts


def block_mean(volume: Volume, *, starts: Sequence[int], n_rows: int, n_columns: int) -> Volume:
    """Means over blocks of voxels. Rows and columns that fill no whole block are dropped.

    Args:
        volume: A scan.
        starts: First slice of each block, 0 among them, ascending.
        n_rows: Of a block, 1 or more.
        n_columns: Likewise.
    """
    if len(starts) == len(volume.hu) and n_rows == n_columns == 1:
        return volume
    blocks_of = [slice(*edges) for edges in pairwise([*starts, len(volume.hu)])]
    y, x = (volume.hu.shape[1] // n_rows) * n_rows, (volume.hu.shape[2] // n_columns) * n_columns
    blocks = [_plane_mean(volume.hu[own, :y, :x], n_rows, n_columns) for own in blocks_of]
    corner = (n_rows - 1) / 2 * volume.row_step_mm + (n_columns - 1) / 2 * volume.column_step_mm
    origins = [volume.slice_origin_mm[own].mean(axis=0) + corner for own in blocks_of]
    return Volume(
        hu=np.stack(blocks),
        slice_origin_mm=np.stack(origins),
        row_step_mm=volume.row_step_mm * n_rows,
        column_step_mm=volume.column_step_mm * n_columns,
    )


def _plane_mean(
    hu: Int16[np.ndarray, "z y x"], n_rows: int, n_columns: int
) -> Int16[np.ndarray, "small_y small_x"]:
    # Strided sums beat a reshape and a mean over short axes tenfold.
    total = hu.sum(axis=0, dtype=np.int32)
    total = sum((total[i::n_rows] for i in range(1, n_rows)), start=total[::n_rows])
    total = sum((total[:, i::n_columns] for i in range(1, n_columns)), start=total[:, ::n_columns])
    mean: Int16[np.ndarray, "small_y small_x"] = np.rint(
        total * np.float32(1 / (len(hu) * n_rows * n_columns))
    ).astype(np.int16)
    return mean


def _rows_inside(
    stack: Placement,
    world_from_head: Float64[np.ndarray, "4 4"],
    *,
    slice_mm: float,
    max_slices: int,
) -> Float64[np.ndarray, " s"]:
    across = np.linspace(-HEAD_RADIUS_MM, HEAD_RADIUS_MM, 11)
    x, y = (axis.ravel() for axis in np.meshgrid(across, across))
    disc = np.stack([x, y], axis=1)[np.hypot(x, y) <= HEAD_RADIUS_MM]
    middle = -(np.arange(max_slices) + 0.5) * slice_mm
    points = np.concatenate(
        [np.repeat(disc[None], max_slices, 0), np.repeat(middle[:, None, None], len(disc), 1)], 2
    ).reshape(-1, 3)
    world_mm = points @ world_from_head[:3, :3].T + world_from_head[:3, 3]
    share = stack.contains(world_mm).reshape(max_slices, -1).mean(axis=1)
    inside = np.flatnonzero(share >= 0.5)
    return np.arange(inside[0], inside[-1] + 1.0) if len(inside) else np.empty(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Planes:
    """The planes of the grid in the stack of the scan: an affine map and a warp's bend."""

    n_rows: int
    size_px: int
    matrix: Float64[np.ndarray, "3 3"]
    """Of an offset in (z, y, x) voxels from the middle of the block of rows."""
    middle: Float64[np.ndarray, "3"]
    elastic: ElasticField | None

    def at(self, z: float) -> Float64[np.ndarray, "3 y x"]:
        """Every pixel of the plane at a fractional row of the block, for `Placement.voxels`."""
        offset = np.arange(self.size_px) - (self.size_px - 1) / 2
        corner = self.middle + self.matrix[:, 0] * (z - (self.n_rows - 1) / 2)
        along_y, along_x = np.multiply.outer(self.matrix[:, 1:].T, offset)
        place: Float64[np.ndarray, "3 y x"] = (
            corner[:, None, None] + along_y[:, :, None] + along_x[:, None, :]
        )
        if self.elastic is not None:
            place += np.einsum("cd,dyx->cyx", self.matrix, self.elastic.plane(z))
        return place


def _planes(
    stack: Placement,
    world_from_head: Float64[np.ndarray, "4 4"],
    *,
    middle_mm: float,
    voxel_mm: tuple[float, float, float],
    shape: tuple[int, int, int],
    warp: Warp | None,
) -> _Planes:
    # (z, y, x) voxels of the grid to (x, y, z) mm of the head frame: every axis runs backwards.
    head_from_voxel = -np.diag(voxel_mm)[::-1]
    if warp is not None:
        head_from_voxel = warp.matrix() @ head_from_voxel
    rotation, origin = world_from_head[:3, :3], world_from_head[:3, 3]
    return _Planes(
        n_rows=shape[0],
        size_px=shape[1],
        matrix=stack.stack_from_world @ rotation @ head_from_voxel,
        middle=stack.stack_from_world @ (rotation @ np.array([0.0, 0.0, middle_mm]) + origin),
        elastic=None if warp is None else warp.elastic(shape),
    )


def _look_up(
    volume: Volume, stack: Placement, planes: _Planes, *, parts: int
) -> Int16[np.ndarray, "s y x"]:
    slabs = np.empty((planes.n_rows, planes.size_px, planes.size_px), np.int16)
    for row, slab in enumerate(slabs):
        total, seen = np.zeros(slab.shape, np.float32), np.zeros(slab.shape, np.float32)
        for part in range(parts):
            place = stack.voxels(planes.at(row + (part + 0.5) / parts - 0.5))
            plane, inside = trilinear(volume.hu, place)
            total += plane * inside
            seen += inside
        mean = np.where(seen > 0, total / np.maximum(seen, 1), np.float32(OUTSIDE_HU))
        np.rint(mean, out=slab, casting="unsafe")
    return slabs
