"""Symmetry: from the coarse image of a head, to its mid-sagittal plane.

The plane is the one at which the image is most like its own mirror image: a coarse search over
±30° about the antero-posterior and the vertical axis, then a least-squares refinement with a
robust loss, so that what is on one side only (a bleed, an infarct, the cut end of the scan, the
head rest) counts little. Scalp and skull dominate; pitch is not looked for here.

Axes: z, y, x of the coarse image; points are (x, y, z) in scan axes.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64
from scipy import ndimage
from scipy.optimize import least_squares

from ctfm.extract.coarse import CoarseScan

SEARCH_DEG = tuple(range(-30, 31, 10))
CONTRAST = ((-150.0, 0.0, 80.0, 350.0), (-150.0, 0.0, 240.0, 510.0))
"""HU and what is compared in their place: brain and fluid count three times."""

_SMOOTHING_VOXELS = 1.0
_COARSE_POINTS, _FINE_POINTS = 1000, 5000
_N_STARTS = 4
_LOSS = 40.0
_SATURATION = 250.0
_DIFFERENCE = (0.5, 0.5, 0.7)
"""Of the derivatives: degrees, degrees, mm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MirrorPlane:
    """The mid-sagittal plane."""

    yaw_deg: float
    """About z: positive turns the nose to the patient's left."""
    roll_deg: float
    """About y: positive turns the vertex to the patient's right."""
    point_mm: Float64[np.ndarray, "3"]
    """In the plane, the middle of the upper head; scan axes."""
    similarity: float
    """Correlation of the head with its mirror image; above 0.9 in a head."""


def axes_from_head(yaw_deg: float, roll_deg: float, pitch_deg: float) -> Float64[np.ndarray, "3 3"]:
    """Rz(yaw) Ry(roll) Rx(pitch): directions of the head frame to directions of the scan axes."""
    (cz, cy, cx), (sz, sy, sx) = (
        f(np.deg2rad([yaw_deg, roll_deg, pitch_deg])) for f in (np.cos, np.sin)
    )
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    turned: Float64[np.ndarray, "3 3"] = about_z @ about_y @ about_x
    return turned


def find_mirror_plane(scan: CoarseScan) -> MirrorPlane:
    """Find the plane of symmetry of the upper head."""
    hu = np.where(scan.head, scan.hu, CONTRAST[0][0])
    image = np.interp(hu, *CONTRAST).astype(np.float32)
    image = ndimage.gaussian_filter(image, _SMOOTHING_VOXELS)
    image[~scan.inside] = np.nan
    coarse, fine = (_Pairs.draw(scan, image, n) for n in (_COARSE_POINTS, _FINE_POINTS))
    starts = [np.array([yaw, roll, 0.0]) for yaw in SEARCH_DEG for roll in SEARCH_DEG]
    found = [coarse.refined(start) for start in sorted(starts, key=coarse.cost)[:_N_STARTS]]
    best = fine.refined(min(found, key=coarse.cost))
    yaw_deg, roll_deg, offset_mm = (float(value) for value in best)
    normal = axes_from_head(yaw_deg, roll_deg, 0)[:, 0]
    return MirrorPlane(
        yaw_deg=yaw_deg,
        roll_deg=roll_deg,
        point_mm=fine.middle_mm + offset_mm * normal,
        similarity=fine.similarity(best),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pairs:
    """Points of the upper head, and how their values differ from those of their mirror images.

    A plane is (yaw, roll) in degrees, and mm along its normal from the middle of the head.
    """

    scan: CoarseScan
    image: Float32[np.ndarray, "z y x"]
    """NaN outside the scan."""
    middle_mm: Float64[np.ndarray, "3"]
    points_mm: Float64[np.ndarray, "n 3"]
    values: Float32[np.ndarray, " n"]

    @classmethod
    def draw(cls, scan: CoarseScan, image: Float32[np.ndarray, "z y x"], n_points: int) -> "_Pairs":
        head_mm = scan.upper_head_mm()
        around = scan.points_mm(ndimage.binary_dilation(scan.head) & scan.inside)
        around = around[around[:, 2] > head_mm[:, 2].min()]
        points = around[:: max(1, len(around) // n_points)]
        values = scan.sample(image, points, beyond=np.nan)
        return cls(
            scan=scan,
            image=image,
            middle_mm=head_mm.mean(axis=0),
            points_mm=points[np.isfinite(values)],
            values=values[np.isfinite(values)],
        )

    def mirrored(self, plane: Float64[np.ndarray, "3"]) -> Float32[np.ndarray, " n"]:
        """Values at the mirror images; NaN where they lie outside the scan."""
        normal = axes_from_head(plane[0], plane[1], 0)[:, 0]
        distance = (self.points_mm - self.middle_mm) @ normal - plane[2]
        images = self.points_mm - 2 * distance[:, None] * normal
        return self.scan.sample(self.image, images, beyond=np.nan)

    def differences(self, plane: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, " n"]:
        """Mirror image minus value; 0 where the image lies outside the scan."""
        difference: Float64[np.ndarray, " n"] = np.nan_to_num(
            self.mirrored(plane) - self.values
        ).astype(np.float64)
        return difference

    def derivatives(self, plane: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, "n 3"]:
        """Of the differences, by the parameters of the plane."""
        steps = np.diag(_DIFFERENCE)
        columns = [
            (self.differences(plane + step) - self.differences(plane - step)) / (2 * step.sum())
            for step in steps
        ]
        return np.stack(columns, axis=1)

    def cost(self, plane: Float64[np.ndarray, "3"]) -> float:
        """Mean difference, each at most `_SATURATION`; infinite if few points have an image."""
        difference = np.abs(self.mirrored(plane) - self.values)
        seen = difference[np.isfinite(difference)]
        if len(seen) < len(difference) / 2:
            return np.inf
        return float(np.minimum(seen, _SATURATION).mean())

    def refined(self, plane: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, "3"]:
        """The plane nearby with the least robust sum of differences."""
        found: Float64[np.ndarray, " 3"] = least_squares(
            self.differences,
            plane,
            jac=self.derivatives,
            loss="soft_l1",
            f_scale=_LOSS,
            x_scale=(5.0, 5.0, 3.0),
            xtol=1e-3,
            ftol=1e-4,
            max_nfev=40,
        ).x
        return found

    def similarity(self, plane: Float64[np.ndarray, "3"]) -> float:
        """Correlation of values and mirror images."""
        mirrored = self.mirrored(plane)
        seen = np.isfinite(mirrored)
        if seen.sum() < len(seen) / 2:
            return 0.0
        return float(np.corrcoef(self.values[seen], mirrored[seen])[0, 1])
