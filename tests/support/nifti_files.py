"""NIfTI files written field by field, as no library would write them."""

import gzip
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float, Shaped

SHAPE = (6, 7, 5)
VOXELS = np.random.default_rng(3).integers(-1024, 2000, SHAPE).astype(np.int16)
AFFINE = np.array(
    [[-0.9, 0.0, 0.0, 50.0], [0.0, -1.1, 0.0, 60.0], [0.0, 0.0, 2.5, -70.0], [0, 0, 0, 1.0]]
)
"""Of columns to the left, rows to the back and slices to the head."""


def nifti_bytes(
    *,
    sform: Float[np.ndarray, "4 4"] | None = None,
    qform: Float[np.ndarray, "4 4"] | None = None,
    codes: tuple[int, int] = (1, 1),
    voxels: Shaped[np.ndarray, "..."] = VOXELS,
    kind: type[nib.Nifti1Header] = nib.Nifti1Header,
    endianness: Literal["<", ">"] = "<",
    **fields: Any,
) -> bytes:
    """A file of these forms; one that is None has code 0.

    Args:
        sform: From voxel to RAS mm.
        qform: Likewise; without shear. It gives `pixdim`, or else the sform does.
        codes: Of the sform and of the qform.
        voxels: In the order of the file.
        kind: `Nifti1Header` or `Nifti2Header`.
        endianness: `<` or `>`.
        fields: Of the header, set last: `pixdim` is its three voxel sizes.
    """
    header = kind(endianness=endianness)
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header["xyzt_units"] = 2
    header["vox_offset"] = 544 if kind is nib.Nifti2Header else 352
    header["magic"] = header.single_magic
    if sform is not None:
        header.set_sform(sform, code=codes[0])
        header["pixdim"][1:4] = np.linalg.norm(sform[:3, :3], axis=0)
    if qform is not None:
        header.set_qform(qform, code=codes[1])
    header["pixdim"][1:4] = fields.pop("pixdim", header["pixdim"][1:4])
    for name, value in fields.items():
        header[name] = value
    content = voxels.astype(voxels.dtype.newbyteorder(endianness)).tobytes("F")
    return bytes(header.binaryblock) + bytes(4) + content


def write_nifti(path: Path, **content: Any) -> str:
    """Write `nifti_bytes`, packed if its name says so."""
    plain = nifti_bytes(**content)
    path.write_bytes(gzip.compress(plain, 1) if path.suffix == ".gz" else plain)
    return str(path)
