"""DICOM headers: from files, to the facts of each image plane.

Sources: PS3.3 C.7.6.2 (image plane) and C.7.6.16 (functional groups of enhanced objects, whose
frames are taken as if each were a file). A header is read up to its pixels and no further, about
2000 files a second. DICOM's LPS becomes RAS here.

Which series are of use is decided in `series_kind`; pixels are read in `dicom_pixels`.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

import numpy as np
import pydicom
from jaxtyping import Float
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctfm.extract.deflated import DEFLATED, check_deflated
from ctfm.extract.dicom_agent import AGENT_KEYWORDS, NO_AGENT, AgentFacts, agent_facts
from ctfm.extract.dicom_values import (
    as_axes,
    as_number,
    as_pair,
    as_position,
    as_text,
    as_texts,
    as_whole,
    items_of,
    value_of,
)
from ctfm.extract.geometry import MAX_TURN_DEG, SAME_STEP
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_ELEMENT_BYTES = 64 << 20
"""A longer element counts as missing; what the frames of an enhanced object say is shorter."""

_DIRECTORY = "1.2.840.10008.1.3.10"
_ENHANCED = {"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"}

# Where an enhanced object keeps what a plain one has at its top level.
_GROUP_OF = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "ConvolutionKernel": "CTReconstructionSequence",
    "KVP": "CTXRayDetailsSequence",
    "FrameType": "CTImageFrameTypeSequence",
    "VolumeBasedCalculationTechnique": "CTImageFrameTypeSequence",
}
_TOP_LEVEL = [
    "SOPClassUID",
    "SOPInstanceUID",
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "Modality",
    "ImageType",
    "SeriesDescription",
    "ContrastBolusAgent",
    *AGENT_KEYWORDS,
    "Manufacturer",
    "AcquisitionNumber",
    "AcquisitionTime",
    "InstanceNumber",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]
_HEADER_TAGS = [Tag(keyword) for keyword in (*_TOP_LEVEL, *_GROUP_OF)]
_PER_FRAME = "PerFrameFunctionalGroupsSequence"
_SHARED = "SharedFunctionalGroupsSequence"
_UNDEFINED = 0xFFFFFFFF
_PIXEL_TAGS = {(0x7FE0, 0x0008), (0x7FE0, 0x0009), (0x7FE0, 0x0010)}
_SIGNED: dict[int | None, bool] = {0: False, 1: True}
_PIXEL_VRS = {b"OB", b"OW", b"OF", b"OD", b"UN"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesFacts:
    """What the planes of one reconstruction share; equal facts are one object in an index."""

    patient: str
    study: str
    series: str
    series_number: int
    sop_class: str
    modality: str
    image_type: tuple[str, ...]
    description: str
    techniques: tuple[str, ...] = ()
    """VolumeBasedCalculationTechnique."""
    contrast_agent: str
    agent: AgentFacts = NO_AGENT
    vendor: str
    kernel: str
    rescale_type: str
    transfer_syntax: str
    photometric: str
    samples: int
    bits_allocated: int
    bits_stored: int
    """0 where the header has neither it nor the high bit, each of which gives the other."""
    high_bit: int
    signed: bool | None
    """PixelRepresentation; None where the header has none."""
    has_pixels: bool
    encapsulated: bool
    """Whether the pixels lie in fragments, as compressed ones do."""
    unplaced_frames: int
    """Frames for each position that the header gives; more than 1 is no volume."""
    rows: int
    columns: int
    pixel_mm: tuple[float, float] | None
    """Between rows, between columns."""
    axes: tuple[float, ...] | None
    """Unit vectors, RAS: along a row (to the next column), then along a column."""
    series_is_folder: bool = False
    """Whether the header has no id, and `series` is where the file lies."""

    @property
    def row_step_mm(self) -> Float[np.ndarray, "3"]:
        """RAS vector from one row to the next."""
        assert self.axes is not None
        assert self.pixel_mm is not None
        return np.array(self.axes[3:]) * self.pixel_mm[0]

    @property
    def column_step_mm(self) -> Float[np.ndarray, "3"]:
        """RAS vector from one column to the next."""
        assert self.axes is not None
        assert self.pixel_mm is not None
        return np.array(self.axes[:3]) * self.pixel_mm[1]

    def same_grid(self, other: "SeriesFacts") -> bool:
        """Whether both have one matrix and pixel size."""
        if (self.rows, self.columns) != (other.rows, other.columns):
            return False
        if self.pixel_mm is None or other.pixel_mm is None:
            return self.pixel_mm is other.pixel_mm
        pairs = zip(self.pixel_mm, other.pixel_mm, strict=True)
        return all(abs(mine - others) < SAME_STEP * max(mine, 1e-9) for mine, others in pairs)

    def nearly_parallel(self, other: "SeriesFacts") -> bool:
        """Whether orientations are no farther apart than noise, whichever way rows and columns run.

        A series is written both ways where the patient was turned round, or was said to be.
        """
        if self.axes is None or other.axes is None:
            return self.axes is other.axes
        senses = np.where(self.runs_against(other)[::-1], -1, 1)[:, None]
        turn = np.reshape(self.axes, (2, 3)) - senses * np.reshape(other.axes, (2, 3))
        return bool(np.linalg.norm(turn, axis=1).max() <= math.radians(MAX_TURN_DEG))

    def runs_against(self, other: "SeriesFacts") -> tuple[bool, bool]:
        """Whether rows come in the other order than in another plane; and columns."""
        assert self.axes is not None
        assert other.axes is not None
        mine, others = np.reshape(self.axes, (2, 3)), np.reshape(other.axes, (2, 3))
        along_row, along_column = ((mine * others).sum(axis=1) < 0).tolist()
        return along_column, along_row


@dataclass(frozen=True, kw_only=True, slots=True)
class Plane:
    """One image plane: a file, or a frame of an enhanced object."""

    file: str
    frame: int
    sop: str
    facts: SeriesFacts
    position_mm: tuple[float, float, float] | None
    """RAS centre of the first voxel."""
    slope: float
    intercept: float
    """NaN where the header has none."""
    thickness_mm: float | None
    kvp: float | None
    acquisition: str
    truncated: bool
    acquisition_time: str = ""
    instance: str = ""
    """InstanceNumber."""


def is_dicom(head: bytes) -> bool:
    """Whether a file that starts with these (at least 132) bytes is DICOM, preamble or not."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 16 or head[:2] not in (b"\x02\x00", b"\x08\x00"):
        return False
    element, length = struct.unpack("<HL", head[2:8])
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    return element <= 0x0060 and (explicit or length <= 256)


def read_planes(stream: BufferedIOBase, file: str) -> list[Plane]:
    """Read the header of one DICOM file.

    Args:
        stream: The file from its start; what was read of it when this returns is undefined.
        file: Its name, for the planes.

    Returns:
        One plane, several for an enhanced object, none for a DICOMDIR.

    Raises:
        ScanError: If it cannot be parsed.
    """
    return read_object(stream, file, with_pixels=False)[1]


def read_object(
    stream: BufferedIOBase, file: str, *, with_pixels: bool
) -> tuple[Dataset, list[Plane]]:
    """As `read_planes`, and what was parsed: the whole file, or no more than the planes need."""
    head = stream.read(4096)
    check_deflated(stream, head)
    stream.seek(0)
    try:
        dataset = pydicom.dcmread(
            stream,
            stop_before_pixels=not with_pixels,
            force=head[128:132] != b"DICM",
            specific_tags=None if with_pixels else _HEADER_TAGS,
            defer_size=None if with_pixels else MAX_ELEMENT_BYTES,
        )
        if as_text(value_of(dataset.file_meta, "MediaStorageSOPClassUID")) == _DIRECTORY:
            return dataset, []
        pixels = _pixels_held(dataset) if with_pixels else _pixels_ahead(stream, dataset)
        planes = list(_planes(dataset, file, pixels))
    except ScanError:
        raise
    except Exception as error:  # a hostile header can raise anything in the parser
        detail = f"the header cannot be parsed ({type(error).__name__})"
        raise ScanError(Reason.UNREADABLE, detail) from error
    if not (planes[0].facts.sop_class or planes[0].facts.modality):
        raise ScanError(Reason.UNREADABLE, "DICOM without a class or a modality: damaged or empty")
    return dataset, planes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pixels:
    """The element of the pixels, if there is one."""

    found: bool
    encapsulated: bool = False
    held_bytes: int | None = None
    """None where they are compressed or deflated."""


def _pixels_held(dataset: Dataset) -> _Pixels:
    """As `_pixels_ahead`, of a file that was read to its end."""
    held = [dataset.get_item(tag) for tag in _PIXEL_TAGS if tag in dataset]
    if not held:
        return _Pixels(found=False)
    if held[0].length == _UNDEFINED:
        return _Pixels(found=True, encapsulated=True)
    deflated = transfer_syntax_of(dataset) == DEFLATED
    return _Pixels(found=True, held_bytes=None if deflated else len(held[0].value or b""))


def _pixels_ahead(stream: BufferedIOBase, dataset: Dataset) -> _Pixels:
    """The pixels where the parser stopped, and how many bytes of them are there."""
    if transfer_syntax_of(dataset) == DEFLATED:
        return _Pixels(found=True)
    order = "<" if dataset.original_encoding[1] else ">"
    start = stream.read(8)
    if len(start) < 8 or struct.unpack(order + "HH", start[:4]) not in _PIXEL_TAGS:
        return _Pixels(found=False)
    # The element itself tells, as pydicom says what the meta header promised and not what it
    # found: the first letter of a VR is odd, and no length is.
    explicit = start[4:6] in _PIXEL_VRS
    length = stream.read(4) if explicit else start[4:]
    if int.from_bytes(length, "little") == _UNDEFINED:
        return _Pixels(found=True, encapsulated=True)
    begin = stream.tell()
    return _Pixels(found=True, held_bytes=stream.seek(0, 2) - begin)


def _planes(dataset: Dataset, file: str, pixels: _Pixels) -> Iterator[Plane]:
    count = max(1, as_whole(value_of(dataset, "NumberOfFrames")) or 1)
    frames = [_Frame(dataset, None)]
    if as_text(value_of(dataset, "SOPClassUID")) in _ENHANCED and pixels.found:
        frames = [_Frame(dataset, group) for group in items_of(dataset, _PER_FRAME)]
        if len(frames) != count:
            detail = f"{count} frames, but a position for {len(frames)}"
            raise ScanError(Reason.BAD_GEOMETRY, detail)
    unplaced_frames = count // len(frames)
    for number, frame in enumerate(frames):
        facts = _facts(frame, pixels, unplaced_frames=unplaced_frames)
        image_bits = facts.rows * facts.columns * facts.samples * facts.bits_allocated
        yield Plane(
            file=file,
            frame=number,
            sop=as_text(frame.get("SOPInstanceUID")),
            facts=facts,
            position_mm=as_position(frame.get("ImagePositionPatient")),
            slope=as_number(frame.get("RescaleSlope"), missing=math.nan),
            intercept=as_number(frame.get("RescaleIntercept"), missing=math.nan),
            thickness_mm=as_number(frame.get("SliceThickness"), missing=0.0) or None,
            kvp=as_number(frame.get("KVP"), missing=0.0) or None,
            acquisition=as_text(frame.get("AcquisitionNumber")),
            truncated=pixels.held_bytes is not None and pixels.held_bytes < image_bits * count // 8,
            acquisition_time=as_text(frame.get("AcquisitionTime")),
            instance=as_text(frame.get("InstanceNumber")),
        )


class _Frame:
    """Values of one frame: from its functional group, the shared one, or the top level."""

    def __init__(self, dataset: Dataset, group: Dataset | None) -> None:
        self.dataset = dataset
        self.groups = [] if group is None else [group, *items_of(dataset, _SHARED)[:1]]

    def get(self, keyword: str) -> Any:
        for group in self.groups:
            for item in items_of(group, _GROUP_OF.get(keyword, ""))[:1]:
                return value_of(item, keyword)
        return value_of(self.dataset, keyword)


def _facts(frame: _Frame, pixels: _Pixels, *, unplaced_frames: int) -> SeriesFacts:
    bits_stored, high_bit = _stored_bits(frame)
    return SeriesFacts(
        patient=as_text(frame.get("PatientID")),
        study=as_text(frame.get("StudyInstanceUID")),
        series=as_text(frame.get("SeriesInstanceUID")),
        series_number=as_whole(frame.get("SeriesNumber")) or 0,
        sop_class=as_text(frame.get("SOPClassUID")),
        modality=as_text(frame.get("Modality")).upper(),
        image_type=_image_type(frame),
        description=as_text(frame.get("SeriesDescription")),
        techniques=as_texts(frame.get("VolumeBasedCalculationTechnique")),
        contrast_agent=as_text(frame.get("ContrastBolusAgent")),
        agent=agent_facts(frame.dataset, frame.groups),
        vendor=as_text(frame.get("Manufacturer")),
        kernel=(*as_texts(frame.get("ConvolutionKernel")), "")[0],
        rescale_type=as_text(frame.get("RescaleType")).upper(),
        transfer_syntax=transfer_syntax_of(frame.dataset),
        photometric=as_text(frame.get("PhotometricInterpretation")).upper(),
        samples=as_whole(frame.get("SamplesPerPixel")) or 1,
        bits_allocated=as_whole(frame.get("BitsAllocated")) or 0,
        bits_stored=bits_stored,
        high_bit=high_bit,
        signed=_SIGNED.get(as_whole(frame.get("PixelRepresentation"))),
        has_pixels=pixels.found,
        encapsulated=pixels.encapsulated,
        unplaced_frames=unplaced_frames,
        rows=as_whole(frame.get("Rows")) or 0,
        columns=as_whole(frame.get("Columns")) or 0,
        pixel_mm=as_pair(frame.get("PixelSpacing")),
        axes=as_axes(frame.get("ImageOrientationPatient")),
    )


def _image_type(frame: _Frame) -> tuple[str, ...]:
    """FrameType, and the values of ImageType beyond it: the fifth tells images of many energies."""
    of_frame = as_texts(frame.get("FrameType")) if frame.groups else ()
    return of_frame + as_texts(frame.get("ImageType"))[len(of_frame) :]


def _stored_bits(frame: _Frame) -> tuple[int, int]:
    """BitsStored and HighBit; each from the other where it is missing (PS3.5 8.1.1)."""
    stored, high = as_whole(frame.get("BitsStored")), as_whole(frame.get("HighBit"))
    stored = stored or (0 if high is None else high + 1)
    return stored, stored - 1 if high is None else high


def transfer_syntax_of(dataset: Dataset) -> str:
    """The transfer syntax, or the plain one that the parser found where the header has none."""
    meta = getattr(dataset, "file_meta", None)
    named = as_text(value_of(meta, "TransferSyntaxUID")) if meta is not None else ""
    return named or (
        ImplicitVRLittleEndian if dataset.original_encoding[0] else ExplicitVRLittleEndian
    )
