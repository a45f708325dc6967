"""The figure of `planted_experts.py`: its record, to one SVG file.

A line an amount of conflict, from K to macro AUC, with its interval over seeds; to the right, as
open dots, the controls. Dashed: what a reader of each region alone reaches, and what a linear
reader of the evenly pooled scan reaches. The same record gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH_PX, PLOT_PX, LEFT_PX, TOP_PX, STEP_PX = 790, 320, 150, 24, 48
LOW, HIGH, TICKS = 0.65, 0.95, (0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95)
COLOURS = ("#7b8794", "#5b8fb9", "#0f6fa8", "#c2571a")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1a2430}.quiet{fill:#5d6a78}"
    ".grid{stroke:#e1e6eb}.dashed{stroke:#5d6a78;stroke-dasharray:5 4}rect{fill:#fff}"
)


def across(column: float) -> float:
    """Place of a column: the number of experts, then the controls."""
    return LEFT_PX + STEP_PX * column


def down(auc: float) -> float:
    """Place of a macro AUC."""
    return TOP_PX + PLOT_PX * (HIGH - auc) / (HIGH - LOW)


def figure_svg(
    record: Mapping[str, Any], *, experts: Sequence[int], controls: Mapping[str, str], at: str
) -> str:
    """The figure as text.

    Args:
        record: What `planted_experts.py` writes, as plain values.
        experts: Numbers of experts, rising.
        controls: What the figure calls heads that are not a number of experts.
        at: The amount of conflict at which those were fitted.
    """
    columns = {f"K={number}": float(number) for number in experts}
    beside = {name: experts[-1] + 1.5 * (i + 1) for i, name in enumerate(controls)}
    names = {f"K={number}": str(number) for number in experts} | dict(controls)
    parts = _frame(record, at=at)
    parts += [_text(across((columns | beside)[name]), label) for name, label in names.items()]
    for colour, (conflict, found) in zip(COLOURS, record["conflict"].items(), strict=True):
        aucs = {name: head["macro_auc"] for name, head in found["heads"].items()}
        line = [(columns[name], aucs[name]) for name in columns if name in aucs]
        parts.append(_line(line, colour))
        parts += [_dot(column, auc, colour, fill=colour) for column, auc in line]
        if conflict == at:
            parts += [_dot(beside[name], aucs[name], colour, fill="#fff") for name in controls]
        start = down(line[0][1]["mean"]) + 4
        parts.append(
            f'<text x="{across(0) - 10}" y="{start:.1f}" text-anchor="end">{conflict}</text>'
        )
    return "".join([*parts, "</svg>\n"])


def _frame(record: Mapping[str, Any], *, at: str) -> list[str]:
    height = TOP_PX + PLOT_PX + 60
    right = WIDTH_PX - 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {height}" '
        f'width="{WIDTH_PX}" height="{height}"><style>{STYLE}</style>'
        "<title>Macro AUC against the number of experts</title>"
        f'<rect width="{WIDTH_PX}" height="{height}"/>'
        f'<text class="quiet" x="{LEFT_PX - 95}" y="14">macro AUC</text>'
        f'<text class="quiet" x="{LEFT_PX - 10}" y="{down(LOW) - 8}" text-anchor="end">'
        "conflict</text>"
        f'<text class="quiet" x="{across(4)}" y="{height - 8}" text-anchor="middle">'
        "number of experts K</text>"
    ]
    for tick in TICKS:
        y = down(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT_PX - 60}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="quiet" x="{LEFT_PX - 95}" y="{y + 4:.1f}">{tick:.2f}</text>'
        )
    shared = record["shared_readout_auc"][at]
    for auc, label in (
        (record["own_region_auc"], "each region read by itself"),
        (shared, f"one linear reader, conflict {at}"),
    ):
        y = down(auc)
        parts.append(
            f'<line class="dashed" x1="{LEFT_PX - 60}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="quiet" x="{right}" y="{y - 5:.1f}" text-anchor="end">{label}</text>'
        )
    return parts


def _text(x: float, label: str) -> str:
    """Of a column, its words one below the other."""
    lines = "".join(
        f'<tspan x="{x:.1f}" dy="{14 if i else 0}">{escape(word)}</tspan>'
        for i, word in enumerate(label.split("\n"))
    )
    return f'<text y="{down(LOW) + 18:.1f}" text-anchor="middle">{lines}</text>'


def _line(line: Sequence[tuple[float, Mapping[str, float]]], colour: str) -> str:
    points = " ".join(f"{across(x):.1f},{down(auc['mean']):.1f}" for x, auc in line)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _dot(column: float, auc: Mapping[str, float], colour: str, *, fill: str) -> str:
    x, high, low = across(column), down(auc["high"]), down(auc["low"])
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{high:.1f}" y2="{low:.1f}" stroke="{colour}" '
        f'stroke-width="2"/><circle cx="{x:.1f}" cy="{down(auc["mean"]):.1f}" r="4" '
        f'fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
    )
