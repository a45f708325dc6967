"""Commands that fit: `fit-head` and `sweep`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctfm.cli.console import Bar, note, print_table, progress_bar
from ctfm.cli.labels import join_table, print_cohort, typed_rules
from ctfm.cli.options import (
    DEFAULT_SPLIT,
    Catalogue,
    Device,
    Findings,
    IdColumn,
    IdRepair,
    Ignore,
    Negative,
    Positive,
    Sheet,
    Split,
    Threads,
    Uncertain,
    device_name,
    device_of_a_worker,
    names_of,
    parse_split,
    refuse_threads,
    typed_command,
    use_threads,
)
from ctfm.cli.signals import KEPT, if_interrupted
from ctfm.heads.config import PRESETS, FitConfig
from ctfm.store.errors import ConfigError

if TYPE_CHECKING:
    from ctfm.heads.learner import EpochRecord
    from ctfm.heads.runs import Run
    from ctfm.heads.sweep import Progress
    from ctfm.store.features import FeatureStore
    from ctfm.store.label_join import JoinedLabels

Features = Annotated[
    list[str] | None,
    typer.Option(help="Feature store; several are joined. Default: the one under features/."),
]
LabelFile = Annotated[Path, typer.Option(help="Label table: CSV, .xlsx or Parquet.")]
Preset = Annotated[
    str, typer.Option(help="Settings to start from: default, or paper to its letter.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE of any other setting, e.g. gamma=1; repeatable."),
]
Memory = Annotated[
    float | None,
    typer.Option(min=0.01, help="GB that embeddings may use; beyond, they pass by in windows."),
]


def fit_head(
    context: typer.Context,
    features: Features = None,
    labels: LabelFile = Path("labels.parquet"),
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Run folder; default: runs/STORE-ADAPTER.")
    ] = None,
    adapter: Annotated[
        str, typer.Option(help="molre, lora, mlp, linear or none.")
    ] = FitConfig.adapter,
    experts: Annotated[int, typer.Option(help="K; 0 fits no adapter.")] = FitConfig.experts,
    rank: Annotated[int, typer.Option(help="r of each expert.")] = FitConfig.rank,
    router_hidden: Annotated[
        int, typer.Option(help="Hidden width of the router.")
    ] = FitConfig.router_hidden,
    expert_bias: Annotated[
        bool, typer.Option("--expert-bias", help="A bias an expert.")
    ] = FitConfig.expert_bias,
    pool: Annotated[
        str, typer.Option(help="attention, gated, mean, max, multihead or per-finding.")
    ] = FitConfig.pool,
    token: Annotated[str, typer.Option(help="Which embedding of a slice.")] = FitConfig.token,
    join: Annotated[
        str, typer.Option(help="Several stores: slices side by side, or scans, a pool for each.")
    ] = FitConfig.join,
    findings: Findings = None,
    ignore: Ignore = None,
    id_column: IdColumn = None,
    id_repair: IdRepair = None,
    positive: Positive = None,
    negative: Negative = None,
    uncertain: Uncertain = None,
    sheet: Sheet = None,
    preset: Preset = "default",
    settings: Set = None,
    batch_size: Annotated[int, typer.Option(help="Scans a step.")] = FitConfig.batch_size,
    min_epochs: Annotated[int, typer.Option(help="Never stop before.")] = FitConfig.min_epochs,
    max_epochs: Annotated[int, typer.Option(help="Always stop after.")] = FitConfig.max_epochs,
    patience: Annotated[
        int, typer.Option(help="Epochs without a better validation AUC.")
    ] = FitConfig.patience,
    precision: Annotated[
        str, typer.Option(help="Of the products: float32, bfloat16.")
    ] = FitConfig.precision,
    split: Split = DEFAULT_SPLIT,
    seed: Annotated[int, typer.Option(help="Of the first parameters.")] = FitConfig.seed,
    cross_validate: Annotated[
        int, typer.Option("--folds", help="Cross-validate with so many folds, by patient.")
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Heads that answer with their mean.")] = 1,
    scans: Catalogue = Path("scans.parquet"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is there.")
    ] = False,
    memory: Memory = None,
    log: Annotated[
        str | None, typer.Option(help="Also log to tensorboard, wandb, trackio or mlflow.")
    ] = None,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Fit a head on cached embeddings: split by patient, stop early, keep the best epoch.

    Interrupted, it goes on from its last epoch when run again.
    """
    from ctfm.heads.fit import default_folder

    several = bool(cross_validate) or seeds > 1
    if several and log is not None:
        raise ConfigError(f"--log {log} tells of one head: leave it out with --folds or --seeds")
    use_threads(threads)
    stores = open_stores(features)
    config = fit_config(context, preset=preset, settings=settings or [])
    rules = typed_rules(
        labels,
        findings=findings,
        ignore=ignore,
        id_column=id_column,
        id_repair=id_repair,
        positive=positive,
        negative=negative,
        uncertain=uncertain,
        sheet=sheet,
    )
    joined = join_table(labels, stores[0], rules=rules, catalogue=scans)
    print_cohort(stores, joined, config, folds=cross_validate)
    if joined.split is not None and not cross_validate and was_typed(context, "split"):
        note("the labels have a split of their own: --split is not used")
    target = out_dir or default_folder(stores, config)
    fitting = _Fitting(
        stores=stores,
        labels=joined,
        config=config,
        out=target,
        device=device_name(device),
        memory_bytes=None if memory is None else int(memory * 1e9),
        overwrite=overwrite,
    )
    with if_interrupted(KEPT):
        run = (
            fitting.ensemble(folds=cross_validate, seeds=seeds) if several else fitting.one(log=log)
        )
    print_fit(run)


@dataclass(frozen=True, kw_only=True)
class _Fitting:
    """What `fit-head` was asked for."""

    stores: "list[FeatureStore]"
    labels: "JoinedLabels"
    config: FitConfig
    out: Path
    device: str
    memory_bytes: int | None
    overwrite: bool

    def one(self, *, log: str | None) -> "Run":
        """One head."""
        from ctfm.heads.fit import fit_head as fit
        from ctfm.heads.fit import tracked

        with (
            progress_bar(f"fit {self.out.name}", "epochs") as bar,
            tracked(log, self.out, self.config) as told,
        ):

            def progress(record: "EpochRecord") -> None:
                bar.advance(note=f"validation macro AUC {record.validation_macro_auc:.3f}")
                told(record)

            return fit(
                self.stores,
                self.labels,
                self.config,
                out=self.out,
                device=self.device,
                command=typed_command(),
                overwrite=self.overwrite,
                memory_bytes=self.memory_bytes,
                progress=progress,
            )

    def ensemble(self, *, folds: int, seeds: int) -> "Run":
        """Several heads that answer together."""
        from ctfm.heads.ensemble import fit_ensemble

        with progress_bar(f"fit {self.out.name}", "heads") as bar:
            bar.start(max(folds, 1) * seeds)
            return fit_ensemble(
                self.stores,
                self.labels,
                self.config,
                folds=folds,
                seeds=seeds,
                out=self.out,
                device=self.device,
                command=typed_command(),
                overwrite=self.overwrite,
                memory_bytes=self.memory_bytes,
                progress=counting(bar),
            )


def sweep(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(help="More factors, or a TOML file with \\[grid].")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="NAME=VALUE,VALUE,… of a setting; 0:3 is 0, 1, 2.")
    ] = None,
    features: Features = None,
    labels: LabelFile = Path("labels.parquet"),
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder of the sweep; default: sweeps/STORE.")
    ] = None,
    findings: Findings = None,
    preset: Preset = "default",
    settings: Set = None,
    method: Annotated[
        str, typer.Option(help="grid: all; random or optuna: so many --trials of them.")
    ] = "grid",
    trials: Annotated[int, typer.Option(min=1, help="Of random and optuna.")] = 20,
    vary_order: Annotated[
        bool, typer.Option("--vary-order", help="A seed moves the order of the data too.")
    ] = False,
    side_by_side: Annotated[
        int | None, typer.Option(min=1, help="Heads fitted at once; default: by the caches.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address or file of a Dask scheduler to spread over.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Also write sweep.svg.")] = False,
    scans: Catalogue = Path("scans.parquet"),
    memory: Memory = None,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Fit every combination of some settings, side by side, and compare them.

    Example: ctfm sweep --grid experts=0,1,2,4,6,8 rank=4,8 seed=0:3. Finished variants are never
    fitted again; an interrupted sweep goes on when run again.
    """
    from ctfm.cli.sweeps import SweepRequest, run_sweep
    from ctfm.heads.grid import read_grid

    factors = [*([grid] if grid else []), *(words or [])]
    if not factors:
        raise typer.BadParameter("a sweep needs --grid NAME=VALUE,VALUE,… or a TOML file")
    if scheduler is None:
        use_threads(threads)
    else:
        refuse_threads(threads, "--scheduler")
    stores = open_stores(features)
    base = fit_config(context, preset=preset, settings=settings or [])
    run_sweep(
        SweepRequest(
            stores=stores,
            labels=join_table(
                labels, stores[0], rules=typed_rules(labels, findings=findings), catalogue=scans
            ),
            grid=read_grid(factors, base=base, vary_order=vary_order),
            out=out_dir or Path("sweeps") / "+".join(store.path.name for store in stores),
            method=method,
            trials=trials,
            device=device_name(device) if scheduler is None else device_of_a_worker(device),
            side_by_side=side_by_side,
            scheduler=scheduler,
            memory_bytes=None if memory is None else int(memory * 1e9),
            plot=plot,
        )
    )


def counting(bar: Bar) -> "Progress":
    """Tell a bar of every head that is finished, and note the best epoch until now."""
    best = 0.0

    def told(name: str, record: "EpochRecord | None") -> None:
        nonlocal best
        if record is None:
            bar.advance(note=f"best validation macro AUC {best:.3f}" if best else "")
        elif record.validation_macro_auc > best:
            best = record.validation_macro_auc

    return told


def fit_config(context: typer.Context, *, preset: str, settings: Sequence[str]) -> FitConfig:
    """The settings of a fit: a preset, over it the options that were typed, over these `--set`."""
    from ctfm.heads.grid import parse_value

    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in context.params.items() if was_typed(context, name)}
    names = {field.name for field in fields(FitConfig)}
    typed = {name: value for name, value in given.items() if name in names}
    if "findings" in given:
        typed["findings"] = names_of(given["findings"], option="--findings")
    if "split" in given:
        typed["split_method"], typed["split_fractions"] = parse_split(given["split"])
    set_to = {name: parse_value(value) for name, value in map(_split_setting, settings)}
    return FitConfig.from_dict({**PRESETS[preset].as_dict(), **typed, **set_to})


def _split_setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"--set takes NAME=VALUE, e.g. gamma=1, got {text!r}")
    return name, value


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was on the command line, and not left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def print_fit(run: "Run") -> None:
    """Where a run is, its best epoch, and the macro AUC that chose it."""
    auc, scans = run.summary["macro_auc"], run.summary["scans"]
    judged = "validation" if scans.get("validation") else "test"  # of folds, every scan is tested
    rows: list[list[object]] = [["scans", " / ".join(f"{n} {split}" for split, n in scans.items())]]
    if "best_epoch" in run.summary:
        rows.append(["best epoch", f"{run.summary['best_epoch']} of {run.summary['last_epoch']}"])
    rows += [
        [f"{judged} macro AUC", auc[judged]],
        ["parameters", f"{run.summary['parameters']['head']:,}"],
        ["seconds", f"{run.summary['seconds']:.1f}"],
    ]
    if repeats := run.summary.get("repeats"):
        rows.append(
            [
                "repeats",
                f"t = {repeats['threshold']:.3g}: epochs {repeats['growth']:.2f} times as long, "
                f"{repeats['repeated']:.0%} of the scans more than once",
            ]
        )
    print_table(str(run.path), ["what", "value"], rows)
    for branch in run.summary.get("routing", []):
        for warning in branch["warnings"]:
            note(warning)
    if members := run.summary.get("members", []):
        print_members(members)
    for member in members:
        for warning in member["warnings"]:
            note(f"{member['name']}: {warning}")


def print_members(members: Sequence[Mapping[str, Any]]) -> None:
    """A line a head of those that answer together: its scans, its best epoch, its AUC."""
    rows = [
        [
            member["name"],
            " / ".join(map(str, member["scans"].values())),
            f"{member['best_epoch']} of {member['last_epoch']}",
            member["macro_auc"]["validation"],
            member["macro_auc"]["test"],
        ]
        for member in members
    ]
    header = ["member", " / ".join(members[0]["scans"]), "best epoch", "validation AUC", "test AUC"]
    print_table("\nmembers", header, rows)


def open_stores(features: Sequence[str] | None) -> "list[FeatureStore]":
    """The stores that were named, or the one under features/ if there is exactly one."""
    from ctfm.store.errors import StoreError
    from ctfm.store.features import FeatureStore

    if features:
        return [FeatureStore.open(one) for one in features]
    found_in = Path("features").glob("*/embeddings.zarr/zarr.json")
    stores = sorted(path.parents[1] for path in found_in)
    if len(stores) != 1:
        found = f"there are {len(stores)}: {', '.join(map(str, stores))}" if stores else "none"
        raise StoreError(f"--features is needed: of the stores under features/ {found}")
    return [FeatureStore.open(stores[0])]
