"""`ctfm extract`: from a catalogue of scans to feature stores, on one device or many."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctfm.cli.console import err, out, print_table, progress_bar, waiting
from ctfm.cli.options import (
    Device,
    Threads,
    TrustRemoteCode,
    Workers,
    device_name,
    device_of_a_worker,
    refuse_threads,
    use_threads,
    worker_count,
)
from ctfm.cli.outcome import print_outcome
from ctfm.cli.signals import KEPT, if_interrupted
from ctfm.cli.tally import duration
from ctfm.extract.config import (
    PAPER_WINDOWS_HU,
    Alignment,
    ExtractConfig,
    Precision,
    StoredType,
)
from ctfm.store.reasons import Reason

if TYPE_CHECKING:
    from ctfm.cli.console import Bar
    from ctfm.extract.backbone import BackboneEntry
    from ctfm.extract.options import Options
    from ctfm.extract.pipeline import Progress
    from ctfm.extract.targets import TargetSpec
    from ctfm.store.catalogue import Catalogue
    from ctfm.store.features import FeatureStore

FEATURES = Path("features")


def extract(
    model: Annotated[
        list[str],
        typer.Option(
            help="Backbone, as `ctfm models` lists it, or a program's path; several: one pass."
        ),
    ],
    scans: Annotated[Path, typer.Option(help="Catalogue from `ctfm index`.")] = Path(
        "scans.parquet"
    ),
    out_dir: Annotated[
        str | None, typer.Option("--out", help="Feature store, folder or URL; features/MODEL.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Local file or folder, in place of the hub.", exists=True)
    ] = None,
    weights_key: Annotated[
        str | None,
        typer.Option(help="Part of --weights that is meant, such as model_ema, if there are more."),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="LoRA adapter (PEFT folder) to merge; several: one pass.", exists=True),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    windows: Annotated[
        str | None,
        typer.Option(help="paper, native (the backbone's own), or LOW:HIGH,… in HU."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Embeddings to keep, e.g. cls,mean; default: the first.")
    ] = None,
    align: Annotated[
        Alignment, typer.Option(help="head: to the head frame; none: the scanner's axes.")
    ] = ExtractConfig.align,
    template: Annotated[
        Path | None, typer.Option(help="Register to this volume instead.", exists=True)
    ] = None,
    views: Annotated[
        int, typer.Option(min=1, help="1 is the clean scan; more adds augmented copies.")
    ] = ExtractConfig.views,
    seed: Annotated[int, typer.Option(help="Of the augmentation.")] = ExtractConfig.seed,
    dtype: Annotated[StoredType, typer.Option(help="Of the store.")] = ExtractConfig.dtype,
    precision: Annotated[
        Precision, typer.Option(help="Of the backbone.")
    ] = ExtractConfig.precision,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Slices a forward pass; default: the backbone's, on a CPU ≤ 16."),
    ] = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="zstd: 10% smaller, half the read speed.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed before.")
    ] = False,
    write_off_unlisted: Annotated[
        bool,
        typer.Option(
            "--write-off-unlisted",
            help="Pending scans of the store that the catalogue does not list have vanished.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take; write nothing.")
    ] = False,
    task: Annotated[
        str, typer.Option(help="i/n: this task's share of the shards, i from 0 to n - 1.")
    ] = "0/1",
    scheduler: Annotated[
        str | None, typer.Option(help="Address or file of a Dask scheduler to run on.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Start one: local, local-cuda, or slurm.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Workers of a cluster that is started.")] = 1,
) -> None:
    """Embed every slice of every usable scan, once. Run again to go on after an interruption.

    Exit code 0: every scan of the catalogue (and of the task) is in the store. 3: some failed, are
    out of date or could not be done, and it says which and why; or a dry run could try none.
    """
    from ctfm.extract.options import Options
    from ctfm.extract.reading import read_template
    from ctfm.store.catalogue import read_catalogue

    on_cluster = scheduler is not None or cluster is not None
    if on_cluster and task != "0/1":
        raise typer.BadParameter("--task is for jobs without a scheduler: leave one of them out")
    elsewhere = on_cluster and not dry_run  # a dry run tries its scans on this machine
    if elsewhere:
        refuse_threads(threads, "a cluster")
    else:
        use_threads(threads)
    catalogue = read_catalogue(scans)
    options = Options(
        device=(device_of_a_worker(device) or "auto") if elsewhere else device_name(device),
        batch_size=batch_size,
        workers=worker_count(workers),
        compress=compress,
        task=parse_task(task),
        write_off_unlisted=write_off_unlisted,
    )
    settings = {
        "align": align,
        "template": None if template is None else read_template(template)[1],
        "views": views,
        "seed": seed,
        "dtype": dtype,
        "precision": precision,
    }
    specs = make_specs(
        model,
        settings,
        adapters=adapter or [None],
        weights=weights,
        weights_key=weights_key,
        trust_remote_code=trust_remote_code,
        windows=windows,
        tokens=tokens,
        out_dir=out_dir,
    )
    if dry_run:
        forecast = print_estimates(
            catalogue, specs, options=options, template=template, retry_failed=retry_failed
        )
        if not forecast:
            raise typer.Exit(3)
        return
    run = _Run(catalogue, specs, options, template, retry_failed)
    with if_interrupted(KEPT):
        stores = run.on_cluster(scheduler, cluster, jobs) if on_cluster else run.here()
    if not all([print_outcome(store, catalogue, options) for store in stores]):
        raise typer.Exit(3)


def make_specs(
    models: Sequence[str],
    settings: Mapping[str, Any],
    *,
    adapters: Sequence[Path | None],
    weights: Path | None,
    weights_key: str | None = None,
    trust_remote_code: bool,
    windows: str | None,
    tokens: str | None,
    out_dir: str | None,
) -> "list[TargetSpec]":
    """What each model is to do, and where it writes; what the user left open is the backbone's."""
    from ctfm.extract.backbone import default_settings
    from ctfm.extract.backbones import get_entry, split_path
    from ctfm.extract.targets import TargetSpec, default_store

    if len(models) > 1 and (weights is not None or adapters != [None]):
        raise typer.BadParameter("--weights and --adapter belong to one --model, got several")
    if weights_key is not None and weights is None:
        raise typer.BadParameter("--weights-key says which part of --weights is meant: give both")
    if len(models) * len(adapters) > 1 and out_dir is not None:
        raise typer.BadParameter("--out is the place of one store, and several are asked for")
    specs = []
    for model, adapter in product(models, adapters):
        name, place = split_path(model)
        place = weights or place
        entry = get_entry(name, place, trust_remote_code=trust_remote_code, download=True)
        config = {**ExtractConfig(backbone=name).as_dict(), **default_settings(entry), **settings}
        config["tokens"] = tokens.split(",") if tokens else [next(iter(entry.tokens))]
        if windows is not None:
            config["windows_hu"] = parse_windows(windows, entry)
        specs.append(
            TargetSpec(
                config=ExtractConfig.from_dict(config),
                store=out_dir or str(default_store(FEATURES, name, adapter)),
                weights=None if place is None else str(place),
                weights_key=weights_key,
                adapter=None if adapter is None else str(adapter),
                trust_remote_code=trust_remote_code,
            )
        )
    return specs


def parse_windows(text: str, entry: "BackboneEntry") -> tuple[tuple[float, float], ...]:
    """`paper`, `native` or `LOW:HIGH,…` as (low, high) a channel, in HU."""
    if text == "paper":
        return PAPER_WINDOWS_HU
    if text == "native":
        if entry.native_windows_hu is None:
            raise typer.BadParameter(f"{entry.name} has no CT windows of its own; say LOW:HIGH,…")
        return entry.native_windows_hu
    try:
        pairs = [window.split(":") for window in text.split(",")]
        return tuple((float(low), float(high)) for low, high in pairs)
    except ValueError:
        expected = "paper, native or LOW:HIGH,LOW:HIGH,… such as 0:80,-20:180,-800:2000"
        raise typer.BadParameter(f"windows must be {expected}; got {text!r}") from None


def parse_task(text: str) -> tuple[int, int]:
    """`i/n` as two numbers."""
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise typer.BadParameter(f"task must be i/n such as 0/8, got {text!r}") from None
    return number, count


def print_estimates(
    catalogue: "Catalogue",
    specs: "Sequence[TargetSpec]",
    *,
    options: "Options",
    template: Path | None,
    retry_failed: bool,
) -> bool:
    """Print what each store would take; whether there is a forecast for all."""
    from ctfm.extract.estimate import estimate
    from ctfm.extract.reading import read_template

    volume = None if template is None else read_template(template)[0]
    out.print("nothing was written; this is what it would take")
    forecast = True
    for spec in specs:
        with waiting(f"trying {spec.config.backbone} on a few scans"):
            found = estimate(
                catalogue,
                spec.load(),
                options=options,
                template=volume,
                retry_failed=retry_failed,
            )
        for error in found.failed:
            err.print(f"a scan of the probe could not be used: {error}")
        takes = {
            "scans left": found.scans,
            "rows at most": found.rows,
            "disk": f"{found.disk_bytes / 1e9:.2f} GB",
        }
        if math.isnan(found.seconds):
            forecast = False
            err.print(f"no forecast: none of the {found.tried} scans that were tried can be used")
        else:
            takes |= {
                "read a scan": f"{found.read_s:.2f} s",
                "embed a scan": f"{found.embed_s:.2f} s",
                "about": duration(found.seconds),
            }
        out.print(f"\n{spec.store}")  # no column: a long path would leave none for the figures
        print_table("", ["what", "value"], takes.items())
    return forecast


@dataclass(frozen=True)
class _Run:
    """An extraction as it was asked for."""

    catalogue: "Catalogue"
    specs: "Sequence[TargetSpec]"
    options: "Options"
    template: Path | None
    retry_failed: bool

    def here(self) -> "list[FeatureStore]":
        """Run it in this process and its readers."""
        from ctfm.extract.pipeline import extract_all
        from ctfm.extract.reading import read_template

        targets = [spec.load() for spec in self.specs]
        for target in targets:
            print_remarks(target.store, target.backbone.remarks)
            if (merged := target.backbone.adapter) is not None:
                err.print(f"{target.store}: {adapter_line(merged.max_relative_error)}")
        with progress_bar(_title(self.specs), "scans") as bar:
            done = extract_all(
                self.catalogue,
                targets,
                options=self.options,
                template=None if self.template is None else read_template(self.template)[0],
                retry_failed=self.retry_failed,
                progress=_progress(bar),
            )
        for one, target in zip(done, targets, strict=True):
            if one.batch_size < one.first_batch_size:
                err.print(
                    f"the device ran out of memory: batches of {one.batch_size}, not "
                    f"{one.first_batch_size}; last bits depend on where, unless --batch-size is "
                    f"{one.batch_size} from the start"
                )
            out.print(f"{one.n_scans} scans in {one.seconds:.0f} s: {target.store}")
        return [one.store for one in done]

    def on_cluster(
        self, scheduler: str | None, cluster: str | None, jobs: int
    ) -> "list[FeatureStore]":
        """Run it on the workers of a Dask cluster."""
        from ctfm.extract.cluster import connect, extract_on_cluster

        with (
            connect(scheduler=scheduler, cluster=cluster, workers=jobs) as client,
            progress_bar(_title(self.specs), "scans") as bar,
        ):
            stores = extract_on_cluster(
                self.catalogue,
                self.specs,
                client=client,
                options=self.options,
                template=self.template,
                retry_failed=self.retry_failed,
                progress=_progress(bar),
            )
        for spec, store in zip(self.specs, stores, strict=True):
            print_remarks(spec.store, (store.weights or {}).get("remarks", ()))
            if (merged := store.adapter) is not None:
                err.print(f"{spec.store}: {adapter_line(merged['max_relative_error'])}")
            out.print(f"done: {spec.store}")
        return stores


def print_remarks(store: Path | str, remarks: Sequence[str]) -> None:
    """What of the weights or the adapter was cut off, left out or chosen."""
    for remark in remarks:
        err.print(f"{store}: weights: {remark}")


def adapter_line(max_relative_error: float) -> str:
    """What the check of a merged adapter found."""
    return (
        f"merged and unmerged tokens differ by {max_relative_error:.1e} at most, relative to the "
        "largest"
    )


def _title(specs: "Sequence[TargetSpec]") -> str:
    return f"extract {', '.join(spec.config.backbone for spec in specs)}"


def _progress(bar: "Bar") -> "Progress":
    from ctfm.extract.pipeline import Progress

    return Progress(
        planned=bar.start, done=lambda reason: bar.advance(failed=reason is not Reason.OK)
    )
