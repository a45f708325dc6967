"""What real objects code of contrast medium and of maps is read from them, plain or enhanced."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

HEIGHTS_MM = range(0, 45, 5)
FRAME_TYPE = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]


def item(**tags: Any) -> Items:
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return Items([dataset])


def code(meaning: str) -> Items:
    return item(CodeValue="1", CodingSchemeDesignator="99TEST", CodeMeaning=meaning)


IODINE = code("Iohexol")
BY_MOUTH = item(CodeMeaning="Iohexol", ContrastBolusAdministrationRouteSequence=code("Oral route"))
INTO_A_VEIN = item(ContrastBolusAdministrationRouteSequence=code("Intravenous route"))


@pytest.mark.parametrize(
    ("reason", "tags"),
    [
        ("contrast", {"ContrastBolusAgentSequence": IODINE}),
        ("contrast", {"ContrastBolusAgentSequence": INTO_A_VEIN}),
        ("contrast", {"ContrastBolusAgentSequence": IODINE, "ContrastBolusAgent": "NONE"}),
        ("contrast", {"ContrastBolusRoute": "IV", "ContrastBolusVolume": "80"}),
        ("contrast", {"ContrastBolusVolume": "80"}),
        ("contrast", {"ContrastBolusRoute": "IV"}),
        ("contrast", {"ContrastBolusAdministrationRouteSequence": code("Intravenous route")}),
        ("ok", {"ContrastBolusAgentSequence": Items([])}),
        ("ok", {"ContrastBolusAgentSequence": BY_MOUTH}),
        ("ok", {"ContrastBolusRoute": "ORAL", "ContrastBolusAgent": "GASTROGRAFIN"}),
        ("ok", {"ContrastBolusRoute": "IV", "ContrastBolusVolume": "0"}),
        ("ok", {"ContrastBolusVolume": ""}),
        ("ok", {"ContrastBolusAgent": "NO CONTRAST", "ContrastBolusRoute": "IV"}),
        ("derived", {"VolumeBasedCalculationTechnique": "MAX_IP"}),
        ("ok", {"VolumeBasedCalculationTechnique": "NONE"}),
        ("ok", {"StudyDescription": "CTA HEAD", "ProtocolName": "CTA", "ImageComments": "CTA"}),
        ("contrast", {"StudyDescription": "CT HEAD W/O CONTRAST", "SeriesDescription": "CTA"}),
        ("derived", {"ImageType": [*FRAME_TYPE[:2], "AXIAL", "VMI"], "RescaleType": "HU"}),
        ("derived", {"SeriesDescription": "40 keV"}),  # though ImageType says ORIGINAL
    ],
)
def test_a_plain_object_tells_its_kind(
    tmp_path: Path, scanner: Any, reason: str, tags: dict[str, Any]
) -> None:
    scanner.save(scanner.axial(HEIGHTS_MM, **tags), tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": reason}


def enhanced(
    scanner: Any,
    *,
    frame_type: Sequence[str] = FRAME_TYPE,
    technique: str = "NONE",
    given: Sequence[str] = (),
    **tags: Any,
) -> Dataset:
    """An enhanced object; `given` says for each agent whether it was administered."""
    dataset: Dataset = scanner.enhanced(scanner.axial(HEIGHTS_MM, **tags))
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.CTImageFrameTypeSequence = item(
        FrameType=list(frame_type), VolumeBasedCalculationTechnique=technique
    )
    usages = [item(ContrastBolusAgentAdministered=answer)[0] for answer in given]
    if usages:
        shared.ContrastBolusUsageSequence = Items(usages)
    return dataset


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("ok", {}),
        ("ok", {"frame_type": ["ORIGINAL", "PRIMARY", "PRE_CONTRAST", "NONE"]}),
        ("contrast", {"frame_type": ["ORIGINAL", "PRIMARY", "POST_CONTRAST", "NONE"]}),
        ("contrast", {"frame_type": ["ORIGINAL", "PRIMARY", "DYNAMIC", "NONE"]}),
        ("derived", {"frame_type": ["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]}),
        ("derived", {"frame_type": ["DERIVED", "PRIMARY", "VOLUME", "STD_DEVIATION"]}),
        ("derived", {"frame_type": ["DERIVED", "PRIMARY", "VOLUME", "Z_SCORE"]}),
        ("derived", {"frame_type": ["DERIVED", "PRIMARY", "VOLUME", "MASKED"]}),
        ("derived", {"frame_type": [*FRAME_TYPE, "VMI"]}),
        ("derived", {"ImageType": [*FRAME_TYPE, "MAT_REMOVED"]}),
        ("derived", {"technique": "MAX_IP"}),
        ("ok", {"technique": "MPR"}),
        ("contrast", {"ContrastBolusAgentSequence": IODINE}),
        ("contrast", {"ContrastBolusAgentSequence": IODINE, "given": ["NO", "YES"]}),
        ("contrast", {"given": ["YES"]}),
        ("ok", {"ContrastBolusAgentSequence": IODINE, "given": ["NO"]}),
        ("ok", {"given": ["NO", "NO"]}),
    ],
)
def test_an_enhanced_object_tells_its_kind(
    tmp_path: Path, scanner: Any, reason: str, said: dict[str, Any]
) -> None:
    scanner.save([enhanced(scanner, **said)], tmp_path)
    assert scanner.reasons(tmp_path) == {"1.2.1": reason}


def test_of_a_study_the_native_series_is_used_whatever_the_others_are_called(
    tmp_path: Path, scanner: Any
) -> None:
    series = {
        "1": ("HEAD_WO_CONTRAST", 5.0),
        "2": ("HEAD_CTA_1.0", 1.0),
        "3": ("MonoE 40keV", 4.0),  # nearest to the grid, tagged ORIGINAL
        "4": ("AX_MIPs", 4.0),
        "5": ("Topogram", 20.0),
    }
    for uid, (description, step_mm) in series.items():
        count = int(40 // step_mm) + 1
        planes = scanner.axial(
            [i * step_mm for i in range(count)],
            SeriesInstanceUID=uid,
            SeriesDescription=description,
        )
        scanner.save(planes, tmp_path / uid)
    assert scanner.reasons(tmp_path) == {
        "1": "ok",
        "2": "contrast",
        "3": "derived",
        "4": "derived",
        "5": "localizer",
    }
