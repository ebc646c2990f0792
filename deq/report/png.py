"""The figures as PNG files, drawn with matplotlib: a cluster has no browser to draw the page's with."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from deq.report.figures import Bars, Figure, Heat, Panel, Style

_DASHES: dict[str, Any] = {"solid": "-", "dash": "--", "dot": ":"}
_MOST_BARS = 18
_DPI = 130
_WIDTH = 9.6  # inches


def save(figure: Figure, path: Path) -> None:
    """Draw a figure into a PNG file.

    Raises:
        OSError: the file cannot be written.
    """
    columns = min(2, len(figure.panels))
    lines = -(-len(figure.panels) // columns)
    bars = max((len(_shown_bars(panel.bars)) for panel in figure.panels if panel.bars), default=0)
    height = 1.1 + 0.42 * bars if bars else 3.7 * lines
    longest = max((len(style.entry) for style in figure.legend), default=1)
    legend_columns = max(1, min(3, len(figure.legend), int(_WIDTH / (0.057 * longest + 0.55))))
    legend_lines = -(-len(figure.legend) // legend_columns)
    caption = "\n".join(textwrap.wrap(figure.caption, 165))
    words = 0.165 * (caption.count("\n") + 1) + 0.12  # inches
    below = words + 0.22 * legend_lines
    total = height + below + 0.4
    canvas, axes = plt.subplots(lines, columns, figsize=(_WIDTH, total), squeeze=False)
    try:
        for place, panel in zip(axes.flat, figure.panels, strict=False):
            _draw(place, panel)
        for place in axes.flat[len(figure.panels) :]:
            place.set_visible(False)
        # Not suptitle(), for which tight_layout() would make room a second time.
        canvas.text(0.012, 1 - 0.09 / total, figure.title, ha="left", va="top", fontsize=13, fontweight="bold")
        canvas.tight_layout(pad=0.4, w_pad=1.5, rect=(0.004, below / total, 0.996, 1 - 0.4 / total))
        if figure.legend:
            canvas.legend(
                handles=[_handle(style) for style in figure.legend],
                loc="lower center",
                bbox_to_anchor=(0.5, words / total),
                borderaxespad=0,
                ncols=legend_columns,
                frameon=False,
                fontsize=8.5,
            )
        canvas.text(0.012, 0.08 / total, caption, fontsize=8, color="#4B5563", va="bottom", ha="left")
        canvas.savefig(path, dpi=_DPI)
    finally:
        plt.close(canvas)


def _handle(style: Style) -> Line2D:
    return Line2D([], [], color=style.colour, linestyle=_DASHES[style.dash], linewidth=style.width, label=style.entry)


def _draw(axes: Any, panel: Panel) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.set_xlabel(panel.x_title, fontsize=9)
    axes.set_ylabel(panel.y_title, fontsize=9)
    if panel.title:
        axes.set_title(panel.title, fontsize=9.5, loc="left", color="#374151")
    if panel.heat is not None:
        _draw_heat(axes, panel.heat)
        return
    if panel.bars is not None:
        _draw_bars(axes, panel.bars)
        return
    axes.grid(color="#E5E7EB", linewidth=0.7)
    axes.set_axisbelow(True)
    if panel.log_y:
        axes.set_yscale("log")
    for line in panel.lines:
        style = line.style
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=style.colour, alpha=0.13, linewidth=0)
        axes.plot(
            line.x,
            line.y,
            color=style.colour,
            linestyle=_DASHES[style.dash],
            linewidth=style.width,
            marker="o" if line.markers else None,
            markersize=3,
        )
    if panel.from_zero:
        top = max((y for line in panel.lines for y in line.high or line.y), default=0.0)
        axes.set_ylim(-0.03 * (top or 1.0), 1.06 * (top or 1.0))  # a line at 0 is drawn whole
    if panel.x_title == "epoch":
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for rule in panel.rules:
        style = rule.style
        axes.axhline(rule.y, color=style.colour, linewidth=style.width, linestyle=_DASHES[style.dash], zorder=1)
    for bracket in panel.brackets:
        axes.plot(
            [bracket.x0, bracket.x1],
            [bracket.y, bracket.y],
            color=bracket.colour,
            linewidth=1.6,
            marker="|",
            markersize=9,
            markeredgewidth=1.6,
            zorder=5,
        )
        axes.annotate(
            bracket.text.replace("<br>", "\n"),
            (max(bracket.x0, bracket.x1), bracket.y),
            xytext=(7, 4),
            textcoords="offset points",
            fontsize=8,
            color=bracket.colour,
            va="bottom",
            bbox=_PLATE,
            zorder=6,
        )
    for mark in panel.marks:
        axes.plot(
            mark.x, mark.y, marker="D", markersize=6.5, color=mark.style.colour, markeredgecolor="white", zorder=7
        )
        if mark.text:
            axes.annotate(
                mark.text.replace("<br>", "\n"),
                (mark.x, mark.y),
                xytext=mark.text_at,
                textcoords="data",
                ha="left",
                fontsize=8,
                color=mark.style.colour,
                arrowprops={"arrowstyle": "-", "color": mark.style.colour, "linewidth": 0.8},
                bbox=_PLATE,
                zorder=6,
            )


_PLATE = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}


def _shown_bars(bars: Bars) -> list[int]:
    """All of them, or where they are too many the coloured ones, which the other figures tell apart, too."""
    places = list(range(len(bars.names)))
    return places if len(places) <= _MOST_BARS else [place for place in places if not bars.styles[place].faint]


def _draw_bars(axes: Any, bars: Bars) -> None:
    chosen = _shown_bars(bars)
    places = range(len(chosen))
    left = [0.0] * len(chosen)
    colours = [bars.styles[place].colour for place in chosen]
    for number, values in enumerate(bars.parts.values()):
        widths = [values[place] for place in chosen]
        axes.barh(places, widths, left=left, color=colours, alpha=_part_opacity(number), height=0.62)
        left = [edge + width for edge, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, labels=[textwrap.fill(bars.names[place], 34) for place in chosen], fontsize=8.5)
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    axes.grid(axis="x", color="#E5E7EB", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    handles = [Patch(color="#4B5563", alpha=_part_opacity(n), label=what) for n, what in enumerate(bars.parts)]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=8.5)
    if len(chosen) < len(bars.names):
        title = f"{len(chosen)} of {len(bars.names)} arms; all are on the page"
        axes.set_title(title, fontsize=9, loc="left", color="#374151")


def _part_opacity(number: int) -> float:
    return (0.95, 0.45, 0.7, 0.25)[number % 4]


def _draw_heat(axes: Any, heat: Heat) -> None:
    known = [value for row in heat.values for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    table = [[float("nan") if value is None else value for value in row] for row in heat.values]
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#E5E7EB")
    image = axes.imshow(table, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
    axes.figure.colorbar(image, ax=axes, label=heat.unit)
    axes.set_xticks(range(len(heat.x)), labels=heat.x)
    axes.set_yticks(range(len(heat.y)), labels=heat.y)
    axes.spines[:].set_visible(False)
    for i, row in enumerate(heat.texts):
        for j, text in enumerate(row):
            value = heat.values[i][j]
            dark = value is not None and value < (low + high) / 2 and high > low
            axes.text(
                j,
                i,
                text.replace("<br>", "\n"),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "#111827",
            )
