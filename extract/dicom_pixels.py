"""DICOM pixels: from the files of one scan, to a volume in HU.

Sources: PS3.3 C.11.1 (modality LUT: HU = slope · stored + intercept) and C.7.5.1.1.2 (padding).
Decoding is pydicom's, with the plug-ins of GDCM, OpenJPEG and CharLS.

What headers say wrongly, and what is done:
- Stored values equal to the padding value become -1024 HU, compared as bits, so that a sign lost
  on the way does not matter. A padding value inside the range of tissue is left alone.
- HU beyond 16 bits come from padding that wrapped around (63536 for -2000): -1024.
- MONOCHROME1 changes the display, not the stored values: nothing is inverted.
- JPEG Extended with 12 bits has no decoder that is always right: refused.
- Values below -1024 that no header explains stay as they are: they tell of a wrong rescale.

Axes: z slices, y rows, x columns.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Int16, Integer, Shaped
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    JPEG2000TransferSyntaxes,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
)

from ctfm.extract.codestream import claimed_size, is_cut_short
from ctfm.extract.dicom import Plane, SeriesFacts, read_object
from ctfm.extract.dicom_values import as_whole, value_of
from ctfm.extract.geometry import check_order, measure_stack
from ctfm.extract.identity import check_unchanged, planes_digest
from ctfm.extract.sources import Opener, is_hostile_ratio
from ctfm.extract.volume import Volume
from ctfm.extract.voxels import MAX_VOXELS, PADDING_HU
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

TISSUE_HU = (-900.0, 3071.0)
"""Padding inside this range is not told apart from what was scanned."""
MAX_SIDE_PX = 4096
_CODESTREAMS = {*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes}


def read_dicom(files: Sequence[str], *, digest: str | None = None) -> Volume:
    """Read one scan, in whatever order its files are given.

    Args:
        files: Names as `ctfm.extract.sources.find` gives them.
        digest: `ctfm.extract.identity.planes_digest` of what was indexed.

    Raises:
        OSError: If a file is gone.
        ScanError: If a file cannot be decoded, the planes are not those that were indexed, or
            they are no volume.
    """
    planes: list[Plane] = []
    hu: list[Int16[np.ndarray, "y x"]] = []
    claim = _Claim()
    with Opener() as opener:
        for file in files:
            for plane, plane_hu in _read_file(opener, file, claim):
                planes.append(plane)
                hu.append(plane_hu)
    check_unchanged(planes_digest(planes), digest)
    facts = planes[0].facts
    if any(plane.position_mm is None or not plane.facts.same_plane(facts) for plane in planes):
        raise ScanError(Reason.BAD_GEOMETRY, "its images are not parallel, or have no position")
    if facts.axes is None or facts.pixel_mm is None:
        raise ScanError(Reason.BAD_GEOMETRY, "orientation or pixel size is missing")
    origin_mm = np.array([plane.position_mm for plane in planes])
    steps = {"row_step_mm": facts.row_step_mm, "column_step_mm": facts.column_step_mm}
    stack = measure_stack(origin_mm, **steps)
    check_order(stack)
    return Volume(
        hu=np.stack([hu[i] for i in stack.order]),
        slice_origin_mm=origin_mm[stack.order],
        **steps,
    )


def encoding_fault(facts: SeriesFacts) -> ScanError | None:
    """Why pixels with these facts are not read, whatever they show; None if they are."""
    if facts.unplaced_frames > 1:
        detail = f"{facts.unplaced_frames} frames in one object without a position for each"
        return ScanError(Reason.UNSUPPORTED_ENCODING, detail)
    if not _decodable(facts.transfer_syntax, facts.bits_stored):
        bits = f"{_syntax_name(facts.transfer_syntax)} with {facts.bits_stored} bits"
        detail = f"no trusted decoder for {bits}: decompress the files first"
        return ScanError(Reason.UNSUPPORTED_ENCODING, detail)
    return None


@cache
def _syntax_name(transfer_syntax: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a malformed UID
        name = UID(transfer_syntax).name
    return "an unknown transfer syntax" if name == transfer_syntax else name


@cache
def _decodable(transfer_syntax: str, bits_stored: int) -> bool:
    """Whether a decoder for such pixels is installed."""
    if transfer_syntax == JPEGExtended12Bit and bits_stored > 8:
        return False  # GDCM decodes it, but not always right; pydicom refuses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a malformed UID
        try:
            return bool(get_decoder(transfer_syntax).is_available)
        except NotImplementedError:
            return False


@dataclass
class _Claim:
    """What the headers of a scan say that its files hold, as far as they were read."""

    pixels: int = 0
    held_bytes: int = 0

    def add(self, facts: SeriesFacts, *, frames: int, held_bytes: int) -> None:
        """Refuse more than a scan can have, or than files so small can hold."""
        self.pixels += frames * facts.rows * facts.columns
        self.held_bytes += held_bytes
        sides = (facts.rows, facts.columns)
        if min(sides) < 2 or max(sides) > MAX_SIDE_PX or self.pixels > MAX_VOXELS:
            detail = (
                f"the header claims {frames} images of {sides[0]} x {sides[1]} pixels, the scan "
                f"{self.pixels:.1e} up to here"
            )
            raise ScanError(Reason.BAD_GEOMETRY, detail)
        if is_hostile_ratio(self.pixels * facts.bits_allocated // 8, self.held_bytes):
            detail = "its pixels would unpack to so much that the files look hostile"
            raise ScanError(Reason.UNREADABLE, detail)


def _read_file(
    opener: Opener, file: str, claim: _Claim
) -> Iterator[tuple[Plane, Int16[np.ndarray, "y x"]]]:
    with opener.open(file) as stream, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset, planes = read_object(stream, file, with_pixels=True)
        facts = _image_facts(planes)
        claim.add(facts, frames=len(planes), held_bytes=stream.seek(0, 2))
        if any("End of file" in str(warning.message) for warning in caught):
            raise ScanError(Reason.UNREADABLE, "the file ends before its pixels do")
        stored = _decode(dataset, facts, frames=len(planes))
    for plane, image in zip(planes, stored, strict=True):
        yield plane, _to_hu(image, plane, _padding(dataset))


def _image_facts(planes: Sequence[Plane]) -> SeriesFacts:
    facts = planes[0].facts if planes else None
    if facts is None or not facts.has_pixels:
        raise ScanError(Reason.NOT_AN_IMAGE, "it holds no pixels")
    if facts.samples != 1:
        raise ScanError(Reason.COLOUR, f"{facts.samples} samples a pixel")
    if planes[0].truncated:
        raise ScanError(Reason.UNREADABLE, "the file ends before its pixels do")
    if (fault := encoding_fault(facts)) is not None:
        raise fault
    return facts


def _decode(
    dataset: Dataset, facts: SeriesFacts, *, frames: int
) -> Shaped[np.ndarray, "frames y x"]:
    dataset.file_meta = getattr(dataset, "file_meta", None) or FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = facts.transfer_syntax
    try:
        if facts.transfer_syntax in _CODESTREAMS:
            _check_codestreams(dataset, facts, frames=frames)
        pixels = np.asarray(dataset.pixel_array)
    except ScanError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged data
        detail = f"the pixels cannot be decoded ({type(error).__name__})"
        raise ScanError(Reason.UNREADABLE, detail) from error
    return pixels.reshape(frames, facts.rows, facts.columns)


def _check_codestreams(dataset: Dataset, facts: SeriesFacts, *, frames: int) -> None:
    for frame in generate_frames(dataset.PixelData, number_of_frames=frames):
        size = claimed_size(frame)
        if size != (facts.rows, facts.columns, 1):
            detail = (
                f"its header says {facts.rows} x {facts.columns} pixels, the compressed image "
                f"{size[0]} x {size[1]} of {size[2]}"
            )
            raise ScanError(Reason.UNREADABLE, detail)
        if facts.transfer_syntax in JPEGTransferSyntaxes and is_cut_short(frame):
            raise ScanError(Reason.UNREADABLE, "a compressed image ends before its pixels do")


def _to_hu(
    stored: Shaped[np.ndarray, "y x"], plane: Plane, padding: tuple[int, int] | None
) -> Int16[np.ndarray, "y x"]:
    slope, intercept = plane.slope, plane.intercept
    if not (np.isfinite([slope, intercept]).all() and slope > 0):
        detail = f"rescale slope {slope:g} and intercept {intercept:g}"
        raise ScanError(Reason.BAD_RESCALE, detail)
    limits = np.iinfo(np.int16)
    whole = slope == 1 and intercept.is_integer() and stored.dtype.kind in "iu"
    ends = [float(end) + intercept for end in (stored.min(), stored.max(), 0)]
    if whole and limits.min <= min(ends) and max(ends) <= limits.max:
        hu: Shaped[np.ndarray, "y x"] = np.add(
            stored, np.int16(intercept), dtype=np.int16, casting="unsafe"
        )
    else:
        hu = np.rint(stored.astype(np.float32) * np.float32(slope) + np.float32(intercept))
        if not np.isfinite(hu).all():
            raise ScanError(Reason.NOT_FINITE, "NaN or infinite voxels")
        hu[hu > limits.max] = PADDING_HU
        hu = hu.clip(limits.min, None)
    if padding is not None and np.issubdtype(stored.dtype, np.integer):
        hu[_padded(stored, hu, padding)] = PADDING_HU
    return hu.astype(np.int16, copy=False)


def _padded(
    stored: Integer[np.ndarray, "y x"], hu: Shaped[np.ndarray, "y x"], padding: tuple[int, int]
) -> Bool[np.ndarray, "y x"]:
    bits = 8 * stored.dtype.itemsize
    low, high = (
        np.array(value % (1 << bits), dtype=f"u{stored.dtype.itemsize}").view(stored.dtype)
        for value in padding
    )
    inside = (stored >= min(low, high)) & (stored <= max(low, high))
    return inside & ((hu <= TISSUE_HU[0]) | (hu > TISSUE_HU[1]))


def _padding(dataset: Dataset) -> tuple[int, int] | None:
    first = as_whole(value_of(dataset, "PixelPaddingValue"))
    last = as_whole(value_of(dataset, "PixelPaddingRangeLimit"))
    return None if first is None else (first, first if last is None else last)
