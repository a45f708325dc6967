"""Commands on runs: `fit-head`, `evaluate`, `predict`, `report`."""

import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctfm.cli.console import out, print_table, progress_bar
from ctfm.cli.options import Device, device_name
from ctfm.heads.config import PRESETS, FitConfig
from ctfm.store.errors import ConfigError

if TYPE_CHECKING:
    from ctfm.heads.enrichment import Enrichment
    from ctfm.heads.evaluate import Evaluation
    from ctfm.heads.runs import Run
    from ctfm.store.labels import JoinedLabels

Catalogue = Annotated[
    Path, typer.Option(help="Catalogue; the key beside it joins tables that hold original ids.")
]
DEFAULT_SPLIT = "/".join(f"{100 * share:g}" for share in FitConfig.split_fractions)
RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished run.")]


def fit_head(
    context: typer.Context,
    features: Annotated[
        str | None,
        typer.Option(help="Feature store, folder or URL; default: the one under features/."),
    ] = None,
    labels: Annotated[Path, typer.Option(help="Label table, CSV or Parquet.")] = Path(
        "labels.parquet"
    ),
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Run folder; default: runs/STORE-ADAPTER.")
    ] = None,
    experts: Annotated[int, typer.Option(help="K; 0 fits no adapter.")] = FitConfig.experts,
    rank: Annotated[int, typer.Option(help="r of each expert.")] = FitConfig.rank,
    router_hidden: Annotated[
        int, typer.Option(help="Hidden width of the router.")
    ] = FitConfig.router_hidden,
    expert_bias: Annotated[
        bool, typer.Option("--expert-bias", help="A bias an expert.")
    ] = FitConfig.expert_bias,
    pool: Annotated[str, typer.Option(help="attention or mean.")] = FitConfig.pool,
    token: Annotated[str, typer.Option(help="Which embedding of a slice.")] = FitConfig.token,
    findings: Annotated[
        str | None, typer.Option(help="Columns to fit, a,b,…; default: every finding.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Settings to start from: default, or paper to its letter.")
    ] = "default",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of any other setting, e.g. gamma=1; repeatable."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Scans a step.")] = FitConfig.batch_size,
    min_epochs: Annotated[int, typer.Option(help="Never stop before.")] = FitConfig.min_epochs,
    max_epochs: Annotated[int, typer.Option(help="Always stop after.")] = FitConfig.max_epochs,
    patience: Annotated[
        int, typer.Option(help="Epochs without a better validation AUC.")
    ] = FitConfig.patience,
    split: Annotated[
        str, typer.Option(help="Shares of patients: train/validation/test.")
    ] = DEFAULT_SPLIT,
    seed: Annotated[int, typer.Option(help="Of initialisation and order.")] = FitConfig.seed,
    scans: Catalogue = Path("scans.parquet"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run.")] = False,
    device: Device = None,
) -> None:
    """Fit a MoLRE head on cached embeddings: split by patient, stop early, keep the best epoch."""
    from ctfm.heads.fit import fit_head as fit
    from ctfm.store.catalogue import read_key
    from ctfm.store.features import FeatureStore
    from ctfm.store.labels import join_labels, read_labels

    store = FeatureStore.open(features or only_store())
    config = fit_config(context, preset=preset, settings=settings or [])
    table = read_labels(labels, findings=findings.split(",") if findings else None)
    joined = join_labels(table, store.scans, key=read_key(scans))
    print_unmatched(joined)
    target = out_dir or Path("runs") / f"{store.path.name}-molre{config.experts}"
    with progress_bar(f"fit {target.name}", "epochs") as bar:
        run = fit(
            store,
            joined,
            config,
            out=target,
            device=device_name(device),
            command=["ctfm", *sys.argv[1:]],
            overwrite=overwrite,
            progress=lambda epoch: bar.advance(
                note=f"validation macro AUC {epoch.validation_macro_auc:.3f}"
            ),
        )
    print_fit(run)


def fit_config(context: typer.Context, *, preset: str, settings: Sequence[str]) -> FitConfig:
    """The settings of a fit: a preset, over it the options that were typed, over these `--set`."""
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in context.params.items() if was_typed(context, name)}
    names = {field.name for field in fields(FitConfig)} - {"findings"}
    typed = {name: value for name, value in given.items() if name in names}
    if "split" in given:
        typed["split_fractions"] = parse_split(given["split"])
    return FitConfig.from_dict(
        {**PRESETS[preset].as_dict(), **typed, **dict(map(parse_setting, settings))}
    )


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was on the command line, and not left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def parse_setting(text: str) -> tuple[str, Any]:
    """`gamma=1.5` as a name and a TOML value; a value that TOML does not know is a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"--set takes NAME=VALUE, e.g. gamma=1, got {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def print_fit(run: "Run") -> None:
    """Where a run is, its best epoch, and the macro AUC that chose it."""
    auc, scans = run.summary["macro_auc"], run.summary["scans"]
    rows = [
        ["scans", " / ".join(f"{n} {split}" for split, n in scans.items())],
        ["best epoch", f"{run.summary['best_epoch']} of {run.summary['last_epoch']}"],
        ["validation macro AUC", auc["validation"]],
        ["parameters", f"{run.summary['parameters']['head']:,}"],
        ["seconds", f"{run.summary['seconds']:.1f}"],
    ]
    print_table(str(run.path), ["what", "value"], rows)


def print_unmatched(joined: "JoinedLabels") -> None:
    """Say how many ids of either side have no partner, with examples."""
    out.print(f"labels for {joined.matched.sum()} of {len(joined.scan_ids)} scans")
    sides = (
        ("scans without a label", joined.unmatched_scans),
        ("labels without a scan", joined.unmatched_labels),
    )
    for what, unmatched in sides:
        if unmatched.count:
            out.print(f"{unmatched.count} {what}, e.g. {', '.join(unmatched.examples)}")


def only_store() -> Path:
    """The store under features/, if there is exactly one."""
    from ctfm.store.errors import StoreError

    stores = sorted(
        path.parents[1] for path in Path("features").glob("*/embeddings.zarr/zarr.json")
    )
    if len(stores) != 1:
        listed = f"there are {len(stores)}: {', '.join(map(str, stores))}" if stores else "none"
        raise StoreError(f"--features is needed: of the stores under features/ {listed}")
    return stores[0]


def parse_split(text: str) -> tuple[float, float, float]:
    """`80/10/10` as fractions that add up to 1."""
    try:
        train, validation, test = (float(part) for part in text.split("/"))
    except ValueError:
        raise typer.BadParameter(f"split must be like 80/10/10, got {text!r}") from None
    whole = train + validation + test
    return train / whole, validation / whole, test / whole


def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    lesions: Annotated[
        Path | None, typer.Option(help="Where findings lie: adds attention enrichment.")
    ] = None,
    scans: Catalogue = Path("scans.parquet"),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Print per-finding AUC with intervals, macro AUC, and how many findings reach 0.90."""
    import pyarrow.parquet as pq

    from ctfm.heads.enrichment import enrichment_of_run
    from ctfm.heads.evaluate import evaluate as evaluate_run
    from ctfm.heads.runs import Run
    from ctfm.store.catalogue import read_key

    opened = Run.open(run)
    evaluation = evaluate_run(opened, split=split)
    enrichment = None
    if lesions is not None:
        places = pq.read_table(lesions)
        enrichment = enrichment_of_run(opened, places, split=split, key=read_key(scans))
    if as_json:
        extra = {} if enrichment is None else {"attention_enrichment": enrichment.to_json()}
        print(json.dumps(evaluation.to_json() | extra, indent=2))
        return
    print_evaluation(evaluation)
    if enrichment is not None:
        print_enrichment(enrichment)


def print_evaluation(evaluation: "Evaluation") -> None:
    """A line a finding, then the macro figures."""
    rows = [
        [
            finding.display,
            finding.n_positive,
            finding.auc if finding.estimable else "",
            f"{finding.ci_low:.3f}–{finding.ci_high:.3f}" if finding.estimable else finding.status,
        ]
        for finding in evaluation.findings
    ]
    print_table(f"{evaluation.split} split", ["finding", "n+", "AUC", "95% CI"], rows)
    out.print()
    print_table("macro", ["what", "value"], evaluation.headline().items())


def print_enrichment(enrichment: "Enrichment") -> None:
    """A line a focal finding: attention on its slices over their share of the stack."""
    rows = [
        [finding.display, finding.n, finding.median if finding.n else "no true positive"]
        for finding in enrichment.findings
    ]
    out.print()
    header = ["finding", "true positives", "median enrichment"]
    print_table("attention on the slices of the finding ÷ their share", header, rows)
    out.print(f"median over findings: {enrichment.median:.2f}")


def predict(
    run: RunFolder,
    scan: Annotated[Path, typer.Argument(help="DICOM folder, .zip or volume file.", exists=True)],
    weights: Annotated[
        Path | None, typer.Option(help="The backbone's weights, if not in the hub cache.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The LoRA adapter, if the store was made with one.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="The template, if the store was made with one.")
    ] = None,
    slices: Annotated[int, typer.Option(min=1, help="Slices to name for each finding.")] = 3,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Print the findings of a new scan, and the slices that speak for each.

    Backbone, preprocessing and head are those of the run's own record. Probabilities rank scans;
    they are not calibrated.
    """
    from ctfm.extract.one_scan import embed_scan
    from ctfm.heads.predict import predict as predict_scan
    from ctfm.heads.runs import Run

    opened = Run.open(run)
    rows, position_mm = embed_scan(
        scan,
        opened.store_settings,
        token=opened.config.token,
        weights=weights,
        adapter=adapter,
        template=template,
        device=device_name(device),
    )
    prediction = predict_scan(opened, rows, position_mm)
    if as_json:
        print(json.dumps(prediction.to_json(count=slices), indent=2))
        return
    order = prediction.probabilities.argsort()[::-1]
    lines = []
    for i in order:
        finding = prediction.findings[i]
        top = prediction.top_slices(finding, count=slices)
        where = ", ".join(f"{-one.position_mm:.0f}" for one in top)
        lines.append([finding, float(prediction.probabilities[i]), where])
    header = ["finding", "probability", "slices, mm below the vertex"]
    print_table(str(scan), header, lines)


def report(
    run: RunFolder,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Page to write; default: RUN/report.html.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    lesions: Annotated[
        Path | None, typer.Option(help="Where findings lie: adds attention enrichment.")
    ] = None,
    scans: Catalogue = Path("scans.parquet"),
) -> None:
    """Write a one-page HTML report of a run: figures, tables, provenance."""
    import pyarrow.parquet as pq

    from ctfm.heads.report import report_run
    from ctfm.store.catalogue import read_key

    target = out_path or run / "report.html"
    places = None if lesions is None else pq.read_table(lesions)
    report_run(run, target, split=split, lesions=places, key=read_key(scans))
    out.print(f"report: {target}")
