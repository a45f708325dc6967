"""Sidecars: from the JSON file beside a NIfTI file, to what it says of the scan.

dcm2niix 1.0.20260724 and BIDS 1.10 name a file's sidecar like the file, with `.json`; a corrected
copy of dcm2niix (`converted_names`) has that of the plain file. Keys are DICOM's keywords. Without
`-ba n`, dcm2niix leaves out patient, study and series; it never writes contrast agent or KVP, other
programs do. Sidecars in folders above (the inheritance of BIDS) are not read.

A sidecar is not trusted: what is too large, no JSON object, or of another type counts as not said.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctfm.extract.converted_names import copy_of
from ctfm.extract.series_kind import Described, kind_fault
from ctfm.extract.sources import Opener, base_name, exists, stem_of
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_BYTES = 1 << 20
_SAME_SCANNER = ("Manufacturer", "ManufacturersModelName", "StationName", "DeviceSerialNumber")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """What is said of one NIfTI file; "" is unknown."""

    patient: str = ""
    study: str = ""
    series: str = ""
    series_number: int = 0
    modality: str = ""
    image_type: tuple[str, ...] = ()
    description: str = ""
    contrast_agent: str = ""
    rescale_type: str = ""
    vendor: str = ""
    kernel: str = ""
    kvp: float | None = None
    thickness_mm: float | None = None
    acquired: str = ""
    """Equal for two series exactly if they are of one acquisition; "" if that cannot be told."""
    damaged: bool = False
    """It is there, and cannot be read."""

    def fault(self) -> ScanError | None:
        """Why the scan is of no use, whatever its geometry; by the rules of DICOM."""
        if self.modality not in ("", "CT"):
            return ScanError(Reason.NOT_CT, "the JSON file beside it says another modality than CT")
        return kind_fault(
            Described(
                image_type=self.image_type,
                description=self.description,
                contrast_agent=self.contrast_agent,
                rescale_type=self.rescale_type,
            )
        )


def read_sidecar(opener: Opener, file: str) -> Sidecar:
    """Read what lies beside a NIfTI file; an empty one if nothing does."""
    folder = file[: len(file) - len(base_name(file))]
    stem = stem_of(file)
    for name in dict.fromkeys((stem, copy_of(stem)[0])):
        content = _content(opener, f"{folder}{name}.json")
        if content is not None:
            return _parsed(content)
    return Sidecar()


def _content(opener: Opener, file: str) -> bytes | None:
    """At most one byte more than `MAX_BYTES`; None if it is no file."""
    if not exists(opener, file):
        return None
    try:
        with opener.open(file) as stream:
            return stream.read(MAX_BYTES + 1)
    except (OSError, ScanError):
        return b""


def _parsed(content: bytes) -> Sidecar:
    if len(content) > MAX_BYTES:
        return Sidecar(damaged=True)
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return Sidecar(damaged=True)
    return _sidecar(said) if isinstance(said, dict) else Sidecar(damaged=True)


def _sidecar(said: Mapping[str, Any]) -> Sidecar:
    number = _number(said, "SeriesNumber")
    return Sidecar(
        patient=_text(said, "PatientID"),
        study=_text(said, "StudyInstanceUID"),
        series=_text(said, "SeriesInstanceUID"),
        series_number=0 if number is None else int(number),
        modality=_text(said, "Modality").upper(),
        image_type=_texts(said, "ImageType"),
        description=_text(said, "SeriesDescription"),
        contrast_agent=_text(said, "ContrastBolusAgent"),
        rescale_type=_text(said, "RescaleType").upper(),
        vendor=_text(said, "Manufacturer"),
        kernel=_text(said, "ConvolutionKernel"),
        kvp=_number(said, "KVP"),
        thickness_mm=_number(said, "SliceThickness"),
        acquired=_acquired(said),
    )


def _text(said: Mapping[str, Any], key: str) -> str:
    value = said.get(key)
    return value.strip() if isinstance(value, str) else ""


def _texts(said: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = said.get(key)
    values = value if isinstance(value, list) else [value]
    return tuple(one.strip() for one in values if isinstance(one, str))


def _number(said: Mapping[str, Any], key: str) -> float | None:
    value = said.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
        return None
    return float(value)


def _acquired(said: Mapping[str, Any]) -> str:
    """Scanner and time of the acquisition. Times of whole minutes were mostly made up."""
    time = _text(said, "AcquisitionDateTime").partition("T")[2] or _text(said, "AcquisitionTime")
    _, _, seconds = time.rpartition(":")
    if not seconds.strip("0."):
        return ""
    scanner = [_text(said, key) for key in _SAME_SCANNER]
    return repr([time, _number(said, "AcquisitionNumber"), *scanner])
