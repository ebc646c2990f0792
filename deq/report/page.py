"""The report as one HTML file that opens from a disk: script, data and styles are in it, nothing is fetched."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from deq.report.figures.style import DARK, Figure, Look, Missing, Row
from deq.report.runs import now
from deq.report.tables import Cell, Gap, Table, Text

_CSS = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff;
  --ground: #f7f8fa; --accent: #0072b2; --warm: #fffaf0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #363b44; --paper: #1b1e24;
  --ground: #121418; --accent: #6cb8ee; --warm: #2a2418; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.5rem; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 34px 0 10px; }
h3 { font-size: 1rem; margin: 0 0 4px; }
p { margin: 6px 0; max-width: 80ch; }
code { font: 0.86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
a { color: var(--accent); }
.soft { color: var(--soft); }
.headline { font-size: 1.12rem; margin: 14px 0; padding: 12px 16px; background: var(--paper);
  border-left: 4px solid var(--accent); max-width: none; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px;
  margin: 0 0 16px; }
.warning { border-left: 4px solid #e69f00; padding: 6px 14px; background: var(--warm); margin: 6px 0; max-width: none; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0 0; font-size: 0.92rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
ul { padding-left: 20px; margin: 6px 0; } li { margin: 5px 0; }
.scroll { overflow-x: auto; max-height: 80vh; overflow-y: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  background: var(--paper); }
th { font-weight: 600; color: var(--soft); font-size: 0.8rem; line-height: 1.25; vertical-align: bottom;
  position: sticky; top: 0; z-index: 1; min-width: 76px; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; max-width: 270px; min-width: 150px;
  white-space: normal; overflow-wrap: anywhere; }
th:first-child { z-index: 2; }
table.words th, table.words td { text-align: left; }
td.long { white-space: normal; min-width: 260px; }
td small { display: block; color: var(--soft); font-size: 0.86em; }
.note { color: var(--soft); font-size: 0.87rem; margin-top: 8px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 10px 16px; }
.panels .plot { display: block; width: 100%; min-width: 0; }
#vg-tooltip-element td { background: none; border: 0; white-space: normal; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 2px; }
.legend button { display: inline-flex; align-items: center; gap: 7px; border: 0; background: none; padding: 3px 2px;
  font: inherit; font-size: 0.86rem; color: var(--ink); cursor: pointer; text-align: left; }
.legend button[aria-pressed="false"] { opacity: 0.35; text-decoration: line-through; }
.legend svg { flex: none; }
@media (max-width: 600px) { main { padding: 14px 10px 40px; } .card { padding: 12px 10px; }
  dl { grid-template-columns: 1fr; }
  dt { margin-top: 6px; } th:first-child, td:first-child { max-width: 150px; min-width: 110px; } }
"""

_SCRIPT = """
const figures = JSON.parse(document.getElementById("plots").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = {};

// Draws one panel: without the rows that the legend hides, and in the colours of the reader's screen.
async function draw(id) {
  const div = document.getElementById(id);
  const off = new Set();
  for (const button of div.closest(".figure").querySelectorAll(".legend [aria-pressed=false]"))
    off.add(button.dataset.entry);
  let text = JSON.stringify(figures[id]);
  if (dark.matches)
    for (const [light, night] of Object.entries(NIGHT)) text = text.replaceAll(`"${light}"`, `"${night}"`);
  const spec = JSON.parse(text);
  for (const [name, rows] of Object.entries(spec.datasets))
    spec.datasets[name] = rows.filter((row) => !off.has(row.entry));
  views[id]?.finalize();
  // The page lets no script make code of text: ast.
  views[id] = await vegaEmbed(div, spec, {
    actions: false, renderer: "svg", ast: true, tooltip: {theme: dark.matches ? "dark" : "light"}});
}

const redraw = () => Object.keys(figures).forEach(draw);
redraw();
dark.addEventListener("change", redraw);
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    for (const div of button.closest(".figure").querySelectorAll(".plot")) draw(div.id);
  });
}
"""


def page(text: Text, figures: Sequence[Figure | Missing], out: Path, bundle: str) -> str:
    """The whole file.

    Args:
        out: the folder that it will lie in, which links to run folders start from.
        bundle: what draws the figures, see :func:`deq.report.script.bundle`.
    """
    plots: Row = {}
    drawn = [_figure(figure, plots) if isinstance(figure, Figure) else _missing(figure) for figure in figures]
    tables = [_table(table, out) for table in text.main]
    sections = [
        ("run", "What was run", _conditions(text)),
        ("missing", "What is missing", _gaps(text.gaps, text.complete)),
        ("numbers", "Numbers", "".join(f"<p>{_escape(one)}</p>" for one in text.baselines) + "".join(tables)),
        *([("paper", text.paper.title, _table(text.paper, out, title=False, words=True))] if text.paper else []),
        ("figures", "Figures", "".join(drawn)),
        *([("trade", text.trades.title, _table(text.trades, out, title=False))] if text.trades else []),
        *([("knobs", text.knobs.title, _table(text.knobs, out, title=False, words=True))] if text.knobs else []),
        ("runs", "Runs", _table(text.runs, out, title=False, words=True)),
    ]
    body = "".join(f'<section><h2 id="{key}">{_escape(title)}</h2>{inner}</section>' for key, title, inner in sections)
    links = "".join(f'<a href="#{key}">{_escape(title)}</a>' for key, title, _ in sections)
    # "</script>" inside the data would end the script.
    data = json.dumps(plots, allow_nan=False).replace("<", "\\u003c")
    night = "".join(f'.legend line[stroke="{light}"]{{stroke:{dark}}}' for light, dark in DARK.items())
    night = f"@media (prefers-color-scheme: dark) {{{night}}}"
    script = f"const NIGHT = {json.dumps(DARK)};{_SCRIPT}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever is inside, the browser fetches nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data: blob:\">"
        # Without an icon of its own a browser asks for one.
        '<link rel="icon" href="data:,">'
        f"<title>{_escape(text.title)} · report</title><style>{_CSS}{night}</style>"
        f"<script>{bundle}</script></head><body><main>"
        f'<h1>{_escape(text.title)}</h1><p class="soft">Report of {now()}</p>'
        f'<p class="headline">{_escape(text.headline)}</p>'
        + "".join(f'<p class="warning">{_escape(one)}</p>' for one in text.warnings)
        + f"<nav>{links}</nav>{body}</main>"
        f'<script id="plots" type="application/json">{data}</script><script>{script}</script></body></html>\n'
    )


def _conditions(text: Text) -> str:
    entries = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in text.conditions)
    common = ""
    if text.common:
        common = (
            f'<details><summary class="soft note">Every knob that all arms share</summary>'
            f'<p class="note">{_escape(" · ".join(text.common))}</p></details>'
        )
    return f'<div class="card"><dl>{entries}</dl>{common}</div>'


def _gaps(gaps: Sequence[Gap], complete: str) -> str:
    if not gaps:
        return f"<p>{_escape(complete)}</p>"
    items = []
    for gap in gaps:
        command = f"<br><code>{_escape(gap.command)}</code>" if gap.command else ""
        items.append(f"<li>{_escape(gap.what)}{command}</li>")
    return f'<div class="card"><ul>{"".join(items)}</ul></div>'


def _table(table: Table, out: Path, *, title: bool = True, words: bool = False) -> str:
    heading = f"<h3>{_escape(table.title)}</h3>" if title else ""
    head = "".join(f"<th>{_escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(_cell(cell, out) for cell in row)}</tr>" for row in table.rows)
    note = f'<p class="note">{_escape(table.note)}</p>' if table.note else ""
    kind = ' class="words"' if words else ""
    return (
        f'<div class="card">{heading}<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}</div>"
    )


def _cell(cell: Cell, out: Path) -> str:
    text = _escape(cell.text)
    if cell.link is not None:
        target = Path(os.path.relpath(cell.link.resolve(), out.resolve())).as_posix()
        text = f'<a href="{_escape(_as_url(target))}/">{text}</a>'
    if cell.text.startswith("python "):
        text = f"<code>{text}</code>"
    detail = f"<small>{_escape(cell.detail)}</small>" if cell.detail else ""
    kind = ' class="long"' if len(cell.text) > 40 else ""
    return f"<td{kind}>{text}{detail}</td>"


def _as_url(path: str) -> str:
    return quote(path)


def _figure(figure: Figure, plots: Row) -> str:
    divs = []
    for number, spec in enumerate(figure.specs()):
        name = f"{figure.key}-panel-{number}"
        plots[name] = spec
        divs.append(f'<div class="plot" id="{name}"></div>')
    legend = "".join(_entry(look) for look in figure.looks)
    return (
        f'<figure class="card figure" id="{figure.key}" style="margin-inline:0"><h3>{_escape(figure.title)}</h3>'
        f'<div class="panels">{"".join(divs)}</div><div class="legend">{legend}</div>'
        f'<figcaption class="note">{_escape(figure.caption)} '
        f'<a href="{figure.key}.png">PNG</a></figcaption></figure>'
    )


def _entry(look: Look) -> str:
    """A line of the legend, which a click hides."""
    line = (
        f'<svg width="30" height="10" aria-hidden="true"><line x1="0" y1="5" x2="30" y2="5" stroke="{look.colour}" '
        f'stroke-width="{max(look.width, 1.5):g}" stroke-dasharray="{look.dash[0]} {look.dash[1]}" '
        f'stroke-opacity="{look.opacity:g}"/></svg>'
    )
    entry = _escape(look.entry)
    return f'<button type="button" aria-pressed="true" data-entry="{entry}">{line}{entry}</button>'


def _missing(missing: Missing) -> str:
    command = f" <code>{_escape(missing.command)}</code>" if missing.command else ""
    return (
        f'<div class="card" id="{missing.key}"><h3>{_escape(missing.title)}</h3>'
        f"<p>{_escape(missing.sentence)}{command}</p></div>"
    )


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
