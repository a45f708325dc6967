"""Formats: NIfTI, NRRD and MetaImage, to a header and to a volume in HU.

Headers are read by `nifti` and `text_headers`. Any order and sense of the axes is turned so that
slices are axial: columns run to the patient's left, rows to the back, slices to the head. An affine
may shear (a tilted stack).

Axes: i j k in a file, z y x in a `Volume`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase
from typing import TypeVar, cast

import numpy as np
from isal import isal_zlib
from jaxtyping import Float, Int16
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from ctfm.extract.geometry import Stack, check_order, measure_stack
from ctfm.extract.identity import content_digest, file_digest
from ctfm.extract.nifti import NiftiHeader, is_of_single_images, read_nifti_header
from ctfm.extract.nifti_forms import believed, spans_a_volume
from ctfm.extract.sources import Opener, format_of
from ctfm.extract.text_headers import TextHeader, read_text_header
from ctfm.extract.volume import Volume
from ctfm.extract.voxels import MAX_VOXELS, check_claim, read_voxels, to_hu
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_ANISOTROPY = 2.0
"""A voxel longer than this in-plane, against its shorter sides, is of a thick non-axial slice."""

HEAD_PIXEL_MM = (0.2, 10.0)
"""Outside, lengths may be in another unit. Chosen: scanners give 0.3 to 1 mm, and a 64 px preview
of 500 mm has 8 mm."""
HEAD_FIELD_MM = (100.0, 600.0)
"""Chosen: from a cropped head to more than the 500 mm of a scanner's largest field of view."""
_OTHER_UNITS_MM = {"metres": 1000.0, "centimetres": 10.0, "microns": 0.001}

# OSError: what gzip and nibabel raise for damage in a file that is already open.
_DAMAGED = (
    ArithmeticError,
    EOFError,
    HeaderDataError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    WrapStructError,
    cast(type[Exception], isal_zlib.error),  # an instance, says its stub
)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageHeader:
    """Where the voxels of a file lie, after the axes are turned to x, y, z."""

    shape: tuple[int, int, int]
    """Voxels along x, y, z."""
    affine: Float[np.ndarray, "4 4"]
    """From voxel (x, y, z) to RAS mm."""
    turn: Float[np.ndarray, "3 2"]
    """nibabel's orientation transform from i, j, k of the file to x, y, z."""
    note: str
    """What a user should know of the geometry; "" for nothing."""

    @property
    def slice_origin_mm(self) -> Float[np.ndarray, "z 3"]:
        """RAS centre of the first voxel of each slice."""
        z = np.arange(self.shape[2], dtype=float)[:, None]
        return np.asarray(self.affine[:3, 3] + z * self.affine[:3, 2])

    def stack(self) -> Stack:
        """Order and distances of the slices."""
        return measure_stack(
            self.slice_origin_mm,
            row_step_mm=self.affine[:3, 1],
            column_step_mm=self.affine[:3, 0],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageLook:
    """What the index takes from a file."""

    header: ImageHeader
    digest: str
    """As `image_digest`."""
    content: str | None
    """Equal for NIfTI files that unpack to the same, where that can be told."""


def look_at_image(opener: Opener, file: str) -> ImageLook:
    """Read what tells where the voxels of a file lie and which image it is, opening it once.

    Raises:
        OSError, ScanError: As `read_image_header`.
    """
    if format_of(file) != "nifti":
        header = read_image_header(opener, file)
        return ImageLook(header=header, digest=image_digest(opener, file), content=None)
    with opener.open(file) as stream:
        nifti = _damaged_is_unreadable(lambda: read_nifti_header(stream))
        single = is_of_single_images(opener, file, nifti.forms)
        header = _nifti_geometry(nifti, single)
        digest = _nifti_digest(stream, single)
        content = None
        # A plain file is read to its end, so only where a packed one may be its copy.
        if file.lower().endswith(".nii.gz") or opener.exists(f"{file}.gz"):
            content = _damaged_is_unreadable(
                lambda: content_digest(stream, least_bytes=math.prod(header.shape))
            )
    return ImageLook(header=header, digest=digest, content=content)


def read_image_header(opener: Opener, file: str) -> ImageHeader:
    """Read the geometry of a NIfTI, NRRD or MetaImage file.

    Raises:
        OSError: If it is gone.
        ScanError: If it cannot be parsed, is no plain volume, does not say where it lies, or is too
            short for its voxels.
    """
    if format_of(file) == "nifti":
        nifti = _parse_nifti(opener, file)
        return _nifti_geometry(nifti, is_of_single_images(opener, file, nifti.forms))
    return _text_geometry(opener, _parse_text(opener, file))


def image_digest(opener: Opener, file: str) -> str:
    """`file_digest` of a file, and of what else decides its volume.

    That is the file of voxels that its header may name, and where the distance of the slices
    depends on it what the JSON file beside it says (`is_of_single_images`).

    Raises:
        OSError: If a file is gone.
        ScanError: If the header cannot be parsed.
    """
    if format_of(file) == "nifti":
        try:
            single = is_of_single_images(opener, file, _parse_nifti(opener, file).forms)
        except ScanError:
            single = None  # another file than was indexed
        with opener.open(file) as stream:
            return _nifti_digest(stream, single)
    digests = []
    for one in dict.fromkeys((file, _parse_text(opener, file).data)):
        with opener.open(one) as stream:
            digests.append(file_digest(stream))
    return "+".join(digests)


def read_image(file: str) -> Volume:
    """Read the volume of a NIfTI, NRRD or MetaImage file.

    Raises:
        OSError: If it is gone.
        ScanError: As `read_image_header`, or if voxels are missing or not finite.
    """
    with Opener() as opener:
        if format_of(file) == "nifti":
            nifti = _parse_nifti(opener, file)
            header = _nifti_geometry(nifti, is_of_single_images(opener, file, nifti.forms))
            with opener.open(file) as stream:
                hu = _damaged_is_unreadable(lambda: _nifti_hu(nifti, stream))
        else:
            text = _parse_text(opener, file)
            header = _text_geometry(opener, text)
            hu = _damaged_is_unreadable(lambda: _text_hu(opener, text))
    check_order(header.stack())
    turned = apply_orientation(hu, header.turn)
    return Volume(
        hu=np.ascontiguousarray(turned.transpose()),
        slice_origin_mm=header.slice_origin_mm,
        row_step_mm=header.affine[:3, 1],
        column_step_mm=header.affine[:3, 0],
    )


def check_sampling(header: ImageHeader) -> None:
    """Refuse thick slices of another plane, which turning the axes does not make axial.

    Raises:
        ScanError: `NOT_AXIAL`.
    """
    x_mm, y_mm, z_mm = np.linalg.norm(header.affine[:3, :3], axis=0)
    if max(x_mm, y_mm) > MAX_ANISOTROPY * max(min(x_mm, y_mm), z_mm):
        detail = (
            f"voxels of {x_mm:.3g} x {y_mm:.3g} x {z_mm:.3g} mm: its thick slices are not axial"
        )
        raise ScanError(Reason.NOT_AXIAL, detail)


def _parse_nifti(opener: Opener, file: str) -> NiftiHeader:
    with opener.open(file) as stream:
        return _damaged_is_unreadable(lambda: read_nifti_header(stream))


def _nifti_digest(stream: BufferedIOBase, of_single_images: bool | None) -> str:
    origin = {True: "+single", False: "+enhanced", None: ""}[of_single_images]
    return file_digest(stream) + origin


def _nifti_geometry(nifti: NiftiHeader, of_single_images: bool | None) -> ImageHeader:
    header = _turned(nifti.shape, lambda: believed(nifti.forms, of_single_images=of_single_images))
    check_claim(nifti.claimed_bytes, nifti.held_bytes, packed=nifti.packed)
    return header


def _nifti_hu(nifti: NiftiHeader, stream: BufferedIOBase) -> Int16[np.ndarray, "x y z"]:
    values = nifti.read_values(stream)
    return to_hu(values.reshape(values.shape[:3]), rescale=nifti.rescale)


def _parse_text(opener: Opener, file: str) -> TextHeader:
    with opener.open(file) as stream:
        return _damaged_is_unreadable(lambda: read_text_header(stream, file))


def _text_geometry(opener: Opener, text: TextHeader) -> ImageHeader:
    header = _turned(text.shape, lambda: (text.affine, ""))
    with opener.open(text.data) as stream:
        held_bytes = stream.seek(0, 2) - (text.start or 0)
    check_claim(text.claimed_bytes, held_bytes, packed=text.packed)
    return header


def _text_hu(opener: Opener, text: TextHeader) -> Int16[np.ndarray, "x y z"]:
    with opener.open(text.data) as stream:
        if text.start is None:
            stream.seek(-text.claimed_bytes, 2)
        else:
            stream.seek(text.start)
        values = read_voxels(stream, text.shape, text.dtype, packed=text.packed)
    return to_hu(values.reshape(values.shape[:3]))


def _turned(
    shape: tuple[int, ...], placed: Callable[[], tuple[Float[np.ndarray, "4 4"], str]]
) -> ImageHeader:
    """The header of an image that is a volume, which is looked at before its affine is."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        detail = f"{len(shape)} dimensions, where a scan has three"
        raise ScanError(Reason.UNSUPPORTED_ENCODING, detail)
    if len(shape) < 3 or min(shape) < 2:
        raise ScanError(Reason.TOO_FEW_SLICES, "a single image, not a volume")
    if math.prod(shape) > MAX_VOXELS:
        detail = f"the header claims {math.prod(shape):.1e} voxels"
        raise ScanError(Reason.BAD_GEOMETRY, detail)
    affine, note = placed()
    axes = io_orientation(affine) if spans_a_volume(affine) else np.array([np.nan])
    if not np.isfinite(axes).all():
        raise ScanError(Reason.BAD_GEOMETRY, "the axes of its voxels do not span a volume")
    turn = ornt_transform(axes, axcodes2ornt(("L", "P", "S")))
    x, y, z = (shape[int(axis)] for axis in np.argsort(turn[:, 0]))
    turned = np.asarray(affine @ inv_ornt_aff(turn, shape))
    _check_unit((x, y), turned)
    return ImageHeader(shape=(x, y, z), affine=turned, turn=turn, note=note)


def _check_unit(shape: tuple[int, int], affine: Float[np.ndarray, "4 4"]) -> None:
    """Refuse what is a head in another unit of length, and in millimetres is none."""
    pixel_mm = np.linalg.norm(affine[:3, :2], axis=0)
    low, high = HEAD_PIXEL_MM
    if low <= pixel_mm.min() and pixel_mm.max() <= high:
        return
    for unit, factor in _OTHER_UNITS_MM.items():
        fields_mm = pixel_mm * shape * factor
        if HEAD_FIELD_MM[0] <= fields_mm.min() and fields_mm.max() <= HEAD_FIELD_MM[1]:
            detail = (
                f"pixels of {pixel_mm[0]:.3g} x {pixel_mm[1]:.3g} mm: its lengths look like "
                f"{unit}; write them in millimetres"
            )
            raise ScanError(Reason.BAD_GEOMETRY, detail)


def _damaged_is_unreadable(read: Callable[[], T]) -> T:
    try:
        return read()
    except ScanError:
        raise
    except _DAMAGED as error:
        detail = f"the file is damaged or ends too early ({type(error).__name__})"
        raise ScanError(Reason.UNREADABLE, detail) from error
