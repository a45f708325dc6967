"""The demo: it sees what is there to see, and nothing where labels are shuffled."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.cli import demo
from ctfm.heads.enrichment import enrichment_of_run
from ctfm.heads.evaluate import evaluate
from ctfm.heads.report import report_run
from ctfm.heads.runs import Run
from ctfm.store.features import FeatureStore

FOLDER = Path("ctfm-demo")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as `make demo` runs it."""
    folder = tmp_path_factory.mktemp("demo") / FOLDER
    demo.demo(folder)
    return folder


@pytest.mark.slow
def test_the_cohort_is_large_enough_to_say_something(finished: Path) -> None:
    found = evaluate(finished / "runs" / "intensity")
    assert pq.read_table(finished / "cohort" / "labels.parquet").num_rows >= 300
    assert len(found.findings) >= 12
    assert min(finding.n_positive for finding in found.findings) >= 5


@pytest.mark.slow
def test_the_head_finds_the_findings(finished: Path) -> None:
    assert evaluate(finished / "runs" / "intensity").macro_auc >= 0.80


@pytest.mark.slow
def test_attention_lies_where_focal_findings_lie(finished: Path) -> None:
    run = Run.open(finished / "runs" / "intensity")
    lesions = pq.read_table(finished / "cohort" / "lesions.parquet")
    assert enrichment_of_run(run, lesions).median > 1.3


@pytest.mark.slow
def test_the_report_is_one_page_with_every_finding(finished: Path, tmp_path: Path) -> None:
    page = (finished / "report.html").read_text()
    evaluation = report_run(finished / "runs" / "intensity", tmp_path / "report.html")
    assert all(f'data-finding="{finding.name}"' in page for finding in evaluation.findings)


def shuffled_across_patients(patients: list[str]) -> list[int]:
    """For each study one of another patient: all studies of a patient take those of one other."""
    studies: dict[str, list[int]] = {}
    for line, patient in enumerate(patients):
        studies.setdefault(patient, []).append(line)
    names = list(studies)
    places = np.random.default_rng(0).permutation(len(names))
    # Round the circle of a random order, so that nobody keeps his own.
    giver = {names[a]: names[b] for a, b in zip(places, np.roll(places, 1), strict=True)}
    return [
        studies[giver[patient]][studies[patient].index(line) % len(studies[giver[patient]])]
        for line, patient in enumerate(patients)
    ]


def test_shuffling_gives_every_patient_the_labels_of_one_other() -> None:
    patients = ["a", "a", "a", "b", "c", "c"]
    order = shuffled_across_patients(patients)
    givers = {(patient, patients[line]) for patient, line in zip(patients, order, strict=True)}
    assert len(givers) == 3
    assert {giver for _, giver in givers} == {"a", "b", "c"}
    assert all(patient != giver for patient, giver in givers)


@pytest.mark.slow
def test_labels_shuffled_across_patients_give_chance(finished: Path, tmp_path: Path) -> None:
    labels = pq.read_table(finished / "cohort" / "labels.parquet")
    order = shuffled_across_patients(labels["patient_id"].to_pylist())
    findings = [name for name in labels.column_names if name not in ("study_id", "patient_id")]
    shuffled = labels.select(findings).take(pa.array(order))
    for name in ("study_id", "patient_id"):
        shuffled = shuffled.append_column(name, labels[name])
    pq.write_table(shuffled, tmp_path / "labels.parquet")
    store = FeatureStore.open(finished / "features" / "intensity")
    run = demo.make_run(store, tmp_path / "labels.parquet", tmp_path / "run", experts=6, seed=0)
    assert evaluate(run).macro_auc == pytest.approx(0.5, abs=0.08)
