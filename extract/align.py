"""Alignment: from a scan, to the rigid transform of its head frame.

The head frame is the project's own (see "Promises between the parts" in the architecture page), so
no template is needed: x = 0 is the plane of best mirror symmetry; pitch, y = 0 and z = 0 come from
an ellipsoid fitted to the upper skull, which neither the end of the scan below nor a cut top moves
far. Found on means over about 4 mm; nothing here reads a header or resamples the scan.

A rigid transform is a 4 x 4 matrix `world_from_head`: head frame to RAS mm.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from ctfm.extract.calvarium import Calvarium, fit_calvarium, outline_radius, spread_directions
from ctfm.extract.coarse import CoarseScan, coarse_scan
from ctfm.extract.symmetry import axes_from_head, find_mirror_plane
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

DOME_PITCH_DEG = 13.0
"""How far the long axis of the upper skull points down at the front when the head frame is level.

With it, level is the line of the anterior and posterior commissures: in a brain template that lies
so it is 14.1 degrees, in a head, a cast of a skull and an atlas registered to it 12.3 to 13.1.
"""

USUAL_PITCH_SD_DEG = 12.0
SHAPE_SD_MM = 0.35
"""How far a skull's own form shifts each end of the ellipsoid; four heads agree within 0.8 degrees
at 16 to 20 mm between the long and the short semi-axis."""

MAX_RESIDUAL_MM = 4.0
MIN_SIMILARITY = 0.5
MIN_SHARE = 0.4
SEMI_AXES_MM = ((38.0, 95.0), (45.0, 125.0), (35.0, 115.0))
"""Range of the ellipsoid's semi-axes (across, long, short), from newborn to large adult."""

_CROWN_COSINE = 0.7
_N_CROWN = 600


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadFrame:
    """Where the head lies, and how far to trust it."""

    world_from_head: Float64[np.ndarray, "4 4"]
    quality: dict[str, float]
    """Numbers by name; empty where nothing was fitted."""


def find_head_frame(volume: Volume) -> HeadFrame:
    """Find the head frame of a scan.

    The head may be turned by up to 30 degrees about each axis against the scan's slices, and cut
    below; with its top cut as well, the vertex is where the ellipsoid and the mean thickness of
    the scalp put it.

    Args:
        volume: A head CT, or a stripped brain on a constant background.

    Returns:
        The frame, with `similarity` (correlation with the mirror image), `residual_mm` (median
        distance of the skull from the ellipsoid), `share` (of the ellipsoid's upper half inside
        the scan), `yaw_deg`, `roll_deg`, `pitch_deg` of the head against the slices, and
        `pitch_sd_deg`, the uncertainty of the last: above 5 in a skull as high as it is long.

    Raises:
        ScanError: `EMPTY` or `NOT_A_HEAD`, or `TOO_FEW_SLICES` below two.
    """
    scan = coarse_scan(volume)
    plane = find_mirror_plane(scan)
    skull = fit_calvarium(scan, plane)
    pitch_deg, pitch_sd_deg = _pitch(skull)
    quality = {
        "similarity": plane.similarity,
        "residual_mm": skull.residual_mm,
        "share": skull.share,
        "yaw_deg": plane.yaw_deg,
        "roll_deg": plane.roll_deg,
        "pitch_deg": pitch_deg,
        "pitch_sd_deg": pitch_sd_deg,
    }
    _check_head(skull, plane.similarity)
    axes = axes_from_head(plane.yaw_deg, plane.roll_deg, pitch_deg)
    vertex_mm = skull.middle_mm + _vertex_height(scan, skull, axes[:, 2]) * axes[:, 2]
    return HeadFrame(world_from_head=_frame(scan, axes, vertex_mm), quality=quality)


def find_scanner_frame(volume: Volume) -> HeadFrame:
    """Put the head frame's origin on the head, and keep the axes of the scanner.

    x = 0 and y = 0 are the middle of the upper head's extent, z = 0 is its highest point.

    Raises:
        ScanError: `EMPTY` or `NOT_A_HEAD`, or `TOO_FEW_SLICES` below two.
    """
    scan = coarse_scan(volume)
    world_mm = scan.upper_head_mm() @ scan.world_from_axes.T
    low_mm, high_mm = world_mm.min(axis=0), world_mm.max(axis=0)
    world_from_head = np.eye(4)
    world_from_head[:3, 3] = [*(low_mm + high_mm)[:2] / 2, high_mm[2]]
    return HeadFrame(world_from_head=world_from_head, quality={})


def _pitch(skull: Calvarium) -> tuple[float, float]:
    """Pitch of the head against the slices and its standard deviation, in degrees.

    The rounder the skull from the side, the less its long axis says: it is weighed against the
    expectation that heads lie level within `USUAL_PITCH_SD_DEG`. Of a usual head that takes 1%.
    """
    _, long_mm, short_mm = skull.semi_axes_mm
    sd_deg = float(np.rad2deg(SHAPE_SD_MM / max(abs(long_mm - short_mm), SHAPE_SD_MM)))
    weight = 1 / (1 + (sd_deg / USUAL_PITCH_SD_DEG) ** 2)
    return weight * (skull.pitch_deg + DOME_PITCH_DEG), weight**0.5 * sd_deg


def _frame(
    scan: CoarseScan, axes: Float64[np.ndarray, "3 3"], origin_mm: Float64[np.ndarray, "3"]
) -> Float64[np.ndarray, "4 4"]:
    world_from_head = np.eye(4)
    world_from_head[:3, :3] = scan.world_from_axes @ axes
    world_from_head[:3, 3] = scan.world_from_axes @ origin_mm
    return world_from_head


def _vertex_height(scan: CoarseScan, skull: Calvarium, up: Float64[np.ndarray, "3"]) -> float:
    """From the middle of the ellipsoid up to the top of the scalp, in mm."""
    directions = spread_directions(_N_CROWN)
    directions = directions[directions @ up > 0]
    outline_mm, left = outline_radius(scan, skull.middle_mm, directions)
    thickness_mm = outline_mm - skull.radius_mm(directions)
    crown = directions @ up > _CROWN_COSINE
    # A top that was cut leaves few rays around the vertex: then those of the sides stand in.
    chosen = left & crown if (left & crown).sum() > crown.sum() / 3 else left
    return skull.height_mm(up) + (float(np.median(thickness_mm[chosen])) if chosen.any() else 0.0)


def _check_head(skull: Calvarium, similarity: float) -> None:
    fits = all(
        low <= mm <= high for mm, (low, high) in zip(skull.semi_axes_mm, SEMI_AXES_MM, strict=True)
    )
    if (
        fits
        and similarity >= MIN_SIMILARITY
        and skull.residual_mm <= MAX_RESIDUAL_MM
        and skull.share >= MIN_SHARE
    ):
        return
    across, long, short = (2 * mm for mm in skull.semi_axes_mm)
    raise ScanError(
        Reason.NOT_A_HEAD,
        f"no upper skull: best ellipsoid {across:.0f} x {long:.0f} x {short:.0f} mm, "
        f"{skull.residual_mm:.1f} mm off, {skull.share:.0%} seen, "
        f"mirror similarity {similarity:.2f}",
    )
