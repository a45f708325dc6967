"""Commands on runs: `evaluate`, `compare`, `predict`, `report`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctfm.cli.console import out, print_table
from ctfm.cli.options import (
    AllowDownload,
    Catalogue,
    Device,
    Threads,
    TrustRemoteCode,
    device_name,
    use_threads,
)

if TYPE_CHECKING:
    from ctfm.heads.compare import Compared
    from ctfm.heads.enrichment import Enrichment
    from ctfm.heads.evaluate import Evaluation
    from ctfm.heads.predict import ScanPrediction

RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
MinPositives = Annotated[
    int | None,
    typer.Option(min=1, help="Fewest positives and negatives for an AUC; default: the run's."),
]


def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    lesions: Annotated[
        Path | None, typer.Option(help="Where findings lie: adds attention enrichment.")
    ] = None,
    min_positives: MinPositives = None,
    scans: Catalogue = Path("scans.parquet"),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Print per-finding AUC with intervals, macro AUC, and how many findings reach 0.90."""
    from ctfm.heads.enrichment import enrichment_of_run, read_lesions
    from ctfm.heads.evaluate import evaluate as evaluate_run
    from ctfm.heads.runs import Run
    from ctfm.store.catalogue import read_key

    opened = Run.open(run)
    evaluation = evaluate_run(opened, split=split, min_positives=min_positives)
    enrichment = None
    if lesions is not None:
        places = read_lesions(lesions)
        enrichment = enrichment_of_run(opened, places, split=split, key=read_key(scans))
    if as_json:
        extra = {} if enrichment is None else {"attention_enrichment": enrichment.to_json()}
        print(json.dumps(evaluation.to_json() | extra, indent=2))
        return
    print_evaluation(evaluation)
    if enrichment is not None:
        print_enrichment(enrichment)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    min_positives: MinPositives = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Set runs side by side on the scans and findings they share; differences are from the first.

    Example: ctfm compare runs/dinov3-base-none runs/dinov3-base-molre6
    """
    from ctfm.heads.compare import compare as compare_runs
    from ctfm.heads.runs import Run

    compared = compare_runs(
        [Run.open(run) for run in runs], split=split, min_positives=min_positives
    )
    if as_json:
        print(json.dumps([one.to_json() for one in compared], indent=2))
        return
    print_comparison(compared)


def print_comparison(compared: Sequence["Compared"]) -> None:
    """A line a run with the columns of the paper's Table 2 that it knows; then the differences."""
    rows = []
    for one in compared:
        result, (low, high) = one.evaluation, one.evaluation.macro_ci
        auc, sd, at_least = result.macro_auc, result.sd_across_findings, result.auc_at_least_090
        rows.append([one.run.path, auc, sd, f"{low:.3f}–{high:.3f}", at_least])
    first = compared[0].evaluation
    title = (
        f"{first.split} split: {first.n_scans} scans of {first.n_patients} patients, "
        f"{first.findings_used} findings"
    )
    print_table(title, ["run", "macro AUC", "SD", "95% CI", "≥ 0.90"], rows)
    out.print()
    rows = []
    for one in compared:
        sizes = [f"{one.parameters[part]:,}" for part in ("head", "adapter")]
        is_first, (low, high) = one is compared[0], one.difference_ci
        difference = ["", ""] if is_first else [f"{one.difference:+.3f}", f"{low:+.3f}…{high:+.3f}"]
        rows.append([one.run.path, *difference, *sizes])
    header = ["run", "difference", "95% CI, paired", "head", "adapter"]
    print_table("macro AUC against the first; parameters", header, rows)


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
        list[Path] | None,
        typer.Option(
            help="The backbone's weights, if not in the hub cache; one for each store that has any."
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="The LoRA adapter, if there was one; one for each store that had one."),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="The template, if the store was made with one.")
    ] = None,
    slices: Annotated[int, typer.Option(min=1, help="Slices to name for each finding.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
    allow_download: AllowDownload = False,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Print the findings of a new scan, and the slices that speak for each.

    Backbone, preprocessing and head are those of the run's own record, which may be someone else's:
    the network is not used unless you --allow-download. Probabilities rank scans; they are not
    calibrated.
    """
    from ctfm.extract.backbones import EMBEDDED
    from ctfm.extract.one_scan import embed_scan
    from ctfm.extract.recorded import recorded_config
    from ctfm.heads.predict import predict as predict_scan
    from ctfm.heads.runs import Run
    from ctfm.store.verify import ADAPTER_SETTING

    use_threads(threads, say=not as_json)
    opened = Run.open(run)
    has_weights = [
        recorded_config(store.settings).backbone not in EMBEDDED for store in opened.stores
    ]
    own_weights = for_each_store(weights, has_weights, option="--weights")
    had_one = [ADAPTER_SETTING in store.settings for store in opened.stores]
    own_adapters = for_each_store(adapter, had_one, option="--adapter")
    embedded = [
        embed_scan(
            scan,
            store.settings,
            token=opened.config.token,
            weights=own,
            adapter=merged,
            template=template,
            trust_remote_code=trust_remote_code,
            download=allow_download,
            device=device_name(device),
        )
        for store, own, merged in zip(opened.stores, own_weights, own_adapters, strict=True)
    ]
    prediction = predict_scan(
        opened, [rows for rows, _ in embedded], [position_mm for _, position_mm in embedded]
    )
    if as_json:
        print(json.dumps(prediction.to_json(count=slices), indent=2))
        return
    print_prediction(prediction, title=str(scan), slices=slices)


def for_each_store(
    given: Sequence[Path] | None, wanted: Sequence[bool], *, option: str
) -> list[Path | None]:
    """What was given for each store that wants one, in order; None for all if nothing was."""
    if not given:
        return [None] * len(wanted)
    if len(given) != sum(wanted):
        if not any(wanted):
            raise typer.BadParameter(f"no store of the run was made with one: leave out {option}")
        raise typer.BadParameter(
            f"{option} is needed {sum(wanted)} times, in the order of the run's stores, or not at "
            f"all; got {len(given)}"
        )
    left = iter(given)
    return [next(left) if one else None for one in wanted]


def print_prediction(prediction: "ScanPrediction", *, title: str, slices: int) -> None:
    """A line a finding, the most probable first; last, without a number, what was never taught."""
    order = sorted(
        zip(prediction.findings, prediction.probabilities.tolist(), strict=True),
        key=lambda one: (one[0] in prediction.untaught, -one[1]),
    )
    lines: list[list[object]] = []
    for finding, probability in order:
        if finding in prediction.untaught:
            lines.append([finding, None, f"not taught: {prediction.untaught[finding]}"])
            continue
        top = prediction.top_slices(finding, count=slices)
        where = ", ".join(f"{-one.position_mm:.0f} ({one.attention:.0%})" for one in top)
        lines.append([finding, probability, where])
    header = ["finding", "probability", "slices, mm below the vertex (share of the attention)"]
    print_table(title, header, lines)


def report(
    run: RunFolder,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Page to write; default: RUN/report.html.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    lesions: Annotated[
        Path | None, typer.Option(help="Where findings lie: adds attention enrichment.")
    ] = None,
    min_positives: MinPositives = None,
    scans: Catalogue = Path("scans.parquet"),
) -> None:
    """Write a one-page HTML report of a run: figures, tables, provenance."""
    from ctfm.heads.enrichment import read_lesions
    from ctfm.heads.report import report_run
    from ctfm.store.catalogue import read_key

    target = out_path or run / "report.html"
    places = None if lesions is None else read_lesions(lesions)
    report_run(
        run,
        target,
        split=split,
        min_positives=min_positives,
        lesions=places,
        key=read_key(scans),
    )
    out.print(f"report: {target}")
