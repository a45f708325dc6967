"""The figure of a sweep: marginal effects, to one SVG file.

A row a value of a factor, a dot at the mean macro AUC over all other factors, a bar of one standard
deviation over seeds to either side. The same effects give the same bytes.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ctfm.heads.sweep import Effect
from ctfm.store.files import publish_bytes

ROW_PX, LEFT_PX, PLOT_PX, MARGIN_PX = 22, 190, 420, 30
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1a2430}.quiet{fill:#5d6a78}"
    "line{stroke:#aab4bf}.bar{stroke:#0f6fa8;stroke-width:2}circle{fill:#0f6fa8}"
)


def write_effects(effects: Sequence[Effect], path: Path) -> None:
    """Draw effects and publish the file.

    Args:
        effects: As `marginal_effects` gives them.
        path: The SVG file.
    """
    publish_bytes(path, effects_svg(effects).encode())


def effects_svg(effects: Sequence[Effect]) -> str:
    """The figure as text."""
    spread = [0.0 if math.isnan(one.seed_sd) else one.seed_sd for one in effects]
    low = min((e.mean - s for e, s in zip(effects, spread, strict=True)), default=0.0)
    high = max((e.mean + s for e, s in zip(effects, spread, strict=True)), default=1.0)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)

    def across(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return LEFT_PX + PLOT_PX * share

    height = ROW_PX * (len(effects) + 2)
    width = LEFT_PX + PLOT_PX + MARGIN_PX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>'
        "<title>Marginal effect of each setting</title>"
    ]
    for row, (effect, sd) in enumerate(zip(effects, spread, strict=True)):
        y = ROW_PX * (row + 1)
        label = escape(f"{effect.factor} = {effect.value}")
        parts.append(f'<text x="4" y="{y + 4}">{label}</text>')
        left, right = across(effect.mean - sd), across(effect.mean + sd)
        parts.append(f'<line class="bar" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle cx="{across(effect.mean):.1f}" cy="{y}" r="4"/>')
    bottom = ROW_PX * (len(effects) + 1)
    for value in (low, (low + high) / 2, high):
        x = across(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{bottom - 6}"/>')
        parts.append(
            f'<text class="quiet" x="{x:.1f}" y="{bottom + 10}" text-anchor="middle">'
            f"{value:.3f}</text>"
        )
    return "".join([*parts, "</svg>\n"])
