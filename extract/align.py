"""Alignment: from a scan, to the rigid transform of its head frame.

The head frame is the project's own (see "Promises between the parts" in the architecture page), so
no template is needed: x = 0 is the plane of best mirror symmetry; pitch, y = 0 and z = 0 come from
an ellipsoid fitted to the upper skull. Where a scan ends early, the frame allows for what is
missing, and its standard deviations grow. Found on means over about 4 mm; nothing here reads a
header or resamples the scan.

A rigid transform is a 4 x 4 matrix `world_from_head`: head frame to RAS mm.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from ctfm.extract.calvarium import Calvarium, fit_calvarium, outline_radius
from ctfm.extract.coarse import CoarseScan, coarse_scan
from ctfm.extract.dome import DOME_PITCH_DEG, spread_directions
from ctfm.extract.symmetry import axes_from_head, find_mirror_plane
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

SHAPE_SD_MM = 0.35
"""How far a skull's own form shifts each end of the ellipsoid; four heads agree within 0.8 degrees
at 16 to 20 mm between the long and the short semi-axis."""

ROLL_SD_DEG, CAP_ROLL_SD_DEG = 0.2, 3.0
CAP_MM = (24.0, 2.5)
"""A head that is not seen to this far below the middle of its ellipsoid is a cap; blended over
twice the second number."""
VERTEX_SD_MM = 1.0

UNSURE_DEG = 3.0
"""Standard deviation above which a frame is worth a word to the user."""

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
        `pitch_sd_deg` and `roll_sd_deg`, standard deviations of the last two; `frame_sd_deg`, that
        of the whole turn: 1.1 to 1.4 in a whole head, more the less of the upper skull is in the
        scan, above 5 in a skull as high as it is long; `vertex_sd_mm`, of the height of the vertex.

    Raises:
        ScanError: `EMPTY` or `NOT_A_HEAD`, or `TOO_FEW_SLICES` below two.
    """
    scan = coarse_scan(volume)
    plane = find_mirror_plane(scan)
    skull = fit_calvarium(scan, plane)
    pitch_deg, pitch_sd_deg = _pitch(skull)
    roll_sd_deg = _roll_sd_deg(skull)
    quality = {
        "similarity": plane.similarity,
        "residual_mm": skull.residual_mm,
        "share": skull.share,
        "yaw_deg": plane.yaw_deg,
        "roll_deg": plane.roll_deg,
        "pitch_deg": pitch_deg,
        "pitch_sd_deg": pitch_sd_deg,
        "roll_sd_deg": roll_sd_deg,
        "frame_sd_deg": float(np.hypot(pitch_sd_deg, roll_sd_deg)),
    }
    _check_head(skull, plane.similarity)
    axes = axes_from_head(plane.yaw_deg, plane.roll_deg, pitch_deg)
    height_mm, quality["vertex_sd_mm"] = _vertex_height(scan, skull, axes[:, 2])
    vertex_mm = skull.middle_mm + height_mm * axes[:, 2]
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

    The rounder the skull from the side, the less its long axis says; the more of it is missing,
    the less is known of the axis.
    """
    _, long_mm, short_mm = skull.semi_axes_mm
    form_deg = float(np.rad2deg(SHAPE_SD_MM / max(abs(long_mm - short_mm), SHAPE_SD_MM)))
    pitch_deg = skull.pitch_deg + DOME_PITCH_DEG - skull.missing.turn_deg
    return pitch_deg, float(np.hypot(form_deg, skull.missing.turn_sd_deg))


def frame_doubt(quality: Mapping[str, float]) -> str:
    """Say in a sentence that a head frame is uncertain; "" if it is not, or was not looked for."""
    sd_deg = quality.get("frame_sd_deg", 0.0)
    if sd_deg <= UNSURE_DEG:
        return ""
    return f"too little of the upper head is seen: its frame is uncertain by {sd_deg:.0f} degrees"


def _frame(
    scan: CoarseScan, axes: Float64[np.ndarray, "3 3"], origin_mm: Float64[np.ndarray, "3"]
) -> Float64[np.ndarray, "4 4"]:
    world_from_head = np.eye(4)
    world_from_head[:3, :3] = scan.world_from_axes @ axes
    world_from_head[:3, 3] = scan.world_from_axes @ origin_mm
    return world_from_head


def _roll_sd_deg(skull: Calvarium) -> float:
    """Standard deviation of the roll: a cap of a head is nearly round when seen from the front."""
    cap = 1 / (1 + np.exp(-(skull.lowest_mm + CAP_MM[0]) / CAP_MM[1]))
    return float(np.hypot(ROLL_SD_DEG, CAP_ROLL_SD_DEG * cap))


def _vertex_height(
    scan: CoarseScan, skull: Calvarium, up: Float64[np.ndarray, "3"]
) -> tuple[float, float]:
    """From the middle of the ellipsoid up to the top of the scalp, and its sd, in mm."""
    directions = spread_directions(_N_CROWN)
    directions = directions[directions @ up > 0]
    outline_mm, left = outline_radius(scan, skull.middle_mm, directions)
    thickness_mm = outline_mm - skull.radius_mm(directions)
    crown = directions @ up > _CROWN_COSINE
    if (left & crown).sum() > crown.sum() / 3:
        return skull.height_mm(up) + float(np.median(thickness_mm[left & crown])), VERTEX_SD_MM
    # A top that was cut leaves few rays around the vertex: then those of the sides stand in.
    scalp_mm = float(np.median(thickness_mm[left])) if left.any() else 0.0
    sd_mm = float(np.hypot(VERTEX_SD_MM, skull.missing.rise_sd_mm))
    return skull.height_mm(up) - skull.missing.rise_mm + scalp_mm, sd_mm


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
