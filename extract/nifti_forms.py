"""NIfTI forms: from the sform, the qform and the voxel sizes of a header, to the affine that holds.

Source: `nifti1.h` (methods 1 to 3, codes of the forms, `pixdim`). What writers make of it, and what
other readers take, is in docs/inputs.md. The first rule that decides:

1. A form of code 0, or that spans no volume, says nothing; nor does the identity beside another.
2. A form whose voxels have other sizes than `pixdim` loses. `pixdim` of 1 x 1 x 1 without a qform
   is what an empty header holds: it says nothing.
3. A qform that is the sform without its shear loses: a quaternion cannot hold the tilt of a gantry.
4. A form of the scanner (code 1) is believed before an aligned one or one of a template.
5. Forms that turn the image alike differ by what alignment undoes: the sform.
6. Nothing decides (mirrored, or turned by far): refused.

dcm2niix writes the uncorrected file of a tilted series with a sform whose slice step runs along the
patient's axis, but is as long as the distance of the slices along their normal: short by the cosine
of the tilt, if it was made of single images. If it was made of an enhanced object it is right, and
the header is the same otherwise. So `believed` has to be told what the file was made of.

Lengths are millimetres, positions RAS. Axes: i j k as in the file.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float

from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

Affine = Float[np.ndarray, "4 4"]

SCANNER = 1
"""The code of a form in the coordinates of the scanner."""
SIZE_TOLERANCE = 0.01
NOTED_APART_MM = 1.0
MAX_TURN_DEG = 30.0
"""Forms that turn an image less differently are alike for the alignment."""
MIN_SHEAR_DEG = 0.5
MAX_SHORT = 0.005
"""A slice step that is short by less is taken: 0.8 mm of a head."""
_MIN_UNIT_VOLUME = 0.05
"""The least volume that axes of length 1 span. Chosen: a gantry tilt of 30 degrees has 0.87."""
_SAME_AXIS = 0.003
"""Between the ends of two axes as long as 1. Chosen: less than the 0.0087 of `MIN_SHEAR_DEG`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Forms:
    """What a header says of the place of its voxels."""

    shape: tuple[int, int, int]
    sform: Affine | None
    """None where its code is 0, or where it spans no volume."""
    qform: Affine | None
    """None where its code is 0, or where it is no rotation."""
    sform_code: int
    qform_code: int
    pixdim_mm: Float[np.ndarray, "3"] | None
    """None where it is not positive."""
    by_dcm2niix: bool
    """Whether the header bears the traces of that converter."""


def spans_a_volume(affine: Affine) -> bool:
    """Whether its axes are finite and lie in no plane."""
    if not np.isfinite(affine).all():
        return False
    lengths = _lengths(affine)
    return bool((lengths > 0).all() and abs(np.linalg.det(_axes(affine))) > _MIN_UNIT_VOLUME)


def believed(forms: Forms, *, of_single_images: bool | None) -> tuple[Affine, str]:
    """Choose the affine of an image.

    Args:
        forms: What its header says.
        of_single_images: Whether `short_step_deg` is of a file that was made of single images, and
            not of an enhanced object; None if that is not known.

    Returns:
        From voxel to RAS mm, and what a user should know of it; "" for nothing.

    Raises:
        ScanError: `BAD_GEOMETRY`, with both sides of a contradiction that nothing decides.
    """
    sform, qform = _said(forms)
    if sform is None and qform is None:
        detail = "neither its sform nor its qform says where the voxels lie"
        raise ScanError(Reason.BAD_GEOMETRY, detail)
    if sform is None or qform is None:
        affine, note = _only(forms, sform, qform)
    else:
        affine, note = _of_two(forms, sform, qform)
    if affine is not sform:
        return affine, note
    return _with_true_step(forms, affine, note=note, of_single_images=of_single_images)


def short_step_deg(forms: Forms) -> float | None:
    """The tilt of an image whose slice step dcm2niix may have written short; else None.

    That converter codes both forms as the scanner's. dicom2nifti and nibabel write a sform of code
    2 alone, which is true unless the header kept traces of dcm2niix.
    """
    sform = forms.sform
    if sform is None or not _runs_along_the_patient(forms, sform):
        return None
    another_wrote_it = forms.sform_code != SCANNER and forms.qform is None
    return None if another_wrote_it and not forms.by_dcm2niix else _shear_deg(sform)


def _said(forms: Forms) -> tuple[Affine | None, Affine | None]:
    """Rule 1."""
    sform, qform = forms.sform, forms.qform
    if sform is not None and qform is not None:
        s_unset, q_unset = (np.array_equal(form, np.eye(4)) for form in (sform, qform))
        if s_unset != q_unset:
            return (None, qform) if s_unset else (sform, None)
    return sform, qform


def _only(forms: Forms, sform: Affine | None, qform: Affine | None) -> tuple[Affine, str]:
    if sform is None:
        assert qform is not None
        return qform, "its sform says nothing; qform is used" if forms.sform_code else ""
    note = "its qform says nothing; sform is used" if forms.qform_code else ""
    sizes_mm = forms.pixdim_mm
    if sizes_mm is None or (sizes_mm == 1).all() or _agrees(sform, sizes_mm):
        return sform, note
    detail = (
        f"its sform says voxels of {_by(_lengths(sform))} mm, its pixdim {_by(sizes_mm)} mm, and "
        "no qform tells which is right"
    )
    raise ScanError(Reason.BAD_GEOMETRY, detail)


def _of_two(forms: Forms, sform: Affine, qform: Affine) -> tuple[Affine, str]:
    """Rules 2 to 6."""
    sizes_mm = _lengths(qform)
    if not _agrees(sform, sizes_mm):
        return _of_other_sizes(forms, sform, qform)
    apart_mm = _apart_mm(forms.shape, sform, qform)
    if apart_mm < NOTED_APART_MM:
        return sform, ""
    noted = f"sform and qform are {apart_mm:.0f} mm apart; "
    if _is_unsheared(qform, sform):
        return sform, f"{noted}sform is used, as only it can hold a tilt"
    if (forms.sform_code == SCANNER) != (forms.qform_code == SCANNER):
        if forms.sform_code == SCANNER:
            return sform, f"{noted}sform is used"
        return qform, f"{noted}qform is used, as it is the scanner's"
    if not _same_hand(sform, qform):
        raise _undecided("its sform and its qform are mirror images of each other", forms)
    turn_deg = _turn_deg(sform, qform)
    if turn_deg > MAX_TURN_DEG:
        raise _undecided(f"its sform and its qform differ by a turn of {turn_deg:.0f} deg", forms)
    return sform, f"{noted}sform is used"


def _of_other_sizes(forms: Forms, sform: Affine, qform: Affine) -> tuple[Affine, str]:
    said = (
        f"sform says voxels of {_by(_lengths(sform))} mm, qform and pixdim "
        f"{_by(_lengths(qform))} mm"
    )
    sheared = _shear_deg(sform) > MIN_SHEAR_DEG
    if forms.sform_code == SCANNER and sheared and _is_unsheared(qform, sform):
        raise _undecided(f"{said}, and only the sform can hold its tilt", forms)
    return qform, f"{said}; qform is used"


def _undecided(what: str, forms: Forms) -> ScanError:
    detail = (
        f"{what} (codes {forms.sform_code} and {forms.qform_code}): nothing tells which is right; "
        "convert the DICOM files again, or set the form that is wrong to code 0"
    )
    return ScanError(Reason.BAD_GEOMETRY, detail)


def _with_true_step(
    forms: Forms, sform: Affine, *, note: str, of_single_images: bool | None
) -> tuple[Affine, str]:
    """The sform of a tilted image with the slice step that dcm2niix should have written."""
    tilt_deg = short_step_deg(forms)
    if tilt_deg is None:
        return sform, note or _tilt_note(forms, sform)
    if of_single_images is None:
        detail = (
            f"tilted by {tilt_deg:.1f} deg with a sform as of dcm2niix, whose slice step is short "
            "if it was made of single images: only dcm2niix's JSON file beside it can tell; index "
            "the DICOM files, or dcm2niix's `_Tilt` file"
        )
        raise ScanError(Reason.BAD_GEOMETRY, detail)
    if not of_single_images:
        return sform, note
    step = int(np.abs(_axes(sform)[2]).argmax())
    lengthened = sform.copy()
    lengthened[:3, step] /= np.cos(np.radians(tilt_deg))
    said = f"{_lengths(sform)[step]:.4g} to {_lengths(lengthened)[step]:.4g} mm"
    return lengthened, f"tilted by {tilt_deg:.1f} deg; dcm2niix's slice step lengthened from {said}"


def _tilt_note(forms: Forms, sform: Affine) -> str:
    if not _runs_along_the_patient(forms, sform):
        return ""
    return f"tilted by {_shear_deg(sform):.1f} deg; its slice step is taken as written"


def _runs_along_the_patient(forms: Forms, sform: Affine) -> bool:
    """Whether it is tilted, with one axis along z that is as long as `pixdim` says."""
    sizes_mm = forms.pixdim_mm
    if np.count_nonzero(sform[:3, :3]) == 3:  # most files: no shear, told at once
        return False
    along = abs(_axes(sform)[2]) > 1 - 1e-6
    if sizes_mm is None or along.sum() != 1:
        return False
    is_long_as_said = bool(abs(_lengths(sform)[along] / sizes_mm[along] - 1) < 1e-3)
    short = 1 / np.cos(np.radians(_shear_deg(sform))) - 1
    return is_long_as_said and bool(short > MAX_SHORT)


def _lengths(affine: Affine) -> Float[np.ndarray, "3"]:
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0))


def _axes(affine: Affine) -> Float[np.ndarray, "3 3"]:
    return np.asarray(affine[:3, :3] / _lengths(affine))


def _agrees(form: Affine, sizes_mm: Float[np.ndarray, "3"]) -> bool:
    """Whether its voxels have these sizes; of a sheared form also the distances of its planes."""
    distances = 1 / np.linalg.norm(np.linalg.inv(form[:3, :3]), axis=1)
    off = [abs(lengths / sizes_mm - 1) for lengths in (_lengths(form), distances)]
    return bool((np.minimum(*off) <= SIZE_TOLERANCE).all())


def _shear_deg(affine: Affine) -> float:
    """How far its axes are from right angles, at most."""
    axes = _axes(affine)
    return float(np.degrees(np.arcsin(min(1.0, abs(axes.T @ axes - np.eye(3)).max()))))


def _is_unsheared(qform: Affine, sform: Affine) -> bool:
    """Whether the qform is the sform made orthogonal, one axis or all of them being turned."""
    if _shear_deg(sform) < MIN_SHEAR_DEG or not _same_hand(sform, qform):
        return False
    left, _, right = np.linalg.svd(_axes(sform))
    one = (np.linalg.norm(_axes(sform) - _axes(qform), axis=0) < _SAME_AXIS).sum() == 2
    return bool(one or np.allclose(left @ right, _axes(qform), atol=0.01))


def _same_hand(one: Affine, other: Affine) -> bool:
    return bool(np.linalg.det(one[:3, :3]) * np.linalg.det(other[:3, :3]) > 0)


def _turn_deg(one: Affine, other: Affine) -> float:
    cosine = (np.trace(_axes(one) @ _axes(other).T) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _apart_mm(shape: tuple[int, int, int], one: Affine, other: Affine) -> float:
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in shape))])
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def _by(sizes_mm: Float[np.ndarray, "3"]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes_mm)
