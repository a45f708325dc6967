"""Claim: a MoLRE head is fitted on a cohort of the paper's size in minutes, linearly in scans.

58,251 scans of train and 7,291 of validation, 40 slices each, d = 1024, 75 findings with
prevalences between those of the paper's rarest and commonest; embeddings are those of
`synthetic.py`, in a store on disk. `fit_head` runs as it is, 20 epochs with validation after each,
and its own record says how long each took. What it takes to read the store, to predict every scan
at the end and to write the run is in the whole.

`--only bfloat16`, `--only float32` and `--only linear` run one part; `linear` fits two epochs on
cohorts of 1,000 and 10,000 scans, whose time a scan is compared with that of the whole cohort.
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from measure import main_with_out
from synthetic import CohortConfig, SyntheticCohort, prevalences

from ctfm.heads.config import FitConfig, Precision
from ctfm.heads.fit import fit_head
from ctfm.heads.runs import Run

TRAIN, VALIDATION, SLICES, DIM, FINDINGS, EPOCHS, BATCH = 58251, 7291, 40, 1024, 75, 20, 256
RAREST, COMMONEST = 0.00079, 0.296
SMALL, SMALL_EPOCHS = (1000, 10000), 3
PARTS: tuple[Precision, ...] = ("bfloat16", "float32")


def fit(train: int, *, epochs: int, precision: Precision) -> dict[str, Any]:
    """Fit a head on a cohort of this size; seconds of the whole and of each epoch."""
    config = FitConfig(
        precision=precision, batch_size=BATCH, min_epochs=epochs, max_epochs=epochs, min_positives=2
    )
    cohort = SyntheticCohort(
        CohortConfig(
            train=train,
            validation=max(100, VALIDATION * train // TRAIN),
            test=0,
            prevalences=prevalences(FINDINGS, lowest=RAREST, highest=COMMONEST),
            dim=DIM,
            slices=SLICES,
            conflict=0.3,
        )
    )
    with tempfile.TemporaryDirectory() as name:
        store, labels = cohort.write_store(Path(name))
        started_s = time.perf_counter()
        run: Run = fit_head(store, labels, config, out=Path(name) / "run")
        whole_s = time.perf_counter() - started_s
        records, summary = run.epochs(), run.summary
    seconds = [record["seconds"] for record in records]
    return {
        "scans": train,
        "epochs": epochs,
        "precision": precision,
        "whole_s": whole_s,
        "epoch_s": seconds,
        "ms_a_scan": 1000 * statistics.median(seconds[1:]) / train,
        "scans_an_epoch": summary["repeats"]["expected_visits"],
        "validation_macro_auc": [record["validation_macro_auc"] for record in records],
    }


def measure(parts: Collection[str]) -> dict[str, object]:
    """Fit at each size and precision that is asked for."""
    fits: dict[str, dict[str, Any]] = {
        part: fit(TRAIN, epochs=EPOCHS, precision=part) for part in PARTS if part in parts
    }
    if "linear" in parts:
        fits |= {
            f"{train} scans": fit(train, epochs=SMALL_EPOCHS, precision=PARTS[0]) for train in SMALL
        }
    cost = [one["ms_a_scan"] for one in fits.values() if one["precision"] == PARTS[0]]
    took = ", ".join(f"{name} {one['whole_s'] / 60:.1f} min" for name, one in fits.items())
    return {
        "claim": f"dearest scan / cheapest scan over sizes of the cohort ({took})",
        "ratio": max(cost, default=1.0) / min(cost, default=1.0),
        "shape": {"slices": SLICES, "dim": DIM, "findings": FINDINGS, "batch": BATCH},
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "fits": fits,
    }


if __name__ == "__main__":
    main_with_out(measure, parts=(*PARTS, "linear"))
