"""Figures: numbers, to inline SVG.

Each function returns one `<svg>` as text, made of the classes of `CSS`: a page that includes `CSS`
shows it, light or dark. The same numbers give the same bytes. A figure has a `<title>`, and marks
of a finding carry `data-finding`. Nothing is drawn that needs a font's metrics: widths of texts
are estimated, and columns are wide enough for the longest.

Axes: e epochs, k points of a curve. Lengths are pixels of the drawing.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float

from ctfm.heads.evaluate import Evaluation, FindingResult

_LIGHT = {
    "series-1": "#0f6fa8",
    "series-2": "#c2571a",
    "series-3": "#5c7f2b",
    "series-4": "#8a4fa3",
    "band": "#0f6fa81f",
    "grid": "#e4e8ed",
    "axis": "#aab4bf",
    "text": "#1a2430",
    "quiet": "#5d6a78",
    "paper": "#ffffff",
}
_DARK = {
    "series-1": "#62b6ea",
    "series-2": "#f39a63",
    "series-3": "#a5c96f",
    "series-4": "#c99be0",
    "band": "#62b6ea2b",
    "grid": "#2a333d",
    "axis": "#56626f",
    "text": "#e7ecf2",
    "quiet": "#9aa7b5",
    "paper": "#161c23",
}


def themed(selector: str, *, light: Mapping[str, str], dark: Mapping[str, str]) -> str:
    """CSS variables in two themes: the reader's system chooses, or `data-theme` on the root.

    Args:
        selector: Of the elements below the root that get them; "" is the root itself.
        light: Variable, without its dashes, to value.
        dark: The same ones.
    """
    bright, dim = (
        "{ " + " ".join(f"--{name}: {value};" for name, value in theme.items()) + " }"
        for theme in (light, dark)
    )
    if_dark = f':root[data-theme="dark"] {selector}'.rstrip()
    unless_light = f':root:not([data-theme="light"]) {selector}'.rstrip()
    return (
        f"{f':root {selector}'.rstrip()} {bright}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ {unless_light} {dim} }}\n"
        f"@media screen {{ {if_dark} {dim} }}\n"
    )


CSS = (
    themed(".figure", light=_LIGHT, dark=_DARK)
    + """
.figure { display: block; width: 100%; height: auto; font-family: inherit; }
.figure text { fill: var(--text); font-size: 13px; font-variant-numeric: tabular-nums; }
.figure .small { font-size: 11.5px; }
.figure .quiet { fill: var(--quiet); }
.figure .strong { font-weight: 650; }
.figure .title { font-size: 13.5px; font-weight: 600; }
.figure .end { text-anchor: end; }
.figure .middle { text-anchor: middle; }
.figure .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 5px; }
.figure .grid { stroke: var(--grid); }
.figure .axis { stroke: var(--axis); }
.figure .dashed { stroke: var(--quiet); stroke-dasharray: 4 3; }
.figure .band { fill: var(--band); }
.figure .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.figure .s1 { stroke: var(--series-1); } .figure .s2 { stroke: var(--series-2); }
.figure .s3 { stroke: var(--series-3); } .figure .s4 { stroke: var(--series-4); }
.figure text.s1, .figure text.s2, .figure text.s3, .figure text.s4 { stroke: none; }
.figure text.s1 { fill: var(--series-1); } .figure text.s2 { fill: var(--series-2); }
.figure text.s3 { fill: var(--series-3); } .figure text.s4 { fill: var(--series-4); }
.figure circle.s1 { fill: var(--series-1); } .figure circle.s2 { fill: var(--series-2); }
.figure circle.s3 { fill: var(--series-3); } .figure circle.s4 { fill: var(--series-4); }
.figure .interval { stroke: var(--series-1); stroke-width: 2; stroke-linecap: round; opacity: .55; }
.figure .dot { fill: var(--series-1); }
.figure .few .interval { stroke: var(--quiet); opacity: .5; }
.figure .few .dot { fill: none; stroke: var(--quiet); stroke-width: 1.6; }
.figure .few text { fill: var(--quiet); }
.figure .hover { fill: transparent; }
.figure g:hover > .hover { fill: var(--band); }
"""
)
"""What the classes look like; see `themed` for how dark is chosen."""

_WIDTH_PX = 920.0


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start_px: float
    end_px: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start_px + share * (self.end_px - self.start_px)

    def ticks(self, most: int) -> list[float]:
        """Round values inside, at most so many."""
        return _ticks(self.low, self.high, most)


def auc_plot(evaluation: Evaluation) -> str:
    """AUC of each finding with its 95% interval, by category, best first; n+ beside it.

    Hollow and grey are findings with few positives; one without AUC says why.
    """
    lowest = min((f.ci_low for f in evaluation.findings if f.estimable), default=0.5)
    axis = _Axis(min(0.5, math.floor(lowest * 10) / 10), 1.0, 318.0, 690.0)
    body, top = [], 44.0
    for category, display in evaluation.categories.items():
        rows = sorted(
            (f for f in evaluation.findings if f.category == category),
            key=lambda f: (not f.estimable, -f.auc if f.estimable else 0.0, f.name),
        )
        body.append(_text(0, top + 20, display, css="strong"))
        top += 30
        for row in rows:
            body.append(_auc_row(row, axis=axis, top=top))
            top += 22
        top += 8
    parts = [*_auc_grid(axis, bottom=top), *_macro_marks(evaluation, axis=axis, bottom=top), *body]
    return _svg(parts, size=(_WIDTH_PX, top + 22), title="AUC of each finding with 95% interval")


def training_plot(
    epochs: Sequence[int],
    *,
    loss: Mapping[str, Sequence[float]],
    score: Mapping[str, Sequence[float]],
    best_epoch: int | None = None,
    best_epochs: Mapping[str, int] | None = None,
) -> str:
    """Losses on the left, scores on the right, over the epochs; the best epoch is marked.

    Args:
        epochs: Their numbers.
        loss: Name to value at each epoch; NaN leaves a gap.
        score: Name to value at each epoch, such as the validation macro AUC.
        best_epoch: Whose head was kept.
        best_epochs: Name of a curve to that of its head, where each is of another.
    """
    gap, height = 56.0, 270.0
    width = (_WIDTH_PX - gap) / 2
    parts: list[str] = []
    for i, series in enumerate((loss, score)):
        left = i * (width + gap)
        parts += _line_panel(
            epochs,
            series,
            box=(left + 46, 34, left + width - 8, height - 40),
            mark=best_epoch,
            dots=best_epochs or {},
            label="epoch",
        )
    return _svg(parts, size=(_WIDTH_PX, height), title="Loss and macro AUC over the epochs")


@dataclass(frozen=True, kw_only=True, eq=False)
class RocCurve:
    """One panel of `roc_plot`."""

    name: str
    display: str
    note: str
    """Such as `AUC 0.91, n+ 31`."""
    false_positive_rate: Float[np.ndarray, " k"]
    true_positive_rate: Float[np.ndarray, " k"]


def roc_plot(curves: Sequence[RocCurve], *, columns: int = 5) -> str:
    """ROC curves, one small panel a finding, in the order given.

    Args:
        curves: At most a few hundred points each: they are drawn as they are.
        columns: Panels of a line.
    """
    width = _WIDTH_PX / columns
    height = width + 40
    parts = []
    for i, curve in enumerate(curves):
        row, column = divmod(i, columns)
        parts.append(_roc_panel(curve, left=column * width, top=row * height, size=width - 22))
    rows = math.ceil(len(curves) / columns)
    return _svg(
        parts, size=(_WIDTH_PX, max(rows * height - 18, 1)), title="ROC curve of each finding"
    )


def position_plot(
    position_mm: Sequence[float] | Float[np.ndarray, " k"],
    series: Mapping[str, Sequence[float] | Float[np.ndarray, " k"]],
    *,
    title: str,
    band_mm: tuple[float, float] | None = None,
    width_px: float = _WIDTH_PX,
) -> str:
    """Something of each slice (attention, the weight of an expert) by the slice's place.

    Args:
        position_mm: z in the head frame, 0 at the vertex and falling.
        series: Name to values. 1 is marked as even attention.
        title: What a screen reader says, and what stands above.
        band_mm: Range of z to shade, such as where a finding lies.
        width_px: Of the drawing.
    """
    depth = -np.asarray(position_mm, dtype=float)
    order = np.argsort(depth, kind="stable")
    shaded = None if band_mm is None else (-max(band_mm), -min(band_mm))
    height = 250.0 if width_px > 400 else 190.0
    parts = _line_panel(
        depth[order].tolist(),
        {name: np.asarray(values)[order].tolist() for name, values in series.items()},
        box=(34, 30, width_px - 10, height - 40),
        mark=None,
        label="mm below the vertex",
        band=shaded,
        even=1.0,
    )
    parts.append(_text(0, 14, title, css="title"))
    return _svg(parts, size=(width_px, height), title=title)


def _auc_grid(axis: _Axis, *, bottom: float) -> list[str]:
    parts = []
    for tick in axis.ticks(8):
        x = axis(tick)
        parts.append(_line(x, 40, x, bottom, css="grid"))
        for y in (33.0, bottom + 16):
            parts.append(_text(x, y, f"{tick:.1f}", css="small quiet middle"))
    for x, heading in ((_WIDTH_PX - 144, "AUC"), (_WIDTH_PX - 62, "95% CI"), (_WIDTH_PX, "n+")):
        parts.append(_text(x, 33, heading, css="small quiet end"))
    return parts


def _macro_marks(evaluation: Evaluation, *, axis: _Axis, bottom: float) -> list[str]:
    if not evaluation.findings_used:
        return []
    x = axis(evaluation.macro_auc)
    low, high = (axis(max(value, axis.low)) for value in evaluation.macro_ci)
    label = f"macro {evaluation.macro_auc:.3f}"
    return [
        f'<rect class="band" {_place(low, 40)} {_size(high - low, bottom - 40)}/>',
        _line(x, 20, x, 23, css="dashed"),
        _line(x, 40, x, bottom, css="dashed"),
        _text(x, 14, label, css="small strong middle"),
    ]


def _auc_row(row: FindingResult, *, axis: _Axis, top: float) -> str:
    middle = top + 11
    baseline = middle + 4.5
    parts = [
        f'<rect class="hover" {_place(0, top)} {_size(_WIDTH_PX, 22)}/>',
        _text(12, baseline, _shortened(row.display, 44)),
        _text(_WIDTH_PX, baseline, str(row.n_positive), css="end"),
    ]
    if row.estimable:
        interval = f"{row.ci_low:.2f}–{row.ci_high:.2f}"
        says = f"{row.display}: AUC {row.auc:.3f}, 95% CI {interval}, {row.n_positive} of {row.n}"
        parts += [
            _line(axis(row.ci_low), middle, axis(row.ci_high), middle, css="interval"),
            f'<circle class="dot" cx="{_n(axis(row.auc))}" cy="{_n(middle)}" r="4.2"/>',
            _text(_WIDTH_PX - 144, baseline, f"{row.auc:.3f}", css="end strong"),
            _text(_WIDTH_PX - 62, baseline, interval, css="end quiet small"),
        ]
    else:
        says = f"{row.display}: {row.status}"
        parts.append(_text(axis.start_px + 6, baseline, row.status, css="small quiet halo"))
    css = "" if row.estimable and not row.few_positives else ' class="few"'
    content = f"<title>{escape(says)}</title>" + "".join(parts)
    return f'<g data-finding="{escape(row.name)}"{css}>{content}</g>'


def _line_panel(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    box: tuple[float, float, float, float],
    mark: float | None,
    label: str,
    dots: Mapping[str, float] | None = None,
    band: tuple[float, float] | None = None,
    even: float | None = None,
) -> list[str]:
    """Curves in a frame (left, top, right, bottom), their names above, a grid behind.

    Names that do not fit are left to who points at a curve.
    """
    left, top, right, bottom = box
    known = [v for values in series.values() for v in values if math.isfinite(v)]
    across = _Axis(*_spread(list(x)), left, right)
    up = _Axis(*_spread(known + ([even] if even is not None else []), margin=0.06), bottom, top)
    parts = []
    if band is not None:
        start, end = (across(min(max(v, across.low), across.high)) for v in band)
        parts.append(
            f'<rect class="band" {_place(start, top)} {_size(end - start, bottom - top)}/>'
        )
    middle = (left + right) / 2
    label_right = mark is None or across(mark) < middle
    parts += _panel_grid(across, up, label=label, label_right=label_right)
    if even is not None:
        parts.append(_line(left, up(even), right, up(even), css="dashed"))
    for css, (name, values) in zip(_series_css(), series.items(), strict=False):
        path = _path(x, values, across=across, up=up)
        says = f"<title>{escape(name)}</title>"
        parts.append(f'<path class="curve {css}" d="{path}">{says}</path>')
        at = (dots or {}).get(name)
        if at is not None and at in x and math.isfinite(value := values[list(x).index(at)]):
            place = f'cx="{_n(across(at))}" cy="{_n(up(value))}"'
            parts.append(f'<circle class="{css}" {place} r="4">{says}</circle>')
    if len(series) > 1 and sum(map(_legend_px, series)) <= right - left:
        parts += _legend(series, left=left, top=top - 10)
    if mark is not None and x:
        at = across(mark)
        parts.append(_line(at, top, at, bottom + 20, css="dashed"))
        parts.append(_text(at, bottom + 33, f"best: {mark}", css="small strong middle"))
    return parts


def _legend(names: Iterable[str], *, left: float, top: float) -> list[str]:
    parts = []
    for css, name in zip(_series_css(), names, strict=False):
        parts.append(_text(left, top, name, css=f"{css} small strong"))
        left += _legend_px(name)
    return parts


def _legend_px(name: str) -> float:
    return 7.0 * len(name) + 18  # wide enough for any sans serif at this size


def _series_css() -> Iterator[str]:
    """Classes of colour, over and over."""
    return itertools.cycle(("s1", "s2", "s3", "s4"))


def _panel_grid(across: _Axis, up: _Axis, *, label: str, label_right: bool) -> list[str]:
    parts = []
    ticks = up.ticks(5)
    digits = _digits(ticks)
    for tick in ticks:
        parts.append(_line(across.start_px, up(tick), across.end_px, up(tick), css="grid"))
        text = f"{tick:.{digits}f}"
        parts.append(_text(across.start_px - 7, up(tick) + 4, text, css="small quiet end"))
    parts.append(_line(across.start_px, up.start_px, across.end_px, up.start_px, css="axis"))
    for tick in across.ticks(8):
        text = f"{tick:g}"
        parts.append(_text(across(tick), up.start_px + 16, text, css="small quiet middle"))
    x, css = (across.end_px, "small quiet end") if label_right else (across.start_px, "small quiet")
    parts.append(_text(x, up.start_px + 33, label, css=css))
    return parts


def _roc_panel(curve: RocCurve, *, left: float, top: float, size: float) -> str:
    across = _Axis(0.0, 1.0, left + 1, left + size)
    up = _Axis(0.0, 1.0, top + 34 + size, top + 35)
    points = _path(
        curve.false_positive_rate.tolist(),
        curve.true_positive_rate.tolist(),
        across=across,
        up=up,
    )
    return (
        f'<g data-finding="{escape(curve.name)}">'
        f"<title>{escape(f'{curve.display}: {curve.note}')}</title>"
        + _text(left, top + 12, _shortened(curve.display, int(size / 7.2)), css="small strong")
        + _text(left, top + 27, curve.note, css="small quiet")
        + f'<rect class="hover grid" {_place(left + 1, top + 35)} {_size(size - 1, size - 1)}/>'
        + _line(across(0), up(0), across(1), up(1), css="grid")
        + f'<path class="curve s1" d="{points}"/></g>'
    )


def _svg(parts: Sequence[str], *, size: tuple[float, float], title: str) -> str:
    content = f"<title>{escape(title)}</title>" + "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" role="img" '
        f'aria-label="{escape(title)}" viewBox="0 0 {_n(size[0])} {_n(size[1])}">{content}</svg>'
    )


def _text(x: float, y: float, text: str, *, css: str = "") -> str:
    look = f' class="{css.strip()}"' if css.strip() else ""
    return f'<text x="{_n(x)}" y="{_n(y)}"{look}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, *, css: str) -> str:
    return f'<path class="{css}" d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}"/>'


def _path(x: Sequence[float], y: Sequence[float], *, across: _Axis, up: _Axis) -> str:
    """Path through the points; one that is not finite leaves a gap."""
    steps, pen_down = [], False
    for one, other in zip(x, y, strict=True):
        finite = math.isfinite(other)
        if finite:
            command = "L" if pen_down else "M"
            steps.append(f"{command}{_n(across(one))} {_n(up(other))}")
        pen_down = finite
    return "".join(steps)


def _place(x: float, y: float) -> str:
    return f'x="{_n(x)}" y="{_n(y)}"'


def _size(width: float, height: float) -> str:
    return f'width="{_n(max(width, 0))}" height="{_n(max(height, 0))}"'


def _n(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough, and -0 is 0."""
    return f"{round(value, 1) + 0.0:g}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _spread(values: Sequence[float], *, margin: float = 0.0) -> tuple[float, float]:
    """Lowest and highest value with a margin, never of no width."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    extra = margin * (high - low)
    return (low - extra, high + extra) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _digits(ticks: Sequence[float]) -> int:
    """Decimals that tell the ticks apart."""
    return next((n for n in range(6) if all(round(t, n) == t for t in ticks)), 6)
