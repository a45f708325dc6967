"""NIfTI: from a file, to what its header says and the values of its voxels.

Versions 1 and 2 in one file (`.nii`), either byte order, plain or gzip. Headers are read with
nibabel; which of its affines is believed is decided by `nifti_forms`. Lengths in metres or microns
become millimetres, as `xyzt_units` says; unknown units are millimetres, as most writers leave them
unknown. `scl_slope` of 0 or NaN means that nothing is rescaled.

Axes: i j k as in the file.
"""

import logging
import math
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, cast

import nibabel as nib
import numpy as np
from jaxtyping import Float, Shaped
from nibabel.quaternions import quat2mat

from ctfm.extract.nifti_forms import Affine, Forms, short_step_deg, spans_a_volume
from ctfm.extract.sidecars import find_sidecar
from ctfm.extract.sources import Opener
from ctfm.extract.voxels import GZIP_MAGIC, read_voxels, unpack
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_MM = {1: 1000.0, 3: 0.001}
"""Millimetres of the units of length that are not: metres, microns."""
_MAX_SQUARED_NORM = 1.001
"""The stored part of a quaternion is no rotation beyond it; it leaves room for rounding."""

# What nibabel mends in a header it would print, for each of many files.
_SILENT = logging.Logger("silent", level=logging.CRITICAL + 1)
_SERIOUS = 40


@dataclass(frozen=True, kw_only=True, eq=False)
class NiftiHeader:
    """What a NIfTI header says."""

    shape: tuple[int, ...]
    forms: Forms
    dtype: np.dtype
    rescale: tuple[np.float32, np.float32] | None
    """Slope and intercept; None where the values are stored as they are."""
    packed: bool
    start: int
    """Unpacked bytes before the first voxel."""
    held_bytes: int
    """How long the file is, packed or not."""

    @property
    def claimed_bytes(self) -> int:
        """How long the file would be unpacked, by its header."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def read_values(self, stream: BufferedIOBase) -> Shaped[np.ndarray, "..."]:
        """Read the voxels as they are stored, from the start of the file.

        Raises:
            EOFError: If it ends too early.
            isal_zlib.error: If it is damaged.
        """
        skip_bytes = self.start
        if not self.packed:
            stream.seek(self.start)
            skip_bytes = 0
        return read_voxels(
            stream, self.shape, self.dtype, packed=self.packed, skip_bytes=skip_bytes
        )


def read_nifti_header(stream: BufferedIOBase) -> NiftiHeader:
    """Read the header of a NIfTI file.

    Raises:
        ScanError: If its voxels are of a kind that is not read.
        Exception: Those of nibabel and of unpacking, if it is damaged.
    """
    held_bytes = stream.seek(0, 2)
    stream.seek(0)
    packed = stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    stream.seek(0)
    raw = _parsed(bytes(unpack(stream, 540)) if packed else stream.read(540))
    as_stored = raw.copy()
    raw.check_fix(logger=_SILENT, error_level=_SERIOUS)
    shape = raw.get_data_shape()
    return NiftiHeader(
        shape=shape,
        forms=_forms(as_stored, shape),
        dtype=_dtype(raw),
        rescale=_rescale(raw),
        packed=packed,
        start=raw.get_data_offset(),
        held_bytes=held_bytes,
    )


def is_of_single_images(opener: Opener, file: str, forms: Forms) -> bool | None:
    """Whether dcm2niix made a file of single images; None where that is not known, or not needed.

    It is needed for `short_step_deg`, and ImageType in the JSON beside the file tells it: value 3
    is AXIAL or LOCALIZER in a CT Image (PS3.3 C.8.2.1.1.1), VOLUME in an enhanced object of a head
    (C.8.16.1.3).
    """
    if short_step_deg(forms) is None:
        return None
    image_type = [value.upper() for value in find_sidecar(opener, file).image_type]
    if ("AXIAL" in image_type) == ("VOLUME" in image_type):
        return None
    return "AXIAL" in image_type


def _parsed(start: bytes) -> Any:
    sizes = (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
    kind = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
    return kind(start[: kind.template_dtype.itemsize], check=False)


def _dtype(raw: Any) -> np.dtype:
    dtype = raw.get_data_dtype()
    if dtype.fields is not None:
        raise ScanError(Reason.COLOUR, "a colour image")
    if dtype.kind not in "iuf":
        raise ScanError(Reason.UNSUPPORTED_ENCODING, "voxels that are not plain numbers")
    return cast(np.dtype, dtype)


def _rescale(raw: Any) -> tuple[np.float32, np.float32] | None:
    slope, intercept = np.float32(raw["scl_slope"]), np.float32(raw["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return None
    if not np.isfinite(intercept):
        raise ScanError(Reason.BAD_RESCALE, f"rescale slope {slope:g} and no intercept")
    return None if slope == 1 and intercept == 0 else (slope, intercept)


def _forms(raw: Any, shape: tuple[int, ...]) -> Forms:
    unit_mm = _MM.get(int(raw["xyzt_units"]) & 7, 1.0)
    sizes_mm = np.abs(np.asarray(raw["pixdim"][1:4], float)) * unit_mm
    has_sizes = np.isfinite(sizes_mm).all() and (sizes_mm > 0).all()
    sform = np.vstack([raw["srow_x"], raw["srow_y"], raw["srow_z"], [0, 0, 0, 1]]).astype(float)
    sform[:3] *= unit_mm
    codes = int(raw["sform_code"]), int(raw["qform_code"])
    usable = codes[1] > 0 and has_sizes
    sides = (*shape, 1, 1, 1)
    return Forms(
        shape=(sides[0], sides[1], sides[2]),
        sform=sform if codes[0] > 0 and spans_a_volume(sform) else None,
        qform=_qform(raw, sizes_mm, unit_mm) if usable else None,
        sform_code=codes[0],
        qform_code=codes[1],
        pixdim_mm=sizes_mm if has_sizes else None,
        by_dcm2niix=b"Time=" in bytes(raw["descrip"]),
    )


def _qform(raw: Any, sizes_mm: Float[np.ndarray, "3"], unit_mm: float) -> Affine | None:
    """By method 2 of `nifti1.h`. None where the quaternion is no rotation."""
    b, c, d = (float(raw[f"quatern_{axis}"]) for axis in "bcd")
    squared = b * b + c * c + d * d
    offsets_mm = np.array([float(raw[f"qoffset_{axis}"]) for axis in "xyz"]) * unit_mm
    if not (squared <= _MAX_SQUARED_NORM and np.isfinite(offsets_mm).all()):
        return None
    turn = quat2mat([math.sqrt(max(0.0, 1 - squared)), b, c, d])
    hand = -1.0 if raw["pixdim"][0] < 0 else 1.0
    affine = np.eye(4)
    affine[:3, :3] = turn * sizes_mm * [1, 1, hand]
    affine[:3, 3] = offsets_mm
    return affine
