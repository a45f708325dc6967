"""Evaluation of predictions whose numbers are known."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ctfm.heads.branches import branches_state, build_branches
from ctfm.heads.compare import compare
from ctfm.heads.config import FitConfig
from ctfm.heads.evaluate import evaluate, evaluate_predictions
from ctfm.heads.runs import Run, RunWriter, StoreRecord
from ctfm.store.errors import RunError

FINDINGS = ("midline_shift", "subdural_hematoma", "lipoma", "my_own_finding")
N = 240


def table(labels: Mapping[str, Sequence[int | None]], *, seed: int = 0) -> pa.Table:
    """Predictions of scans of which every fourth shares its patient with the one before."""
    rng = np.random.default_rng(seed)
    n = len(next(iter(labels.values())))
    columns: dict[str, object] = {
        "scan_id": [f"c{i}" for i in range(n)],
        "study_id": [f"s{i}" for i in range(n)],
        "patient_id": [f"p{i - (i % 4 == 3)}" for i in range(n)],
        "split": [("train", "validation", "test", "test")[i % 4] for i in range(n)],
    }
    for name, values in labels.items():
        logit = rng.standard_normal(n) + 2 * np.array([value or 0 for value in values])
        columns[f"logit_{name}"] = pa.array(logit, pa.float32())
        columns[f"probability_{name}"] = pa.array(1 / (1 + np.exp(-logit)), pa.float32())
        columns[f"label_{name}"] = pa.array(values, pa.int8())
    return pa.table(columns)


@pytest.fixture
def predictions() -> pa.Table:
    rng = np.random.default_rng(1)
    values = (rng.random((N, 4)) < [0.3, 0.4, 0.5, 0.6]).astype(int)
    labels: dict[str, Sequence[int | None]] = {
        name: values[:, c].tolist() for c, name in enumerate(FINDINGS)
    }
    labels["subdural_hematoma"] = [None if i % 5 == 0 else int(values[i, 1]) for i in range(N)]
    labels["lipoma"] = [int(i in (2, 3, 6)) for i in range(N)]
    return table(labels)


def test_numbers_are_those_of_scikit_learn_on_the_split(predictions: pa.Table) -> None:
    found = evaluate_predictions(predictions, findings=FINDINGS)
    rows = predictions.filter(pc.equal(predictions["split"], "test")).to_pylist()
    assert (found.n_scans, found.n_patients) == (120, 60)
    for finding in (found.findings[0], found.findings[1], found.findings[3]):
        name = finding.name
        known = [row for row in rows if row[f"label_{name}"] is not None]
        truth = [row[f"label_{name}"] for row in known]
        score = [row[f"logit_{name}"] for row in known]
        assert (finding.n, finding.n_positive) == (len(known), sum(truth))
        assert finding.auc == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
        assert finding.average_precision == pytest.approx(average_precision_score(truth, score))
        assert finding.prevalence == sum(truth) / len(known)
        assert 0 < finding.ci_low < finding.auc < finding.ci_high <= 1


def test_a_finding_with_too_few_positives_keeps_its_line_and_has_no_auc(
    predictions: pa.Table,
) -> None:
    found = evaluate_predictions(predictions, findings=FINDINGS)
    lipoma = found.findings[2]
    assert lipoma.status == "not estimable: 3 positives"
    assert not lipoma.estimable
    assert math.isnan(lipoma.auc)
    assert lipoma.n_positive == 3
    assert (found.findings_used, found.findings_not_estimable) == (3, 1)
    aucs = [finding.auc for finding in found.findings if finding.estimable]
    assert found.macro_auc == pytest.approx(np.mean(aucs))
    assert found.sd_across_findings == pytest.approx(np.std(aucs, ddof=1))
    assert found.macro_ci[0] < found.macro_auc < found.macro_ci[1]


def test_too_few_negatives_are_said_to_be_negatives() -> None:
    found = evaluate_predictions(table({"lipoma": [1] * 35 + [0]}), findings=["lipoma"])
    assert found.findings[0].status == "not estimable: 1 negative"


def test_counts_findings_by_auc() -> None:
    def with_auc(wrong: int) -> list[float]:
        """Ten positives over ten negatives, of which one positive loses to some: 1 − wrong/100."""
        return [-0.5 - (10 - wrong) if i == 0 else float(i) for i in range(10)]

    negative = [-1.0 - i for i in range(10)]
    aucs = {"a": 0, "b": 10}
    columns: dict[str, object] = {
        "patient_id": [str(i) for i in range(20)],
        "split": ["test"] * 20,
    }
    for name, wrong in aucs.items():
        columns[f"logit_{name}"] = [*with_auc(10 - wrong), *negative]
        columns[f"label_{name}"] = [1] * 10 + [0] * 10
    columns["logit_c"], columns["label_c"] = columns["logit_a"], [1, 0] * 10
    found = evaluate_predictions(pa.table(columns), findings=["a", "b", "c"])
    assert [finding.auc for finding in found.findings][:2] == pytest.approx([1.0, 0.9])
    assert found.auc_at_least_090 == 2
    assert found.auc_080_to_090 == 0
    assert found.ci_low_at_least_090 == 0


def test_display_names_come_from_the_taxonomy_in_its_order(predictions: pa.Table) -> None:
    found = evaluate_predictions(predictions, findings=FINDINGS)
    assert [finding.display for finding in found.findings] == [
        "Midline shift",
        "Subdural hematoma",
        "Lipoma",
        "My own finding",
    ]
    assert list(found.categories) == ["hemorrhage", "mass_lesion", "structural", "other"]


def test_json_is_plain_and_has_null_where_nothing_is_estimable(predictions: pa.Table) -> None:
    found = evaluate_predictions(predictions, findings=FINDINGS)
    text = json.dumps(found.to_json(), allow_nan=False)
    values = json.loads(text)
    assert values["findings"][2]["auc"] is None
    assert values["findings"][0]["auc"] == found.findings[0].auc
    assert values["macro_ci"] == list(found.macro_ci)
    assert values["findings_not_estimable"] == 1
    again = evaluate_predictions(predictions, findings=FINDINGS)
    assert text == json.dumps(again.to_json(), allow_nan=False)


def test_nothing_estimable_is_said_in_words() -> None:
    found = evaluate_predictions(table({"lipoma": [0] * 30}), findings=["lipoma"])
    assert found.headline()["macro AUC"] == "none of 1 findings is estimable"
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["macro_auc"] is None
    assert found.auc_at_least_090 == found.auc_080_to_090 == 0


def test_a_split_without_scans_is_refused(predictions: pa.Table) -> None:
    with pytest.raises(RunError, match="split 'tset': it has test, train, validation"):
        evaluate_predictions(predictions, findings=FINDINGS, split="tset")


def write_run(
    path: Path,
    predictions: pa.Table,
    *,
    config: FitConfig | None = None,
    summary: Mapping[str, object] | None = None,
) -> None:
    config = config or FitConfig(experts=0)
    writer = RunWriter(path)
    writer.start()
    record = StoreRecord(fingerprint="0" * 64, settings={"backbone": "intensity"})
    writer.write_config(config, dims=[3], findings=FINDINGS, stores=[record])
    writer.write_epochs([], checkpoint=b"")
    with pytest.raises(RunError, match="unfinished"):
        evaluate(path)
    writer.finish(
        branches_state(build_branches(config, dims=[3], findings=4)),
        predictions=predictions,
        attention=pa.table({"scan_id": ["c0"]}),
        summary=summary or {},
    )


def test_a_finding_that_train_never_taught_is_in_no_mean(
    predictions: pa.Table, tmp_path: Path
) -> None:
    lacks = {"midline_shift": (0, 60), "subdural_hematoma": (9, 0), "my_own_finding": (9, 60)}
    findings = {
        name: {
            "positives": {"train": positives},
            "negatives": {"train": negatives},
            "taught": min(positives, negatives) > 0,
        }
        for name, (positives, negatives) in lacks.items()
    }
    write_run(tmp_path, predictions, summary={"findings": findings})
    found = evaluate(tmp_path)
    whole = evaluate_predictions(predictions, findings=FINDINGS)
    assert [finding.status for finding in found.findings] == [
        "not estimable: no positive in train",
        "not estimable: no negative in train",
        "not estimable: 3 positives",
        "ok",
    ]
    assert found.findings[0].n_positive == whole.findings[0].n_positive > 5
    assert math.isnan(found.findings[0].average_precision)
    assert found.macro_auc == whole.findings[3].auc
    assert found.macro_average_precision == whole.findings[3].average_precision


def test_how_many_positives_are_needed_is_what_the_run_was_fitted_with(
    predictions: pa.Table, tmp_path: Path
) -> None:
    write_run(tmp_path, predictions, config=FitConfig(experts=0, min_positives=3))
    assert evaluate(tmp_path).min_positives == 3
    assert evaluate(tmp_path).findings[2].estimable
    assert not evaluate(tmp_path, min_positives=4).findings[2].estimable


def test_evaluates_a_run_by_its_folder(predictions: pa.Table, tmp_path: Path) -> None:
    write_run(tmp_path, predictions)
    found = evaluate(tmp_path, split="validation")
    expected = evaluate_predictions(predictions, findings=FINDINGS, split="validation")
    assert found.n_scans == 60
    assert found.to_json() == expected.to_json()


def compared_runs(folder: Path, **tables: pa.Table) -> list[Run]:
    for name, predictions in tables.items():
        write_run(folder / name, predictions, summary={"parameters": {"head": 20, "adapter": 0}})
    return [Run.open(folder / name) for name in tables]


def other_logits(predictions: pa.Table) -> pa.Table:
    """The same scans and labels, ranked by chance."""
    rng = np.random.default_rng(5)
    for name in FINDINGS:
        logit = pa.array(rng.standard_normal(predictions.num_rows), pa.float32())
        at = predictions.column_names.index(f"logit_{name}")
        predictions = predictions.set_column(at, f"logit_{name}", logit)
    return predictions


def test_runs_are_compared_on_the_scans_and_findings_they_share(
    predictions: pa.Table, tmp_path: Path
) -> None:
    fewer = other_logits(predictions).slice(20).take(list(range(N - 21, -1, -1)))
    runs = compared_runs(tmp_path, first=predictions, second=fewer)
    first, second = compare(runs)
    shared = evaluate_predictions(predictions.slice(20), findings=FINDINGS)
    assert first.evaluation.macro_auc == pytest.approx(shared.macro_auc)
    assert first.evaluation.macro_ci == pytest.approx(shared.macro_ci)
    assert second.evaluation.n_scans == first.evaluation.n_scans == 110
    expected = second.evaluation.macro_auc - first.evaluation.macro_auc
    assert second.difference == pytest.approx(expected)
    assert second.difference_ci[1] < -0.2
    assert (first.difference, first.to_json()["difference_ci"]) == (0.0, None)
    assert first.backbone == "intensity"
    assert json.loads(json.dumps(second.to_json(), allow_nan=False))["findings_used"] == 3


def test_runs_that_cannot_be_compared_are_refused(predictions: pa.Table, tmp_path: Path) -> None:
    swapped = predictions.column_names.index("label_midline_shift")
    flipped = pa.array([1 - value for value in predictions["label_midline_shift"].to_pylist()])
    tables = {
        "one": predictions,
        "relabelled": predictions.set_column(swapped, "label_midline_shift", flipped),
        "others": predictions.set_column(0, "scan_id", pa.array([f"d{i}" for i in range(N)])),
    }
    one, relabelled, others = compared_runs(tmp_path, **tables)
    with pytest.raises(RunError, match="label the same scans otherwise"):
        compare([one, relabelled])
    with pytest.raises(RunError, match="share no scan of the split 'test'"):
        compare([one, others])
