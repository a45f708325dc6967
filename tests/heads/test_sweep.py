"""Sweeps: each variant is the run that it would be alone, and is fitted once."""

import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ctfm.heads.config import FitConfig
from ctfm.heads.fit import fit_head
from ctfm.heads.grid import Grid, read_grid
from ctfm.heads.learner import EpochRecord
from ctfm.heads.runs import Run
from ctfm.heads.search import WARM_UP_EPOCHS, drawn, search
from ctfm.heads.sweep import groups_of, is_finished, marginal_effects, sweep
from ctfm.heads.sweep_figure import write_effects
from ctfm.store.errors import ConfigError, RunError
from ctfm.store.features import FeatureStore
from ctfm.store.label_join import join_labels
from ctfm.store.labels import read_labels

BASE = FitConfig(
    rank=1,
    router_hidden=3,
    batch_size=16,
    min_epochs=3,
    max_epochs=4,
    lr_head=0.03,
    lr_molre=0.01,
    min_positives=2,
    split_fractions=(0.6, 0.2, 0.2),
)
GRID = read_grid(
    ["experts=0,2", "rank=1,2", "pool=attention,mean", "seed=0:2", "lr_head=0.03"], base=BASE
)


@pytest.fixture(scope="module")
def swept(
    planted_store: FeatureStore, planted_labels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "ablation"
    sweep([planted_store], planted_labels, GRID, out=out, side_by_side=5)
    return out


def test_every_variant_is_the_run_that_it_would_be_alone(
    swept: Path, planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    variants = GRID.variants()
    assert len(variants) == 4 + 8  # the rank of no adapter is none
    for name, config in list(variants.items())[::3]:
        run = Run.open(swept / "runs" / name)
        alone = fit_head(planted_store, planted_labels, config, out=tmp_path / name)
        assert run.config == alone.config == config
        for finding in run.findings:
            mine, theirs = (r.predictions()[f"logit_{finding}"].to_numpy() for r in (run, alone))
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)
        assert run.summary["best_epoch"] == alone.summary["best_epoch"]


def test_the_table_has_a_line_a_variant(swept: Path) -> None:
    table = pq.read_table(swept / "sweep.parquet")
    assert table["name"].to_pylist() == list(GRID.variants())
    line = table.to_pylist()[-1]
    run = Run.open(swept / "runs" / line["name"])
    assert line["validation_macro_auc"] == pytest.approx(run.summary["macro_auc"]["validation"])
    assert line["parameters"] == run.summary["parameters"]["head"]
    assert (line["experts"], line["rank"], line["pool"], line["seed"]) == (2, 2, "mean", 1)


def test_the_table_holds_settings_of_several_kinds_and_the_seed(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    grid = read_grid(["repeat_threshold=auto,0.001"], base=replace(BASE, experts=0, seed=3))
    sweep([planted_store], planted_labels, grid, out=tmp_path / "sweep")
    table = pq.read_table(tmp_path / "sweep" / "sweep.parquet")
    assert table["repeat_threshold"].to_pylist() == ["auto", "0.001"]
    assert table["seed"].to_pylist() == [3, 3]


def test_a_variant_that_diverges_is_a_line_and_the_others_are_fitted(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    grid = read_grid(["lr_head=1e38,0.03", "experts=0,2"], base=BASE)
    for _ in range(2):
        table = sweep([planted_store], planted_labels, grid, out=tmp_path / "sweep", side_by_side=3)
        assert table["status"].to_pylist() == ["diverged", "diverged", "ok", "ok"]
    assert "the loss is" in table["reason"][0].as_py()
    assert table["reason"].null_count == table["validation_macro_auc"].null_count == 2
    effects = marginal_effects(tmp_path / "sweep", grid)
    assert {(one.factor, one.value) for one in effects} == {
        ("lr_head", 0.03), ("experts", 0), ("experts", 2),
    }  # fmt: skip


def test_a_finished_variant_is_never_fitted_again_and_a_killed_sweep_goes_on(
    planted_store: FeatureStore, planted_labels: Path, swept: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "sweep", []

    def stop(name: str, record: EpochRecord | None) -> None:
        seen.append((name, None if record is None else record.epoch))
        if len(seen) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep([planted_store], planted_labels, GRID, out=out, side_by_side=2, progress=stop)
    begun = {name: epoch for name, epoch in seen if epoch is not None}
    finished = {name for name, epoch in seen if epoch is None}
    again: list[tuple[str, int | None]] = []
    sweep(
        [planted_store],
        planted_labels,
        GRID,
        out=out,
        side_by_side=2,
        progress=lambda name, record: again.append((name, record.epoch if record else None)),
    )
    epochs = {name: [e for n, e in again if n == name and e is not None] for name, _ in again}
    for name in begun:
        assert name not in epochs if name in finished else epochs[name][:1] != [1]
    for name in GRID.variants():
        first, second = (Run.open(path / "runs" / name) for path in (out, swept))
        np.testing.assert_allclose(
            first.predictions()["logit_mass"].to_numpy(),
            second.predictions()["logit_mass"].to_numpy(),
            rtol=1e-3,
            atol=1e-3,
        )


def test_another_process_can_fit_the_groups(
    planted_store: FeatureStore, planted_labels: Path, swept: Path, tmp_path: Path
) -> None:
    grid = read_grid(["experts=0,2", "pool=attention,mean"], base=BASE)
    told: list[str] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        table = sweep(
            [planted_store],
            planted_labels,
            grid,
            out=tmp_path / "sweep",
            side_by_side=2,
            executor=executor,
            progress=lambda name, _: told.append(name),
        )
    assert table.num_rows == 4
    assert sorted(told) == sorted(grid.variants())


def test_runs_of_other_labels_are_not_taken_for_these(
    planted_store: FeatureStore, planted_labels: Path, swept: Path, tmp_path: Path
) -> None:
    table = pq.read_table(planted_labels)
    pq.write_table(table.slice(0, 80), tmp_path / "fewer.parquet")
    with pytest.raises(RunError, match="finished run of other settings, stores, labels or"):
        sweep([planted_store], tmp_path / "fewer.parquet", GRID, out=swept)
    joined = join_labels(read_labels(planted_labels), planted_store.scans)
    name, config = next(iter(GRID.variants().items()))
    assert is_finished(swept / "runs" / name, config, stores=[planted_store], labels=joined)


def test_runs_on_other_rows_of_the_same_settings_are_not_taken_for_these(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    """Such as those of a scan that was extracted again, since its files have changed."""
    shutil.copytree(planted_store.path, tmp_path / "store")
    store = FeatureStore.open(tmp_path / "store")
    grid = read_grid(["seed=0:2"], base=BASE)
    sweep([store], planted_labels, grid, out=tmp_path / "sweep")
    shard = store.shards()[0]
    results = store.results(store.scans.filter(pc.equal(store.scans["shard"], shard.index)))
    store.take_back(shard.scan_ids())
    moved = [
        replace(one, rows=one.rows and {name: rows + 1 for name, rows in one.rows.items()})
        for one in results
    ]
    store.write_shard(shard, moved)
    store.finish()
    with pytest.raises(RunError, match="or rows"):
        sweep([store], planted_labels, read_grid(["seed=0:3"], base=BASE), out=tmp_path / "sweep")


def test_marginal_effects_average_over_the_same_combinations(swept: Path) -> None:
    table = pq.read_table(swept / "sweep.parquet").to_pylist()
    effects = {(one.factor, one.value): one for one in marginal_effects(swept, GRID)}
    assert set(effects) == {
        ("experts", 0), ("experts", 2), ("rank", 1), ("rank", 2),
        ("pool", "attention"), ("pool", "mean"),
    }  # fmt: skip
    none = [line["validation_macro_auc"] for line in table if line["experts"] == 0]
    assert effects["experts", 0].variants == 4  # each rank counts, though both are one head
    assert effects["experts", 0].mean == pytest.approx(np.mean(none))
    low = [line for line in table if line["rank"] == 1 and line["experts"] == 2]
    both = [line["validation_macro_auc"] for line in low] + none
    assert effects["rank", 1].mean == pytest.approx(np.mean(both))
    spread = np.array(none).reshape(2, 2).var(1, ddof=1).mean() ** 0.5
    assert effects["experts", 0].seed_sd == pytest.approx(spread)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["experts=0,2,6"], {"experts": (0, 2, 6)}),
        (["seed=0:3"], {"seed": (0, 1, 2)}),
        (
            ["pool=mean,per-finding", "gamma=1.5"],
            {"pool": ("mean", "per-finding"), "gamma": (1.5,)},
        ),
        (["expert_bias=true,false"], {"expert_bias": (True, False)}),
    ],
)
def test_reads_what_is_typed(words: list[str], values: dict[str, tuple[Any, ...]]) -> None:
    assert dict(read_grid(words, base=BASE).factors) == values


def test_reads_a_file(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(
        '[base]\ngamma = 1\n[grid]\nexperts = [0, 6]\nseed = "0:2"\nrank = 4\n'
    )
    grid = read_grid([str(tmp_path / "grid.toml")], base=BASE)
    assert grid.base == replace(BASE, gamma=1.0)
    assert dict(grid.factors) == {"experts": (0, 6), "seed": (0, 1), "rank": (4,)}
    assert list(grid.variants()) == [
        "experts=0,seed=0", "experts=0,seed=1", "experts=6,seed=0,rank=4", "experts=6,seed=1,rank=4"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experts"], "cannot read the grid experts"),
        (["experts=1", "rank"], "a factor is name=value,value"),
        (["expert=1"], "a grid varies settings of a fit, got expert. Known are"),
        (["seed=3:3"], "needs values for each factor, got none for seed"),
        (["experts=1,6,1"], "each value of a factor once, got 1 of experts twice"),
    ],
)
def test_refuses_what_is_no_grid(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_grid(words, base=BASE)


def test_the_order_of_the_data_is_shared_by_seeds_unless_asked() -> None:
    shared = read_grid(["seed=0:3"], base=BASE).variants()
    varied = read_grid(["seed=0:3"], base=BASE, vary_order=True).variants()
    assert [config.order_seed for config in shared.values()] == [0, 0, 0]
    assert [config.order_seed for config in varied.values()] == [0, 1, 2]
    assert len(groups_of(shared, device="cpu", most=None)) == 1
    assert len(groups_of(varied, device="cpu", most=None)) == 3


def test_names_are_folders_of_their_own_however_long() -> None:
    factors = {name: (1, 2) for name in ("experts", "rank", "router_hidden", "top_k", "batch_size")}
    many = {name: (0.1, 0.2) for name in ("lr_head", "lr_molre", "weight_decay", "load_balance")}
    names = list(Grid(base=BASE, factors={**factors, **many}).variants())
    assert len(names) == len(set(names)) == 2**9
    assert max(map(len, names)) < 140


def test_random_draws_some_variants_once_and_the_same_each_time(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    grid = read_grid(["experts=0,2", "pool=attention,mean", "seed=0:3"], base=BASE)
    chosen = drawn(grid, 3)
    assert chosen == drawn(grid, 3)
    assert len(set(chosen)) == 3
    table = search(
        [planted_store], planted_labels, grid, out=tmp_path / "s", method="random", trials=3
    )
    assert sorted(table["name"].to_pylist()) == chosen


def test_optuna_proposes_variants_and_counts_finished_ones(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="optuna is an optional extra")
    grid = read_grid(["experts=0,2", "rank=1,2", "pool=attention,mean"], base=BASE)
    told: list[str] = []
    for _ in range(2):
        table = search(
            [planted_store],
            planted_labels,
            grid,
            out=tmp_path / "s",
            method="optuna",
            trials=5,
            side_by_side=2,
            progress=lambda name, _: told.append(name),
        )
    assert len(told) == 10
    assert 1 <= table.num_rows <= 5
    assert set(table["name"].to_pylist()) <= set(grid.variants())


def test_optuna_gives_up_what_lags_behind(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="optuna is an optional extra")
    longer = replace(BASE, experts=0, min_epochs=WARM_UP_EPOCHS + 3, max_epochs=WARM_UP_EPOCHS + 3)
    grid = read_grid(["lr_head=0.05,0.04,0.03,0.02,0.00001,0.000001,0.0", "seed=0:2"], base=longer)
    table = search(
        [planted_store],
        planted_labels,
        grid,
        out=tmp_path / "s",
        method="optuna",
        trials=14,
        side_by_side=1,
    )
    lines = table.to_pylist()
    given_up = [line for line in lines if line["status"] == "given up"]
    assert given_up
    assert {line["status"] for line in lines} == {"ok", "given up"}
    for line in given_up:
        assert line["test_macro_auc"] is None
        with pytest.raises(RunError, match="unfinished run"):
            Run.open(tmp_path / "s" / "runs" / line["name"])


def test_optuna_fits_in_this_process(
    planted_store: FeatureStore, planted_labels: Path, tmp_path: Path
) -> None:
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(ConfigError, match="leave out --scheduler"),
    ):
        search(
            [planted_store],
            planted_labels,
            GRID,
            out=tmp_path,
            method="optuna",
            executor=executor,
        )


def test_an_unknown_method_is_refused(planted_store: FeatureStore, planted_labels: Path) -> None:
    with pytest.raises(ConfigError, match="method must be one of grid, random, optuna"):
        search([planted_store], planted_labels, GRID, out="nowhere", method="bayes")


def test_the_figure_has_a_dot_a_value_in_its_place(swept: Path, tmp_path: Path) -> None:
    effects = marginal_effects(swept, GRID)
    write_effects(effects, tmp_path / "sweep.svg")
    root = ElementTree.fromstring((tmp_path / "sweep.svg").read_text())
    dots = [float(dot.attrib["cx"]) for dot in root.iter("{http://www.w3.org/2000/svg}circle")]
    order = sorted(range(len(effects)), key=lambda i: effects[i].mean)
    assert [dots[i] for i in order] == sorted(dots)
