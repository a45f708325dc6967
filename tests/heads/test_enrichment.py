"""Attention enrichment against cases that were worked out by hand."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.heads.enrichment import (
    attention_by_position,
    attention_enrichment,
    enrichment_of_scan,
    lesion_ranges,
    read_lesions,
    slices_inside,
)
from ctfm.store.errors import LabelError
from ctfm.store.pseudonyms import Pseudonyms

POSITION_MM = np.array([-2.0, -6, -10, -14, -18])


def lesions(*lines: tuple[str, str, bool, float, float], id_column: str = "study_id") -> pa.Table:
    names = (id_column, "finding", "focal", "z_min_mm", "z_max_mm")
    return pa.table(
        {name: list(column) for name, column in zip(names, zip(*lines, strict=True), strict=True)}
    )


@pytest.fixture
def predictions() -> pa.Table:
    """Two findings; the validation split puts the threshold of the first at 0.5."""
    return pa.table(
        {
            "scan_id": ["v0", "v1", "t0", "t1", "t2", "t3"],
            "study_id": ["sv0", "sv1", "s0", "s1", "s2", "s3"],
            "split": ["validation"] * 2 + ["test"] * 4,
            "logit_lipoma": [0.0, 1.0, 2.0, 3.0, 0.2, 5.0],
            "label_lipoma": [0, 1, 1, 1, 1, 0],
            "logit_midline_shift": [0.0, 0.0, 1.0, -1.0, 1.0, 1.0],
            "label_midline_shift": [None, None, 1, 1, None, 1],
        }
    )


@pytest.fixture
def attention() -> pa.Table:
    return pa.table(
        {
            "scan_id": ["t0", "t1", "t2", "t3"],
            "position_mm": [POSITION_MM, POSITION_MM, POSITION_MM, POSITION_MM],
            "attention": [
                np.array([0.1, 0.6, 0.1, 0.1, 0.1]),
                np.array([0.1, 0.1, 0.1, 0.5, 0.2]),
                np.array([0.2, 0.2, 0.2, 0.2, 0.2]),
                np.array([0.9, 0.1, 0.0, 0.0, 0.0]),
            ],
        }
    )


def test_a_slice_is_inside_when_its_slab_touches_the_range() -> None:
    assert slices_inside(POSITION_MM, [(-11.0, -9.0)]).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert slices_inside(POSITION_MM, [(-12.0, -8.5)]).tolist() == [False, False, True, True, False]
    assert slices_inside(POSITION_MM, [(-99.0, -21.0)]).tolist() == [False] * 5
    both = slices_inside(POSITION_MM, [(-1.0, 0.0), (-18.0, -17.0)])
    assert both.tolist() == [True, False, False, False, True]


def test_a_single_slice_is_infinitely_thin() -> None:
    assert slices_inside(np.array([-6.0]), [(-7.0, -5.0)]).tolist() == [True]
    assert slices_inside(np.array([-6.0]), [(-5.5, -5.0)]).tolist() == [False]


def test_enrichment_is_attention_over_share_of_the_stack() -> None:
    attention = np.array([0.1, 0.6, 0.1, 0.1, 0.1])
    inside = np.array([False, True, True, False, False])
    assert enrichment_of_scan(attention, inside) == pytest.approx(0.7 / (2 / 5))
    assert enrichment_of_scan(3 * attention, inside) == pytest.approx(0.7 / (2 / 5))
    assert enrichment_of_scan(np.full(5, 0.2), inside) == pytest.approx(1)
    assert math.isnan(enrichment_of_scan(attention, np.zeros(5, bool)))


def test_only_true_positives_count(predictions: pa.Table, attention: pa.Table) -> None:
    places = lesion_ranges(
        lesions(
            ("s0", "lipoma", True, -7.0, -5.0),  # 0.6 of 1/5: 3
            ("s1", "lipoma", True, -18.0, -13.0),  # 0.7 of 2/5: 1.75
            ("s2", "lipoma", True, -7.0, -5.0),  # missed
            ("s3", "lipoma", True, -3.0, -1.0),  # not positive
            ("s0", "midline_shift", True, -11.0, -9.0),  # 0.1 of 1/5: 0.5
            ("s1", "midline_shift", True, -11.0, -9.0),  # missed at the threshold 0
            ("s3", "midline_shift", True, -99.0, -80.0),  # outside the stack
        ),
        predictions,
    )
    found = attention_enrichment(
        predictions, attention, places, findings=["midline_shift", "lipoma"]
    )
    shift, lipoma = found.findings
    assert (lipoma.n, lipoma.n_positive, lipoma.threshold) == (2, 3, 0.5)
    assert lipoma.median == pytest.approx((3 + 1.75) / 2)
    assert (shift.n, shift.n_positive, shift.threshold) == (1, 2, 0.0)
    assert shift.median == pytest.approx(0.5)
    assert found.median == pytest.approx((0.5 + 2.375) / 2)


def test_a_finding_with_slices_weighed_for_itself_is_judged_by_them(
    predictions: pa.Table, attention: pa.Table
) -> None:
    own = [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5, 0.0], None, None]
    table = attention.append_column("attention_lipoma", pa.array(own))
    places = lesion_ranges(
        lesions(
            *((study, "lipoma", True, -11.0, -9.0) for study in ("s0", "s1")),
            ("s0", "midline_shift", True, -11.0, -9.0),
        ),
        predictions,
    )
    findings = ("lipoma", "midline_shift")
    first, second = attention_enrichment(predictions, table, places, findings=findings).findings
    assert first.median == pytest.approx(np.median([5.0, 2.5]))
    assert second.median == pytest.approx(0.1 * 5)


def test_a_threshold_can_be_given(predictions: pa.Table, attention: pa.Table) -> None:
    places = lesion_ranges(lesions(("s0", "lipoma", True, -7.0, -5.0)), predictions)
    for threshold, count in ((2.0, 1), (2.1, 0)):
        found = attention_enrichment(
            predictions, attention, places, findings=["lipoma"], threshold=threshold
        )
        assert found.findings[0].n == count
    assert math.isnan(found.median)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["median"] is None


def test_a_lesion_in_two_places_counts_as_one(predictions: pa.Table, attention: pa.Table) -> None:
    table = lesions(("s0", "lipoma", True, -3.0, -1.0), ("s0", "lipoma", True, -7.0, -5.0))
    found = attention_enrichment(
        predictions, attention, lesion_ranges(table, predictions), findings=["lipoma"]
    )
    assert found.findings[0].n == 1
    assert found.findings[0].median == pytest.approx(0.7 / (2 / 5))


def test_diffuse_findings_are_left_out(predictions: pa.Table) -> None:
    table = lesions(
        ("s0", "lipoma", True, -7.0, -5.0), ("s0", "cerebral_edema", False, -150.0, 0.0)
    )
    assert list(lesion_ranges(table, predictions)) == ["lipoma"]


def test_lesions_may_hold_original_ids(predictions: pa.Table) -> None:
    key = b"k" * 32
    made = Pseudonyms(key)
    scans = pa.table({"scan_id": [made.scan("x")], "study_id": [made.study("1.2.3")]})
    by_study = lesion_ranges(lesions(("1.2.3", "lipoma", True, -2.0, -1.0)), scans, key=key)
    by_scan = lesion_ranges(
        lesions(("x", "lipoma", True, -2.0, -1.0), id_column="scan_id"), scans, key=key
    )
    assert by_study == by_scan == {"lipoma": {made.scan("x"): [(-2.0, -1.0)]}}


def test_lesions_of_other_scans_are_refused(predictions: pa.Table) -> None:
    with pytest.raises(LabelError, match="no study_id of the table of lesions is a scan"):
        lesion_ranges(lesions(("elsewhere", "lipoma", True, -2.0, -1.0)), predictions)


def test_a_table_without_a_needed_column_is_refused(predictions: pa.Table) -> None:
    table = lesions(("s0", "lipoma", True, -2.0, -1.0))
    for name in table.column_names:
        with pytest.raises(LabelError, match="it needs scan_id or study_id, finding, focal"):
            lesion_ranges(table.drop_columns(name), predictions)


def test_reads_lesions_from_parquet(tmp_path: pytest.TempPathFactory) -> None:
    path = f"{tmp_path}/lesions.parquet"
    with pytest.raises(LabelError, match="cannot read lesions"):
        read_lesions(path)
    table = lesions(("s0", "lipoma", True, -2.0, -1.0))
    pq.write_table(table, path)
    assert read_lesions(path) == table
    numbers = pa.table({**dict(zip(table.column_names, table.columns, strict=True)), "focal": [1]})
    pq.write_table(numbers, path)
    assert read_lesions(path) == table
    words = pa.table(
        {**dict(zip(table.column_names, table.columns, strict=True)), "z_min_mm": ["low"]}
    )
    pq.write_table(words, path)
    with pytest.raises(LabelError, match=r"cannot read lesions .*low"):
        read_lesions(path)


def test_mean_attention_is_relative_to_even_attention() -> None:
    stacks = [
        (np.array([-2.0, -6.0]), np.array([0.75, 0.25])),
        (np.array([-2.0, -6.0, -10.0, -14.0]), np.array([0.25, 0.5, 0.25, 0.0])),
    ]
    position_mm, means = attention_by_position(stacks)
    assert position_mm.tolist() == [-2, -6, -10, -14]
    assert means.tolist() == [(1.5 + 1) / 2, (0.5 + 2) / 2, 1, 0]


def test_a_position_that_few_scans_have_is_left_out() -> None:
    stacks = [(np.array([-2.0, -6.0]), np.array([0.5, 0.5]))] * 40
    position_mm, _ = attention_by_position([*stacks, (np.array([-2.0, -10.0]), np.ones(2) / 2)])
    assert position_mm.tolist() == [-2, -6]
    assert attention_by_position([])[0].size == 0
