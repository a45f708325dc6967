"""Attention enrichment: does the pooling look at the slices where a finding lies?

Enrichment of one scan is the attention on the slices that a lesion touches, divided by their share
of the stack: 1 is what even attention reaches, 3 says that these slices get three times as much.
Only true positives count: a head that misses a finding has no reason to look there. Unless the
pool weighs slices for each finding, all findings of a scan share one attention, so a scan with two
lesions divides it between them.

Axes: s slices of one scan, n scans, c findings. Positions are z in the head frame, in mm.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Float64

from ctfm.heads.evaluate import labels_and_logits, rows_of_split
from ctfm.heads.metrics import youden_threshold
from ctfm.heads.runs import Run, json_text
from ctfm.store.errors import LabelError
from ctfm.store.findings import load_findings
from ctfm.store.pseudonyms import Pseudonyms

Range = tuple[float, float]
"""Lowest and highest z of a lesion, in mm."""

LesionRanges = Mapping[str, Mapping[str, Sequence[Range]]]
"""Finding, then scan_id, to where it lies."""

Stack = tuple[Float64[np.ndarray, " _"], Float64[np.ndarray, " _"]]
"""Positions in mm and attention of the slices of one scan."""

LESION_COLUMNS = {
    "finding": pa.string(),
    "focal": pa.bool_(),
    "z_min_mm": pa.float64(),
    "z_max_mm": pa.float64(),
}


@dataclass(frozen=True, kw_only=True)
class FindingEnrichment:
    """Enrichment of one focal finding over its true positive scans."""

    name: str
    display: str
    n_positive: int
    """Positive scans of the split whose lesion is known and meets the stack."""
    n: int
    """Of these, the ones that the head calls positive."""
    median: float
    """Enrichment over the `n` scans; NaN without any."""
    threshold: float
    """A logit at or above it is called positive."""


@dataclass(frozen=True, kw_only=True)
class Enrichment:
    """Enrichment of all focal findings."""

    split: str
    findings: tuple[FindingEnrichment, ...]
    median: float
    """Over the findings that have one; NaN without any."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; a number that is not estimable is null."""
        plain: dict[str, Any] = json.loads(json_text(asdict(self)))
        return plain


def enrichment_of_run(
    run: Run, lesions: pa.Table, *, split: str = "test", key: bytes | None = None
) -> Enrichment:
    """`attention_enrichment` of a finished run.

    Args:
        run: Whose attention it is.
        lesions: As for `lesion_ranges`.
        split: Whose scans count.
        key: Of the pseudonyms, where `lesions` holds original ids.

    Raises:
        LabelError: If `lesions` does not fit the run.
        RunError: If no scan is in that split.
    """
    predictions = run.predictions()
    places = lesion_ranges(lesions, predictions, key=key)
    return attention_enrichment(
        predictions, run.attention(), places, findings=run.findings, split=split
    )


def attention_enrichment(
    predictions: pa.Table,
    attention: pa.Table,
    places: LesionRanges,
    *,
    findings: Sequence[str],
    split: str = "test",
    threshold: float | None = None,
) -> Enrichment:
    """Enrichment of every focal finding, as the median over its true positive scans.

    Args:
        predictions: scan_id, split, and `logit_` and `label_` of each finding.
        attention: As `outputs.attention_table` makes it.
        places: Where focal findings lie, from `lesion_ranges`.
        findings: Names of the findings of the predictions.
        split: Whose scans count.
        threshold: Logit from which a scan is called positive. None chooses it for each finding
            on the validation split by Youden's index, or takes 0 where that has one class only.

    Raises:
        RunError: If no scan is in that split.
    """
    rows = rows_of_split(predictions, split)
    thresholds = _thresholds(predictions, findings, fixed=threshold)
    labels, logits = labels_and_logits(rows, findings)
    scans = rows["scan_id"].to_pylist()
    results = []
    for c, name in enumerate(findings):
        if name not in places:
            continue
        stacks = attention_stacks(attention, finding=name)
        known = _known_enrichments(scans, labels[:, c] == 1, stacks=stacks, places=places[name])
        called = logits[list(known), c] >= thresholds[c]
        values = np.array(list(known.values()))[called]
        results.append(_finding_enrichment(name, values, n_positive=len(known), at=thresholds[c]))
    medians = [result.median for result in results if result.n]
    return Enrichment(
        split=split,
        findings=tuple(results),
        median=float(np.median(medians)) if medians else math.nan,
    )


def enrichment_of_scan(attention: Float[np.ndarray, " s"], inside: Bool[np.ndarray, " s"]) -> float:
    """Attention on the slices inside, over their share of the stack.

    Returns:
        NaN if no slice is inside.
    """
    if not inside.any():
        return math.nan
    return float(attention[inside].sum() / attention.sum() / inside.mean())


def slices_inside(
    position_mm: Float[np.ndarray, " s"], ranges: Sequence[Range]
) -> Bool[np.ndarray, " s"]:
    """Which slices touch one of the ranges: a slice is as thick as its neighbours are apart.

    Args:
        position_mm: z of the centres. A single slice counts as infinitely thin.
        ranges: Lowest and highest z of each lesion.
    """
    spacing = np.abs(np.diff(np.sort(position_mm)))
    half = float(np.median(spacing)) / 2 if spacing.size else 0.0
    inside = np.zeros(position_mm.shape, dtype=bool)
    for low, high in ranges:
        inside |= (position_mm >= low - half) & (position_mm <= high + half)
    return inside


def lesion_ranges(
    lesions: pa.Table, predictions: pa.Table, *, key: bytes | None = None
) -> LesionRanges:
    """Where each focal finding lies in the scans of a run.

    Args:
        lesions: scan_id or study_id (of the scans, or their originals), finding, focal (bool),
            z_min_mm and z_max_mm. A finding may lie in several places of a scan.
        predictions: scan_id and study_id.
        key: Of the pseudonyms; with it `lesions` may hold original ids.

    Raises:
        LabelError: If `lesions` lacks a column, or has no scan of the predictions.
    """
    id_column = _id_column(lesions)
    scans_of: defaultdict[str, list[str]] = defaultdict(list)
    ids = predictions.select([id_column]).to_pylist()
    for line, scan in zip(ids, predictions["scan_id"].to_pylist(), strict=True):
        scans_of[line[id_column]].append(scan)
    pseudonyms = Pseudonyms(key)
    made = pseudonyms.scan if id_column == "scan_id" else pseudonyms.study
    places: dict[str, dict[str, list[Range]]] = defaultdict(lambda: defaultdict(list))
    for line in lesions.filter(pc.field("focal")).to_pylist():
        one = str(line[id_column])
        for scan in scans_of.get(one) or scans_of.get(made(one)) or []:
            places[line["finding"]][scan].append((line["z_min_mm"], line["z_max_mm"]))
    if not places:
        raise LabelError(
            f"no {id_column} of the table of lesions is a scan of this run: give the lesions of "
            "the cohort that it was fitted on, and where ids are pseudonyms the catalogue's key"
        )
    return places


def read_lesions(path: Path | str) -> pa.Table:
    """Read a table of lesions, as `lesion_ranges` takes it, from Parquet.

    Raises:
        LabelError: If the file cannot be read, lacks a column, or holds something else in it.
    """
    try:
        lesions = pq.read_table(path)
        names = [_id_column(lesions), *LESION_COLUMNS]
        types = [pa.string(), *LESION_COLUMNS.values()]
        return lesions.select(names).cast(pa.schema(list(zip(names, types, strict=True))))
    except (OSError, pa.ArrowException) as error:
        raise LabelError(f"cannot read lesions from {path}: {error}") from error


def attention_stacks(attention: pa.Table, *, finding: str | None = None) -> dict[str, Stack]:
    """Positions in mm and attention of the slices of each scan, by scan_id.

    Args:
        attention: As `outputs.attention_table` makes it.
        finding: Whose attention, of the scans that are known to have it, where the pool weighs
            slices for each finding; elsewhere, and with None, it is the attention that all share.
    """
    own = f"attention_{finding}"
    column = own if finding is not None and own in attention.column_names else "attention"
    lists = attention.select(["scan_id", "position_mm", column]).to_pylist()
    return {
        line["scan_id"]: (np.array(line["position_mm"], float), np.array(line[column], float))
        for line in lists
        if line[column] is not None
    }


def attention_by_position(
    stacks: Sequence[Stack],
) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """Mean attention at each position, relative to even attention (1).

    Args:
        stacks: Positions in mm and attention of each scan. A position that fewer than one scan in
            twenty has is left out.

    Returns:
        The positions, falling from the vertex, and the means.
    """
    if not stacks:
        return np.empty(0), np.empty(0)
    # Positions lie on a grid; a tenth of a millimetre absorbs their float32.
    position = np.concatenate([z for z, _ in stacks]).round(1)
    relative = np.concatenate([a * (a.size / a.sum()) for _, a in stacks])
    found, index = np.unique(position, return_inverse=True)
    counts = np.bincount(index)
    means = np.bincount(index, weights=relative) / counts
    common = counts * 20 >= len(stacks)
    return found[common][::-1], means[common][::-1]


def _id_column(lesions: pa.Table) -> str:
    """The finest id of a table of lesions that has all it needs."""
    names = lesions.column_names
    id_column = next((name for name in ("scan_id", "study_id") if name in names), None)
    missing = [name for name in LESION_COLUMNS if name not in names]
    if id_column is None or missing:
        raise LabelError(
            f"the table of lesions has the columns {', '.join(names)}: it needs scan_id or "
            f"study_id, {', '.join(LESION_COLUMNS)}"
        )
    return id_column


def _known_enrichments(
    scans: Sequence[str],
    positive: Bool[np.ndarray, " n"],
    *,
    stacks: Mapping[str, Stack],
    places: Mapping[str, Sequence[Range]],
) -> dict[int, float]:
    """Enrichment of the positive scans with a known lesion in their stack, by line."""
    found = {}
    for line in np.flatnonzero(positive).tolist():
        scan = scans[line]
        if scan in places and scan in stacks:
            position_mm, attention = stacks[scan]
            found[line] = enrichment_of_scan(attention, slices_inside(position_mm, places[scan]))
    return {line: value for line, value in found.items() if not math.isnan(value)}


def _thresholds(
    predictions: pa.Table, findings: Sequence[str], *, fixed: float | None
) -> list[float]:
    if fixed is not None:
        return [fixed] * len(findings)
    rows = predictions.filter(pc.equal(predictions["split"], "validation"))
    labels, logits = labels_and_logits(rows, findings)
    chosen = [youden_threshold(labels[:, c], logits[:, c]) for c in range(len(findings))]
    return [0.0 if math.isnan(value) else value for value in chosen]


def _finding_enrichment(
    name: str, values: Float64[np.ndarray, " n"], *, n_positive: int, at: float
) -> FindingEnrichment:
    return FindingEnrichment(
        name=name,
        display=load_findings().display(name),
        n_positive=n_positive,
        n=values.size,
        median=float(np.median(values)) if values.size else math.nan,
        threshold=at,
    )
