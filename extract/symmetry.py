"""Symmetry: from the coarse image of a head, to its mid-sagittal plane.

The plane is the one at which the image is most like its own mirror image: a coarse search over
±30° about the antero-posterior and the vertical axis, then a least-squares refinement with a
robust loss, so that what is on one side only (a bleed, an infarct, the cut end of the scan, the
head rest) counts little. Scalp and skull dominate; pitch is not looked for here.

Axes: z, y, x of the coarse image; points are (x, y, z) in scan axes.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy import ndimage
from scipy.optimize import least_squares

from ctfm.extract.coarse import STEP_MM, CoarseScan
from ctfm.extract.placement import trilinear

SEARCH_DEG = tuple(range(-30, 31, 10))
CONTRAST = ((-150.0, 0.0, 80.0, 350.0), (-150.0, 0.0, 240.0, 510.0))
"""HU and what is compared in their place: brain and fluid count three times."""

_SMOOTHING_VOXELS = 1.0
_COARSE_POINTS, _FINE_POINTS = 1000, 5000
_GOLDEN = (5**0.5 - 1) / 2
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
    image = _smooth_inside(image, scan.inside)
    head_mm = scan.upper_head_mm()
    around_mm = scan.points_mm(ndimage.binary_dilation(scan.head) & scan.inside)
    around_mm = around_mm[around_mm[:, 2] > head_mm[:, 2].min()]
    coarse, fine = (
        _Pairs.draw(scan, image, _off_grid(around_mm, count=n), middle_mm=head_mm.mean(axis=0))
        for n in (_COARSE_POINTS, _FINE_POINTS)
    )
    starts = np.array([(yaw, roll, 0.0) for yaw in SEARCH_DEG for roll in SEARCH_DEG])
    found = [coarse.refined(start) for start in _cheapest(coarse, starts)[:_N_STARTS]]
    best = fine.refined(_cheapest(coarse, np.array(found))[0])
    yaw_deg, roll_deg, offset_mm = (float(value) for value in best)
    return MirrorPlane(
        yaw_deg=yaw_deg,
        roll_deg=roll_deg,
        point_mm=fine.middle_mm + offset_mm * axes_from_head(yaw_deg, roll_deg, 0)[:, 0],
        similarity=fine.similarity(best),
    )


def _smooth_inside(
    image: Float32[np.ndarray, "z y x"], inside: Bool[np.ndarray, "z y x"]
) -> Float32[np.ndarray, "z y x"]:
    """Smooth a scan by what is inside it alone; NaN outside.

    Were air mixed in from beyond its ends, these would be edges along the slices, and roll would
    lock to them in a scan that ends within the upper head.
    """
    weight = ndimage.gaussian_filter(inside.astype(np.float32), _SMOOTHING_VOXELS)
    total = ndimage.gaussian_filter(np.where(inside, image, 0), _SMOOTHING_VOXELS)
    smooth: Float32[np.ndarray, "z y x"] = np.full_like(image, np.nan)
    np.divide(total, weight, out=smooth, where=inside)
    return smooth


def _off_grid(points_mm: Float64[np.ndarray, "m 3"], *, count: int) -> Float64[np.ndarray, "n 3"]:
    """About `count` of the points, each moved along z within its voxel.

    A value between grid points is a mean of those around it. Were all points on the grid, only a
    plane at right angles to the slices would compare values that are equally smooth.
    """
    few = points_mm[:: max(1, len(points_mm) // count)].copy()
    few[:, 2] += STEP_MM * (np.arange(len(few)) * _GOLDEN % 1 - 0.5)
    return few


def _cheapest(pairs: "_Pairs", planes: Float64[np.ndarray, "k 3"]) -> Float64[np.ndarray, "k 3"]:
    """The planes by their cost, least first."""
    return planes[np.argsort(pairs.costs(planes), kind="stable")]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pairs:
    """Points of the upper head, and how their values differ from those of their mirror images.

    A plane is (yaw, roll) in degrees, and mm along its normal from the middle of the head. Several
    are tried at once, as a look-up of many points costs little more than that of one.
    """

    image: Float32[np.ndarray, "z y x"]
    """NaN outside the scan."""
    middle_mm: Float64[np.ndarray, "3"]
    offset_mm: Float64[np.ndarray, "3 n"]
    """Of the points from the middle, (x, y, z)."""
    places: Float64[np.ndarray, "3 n"]
    """Of the points in the image, (z, y, x)."""
    values: Float32[np.ndarray, " n"]

    @classmethod
    def draw(
        cls,
        scan: CoarseScan,
        image: Float32[np.ndarray, "z y x"],
        points_mm: Float64[np.ndarray, "m 3"],
        *,
        middle_mm: Float64[np.ndarray, "3"],
    ) -> "_Pairs":
        """Look the points up, and leave out those with no value."""
        values = scan.sample(image, points_mm, beyond=np.nan)
        points_mm = points_mm[np.isfinite(values)]
        return cls(
            image=image,
            middle_mm=middle_mm,
            offset_mm=(points_mm - middle_mm).T,
            places=scan.places(points_mm),
            values=values[np.isfinite(values)],
        )

    def mirrored(self, planes: Float64[np.ndarray, "k 3"]) -> Float32[np.ndarray, "k n"]:
        """Values at the mirror images; NaN where they lie outside the scan."""
        yaw, roll = np.deg2rad(planes[:, :2]).T
        normals = np.stack([np.cos(yaw) * np.cos(roll), np.sin(yaw) * np.cos(roll), -np.sin(roll)])
        distance_mm = normals.T @ self.offset_mm - planes[:, 2:]
        moved = (2 / STEP_MM) * normals[::-1, :, None] * distance_mm
        values, inside = trilinear(self.image, self.places[:, None] - moved)
        return np.where(inside, values, np.float32(np.nan))

    def differences(
        self, planes: Float64[np.ndarray, "k 3"], unseen: float
    ) -> Float64[np.ndarray, "k n"]:
        """Mirror image minus value; `unseen` where the image lies outside the scan."""
        difference = self.mirrored(planes) - self.values
        return np.where(np.isfinite(difference), difference, unseen).astype(np.float64)

    def derivatives(
        self, plane: Float64[np.ndarray, "3"], unseen: float
    ) -> Float64[np.ndarray, "n 3"]:
        """Of the differences, by the parameters of the plane."""
        steps = np.diag(_DIFFERENCE)
        beside = self.differences(np.concatenate([plane + steps, plane - steps]), unseen)
        slopes: Float64[np.ndarray, "n 3"] = (beside[:3] - beside[3:]).T / (2 * steps.sum(axis=0))
        return slopes

    def costs(self, planes: Float64[np.ndarray, "k 3"]) -> Float64[np.ndarray, " k"]:
        """Mean difference, each at most `_SATURATION`; infinite if few points have an image."""
        difference = np.abs(self.mirrored(planes) - self.values)
        seen = np.isfinite(difference)
        total = np.minimum(difference, _SATURATION).sum(axis=1, where=seen, dtype=np.float64)
        count = seen.sum(axis=1)
        return np.where(count < seen.shape[1] / 2, np.inf, total / np.maximum(count, 1))

    def refined(self, plane: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, "3"]:
        """The plane nearby with the least robust sum of differences."""
        # Counted as 0, points that leave the scan would be a gain: the plane of a cap would tip.
        unseen = float(np.nanmedian(np.abs(self.mirrored(plane[None])[0] - self.values)))

        def differences(one: Float64[np.ndarray, "3"], unseen: float) -> Float64[np.ndarray, " n"]:
            difference: Float64[np.ndarray, " n"] = self.differences(one[None], unseen)[0]
            return difference

        found: Float64[np.ndarray, " 3"] = least_squares(
            differences,
            plane,
            jac=self.derivatives,
            args=(unseen,),
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
        mirrored = self.mirrored(plane[None])[0]
        seen = np.isfinite(mirrored)
        if seen.sum() < len(seen) / 2:
            return 0.0
        return float(np.corrcoef(self.values[seen], mirrored[seen])[0, 1])
