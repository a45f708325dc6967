"""The report: an evaluation and all that led to it, to one HTML page.

The page stands alone: no other file, no network, opened from disk. Its own content security policy
says so, and lets only its one style sheet and one script run. The same input gives the same bytes.
Everything in it that came from a file is escaped. Predictions of single scans are not in it.

`report_run` gathers what a run holds; `write_report` turns what it is given into the page.
"""

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from ctfm.heads import figures
from ctfm.heads.enrichment import (
    Enrichment,
    LesionRanges,
    Stack,
    attention_by_position,
    attention_enrichment,
    attention_stacks,
    lesion_ranges,
)
from ctfm.heads.evaluate import (
    FEW_POSITIVES,
    Evaluation,
    FindingResult,
    evaluate,
    labels_and_logits,
    number,
    rows_of_split,
)
from ctfm.heads.metrics import roc_curve
from ctfm.heads.page import html_page
from ctfm.heads.runs import Run
from ctfm.store.files import publish_bytes
from ctfm.store.findings import load_findings
from ctfm.store.splits import SPLITS

LIMITS = (
    "Research use; not a medical device. The backbone was frozen and its embeddings cached "
    "(frozen-cache protocol): these figures do not compare one to one with end-to-end training. "
    "Probabilities rank scans; they are not calibrated."
)

LEFT_OUT = (
    "The command is for the folder that it was typed in. Names of folders elsewhere may be private "
    "and are not recorded: put them in place of each …"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """Something of each slice by its place: one `figures.position_plot`."""

    title: str
    position_mm: Float[np.ndarray, " k"]
    series: Mapping[str, Float[np.ndarray, " k"]]
    band_mm: tuple[float, float] | None = None


def report_run(
    run: Run | Path | str,
    path: Path | str,
    *,
    split: str = "test",
    min_positives: int | None = None,
    lesions: pa.Table | None = None,
    key: bytes | None = None,
) -> Evaluation:
    """Evaluate a finished run and write its report.

    Args:
        run: The run or its folder.
        path: The HTML file.
        split: train, validation or test.
        min_positives: As for `evaluate`.
        lesions: Where findings lie, as for `lesion_ranges`; None leaves enrichment out.
        key: Of the pseudonyms, where `lesions` holds original ids.

    Raises:
        RunError: If the run is missing or unfinished, or has no scan in that split.
        LabelError: If `lesions` does not fit the run.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    predictions, attention = run.predictions(), run.attention()
    evaluation = evaluate(run, split=split, min_positives=min_positives)
    places, enrichment = None, None
    if lesions is not None:
        places = lesion_ranges(lesions, predictions, key=key)
        enrichment = attention_enrichment(
            predictions, attention, places, findings=run.findings, split=split
        )
    write_report(
        path,
        evaluation=evaluation,
        run_summary=run.summary,
        history=run.epochs(),
        settings={"fit": run.config.as_dict(), **_by_store(run)},
        curves=roc_curves(predictions, evaluation),
        profiles=attention_profiles(predictions, attention, split=split, places=places),
        enrichment=enrichment,
        title=run.path.resolve().name,
    )
    return evaluation


def write_report(
    path: Path | str,
    *,
    evaluation: Evaluation,
    run_summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    curves: Sequence[figures.RocCurve] = (),
    profiles: Sequence[Profile] = (),
    enrichment: Enrichment | None = None,
    title: str = "run",
) -> None:
    """Write the page; what is not given is left out.

    Args:
        path: The HTML file; it appears at once and whole.
        evaluation: Numbers of the page.
        run_summary: Content of `summary.json`: command, versions, machine, fingerprint.
        history: One record an epoch, as in `metrics.jsonl`.
        settings: Group of settings to its values.
        curves: ROC curves, at most 200 points each.
        profiles: Attention by position; the first is drawn wide, the others small.
        enrichment: Attention on the slices where findings lie.
        title: Name of the run.

    Raises:
        StoreError: If the file cannot be written.
    """
    sections = [
        ("findings", "AUC of each finding", _plot_section(evaluation)),
        ("table", "All numbers", _table_section(evaluation)),
        ("roc", "ROC curves", _roc_section(curves)),
        ("training", "Fitting", _training_section(history, run_summary)),
        ("attention", "Attention", _attention_section(profiles, enrichment)),
        ("provenance", "Provenance", _provenance_section(run_summary, settings or {})),
    ]
    shown = [section for section in sections if section[2]]
    head = _header(evaluation, title=title, enrichment=enrichment, sections=shown)
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{content}</section>\n'
        for name, heading, content in shown
    )
    page = html_page(f"{head}<main>{body}</main>", title=f"{title} · ctfm report")
    publish_bytes(Path(path), page.encode())


def roc_curves(predictions: pa.Table, evaluation: Evaluation) -> list[figures.RocCurve]:
    """ROC curves of the estimable findings of a run's predictions, in the order of the head."""
    used = [finding for finding in evaluation.findings if finding.estimable]
    rows = rows_of_split(predictions, evaluation.split)
    labels, logits = labels_and_logits(rows, [finding.name for finding in used])
    points = 200 if len(used) <= 40 else 80
    curves = []
    for c, finding in enumerate(used):
        false_rate, true_rate = roc_curve(labels[:, c], logits[:, c], max_points=points)
        curves.append(
            figures.RocCurve(
                name=finding.name,
                display=finding.display,
                note=f"AUC {finding.auc:.3f}, n+ {finding.n_positive}",
                false_positive_rate=false_rate,
                true_positive_rate=true_rate,
            )
        )
    return curves


def attention_profiles(
    predictions: pa.Table,
    attention: pa.Table,
    *,
    split: str = "test",
    places: LesionRanges | None = None,
) -> list[Profile]:
    """Mean attention by position: of all scans of a split, then of those with each finding.

    Args:
        predictions: scan_id and split.
        attention: As `outputs.attention_table` makes it.
        split: Whose scans count.
        places: Where findings lie, from `lesion_ranges`; a finding's median range is shaded.
    """
    stacks = attention_stacks(attention)
    scans = rows_of_split(predictions, split)["scan_id"].to_pylist()
    profiles = [
        _mean_profile(
            f"Mean attention over all {split} scans, relative to even attention",
            [stacks[one] for one in scans if one in stacks],
        )
    ]
    for name, ranges_of in (places or {}).items():
        own = attention_stacks(attention, finding=name)
        found = [one for one in scans if one in ranges_of and one in own]
        if not found:
            continue
        ranges = [place for one in found for place in ranges_of[one]]
        low, high = (float(np.median(edge)) for edge in zip(*ranges, strict=True))
        title = f"{load_findings().display(name)} (n = {len(found)})"
        shown = [own[one] for one in found]
        profiles.append(_mean_profile(title, shown, band_mm=(low, high)))
    return profiles


def _mean_profile(
    title: str, stacks: Sequence[Stack], *, band_mm: tuple[float, float] | None = None
) -> Profile:
    position_mm, means = attention_by_position(stacks)
    return Profile(
        title=title, position_mm=position_mm, series={"attention": means}, band_mm=band_mm
    )


def _header(
    evaluation: Evaluation,
    *,
    title: str,
    enrichment: Enrichment | None,
    sections: Sequence[tuple[str, str, str]],
) -> str:
    cohort = (
        f"{evaluation.n_scans:,} {evaluation.split} scans of {evaluation.n_patients:,} patients, "
        f"{len(evaluation.findings)} finding{'s' * (len(evaluation.findings) != 1)}"
    )
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    return (
        '<header><div class="bar"><p class="eyebrow">ctfm report</p>'
        '<button id="theme" type="button">Light or dark</button></div>'
        f'<h1>{escape(title)}</h1><p class="lead">{escape(cohort)}</p>'
        f"{_cards(evaluation, enrichment)}"
        f'<p class="limits">{escape(LIMITS)}</p><nav>{links}</nav></header>\n'
    )


def _cards(evaluation: Evaluation, enrichment: Enrichment | None) -> str:
    low, high = evaluation.macro_ci
    used = evaluation.findings_used
    skipped = evaluation.findings_not_estimable
    least = evaluation.min_positives
    cards = [
        (
            "Macro AUC",
            number(evaluation.macro_auc),
            f"95% CI {number(low)}–{number(high)}, clustered by patient"
            if used
            else "no finding is estimable",
        ),
        (
            "SD across findings",
            number(evaluation.sd_across_findings),
            "how much findings differ; not a sampling error",
        ),
        (
            "Findings used",
            f"{used} of {len(evaluation.findings)}",
            f"{skipped} not estimable: fewer than {least} positives or negatives, or none in train",
        ),
        (
            "AUC ≥ 0.90",
            str(evaluation.auc_at_least_090),
            f"{evaluation.ci_low_at_least_090} with their whole interval",
        ),
        ("AUC 0.80–0.90", str(evaluation.auc_080_to_090), f"of {used} findings used"),
    ]
    if enrichment is not None:
        count = sum(finding.n > 0 for finding in enrichment.findings)
        note = f"median of {count} focal findings; 1 is even attention"
        cards.append(("Attention enrichment", f"{number(enrichment.median, 2)}×", note))
    return '<dl class="cards">' + "".join(map(_card, cards)) + "</dl>"


def _card(card: tuple[str, str, str]) -> str:
    name, value, note = map(escape, card)
    return f'<div><dt>{name}</dt><dd class="value">{value}</dd><dd class="note">{note}</dd></div>'


def _plot_section(evaluation: Evaluation) -> str:
    caption = (
        "Best first in each category. The dashed line and its band are the macro AUC and its 95% "
        f"interval. Hollow: fewer than {FEW_POSITIVES} positives, too few to claim anything. "
        "Intervals are the wider of logit-DeLong and Newcombe's method 5, clustered by patient."
    )
    return _figure(figures.auc_plot(evaluation), caption=caption)


_COLUMNS = (
    ("Finding", "text"),
    ("Category", "text"),
    ("n", "number"),
    ("n+", "number"),
    ("AUC", "number"),
    ("CI low", "number"),
    ("CI high", "number"),
    ("AP", "number"),
    ("Prevalence", "number"),
    ("Status", "text"),
)


def _table_section(evaluation: Evaluation) -> str:
    heads = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{name}</button></th>'
        for name, kind in _COLUMNS
    )
    rows = "".join(_table_row(finding, evaluation) for finding in evaluation.findings)
    return (
        '<div class="tools"><label>Filter <input id="filter" type="search" '
        'placeholder="finding or category"></label>'
        f'<a download="findings.csv" href="data:text/csv;charset=utf-8,'
        f'{quote(_csv(evaluation))}">Save as CSV</a></div>'
        f'<div class="scroll"><table id="findings-table"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        '<p class="caption">AP is average precision; a score that knows nothing reaches the '
        "prevalence. n counts scans whose label is known.</p>"
    )


def _table_row(finding: FindingResult, evaluation: Evaluation) -> str:
    category = evaluation.categories[finding.category]
    cells = []
    for (_, kind), value in zip(_COLUMNS, _cells(finding, category), strict=True):
        text = number(value) if isinstance(value, float) else str(value)
        cells.append(f'<td class="{kind}">{escape(text)}</td>')
    look = "" if finding.estimable and not finding.few_positives else ' class="few"'
    return f'<tr data-finding="{escape(finding.name)}"{look}>{"".join(cells)}</tr>'


def _cells(finding: FindingResult, category: str) -> tuple[str | int | float, ...]:
    return (
        finding.display,
        category,
        finding.n,
        finding.n_positive,
        finding.auc,
        finding.ci_low,
        finding.ci_high,
        finding.average_precision,
        finding.prevalence,
        finding.status,
    )


def _csv(evaluation: Evaluation) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *(name for name, _ in _COLUMNS)])
    for finding in evaluation.findings:
        cells = _cells(finding, evaluation.categories[finding.category])
        writer.writerow(map(_csv_cell, (finding.name, *cells)))
    return text.getvalue()


def _csv_cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if math.isfinite(value) else ""
    text = str(value)
    # A spreadsheet takes such a cell for a formula, and a name may come from a stranger's table.
    return f"'{text}" if text.startswith(tuple("=+-@\t\r")) else text


def _roc_section(curves: Sequence[figures.RocCurve]) -> str:
    caption = "True positive rate, upwards, over false positive rate; both from 0 to 1."
    return _figure(figures.roc_plot(curves), caption=caption) if curves else ""


def _training_section(history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    if not history:
        return ""
    if "member" in history[0]:
        return _members_section(history, summary)
    best = summary.get("best_epoch")

    def series(names: Mapping[str, str]) -> dict[str, list[float]]:
        return {
            shown: [_float(record.get(name)) for record in history]
            for name, shown in names.items()
            if any(name in record for record in history)
        }

    plot = figures.training_plot(
        [int(record["epoch"]) for record in history],
        loss=series({"train_loss": "training loss", "validation_loss": "validation loss"}),
        score=series(
            {
                "validation_macro_auc": "validation macro AUC",
                "validation_macro_ap": "validation macro AP",
            }
        ),
        best_epoch=best,
    )
    kept = f"The head of epoch {best} was kept: the best validation macro AUC. " if best else ""
    note = (
        "Training loss is the mean while parameters moved; validation loss is at the epoch's end."
    )
    return _figure(plot, caption=kept + note)


def _members_section(history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """A curve each of the heads that answer together, and a line with what came of it."""
    of_member: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in history:
        of_member.setdefault(str(record["member"]), {})[int(record["epoch"])] = record
    epochs = sorted({epoch for records in of_member.values() for epoch in records})
    best = {
        name: max((epoch for epoch in records if records[epoch].get("best")), default=max(records))
        for name, records in of_member.items()
    }

    def curves(value: str) -> dict[str, list[float]]:
        return {
            name: [_float(records.get(epoch, {}).get(value)) for epoch in epochs]
            for name, records in of_member.items()
        }

    plot = figures.training_plot(
        epochs,
        loss=curves("validation_loss"),
        score=curves("validation_macro_auc"),
        best_epochs=best,
    )
    caption = (
        "Validation loss and validation macro AUC of each member. The dots are the epochs whose "
        "heads were kept: the best validation macro AUC."
    )
    last = {name: max(records) for name, records in of_member.items()}
    return _figure(plot, caption=caption) + _members_table(summary, best=best, last=last)


def _members_table(
    summary: Mapping[str, Any], *, best: Mapping[str, int], last: Mapping[str, int]
) -> str:
    about = {str(member["name"]): member for member in summary.get("members", ())}
    rows = ""
    for name in best:
        auc = about.get(name, {}).get("macro_auc", {})
        scans = about.get(name, {}).get("scans", {})
        cells = [
            " / ".join(str(scans.get(split, "–")) for split in SPLITS),
            f"{best[name]} of {last[name]}",
            number(_float(auc.get("validation"))),
            number(_float(auc.get("test"))),
        ]
        numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        rows += f'<tr><td class="text">{escape(name)}</td>{numbers}</tr>'
    heads = "".join(f'<th class="number">{name}</th>' for name in _MEMBER_COLUMNS)
    return (
        f'<div class="scroll"><table class="narrow"><thead><tr><th class="text">Member</th>{heads}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="caption">AUC is the macro AUC of the member alone, on its own validation and '
        "test part; with folds, each has another test part.</p>"
    )


_MEMBER_COLUMNS = (
    "Scans, train / validation / test",
    "Best epoch",
    "Validation AUC",
    "Test AUC",
)


def _attention_section(profiles: Sequence[Profile], enrichment: Enrichment | None) -> str:
    drawn = [profile for profile in profiles if len(profile.position_mm)]
    wide, small = drawn[:1], drawn[1:]
    parts = [_figure(_profile(profile, width_px=920)) for profile in wide]
    if small:
        panels = "".join(f"<div>{_profile(profile, width_px=300)}</div>" for profile in small)
        caption = (
            "Scans with the finding: mean attention, relative to even attention. Shaded is where "
            "the finding lies (median of the lowest and of the highest places)."
        )
        parts.append(_figure(f'<div class="panels">{panels}</div>', caption=caption))
    if enrichment is not None:
        parts.append(_enrichment_table(enrichment))
    return "".join(parts)


def _profile(profile: Profile, *, width_px: float) -> str:
    return figures.position_plot(
        profile.position_mm,
        profile.series,
        title=profile.title,
        band_mm=profile.band_mm,
        width_px=width_px,
    )


def _enrichment_table(enrichment: Enrichment) -> str:
    rows = "".join(
        f'<tr data-finding="{escape(finding.name)}"><td class="text">{escape(finding.display)}</td>'
        f'<td class="number">{number(finding.median, 2)}</td>'
        f'<td class="number">{finding.n}</td><td class="number">{finding.n_positive}</td></tr>'
        for finding in enrichment.findings
    )
    return (
        "<h3>Enrichment</h3>"
        '<div class="scroll"><table class="narrow"><thead><tr><th class="text">Finding</th>'
        '<th class="number">Enrichment</th><th class="number">True positives</th>'
        f'<th class="number">Positives</th></tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="caption">Attention on the slices that the finding touches, over their share of '
        "the stack: the median over true positive scans, called at a threshold chosen on the "
        "validation split (Youden). 1 is even attention.</p>"
    )


def _by_store(run: Run) -> dict[str, Mapping[str, Any]]:
    if len(run.stores) == 1:
        return {"store": run.stores[0].settings}
    return {f"store {i}": store.settings for i, store in enumerate(run.stores, start=1)}


def _provenance_section(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    command = shlex.join(map(str, summary.get("command") or ()))
    shown = {
        name: value
        for name, value in summary.items()
        if name not in ("command", "findings", "routing", "members")
    }
    plain = {name: value for name, value in shown.items() if not isinstance(value, Mapping)}
    groups = {"run": plain, **{name: value for name, value in shown.items() if name not in plain}}
    groups |= {f"settings: {name}": value for name, value in settings.items()}
    blocks = "".join(
        f"<div><h3>{escape(name.replace('_', ' '))}</h3>{_pairs(values)}</div>"
        for name, values in groups.items()
        if values
    )
    typed = f'<pre class="command">{escape(command)}</pre>' if command else ""
    if "…/" in command:
        typed += f'<p class="caption">{escape(LEFT_OUT)}</p>'
    return f'{typed}<div class="provenance">{blocks}</div>'


def _pairs(values: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in _flat(values)
    )
    return f'<dl class="pairs">{lines}</dl>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", _plain_text(value)))
    return lines


def _plain_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _figure(content: str, *, caption: str = "") -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{content}</div>{below}</figure>'


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
