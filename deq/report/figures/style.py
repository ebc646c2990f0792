"""How every figure looks, and the pieces that it is put together from: Altair charts, for the page and for PNG."""

from __future__ import annotations

import collections
import io
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import altair as alt
import vl_convert
from PIL import Image

from deq.records.files import write_atomically

Row = dict[str, Any]
"""``entry``: the line of the legend that it belongs to, which the page hides it by; ``x``, ``y`` and what else."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
"""Okabe and Ito's colours, which the colour-blind tell apart, but for a wine red in the place of their pale yellow."""
BASELINE, SECOND_BASELINE, FAINT, RULE, GAIN = "#222222", "#8C6D31", "#B8BEC6", "#6B7280", "#00795A"
INK, _SOFT, GRID, _PAPER = "#374151", "#4B5563", "#E5E7EB", "#FFFFFF"

DARK = {
    BASELINE: "#F3F4F6",
    SECOND_BASELINE: "#C9A86A",
    FAINT: "#565C66",
    RULE: "#9CA3AF",
    GAIN: "#4FD1A5",
    INK: "#D1D5DB",
    _SOFT: "#B6BCC6",
    GRID: "#363B44",
    _PAPER: "#1B1E24",
    "#0072B2": "#3E9BDA",
    "#882255": "#F0E442",  # on a dark ground their yellow is the one that is seen
}
"""Colour on white → the one that takes its place where the reader's screen is dark."""

_HEIGHT = 300  # of a panel, pixels
_PNG_WIDTH, _PNG_SCALE = 940, 1.5  # pixels of all panels of a line; of the file, to each of these
SCHEMA = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""Vega-Lite's version that these charts are written for."""

CONFIG: dict[str, Any] = {
    "background": _PAPER,
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK, "titleColor": INK, "gridColor": GRID, "domainColor": RULE, "tickColor": RULE,
        "labelFontSize": 12, "titleFontSize": 12.5, "titleFontWeight": "normal", "titlePadding": 8,
        "labelOverlap": True,
    },
    "legend": {
        "labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "labelLimit": 0, "orient": "bottom", "offset": 10, "symbolSize": 700, "columnPadding": 20,
    },
    "title": {
        "color": INK, "subtitleColor": _SOFT, "anchor": "start", "fontSize": 13, "fontWeight": "normal",
        "subtitleFontSize": 12, "subtitlePadding": 6, "subtitleLineHeight": 16,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How an arm or a solver is drawn. ``entry``: its line of the legend, which all grey arms share."""

    entry: str
    colour: str
    dash: tuple[int, int] = (1, 0)
    width: float = 2.0
    opacity: float = 1.0
    faint: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels under one title with one legend. ``key`` names its files; without ``looks`` there is no legend."""

    key: str
    title: str
    caption: str = field(repr=False)
    panels: list[alt.LayerChart] = field(repr=False)
    looks: list[Look] = field(default_factory=list, repr=False)

    def specs(self) -> list[Row]:
        """Vega-Lite of each panel, as wide as the element that it is put into. Words and legend are the page's."""
        found = [
            panel.properties(width="container").to_dict(validate=False) | {"config": CONFIG} for panel in self.panels
        ]
        for channel in (one for spec in found for layer in spec["layer"] for one in layer["encoding"].values()):
            if self.looks and "legend" in channel:
                channel["legend"] = None
        return found

    def png(self) -> bytes:
        """The whole figure with its title, words and legend.

        Raises:
            RuntimeError: if it cannot be drawn.
        """
        columns = min(2, len(self.panels))
        width = (_PNG_WIDTH - 70 * (columns - 1)) // columns
        words = alt.TitleParams(
            self.title, subtitle=textwrap.wrap(self.caption, 150), fontSize=16, fontWeight="bold", offset=14
        )
        panels = [panel.properties(width=width) for panel in self.panels]
        chart = alt.concat(*panels, columns=columns, title=words)
        if not self.looks:  # every map has colours of its own
            chart = chart.resolve_scale(color="independent")
        spec = chart.to_dict(validate=False) | {"config": CONFIG, "padding": 14}
        try:
            picture = vl_convert.vegalite_to_png(spec, vl_version=SCHEMA, scale=_PNG_SCALE)
        except ValueError as error:
            raise RuntimeError(f"{self.key} cannot be drawn: {error}") from error
        # With 256 colours, which all of these have, a file has a sixth of the bytes.
        small = io.BytesIO()
        Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(small, "PNG")
        return small.getvalue()

    _repr_png_ = png  # what a notebook shows

    def save(self, path: Path) -> None:
        """Draw it into a PNG file.

        Raises:
            OSError: the file cannot be written. RuntimeError: the figure cannot be drawn.
        """
        content = self.png()
        write_atomically(path, lambda file: file.write(content))


@dataclass(frozen=True)
class Missing:
    """A figure that has no data: what is missing, and the command that would provide it."""

    key: str
    title: str
    sentence: str
    command: str | None = None


def panel(layers: Sequence[alt.Chart], title: str = "", *, height: int = _HEIGHT) -> alt.LayerChart:
    """One pair of axes."""
    return alt.LayerChart(layer=list(layers)).properties(height=height, **({"title": title} if title else {}))


def chart(rows: Sequence[Row]) -> alt.Chart:
    """A chart of these rows."""
    return alt.Chart(alt.InlineData(values=list(rows)))


def baseline_look(name: str, *, second: bool = False) -> Look:
    """Dashed, and named as what it is."""
    return Look(f"{name} (baseline)", SECOND_BASELINE if second else BASELINE, (2, 3) if second else (7, 4), 2.4)


def rule_look(entry: str, colour: str = RULE) -> Look:
    """Of a thin dotted line; what it means is in the legend, where no curve can run over it."""
    return Look(entry, colour, (2, 3), 1.2)


def drawable(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a place where y is logarithmic; a point whose band has none stays without it."""

    def fits(*values: float) -> bool:
        return all(0 < value < math.inf for value in values)

    found = []
    for row in rows:
        if math.isfinite(row["x"]) and fits(row["y"]):
            band = "low" in row and fits(row["low"], row["high"])
            found.append(row if band else {name: row[name] for name in row.keys() - {"low", "high"}})
    return found


def curves(rows: Sequence[Row], looks: Sequence[Look], x: alt.X, y: alt.Y, *, points: bool = False) -> list[alt.Chart]:
    """Lines with their bands, one for each ``name``, in the order of the rows, and what hovering says.

    Args:
        rows: ``name``, ``entry``, ``x``, ``y`` and, where there is a band, its edges ``low`` and ``high``.
        looks: the legend, which may have more lines than these rows need.
        points: whether every value is marked, but for the grey arms'; one that is alone always is.
    """
    counts = collections.Counter(row["name"] for row in rows)
    faint = {look.entry for look in looks if look.faint}
    marked = [row for row in rows if counts[row["name"]] == 1 or (points and row["entry"] not in faint)]
    banded = [row for row in rows if "low" in row]
    colour, dash, width = strokes(looks)
    each = alt.Detail("name:N")
    hover = [
        alt.Tooltip("name:N", title="curve"),
        *(alt.Tooltip(f"{name}:Q", title=axis["axis"]["title"], format=".4~g") for name, axis in (("x", x), ("y", y))),
    ]
    layers = [chart(rows).mark_line(clip=True).encode(x, y, colour, dash, width, each)]
    if banded:
        band = chart(banded).mark_area(fillOpacity=0.14)
        layers.insert(0, band.encode(x, alt.Y("low:Q"), colour, each, alt.Y2("high:Q")))
    if marked:
        layers.append(chart(marked).mark_point(filled=True, size=26, opacity=1).encode(x, y, colour))
    unseen = chart(rows).mark_point(filled=True, size=90, fillOpacity=0, opacity=1, aria=False)
    return [*layers, unseen.encode(x, y, colour, tooltip=hover)]


def strokes(looks: Sequence[Look]) -> tuple[alt.Color, alt.StrokeDash, alt.StrokeWidth]:
    """Entry → colour, dashes and width, with one legend: that of a PNG, in as many columns as there is room for."""
    longest = max(len(look.entry) for look in looks)
    columns = max(1, min(4, len(looks), int(_PNG_WIDTH / (6.5 * longest + 60))))
    legend = alt.Legend(title=None, columns=columns, symbolType="stroke", symbolOpacity=1)
    return (
        alt.Color("entry:N", scale=_scale(looks, [look.colour for look in looks]), legend=legend),
        alt.StrokeDash("entry:N", scale=_scale(looks, [look.dash for look in looks]), legend=legend),
        alt.StrokeWidth("entry:O", scale=_scale(looks, [look.width for look in looks]), legend=legend),
    )


def opacities(looks: Sequence[Look]) -> alt.Opacity:
    """Entry → opacity; its legend shows squares."""
    legend = alt.Legend(title=None, symbolType="square", symbolSize=120, symbolFillColor=INK, symbolStrokeWidth=0)
    return alt.Opacity("entry:O", scale=_scale(looks, [look.opacity for look in looks]), legend=legend)


def _scale(looks: Sequence[Look], values: Sequence[Any]) -> alt.Scale:
    return alt.Scale(type="ordinal", domain=[look.entry for look in looks], range=list(values))


def rules(at: Sequence[tuple[float, Look]], looks: Sequence[Look]) -> list[alt.Chart]:
    """Lines across the panel, each at its y."""
    rows = [{"y": y, "entry": look.entry} for y, look in at]
    return [chart(rows).mark_rule().encode(alt.Y("y:Q"), *strokes(looks))] if rows else []


def diamonds(rows: Sequence[Row], looks: Sequence[Look]) -> list[alt.Chart]:
    """Points that are pointed out. rows: ``x``, ``y``, ``entry`` and ``what``, which hovering says."""
    mark = chart(rows).mark_point(filled=True, shape="diamond", size=130, opacity=1, stroke=_PAPER, strokeWidth=1.5)
    tooltip = [alt.Tooltip("entry:N", title="curve"), alt.Tooltip("what:N", title="here")]
    return [mark.encode(alt.X("x:Q"), alt.Y("y:Q"), strokes(looks)[0], tooltip=tooltip)] if rows else []


def words(row: Row, colour: str = INK, **place: Any) -> list[alt.Chart]:
    """A text on a plate of the paper's colour. row: ``x``, ``y``, ``text``. place: of Vega's text mark."""
    one = chart([row | {"text": row["text"].split("\n")}])
    plate = {"stroke": _PAPER, "strokeWidth": 5, "strokeJoin": "round", "color": _PAPER}
    return [
        one.mark_text(fontSize=12, lineHeight=15, **place, **kind).encode(
            alt.X("x:Q"), alt.Y("y:Q"), alt.Text("text:N")
        )
        for kind in (plate, {"color": colour})
    ]


Axis = TypeVar("Axis", alt.X, alt.Y)


def linear(channel: type[Axis], title: str, *, whole: bool = False, **scale: Any) -> Axis:
    """An axis that begins where its numbers do. ``whole``: with ticks at whole numbers of its ``domain`` alone."""
    axis = alt.Axis(title=title, tickCount=6)
    if whole:
        low, high = math.ceil(scale["domain"][0]), math.floor(scale["domain"][1])
        step = next(m * 10**e for e in range(20) for m in (1, 2, 5) if 8 * m * 10**e > high - low)
        axis = alt.Axis(
            title=title, format=",d", values=[tick for tick in range(low, high + 1) if tick % step == 0] or [low]
        )
    return channel(f"{channel.__name__.lower()}:Q", axis=axis, scale=alt.Scale(**{"zero": False} | scale))


def logarithmic(channel: type[Axis], title: str, low: float, high: float) -> Axis:
    """An axis from ``low`` to ``high``, both above 0."""
    if not low < high:
        low, high = low / 2, high * 2
    ticks = log_ticks(low, high)
    axis = alt.Axis(
        title=title, values=ticks, labelExpr=f"{json.dumps([_shown(t) for t in ticks])}[indexof({ticks}, datum.value)]"
    )
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return channel(f"{channel.__name__.lower()}:Q", axis=axis, scale=scale)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, at most nine of them; over less than two also 2 and 5 times those. Never fewer than two."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = -(-(last - first) // 8)
    of_each = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    ticks = [float(f"{m}e{e}") for e in range(first, last + 1) if e % step == 0 for m in of_each]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) > 1 else [float(f"{low * (high / low) ** share:.3g}") for share in (0.1, 0.5, 0.9)]


def _shown(tick: float) -> str:
    exponent = math.log10(tick)
    if exponent != round(exponent) or 0 <= exponent <= 2:
        return f"{tick:g}"
    return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
