"""`ctfm labels`: what a label table holds, what of it joins, and what there is to learn from."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctfm.cli.console import note, out, print_table
from ctfm.cli.options import (
    DEFAULT_SPLIT,
    Catalogue,
    Findings,
    IdColumn,
    IdRepair,
    Ignore,
    Negative,
    Positive,
    Sheet,
    Split,
    Uncertain,
    names_of,
    parse_split,
)
from ctfm.heads.config import FitConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from ctfm.store.features import FeatureStore
    from ctfm.store.label_counts import PartCounts
    from ctfm.store.label_join import JoinedLabels
    from ctfm.store.label_roles import ColumnUse
    from ctfm.store.label_rules import LabelRules
    from ctfm.store.labels import LabelReport, LabelTable

labels_app = typer.Typer(help="Look at label tables.", no_args_is_help=True)
_LISTS = ("findings", "ignore", "positive", "negative", "uncertain")


@labels_app.command()
def check(
    table: Annotated[Path, typer.Argument(help="Label table: CSV, .xlsx or Parquet.")] = Path(
        "labels.parquet"
    ),
    scans: Catalogue = Path("scans.parquet"),
    findings: Findings = None,
    ignore: Ignore = None,
    id_column: IdColumn = None,
    id_repair: IdRepair = None,
    positive: Positive = None,
    negative: Negative = None,
    uncertain: Uncertain = None,
    sheet: Sheet = None,
    split: Split = DEFAULT_SPLIT,
) -> None:
    """List at once what each column is, what joins, what there is to learn, and what to mend.

    `fit-head` reads the table in the same way. The exit code is 1 if something is to be mended.
    """
    from ctfm.store.errors import LabelError
    from ctfm.store.labels import inspect_labels

    rules = typed_rules(
        table,
        findings=findings,
        ignore=ignore,
        id_column=id_column,
        id_repair=id_repair,
        positive=positive,
        negative=negative,
        uncertain=uncertain,
        sheet=sheet,
    )
    method, fractions = parse_split(split)
    report = inspect_labels(table, rules)
    print_columns(report)
    problems = list(report.problems)
    if report.table is not None and scans.exists():
        config = FitConfig(split_method=method, split_fractions=fractions)
        try:
            _check_join(report.table, scans, config)
        except LabelError as error:
            problems.append(str(error))
    elif not scans.exists():
        note(f"no catalogue is at {scans}: without one (--scans) nothing is said of what joins")
    _end(problems)


def _end(problems: Sequence[str]) -> None:
    if not problems:
        out.print("nothing to mend")
        return
    out.print(f"to mend: {len(problems)}")
    for problem in problems:
        out.print(f"  - {problem}")
    raise typer.Exit(1)


def _check_join(table: "LabelTable", scans: Path, config: FitConfig) -> None:
    """Say what of a table joins the usable scans of a catalogue, and what that leaves to learn.

    Raises:
        LabelError: If nothing joins, or a split tears a patient.
    """
    import numpy as np
    import pyarrow.compute as pc

    from ctfm.heads.cohort import split_lines
    from ctfm.store.catalogue import read_catalogue, read_key
    from ctfm.store.label_counts import count_parts
    from ctfm.store.label_join import join_labels
    from ctfm.store.splits import SPLITS

    lines = read_catalogue(scans, private=False).scans
    usable = lines.filter(pc.field("usable"))
    joined = join_labels(table, usable, key=read_key(scans))
    print_unmatched(joined)
    print_partners(table, usable, joined, catalogue=scans)
    matched = np.flatnonzero(joined.matched)
    parts = count_parts(
        joined.y[matched],
        patient_ids=[joined.patient_ids[line] for line in matched],
        split=split_lines(joined, matched, config),
        names=SPLITS,
    )
    print_parts(joined.findings, parts, min_positives=config.min_positives)
    note_few_patients(parts, config)


def typed_rules(table: Path, **typed: str | None) -> "LabelRules":
    """The rules of the TOML file beside a table, and over them what was typed."""
    from ctfm.store.label_rules import LabelRules, rules_path

    rules = LabelRules.beside(table)
    if rules != LabelRules():
        out.print(f"rules of {rules_path(table)}")
    values = {
        name: names_of(text, option=f"--{name}") if name in _LISTS else text
        for name, text in typed.items()
        if text is not None
    }
    return rules.updated(values, source="the command")


def print_columns(report: "LabelReport") -> None:
    """What a file is, and what each of its columns is taken for."""
    rows = f"{report.lines:,} rows below the header, which count from 1"
    out.print(f"{report.source}: {report.form}, {rows}")
    for line in report.notes:
        out.print(line)
    cells = [[shown(use.name), use.role, use.why] for use in report.columns]
    print_table("columns", ["column", "is", "why"], cells)


def shown(name: str) -> str:
    """A name of the user's as it may be printed: what is no printable character is escaped."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in name) or "(no name)"


def join_table(
    labels: Path, store: "FeatureStore", *, rules: "LabelRules", catalogue: Path
) -> "JoinedLabels":
    """Read the labels, join them to the scans of a store, and say what did not match."""
    from ctfm.store.catalogue import read_key
    from ctfm.store.label_join import join_labels
    from ctfm.store.labels import read_labels

    table = read_labels(labels, rules=rules)
    print_ignored(table.columns)
    joined = join_labels(table, store.scans, key=read_key(catalogue))
    print_unmatched(joined)
    print_partners(table, store.scans, joined, catalogue=catalogue)
    note_near_names(joined.findings)
    return joined


def print_ignored(columns: "Sequence[ColumnUse]") -> None:
    """Say which columns are left out, and why."""
    ignored = [f"{shown(use.name)} ({use.why})" for use in columns if use.role == "ignored"]
    if ignored:
        out.print(f"columns that are no findings: {', '.join(ignored)}")


def print_partners(
    table: "LabelTable", scans: "pa.Table", joined: "JoinedLabels", *, catalogue: Path
) -> None:
    """Say what would give labels without a scan one, or which scans of theirs are unused."""
    from ctfm.store.catalogue import read_key
    from ctfm.store.label_join import ways_to_join

    if not joined.unmatched_labels.count:
        return
    if catalogue.exists():
        print_unusable(table, scans, catalogue)
    for way in ways_to_join(table, scans, key=read_key(catalogue)):
        out.print(f"they {way}")


def print_unusable(table: "LabelTable", scans: "pa.Table", catalogue: Path) -> None:
    """Say which labels are of scans that the catalogue lists, and why these are not used."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from ctfm.store.catalogue import read_catalogue, read_key
    from ctfm.store.errors import LabelError, StoreError
    from ctfm.store.label_join import join_labels

    try:
        lines = read_catalogue(catalogue, private=False).scans
    except StoreError:  # of another version, or damaged: there is nothing to tell
        return
    used = scans[table.id_column].combine_chunks()
    others = lines.filter(pc.invert(pc.is_in(lines[table.id_column], value_set=used)))
    if not others.num_rows:
        return
    try:
        joined = join_labels(table, others, key=read_key(catalogue))
    except LabelError:  # none of them is of a scan
        return
    reasons = Counter(others.filter(pa.array(joined.matched))["reason"].to_pylist())
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    out.print(f"the catalogue has scans of labels that are not among these: {told}")


def note_near_names(findings: Sequence[str]) -> None:
    """Say which findings are almost, but not quite, one of the taxonomy; they are fitted."""
    from ctfm.store.findings import load_findings

    names = load_findings().names
    for finding in findings:
        near = get_close_matches(finding, names, n=1, cutoff=0.9)
        if near and finding not in names:
            note(f"the taxonomy has no finding {shown(finding)}: did you mean {near[0]}?")


def print_unmatched(joined: "JoinedLabels") -> None:
    """Say how many ids of either side have no partner, with examples."""
    out.print(f"labels for {joined.matched.sum()} of {len(joined.scan_ids)} scans")
    if joined.repaired:
        out.print(f"{joined.repaired} ids match as whole numbers (101 for 101.0), or as repaired")
    if (patients := len(set(joined.patient_ids))) < joined.known_patients:
        out.print(
            f"patients: {joined.known_patients} of the catalogue are {patients} by the patient_id "
            "of the labels; splits and intervals are by these"
        )
    sides = (
        ("scans without a label", joined.unmatched_scans),
        ("labels without a scan", joined.unmatched_labels),
    )
    for what, unmatched in sides:
        if unmatched.count:
            out.print(f"{unmatched.count} {what}, e.g. {', '.join(unmatched.examples)}")


def print_cohort(
    stores: "Sequence[FeatureStore]", joined: "JoinedLabels", config: FitConfig, *, folds: int
) -> None:
    """Say what a fit has to learn from, and how many findings choose its epoch.

    Args:
        stores: That it is fitted on.
        joined: The labels.
        config: What decides the head.
        folds: Of the cross-validation; 0 is none.

    Raises:
        LabelError: If the labels do not fit the stores, or no finding can choose the epoch.
    """
    from ctfm.heads.cohort import gather_cohort, selecting_findings
    from ctfm.store.label_counts import count_parts
    from ctfm.store.splits import SPLITS

    if folds:
        _print_folds(stores, joined, replace(config, folds=folds))
        return
    cohort = gather_cohort(stores, joined, config)
    parts = count_parts(
        cohort.y,
        patient_ids=cohort.scans["patient_id"].to_pylist(),
        split=cohort.scans["split"].to_numpy(),
        names=SPLITS,
    )
    print_parts(cohort.findings, parts, min_positives=config.min_positives)
    choosing = int(selecting_findings(cohort, min_positives=config.min_positives).sum())
    out.print(f"{choosing} of {len(cohort.findings)} findings choose the epoch")
    note_few_patients(parts, config)


def _print_folds(
    stores: "Sequence[FeatureStore]", joined: "JoinedLabels", config: FitConfig
) -> None:
    """The counts of each fold, which is tested once, and validates once."""
    import numpy as np

    from ctfm.heads.cohort import gather_cohort
    from ctfm.store.label_counts import count_parts

    cohort = gather_cohort(stores, joined, config)
    names = [f"fold {fold}" for fold in range(config.folds)]
    tested = np.full(cohort.scans.num_rows, "", dtype=object)
    for fold, name in enumerate(names):
        tested[gather_cohort(stores, joined, replace(config, fold=fold)).lines("test")] = name
    parts = count_parts(
        cohort.y,
        patient_ids=cohort.scans["patient_id"].to_pylist(),
        split=tested,
        names=names,
    )
    print_parts(cohort.findings, parts, min_positives=config.min_positives)


def print_parts(
    findings: Sequence[str], parts: "Sequence[PartCounts]", *, min_positives: int
) -> None:
    """Positives of each finding in each part, below the patients and scans of each."""
    few = [part.estimable(min_positives=min_positives) for part in parts]
    rows: list[list[object]] = [
        ["(patients)", *(part.patients for part in parts), ""],
        ["(scans)", *(part.scans for part in parts), ""],
    ]
    for c, finding in enumerate(findings):
        without = [part.name for part, enough in zip(parts, few, strict=True) if not enough[c]]
        counts = [_of(part.positives[c], part.known[c], part.scans) for part in parts]
        rows.append([shown(finding), *counts, f"too few: {', '.join(without)}" if without else ""])
    print_table("positives (of how many known, where not all)", _header(parts), rows)
    if any(not enough.all() for enough in few):
        out.print(f"too few: fewer than {min_positives} scans with it or without it; no AUC there")


def _header(parts: "Iterable[PartCounts]") -> list[str]:
    return ["finding", *(part.name for part in parts), ""]


def _of(positives: int, known: int, scans: int) -> str:
    return str(positives) if known == scans else f"{positives} of {known}"


def note_few_patients(parts: "Sequence[PartCounts]", config: FitConfig) -> None:
    """Warn of a test on so few patients that its intervals say little."""
    from ctfm.store.label_counts import FEW_TEST_PATIENTS

    patients = {part.name: part.patients for part in parts}["test"]
    if patients >= FEW_TEST_PATIENTS:
        return
    advice = "--folds 5 tests every patient once"
    if config.split_method != "stratified":
        advice += ", --split stratified gives each finding its share of every part"
    note(f"test has {patients} patients, and intervals will be wide: {advice}")
