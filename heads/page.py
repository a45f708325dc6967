"""The page: a body in HTML, to one file with style and script inside.

Its content security policy allows no network at all: one style sheet and one script, both named by
their digest, and pictures in data URIs. Without the script everything is still there to read; it
sorts and filters the table and switches the theme. Nothing here knows what the page is about.
"""

import base64
import hashlib
from html import escape

from ctfm.heads import figures

_LIGHT = {
    "page": "#f5f6f8",
    "surface": "#ffffff",
    "ink": "#17202b",
    "muted": "#586573",
    "line": "#e1e6eb",
    "accent": "#0f6fa8",
    "warm": "#fbf3e9",
    "warm-line": "#e9cfae",
}
_DARK = {
    "page": "#0e1318",
    "surface": "#161c23",
    "ink": "#e7ecf2",
    "muted": "#9aa7b5",
    "line": "#2a333d",
    "accent": "#62b6ea",
    "warm": "#241d14",
    "warm-line": "#5b4526",
}

STYLE = (
    figures.themed("", light=_LIGHT, dark=_DARK)
    + """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; color-scheme: light dark; }
:root[data-theme="light"] { color-scheme: light; } :root[data-theme="dark"] { color-scheme: dark; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; }
header, main { max-width: 1060px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 28px; }
.bar { display: flex; justify-content: space-between; align-items: center; }
.eyebrow { margin: 0; font-size: 12.5px; letter-spacing: .08em; text-transform: uppercase;
  color: var(--muted); font-weight: 600; }
h1 { margin: 6px 0 2px; font-size: 32px; line-height: 1.2; letter-spacing: -.015em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 16px; font-size: 20px; letter-spacing: -.01em; }
h3 { margin: 22px 0 8px; font-size: 14.5px; }
.lead { margin: 0 0 22px; color: var(--muted); font-size: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); gap: 12px;
  margin: 0; }
.cards > div { background: var(--surface); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px 14px; display: flex; flex-direction: column; }
.cards dt { font-size: 13px; color: var(--muted); font-weight: 600; }
.cards dd { margin: 0; }
.cards .value { order: -1; font-size: 27px; font-weight: 650; letter-spacing: -.02em;
  line-height: 1.3; font-variant-numeric: tabular-nums; }
.cards > div:first-child .value { color: var(--accent); }
.cards .note { margin-top: 3px; font-size: 12.5px; line-height: 1.4; color: var(--muted); }
.limits { margin: 14px 0 0; padding: 11px 16px; border: 1px solid var(--warm-line);
  background: var(--warm); border-radius: 10px; font-size: 13.5px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 18px 0 14px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 12px;
  padding: 24px 26px; margin: 0 0 18px; }
figure { margin: 0; }
figure + figure { margin-top: 24px; }
figcaption, .caption { margin: 12px 0 0; font-size: 13px; color: var(--muted); max-width: 78ch; }
.scroll { overflow-x: auto; }
.scroll > svg { min-width: 680px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr));
  gap: 10px 26px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
table.narrow { width: auto; min-width: 460px; }
th { padding: 0 10px 6px; border-bottom: 1px solid var(--muted); white-space: nowrap;
  font-size: 12.5px; color: var(--muted); font-weight: 600; }
td { padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td:first-child { white-space: normal; min-width: 190px; }
.text { text-align: left; } .number { text-align: right; }
tr.few td { color: var(--muted); }
tbody tr:hover td { background: var(--page); }
th button { all: unset; cursor: pointer; }
th button:focus-visible, #theme:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 3px; border-radius: 3px; }
th[aria-sort="ascending"] button::after { content: " ↑"; }
th[aria-sort="descending"] button::after { content: " ↓"; }
.tools { display: flex; flex-wrap: wrap; gap: 10px 20px; justify-content: space-between;
  align-items: center; margin-bottom: 14px; font-size: 13.5px; color: var(--muted); }
input, #theme { font: inherit; color: var(--ink); background: var(--surface);
  border: 1px solid var(--line); border-radius: 7px; padding: 5px 10px; }
input { width: 240px; margin-left: 6px; }
#theme { cursor: pointer; font-size: 13px; }
.command { margin: 0; padding: 12px 14px; background: var(--page); border-radius: 8px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.provenance { columns: 2; column-gap: 40px; margin-top: 20px; }
.provenance > div { break-inside: avoid-column; padding-bottom: 20px; }
.provenance h3 { margin-top: 0; } .provenance h3::first-letter { text-transform: uppercase; }
.pairs { margin: 0; font-size: 13px; }
.pairs > div { display: flex; justify-content: space-between; gap: 18px; padding: 3px 0;
  border-bottom: 1px solid var(--line); }
.pairs dt { color: var(--muted); white-space: nowrap; }
.pairs dd { margin: 0; text-align: right; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
@media (max-width: 720px) { .provenance { columns: 1; } section { padding: 18px 16px; }
  header, main { padding-left: 12px; padding-right: 12px; } }
@media print { body { background: none; } section { border: none; padding: 12px 0; }
  nav, .tools, #theme { display: none; } tr, figure > svg { break-inside: avoid; } }
"""
    + figures.CSS
)

SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.getElementById("theme")?.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
  });
  const table = document.getElementById("findings-table");
  if (!table) return;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, column, numeric) => {
    const text = row.cells[column].textContent;
    return numeric ? parseFloat(text) : text.toLowerCase();
  };
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const numeric = head.classList.contains("number");
    const was = head.getAttribute("aria-sort");
    const falling = was ? was === "ascending" : numeric;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const order = (a, b) => {
      const x = value(a, column, numeric), y = value(b, column, numeric);
      if (x !== x || y !== y) return (x !== x) - (y !== y);
      return (x < y ? -1 : x > y ? 1 : 0) * (falling ? -1 : 1);
    };
    body.append(...[...body.rows].sort(order));
  }));
  document.getElementById("filter")?.addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
})();
"""


def html_page(body: str, *, title: str) -> str:
    """A whole HTML file around a body.

    Args:
        body: HTML, made of escaped text. A `style` attribute or an inline handler in it has no
            effect: the policy forbids them.
        title: Plain text.
    """
    policy = (
        f"default-src 'none'; style-src '{_source(STYLE)}'; script-src '{_source(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _source(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
