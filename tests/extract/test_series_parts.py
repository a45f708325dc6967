"""Which planes of a series are one scan."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from dicom_series import planes

from ctfm.extract.dicom import Plane
from ctfm.extract.series_parts import split_planes


def sizes(parts: list[list[Plane]]) -> list[int]:
    return sorted(map(len, parts))


def mixed_series() -> Iterator[tuple[list[Plane], list[int]]]:
    yield planes(28), [28]
    scout = planes(1, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    yield planes(28) + scout, [1, 28]
    coronal = planes(9, axes=(-1.0, 0.0, 0.0, 0.0, 0.0, -1.0))
    yield planes(28) + coronal, [9, 28]
    yield planes(28) + planes(30, rows=256, columns=256, pixel_mm=(1.0, 1.0)), [28, 30]
    jitter = planes(5, axes=(-0.99999, 0.00001, 0.0, 0.0, -1.0, 0.00001), acquisition="2")
    yield (
        [replace(p, position_mm=(110.0, 130.0, 200.0 + i)) for i, p in enumerate(jitter)]
        + (planes(28)),
        [33],
    )


@pytest.mark.parametrize(("series", "expected"), list(mixed_series()))
def test_a_series_is_parted_by_what_can_never_be_one_scan(
    series: list[Plane], expected: list[int]
) -> None:
    assert sizes(split_planes(series)) == expected


def test_two_passes_in_one_series_are_parted_by_kernel_or_acquisition() -> None:
    assert sizes(split_planes(planes(20) + planes(20, kernel="H60f"))) == [20, 20]
    assert sizes(split_planes(planes(20) + planes(21, acquisition="2"))) == [20, 21]


def test_passes_that_no_tag_tells_apart_stay_together() -> None:
    assert sizes(split_planes(planes(20) + planes(20))) == [40]
    bolus_tracking = [plane for i in range(6) for plane in planes(1, acquisition=str(i))]
    assert sizes(split_planes(bolus_tracking)) == [6]


def test_a_kernel_or_acquisition_that_changes_on_the_way_up_parts_nothing() -> None:
    low, high = planes(9, kernel="SOFT"), planes(9, acquisition="2")
    above = [replace(p, position_mm=(110.0, 130.0, 100.0 + 5 * i)) for i, p in enumerate(high)]
    assert sizes(split_planes(low + above)) == [18]
