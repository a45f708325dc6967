"""Commands on feature stores: `extract`, `models`, `store info`, `store verify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctfm.cli.console import err, out, print_table, progress_bar
from ctfm.cli.options import Device, Workers, device_name, worker_count
from ctfm.extract.config import PAPER_WINDOWS_HU, ExtractConfig
from ctfm.store.reasons import Reason

if TYPE_CHECKING:
    from ctfm.extract.backbones import Listed
    from ctfm.store.features import FeatureStore

Store = Annotated[Path, typer.Argument(help="Folder of a feature store.")]


def extract(
    model: Annotated[str, typer.Option(help="Backbone, as `ctfm models` lists it.")],
    scans: Annotated[Path, typer.Option(help="Catalogue from `ctfm index`.")] = Path(
        "scans.parquet"
    ),
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Feature store; default: features/MODEL.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Local file or folder, in place of the hub.", exists=True)
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(
            help="paper, native (the backbone's own), or LOW:HIGH,… in HU. "
            "Default: native of a volume backbone, else paper."
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Embeddings to keep, e.g. cls,mean.")] = "cls",
    align: Annotated[
        str, typer.Option(help="head: to the head frame; none: the scanner's axes.")
    ] = ExtractConfig.align,
    template: Annotated[
        Path | None, typer.Option(help="Register to this volume instead.", exists=True)
    ] = None,
    views: Annotated[
        int, typer.Option(min=1, help="1 is the clean scan; more adds augmented copies.")
    ] = ExtractConfig.views,
    seed: Annotated[int, typer.Option(help="Of the augmentation.")] = ExtractConfig.seed,
    dtype: Annotated[
        str, typer.Option(help="Of the store: float16, bfloat16, float32.")
    ] = ExtractConfig.dtype,
    precision: Annotated[
        str, typer.Option(help="Of the backbone: float32, bfloat16.")
    ] = ExtractConfig.precision,
    batch_size: Annotated[int, typer.Option(min=1, help="Slices a forward pass.")] = 64,
    workers: Workers = None,
    device: Device = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="zstd: 10% smaller, half the read speed.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed before.")
    ] = False,
) -> None:
    """Embed every slice of every usable scan, once. Run again to go on after an interruption.

    Exit code 0: every scan is in the store. 3: some failed; the table says which and why.
    """
    from ctfm.extract.backbone import default_settings
    from ctfm.extract.backbones import get_backbone
    from ctfm.extract.pipeline import extract as extract_scans
    from ctfm.extract.reading import read_template
    from ctfm.store.catalogue import read_catalogue

    catalogue = read_catalogue(scans)
    token_names = tuple(tokens.split(","))
    backbone = get_backbone(model, weights, tokens=token_names)
    volume, digest = read_template(template) if template is not None else (None, None)
    said: dict[str, Any] = {
        "backbone": model,
        "tokens": token_names,
        "align": align,
        "template": digest,
        "views": views,
        "seed": seed,
        "dtype": dtype,
        "precision": precision,
    }
    if windows is not None:
        said["windows_hu"] = parse_windows(windows, backbone.entry.native_windows_hu)
    config = ExtractConfig(**(default_settings(backbone.entry) | said))
    target = out_dir or Path("features") / model.replace(":", "-").replace("/", "-")
    with progress_bar(f"extract {model}", "scans") as bar:
        done = extract_scans(
            catalogue,
            target,
            backbone,
            config=config,
            device=device_name(device),
            batch_size=batch_size,
            workers=worker_count(workers),
            template=volume,
            compress=compress,
            retry_failed=retry_failed,
            planned=bar.start,
            progress=lambda reason: bar.advance(failed=reason is not Reason.OK),
        )
    out.print(f"{done.n_scans} scans in {done.seconds:.0f} s: {target}")
    if print_failures(done.store):
        raise typer.Exit(3)


def parse_windows(
    text: str, native_hu: tuple[tuple[float, float], ...] | None
) -> tuple[tuple[float, float], ...]:
    """`paper`, `native` or `LOW:HIGH,…` as (low, high) a channel, in HU."""
    if text == "paper":
        return PAPER_WINDOWS_HU
    if text == "native":
        if native_hu is None:
            raise typer.BadParameter("this backbone has no CT windows of its own; say LOW:HIGH,…")
        return native_hu
    try:
        pairs = [window.split(":") for window in text.split(",")]
        return tuple((float(low), float(high)) for low, high in pairs)
    except ValueError:
        expected = "paper, native or LOW:HIGH,LOW:HIGH,… such as 0:80,-20:180,-800:2000"
        raise typer.BadParameter(f"windows must be {expected}; got {text!r}") from None


def print_failures(store: "FeatureStore") -> int:
    """Print what failed and why, by reason with an example; the number of failed scans."""
    lines = store.scans.select(["scan_id", "status", "reason", "detail"]).to_pylist()
    by_reason: dict[str, dict[str, str]] = {}
    for line in lines:
        if line["status"] == "failed":
            by_reason.setdefault(line["reason"], {})[line["scan_id"]] = line["detail"]
    if by_reason:
        rows = [
            [reason, len(failed), *next(iter(failed.items()))]
            for reason, failed in sorted(by_reason.items())
        ]
        print_table("failed", ["reason", "scans", "for example", "why"], rows)
    return sum(map(len, by_reason.values()))


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
