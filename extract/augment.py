"""Views: from a seed and a scan, to a random change of geometry and of intensity (Sec. 3.1).

The paper's ranges, read with the conventions of the batchgenerators library: coordinates of the
grid, centred on the block of slices that the scan fills, get an elastic displacement, are rotated,
scaled and mirrored, and are then looked up in the scan. The geometric part is a change of these
coordinates, so a view costs no second interpolation; the intensity part is applied to the window
channels on the device. A draw depends on (seed, scan_id, view) alone; view 0 is the clean scan.

Axes: z slices, y rows, x columns of the grid.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from scipy.ndimage import gaussian_filter

ELASTIC_ALPHA = (0.0, 200.0)
ELASTIC_SIGMA_VOXELS = (10.0, 13.0)
ROTATION_RAD = (-0.1, 0.1)
SCALE = (0.85, 1.15)
BRIGHTNESS = (0.99, 1.01)
NOISE_VARIANCE = (0.0, 0.03)
MIRROR_PROBABILITY = 0.5

_LATTICE_STEP_VOXELS = 4
"""The elastic field is smooth over σ ≥ 10 voxels, so it is drawn on every fourth only."""


@dataclass(frozen=True)
class Jitter:
    """Change of intensity, applied to the window channels (each 0 to 1) on the device."""

    brightness: float
    """Factor."""

    noise_sd: float
    """Standard deviation of the Gaussian noise, in units of the channels."""

    seed: int
    """Of the noise."""


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Change of geometry: where in the head frame a point of the grid takes its value from."""

    rotation_rad: tuple[float, float, float]
    """About x, y, z of the head frame, applied in this order."""

    scale: tuple[float, float, float]
    """Along x, y, z. Above 1 the head appears smaller."""

    mirror: tuple[bool, bool, bool]
    """Along x, y, z."""

    alpha: float
    """Height of the noise before smoothing, in voxels of the grid."""

    sigma_voxels: float
    """Standard deviation of the smoothing, in voxels of the grid."""

    seed: int
    """Of the elastic field."""

    def matrix(self) -> Float64[np.ndarray, "3 3"]:
        """Mirror · scale · rotation, on (x, y, z) in mm about the centre of the block."""
        (cx, cy, cz), (sx, sy, sz) = np.cos(self.rotation_rad), np.sin(self.rotation_rad)
        about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        signs = np.where(self.mirror, -1.0, 1.0)
        factors = np.diag(signs * np.array(self.scale))
        matrix: Float64[np.ndarray, "3 3"] = factors @ about_z @ about_y @ about_x
        return matrix

    def elastic(self, shape: tuple[int, int, int]) -> "ElasticField":
        """The elastic field on a grid of this (z, y, x) shape."""
        return ElasticField.draw(self, shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class ElasticField:
    """Displacements in voxels of a grid: uniform noise in ±α on every voxel, smoothed with σ.

    White noise on a lattice n times coarser, smoothed with σ/n, has the same spectrum while σ/n
    is well above a voxel, and n³ times the variance, which is divided out.
    """

    lattice_voxels: Float32[np.ndarray, "3 lattice_z lattice_y lattice_x"]
    shape: tuple[int, int, int]

    @classmethod
    def draw(cls, warp: Warp, shape: tuple[int, int, int]) -> "ElasticField":
        """Draw the noise and smooth it."""
        step = _LATTICE_STEP_VOXELS
        lattice = [(n - 1) // step + 2 for n in shape]
        noise = np.random.default_rng(warp.seed).uniform(-1, 1, (3, *lattice)).astype(np.float32)
        sigma = warp.sigma_voxels / step
        smooth = gaussian_filter(noise, (0, sigma, sigma, sigma), mode="constant")
        return cls(lattice_voxels=smooth * np.float32(warp.alpha / step**1.5), shape=shape)

    def plane(self, z: float) -> Float32[np.ndarray, "3 y x"]:
        """(z, y, x) displacements on the plane at a fractional z of the grid."""
        _, lattice_z, lattice_y, lattice_x = self.lattice_voxels.shape
        along_z = _linear_weights(np.array([z]), lattice_z)
        along_y = _linear_weights(np.arange(self.shape[1]), lattice_y)
        along_x = _linear_weights(np.arange(self.shape[2]), lattice_x)
        plane = np.einsum("pz,czyx->cyx", along_z, self.lattice_voxels)
        fine: Float32[np.ndarray, "3 y x"] = along_y @ plane @ along_x.T
        return fine


def _linear_weights(
    voxel: Shaped[np.ndarray, " n"], lattice: int
) -> Float32[np.ndarray, "n lattice"]:
    """Weights of the lattice points in the linear interpolation at voxels of the grid."""
    distance = np.clip(voxel, 0, None)[:, None] / _LATTICE_STEP_VOXELS - np.arange(lattice)
    weights: Float32[np.ndarray, "n lattice"] = np.clip(1 - np.abs(distance), 0, None).astype("f4")
    return weights


@dataclass(frozen=True, kw_only=True)
class View:
    """One view of a scan. Both parts are None in view 0."""

    warp: Warp | None
    jitter: Jitter | None


def draw_view(seed: int, scan_id: str, view: int) -> View:
    """Draw a view (Sec. 3.1): the same numbers for the same arguments, on every machine.

    Args:
        seed: `ExtractConfig.seed`.
        scan_id: The scan's id in the catalogue.
        view: Number of the view; 0 is the scan as it is.
    """
    if view == 0:
        return View(warp=None, jitter=None)
    key = hashlib.sha256(f"{seed}\0{scan_id}\0{view}".encode()).digest()
    rng = np.random.default_rng(list(key))
    rotation, scale = rng.uniform(*ROTATION_RAD, 3), rng.uniform(*SCALE, 3)
    mirror = rng.random(3) < MIRROR_PROBABILITY
    warp = Warp(
        rotation_rad=(float(rotation[0]), float(rotation[1]), float(rotation[2])),
        scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        mirror=(bool(mirror[0]), bool(mirror[1]), bool(mirror[2])),
        alpha=float(rng.uniform(*ELASTIC_ALPHA)),
        sigma_voxels=float(rng.uniform(*ELASTIC_SIGMA_VOXELS)),
        seed=int(rng.integers(2**32)),
    )
    jitter = Jitter(
        brightness=float(rng.uniform(*BRIGHTNESS)),
        noise_sd=float(np.sqrt(rng.uniform(*NOISE_VARIANCE))),
        seed=int(rng.integers(2**32)),
    )
    return View(warp=warp, jitter=jitter)
