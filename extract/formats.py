"""Formats: NIfTI, NRRD and MetaImage, to a header and to a volume in HU.

NIfTI headers are read with nibabel, the others by `text_headers`. Any order and sense of the axes
is turned so that slices are axial: columns run to the patient's left, rows to the back, slices to
the head. The affine may shear (a tilted stack).

NIfTI: where sform and qform are both coded and disagree, sform is used and a note says so; where
neither is coded, left cannot be told from right and the file is refused.

Axes: i j k in a file, z y x in a `Volume`.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedIOBase
from itertools import product
from typing import Any, TypeVar, cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from jaxtyping import Float, Int16, Shaped
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
from ctfm.extract.identity import file_digest
from ctfm.extract.sources import Opener, format_of
from ctfm.extract.text_headers import TextHeader, read_text_header
from ctfm.extract.volume import Volume
from ctfm.extract.voxels import MAX_VOXELS, check_claim, read_voxels
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

NOTED_DISAGREEMENT_MM = 1.0
MAX_ANISOTROPY = 2.0
"""A voxel longer than this in-plane, against its shorter sides, is of a thick non-axial slice."""

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

# What nibabel mends in a header it would print, for each of many files.
_SILENT = logging.Logger("silent", level=logging.CRITICAL + 1)
_SERIOUS = 40


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


def read_image_header(opener: Opener, file: str) -> ImageHeader:
    """Read the geometry of a NIfTI, NRRD or MetaImage file.

    Raises:
        OSError: If it is gone.
        ScanError: If it cannot be parsed, is no plain volume, does not say where it lies, or is too
            short for its voxels.
    """
    if format_of(file) == "nifti":
        with _nifti_stream(opener, file) as nifti:
            return _nifti_geometry(_parse_nifti(nifti), nifti)
    return _text_geometry(opener, _parse_text(opener, file))


def image_digest(opener: Opener, file: str) -> str:
    """`file_digest` of a file, and of the one with its voxels if its header names another.

    Raises:
        OSError: If one is gone.
        ScanError: If the header cannot be parsed.
    """
    files = [file]
    if format_of(file) != "nifti" and (data := _parse_text(opener, file).data) != file:
        files.append(data)
    digests = []
    for one in files:
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
            with _nifti_stream(opener, file) as nifti:
                raw = _parse_nifti(nifti)
                header = _nifti_geometry(raw, nifti)
                hu = _damaged_is_unreadable(lambda: _nifti_hu(raw, nifti.stream))
        else:
            text = _parse_text(opener, file)
            header = _text_geometry(opener, text)
            hu = _damaged_is_unreadable(lambda: _to_hu(_text_values(opener, text)))
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Nifti:
    """A NIfTI file that is open, and unpacked as it is read."""

    stream: BufferedIOBase
    held_bytes: int
    packed: bool


@contextmanager
def _nifti_stream(opener: Opener, file: str) -> Iterator[_Nifti]:
    with opener.open(file) as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        held_bytes = stream.seek(0, 2)
        stream.seek(0)
        if not packed:
            yield _Nifti(stream=stream, held_bytes=held_bytes, packed=False)
            return
        with igzip.IGzipFile(fileobj=stream) as unpacked:
            yield _Nifti(stream=unpacked, held_bytes=held_bytes, packed=True)


def _parse_nifti(nifti: _Nifti) -> Any:
    def parse() -> Any:
        start = nifti.stream.read(4)
        nifti.stream.seek(0)
        sizes = (int.from_bytes(start, "little"), int.from_bytes(start, "big"))
        kind = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
        header = kind(nifti.stream.read(kind.template_dtype.itemsize), check=False)
        header.check_fix(logger=_SILENT, error_level=_SERIOUS)
        return header

    return _damaged_is_unreadable(parse)


def _nifti_geometry(raw: Any, nifti: _Nifti) -> ImageHeader:
    dtype = raw.get_data_dtype()
    if dtype.fields is not None:
        raise ScanError(Reason.COLOUR, "a colour image")
    if dtype.kind not in "iuf":
        raise ScanError(Reason.UNSUPPORTED_ENCODING, "voxels that are not plain numbers")
    forms = [
        _damaged_is_unreadable(form)
        for form, code in ((raw.get_sform, "sform_code"), (raw.get_qform, "qform_code"))
        if raw[code] > 0
    ]
    usable = [form for form in forms if _is_affine(form)]
    if not usable:
        detail = "neither its sform nor its qform says where the voxels lie"
        raise ScanError(Reason.BAD_GEOMETRY, detail)
    header = _turned(raw.get_data_shape(), usable[0])
    start = _damaged_is_unreadable(raw.get_data_offset)
    claimed_bytes = start + math.prod(header.shape) * dtype.itemsize
    check_claim(claimed_bytes, nifti.held_bytes, packed=nifti.packed)
    apart_mm = _apart_mm(raw.get_data_shape()[:3], usable[0], usable[-1])
    if apart_mm < NOTED_DISAGREEMENT_MM:
        return header
    return replace(header, note=f"sform and qform are {apart_mm:.0f} mm apart; sform is used")


def _is_affine(affine: Float[np.ndarray, "4 4"]) -> bool:
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9)


def _apart_mm(
    shape: tuple[int, ...], one: Float[np.ndarray, "4 4"], other: Float[np.ndarray, "4 4"]
) -> float:
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in shape))])
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def _nifti_hu(raw: Any, stream: BufferedIOBase) -> Int16[np.ndarray, "x y z"]:
    stream.seek(raw.get_data_offset())
    values = read_voxels(stream, raw.get_data_shape(), raw.get_data_dtype(), packed=False)
    slope, intercept = raw.get_slope_inter()
    if slope is None or (slope, intercept) == (1, 0):
        return _to_hu(values)
    return _to_hu(values, rescale=(np.float32(slope), np.float32(intercept)))


def _parse_text(opener: Opener, file: str) -> TextHeader:
    with opener.open(file) as stream:
        return _damaged_is_unreadable(lambda: read_text_header(stream, file))


def _text_geometry(opener: Opener, text: TextHeader) -> ImageHeader:
    header = _turned(text.shape, text.affine)
    with opener.open(text.data) as stream:
        held_bytes = stream.seek(0, 2) - (text.start or 0)
    check_claim(text.claimed_bytes, held_bytes, packed=text.packed)
    return header


def _text_values(opener: Opener, text: TextHeader) -> Shaped[np.ndarray, "..."]:
    with opener.open(text.data) as stream:
        if text.start is None:
            stream.seek(-text.claimed_bytes, 2)
        else:
            stream.seek(text.start)
        return read_voxels(stream, text.shape, text.dtype, packed=text.packed)


def _turned(shape: tuple[int, ...], affine: Float[np.ndarray, "4 4"]) -> ImageHeader:
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
    axes = io_orientation(affine) if _is_affine(affine) else np.array([np.nan])
    if not np.isfinite(axes).all():
        raise ScanError(Reason.BAD_GEOMETRY, "the axes of its voxels do not span a volume")
    turn = ornt_transform(axes, axcodes2ornt(("L", "P", "S")))
    x, y, z = (shape[int(axis)] for axis in np.argsort(turn[:, 0]))
    turned = np.asarray(affine @ inv_ornt_aff(turn, shape))
    return ImageHeader(shape=(x, y, z), affine=turned, turn=turn, note="")


def _to_hu(
    values: Shaped[np.ndarray, "..."], *, rescale: tuple[np.float32, np.float32] | None = None
) -> Int16[np.ndarray, "x y z"]:
    """Slice by slice, as copies in between would be larger than the volume."""
    x, y, z = values.shape[:3]
    values = values.reshape(x, y, z)
    if values.dtype == np.int16 and rescale is None:
        return values
    hu = np.empty((x, y, z), np.int16, order="F")
    limits = np.iinfo(np.int16)
    for k in range(z):
        image = values[:, :, k]
        if rescale is not None:
            slope, intercept = rescale
            image = image * slope + intercept
        if image.dtype.kind == "f":
            if not np.isfinite(image).all():
                raise ScanError(Reason.NOT_FINITE, "NaN or infinite voxels")
            image = np.rint(image)
        hu[:, :, k] = image.clip(limits.min, limits.max)
    return hu


def _damaged_is_unreadable(read: Callable[[], T]) -> T:
    try:
        return read()
    except ScanError:
        raise
    except _DAMAGED as error:
        detail = f"the file is damaged or ends too early ({type(error).__name__})"
        raise ScanError(Reason.UNREADABLE, detail) from error
