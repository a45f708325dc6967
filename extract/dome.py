"""Dome: from points on the upper skull, to its ellipsoid, and to what missing points leave open.

The ellipsoid has one axis across the head and two in the mid-sagittal plane. It is fitted by
reweighted least squares of its own equation, with a prior on its proportions and its pitch: a whole
skull outweighs the prior, which keeps the proportions of a cut one sensible.

A skull is no ellipsoid: its bone lies up to 3 mm off, over patches of 3 to 4 cm. Where the long
axis comes to lie therefore depends on which part of the skull is in the scan. By how much, and how
certainly, is computed for every scan: from the rays that meet a whole head but not this one, and
from the mean form of four heads.

Axes: points are (x, y, z) mm from where rays start; p points, s the six numbers of an ellipsoid.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

LOWEST_MM = -10.0
"""Of the fit, against the middle of the ellipsoid along its short axis; blended over 20 mm."""

DOME_PITCH_DEG = 13.0
"""How far the long axis of the upper skull points down at the front when the head frame is level.

With it, level is the line of the anterior and posterior commissures: in a brain template that lies
so it is 14.8 degrees; in a head, an atlas and a cast of a skull that are registered to it 12.6,
13.2 and 14.3.
"""

PITCH_SD_DEG = 15.0
"""Of heads against the slices of their scans."""

USUAL_ACROSS, USUAL_LONG_MM, USUAL_SHORT = 0.80, 85.0, 0.785
"""Semi-axes: across and short are shares of the long one."""
ACROSS_SD, LONG_SD, SHORT_SD = 0.07, 0.10, 0.04
"""Of their logarithms; five heads scatter by 0.05, 0.06 and 0.03."""

LEAST_PRIOR = 0.1
"""Share of the prior that a whole skull keeps, for one that is as high as it is long."""

BONE_SD_MM = 1.3
PATCH_RAYS = 20.0
"""Rays that meet the same patch of bone say one thing: of 1400 over the sphere, at 75 mm."""

CAUTION = 1.6
"""What the scatter is multiplied by, so that two standard deviations hold for nearly every crop."""

MEAN_FORM = (-10.2, -11.4, 13.1, -28.0, 5.2, -9.8, -2.4, -25.1, -8.7)
"""Thousandths of the radius by which the skull lies outside its ellipsoid, for each of `harmonics`.

Fitted to the four heads of the page on real head CT. Each was cropped with the form of the other
three: see `docs/benchmarks/frame_under_cropping.json`.
"""

_SCALE_MM = 75.0
_ROBUST_MM = 1.0
_MIDDLE_SD_MM = 100.0
_USUAL = np.array([0, 0, 0, np.log(USUAL_ACROSS), np.log(USUAL_LONG_MM), np.log(USUAL_SHORT)])
_LARGEST_STEP = np.array([15.0, 15.0, 0.2, 0.15, 0.15, 0.15])
_SETTLED_RAD, _SETTLED_MM = np.deg2rad(0.02), 0.02
_MAX_ROUNDS = 40
_LOWEST_DIRECTION = -0.6


@dataclass(frozen=True, kw_only=True, eq=False)
class Dome:
    """An ellipsoid in a trial frame."""

    state: Float64[np.ndarray, "6"]
    """y and z of the middle, mm; angle of the long axis against y, radians; logarithms of across
    over long, of long in mm, and of short over long."""

    @property
    def middle_mm(self) -> tuple[float, float]:
        """Along y and z."""
        return float(self.state[0]), float(self.state[1])

    @property
    def angle_deg(self) -> float:
        """Of the long axis against y, in the sagittal plane."""
        return float(np.rad2deg(self.state[2]))

    @property
    def semi_axes_mm(self) -> tuple[float, float, float]:
        """Across, long, short."""
        across, long_mm, short = np.exp(self.state[3:]).tolist()
        return across * long_mm, long_mm, short * long_mm

    def own_mm(self, points_mm: Float64[np.ndarray, "p 3"]) -> Float64[np.ndarray, "p 3"]:
        """Points along the ellipsoid's axes, from its middle."""
        cos, sin = np.cos(self.state[2]), np.sin(self.state[2])
        x, y, z = (points_mm - [0.0, *self.middle_mm]).T
        return np.stack([x, cos * y + sin * z, cos * z - sin * y], axis=1)

    def height_mm(self, points_mm: Float64[np.ndarray, "p 3"]) -> Float64[np.ndarray, " p"]:
        """Above the middle, along the short axis."""
        return self.own_mm(points_mm)[:, 2]

    def residual_mm(self, points_mm: Float64[np.ndarray, "p 3"]) -> float:
        """Median distance of the points of the upper half, along rays from the middle."""
        own = self.own_mm(points_mm)
        own = own[own[:, 2] > LOWEST_MM]
        if not len(own):
            return np.inf
        reach = np.linalg.norm(own / self.semi_axes_mm, axis=1)
        distance_mm = np.linalg.norm(own, axis=1) * (1 - 1 / np.maximum(reach, 1e-3))
        return float(np.median(np.abs(distance_mm)))


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What the missing part of a skull does to its ellipsoid.

    The shifts are those of a skull of the mean form; other skulls scatter about them.
    """

    turn_deg: float
    """Of the long axis, nose up."""
    turn_sd_deg: float
    share: float
    """Of what a whole skull says of the angle."""
    rise_mm: float
    """Of the highest point, when the head frame is level."""
    rise_sd_mm: float


def fit_dome(
    points_mm: Float64[np.ndarray, "p 3"], *, usual_deg: float, missing: float = 1.0
) -> Dome:
    """Fit the ellipsoid to the points of the upper half.

    Args:
        points_mm: On the skull.
        usual_deg: Angle of the long axis of a head that lies level.
        missing: Share of what a whole skull says of the angle, and with it the weight of the prior;
            a whole head that lies askew is not to be drawn level.
    """
    prior = _PRIOR * max(missing, LEAST_PRIOR)
    usual = _USUAL.copy()
    usual[2] = np.deg2rad(usual_deg)
    dome = Dome(state=usual)
    for _ in range(_MAX_ROUNDS):
        own = dome.own_mm(points_mm)
        misfit_mm, slopes = _misfit(dome, own)
        weights = _upper(own) / np.sqrt(1 + (misfit_mm / _ROBUST_MM) ** 2)
        pull = slopes.T @ (weights * misfit_mm) * _INFORMATION + prior * (dome.state - usual)
        step = -np.linalg.solve(_precision(slopes, weights, prior), pull)
        step *= min(1.0, float((_LARGEST_STEP / np.maximum(np.abs(step), 1e-12)).min()))
        dome = Dome(state=dome.state + step)
        if np.abs(step[:2]).max() < _SETTLED_MM and abs(step[2]) < _SETTLED_RAD:
            break
    return dome


def effect_of_missing(dome: Dome, points_mm: Float64[np.ndarray, "p 3"], *, rays: int) -> Missing:
    """How the ellipsoid differs from that of the whole skull because parts of it are missing.

    With C the covariance of the six numbers given some points, those of this scan or those of a
    whole head, the estimate from the points of the scan scatters about that from all of them with
    C(scan) − C(whole).

    Args:
        dome: Fitted to the points.
        points_mm: On the skull, one of each ray that met it.
        rays: That are spread over the sphere.
    """
    shifts, covariances = [], []
    for own in (dome.own_mm(points_mm), _whole(dome, rays)):
        _, slopes = _misfit(dome, own)
        weights = _upper(own)
        covariance = np.linalg.inv(_precision(slopes, weights, _PRIOR))
        off_mm = _SCALE_MM * (harmonics(own / dome.semi_axes_mm) @ MEAN_FORM) / 1000
        shifts.append(-covariance @ (slopes.T @ (weights * off_mm)) * _INFORMATION)
        covariances.append(covariance)
    shift, spread = shifts[0] - shifts[1], covariances[0] - covariances[1]
    turn = np.array([0, 0, np.rad2deg(1), 0, 0, 0])
    rise = _rise(dome)
    turn_sd, rise_sd = (CAUTION * np.sqrt(max(one @ spread @ one, 0)) for one in (turn, rise))
    return Missing(
        turn_deg=float(turn @ shift),
        turn_sd_deg=float(turn_sd),
        share=float(1 - covariances[1][2, 2] / covariances[0][2, 2]),
        rise_mm=float(rise @ shift),
        rise_sd_mm=float(rise_sd),
    )


def _rise(dome: Dome) -> Float64[np.ndarray, " s"]:
    """By how much the highest point of a level head rises with each of the six numbers, in mm."""
    up_rad = dome.state[2] + np.deg2rad(DOME_PITCH_DEG)
    up = np.array([0, -np.sin(up_rad), np.cos(up_rad)])
    steps = np.diag([1.0, 1.0, 1e-3, 1e-3, 1e-3, 1e-3])
    above, below = (
        np.array([_top_mm(Dome(state=dome.state + sign * step), up) for step in steps])
        for sign in (1, -1)
    )
    rise: Float64[np.ndarray, " s"] = (above - below) / (2 * steps.sum(axis=0))
    return rise


def _top_mm(dome: Dome, up: Float64[np.ndarray, "3"]) -> float:
    middle = np.array([[0.0, *dome.middle_mm]])
    return float(middle[0] @ up + np.linalg.norm(dome.own_mm(middle + up) * dome.semi_axes_mm))


_INFORMATION = 1 / (BONE_SD_MM**2 * PATCH_RAYS)
_PRIOR = (
    np.array([_MIDDLE_SD_MM, _MIDDLE_SD_MM, np.deg2rad(PITCH_SD_DEG), ACROSS_SD, LONG_SD, SHORT_SD])
    ** -2.0
)


def _precision(
    slopes: Float64[np.ndarray, "p s"],
    weights: Float64[np.ndarray, " p"],
    prior: Float64[np.ndarray, " s"],
) -> Float64[np.ndarray, "s s"]:
    precision: Float64[np.ndarray, "s s"] = slopes.T @ (slopes * weights[:, None]) * _INFORMATION
    return precision + np.diag(prior)


def _misfit(
    dome: Dome, own_mm: Float64[np.ndarray, "p 3"]
) -> tuple[Float64[np.ndarray, " p"], Float64[np.ndarray, "p s"]]:
    """By how much points lie outside, in mm to first order, and how that changes with the state."""
    _, long_mm, short_mm = dome.semi_axes_mm
    cos, sin = np.cos(dome.state[2]), np.sin(dome.state[2])
    unit = own_mm / dome.semi_axes_mm
    along, up = unit[:, 1] / long_mm, unit[:, 2] / short_mm
    squares = unit**2
    slopes = [
        sin * up - cos * along,
        -sin * along - cos * up,
        along * own_mm[:, 2] - up * own_mm[:, 1],
        -squares[:, 0],
        -squares.sum(axis=1),
        -squares[:, 2],
    ]
    return _SCALE_MM / 2 * (squares.sum(axis=1) - 1), _SCALE_MM * np.stack(slopes, axis=1)


def _upper(own_mm: Float64[np.ndarray, "p 3"]) -> Float64[np.ndarray, " p"]:
    return np.clip((own_mm[:, 2] - LOWEST_MM) / 20 + 0.5, 0, 1)


def _whole(dome: Dome, rays: int) -> Float64[np.ndarray, "p 3"]:
    """Points of a whole skull, along the ellipsoid's axes."""
    directions = spread_directions(rays)
    directions = directions[directions[:, 2] > _LOWEST_DIRECTION]
    reach = np.linalg.norm(directions / dome.semi_axes_mm, axis=1)
    points: Float64[np.ndarray, "p 3"] = directions / reach[:, None]
    return points


def spread_directions(count: int) -> Float64[np.ndarray, "r 3"]:
    """Unit vectors spread evenly over the sphere (a Fibonacci spiral)."""
    index = np.arange(count) + 0.5
    z = 1 - 2 * index / count
    angle = np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - z**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1)


def harmonics(points: Float64[np.ndarray, "p 3"]) -> Float64[np.ndarray, "p 9"]:
    """Spherical harmonics of degree 3 and 4 that are the same on both sides, unscaled.

    What has a lower degree is a change of the ellipsoid.
    """
    x, y, z = (points / np.linalg.norm(points, axis=1)[:, None]).T
    xx, yy, zz = x * x, y * y, z * z
    third = [z * (5 * zz - 3) / 2, y * (5 * zz - 1), z * (xx - yy), y * (3 * xx - yy)]
    fourth = [
        (35 * zz * zz - 30 * zz + 3) / 8,
        y * z * (7 * zz - 3),
        (xx - yy) * (7 * zz - 1),
        y * z * (3 * xx - yy),
        xx * xx - 6 * xx * yy + yy * yy,
    ]
    return np.stack([*third, *fourth], axis=1)
