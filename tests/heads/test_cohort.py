"""Which scans take part in a fit, with which labels and splits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.heads.cohort import gather_cohort, selecting_findings, taught_findings
from ctfm.heads.config import FitConfig
from ctfm.store.errors import LabelError, StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.plan import ScanToStore
from ctfm.store.reasons import Reason
from ctfm.store.results import ScanResult
from ctfm.store.splits import SPLITS, split_patients

N, S, D, FAILED = 40, 4, 3, 5
CONFIG = FitConfig(split_fractions=(0.5, 0.25, 0.25))


def scan_id(index: int) -> str:
    return f"scan{index:02d}"


def build(
    path: Path,
    *,
    views: int = 2,
    complete: bool = True,
    settings: Mapping[str, Any] = MappingProxyType({"backbone": "counter"}),
) -> FeatureStore:
    """View v of scan i holds the number 10 i + v; one scan failed."""
    scans = [
        ScanToStore(
            scan_id=scan_id(i),
            study_id=f"study{i:02d}",
            patient_id=f"patient{i // 2:02d}",
            view=view,
            max_rows=S,
        )
        for i in range(N)
        for view in range(views)
    ]
    store = FeatureStore.create(
        path,
        settings=settings,
        tokens={"cls": D},
        dtype="float16",
        scans=scans,
        shard_scans=20,
    )
    shards = store.pending_shards()
    for shard in shards if complete else shards[:-1]:
        results = []
        for scan in shard.scans:
            index = int(scan.scan_id[4:])
            rows = np.full((1 + index % S, D), 10 * index + scan.view, np.float32)
            position_mm = np.arange(len(rows), dtype=np.float32)
            given: dict[str, Any] = {"rows": {"cls": rows}, "position_mm": position_mm}
            if index == FAILED:
                given = {"reason": Reason.NOT_HU, "detail": "Not HU."}
            results.append(ScanResult(scan_id=scan.scan_id, view=scan.view, **given))
        store.write_shard(shard, results)
    store.finish()
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return build(tmp_path_factory.mktemp("cohort") / "store")


def write_labels(path: Path, indices: list[int], **columns: list[Any]) -> Path:
    table: dict[str, list[Any]] = {"scan_id": [scan_id(i) for i in indices]}
    table |= {"odd": [i % 2 for i in indices], "third": [int(i % 3 == 0) for i in indices]}
    pq.write_table(pa.table(table | columns), path)
    return path


def test_takes_scans_with_embeddings_labels_and_a_split(
    store: FeatureStore, tmp_path: Path
) -> None:
    labelled = [*range(30, 10, -1), FAILED, 77]
    cohort = gather_cohort([store], write_labels(tmp_path / "labels.parquet", labelled), CONFIG)
    indices = [int(one[4:]) for one in cohort.scans["scan_id"].to_pylist()]
    assert indices == list(range(11, 31))
    for line, index in enumerate(indices):
        assert cohort.y[line].tolist() == [index % 2, index % 3 == 0]
    assert cohort.labels.unmatched_labels.count == 2


def test_splits_are_drawn_by_patient_with_the_salt(store: FeatureStore, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)))
    cohort = gather_cohort([store], labels, CONFIG)
    patients = cohort.scans["patient_id"].to_pylist()
    expected = split_patients(patients, salt="ctfm", fractions=CONFIG.split_fractions)
    assert cohort.scans["split"].to_pylist() == expected.tolist()
    lines = [cohort.lines(name) for name in ("train", "validation", "test")]
    assert sorted(np.concatenate(lines)) == list(range(N - 1))


def test_splits_of_the_label_table_come_first(store: FeatureStore, tmp_path: Path) -> None:
    split = [["train", "val", "", "test"][i // 2 % 4] for i in range(N)]
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)), split=split)
    cohort = gather_cohort([store], labels, CONFIG)
    for line in cohort.scans.to_pylist():
        named = split[int(line["scan_id"][4:])]
        assert line["split"] == {"val": "validation"}.get(named, named)
    assert cohort.scans.num_rows == split.count("train") + split.count("val") + split.count(
        "test"
    ) - (split[FAILED] != "")


@pytest.mark.parametrize("seen", ["scan_ids", "patient_ids"])
def test_a_test_split_that_an_adapter_was_trained_on_is_refused(tmp_path: Path, seen: str) -> None:
    store = build(tmp_path / "store")
    labels = write_labels(
        tmp_path / "labels.parquet",
        list(range(30)),
        split=["train"] * 10 + ["validation"] * 10 + ["test"] * 10,
    )
    own = {"scan_ids": scan_id(4), "patient_ids": "patient02"}
    trained: dict[str, Any] = {"scan_ids": [], "patient_ids": []}
    store.record_adapter(max_relative_error=0.0, **{**trained, seen: [own[seen]]})
    gather_cohort([store], labels, CONFIG)
    other = {"scan_ids": scan_id(25), "patient_ids": "patient12"}
    store.record_adapter(max_relative_error=0.0, **{**trained, seen: [other[seen]]})
    with pytest.raises(LabelError, match="patient12"):
        gather_cohort([store], labels, CONFIG)


def test_scans_that_the_labels_give_to_one_patient_are_in_one_split(
    store: FeatureStore, tmp_path: Path
) -> None:
    """Scans i and i + 20 are of one patient in the table alone."""
    labels = write_labels(
        tmp_path / "labels.parquet", list(range(N)), patient_id=[f"x{i % 20}" for i in range(N)]
    )
    for config in (CONFIG, FitConfig(folds=3, fold=1)):
        cohort = gather_cohort([store], labels, config)
        lines = {line["scan_id"]: line for line in cohort.scans.to_pylist()}
        pairs = [
            (lines[scan_id(i)], lines[scan_id(i + 20)])
            for i in range(20)
            if {scan_id(i), scan_id(i + 20)} <= lines.keys()
        ]
        assert len(pairs) > 15
        for one, other in pairs:
            assert (one["split"], one["patient_id"]) == (other["split"], other["patient_id"])


def test_an_adapter_has_seen_a_patient_whose_other_scans_the_labels_name(tmp_path: Path) -> None:
    store = build(tmp_path / "store")
    labels = write_labels(
        tmp_path / "labels.parquet",
        list(range(30)),
        split=["train"] * 10 + ["validation"] * 10 + ["test"] * 10,
        patient_id=["x" if i in (22, 25) else "" for i in range(30)],
    )
    store.record_adapter(max_relative_error=0.0, scan_ids=[], patient_ids=["patient12"])
    # Scans 24 and 25 in the store; by the labels 22 and 23 (patient11), too.
    with pytest.raises(LabelError, match="was trained on 4 scans of patients in"):
        gather_cohort([store], labels, CONFIG)


def test_an_adapter_has_seen_a_patient_under_the_name_of_the_labels(tmp_path: Path) -> None:
    store = build(tmp_path / "store")
    labels = write_labels(
        tmp_path / "labels.parquet",
        list(range(30)),
        split=["train"] * 10 + ["validation"] * 10 + ["test"] * 10,
        patient_id=["x17" if i == 25 else "" for i in range(30)],
    )
    store.record_adapter(max_relative_error=0.0, scan_ids=[], patient_ids=["x17"])
    with pytest.raises(LabelError, match="was trained on 2 scans of patients in"):
        gather_cohort([store], labels, CONFIG)


def test_an_adapter_of_which_nothing_is_known_any_more_is_refused(tmp_path: Path) -> None:
    store = build(tmp_path / "store", settings={"backbone": "x", "backbone_adapter": "0" * 64})
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)))
    with pytest.raises(StoreError, match="the record of what that was trained on is missing"):
        gather_cohort([store], labels, CONFIG)


def test_an_adapter_has_seen_the_patient_of_a_scan_that_has_no_label(tmp_path: Path) -> None:
    """Scans 24 and 25 are of patient12; the adapter was trained on 24, which takes no part."""
    store = build(tmp_path / "store")
    labels = write_labels(
        tmp_path / "labels.parquet",
        [i for i in range(30) if i != 24],
        split=["train"] * 10 + ["validation"] * 10 + ["test"] * 9,
    )
    store.record_adapter(max_relative_error=0.0, scan_ids=[scan_id(24)], patient_ids=[])
    with pytest.raises(LabelError, match="was trained on 1 scans of patients in"):
        gather_cohort([store], labels, CONFIG)


def test_findings_are_chosen_and_ordered_by_the_config(store: FeatureStore, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)), age=[60] * N)
    config = FitConfig(findings=("third", "odd"), split_fractions=(0.5, 0.25, 0.25))
    cohort = gather_cohort([store], labels, config)
    assert cohort.findings == ("third", "odd")
    assert cohort.y[:3].tolist() == [[1, 0], [0, 1], [0, 0]]


def test_a_split_that_a_fit_needs_must_not_be_empty(store: FeatureStore, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)), split=["train"] * N)
    with pytest.raises(LabelError, match="none of the 39 labelled scans is in the validation"):
        gather_cohort([store], labels, CONFIG)


def test_a_store_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    store = build(tmp_path / "store", views=1, complete=False)
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)))
    with pytest.raises(StoreError, match="still pending: run `ctfm extract` again"):
        gather_cohort([store], labels, CONFIG)


def test_findings_choose_the_epoch_if_taught_and_frequent_enough(
    store: FeatureStore, tmp_path: Path
) -> None:
    split = ["train" if i < 30 else "validation" for i in range(N)]
    labels = write_labels(
        tmp_path / "labels.parquet",
        list(range(N)),
        split=split,
        never_in_train=[int(i >= 35) for i in range(N)],
        always_in_train=[int(i < 35) for i in range(N)],
        rare=[int(i in (1, 31, 32)) for i in range(N)],
    )
    cohort = gather_cohort([store], labels, CONFIG)
    assert cohort.findings == ("odd", "third", "never_in_train", "always_in_train", "rare")
    assert taught_findings(cohort).tolist() == [True, True, False, False, True]
    assert selecting_findings(cohort, min_positives=3).tolist() == [True, True, False, False, False]
    assert selecting_findings(cohort, min_positives=5).tolist() == [True] + [False] * 4
    with pytest.raises(LabelError, match="The nearest is odd, with 5 of 10 scans"):
        selecting_findings(cohort, min_positives=6)


def test_a_stratified_split_is_of_the_scans_that_take_part(
    store: FeatureStore, tmp_path: Path
) -> None:
    """Patients 0 to 5 have the rare finding: as many in each part as it should have."""
    rare = [int(i < 12 and i % 2 == 0) for i in range(N)]
    columns = {"patient_id": [f"patient{i // 2:02d}" for i in range(N)]}
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)), rare=rare, **columns)
    config = replace(CONFIG, split_method="stratified")
    cohort = gather_cohort([store], labels, config)
    assert cohort.scans.num_rows == N - 1
    split = cohort.scans["split"].to_numpy()
    positives = [int((cohort.y[split == name, 2] == 1).sum()) for name in SPLITS]
    assert sorted(positives) == [1, 2, 3]
    assert positives[0] == 3
    again = gather_cohort([store], labels, config)
    assert again.scans.equals(cohort.scans)


def test_stratified_folds_test_every_patient_once(store: FeatureStore, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)))
    tested: list[str] = []
    for fold in range(4):
        config = FitConfig(split_method="stratified", folds=4, fold=fold)
        cohort = gather_cohort([store], labels, config)
        chosen = cohort.scans.take(pa.array(cohort.lines("test")))
        assert len(set(chosen["patient_id"].to_pylist())) == 5
        tested += chosen["scan_id"].to_pylist()
    assert sorted(tested) == sorted(set(tested))
    assert len(tested) == N - 1


def test_a_stratified_split_and_one_of_the_labels_are_two(
    store: FeatureStore, tmp_path: Path
) -> None:
    labels = write_labels(tmp_path / "labels.parquet", list(range(N)), split=["train"] * N)
    with pytest.raises(LabelError, match="have a split of their own, and a stratified one"):
        gather_cohort([store], labels, replace(CONFIG, split_method="stratified"))
