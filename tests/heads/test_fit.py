"""Fitting on a small store with a planted signal: what it learns, when it stops, what it leaves."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctfm.heads import outputs, runs
from ctfm.heads.config import FitConfig
from ctfm.heads.data import FitData
from ctfm.heads.evaluate import evaluate
from ctfm.heads.fit import Variant, fit_group, fit_head
from ctfm.heads.head import Head
from ctfm.heads.learner import EpochRecord, Learner, parameter_groups
from ctfm.heads.metrics import auc_per_finding
from ctfm.heads.runs import Run
from ctfm.store import files
from ctfm.store.errors import LabelError, RunError
from ctfm.store.features import FeatureStore
from ctfm.store.label_join import join_labels
from ctfm.store.labels import read_labels
from ctfm.store.plan import ScanToStore
from ctfm.store.results import ScanResult

N, S, D = 90, 6, 5
FINDINGS = ("mass", "atrophy", "air")
QUICK = FitConfig(
    experts=2,
    rank=1,
    router_hidden=3,
    batch_size=16,
    min_epochs=3,
    max_epochs=3,
    lr_head=0.03,
    min_positives=2,
    split_fractions=(0.6, 0.2, 0.2),
)


def truth() -> np.ndarray:
    y = (np.random.default_rng(1).random((N, 3)) < (0.5, 0.3, 0.2)).astype(np.float32)
    y[np.random.default_rng(2).random((N, 3)) < 0.05] = np.nan
    return y


def scan_rows(index: int) -> np.ndarray:
    """Noise, and a bright number of its own in one slice for each finding."""
    random = np.random.default_rng([3, index])
    rows = random.normal(size=(2 + index % (S - 1), D)).astype(np.float32)
    for c in np.flatnonzero(truth()[index] == 1):
        rows[random.integers(len(rows)), c] += 8
    return rows


def write_labels(path: Path, y: np.ndarray, **columns: Any) -> Path:
    values = [[None if math.isnan(v) else int(v) for v in column] for column in y.T]
    table = {"scan_id": [f"scan{i:02d}" for i in range(N)], **columns}
    pq.write_table(pa.table(table | dict(zip(FINDINGS, values, strict=True))), path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    scans = [
        ScanToStore(
            scan_id=f"scan{i:02d}",
            study_id=f"study{i:02d}",
            patient_id=f"patient{i // 2:02d}",
            max_rows=S,
        )
        for i in range(N)
    ]
    made = FeatureStore.create(
        tmp_path_factory.mktemp("fit") / "store",
        settings={"backbone": "planted", "template": None},
        tokens={"cls": D},
        dtype="float16",
        scans=scans,
    )
    for shard in made.pending_shards():
        results = []
        for scan in shard.scans:
            rows = scan_rows(int(scan.scan_id[4:]))
            position_mm = -4 * np.arange(len(rows), dtype=np.float32) - 2
            results.append(
                ScanResult(scan_id=scan.scan_id, rows={"cls": rows}, position_mm=position_mm)
            )
        made.write_shard(shard, results)
    made.finish()
    return made


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels") / "labels.parquet", truth())


@pytest.fixture(scope="module")
def run(store: FeatureStore, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("run") / "a" / "run"
    return fit_head(store, labels, QUICK, out=out, command=["ctfm", "fit-head"])


def test_learns_what_is_planted_and_nothing_from_shuffled_labels(
    store: FeatureStore, labels: Path, tmp_path: Path
) -> None:
    longer = replace(QUICK, min_epochs=12, max_epochs=12)
    run = fit_head(store, labels, longer, out=tmp_path / "run")
    shuffled = truth()[np.random.default_rng(5).permutation(N)]
    write_labels(tmp_path / "shuffled.parquet", shuffled)
    nonsense = fit_head(store, tmp_path / "shuffled.parquet", longer, out=tmp_path / "nonsense")
    assert run.summary["macro_auc"]["test"] > 0.9
    assert nonsense.summary["macro_auc"]["test"] < 0.75


def test_predictions_are_those_of_the_saved_head_on_the_stored_rows(
    store: FeatureStore, run: Run
) -> None:
    table, head = run.predictions(), run.head()
    assert set(table["split"].to_pylist()) == {"train", "validation", "test"}
    attention = {line["scan_id"]: line for line in run.attention().to_pylist()}
    for line in table.to_pylist()[::7]:
        rows, _ = store.load([line["scan_id"]])
        positions, _ = store.positions([line["scan_id"]])
        output = head.explain(rows.unsqueeze(0), torch.ones(1, len(rows), dtype=torch.bool))
        logits = [line[f"logit_{name}"] for name in FINDINGS]
        assert logits == pytest.approx(output.logits[0].tolist(), abs=1e-5)
        for c, name in enumerate(FINDINGS):
            assert line[f"probability_{name}"] == pytest.approx(1 / (1 + math.exp(-logits[c])))
            known = truth()[int(line["scan_id"][4:]), c]
            assert line[f"label_{name}"] == (None if math.isnan(known) else known)
        about = attention[line["scan_id"]]
        assert about["split"] == line["split"]
        assert about["position_mm"] == positions.tolist()
        assert about["attention"] == pytest.approx(output.attention[0, 0].tolist(), abs=1e-6)


def test_only_a_pool_with_weights_for_each_finding_leaves_them(
    store: FeatureStore, labels: Path, tmp_path: Path
) -> None:
    shared = replace(QUICK, experts=0, pool="multihead", pool_heads=1)
    several = replace(shared, pool="per-finding")
    for config, more in ((shared, 0), (several, len(FINDINGS))):
        columns = fit_head(store, labels, config, out=tmp_path / config.pool).attention()
        assert columns.num_columns == 4 + more


def test_no_patient_is_in_two_splits(run: Run) -> None:
    table = run.predictions()
    pairs = set(zip(table["patient_id"].to_pylist(), table["split"].to_pylist(), strict=True))
    assert len(pairs) == len(set(table["patient_id"].to_pylist()))


def test_the_summary_says_what_was_done(store: FeatureStore, run: Run) -> None:
    summary, table = run.summary, run.predictions()
    splits = table["split"].to_pylist()
    assert summary["command"] == ["ctfm", "fit-head"]
    assert [one["fingerprint"] for one in summary["stores"]] == [store.fingerprint]
    assert run.stores[0].fingerprint == store.fingerprint
    assert summary["scans"] == {name: splits.count(name) for name in set(splits)}
    head = run.head()
    assert summary["parameters"]["head"] == sum(p.numel() for p in head.parameters())
    assert head.molre is not None
    assert summary["parameters"]["adapter"] == sum(p.numel() for p in head.molre.parameters())
    assert {"ctfm", "torch"} <= set(summary["versions"])
    assert summary["machine"]["device"] == "cpu"
    test = table.filter(pa.array([name == "test" for name in splits]))
    y, logits = (
        np.array([[np.nan if v is None else v for v in test[f"{kind}_{name}"].to_pylist()]
                  for name in FINDINGS], np.float64).T
        for kind in ("label", "logit")
    )  # fmt: skip
    aucs = auc_per_finding(y, logits, min_positives=QUICK.min_positives)
    assert summary["macro_findings"]["test"] == np.isfinite(aucs).sum() > 0
    assert summary["macro_auc"]["test"] == pytest.approx(np.nanmean(aucs))
    best = run.epochs()[summary["best_epoch"] - 1]
    assert best["validation_macro_auc"] == pytest.approx(summary["macro_auc"]["validation"])


def test_one_seed_gives_one_head_and_leaves_the_global_state_alone(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = fit_head(store, labels, QUICK, out=tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    other = fit_head(store, labels, replace(QUICK, seed=1), out=tmp_path / "other")
    for name in (runs.HEAD, runs.PREDICTIONS, runs.ATTENTION, runs.CONFIG):
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    assert (other.path / runs.HEAD).read_bytes() != (run.path / runs.HEAD).read_bytes()


@pytest.mark.parametrize(
    ("aucs", "best", "last"),
    [
        ([0.5, 0.6, 0.7, 0.6, 0.6, 0.9], 3, 5),  # patience of 2 ends it
        ([0.9, 0.6, 0.7, 0.6, 0.6, 0.9], 1, 4),  # not before min_epochs; the best may be earlier
        ([0.5, 0.6, 0.6, 0.6, 0.9, 0.9], 2, 4),  # a tie does not count as better
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, 6),  # max_epochs
    ],
)
def test_stops_and_keeps_the_best_epoch(
    store: FeatureStore,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    aucs: list[float],
    best: int,
    last: int,
) -> None:
    scripted = iter([*aucs, *aucs[:1] * 2])
    heads: list[dict[str, torch.Tensor]] = []
    real_end = Learner.end_epoch

    def end(self: Learner, *args: Any, **kwargs: Any) -> EpochRecord:
        record = real_end(self, *args, **kwargs)
        heads.append({n: value.clone() for n, value in self.branches[0].state_dict().items()})
        return record

    monkeypatch.setattr(outputs, "auc_per_finding", lambda *_, **__: np.full(3, next(scripted)))
    monkeypatch.setattr(Learner, "end_epoch", end)
    config = replace(QUICK, min_epochs=4, patience=2, max_epochs=6)
    run = fit_head(store, labels, config, out=tmp_path / "run")
    # A scripted run that is cut short leaves unused values: the last epoch tells.
    assert (run.summary["best_epoch"], run.summary["last_epoch"]) == (best, last)
    assert [line["epoch"] for line in run.epochs()] == list(range(1, last + 1))
    for name, value in run.head().state_dict().items():
        assert torch.equal(value, heads[best - 1][name])


def test_reports_each_epoch_as_it_ends(store: FeatureStore, labels: Path, tmp_path: Path) -> None:
    seen: list[EpochRecord] = []

    def progress(record: EpochRecord) -> None:
        seen.append(record)
        lines = (tmp_path / "run" / runs.METRICS).read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [r.epoch for r in seen]

    fit_head(store, labels, QUICK, out=tmp_path / "run", progress=progress)
    assert [record.epoch for record in seen] == [1, 2, 3]
    assert seen[0].best


def test_gives_molre_its_own_rate_and_biases_and_query_no_decay() -> None:
    config = FitConfig(lr_head=0.5, lr_molre=0.25, weight_decay=0.125, expert_bias=True)
    head = Head(D, 3, 2, 1, 3, "attention", True)
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups([head], config)
        for parameter in group["params"]
    }
    assert found == {
        "molre.down": (0.25, 0.125),
        "molre.up": (0.25, 0.125),
        "molre.up_bias": (0.25, 0.0),
        "molre.router.0.weight": (0.25, 0.125),
        "molre.router.0.bias": (0.25, 0.0),
        "molre.router.2.weight": (0.25, 0.125),
        "molre.router.2.bias": (0.25, 0.0),
        "pool.query": (0.5, 0.0),
        "classifier.weight": (0.5, 0.125),
        "classifier.bias": (0.5, 0.0),
    }


def test_a_finding_without_positives_in_train_is_said_and_left_out(
    store: FeatureStore, run: Run, tmp_path: Path
) -> None:
    y = truth()
    train = {
        int(line["scan_id"][4:])
        for line in run.predictions().to_pylist()
        if line["split"] == "train"
    }
    y[sorted(train), 1] = np.where(np.isnan(y[sorted(train), 1]), np.nan, 0)
    fitted = fit_head(
        store, write_labels(tmp_path / "labels.parquet", y), QUICK, out=tmp_path / "run"
    )
    about = fitted.summary["findings"]["atrophy"]
    assert about["positives"]["train"] == 0
    assert not about["taught"]
    assert not about["selects_epoch"]
    assert fitted.summary["macro_findings"]["test"] == 2
    evaluated = evaluate(fitted)
    assert evaluated.findings_used == 2
    assert evaluated.macro_auc == pytest.approx(fitted.summary["macro_auc"]["test"])


def test_too_few_validation_positives_are_one_clear_error(
    store: FeatureStore, labels: Path, tmp_path: Path
) -> None:
    with pytest.raises(LabelError, match=r"no finding can choose .* Lower min_positives"):
        fit_head(store, labels, replace(QUICK, min_positives=40), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_takes_labels_that_are_joined_already_in_any_order(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path
) -> None:
    backwards = store.scans.take(pa.array(range(N - 1, -1, -1)))
    table = read_labels(labels)
    for again in (
        fit_head(store, table, QUICK, out=tmp_path / "table"),
        fit_head(store, join_labels(table, backwards), QUICK, out=tmp_path / "joined"),
    ):
        assert (again.path / runs.HEAD).read_bytes() == (run.path / runs.HEAD).read_bytes()


def test_bfloat16_products_give_nearly_the_same(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path
) -> None:
    half = fit_head(store, labels, replace(QUICK, precision="bfloat16"), out=tmp_path / "run")
    for name in FINDINGS:
        exact, near = (r.predictions()[f"logit_{name}"].to_numpy() for r in (run, half))
        assert np.corrcoef(exact, near)[0, 1] > 0.99
    assert half.head().classifier.weight.dtype == torch.float32


def test_a_loss_that_diverges_is_an_error(
    store: FeatureStore, labels: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="lower lr_head and lr_molre"):
        fit_head(store, labels, replace(QUICK, lr_head=1e38), out=tmp_path / "run")


def interrupt(after: int) -> Callable[[EpochRecord], None]:
    def progress(record: EpochRecord) -> None:
        if record.epoch == after:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_fit_is_no_run_and_the_next_one_goes_on_to_the_same_bytes(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit_head(store, labels, QUICK, out=out, progress=interrupt(2))
    with pytest.raises(RunError, match="unfinished run"):
        Run.open(out)
    seen: list[int] = []
    again = fit_head(store, labels, QUICK, out=out, progress=lambda r: seen.append(r.epoch))
    assert seen == [3]
    assert [line["epoch"] for line in again.epochs()] == [1, 2, 3]
    assert (again.path / runs.PREDICTIONS).read_bytes() == (
        run.path / runs.PREDICTIONS
    ).read_bytes()
    assert (again.path / runs.HEAD).read_bytes() == (run.path / runs.HEAD).read_bytes()


def test_killed_after_its_last_epoch_the_next_one_makes_a_run_that_is_whole(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit_head(store, labels, QUICK, out=tmp_path / "run", progress=interrupt(3))
    seen: list[EpochRecord] = []
    again = fit_head(store, labels, QUICK, out=tmp_path / "run", progress=seen.append)
    assert not seen
    assert [line["epoch"] for line in again.epochs()] == [1, 2, 3]
    assert (again.path / runs.HEAD).read_bytes() == (run.path / runs.HEAD).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"ema": 0.9},
        {"router_noise": 0.5, "clip_norm": 0.1},
        {"load_balance": 0.1, "router_z": 0.1, "router_entropy": 0.1},
        {"schedule": "cosine", "warmup_epochs": 1.5},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_whatever_is_set_an_interrupted_fit_ends_with_the_same_bytes(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = replace(QUICK, **settings)
    whole = fit_head(store, labels, config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_head(store, labels, config, out=tmp_path / "run", progress=interrupt(1))
    again = fit_head(store, labels, config, out=tmp_path / "run")
    assert (again.path / runs.HEAD).read_bytes() == (whole.path / runs.HEAD).read_bytes()
    assert (whole.path / runs.HEAD).read_bytes() != (run.path / runs.HEAD).read_bytes()


def test_a_head_that_diverges_leaves_the_others_of_its_group_as_they_are_alone(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path
) -> None:
    data = FitData([store], labels, QUICK)
    variants = [
        Variant(config=replace(QUICK, lr_head=1e38), out=tmp_path / "wild"),
        Variant(config=QUICK, out=tmp_path / "tame"),
    ]
    wild, tame = fit_group(data, variants)
    assert (wild.status, tame.status) == ("diverged", "ok")
    assert "the loss is" in wild.reason
    with pytest.raises(RunError, match="unfinished run"):
        Run.open(tmp_path / "wild")
    for finding in FINDINGS:
        mine, alone = (
            one.predictions()[f"logit_{finding}"].to_numpy()
            for one in (Run.open(tmp_path / "tame"), run)
        )
        np.testing.assert_allclose(mine, alone, rtol=1e-3, atol=1e-4)


def test_a_group_that_is_given_up_whole_leaves_no_run(
    store: FeatureStore, labels: Path, tmp_path: Path
) -> None:
    data = FitData([store], labels, QUICK)
    variants = [Variant(config=QUICK, out=tmp_path / "run")]
    (ending,) = fit_group(data, variants, stop_early=lambda _, record: record.epoch == 2)
    assert (ending.status, ending.reason) == ("given up", "after epoch 2")
    with pytest.raises(RunError, match="unfinished run"):
        Run.open(tmp_path / "run")


def test_a_checkpoint_of_another_fit_is_neither_gone_on_from_nor_lost_by_accident(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit_head(store, labels, replace(QUICK, seed=1), out=out, progress=interrupt(2))
    before = (out / runs.CHECKPOINT).read_bytes()
    with pytest.raises(RunError, match="holds an interrupted fit of other settings"):
        fit_head(store, labels, QUICK, out=out)
    assert (out / runs.CHECKPOINT).read_bytes() == before
    again = fit_head(store, labels, QUICK, out=out, overwrite=True)
    assert (again.path / runs.HEAD).read_bytes() == (run.path / runs.HEAD).read_bytes()


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}", b"no checkpoint at all"])
def test_a_damaged_checkpoint_is_not_gone_on_from(
    store: FeatureStore, labels: Path, run: Run, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / runs.CHECKPOINT).write_bytes(content)
    again = fit_head(store, labels, QUICK, out=tmp_path)
    assert (again.path / runs.HEAD).read_bytes() == (run.path / runs.HEAD).read_bytes()


def test_a_finished_run_is_not_fitted_over_by_accident(
    store: FeatureStore, labels: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fit_head(store, labels, QUICK, out=out)
    content = (out / runs.HEAD).read_bytes()
    with pytest.raises(RunError, match="holds a finished run"):
        fit_head(store, labels, replace(QUICK, seed=1), out=out)
    assert (out / runs.HEAD).read_bytes() == content
    fit_head(store, labels, replace(QUICK, seed=1), out=out, overwrite=True)
    assert Run.open(out).config.seed == 1
    assert (out / runs.HEAD).read_bytes() != content


def test_a_folder_of_something_else_is_left_alone(
    store: FeatureStore, labels: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("[server]\n")
    with pytest.raises(RunError, match="is not a run's"):
        fit_head(store, labels, QUICK, out=tmp_path, overwrite=True)
    assert (tmp_path / "config.toml").read_text() == "[server]\n"


def test_a_feature_store_is_left_alone(store: FeatureStore, labels: Path) -> None:
    before = sorted(Path(store.path).rglob("*"))
    with pytest.raises(RunError, match="is a feature store: choose another folder"):
        fit_head(store, labels, QUICK, out=Path(store.path))
    assert sorted(Path(store.path).rglob("*")) == before


@pytest.mark.parametrize("moment", range(5))
def test_killed_while_overwriting_it_never_opens_as_finished(
    store: FeatureStore,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
) -> None:
    out = tmp_path / "run"
    fit_head(store, labels, QUICK, out=out)
    published: list[str] = []
    real = files.publish_bytes

    def killed(path: Path, data: bytes) -> None:
        if len(published) == moment:
            raise KeyboardInterrupt
        published.append(path.name)
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "publish_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_head(store, labels, replace(QUICK, seed=1), out=out, overwrite=True)
    with pytest.raises(RunError):
        Run.open(out)
    fit_head(store, labels, QUICK, out=out, overwrite=True)
    Run.open(out).predictions()
