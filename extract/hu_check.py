"""HU check: whether a volume can be a head in HU, by its values and its size.

Headers lie about both, so the voxels are looked at: mostly means over blocks of about 4 mm, so that
noise and kernel hardly matter. A volume may have air around the head, or (skull-stripped) one
background value in its place. What was rescaled twice and then clipped to -1024 is a skull in air,
as some head phantoms are: only its lack of soft tissue tells, 61 mL in a head of 2.2 litres, 220 mL
in the phantom.

A volume that was clipped to a window has its skull piled up at the upper end: 13 to 30 % of the
body of a real head for ends from 80 to 400 HU, and of a whole scan at most single voxels; or its
air at the lower end. One that was clipped at 900 HU or above keeps what is told apart in a brain,
and is taken. Where there is no air, what else it may be is a map: of labels, whose neighbours are
mostly equal (20 % of them in the smooth templates of stripped brains), or of probabilities in per
cent, which fill 0 to 100 and have less than half of it around the HU of a brain (templates: 91 %).

Axes: z slices, y rows, x columns.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int16, Integer
from scipy import ndimage

from ctfm.extract.coarse import BODY_HU, IN_PLANE
from ctfm.extract.resample import block_mean
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

BLOCK_MM = 4.0
AIR_HU = -200.0
BELOW_AIR_HU = -1100
"""Scanners give values below it only as padding, which is one value."""
SOFT_HU = (-50.0, 100.0)
DENSE_HU = 900.0
MEDIAN_HU = (5.0, 60.0)
"""Of everything, where there is no air: that is a brain, perhaps with its skull."""
BACKGROUND_SHARE = 0.2
MAX_DENSE_SHARE = 0.2
MAX_BELOW_AIR_SHARE = 0.2
MIN_SOFT_ML = 100.0
MAX_PILED_SHARE = 0.01
"""Of the body, at the very highest value, if that is below `DENSE_HU`."""
MAX_EQUAL_SHARE = 0.6
"""Of neighbours in a row, in a body without air around it."""
MIN_VALUES = 40
"""In such a body; templates have 80 and more, label maps of a brain mostly fewer than 40."""
BRAIN_HU = (10.0, 60.0)
MAP_HU = (0.0, 100.0)
MIN_BRAIN_SHARE = 0.5
"""Within `BRAIN_HU`, of what lies within `MAP_HU`."""
_LOWEST_HU = -32768
TOP_MM = 120.0
MAX_AREA_CM2 = 400.0
"""Of an axial slice of a head; 279 cm² in a large adult, 700 in a torso."""
MIN_AREA_CM2 = 30.0
MIN_AIR_SHARE = 0.05
"""Of the voxels, for air to be looked at; the air in sinuses and mastoids is less."""
HIGHEST_AIR_HU = -800
"""Of half of the air: foam and hair are below, air of which the HU were halved is above."""
HIGHEST_CLIP_HU = -50
"""Background around a stripped brain is 0, or air."""
MAX_LOWEST_SHARE = 0.1
MAX_ZERO_SHARE = 0.1
"""Of the voxels, exactly 0 HU beside air; in a scan each value has less than a hundredth."""
OTHER_AIR_HU = 500
"""A slice whose darkest parts are brighter by so much than those of both neighbours was rescaled
otherwise than they."""


def check_hu(volume: Volume) -> None:
    """Refuse what cannot be a head in HU.

    Raises:
        ScanError: `NOT_HU` if the values cannot be HU: constant, never rescaled, rescaled twice,
            in another unit, clipped to a window, or grey levels of a picture, labels or
            probabilities. `NOT_A_HEAD` if the slices are too large or too small.
    """
    low, high = int(volume.hu.min()), int(volume.hu.max())
    if low == high:
        raise ScanError(Reason.NOT_HU, f"every voxel is {low}")
    blocks = _blocks(volume)
    if blocks.below_air_share > MAX_BELOW_AIR_SHARE:
        detail = (
            f"{blocks.below_air_share:.0%} of the voxels vary below {BELOW_AIR_HU} HU: they were "
            "rescaled twice"
        )
        raise ScanError(Reason.NOT_HU, detail)
    _check_slices(volume)
    _check_values(blocks)
    has_air = blocks.hu.min() <= AIR_HU
    if not has_air:
        _check_no_labels(volume)
    _check_size(blocks)
    if high < DENSE_HU:
        _check_not_clipped(volume, high)
    _check_air(volume)
    if not has_air:
        _check_no_probabilities(blocks)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Blocks:
    """A volume as means over blocks."""

    hu: Int16[np.ndarray, "z y x"]
    size_mm: tuple[float, float, float]
    body: Bool[np.ndarray, "z y x"]
    """Neither air nor background."""
    below_air_share: float
    """Of the voxels, without the most frequent value below air."""

    @property
    def ml(self) -> float:
        return float(np.prod(self.size_mm)) / 1000.0


def _blocks(volume: Volume) -> _Blocks:
    counts = _histogram(volume.hu)
    below = counts[: BELOW_AIR_HU - _LOWEST_HU]
    size_mm = _voxel_mm(volume)
    wanted = (max(1, round(BLOCK_MM / mm)) for mm in size_mm)
    z, y, x = (min(factor, n) for factor, n in zip(wanted, volume.hu.shape, strict=True))
    means = block_mean(volume, starts=range(0, len(volume.hu), z), n_rows=y, n_columns=x).hu
    body = means > BODY_HU
    if counts.max() >= BACKGROUND_SHARE * counts.sum():
        body &= means != counts.argmax() + _LOWEST_HU
    return _Blocks(
        hu=means,
        size_mm=(size_mm[0] * z, size_mm[1] * y, size_mm[2] * x),
        body=body,
        below_air_share=float((below.sum() - below.max()) / counts.sum()),
    )


def _histogram(hu: Int16[np.ndarray, "z y x"]) -> Integer[np.ndarray, " 65536"]:
    """How often each HU occurs, from -32768 on, in about 128 rows and columns and 64 slices."""
    steps = (max(1, n // most) for n, most in zip(hu.shape, (64, 128, 128), strict=True))
    sample = hu[tuple(slice(None, None, step) for step in steps)]
    return np.bincount(sample.ravel().astype(np.intp) - _LOWEST_HU, minlength=1 << 16)


def _body_counts(hu: Int16[np.ndarray, "z y x"]) -> Integer[np.ndarray, " 65536"]:
    """`_histogram` without air and the most frequent value, which is the background if any is."""
    counts = _histogram(hu)
    background = int(counts.argmax())
    if counts[background] >= BACKGROUND_SHARE * counts.sum():
        counts[background] = 0
    counts[: int(BODY_HU) - _LOWEST_HU] = 0
    return counts


def _voxel_mm(volume: Volume) -> tuple[float, float, float]:
    row_mm = float(np.linalg.norm(volume.row_step_mm))
    column_mm = float(np.linalg.norm(volume.column_step_mm))
    if len(volume.slice_origin_mm) < 2:
        return BLOCK_MM, row_mm, column_mm
    normal = np.cross(volume.row_step_mm, volume.column_step_mm) / (row_mm * column_mm)
    gaps_mm = np.abs(np.diff(volume.slice_origin_mm, axis=0) @ normal)
    return float(gaps_mm.mean()), row_mm, column_mm


def _check_slices(volume: Volume) -> None:
    """Refuse a stack in which a slice is blank, or was rescaled otherwise than its neighbours."""
    sample = volume.hu[:, ::4, ::4].reshape(len(volume.hu), -1)
    filled = np.flatnonzero(sample.min(axis=1) < sample.max(axis=1))
    if filled.size == 0:
        return
    blank = np.setdiff1d(np.arange(filled[0], filled[-1]), filled)
    blank = blank[[bool(np.ptp(volume.hu[z]) == 0) for z in blank]]
    if blank.size:
        detail = f"slice {blank[0] + 1} of {len(sample)} is blank, and those around it are not"
        raise ScanError(Reason.NOT_HU, detail)
    darkest = np.percentile(sample, 5, axis=1)
    apart = np.diff(darkest)
    odd = np.flatnonzero((apart[:-1] > OTHER_AIR_HU) & (apart[1:] < -OTHER_AIR_HU)) + 1
    if odd.size:
        detail = (
            f"air in slice {odd[0] + 1} of {len(sample)} is at {darkest[odd[0]]:.0f} HU, and at "
            f"{darkest[odd[0] - 1]:.0f} in the one below: its rescale intercept is another"
        )
        raise ScanError(Reason.NOT_HU, detail)


def _check_air(volume: Volume) -> None:
    """Refuse air that is not at -1000 HU, or is none, and what was filled with 0 HU beside air."""
    counts = _histogram(volume.hu)
    lowest_hu = int(volume.hu.min())
    at_lowest = counts[lowest_hu - _LOWEST_HU] / counts.sum()
    if HIGHEST_AIR_HU < lowest_hu <= HIGHEST_CLIP_HU and at_lowest > MAX_LOWEST_SHARE:
        detail = (
            f"{at_lowest:.0%} is exactly {lowest_hu}, and nothing is below: clipped to a window"
        )
        raise ScanError(Reason.NOT_HU, detail)
    air = counts[BELOW_AIR_HU - _LOWEST_HU : int(AIR_HU) - _LOWEST_HU]
    if air.sum() < MIN_AIR_SHARE * counts.sum():
        return
    median_hu = BELOW_AIR_HU + int(np.searchsorted(air.cumsum(), air.sum() / 2))
    if median_hu > HIGHEST_AIR_HU:
        detail = f"its air is at {median_hu} HU: clipped from below, or in another unit"
        raise ScanError(Reason.NOT_HU, detail)
    zeros = counts[-_LOWEST_HU] / counts.sum()
    if zeros > MAX_ZERO_SHARE:
        detail = (
            f"{zeros:.0%} of its voxels are exactly 0 HU beside air: it was resampled with 0 "
            "outside of what was scanned"
        )
        raise ScanError(Reason.NOT_HU, detail)


def _check_values(blocks: _Blocks) -> None:
    inside = blocks.hu[blocks.body]
    if inside.size == 0:
        raise ScanError(Reason.NOT_HU, "nothing but air and background")
    median_hu = float(np.median(inside))
    dense = float((inside > DENSE_HU).mean())
    if dense > MAX_DENSE_SHARE:
        detail = (
            f"{dense:.0%} of the body would be denser than {DENSE_HU:g} HU, half of it denser than "
            f"{median_hu:.0f} HU: never rescaled, or another unit"
        )
        raise ScanError(Reason.NOT_HU, detail)
    if blocks.hu.min() > AIR_HU and not MEDIAN_HU[0] <= median_hu <= MEDIAN_HU[1]:
        detail = (
            f"there is no air, and the median of the rest is {median_hu:.0f} where a brain has "
            "30 HU: grey levels, or another unit"
        )
        raise ScanError(Reason.NOT_HU, detail)
    soft_ml = float(((inside > SOFT_HU[0]) & (inside < SOFT_HU[1])).sum() * blocks.ml)
    if soft_ml < MIN_SOFT_ML:
        detail = (
            f"only {soft_ml:.0f} mL lie between {SOFT_HU[0]:g} and {SOFT_HU[1]:g} HU: rescaled "
            "twice, or not a head"
        )
        raise ScanError(Reason.NOT_HU, detail)


def _check_not_clipped(volume: Volume, high: int) -> None:
    inside = _body_counts(volume.hu)
    piled = float(inside[high - _LOWEST_HU] / max(1, inside.sum()))
    if piled > MAX_PILED_SHARE:
        detail = (
            f"{piled:.0%} of the body is exactly {high}, and nothing is above: clipped to a window"
        )
        raise ScanError(Reason.NOT_HU, detail)


def _check_no_labels(volume: Volume) -> None:
    inside = _body_counts(volume.hu)
    values = int((inside > 0).sum())
    slices = volume.hu[:: max(1, len(volume.hu) // 64)]
    in_body = inside[slices.astype(np.intp) - _LOWEST_HU] > 0
    both = in_body[..., 1:] & in_body[..., :-1]
    equal = float((slices[..., 1:] == slices[..., :-1])[both].mean()) if both.any() else 1.0
    if values < MIN_VALUES or equal > MAX_EQUAL_SHARE:
        detail = f"{values} values, and {equal:.0%} of all neighbours are equal: labels, not a scan"
        raise ScanError(Reason.NOT_HU, detail)


def _check_no_probabilities(blocks: _Blocks) -> None:
    inside = blocks.hu[blocks.body & (blocks.hu > MAP_HU[0]) & (blocks.hu <= MAP_HU[1])]
    share = float(((inside > BRAIN_HU[0]) & (inside < BRAIN_HU[1])).mean()) if inside.size else 0.0
    if share < MIN_BRAIN_SHARE:
        detail = (
            f"there is no air, and only {share:.0%} of what is between {MAP_HU[0]:g} and "
            f"{MAP_HU[1]:g} is near the {BRAIN_HU[0]:g} to {BRAIN_HU[1]:g} HU of a brain: "
            "probabilities or another map"
        )
        raise ScanError(Reason.NOT_HU, detail)


def _check_size(blocks: _Blocks) -> None:
    areas_cm2 = _areas_cm2(blocks)
    top = areas_cm2[-max(1, round(TOP_MM / blocks.size_mm[0])) :]
    if np.median(top) > MAX_AREA_CM2:
        detail = f"its slices hold a body of {np.median(top):.0f} cm², a head has at most 300"
        raise ScanError(Reason.NOT_A_HEAD, detail)
    if max(areas_cm2) < MIN_AREA_CM2:
        detail = f"its largest slice holds a body of {max(areas_cm2):.0f} cm²"
        raise ScanError(Reason.NOT_A_HEAD, detail)


def _areas_cm2(blocks: _Blocks) -> Float[np.ndarray, " z"]:
    """Of each slice, the largest connected region without holes; couch and rest opened away."""
    solid = ndimage.binary_opening(ndimage.binary_fill_holes(blocks.body, IN_PLANE), IN_PLANE)
    regions, _ = ndimage.label(solid, IN_PLANE)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    largest = sizes[regions].max(axis=(1, 2))
    return np.asarray(largest * (blocks.size_mm[1] * blocks.size_mm[2] / 100.0))
