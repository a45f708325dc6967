"""Commands on feature stores and backbones: `models`, `store info`, `store verify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctfm.cli.console import err, out, print_table
from ctfm.cli.extract import print_failures

if TYPE_CHECKING:
    from ctfm.extract.backbones import Listed

Store = Annotated[Path, typer.Argument(help="Folder of a feature store.")]


def models() -> None:
    """List the backbones: what they need, and whether their weights are here."""
    from ctfm.extract.backbones import list_backbones

    rows = [
        [
            listed.entry.name,
            " ".join(f"{token}:{dim}" for token, dim in listed.entry.tokens.items()),
            f"{listed.entry.parameters / 1e6:.1f} M",
            _access(listed),
            listed.weights,
            listed.entry.licence,
        ]
        for listed in list_backbones()
    ]
    header = ["model", "token:d", "parameters", "access", "weights", "licence"]
    print_table("backbones", header, rows)
    out.print("and timm:<name>, hf:<repository>; --weights takes a local file or folder")


def _access(listed: "Listed") -> str:
    if listed.weights == "not published":
        return "your own"
    return "gated" if listed.entry.gated else "open"


def info(store: Store) -> None:
    """Print what a store holds: rows, bytes, scans by status, settings, fingerprint."""
    from ctfm.store.features import FeatureStore

    features = FeatureStore.open(store)
    print_table(str(store), ["what", "value"], features.info().items())
    settings = [[name, str(value)] for name, value in sorted(features.settings.items())]
    print_table("settings", ["name", "value"], settings)
    print_failures(features)


def verify(store: Store) -> None:
    """Read every byte again and compare it with the digests written at extraction."""
    from ctfm.store.features import FeatureStore

    with err.status("verifying"):
        report = FeatureStore.open(store).verify()
    if report.ok:
        out.print(f"every row of {report.scans - report.pending} scans is as it was written")
        return
    rows = [[problem.where, problem.what, len(problem.scan_ids)] for problem in report.problems]
    print_table("damaged", ["file", "what", "scans"], rows)
    print_table("", ["damaged scans"], [[scan] for scan in report.damaged_scans])
    raise typer.Exit(1)
