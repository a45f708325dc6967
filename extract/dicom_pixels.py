"""DICOM pixels: from the files of one scan, to a volume in HU.

Sources: PS3.3 C.11.1 (modality LUT: HU = slope · stored + intercept) and C.7.5.1.1.2 (padding),
PS3.5 8.1.1 (which bits of a word are the value). Decoding is pydicom's, with the plug-ins of GDCM,
OpenJPEG and CharLS.

What headers say wrongly, and what is done:
- Stored values equal to the padding value become -1024 HU, compared as bits, so that a sign lost
  on the way does not matter. A padding value inside the range of tissue is left alone.
- Bits above those stored may hold overlays, in any syntax: they are dropped after decoding.
- A scan without air, but with values that are air if their highest bit is a sign, is signed
  whatever PixelRepresentation says (`pixel_signs`).
- HU beyond 16 bits come from padding that wrapped around (63536 for -2000): -1024. Many such values
  inside the range of tissue are no padding, and refused.
- MONOCHROME1 changes the display, not the stored values: nothing is inverted.
- JPEG Extended with 12 bits has no decoder that is always right: refused.
- Values below -1024 that no header explains stay as they are: they tell of a wrong rescale.

Axes: z slices, y rows, x columns.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

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
from ctfm.extract.dicom_planes import flips_of, parallel_planes
from ctfm.extract.dicom_values import as_whole, value_of
from ctfm.extract.geometry import check_order, measure_stack
from ctfm.extract.identity import check_unchanged, planes_digest
from ctfm.extract.pixel_signs import StoredImage, lost_signs, with_signs
from ctfm.extract.sources import Opener, is_hostile_ratio
from ctfm.extract.volume import Volume
from ctfm.extract.voxels import (
    MAX_PADDING_VALUES,
    MAX_VOXELS,
    PADDING_HU,
    SIGNS_WERE_LOST,
    TISSUE_HU,
)
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_READ_BITS = (8, 16, 32)
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
    images: list[StoredImage] = []
    claim = _Claim()
    with Opener() as opener:
        for file in files:
            images += _read_file(opener, file, claim)
    planes = [image.plane for image in images]
    check_unchanged(planes_digest(planes), digest)
    hu = _to_hu(images)
    level = parallel_planes(planes)
    steps = {"row_step_mm": level.row_step_mm, "column_step_mm": level.column_step_mm}
    stack = measure_stack(level.origin_mm, **steps)
    check_order(stack)
    flips = flips_of(planes)
    return Volume(
        hu=np.stack([np.flip(hu[i], flips[i]) for i in stack.order]),
        slice_origin_mm=level.origin_mm[stack.order],
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
    said = _odd_encapsulation(facts) or _odd_bits(facts)
    return None if said is None else ScanError(Reason.UNSUPPORTED_ENCODING, said)


def _odd_encapsulation(facts: SeriesFacts) -> str | None:
    if facts.encapsulated == UID(facts.transfer_syntax).is_compressed:
        return None
    found, said = ("compressed", "plain") if facts.encapsulated else ("plain", "compressed")
    return f"its transfer syntax is one of {said} pixels, and they lie in the file as {found} ones"


def _odd_bits(facts: SeriesFacts) -> str | None:
    """What the header lacks or contradicts of how a value lies in its bits (PS3.5 8.1.1)."""
    if facts.bits_allocated not in _READ_BITS:
        return f"BitsAllocated is {facts.bits_allocated or 'missing'}; 8, 16 and 32 are read"
    if facts.signed is None:
        return "PixelRepresentation is missing: whether its values have a sign cannot be known"
    if not facts.bits_stored:
        return "BitsStored and HighBit are missing: which bits are the values cannot be known"
    below = facts.high_bit + 1 - facts.bits_stored
    shifted = below > 0 and facts.transfer_syntax in _CODESTREAMS
    if below < 0 or facts.high_bit >= facts.bits_allocated or shifted:
        return f"HighBit {facts.high_bit} does not go with BitsStored {facts.bits_stored}"
    return None


@lru_cache(maxsize=256)
def _syntax_name(transfer_syntax: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a malformed UID
        name = UID(transfer_syntax).name
    return "an unknown transfer syntax" if name == transfer_syntax else name


@lru_cache(maxsize=256)
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


def _read_file(opener: Opener, file: str, claim: _Claim) -> Iterator[StoredImage]:
    with opener.open(file) as stream, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset, planes = read_object(stream, file, with_pixels=True)
        facts = _image_facts(planes)
        claim.add(facts, frames=len(planes), held_bytes=stream.seek(0, 2))
        if any("End of file" in str(warning.message) for warning in caught):
            raise ScanError(Reason.UNREADABLE, "the file ends before its pixels do")
        stored = _decode(dataset, facts, frames=len(planes))
    for plane, image in zip(planes, stored, strict=True):
        yield StoredImage(plane=plane, stored=image, padding=_padding(dataset))


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
    # pydicom asks for these and does not look at HighBit.
    dataset.SamplesPerPixel, dataset.BitsStored = facts.samples, facts.high_bit + 1
    dataset.PhotometricInterpretation = facts.photometric or "MONOCHROME2"
    try:
        if facts.transfer_syntax in _CODESTREAMS:
            _check_codestreams(dataset, facts, frames=frames)
        pixels = np.asarray(dataset.pixel_array)
    except ScanError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged data
        detail = f"the pixels cannot be decoded ({type(error).__name__})"
        raise ScanError(Reason.UNREADABLE, detail) from error
    return _values(pixels.reshape(frames, facts.rows, facts.columns), facts)


def _values(
    pixels: Shaped[np.ndarray, "frames y x"], facts: SeriesFacts
) -> Shaped[np.ndarray, "frames y x"]:
    """The bits that are the value, with its sign; the others are an overlay, or anything."""
    if pixels.dtype.kind not in "iu":
        return pixels
    below = facts.high_bit + 1 - facts.bits_stored
    if below and (pixels & ((1 << below) - 1)).any():
        detail = (
            f"HighBit is {facts.high_bit} and BitsStored {facts.bits_stored}, but bits below are "
            "set: which of them are the values cannot be known"
        )
        raise ScanError(Reason.UNREADABLE, detail)
    above = 8 * pixels.dtype.itemsize - facts.high_bit - 1
    return (pixels << above) >> (above + below) if above or below else pixels


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


def _to_hu(images: list[StoredImage]) -> list[Int16[np.ndarray, "y x"]]:
    """Turn stored values to HU, and let go of them one by one."""
    for image in images:
        _check_rescale(image.plane)
    negative = lost_signs(images)
    hu = []
    for i, image in enumerate(images):
        hu.append(_image_hu(image if negative is None else with_signs(image, negative)))
        images[i] = replace(image, stored=np.empty((0, 0), np.int16))
    return hu


def _check_rescale(plane: Plane) -> None:
    if not (np.isfinite([plane.slope, plane.intercept]).all() and plane.slope > 0):
        detail = f"rescale slope {plane.slope:g} and intercept {plane.intercept:g}"
        raise ScanError(Reason.BAD_RESCALE, detail)


def _image_hu(image: StoredImage) -> Int16[np.ndarray, "y x"]:
    stored, slope, intercept = image.stored, image.plane.slope, image.plane.intercept
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
        _check_wrapped(image, hu > limits.max)
        hu[hu > limits.max] = PADDING_HU
        hu = hu.clip(limits.min, None)
    if image.padding is not None and np.issubdtype(stored.dtype, np.integer):
        hu[_padded(stored, hu, image.padding)] = PADDING_HU
    return hu.astype(np.int16, copy=False)


def _check_wrapped(image: StoredImage, beyond: Bool[np.ndarray, "y x"]) -> None:
    """Refuse values that no HU can be, and no padding: tissue whose sign was lost, mostly."""
    if image.stored.dtype != np.uint16 or not beyond.any():
        return
    values = np.unique(image.stored[beyond])
    if image.padding is not None:
        values = values[(values < min(image.padding)) | (values > max(image.padding))]
    wrapped_hu = image.hu_of(values.astype(np.int64) - (1 << 16))
    if (wrapped_hu > TISSUE_HU[0]).sum() > MAX_PADDING_VALUES:
        detail = (
            f"an image has many values above 32767 HU: {SIGNS_WERE_LOST}; PixelRepresentation or "
            "the rescale is wrong"
        )
        raise ScanError(Reason.NOT_HU, detail)


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
