"""The figures as plotly.js takes them: plain JSON, so that nothing but the script itself has to be loaded."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from deq.report.figures import Bars, Bracket, Heat, Line, Mark, Panel, Rule

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
_GRID, _INK = "#E5E7EB", "#374151"

Json = dict[str, Any]


def plot_of(panel: Panel) -> Json:
    """``{"data": [...], "layout": {...}}`` of one pair of axes. Traces carry their legend's line as ``legendgroup``."""
    layout: Json = {
        "font": {"family": _FONT, "size": 13, "color": _INK},
        "margin": {"l": 62, "r": 14, "t": 34 if panel.title or panel.bars else 12, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1},
        "modebar": {"bgcolor": "rgba(255,255,255,0.7)", "color": "#9CA3AF", "activecolor": _INK},
        "height": 360,
        "xaxis": {"title": {"text": panel.x_title}, "gridcolor": _GRID, "zeroline": False, "automargin": True},
        "yaxis": {"title": {"text": panel.y_title}, "gridcolor": _GRID, "zeroline": False, "automargin": True},
        "shapes": [],
        "annotations": [],
    }
    for axis in ("xaxis", "yaxis"):
        layout[axis]["title"]["font"] = {"size": 13}
        layout[axis]["tickfont"] = {"size": 12}
    if panel.x_title == "epoch":
        last = max((x for line in panel.lines for x in line.x), default=1.0)
        layout["xaxis"]["dtick"] = max(1, round(last / 8))
    if panel.title:
        layout["title"] = {"text": panel.title, "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.98}
    data: list[Json] = []
    if panel.heat is not None:
        _add_heat(data, layout, panel.heat)
    elif panel.bars is not None:
        _add_bars(data, layout, panel.bars)
    else:
        if panel.log_y:
            # Powers of ten are drawn a quarter larger than the font that is set.
            layout["yaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1, "tickfont": {"size": 10}}
        if panel.from_zero:
            top = max((y for line in panel.lines for y in line.high or line.y), default=0.0)
            layout["yaxis"] |= {"range": [-0.03 * (top or 1.0), 1.06 * (top or 1.0)]}  # a line at 0 is drawn whole
        for line in panel.lines:
            _add_line(data, line, panel)
        for rule in panel.rules:
            _add_rule(layout, rule)
        for bracket in panel.brackets:
            _add_bracket(data, layout, bracket, panel.log_y)
        for mark in panel.marks:
            _add_mark(data, layout, mark, panel.log_y)
    return {"data": data, "layout": layout}


def _add_line(data: list[Json], line: Line, panel: Panel) -> None:
    style = line.style
    group = {"legendgroup": style.entry}
    if line.low is not None and line.high is not None:
        red, green, blue = (int(style.colour[i : i + 2], 16) for i in (1, 3, 5))
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [*line.x, *reversed(line.x)],
                "y": [*line.high, *reversed(line.low)],
                "fill": "toself",
                "fillcolor": f"rgba({red},{green},{blue},0.13)",
                "line": {"width": 0},
                "hoverinfo": "skip",
                **group,
            }
        )
    data.append(
        {
            "type": "scatter",
            "mode": "lines+markers" if line.markers else "lines",
            "name": line.name,
            "x": line.x,
            "y": line.y,
            "line": {"color": style.colour, "width": style.width, "dash": style.dash},
            "marker": {"size": 5},
            "hovertemplate": f"%{{x:.4~g}}, %{{y:.4~g}}<extra>{_wrapped(line.name)}</extra>",
            **group,
        }
    )


def _add_rule(layout: Json, rule: Rule) -> None:
    layout["shapes"].append(
        {
            "type": "line",
            "name": rule.style.entry,
            "layer": "below",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": rule.y,
            "y1": rule.y,
            "line": {"color": rule.style.colour, "width": rule.style.width, "dash": rule.style.dash},
        }
    )


def _add_bracket(data: list[Json], layout: Json, bracket: Bracket, log: bool) -> None:
    data.append(
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [bracket.x0, bracket.x1],
            "y": [bracket.y, bracket.y],
            "line": {"color": bracket.colour, "width": 2},
            "marker": {"symbol": "line-ns-open", "size": 12, "line": {"width": 2, "color": bracket.colour}},
            "hoverinfo": "skip",
        }
    )
    layout["annotations"].append(
        {
            "x": max(bracket.x0, bracket.x1),
            "y": _at(bracket.y, log),
            "text": bracket.text,
            "showarrow": False,
            "xanchor": "left",
            "yanchor": "bottom",
            "xshift": 7,
            "align": "left",
            "font": {"size": 12, "color": bracket.colour},
            "bgcolor": _PLATE,
        }
    )


_PLATE = "rgba(255,255,255,0.8)"


def _add_mark(data: list[Json], layout: Json, mark: Mark, log: bool) -> None:
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": mark.style.entry,
            "x": [mark.x],
            "y": [mark.y],
            "marker": {
                "symbol": "diamond",
                "size": 11,
                "color": mark.style.colour,
                "line": {"width": 1.5, "color": "white"},
            },
            "legendgroup": mark.style.entry,
            "hovertemplate": f"%{{x:.4~g}}, %{{y:.4~g}}<extra>{_wrapped(mark.style.entry)}</extra>",
        }
    )
    if mark.text:
        layout["annotations"].append(
            {
                "x": mark.x,
                "y": _at(mark.y, log),
                "text": mark.text,
                "name": mark.style.entry,
                "showarrow": True,
                "arrowhead": 0,
                "arrowwidth": 1,
                "arrowcolor": mark.style.colour,
                "axref": "x",
                "ayref": "y",
                "ax": mark.text_at[0],
                "ay": _at(mark.text_at[1], log),
                "xanchor": "left",
                "align": "left",
                "font": {"size": 12, "color": mark.style.colour},
                "bgcolor": _PLATE,
            }
        )


def _add_bars(data: list[Json], layout: Json, bars: Bars) -> None:
    # A name that is there twice would be one bar: the place says which is which, the name only labels it.
    places = list(range(len(bars.names)))
    for number, (what, values) in enumerate(bars.parts.items()):
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": what,
                "x": values,
                "y": places,
                "marker": {
                    "color": [style.colour for style in bars.styles],
                    "opacity": (0.95, 0.45, 0.7, 0.25)[number % 4],
                },
                "customdata": bars.names,
                "hovertemplate": f"%{{customdata}}<br>{what}: %{{x:.4~g}}<extra></extra>",
            }
        )
    layout |= {
        "barmode": "stack",
        "bargap": 0.35,
        "height": 110 + (44 if len(bars.names) <= 12 else 34) * len(bars.names),
    }
    layout["yaxis"] |= {
        "autorange": "reversed",
        "tickvals": places,
        "ticktext": [_wrapped(name, 30) for name in bars.names],
        "showgrid": False,
        "ticks": "outside",
        "ticklen": 5,
        "tickcolor": "rgba(0,0,0,0)",
    }
    shades = " · ".join(
        f"{shade}: {what}" for shade, what in zip(("dark", "light", "medium", "faint"), bars.parts, strict=False)
    )
    layout["title"] = {"text": shades, "font": {"size": 13}, "x": 0, "xref": "paper", "y": 0.99, "yanchor": "top"}


def _add_heat(data: list[Json], layout: Json, heat: Heat) -> None:
    known = [value for row in heat.values for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    data.append(
        {
            "type": "heatmap",
            "x": heat.x,
            "y": heat.y,
            "z": heat.values,
            "colorscale": "Viridis",
            "colorbar": {"title": {"text": heat.unit, "side": "right"}, "thickness": 12, "outlinewidth": 0},
            "zmin": low,
            "zmax": high if high > low else low + 1,
            "hoverongaps": False,
            "xgap": 2,
            "ygap": 2,
            "hovertemplate": "window %{x}, β %{y}: %{z:.4~g} " + heat.unit + "<extra></extra>",
        }
    )
    layout["plot_bgcolor"] = _GRID
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout["yaxis"] |= {"type": "category", "showgrid": False}
    for i, row in enumerate(heat.texts):
        for j, text in enumerate(row):
            value = heat.values[i][j]
            dark = value is not None and value < (low + high) / 2 and high > low
            layout["annotations"].append(
                {
                    "x": j,
                    "y": i,
                    "text": text,
                    "showarrow": False,
                    "font": {"size": 13, "color": "white" if dark else "#111827"},
                }
            )


def _at(y: float, log: bool) -> float:
    """Where plotly wants an annotation: on a logarithmic axis at the logarithm, unlike everything else."""
    return math.log10(y) if log else y


def _wrapped(text: str, width: int = 40) -> str:
    return "<br>".join(textwrap.wrap(text, width))
