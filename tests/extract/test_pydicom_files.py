"""The files that pydicom tests itself with: each has its line and a sensible reason."""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.data import get_testdata_files

from ctfm.extract.index import index
from ctfm.extract.reading import read_volume
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import ScanError

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"
FILES = [path for path in map(Path, get_testdata_files()) if path.is_file()]
FILES = [path for path in FILES if path.is_relative_to(SHIPPED)]  # more may be installed beside it


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return index([SHIPPED], key=None)


@pytest.fixture(scope="module")
def line_of(catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    """The line of each file, by its name."""
    lines = {line["scan_id"]: line for line in catalogue.scans.to_pylist()}
    return {
        str(Path(file).relative_to(SHIPPED)): lines[scan_id]
        for scan_id, files in catalogue.files.items()
        for file in files
    }


def test_every_file_is_in_one_line_or_counted(catalogue: Catalogue, scanner: Any) -> None:
    assert len(FILES) > 150
    assert scanner.accounted(catalogue, len(FILES))
    assert catalogue.ignored == {
        ".dump": 2,
        ".gz": 1,
        ".icc": 1,
        ".json": 2,
        ".txt": 2,
        "DICOMDIR": 8,
        "no extension": 1,
    }


def test_none_is_a_head_and_every_line_says_why(catalogue: Catalogue) -> None:
    lines = catalogue.scans.to_pylist()
    assert not any(line["usable"] for line in lines)
    assert all(line["detail"] for line in lines)
    assert set(Counter(line["reason"] for line in lines)) == {
        "colour",
        "contrast",
        "duplicate_scan",
        "localizer",
        "missing_slices",
        "not_an_image",
        "not_ct",
        "too_few_slices",
        "unreadable",
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CT_small.dcm", "contrast"),  # its ContrastBolusAgent is ISOVUE300/100
        ("MR_small.dcm", "not_ct"),
        ("MR_small_bigendian.dcm", "duplicate_scan"),
        ("MR_truncated.dcm", "duplicate_scan"),
        ("image_dfl.dcm", "not_ct"),  # deflated, of another modality
        ("badVR.dcm", "not_ct"),
        ("693_J2KI.dcm", "too_few_slices"),
        ("J2K_pixelrep_mismatch.dcm", "too_few_slices"),
        ("ExplVR_BigEnd.dcm", "colour"),
        ("SC_rgb_jpeg.dcm", "colour"),
        ("examples_palette.dcm", "colour"),
        ("rtplan.dcm", "not_an_image"),
        ("rtstruct.dcm", "not_an_image"),
        ("test-SR.dcm", "not_an_image"),
        ("waveform_ecg.dcm", "not_an_image"),
        ("ExplVR_LitEndNoMeta.dcm", "not_an_image"),  # no preamble, no meta header
        ("no_meta.dcm", "unreadable"),  # one byte too many at its start
        ("UN_sequence.dcm", "unreadable"),
        ("dicomdirtests/77654033/CT2/17106", "missing_slices"),  # 202.5 mm between two slices
        ("dicomdirtests/98892001/CT2N/6293", "localizer"),
        ("dicomdirtests/98892001/CT5N/2062", "too_few_slices"),
    ],
)
def test_a_file_has_the_reason_that_fits_it(
    line_of: dict[str, dict[str, Any]], name: str, reason: str
) -> None:
    assert line_of[name]["reason"] == reason


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_reading_one_alone_gives_a_volume_or_a_reason(path: Path) -> None:
    with suppress(ScanError):
        volume = read_volume([str(path)])
        assert len(volume.hu) == len(volume.slice_origin_mm) > 0
