"""DICOM of the phantoms: from a volume and its facts, to valid CT Image Storage objects.

Holds every Type 1 and Type 2 attribute of the modules of the CT Image IOD (PS3.3 A.3), as the
vendor of the protocol would write them. RAS becomes LPS here. Names say that the patients are
phantoms, identifiers are UUIDs under 2.25 (PS3.5 B.2) made from (seed, patient, study) alone.
"""

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int16
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from ctfm.extract.phantom_scanner import PADDING_HU, Protocol
from ctfm.extract.volume import Volume

_LOCALIZER_PX = 256


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whose series it is."""

    seed: int
    patient: int
    study: int
    series: int = 0

    @property
    def patient_id(self) -> str:
        """PatientID."""
        return f"PHANTOM-{self.seed}-{self.patient:05d}"

    @property
    def study_uid(self) -> str:
        """StudyInstanceUID."""
        return self.uid("study", with_series=False)

    def uid(self, *of: object, with_series: bool = True) -> str:
        """A UID of something of this series, or of its study."""
        key = ["ctfm phantom", self.seed, self.patient, self.study, *of]
        key += [self.series] if with_series else []
        return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, repr(key)).int}"


def slices_of(volume: Volume, protocol: Protocol, identity: Identity) -> Iterator[Dataset]:
    """The images of a series, from the first file to the last: feet to head.

    Each is the same object with other values: write it before taking the next one.
    """
    dataset = _series(protocol, identity)
    _set_plane(dataset, row_step_mm=volume.row_step_mm, column_step_mm=volume.column_step_mm)
    for number, (hu, origin_mm) in enumerate(
        zip(volume.hu, volume.slice_origin_mm, strict=True), start=1
    ):
        x, y, z = origin_mm.tolist()
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = [_decimal(-x), _decimal(-y), _decimal(z)]
        dataset.SliceLocation = _decimal(z)
        _set_pixels(dataset, hu, protocol)
        _set_instance(dataset, identity.uid("instance", number))
        yield dataset


def localizer_of(volume: Volume, protocol: Protocol, identity: Identity) -> Dataset:
    """A lateral scout view: mean HU along x, without the shear of a tilted stack."""
    dataset = _series(protocol, identity)
    pixel_mm = float(np.linalg.norm(volume.row_step_mm))
    n_rows = min(_LOCALIZER_PX, 4 * len(volume.hu))
    mean = volume.hu.mean(axis=2)[::-1]
    image = mean[np.arange(n_rows) * len(mean) // n_rows].astype(np.int16)
    _, y, z = volume.slice_origin_mm[-1].tolist()
    height_mm = protocol.spacing_mm * len(mean) / n_rows
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dataset.SeriesDescription = "Topogram" if protocol.vendor.tilts else "Scano"
    dataset.ConvolutionKernel = ""
    dataset.InstanceNumber = 1
    dataset.Rows = n_rows
    _set_plane(
        dataset,
        row_step_mm=np.array((0.0, 0.0, -height_mm)),
        column_step_mm=np.array((0.0, -pixel_mm, 0.0)),
    )
    dataset.ImagePositionPatient = [_decimal(0.0), _decimal(-y), _decimal(z)]
    _set_pixels(dataset, image, protocol)
    _set_instance(dataset, identity.uid("instance", 1))
    return dataset


def _series(protocol: Protocol, identity: Identity) -> Dataset:
    """What the images of a series share."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    for keyword, value in (_whose(identity) | _how(protocol)).items():
        setattr(dataset, keyword, value)
    if protocol.vendor.padding is not None:
        dataset.PixelPaddingValue = protocol.vendor.padding
    return dataset


def _whose(identity: Identity) -> dict[str, object]:
    """Patient, study and series (PS3.3 C.7.1 to C.7.4)."""
    date, time = f"2001{1 + identity.study % 12:02d}15", "120000"
    dates = {f"{of}Date": date for of in ("Study", "Series", "Acquisition", "Content")}
    times = {f"{of}Time": time for of in ("Study", "Series", "Acquisition", "Content")}
    return {
        **dates,
        **times,
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientName": f"PHANTOM^{identity.patient:04d}",
        "PatientID": identity.patient_id,
        "PatientBirthDate": f"{1930 + identity.patient % 60}0101",
        "PatientSex": "O",
        "StudyInstanceUID": identity.study_uid,
        "StudyID": f"{identity.study + 1}",
        "StudyDescription": "CT HEAD (PHANTOM)",
        "AccessionNumber": f"P{identity.patient:06d}{identity.study:02d}",
        "ReferringPhysicianName": "",
        "SeriesInstanceUID": identity.uid("series"),
        "SeriesNumber": identity.series + 1,
        "FrameOfReferenceUID": identity.uid("frame", with_series=False),
        "PositionReferenceIndicator": "",
    }


def _how(protocol: Protocol) -> dict[str, object]:
    """Equipment, acquisition and pixels (PS3.3 C.7.5, C.7.6.3, C.8.2.1)."""
    vendor, mm = protocol.vendor, f"{protocol.spacing_mm:.1f}"
    return {
        "SOPClassUID": CTImageStorage,
        "Modality": "CT",
        "SeriesDescription": vendor.description.format(mm=mm, kernel=protocol.kernel),
        "BodyPartExamined": "HEAD",
        "PatientPosition": "HFS",
        "Manufacturer": vendor.manufacturer,
        "ManufacturerModelName": protocol.model,
        "StationName": "PHANTOM",
        "SoftwareVersions": "ctfm phantom",
        "ImageType": list(vendor.image_type),
        "AcquisitionNumber": 1,
        "KVP": protocol.kvp,
        "ConvolutionKernel": protocol.kernel,
        "GantryDetectorTilt": _decimal(protocol.tilt_deg),
        "SliceThickness": _decimal(protocol.spacing_mm),
        "ReconstructionDiameter": _decimal(protocol.field_mm),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": protocol.matrix,
        "Columns": protocol.matrix,
        "BitsAllocated": 16,
        "BitsStored": vendor.bits_stored,
        "HighBit": vendor.bits_stored - 1,
        "PixelRepresentation": int(vendor.signed),
        "RescaleIntercept": vendor.intercept,
        "RescaleSlope": 1,
        "RescaleType": "HU",
        "WindowCenter": 40,
        "WindowWidth": 80,
    }


def _set_plane(
    dataset: Dataset,
    *,
    row_step_mm: Float64[np.ndarray, "3"],
    column_step_mm: Float64[np.ndarray, "3"],
) -> None:
    rows_mm, columns_mm = np.linalg.norm(row_step_mm), np.linalg.norm(column_step_mm)
    axes = [*(column_step_mm / columns_mm), *(row_step_mm / rows_mm)]
    signs = (-1, -1, 1, -1, -1, 1)
    dataset.ImageOrientationPatient = [
        _decimal(sign * axis) for sign, axis in zip(signs, axes, strict=True)
    ]
    dataset.PixelSpacing = [_decimal(float(rows_mm)), _decimal(float(columns_mm))]


def _set_pixels(dataset: Dataset, hu: Int16[np.ndarray, "y x"], protocol: Protocol) -> None:
    vendor = protocol.vendor
    stored = hu - np.int16(vendor.intercept)
    if vendor.padding is not None:
        stored[hu == PADDING_HU] = vendor.padding
    dataset.PixelData = stored.astype("<i2").tobytes()


def _set_instance(dataset: Dataset, uid: str) -> None:
    dataset.SOPInstanceUID = uid
    dataset.file_meta.MediaStorageSOPInstanceUID = uid


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5, DS)."""
    digits = 9 - max(0, int(math.log10(max(abs(value), 1))))
    return f"{value + 0.0:.{digits}f}"
