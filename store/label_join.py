"""Labels joined to scans: from a label table, to one row of 1, 0 or unknown for each scan.

Ids of the table are those of the scans, or the originals that these are pseudonyms of. What has no
partner on either side is counted; `ways_to_join` tries what would give it one. A patient is one who
is one in the catalogue or in the table (`ctfm.store.patients`). No message repeats an id of the
table, which may name a patient.

Axes: n scans, c findings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Shaped

from ctfm.store.errors import LISTED, LabelError, some
from ctfm.store.id_repairs import repair_named, useful_repairs, whole_number
from ctfm.store.label_rules import ID_COLUMNS
from ctfm.store.labels import LabelTable, first_rows, merged_lines
from ctfm.store.patients import patient_groups
from ctfm.store.pseudonyms import Pseudonyms


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """Ids of one side that the other side lacks."""

    count: int
    examples: tuple[str, ...]
    """At most three: ids of scans, or rows of the label table."""


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedLabels:
    """Labels in the order of a table of scans; one line a line of that table."""

    scan_ids: tuple[str, ...]
    study_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    """One for all scans that the catalogue or the label table gives to one patient."""
    said_patients: tuple[str, ...]
    """As the table names them, under the key; "" where it does not. May be originals: not shown."""
    findings: tuple[str, ...]
    y: Float32[np.ndarray, "n c"]
    """1, 0, or NaN where unknown; all NaN where no label matched."""
    split: Shaped[np.ndarray, " n"] | None
    """train, validation, test or "" (in none of them); None without a `split` column."""
    matched: Bool[np.ndarray, " n"]
    """Whether the label table has the scan."""
    unmatched_scans: Unmatched
    unmatched_labels: Unmatched
    digest: str
    """Of the label table."""
    repaired: int
    """Ids of the table that matched only as `101` for `101.0`, or by the repair asked for."""
    known_patients: int
    """Patients that these scans have in the catalogue; more, if the table tells of fewer."""


def join_labels(table: LabelTable, scans: pa.Table, *, key: bytes | None = None) -> JoinedLabels:
    """Find the labels of scans.

    Args:
        table: As `read_labels` gave it.
        scans: Lines of a feature store or a catalogue, with the three ids.
        key: Of the pseudonyms; with it a label table may hold original ids, pseudonyms or both.

    Raises:
        LabelError: If no id matches, or a patient is in two splits.
        ConfigError: If the table's repair of ids is none.
    """
    scan_side: list[str] = scans[table.id_column].to_pylist()
    known = set(scan_side)
    partners = _Partners(known, kind=table.id_column, key=key, repair=table.id_repair)
    typed = [partners.partner(one) or one for one in table.ids]
    merged = merged_lines(
        typed,
        table.y,
        table.split,
        what=f"{table.source}: {table.id_name or table.id_column}",
        rows=table.rows,
    )
    ids, y, split = merged.ids, merged.y, merged.split
    row_of = first_rows(typed, table.rows)
    line_of = {one: line for line, one in enumerate(ids)}
    lines = np.array([line_of.get(one, -1) for one in scan_side], dtype=np.int64)
    matched = lines >= 0
    if not matched.any():
        raise _nothing_matched(table, scans, key=key)
    known_patients = scans["patient_id"].to_pylist()
    said = _said_patients(table, typed, scan_side, known=set(known_patients), key=key)
    joined = JoinedLabels(
        scan_ids=tuple(scans["scan_id"].to_pylist()),
        study_ids=tuple(scans["study_id"].to_pylist()),
        patient_ids=_grouped(known_patients, said, shown=key is not None),
        said_patients=said,
        findings=table.findings,
        y=np.where(matched[:, None], y[lines], np.float32(np.nan)),
        split=None if split is None else np.where(matched, split[lines], ""),
        matched=matched,
        unmatched_scans=_unmatched(one for one in dict.fromkeys(scan_side) if one not in line_of),
        unmatched_labels=_unmatched(f"row {row_of[one]}" for one in ids if one not in known),
        digest=table.digest,
        repaired=partners.repaired,
        known_patients=len(set(known_patients)),
    )
    _check_patients(joined, source=table.source)
    return joined


def _said_patients(
    table: LabelTable,
    typed: Sequence[str],
    scan_side: Sequence[str],
    *,
    known: set[str],
    key: bytes | None,
) -> tuple[str, ...]:
    """The patient of each scan as the table has it, under the key; "" where it says nothing."""
    if table.patients is None:
        return ("",) * len(scan_side)
    pseudonyms = Pseudonyms(key)
    made = [one if one in known or not one else pseudonyms.patient(one) for one in table.patients]
    said_of = {one: patient for one, patient in zip(typed, made, strict=True) if patient}
    return tuple(said_of.get(one, "") for one in scan_side)


def _grouped(own: Sequence[str], said: Sequence[str], *, shown: bool) -> tuple[str, ...]:
    """One id for all scans of a patient; the table's only where it may be shown: a pseudonym."""
    groups = patient_groups(own, said).tolist()
    names: dict[int, str] = {}
    # The table's first: it stays what it is when the cohort grows.
    for ids in (said if shown else own, own):
        first: dict[int, str] = {}
        for group, one in zip(groups, ids, strict=True):
            if one:
                first[group] = min(one, first.get(group, one))
        names = first | names
    return tuple(names[group] for group in groups)


class _Partners:
    """Ids of a table as the scans have them."""

    def __init__(
        self, known: set[str], *, kind: str, key: bytes | None, repair: str | None
    ) -> None:
        pseudonyms = Pseudonyms(key)
        make = {
            "scan_id": pseudonyms.scan,
            "study_id": pseudonyms.study,
            "patient_id": pseudonyms.patient,
        }
        self._known, self._make, self._has_key = known, make[kind], key is not None
        self._repair = None if repair is None else repair_named(repair).change
        self.repaired = 0

    def find(self, one: str) -> str | None:
        """The id as it is, or else its pseudonym, whichever a scan has."""
        if one in self._known:
            return one
        made = self._make(one) if self._has_key else one
        return made if made in self._known else None

    def partner(self, one: str) -> str | None:
        """The same, else that of the whole number or repaired id."""
        if found := self.find(one):
            return found
        changed = whole_number(one)
        found = self.find(changed)
        if found is None and self._repair is not None:
            found = self.find(self._repair(changed))
        self.repaired += found is not None
        return found

    def matching(self, ids: Iterable[str]) -> int:
        """How many of some ids have a scan."""
        return sum(self.find(one) is not None for one in ids)


def ways_to_join(table: LabelTable, scans: pa.Table, *, key: bytes | None = None) -> list[str]:
    """What would make ids join that do not, the best first; each with the number of ids.

    Args:
        table: As `read_labels` gave it.
        scans: See `join_labels`.
        key: See `join_labels`.
    """
    ways: list[tuple[int, str]] = []
    for kind in ID_COLUMNS:
        repair = table.id_repair if kind == table.id_column else None
        partners = _Partners(set(scans[kind].to_pylist()), kind=kind, key=key, repair=repair)
        without = [one for one in table.ids if partners.partner(one) is None]
        if kind == table.id_column:
            ways += [
                (count, f"would match {count} ids if {repair.what}: --id-repair {repair.name}")
                for repair, count in useful_repairs(without, partners.matching)
            ]
        elif found := len(table.ids) - len(without):
            name = table.id_name or table.id_column
            what = kind.replace("_id", "s")
            ways.append(
                (found, f"would match {found} ids as those of {what}: --id-column {name!r}={kind}")
            )
    return [text for _, text in sorted(ways, key=lambda way: -way[0])[:LISTED]]


def _nothing_matched(table: LabelTable, scans: pa.Table, *, key: bytes | None) -> LabelError:
    scan_side = dict.fromkeys(scans[table.id_column].to_pylist())
    if ways := ways_to_join(table, scans, key=key):
        remedy = "they " + ", or ".join(ways)
    elif key is not None:
        remedy = "these are ids of another cohort, or another kind of id"
    else:
        remedy = (
            "if the labels hold original ids, join them with the key of the pseudonyms, which "
            "scans.private.parquet holds"
        )
    return LabelError(
        f"no {table.id_column} of {table.source} ({len(table.ids)} ids) is one of the scans', "
        f"which have {some(map(repr, scan_side))}: {remedy}"
    )


def _check_patients(joined: JoinedLabels, *, source: str) -> None:
    if joined.split is None:
        return
    seen: dict[str, set[str]] = {}
    for patient, split in zip(joined.patient_ids, joined.split.tolist(), strict=True):
        if split:
            seen.setdefault(patient, set()).add(split)
    torn = [patient for patient, splits in seen.items() if len(splits) > 1]
    if torn:
        raise LabelError(
            f"{source}: {len(torn)} of {len(seen)} patients are in more than one split, e.g. "
            f"{torn[0]!r} in {' and '.join(sorted(seen[torn[0]]))}: give all scans of a patient "
            "one split, or remove the column and splits are drawn by patient"
        )


def _unmatched(ids: Any) -> Unmatched:
    ids = list(ids)
    return Unmatched(count=len(ids), examples=tuple(ids[:3]))
