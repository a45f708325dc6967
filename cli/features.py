"""Commands on feature stores: `store info`, `verify`, `merge`, `export`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctfm.cli.console import err, out, print_table, progress_bar, waiting
from ctfm.cli.extract import adapter_line
from ctfm.cli.options import (
    AllowDownload,
    Device,
    TrustRemoteCode,
    Workers,
    device_name,
    worker_count,
)
from ctfm.cli.outcome import print_failures
from ctfm.cli.signals import KEPT, if_interrupted

if TYPE_CHECKING:
    from ctfm.extract.repair import Repaired
    from ctfm.store.verify import VerifyReport

Store = Annotated[str, typer.Argument(help="Feature store, folder or URL.")]

LISTED_SCANS = 20
"""Damaged scans that are named one a line; --json names them all."""


def info(store: Store) -> None:
    """Print what a store holds: rows, bytes, scans by status, settings, fingerprint."""
    from ctfm.store.features import FeatureStore

    features = FeatureStore.open(store)
    print_table(store, ["what", "value"], features.info().items())
    settings = [[name, str(value)] for name, value in sorted(features.settings.items())]
    print_table("settings", ["name", "value"], settings)
    if (weights := features.weights) is not None:
        if weights["hub_id"] is not None:
            out.print(f"weights from {weights['hub_id']} at commit {weights['commit']}")
        for remark in weights.get("remarks", ()):
            out.print(f"weights: {remark}")
    if (adapter := features.adapter) is not None:
        out.print(f"LoRA adapter: {adapter_line(adapter['max_relative_error'])}")
    print_failures(features)


def verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write anew what can be, extract again what is lost.")
    ] = False,
    scans: Annotated[Path, typer.Option(help="To repair: the catalogue.")] = Path("scans.parquet"),
    weights: Annotated[
        Path | None, typer.Option(help="To repair: weights, if not in the hub cache.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="To repair: the LoRA adapter.")] = None,
    template: Annotated[Path | None, typer.Option(help="To repair: the template.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_download: AllowDownload = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="To repair: as before.")] = None,
    workers: Workers = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Read every byte again and compare it with the digests written at extraction.

    To --repair, give the options of the extraction: lost rows have to come out as they were.
    Exit code 1 as long as something is damaged or has to be extracted again.
    """
    from ctfm.store.places import place_of
    from ctfm.store.verify import verify_store

    with waiting("verifying"):
        report = verify_store(place_of(store))
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print_report(report)
    if report.ok:
        return
    if not repair:
        raise typer.Exit(1)

    from ctfm.extract.options import Options
    from ctfm.extract.repair import Source, repair_store

    source = Source(
        scans=scans,
        weights=weights,
        adapter=adapter,
        template=template,
        trust_remote_code=trust_remote_code,
        download=allow_download,
        options=Options(
            device=device_name(device), batch_size=batch_size, workers=worker_count(workers)
        ),
    )
    with waiting("repairing"):
        repaired = repair_store(store, report, source)
    print_repaired(repaired, store)
    if repaired.left or repaired.shards:
        raise typer.Exit(1)


def print_report(report: "VerifyReport") -> None:
    """What is whole, or what is damaged and the scans that it concerns."""
    if report.ok:
        whole = report.scans - report.pending - report.failed
        out.print(
            f"every byte of {whole} scans is as it was written ({report.failed} failed, "
            f"{report.pending} pending)"
        )
        if report.pending:
            out.print("unfinished: the command that was to fill it goes on, if you run it again")
        return
    rows = [
        [problem.where, problem.what, len(problem.scan_ids), "yes" if problem.rows_lost else "no"]
        for problem in report.problems
    ]
    print_table("damaged", ["file", "what", "scans", "rows lost"], rows)
    concerned = report.damaged_scans
    print_table("", ["scans concerned"], [[scan] for scan in concerned[:LISTED_SCANS]])
    if len(concerned) > LISTED_SCANS:
        out.print(f"and {len(concerned) - LISTED_SCANS} more: --json names all")


def print_repaired(repaired: "Repaired", store: str) -> None:
    """What was mended, and what is left to do."""
    from ctfm.store.features import FeatureStore

    for name in repaired.rebuilt:
        err.print(f"written anew from the rest of the store: {name}", soft_wrap=True)
    if repaired.restored:
        err.print(f"extracted again, to the bytes of before: {len(repaired.restored)} scans")
    for sentence in repaired.left:
        err.print(f"not mended: {sentence}", soft_wrap=True)
    if repaired.shards:
        model = FeatureStore.open(store).settings.get("backbone", "MODEL")
        err.print(
            f"{repaired.shards} shards are pending again. Extract them with the options of before: "
            f"ctfm extract --model {model} --out {store}",
            soft_wrap=True,
        )


def merge(
    stores: Annotated[list[str], typer.Argument(help="Feature stores, folders or URLs.")],
    out_dir: Annotated[str, typer.Option("--out", help="The store to make or extend.")],
    compress: Annotated[
        bool, typer.Option("--compress", help="zstd: 10% smaller, half the read speed.")
    ] = False,
) -> None:
    """Copy the scans of stores with the same settings into one, every row checked on the way.

    Run again after an interruption, it does what is left.
    """
    from ctfm.store.merge import merge_stores

    with if_interrupted(KEPT), progress_bar("merge", "scans") as bar:
        merged = merge_stores(stores, out_dir, compress=compress, progress=bar.advance)
    scans = ", ".join(f"{n} {status}" for status, n in merged.info()["scans"].items())
    out.print(f"{out_dir}: {scans}")


def export(
    store: Store,
    out_path: Annotated[Path, typer.Option("--out", help="File or folder to write.")],
    to: Annotated[
        str, typer.Option("--format", help="parquet, npy, h5, hf-dataset; the last two are extras.")
    ] = "parquet",
) -> None:
    """Write the embeddings of every scan in a format that other tools read."""
    from ctfm.store.export import export_store
    from ctfm.store.features import FeatureStore

    features = FeatureStore.open(store)
    with progress_bar(f"export {to}", "scans") as bar:
        bar.start(features.finished_scans().num_rows)
        n_rows = export_store(features, out_path, to=to, progress=bar.advance)
    out.print(f"{n_rows:,} rows: {out_path}")
