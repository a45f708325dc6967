"""`ctfm demo`: the whole path on a synthetic cohort, and a one-page report.

The commands one after another, with the settings that a small cohort needs. It is here since only
`cli` knows both stages.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctfm.cli.console import out, progress_bar
from ctfm.cli.fit import print_fit
from ctfm.cli.options import Workers, typed_command, worker_count
from ctfm.cli.outcome import print_failures
from ctfm.cli.runs import print_enrichment, print_evaluation
from ctfm.cli.scans import print_catalogue
from ctfm.cli.signals import KEPT, if_interrupted
from ctfm.heads.config import FitConfig
from ctfm.store.errors import ConfigError
from ctfm.store.reasons import Reason

if TYPE_CHECKING:
    from ctfm.heads.runs import Run
    from ctfm.store.catalogue import Catalogue
    from ctfm.store.features import FeatureStore

PREVALENCE_FLOOR = 0.1
"""So that every finding has at least five positives in the test split."""
SPLIT = (0.6, 0.15, 0.25)
"""A larger test split than the paper's: the cohort is small."""
FEWEST_SCANS = 250
"""With 220, three of 600 seeds had no finding with enough validation scans to choose an epoch by;
with 240, none."""


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for all of it.")] = Path(
        "ctfm-demo"
    ),
    scans: Annotated[int, typer.Option(min=FEWEST_SCANS, help="Phantom studies.")] = 400,
    matrix: Annotated[int, typer.Option(min=64, help="Rows and columns of a slice.")] = 128,
    experts: Annotated[int, typer.Option(min=0, help="K.")] = FitConfig.experts,
    seed: Annotated[int, typer.Option(help="Of the cohort and of the fit.")] = FitConfig.seed,
    workers: Workers = None,
) -> None:
    """Run the whole path on phantoms: index, extract, fit, evaluate, report.

    Started again in the same folder, it goes on where it was.
    """
    start_s = time.monotonic()
    processes = max(1, worker_count(workers))
    claim(out_dir, {"scans": scans, "matrix": matrix, "seed": seed})
    with if_interrupted(KEPT):
        report = walk(
            out_dir, scans=scans, matrix=matrix, experts=experts, seed=seed, workers=processes
        )
    out.print(f"\nthe whole path took {time.monotonic() - start_s:.0f} s")
    out.print(f"report: {report}")


def walk(out_dir: Path, *, scans: int, matrix: int, experts: int, seed: int, workers: int) -> Path:
    """Make what is not there yet, from the cohort to the report; where that is."""
    cohort = make_cohort(out_dir / "cohort", scans=scans, matrix=matrix, seed=seed, workers=workers)
    catalogue = make_catalogue(cohort, out_dir / "scans.parquet", workers=workers)
    store = make_features(catalogue, out_dir / "features" / "intensity", workers=workers)
    labels = cohort / "labels.parquet"
    run = make_run(store, labels, out_dir / "runs" / "intensity", experts=experts, seed=seed)
    return make_report(run, cohort / "lesions.parquet", out_dir / "report.html")


def claim(folder: Path, cohort: Mapping[str, int]) -> None:
    """Write down which cohort a folder is for, or check that it is for this one.

    Raises:
        ConfigError: If it is for another.
    """
    from ctfm.store.files import publish_bytes, writing

    record = folder / "demo.json"
    if not record.exists():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        publish_bytes(record, json.dumps(dict(cohort)).encode())
    made = json.loads(record.read_bytes())
    if made != cohort:
        asked, there = (", ".join(f"{k} {v}" for k, v in c.items()) for c in (cohort, made))
        raise ConfigError(
            f"{folder} is a demo of {there}, not of {asked}: choose another --out, or remove it"
        )


def make_cohort(folder: Path, *, scans: int, matrix: int, seed: int, workers: int) -> Path:
    """Write the phantoms that are not there."""
    from ctfm.extract.phantom_cohort import write_cohort

    if (folder / "labels.parquet").exists():
        out.print(f"phantom: {folder} is there already")
        return folder
    with progress_bar("phantom", "scans") as bar:
        bar.start(scans)
        write_cohort(
            folder,
            scans=scans,
            seed=seed,
            matrix=matrix,
            prevalence_floor=PREVALENCE_FLOOR,
            resume=True,
            workers=workers,
            progress=lambda done: bar.advance(),
        )
    return folder


def make_catalogue(cohort: Path, path: Path, *, workers: int) -> "Catalogue":
    """Index the phantoms; their ids are no secret, and kept."""
    from ctfm.extract.index import index

    with progress_bar("index", "files") as bar:
        catalogue = index([cohort], key=None, workers=workers, progress=bar.set)
    catalogue.write(path)
    print_catalogue(catalogue)
    return catalogue


def make_features(catalogue: "Catalogue", folder: Path, *, workers: int) -> "FeatureStore":
    """Embed them with the embedded backbone."""
    from ctfm.extract.backbones import get_backbone
    from ctfm.extract.config import ExtractConfig
    from ctfm.extract.options import Options
    from ctfm.extract.pipeline import Progress, extract

    with progress_bar("extract intensity", "scans") as bar:
        done = extract(
            catalogue,
            folder,
            get_backbone("intensity"),
            config=ExtractConfig(backbone="intensity"),
            options=Options(workers=workers),
            progress=Progress(
                planned=bar.start,
                done=lambda reason: bar.advance(failed=reason is not Reason.OK),
            ),
        )
    print_failures(done.store)
    return done.store


def make_run(
    store: "FeatureStore", labels: Path, folder: Path, *, experts: int, seed: int
) -> "Run":
    """Fit a head; steps are many and small, since the cohort is."""
    from ctfm.heads.fit import fit_head

    config = FitConfig(experts=experts, batch_size=16, split_fractions=SPLIT, seed=seed)
    with progress_bar("fit", "epochs") as bar:
        run = fit_head(
            store,
            labels,
            config,
            out=folder,
            command=typed_command(),
            overwrite=True,
            progress=lambda epoch: bar.advance(
                note=f"validation macro AUC {epoch.validation_macro_auc:.3f}"
            ),
        )
    print_fit(run)
    return run


def make_report(run: "Run", lesions: Path, path: Path) -> Path:
    """Evaluate, print, and write the page."""
    from ctfm.heads.enrichment import enrichment_of_run, read_lesions
    from ctfm.heads.report import report_run

    places = read_lesions(lesions)
    print_evaluation(report_run(run, path, lesions=places))
    print_enrichment(enrichment_of_run(run, places))
    return path
