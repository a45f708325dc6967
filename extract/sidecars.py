"""Sidecars: from the JSON file beside a NIfTI file, to what it says of the scan.

dcm2niix 1.0.20260724 and BIDS 1.10 name a file's sidecar like the file, with `.json`; a corrected
copy of dcm2niix (`converted_names`) has that of the plain file. Keys are DICOM's keywords, and
ContrastBolusIngredient of BIDS. Without `-ba n`, dcm2niix leaves out patient, study, series and
dates; it never writes contrast agent or KVP, other programs do. Sidecars in folders above (the
inheritance of BIDS) are not read.

A sidecar is not trusted: a value of another type, or that is no UTF-8, counts as not said.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctfm.extract.dicom_agent import NO_AGENT, AgentFacts
from ctfm.extract.json_files import read_object
from ctfm.extract.series_kind import Described, kind_fault
from ctfm.extract.sources import Opener, sidecar_names
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_SAME_SCANNER = ("Manufacturer", "ManufacturersModelName", "StationName", "DeviceSerialNumber")
_MAX_NUMBER = 1e9


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
    agent: AgentFacts = NO_AGENT
    rescale_type: str = ""
    techniques: tuple[str, ...] = ()
    vendor: str = ""
    kernel: str = ""
    kvp: float | None = None
    thickness_mm: float | None = None
    acquired: str = ""
    """Equal for two series exactly if they are of one acquisition; "" if that cannot be told."""
    dated: bool = False
    """Whether `acquired` has a date, without which patients may share it by chance."""
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
                rescale_type=self.rescale_type,
                techniques=self.techniques,
                contrast_agent=self.contrast_agent,
                agent=self.agent,
            )
        )


NO_SIDECAR = Sidecar()


def find_sidecar(opener: Opener, file: str) -> Sidecar:
    """Read what lies beside a NIfTI file; `NO_SIDECAR` if nothing does."""
    return read_sidecar(opener, next(filter(opener.exists, sidecar_names(file)), ""))


def read_sidecar(opener: Opener, file: str) -> Sidecar:
    """Read a JSON file that lies beside a NIfTI file; "" is none."""
    if not file:
        return NO_SIDECAR
    said = read_object(opener, file)
    return Sidecar(damaged=True) if said is None else parse_sidecar(said)


def parse_sidecar(said: Mapping[str, Any]) -> Sidecar:
    """What the object in a JSON file says."""
    acquired, dated = _acquired(said)
    return Sidecar(
        patient="\\".join(_texts(said, "PatientID")),
        study=_text(said, "StudyInstanceUID"),
        series=_text(said, "SeriesInstanceUID"),
        series_number=int(_number(said, "SeriesNumber") or 0),
        modality=_text(said, "Modality").upper(),
        image_type=tuple(_texts(said, "ImageType")),
        description=", ".join(_texts(said, "SeriesDescription")),
        contrast_agent=", ".join(_texts(said, "ContrastBolusAgent")),
        agent=_agent(said),
        rescale_type=_text(said, "RescaleType").upper(),
        techniques=tuple(_texts(said, "VolumeBasedCalculationTechnique")),
        vendor=_text(said, "Manufacturer"),
        kernel=_text(said, "ConvolutionKernel"),
        kvp=_positive(said, "KVP"),
        thickness_mm=_positive(said, "SliceThickness"),
        acquired=acquired,
        dated=dated,
    )


def _agent(said: Mapping[str, Any]) -> AgentFacts:
    codes = tuple(_texts(said, "ContrastBolusIngredient"))
    routes = tuple(_texts(said, "ContrastBolusRoute"))
    volume_ml = _number(said, "ContrastBolusVolume")
    if volume_ml is not None and volume_ml < 0:
        volume_ml = None
    return AgentFacts(codes=codes, routes=routes, volume_ml=volume_ml)


def _values(said: Mapping[str, Any], key: str) -> Iterator[Any]:
    """The values of an attribute: of a list, or of a text that DICOM's backslash parts."""
    value = said.get(key)
    for one in value if isinstance(value, list) else [value]:
        yield from one.split("\\") if isinstance(one, str) else [one]


def _texts(said: Mapping[str, Any], key: str) -> Iterator[str]:
    """Every text that is not empty, and that a table can hold: JSON allows half a surrogate."""
    for value in _values(said, key):
        text = value.strip() if isinstance(value, str) else ""
        if text and text.encode(errors="replace").decode() == text:
            yield text


def _text(said: Mapping[str, Any], key: str) -> str:
    """The first value, as of a DICOM header."""
    return next(_texts(said, key), "")


def _number(said: Mapping[str, Any], key: str) -> float | None:
    """The first value, if it is a number or a text that is one."""
    value = next(_values(said, key), None)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < _MAX_NUMBER else None


def _positive(said: Mapping[str, Any], key: str) -> float | None:
    number = _number(said, key)
    return number if number is not None and number > 0 else None


def _acquired(said: Mapping[str, Any]) -> tuple[str, bool]:
    """Scanner and time of the acquisition, and whether the time has a date.

    Times of whole minutes were mostly made up, and so were first days of a year.
    """
    date, _, time = _text(said, "AcquisitionDateTime").partition("T")
    if not time:
        date, time = "", _text(said, "AcquisitionTime")
    _, _, seconds = time.rpartition(":")
    if not seconds.strip("0."):
        return "", False
    scanner = [_text(said, key) for key in _SAME_SCANNER]
    acquired = repr([date, time, _number(said, "AcquisitionNumber"), *scanner])
    return acquired, bool(date) and not date.endswith("-01-01")
