"""Folds and seeds as one run: who predicts whom, and that the mean is one."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctfm.heads.config import FitConfig
from ctfm.heads.ensemble import fit_ensemble
from ctfm.heads.evaluate import evaluate, labels_and_logits
from ctfm.heads.fit import fit_head
from ctfm.heads.learner import EpochRecord
from ctfm.heads.predict import predict
from ctfm.heads.report import report_run
from ctfm.heads.runs import Run
from ctfm.heads.sweep import Progress
from ctfm.store.errors import ConfigError, RunError
from ctfm.store.features import FeatureStore
from ctfm.store.splits import fold_patients

CONFIG = FitConfig(
    experts=2,
    rank=1,
    router_hidden=3,
    batch_size=16,
    min_epochs=3,
    max_epochs=3,
    lr_head=0.03,
    min_positives=1,
    pool="per-finding",
    split_fractions=(0.6, 0.2, 0.2),
    seed=4,
)
Fit = Callable[..., Run]


@pytest.fixture(scope="module")
def folds(
    planted_store: FeatureStore, planted_labels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    out = tmp_path_factory.mktemp("ensemble") / "folds"
    return fit_ensemble([planted_store], planted_labels, CONFIG, folds=3, seeds=2, out=out)


def members_of(run: Run) -> list[Run]:
    return [Run.open(path) for path in sorted((run.path / "runs").iterdir())]


def logits_of(run: Run) -> np.ndarray:
    return labels_and_logits(run.predictions(), run.findings)[1]


def test_each_scan_is_predicted_by_the_heads_that_had_its_patient_in_test(folds: Run) -> None:
    members = members_of(folds)
    assert len(members) == 6
    tests = np.stack([m.predictions()["split"].to_numpy() == "test" for m in members])
    assert (tests.sum(0) == 2).all()
    each = np.stack([logits_of(member) for member in members])
    for scan in range(tests.shape[1]):
        expected = each[tests[:, scan], scan].mean(0)
        np.testing.assert_allclose(logits_of(folds)[scan], expected, rtol=1e-6)
    assert set(folds.predictions()["split"].to_pylist()) == {"test"}
    assert folds.summary["scans"] == {"test": 90}


def test_no_member_has_a_patient_in_two_splits(folds: Run) -> None:
    for member in members_of(folds):
        table = member.predictions()
        pairs = set(zip(table["patient_id"].to_pylist(), table["split"].to_pylist(), strict=True))
        assert len(pairs) == len(set(table["patient_id"].to_pylist()))


def test_attention_is_that_of_the_heads_that_predict_the_scan(folds: Run) -> None:
    members = [m for m in members_of(folds) if m.predictions()["split"][5].as_py() == "test"]
    each = [np.array(member.attention()["attention"][5].as_py()) for member in members]
    np.testing.assert_allclose(
        folds.attention()["attention"][5].as_py(), np.mean(each, 0), rtol=1e-5
    )
    for finding in folds.findings:
        known = folds.predictions()[f"label_{finding}"].to_pylist()
        lists = folds.attention()[f"attention_{finding}"].to_pylist()
        assert [one is not None for one in lists] == [label == 1 for label in known]


def test_a_new_scan_is_predicted_by_the_mean_of_all_members(folds: Run) -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    position_mm = -4.0 * np.arange(4) - 2
    found = predict(folds, rows, position_mm)
    each = [predict(member, rows, position_mm) for member in members_of(folds)]
    np.testing.assert_allclose(found.logits, np.mean([one.logits for one in each], 0), rtol=1e-5)
    np.testing.assert_allclose(
        found.contributions, np.mean([one.contributions for one in each], 0), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(RunError, match="several heads"):
        folds.head()


def test_evaluates_and_reports_like_any_other_run(folds: Run, tmp_path: Path) -> None:
    assert evaluate(folds).n_scans == 90
    report_run(folds.path, tmp_path / "report.html", split="test")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for member in members_of(folds):
        said = member.summary
        best = f"{said['best_epoch']} of {said['last_epoch']}"
        scans = " / ".join(str(n) for n in said["scans"].values())
        auc = f"{said['macro_auc']['test']:.3f}"
        name = member.path.name
        (line,) = re.findall(rf'<tr><td class="text">{re.escape(name)}</td>.*?</tr>', page)
        assert re.findall(r'number">([^<]*)<', line)[:2] == [scans, best]
        assert auc in line
        curves = re.findall(rf"<path [^>]*><title>{re.escape(name)}</title>", page)
        assert len(curves) == 2, "one of the loss, one of the AUC"
        dots = re.findall(rf"<circle [^>]*><title>{re.escape(name)}</title>", page)
        assert len(dots) == 2
    assert "0 train" not in page
    assert "best: " not in page


def test_what_is_said_of_each_member_is_what_it_says_of_itself(folds: Run) -> None:
    assert "best_epoch" not in folds.summary, "there is not one of all"
    for told, member in zip(folds.summary["members"], members_of(folds), strict=True):
        assert told["name"] == member.path.name
        for name in ("scans", "best_epoch", "last_epoch", "macro_auc"):
            assert told[name] == member.summary[name]
        assert min(told["scans"].values()) > 0


def test_seeds_alone_keep_the_split_and_average(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    run = fit_ensemble([planted_store], planted_labels, CONFIG, seeds=2, out=tmp_path / "seeds")
    members = members_of(run)
    assert [member.config.seed for member in members] == [4, 5]
    np.testing.assert_allclose(
        logits_of(run), np.mean([logits_of(member) for member in members], 0), rtol=1e-6
    )
    assert run.predictions()["split"].equals(members[0].predictions()["split"])
    with pytest.raises(RunError, match="holds a finished run"):
        fit_ensemble([planted_store], planted_labels, CONFIG, seeds=2, out=tmp_path / "seeds")


def test_overwriting_goes_on_where_it_was_interrupted(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int | None]] = []

    def stop(name: str, record: EpochRecord | None) -> None:
        seen.append((name, None if record is None else record.epoch))
        if len(seen) == 4:
            raise KeyboardInterrupt

    def fit(progress: Progress) -> Run:
        return fit_ensemble(
            [planted_store],
            planted_labels,
            CONFIG,
            seeds=2,
            out=tmp_path,
            overwrite=True,
            progress=progress,
        )

    fit(lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        fit(stop)
    assert [epoch for _, epoch in seen] == [1, 1, 2, 2]
    fit(lambda name, record: seen.append((name, None if record is None else record.epoch)))
    assert [epoch for _, epoch in seen[4:]] in ([3, 3, None, None], [2, 3, 3, None, None])


def test_an_interrupted_one_of_other_settings_is_not_lost_by_accident(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def interrupted(name: str, record: EpochRecord | None) -> None:
        raise KeyboardInterrupt

    def fit(config: FitConfig, **options: Any) -> Run:
        return fit_ensemble([planted_store], planted_labels, config, seeds=2, out=out, **options)

    with pytest.raises(KeyboardInterrupt):
        fit(CONFIG, progress=interrupted)
    other = replace(CONFIG, rank=2)
    with pytest.raises(RunError, match="is an interrupted fit of other settings"):
        fit(other)
    assert fit(other, overwrite=True).config.rank == 2


def test_an_interrupted_fit_of_one_head_is_not_lost_to_an_ensemble(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def interrupted(record: EpochRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_head(planted_store, planted_labels, CONFIG, out=out, progress=interrupted)
    with pytest.raises(RunError, match="an interrupted fit of one head"):
        fit_ensemble([planted_store], planted_labels, CONFIG, seeds=2, out=out)
    run = fit_ensemble([planted_store], planted_labels, CONFIG, seeds=2, out=out, overwrite=True)
    assert run.members == 2


def test_a_finding_that_a_member_could_not_learn_is_in_no_macro_auc(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    table = pq.read_table(planted_labels)
    fold = fold_patients([f"patient{i // 2:03d}" for i in range(table.num_rows)], folds=3)
    known = table["air"].to_pylist()
    air = [0 if fold[i] == 0 else known[i] for i in range(len(known))]
    where = table.column_names.index("air")
    pq.write_table(table.set_column(where, "air", pa.array(air)), tmp_path / "labels.parquet")
    run = fit_ensemble(
        [planted_store], tmp_path / "labels.parquet", CONFIG, folds=3, out=tmp_path / "run"
    )
    taught = [m.summary["findings"]["air"]["taught"] for m in members_of(run)]
    assert taught == [True, False, True]  # with fold 1 as test and 2 to validate, 0 trains
    about = run.summary["findings"]["air"]
    assert not about["taught"]
    assert about["positives"] == {"test": air.count(1)}
    evaluated = evaluate(run)
    (status,) = (one.status for one in evaluated.findings if one.name == "air")
    assert "in train of a fold" in status
    assert evaluated.findings_used == run.summary["macro_findings"]["test"] == 2
    assert run.summary["macro_auc"]["test"] == pytest.approx(evaluated.macro_auc)
    head = members_of(run)[0].summary["parameters"]["head"]
    assert run.summary["parameters"]["head"] == 3 * head


def test_a_member_that_diverges_is_named(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    wild = replace(CONFIG, lr_head=1e38)
    with pytest.raises(RunError, match="member seed=4: the loss is"):
        fit_ensemble([planted_store], planted_labels, wild, seeds=2, out=tmp_path / "run")


def test_one_head_is_no_ensemble(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs several members, got 0 folds and 1 seeds"):
        fit_ensemble([planted_store], planted_labels, CONFIG, out=tmp_path / "one")
