"""Public head CT and what comes with it: every head is used, every other file has its reason."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.index import index
from ctfm.extract.options import Options
from ctfm.extract.pipeline import extract
from ctfm.store.catalogue import Catalogue

DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the public test scans are not here")

ROWS = {
    "dcm_qa_ct/GE": 38,
    "dcm_qa_ct/Philips/S21570/S2010": 34,
    "ichseg": 38,
    "totalsegmentator/ct_brain_atlas_1mm.nii.gz": 40,
}
"""Slices of the head grid in each head."""

REASONS = {
    "clinical": {"not_hu": 2},  # in Cormack units
    "cornerstone_wado": {  # one original, and lossy ones of image type DERIVED
        "duplicate_positions": 1,
        "duplicate_scan": 1,
        "too_few_slices": 1,
        "unsupported_encoding": 1,
    },
    "dcm4che": {"too_few_slices": 1},
    "dcm_qa_ct/Philips/S21570/S1000": {"localizer": 1},
    "dcm_qa_ct/Philips/S21570/S4010": {"not_ct": 1, "colour": 2},
    "dicom2nifti/notavolume": {"contrast": 1},
    "dicom2nifti/sliceincrement": {"missing_slices": 1},
    "dicomparser": {"derived": 1, "duplicate_scan": 1},
    "elastix": {"too_few_slices": 4},
    "fodicom": {"colour": 1, "contrast": 1, "unreadable": 1},
    "nema_wg04": {"contrast": 2, "duplicate_scan": 1},
    "niivue": {"not_hu": 8},  # values 0..93
    "pydicom/dicomdirtests": {"localizer": 2, "missing_slices": 1},
    "slicer": {"not_hu": 1},  # HU + 1024 under intercept 0
    "totalsegmentator/example_ct_dicom": {"contrast": 1},
    "totalsegmentator/example_ct_sm.nii.gz": {"not_a_head": 1},
}
ODD_FILES = {
    "contrast": 1,
    "duplicate_scan": 2,
    "not_an_image": 3,
    "not_ct": 4,
    "unreadable": 3,
}
"""Of pydicom, beside its tree of small heads."""


@dataclass(frozen=True)
class Outcome:
    """What became of a line of the catalogue."""

    path: str
    """Of its first file, below the folder of the data."""
    reason: str
    n_rows: int


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return index([DATA], key=None)


@pytest.fixture(scope="module")
def outcomes(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    config = ExtractConfig(backbone="intensity")
    store = extract(
        catalogue,
        tmp_path_factory.mktemp("real") / "store",
        get_backbone("intensity"),
        config=config,
        options=Options(workers=2),
    ).store
    lines = {line["scan_id"]: line for line in catalogue.scans.to_pylist()}
    lines |= {line["scan_id"]: line for line in store.scans.to_pylist()}
    paths = {one: str(Path(files[0]).relative_to(DATA)) for one, files in catalogue.files.items()}
    return [
        Outcome(paths[one], line["reason"], line.get("n_rows", 0)) for one, line in lines.items()
    ]


def test_every_file_is_in_one_line_or_counted(catalogue: Catalogue, scanner: Any) -> None:
    assert scanner.accounted(catalogue, sum(path.is_file() for path in DATA.rglob("*")))


@pytest.mark.parametrize("head", ROWS)
def test_each_head_is_used(outcomes: list[Outcome], head: str) -> None:
    (outcome,) = (outcome for outcome in outcomes if outcome.path.startswith(head))
    assert (outcome.reason, outcome.n_rows) == ("ok", ROWS[head])


def test_nothing_but_heads_is_used(outcomes: list[Outcome]) -> None:
    assert sum(outcome.reason == "ok" for outcome in outcomes) == len(ROWS)


@pytest.mark.parametrize("folder", REASONS)
def test_what_is_no_head_has_the_reason_that_its_readme_expects(
    outcomes: list[Outcome], folder: str
) -> None:
    found = Counter(outcome.reason for outcome in outcomes if outcome.path.startswith(folder))
    assert found == REASONS[folder]


def test_every_odd_file_has_its_reason(outcomes: list[Outcome]) -> None:
    known = (*ROWS, *REASONS)
    odd = [outcome for outcome in outcomes if not outcome.path.startswith(known)]
    assert all(outcome.path.startswith("pydicom/") for outcome in odd)
    assert Counter(outcome.reason for outcome in odd) == ODD_FILES
