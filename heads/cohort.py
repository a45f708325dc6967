"""Cohorts: feature stores and labels, to the scans and targets of a fit.

A scan takes part if it has embeddings, a line in the label table and a split. Splits are by
patient: those of the label table if it has them, else drawn from a salted hash or by the labels.
Only view 0 of a scan is used. What is missing is found here, before anything is computed.

Axes: n scans, c findings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int64, Shaped

from ctfm.heads.config import FitConfig
from ctfm.store.errors import LabelError, StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.label_join import JoinedLabels, join_labels
from ctfm.store.labels import LabelTable, read_labels
from ctfm.store.provenance import digest
from ctfm.store.splits import SPLITS, fold_patients, fold_split, split_patients
from ctfm.store.stratified import stratified_parts
from ctfm.store.verify import ADAPTER_SETTING

Labels = Path | str | LabelTable | JoinedLabels
"""A label table, its path, or labels that are joined to the scans of a store already."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """The scans of a fit, in the order of the store."""

    scans: pa.Table
    """scan_id, study_id, patient_id and split."""

    findings: tuple[str, ...]
    """Names of the findings."""

    y: Float32[np.ndarray, "n c"]
    """1, 0, or NaN where unknown."""

    views: int
    """Views of every scan that all stores hold."""

    labels: JoinedLabels
    """Where `y` comes from; it says what did not match."""

    def lines(self, split: str) -> Int64[np.ndarray, " lines"]:
        """Indices of the scans of a split."""
        return np.flatnonzero(self.scans["split"].to_numpy() == split)


def gather_cohort(stores: Sequence[FeatureStore], labels: Labels, config: FitConfig) -> Cohort:
    """Find the scans that have embeddings in every store, labels and a split.

    Args:
        stores: Finished feature stores.
        labels: See `Labels`. Joined labels may have other scans, and in another order.
        config: Its findings and splits.

    Raises:
        StoreError: If a store is unfinished or damaged, or no scan is in all of them.
        LabelError: If the labels do not fit the stores, or a split that a fit needs is empty.
    """
    usable = _usable_scans(stores)
    joined = _joined(labels, usable, config=config)
    findings = _findings(joined, config)
    scans, lines = _labelled(usable, joined, config=config)
    for store in stores:
        _refuse_adapter_overlap(store, scans, joined)
    return Cohort(
        scans=scans,
        findings=findings,
        y=_chosen(joined, config)[lines],
        views=_views(stores, scans["scan_id"]),
        labels=joined,
    )


def store_records(stores: Sequence[FeatureStore], scans: pa.Table) -> list[dict[str, str]]:
    """Of each store what its rows mean, and a digest of those that some scans have in all views."""
    return [
        {"fingerprint": store.fingerprint, "rows": _rows_digest(store, scans)} for store in stores
    ]


def _rows_digest(store: FeatureStore, scans: pa.Table) -> str:
    lines = store.scans.select(["scan_id", "view", "sha256"])
    used = lines.filter(pc.is_in(lines["scan_id"], value_set=scans["scan_id"].combine_chunks()))
    ordered = used.sort_by([("scan_id", "ascending"), ("view", "ascending")])
    return digest(ordered.to_pydict())


def taught_findings(cohort: Cohort) -> Bool[np.ndarray, " c"]:
    """Findings with a positive and a negative in train: the others cannot be learnt."""
    train = cohort.y[cohort.lines("train")]
    taught: Bool[np.ndarray, " c"] = (train == 1).any(axis=0) & (train == 0).any(axis=0)
    return taught


def selecting_findings(cohort: Cohort, *, min_positives: int) -> Bool[np.ndarray, " c"]:
    """Findings whose validation AUC chooses the epoch.

    Args:
        cohort: Its train and validation splits.
        min_positives: Fewest validation scans with, and fewest without, a finding.

    Returns:
        True for a finding with that many that train has taught.

    Raises:
        LabelError: If there is none.
    """
    validation, taught = cohort.y[cohort.lines("validation")], taught_findings(cohort)
    fewest = np.minimum((validation == 1).sum(axis=0), (validation == 0).sum(axis=0))
    selecting: Bool[np.ndarray, " c"] = taught & (fewest >= min_positives)
    if not selecting.any():
        nearest = int(np.argmax(np.where(taught, fewest, -1)))
        raise LabelError(
            f"no finding can choose the best epoch: that needs {min_positives} validation scans "
            f"with it and {min_positives} without, and one of each in train. The nearest is "
            f"{cohort.findings[nearest]}, with {int(fewest[nearest])} of {len(validation)} scans. "
            "Lower min_positives (--set min_positives=…), give validation a larger share "
            "(split_fractions; --split 60/20/20), share the positives out evenly (--split "
            "stratified), or add scans"
        )
    return selecting


def _refuse_adapter_overlap(store: FeatureStore, scans: pa.Table, joined: JoinedLabels) -> None:
    """A LoRA adapter must not have seen what a head is chosen or judged on.

    Raises:
        LabelError: If a patient or scan of validation or test is among those it was trained on.
    """
    adapter = store.adapter
    if adapter is None and ADAPTER_SETTING not in store.settings:
        return
    if adapter is None:
        raise StoreError(
            f"{store.path} was made with a LoRA adapter, and the record of what that was trained "
            "on is missing: `ctfm extract` with the options of before writes it anew"
        )
    seen_scans, named = set(adapter["scan_ids"]), set(adapter["patient_ids"])
    seen_patients = set(named)
    ids = zip(joined.patient_ids, joined.said_patients, strict=True)
    known = dict(zip(joined.scan_ids, ids, strict=True))
    # Also scans that take no part here: they tell a patient whose other scans may.
    for line in store.scans.select(["scan_id", "patient_id"]).to_pylist():
        same = {line["patient_id"], *known.get(line["scan_id"], ())}
        if line["scan_id"] in seen_scans or not named.isdisjoint(same):
            seen_patients |= same - {""}
    overlap = [
        line
        for line in scans.to_pylist()
        if line["split"] != "train" and line["patient_id"] in seen_patients
    ]
    if overlap:
        raise LabelError(
            f"the LoRA adapter of {store.path} was trained on {len(overlap)} scans of patients in "
            f"validation or test, e.g. patient {overlap[0]['patient_id']!r}: results on them would "
            "look better than they are. Put these patients into train (a `split` column of the "
            "labels), or leave them out"
        )


def _usable_scans(stores: Sequence[FeatureStore]) -> pa.Table:
    """Scans of the first store, in its order, that all stores have embedded."""
    usable = _embedded(stores[0], view=0)
    for store in stores[1:]:
        others = _embedded(store, view=0)["scan_id"]
        usable = usable.filter(pc.is_in(usable["scan_id"], value_set=others.combine_chunks()))
    if not usable.num_rows:
        names = ", ".join(str(store.path) for store in stores)
        raise StoreError(f"no scan has embeddings in {names}: extract them from one catalogue")
    return usable


def _embedded(store: FeatureStore, *, view: int) -> pa.Table:
    table = store.scans.filter(pc.equal(store.scans["view"], view))
    pending = pc.sum(pc.equal(table["status"], "pending")).as_py() or 0
    if pending:
        raise StoreError(
            f"{pending} of {table.num_rows} scans of {store.path} are still pending: run "
            "`ctfm extract` again, which continues where it was stopped"
        )
    return table.filter(pc.equal(table["status"], "ok"))


def _views(stores: Sequence[FeatureStore], scan_ids: pa.ChunkedArray) -> int:
    """The number of views that every store has of every scan."""
    known = min(int(pc.max(store.scans["view"]).as_py()) for store in stores) + 1
    wanted = scan_ids.combine_chunks()
    for view in range(1, known):
        held = [_embedded(store, view=view)["scan_id"].combine_chunks() for store in stores]
        if not all(pc.all(pc.is_in(wanted, value_set=one)).as_py() for one in held):
            return view
    return known


def _joined(labels: Labels, scans: pa.Table, *, config: FitConfig) -> JoinedLabels:
    if isinstance(labels, JoinedLabels):
        return labels
    if not isinstance(labels, LabelTable):
        labels = read_labels(labels, findings=config.findings or None)
    return join_labels(labels, scans)


def _findings(joined: JoinedLabels, config: FitConfig) -> tuple[str, ...]:
    unknown = [name for name in config.findings if name not in joined.findings]
    if unknown:
        raise LabelError(
            f"the labels have no finding {unknown[0]!r}: they have {', '.join(joined.findings)}"
        )
    return config.findings or joined.findings


def _labelled(
    usable: pa.Table, joined: JoinedLabels, *, config: FitConfig
) -> tuple[pa.Table, Int64[np.ndarray, " n"]]:
    """Ids and split of the scans that take part, and the line of each in the labels."""
    line_of = {scan: i for i, scan in enumerate(joined.scan_ids) if joined.matched[i]}
    every = np.array([line_of.get(one, -1) for one in usable["scan_id"].to_pylist()], np.int64)
    split = np.full(len(joined.scan_ids), "", dtype="<U10")
    split[every[every >= 0]] = split_lines(joined, every[every >= 0], config)
    every[split[every] == ""] = -1
    lines = every[every >= 0]
    scans = usable.filter(pa.array(every >= 0)).select(["scan_id", "study_id"])
    patients = [joined.patient_ids[line] for line in lines]  # the labels may know better
    scans = scans.append_column("patient_id", pa.array(patients, pa.string()))
    scans = scans.append_column("split", pa.array(split[lines].tolist(), pa.string()))
    for name in ("train", "validation"):
        if not (split[lines] == name).any():
            raise LabelError(
                f"none of the {len(lines)} labelled scans is in the {name} split: add scans, or "
                "change split_fractions, split_salt or the `split` column of the labels"
            )
    return scans, lines


def split_lines(
    joined: JoinedLabels, lines: Int64[np.ndarray, " n"], config: FitConfig
) -> Shaped[np.ndarray, " n"]:
    """The split of some lines of the labels, "" where a line is in none.

    Args:
        joined: The labels.
        lines: Of the scans that take part; the shares of a stratified split are those of these.
        config: Its splits or folds.

    Raises:
        LabelError: If a stratified split is asked for, and the labels have one of their own.
    """
    patients = [joined.patient_ids[line] for line in lines]
    salt, names = config.split_salt, np.array(SPLITS)
    if config.split_method == "stratified":
        if joined.split is not None and not config.folds:
            raise LabelError(
                "the labels have a split of their own, and a stratified one is asked for: leave "
                "that column out (--ignore), or do not ask"
            )
        shares = [1 / config.folds] * config.folds if config.folds else config.split_fractions
        parts = stratified_parts(patients, _chosen(joined, config)[lines], shares=shares, salt=salt)
        if config.folds:
            return fold_split(parts, fold=config.fold, folds=config.folds)
        return np.asarray(names[parts])
    if config.folds:
        parts = fold_patients(patients, salt=salt, folds=config.folds)
        return fold_split(parts, fold=config.fold, folds=config.folds)
    if joined.split is not None:
        return np.asarray(joined.split[lines])
    return split_patients(patients, salt=salt, fractions=config.split_fractions)


def _chosen(joined: JoinedLabels, config: FitConfig) -> Float32[np.ndarray, "n c"]:
    columns = [joined.findings.index(name) for name in _findings(joined, config)]
    return joined.y[:, columns]
