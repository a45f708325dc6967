"""Facts and planes of a plain head CT series, to be varied by tests."""

from dataclasses import replace
from typing import Any

from ctfm.extract.dicom import Plane, SeriesFacts

FACTS = SeriesFacts(
    patient="P",
    study="1.2",
    series="1.2.3",
    series_number=2,
    sop_class="1.2.840.10008.5.1.4.1.1.2",
    modality="CT",
    image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
    description="Head 5.0",
    contrast_agent="",
    vendor="SIEMENS",
    kernel="H31s",
    rescale_type="HU",
    transfer_syntax="1.2.840.10008.1.2.1",
    photometric="MONOCHROME2",
    samples=1,
    bits_allocated=16,
    bits_stored=12,
    high_bit=11,
    signed=False,
    has_pixels=True,
    encapsulated=False,
    unplaced_frames=1,
    rows=512,
    columns=512,
    pixel_mm=(0.5, 0.5),
    axes=(-1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
)


def planes(n: int, *, acquisition: str = "1", step_mm: float = 5.0, **facts: Any) -> list[Plane]:
    shared = replace(FACTS, **facts)
    return [
        Plane(
            file=f"{acquisition}/{i}",
            frame=0,
            sop=f"{acquisition}.{i}",
            facts=shared,
            position_mm=(110.0, 130.0, step_mm * i),
            slope=1.0,
            intercept=-1024.0,
            thickness_mm=5.0,
            kvp=120.0,
            acquisition=acquisition,
            truncated=False,
        )
        for i in range(n)
    ]
