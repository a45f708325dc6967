"""Commands on scans: `phantom` makes a synthetic cohort, `index` finds and describes scans."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctfm.cli.console import err, out, print_table, progress_bar
from ctfm.cli.options import Workers, worker_count
from ctfm.cli.signals import if_interrupted
from ctfm.store.errors import ConfigError

if TYPE_CHECKING:
    from ctfm.store.catalogue import Catalogue


def phantom(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write; must be empty.")],
    scans: Annotated[int, typer.Option(min=1, help="Number of studies.")] = 100,
    seed: Annotated[int, typer.Option(help="Same seed, same cohort.")] = 0,
    matrix: Annotated[int, typer.Option(min=32, help="Rows and columns of a slice.")] = 512,
    slices: Annotated[
        int | None, typer.Option(min=1, help="Slices a scan; default: as scanners do.")
    ] = None,
    prevalence_floor: Annotated[
        float, typer.Option(min=0, max=1, help="Raise rarer findings to this prevalence.")
    ] = 0.0,
    workers: Workers = None,
) -> None:
    """Make a synthetic head CT cohort: DICOM series, labels, and where each finding lies."""
    from ctfm.extract.phantom_cohort import write_cohort

    left = f"what was made stays in {out_dir}: remove it, and run the same command again"
    with if_interrupted(left), progress_bar("phantom", "scans") as bar:
        bar.start(scans)
        write_cohort(
            out_dir,
            scans=scans,
            seed=seed,
            matrix=matrix,
            slices=slices,
            prevalence_floor=prevalence_floor,
            workers=max(1, worker_count(workers)),
            progress=lambda done: bar.advance(),
        )
    out.print(f"{scans} studies in {out_dir}, labels in {out_dir / 'labels.parquet'}")


def index(
    paths: Annotated[list[Path], typer.Argument(help="Folders, files, or .zip archives.")],
    out_path: Annotated[Path, typer.Option("--out", help="Catalogue to write.")] = Path(
        "scans.parquet"
    ),
    keep_ids: Annotated[
        bool, typer.Option("--keep-ids", help="Write original ids in place of pseudonyms.")
    ] = False,
    workers: Workers = None,
) -> None:
    """Find scans, read their headers, and choose one axial reconstruction of each study."""
    from ctfm.extract.index import index as index_scans
    from ctfm.store.catalogue import check_key, key_for, private_path, read_former

    left = f"nothing was kept, and {out_path} is as it was: run the same command again"
    with if_interrupted(left), progress_bar("index", "files") as bar:
        catalogue = index_scans(
            paths,
            key=None if keep_ids else key_for(out_path),
            before=read_former(out_path),
            workers=max(1, worker_count(workers)),
            progress=bar.set,
        )
    if not catalogue.scans.num_rows:
        raise ConfigError(
            f"no file that may be a scan lies under {', '.join(map(str, paths))} "
            f"({sum(catalogue.ignored.values())} others do): is the disk mounted? Nothing was "
            f"written: {out_path} is as it was"
        )
    out_path.parent.mkdir(parents=True, exist_ok=True)
    check_key(out_path, catalogue.key)
    catalogue.write(out_path)
    print_catalogue(catalogue)
    out.print(f"{out_path}; paths and key are in {private_path(out_path).name}, which stays here")
    if not any(catalogue.scans["usable"].to_pylist()):
        err.print("no scan is usable: the columns `reason` and `detail` say why", style="yellow")
        raise typer.Exit(3)


def print_catalogue(catalogue: "Catalogue") -> None:
    """Scans by reason, with an example of why, and how many files were no scans."""
    lines = catalogue.scans.select(["reason", "detail"]).to_pylist()
    counts = Counter(line["reason"] for line in lines)
    why = {line["reason"]: line["detail"] for line in reversed(lines)}
    rows = [[reason, n, why[reason]] for reason, n in counts.most_common()]
    print_table("scans", ["reason", "scans", "for example"], rows)
    if catalogue.studies_without_patient:
        out.print(
            f"{catalogue.studies_without_patient} studies tell no patient, so each counts as one: "
            "if some are of one patient, say so in a patient_id column of the labels"
        )
    if catalogue.ignored:
        kinds = ", ".join(f"{n} {kind}" for kind, n in catalogue.ignored.items())
        out.print(f"files passed over: {kinds}")
