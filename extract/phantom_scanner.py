"""The scanner of the phantoms: from a head and a protocol, to a volume of HU as scanners give them.

Pose of the head, tilt of the gantry (the image planes turn about x, the table moves along z alone,
so the stack is sheared), field of view, partial volume, couch and head holder, noise, and the
circle that is reconstructed. Three vendors differ in what their headers and stored values hold.

Axes: z slices (feet to head), y rows, x columns. World coordinates are RAS millimetres.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Float64
from numpy.random import Generator

from ctfm.extract.phantom import Lesion, head_hu
from ctfm.extract.phantom_anatomy import Anatomy, dome_reach_mm
from ctfm.extract.phantom_canvas import Lattice, Point
from ctfm.extract.volume import Volume

PADDING_HU = -1024
"""Outside the reconstructed circle."""
SMALL_MATRIX = 128
"""Up to this matrix, slices are 4 to 5 mm apart, so that a demonstration is fast."""

_SPACINGS_MM = (5.0, 4.0, 3.0, 2.5, 1.25, 1.0, 0.625)
_SPACING_SHARES = (0.42, 0.15, 0.19, 0.16, 0.04, 0.025, 0.015)
_POINTS_AT_ONCE = 1 << 21
_AIR_HU, _FOAM_HU, _SHELL_HU = -1000.0, -940.0, 60.0
_HOLDER_RADIUS_MM, _SHELL_MM, _COUCH_GAP_MM = 98.0, 4.0, 16.0


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """Habits of one maker of scanners."""

    manufacturer: str
    models: tuple[str, ...]
    soft_kernels: tuple[str, ...]
    sharp_kernels: tuple[str, ...]
    image_type: tuple[str, ...]
    description: str
    """Of a series; `{mm}` is the slice thickness, `{kernel}` the kernel."""
    file_name: str
    """Of an image; `{n}` is its number."""
    intercept: int
    signed: bool
    bits_stored: int
    padding: int | None
    """Stored value outside the reconstructed circle; None if the whole square is reconstructed."""
    tilts: bool
    """Whether its gantries tilt."""


VENDORS = (
    Vendor(
        manufacturer="SIEMENS",
        models=("SOMATOM Definition AS+", "Sensation 64", "SOMATOM go.Top"),
        soft_kernels=("J30s", "H31s", "Hr40f"),
        sharp_kernels=("H70h", "Hr59h"),
        image_type=("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SEQ"),
        description="Head {mm} {kernel}",
        file_name="IM{n:04d}",
        intercept=-1024,
        signed=False,
        bits_stored=12,
        padding=None,
        tilts=True,
    ),
    Vendor(
        manufacturer="GE MEDICAL SYSTEMS",
        models=("LightSpeed VCT", "Revolution CT", "Optima CT660"),
        soft_kernels=("STANDARD", "SOFT"),
        sharp_kernels=("BONEPLUS",),
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        description="{mm}MM HEAD",
        file_name="{n}.dcm",
        intercept=-1024,
        signed=True,
        bits_stored=16,
        padding=-2000,
        tilts=True,
    ),
    Vendor(
        manufacturer="Canon Medical Systems",
        models=("Aquilion ONE", "Aquilion Prime SP"),
        soft_kernels=("FC26", "FC64", "FC21"),
        sharp_kernels=("FC81", "FC30"),
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        description="Head {mm} mm",
        file_name="{n:06d}.dcm",
        intercept=0,
        signed=True,
        bits_stored=16,
        padding=None,
        tilts=False,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How a head lies in the scanner: turned about the middle of its dome, then moved."""

    pitch_deg: float = 0.0
    """About the axis from left to right; positive lifts the face."""
    roll_deg: float = 0.0
    """About the axis from back to front."""
    yaw_deg: float = 0.0
    """About the long axis of the body."""
    shift_mm: Point = (0.0, 0.0, 0.0)

    def world_from_head(self, anatomy: Anatomy) -> Float64[np.ndarray, "4 4"]:
        """The rigid transform that takes the head frame to world RAS."""
        pitch, roll, yaw = (
            math.radians(deg) for deg in (self.pitch_deg, self.roll_deg, self.yaw_deg)
        )
        about_x = [[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)]]
        about_x += [[0, math.sin(pitch), math.cos(pitch)]]
        about_y = [[math.cos(roll), 0, math.sin(roll)], [0, 1, 0]]
        about_y += [[-math.sin(roll), 0, math.cos(roll)]]
        about_z = [[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0]]
        about_z += [[0, 0, 1]]
        transform = np.eye(4)
        transform[:3, :3] = np.array(about_z) @ np.array(about_y) @ np.array(about_x)
        middle = np.array((0, 0, -anatomy.half_axes_mm[2]))
        transform[:3, 3] = middle + self.shift_mm - transform[:3, :3] @ middle
        return transform


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a head is scanned and reconstructed."""

    vendor: Vendor
    model: str
    kernel: str
    sharp: bool
    kvp: int
    matrix: int
    slices: int | None
    """None is as many as the coverage needs."""
    spacing_mm: float
    """Of slices, along their normal; follows from `slices` if that is given."""
    coverage_mm: float
    above_mm: float
    """How far above the head the topmost slice lies; negative if the vertex is cut off."""
    tilt_deg: float
    """Positive if the front edge of a slice is higher."""
    field_mm: float
    off_centre_mm: tuple[float, float]
    """Of the middle of the field from the head's, along x and y."""
    noise_hu: float
    table_mm: float
    """Added to every z: where the table happens to count from."""
    holder: bool


def draw_pose(rng: Generator) -> Pose:
    """Draw a pose: mostly a little turned, one in eight by any angle up to 15 degrees."""
    spread_deg = np.array((6.0, 3.0, 4.0))
    angles = np.clip(rng.normal(0, spread_deg), -15, 15)
    if rng.random() < 0.125:
        angles = rng.uniform(-15, 15, size=3)
    pitch_deg, roll_deg, yaw_deg = angles.tolist()
    x, y, z = np.clip(rng.normal(0, 8, size=3), -20, 20).tolist()
    return Pose(pitch_deg=pitch_deg, roll_deg=roll_deg, yaw_deg=yaw_deg, shift_mm=(x, y, z))


def draw_protocol(
    rng: Generator,
    anatomy: Anatomy,
    pose: Pose,
    *,
    matrix: int,
    slices: int | None = None,
    tilt_deg: float | None = None,
) -> Protocol:
    """Draw a protocol that fits a head in its pose; a `tilt_deg` that is given is not drawn."""
    vendor = VENDORS[rng.integers(len(VENDORS))]
    if matrix <= SMALL_MATRIX:
        spacing_mm = float(rng.choice((4.0, 4.5, 5.0)))
    else:
        spacing_mm = float(rng.choice(_SPACINGS_MM, p=_SPACING_SHARES))
    coverage_mm = rng.uniform(150, 165)
    lot = rng.random()
    above_mm = -rng.uniform(2, 8) if lot < 0.08 else rng.uniform(1, 8)
    coverage_mm -= rng.uniform(5, 18) if lot > 0.88 else 0
    drawn_tilt_deg = _draw_tilt(rng, pose) if vendor.tilts else 0.0
    return Protocol(
        vendor=vendor,
        model=str(rng.choice(vendor.models)),
        kernel=str(rng.choice(vendor.soft_kernels)),
        sharp=False,
        kvp=int(rng.choice((100, 120, 140), p=(0.1, 0.8, 0.1))),
        matrix=matrix,
        slices=slices,
        spacing_mm=coverage_mm / slices if slices else spacing_mm,
        coverage_mm=coverage_mm,
        above_mm=above_mm,
        tilt_deg=drawn_tilt_deg if tilt_deg is None else tilt_deg,
        field_mm=2 * anatomy.half_axes_mm[1] + rng.uniform(38, 60),
        off_centre_mm=(rng.uniform(-5, 5), rng.uniform(0, 9)),
        noise_hu=rng.uniform(2.5, 4.5),
        table_mm=float(rng.integers(-400, 100)),
        holder=rng.random() < 0.85,
    )


def sharpened(protocol: Protocol) -> Protocol:
    """The same scan reconstructed with the vendor's bone kernel."""
    kernel = protocol.vendor.sharp_kernels[0]
    return replace(protocol, kernel=kernel, sharp=True, noise_hu=3 * protocol.noise_hu)


def acquire(
    anatomy: Anatomy,
    lesions: Sequence[Lesion],
    protocol: Protocol,
    *,
    world_from_head: Float64[np.ndarray, "4 4"],
    rng: Generator,
) -> Volume:
    """Scan a head.

    Args:
        anatomy: The head.
        lesions: Of the head.
        protocol: Of the scan.
        world_from_head: Where the head lies, before `table_mm` is added.
        rng: Of the noise.
    """
    stack = _place_slices(anatomy, protocol, world_from_head)
    rotation, offset = world_from_head[:3, :3], world_from_head[:3, 3]
    head = Lattice(
        origin_mm=(stack.origin_mm - offset) @ rotation,
        steps_mm=stack.steps_mm @ rotation,
        shape=stack.shape,
    )
    around = _surroundings(stack, anatomy, protocol, world_from_head=world_from_head)
    outside = _outside_circle(protocol)
    hu = np.empty(stack.shape, np.int16)
    at_once = max(1, _POINTS_AT_ONCE // protocol.matrix**2)
    rows = slice(0, protocol.matrix)
    for start in range(0, len(hu), at_once):
        stop = min(start + at_once, len(hu))
        part = _mean_planes(
            anatomy, head.part((slice(start, stop), rows, rows)), protocol, lesions=lesions
        )
        np.maximum(part, around, out=part, where=part < -500)
        part += _noise(rng, part.shape, protocol)
        np.clip(part, PADDING_HU, 3071, out=part)
        hu[start:stop] = np.rint(part, out=part)
    if outside is not None:
        hu[:, outside] = PADDING_HU
    table = np.arange(stack.shape[0])[:, None] * stack.steps_mm[0] + (0, 0, protocol.table_mm)
    return Volume(
        hu=hu,
        slice_origin_mm=stack.origin_mm + table,
        row_step_mm=stack.steps_mm[1],
        column_step_mm=stack.steps_mm[2],
    )


def _draw_tilt(rng: Generator, pose: Pose) -> float:
    if rng.random() > 0.4:
        return 0.0
    tilt_deg = round(float(rng.uniform(5, 22)) * 2) / 2
    # The gantry is tilted to follow the head, seldom against it.
    follows = 1 if pose.pitch_deg >= 0 else -1
    return tilt_deg * follows if rng.random() < 0.9 else -tilt_deg * follows


def _reach_mm(
    anatomy: Anatomy,
    world_from_head: Float64[np.ndarray, "4 4"],
    direction: Float64[np.ndarray, "3"],
) -> float:
    """How far the dome reaches in a direction of the world, from the world's origin."""
    from_head_mm = dome_reach_mm(anatomy, direction @ world_from_head[:3, :3])
    return from_head_mm + float(world_from_head[:3, 3] @ direction)


def _place_slices(
    anatomy: Anatomy, protocol: Protocol, world_from_head: Float64[np.ndarray, "4 4"]
) -> Lattice:
    """Slices from feet to head; rows run to the back, columns to the patient's left."""
    tilt, matrix = math.radians(protocol.tilt_deg), protocol.matrix
    normal = np.array((0.0, -math.sin(tilt), math.cos(tilt)))
    to_back = np.array((0.0, -math.cos(tilt), -math.sin(tilt)))
    to_left = np.array((-1.0, 0.0, 0.0))
    n = protocol.slices or round(protocol.coverage_mm / protocol.spacing_mm)
    middle = world_from_head[:3, :3] @ (0, 0, -anatomy.half_axes_mm[2]) + world_from_head[:3, 3]
    centre = middle + np.array((*protocol.off_centre_mm, 0.0))
    top_mm = _reach_mm(anatomy, world_from_head, normal) + protocol.above_mm
    step = np.array((0.0, 0.0, protocol.spacing_mm / math.cos(tilt)))
    centre[2] += (top_mm - protocol.spacing_mm / 2 - centre @ normal) / math.cos(tilt)
    pixel_mm = protocol.field_mm / matrix
    corner = centre - (to_back + to_left) * pixel_mm * (matrix - 1) / 2 - (n - 1) * step
    return Lattice(
        origin_mm=corner,
        steps_mm=np.stack([step, to_back * pixel_mm, to_left * pixel_mm]),
        shape=(n, matrix, matrix),
    )


def _mean_planes(
    anatomy: Anatomy, lattice: Lattice, protocol: Protocol, *, lesions: Sequence[Lesion]
) -> Float32[np.ndarray, "z y x"]:
    """HU of slices: the mean of two planes where they are thick, one where they are thin."""
    pixel_mm = protocol.field_mm / protocol.matrix
    edge_mm = max(0.8, pixel_mm) * (0.8 if protocol.sharp else 1.1)
    if protocol.spacing_mm <= 2:
        return head_hu(anatomy, lattice, lesions=lesions, edge_mm=edge_mm)
    step = lattice.steps_mm[0] / 2
    doubled = Lattice(
        origin_mm=lattice.origin_mm - step / 2,
        steps_mm=np.stack([step, *lattice.steps_mm[1:]]),
        shape=(2 * lattice.shape[0], *lattice.shape[1:]),
    )
    hu = head_hu(anatomy, doubled, lesions=lesions, edge_mm=edge_mm)
    mean = hu[::2]
    mean += hu[1::2]
    mean *= np.float32(0.5)
    return np.ascontiguousarray(mean)


def _surroundings(
    stack: Lattice,
    anatomy: Anatomy,
    protocol: Protocol,
    *,
    world_from_head: Float64[np.ndarray, "4 4"],
) -> Float32[np.ndarray, "y x"]:
    """Couch and head holder: they run along z, and every slice looks through the same x and y."""
    y = stack.origin_mm[1] + np.arange(stack.shape[1])[:, None] * stack.steps_mm[1, 1]
    x = stack.origin_mm[0] + np.arange(stack.shape[2]) * stack.steps_mm[2, 0]
    y_back = -_reach_mm(anatomy, world_from_head, np.array((0.0, -1.0, 0.0)))
    edge_mm = max(1.0, protocol.field_mm / protocol.matrix)

    def soft(signed_mm: Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
        return np.clip(signed_mm / edge_mm + 0.5, 0, 1)

    x_middle = float(world_from_head[0] @ (0, 0, -anatomy.half_axes_mm[2], 1))
    hu = np.full((len(y), len(x)), _AIR_HU)
    if protocol.holder:
        depth = np.hypot(x - x_middle, y - (y_back + _HOLDER_RADIUS_MM)) - _HOLDER_RADIUS_MM
        cup = soft(y_back + 45 - y) * soft(86 - np.abs(x - x_middle))
        hu += cup * soft(depth - 1) * soft(7 - depth) * (_FOAM_HU - hu)
        hu += cup * (soft(depth - 7) - soft(depth - 7 - _SHELL_MM)) * (_SHELL_HU - hu)
    couch = y_back - _COUCH_GAP_MM - 0.0015 * np.square(x - x_middle) - y
    hu += soft(couch) * (_FOAM_HU - hu)
    hu += (soft(couch) - soft(couch - 2)) * (_SHELL_HU - hu)
    return hu.astype(np.float32)


def _outside_circle(protocol: Protocol) -> Bool[np.ndarray, "y x"] | None:
    if protocol.vendor.padding is None:
        return None
    from_middle = np.arange(protocol.matrix) - (protocol.matrix - 1) / 2
    outside: Bool[np.ndarray, "y x"] = (
        np.hypot(from_middle[:, None], from_middle) > protocol.matrix / 2
    )
    return outside


def _noise(
    rng: Generator, shape: tuple[int, ...], protocol: Protocol
) -> Float32[np.ndarray, "z y x"]:
    """Noise that is less in thicker slices and larger pixels, and smooth for a soft kernel."""
    pixel_mm = protocol.field_mm / protocol.matrix
    height = protocol.noise_hu * min(2.5, math.sqrt(5 / protocol.spacing_mm))
    height *= min(1.0, math.sqrt(0.5 / pixel_mm))
    z, y, x = shape
    noise = rng.standard_normal((z, y + 1, x + 1), dtype=np.float32)
    noise *= np.float32(height)
    if protocol.sharp:
        return noise[:, 1:, 1:]
    rows = noise[:, 1:] + noise[:, :-1]
    smooth = rows[:, :, 1:] + rows[:, :, :-1]
    smooth *= np.float32(0.5)
    return smooth
