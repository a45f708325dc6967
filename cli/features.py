"""Commands on feature stores: `store info`, `store verify`."""

from pathlib import Path
from typing import Annotated

import typer

from ctfm.cli.console import out, print_table, waiting
from ctfm.cli.extract import adapter_line, print_failures

Store = Annotated[Path, typer.Argument(help="Folder of a feature store.")]


def info(store: Store) -> None:
    """Print what a store holds: rows, bytes, scans by status, settings, fingerprint."""
    from ctfm.store.features import FeatureStore

    features = FeatureStore.open(store)
    print_table(str(store), ["what", "value"], features.info().items())
    settings = [[name, str(value)] for name, value in sorted(features.settings.items())]
    print_table("settings", ["name", "value"], settings)
    if (weights := features.weights) is not None:
        out.print(f"weights from {weights['hub_id']} at commit {weights['commit']}")
    if (adapter := features.adapter) is not None:
        out.print(f"LoRA adapter: {adapter_line(adapter['max_relative_error'])}")
    print_failures(features)


def verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take back what is damaged, to be extracted again.")
    ] = False,
) -> None:
    """Read every byte again and compare it with the digests written at extraction."""
    from ctfm.store.features import FeatureStore

    features = FeatureStore.open(store)
    with waiting("verifying"):
        report = features.verify()
    if report.ok:
        failed = features.scans["status"].to_pylist().count("failed")
        whole = report.scans - report.pending - failed
        out.print(
            f"every row of {whole} scans is as it was written ({failed} failed, {report.pending} "
            "pending)"
        )
        return
    rows = [[problem.where, problem.what, len(problem.scan_ids)] for problem in report.problems]
    print_table("damaged", ["file", "what", "scans"], rows)
    print_table("", ["damaged scans"], [[scan] for scan in report.damaged_scans])
    if repair:
        shards = features.take_back(report.damaged_scans)
        model = features.settings.get("backbone", "MODEL")
        out.print(
            f"{shards} shards are pending again. Extract them with the options of before: "
            f"ctfm extract --model {model} --out {store}"
        )
    raise typer.Exit(1)
