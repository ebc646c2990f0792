"""What a run took: joules where a counter measured them, else operations."""

from __future__ import annotations

import textwrap

import altair as alt

from deq.report.compare import Comparison
from deq.report.figures.looks import Looks, name_of
from deq.report.figures.style import INK, Figure, Look, Missing, Row, chart, opacities, panel

_OPACITIES = (0.95, 0.45, 0.7, 0.25)
_LETTERS = 52  # of a name in one line


def figure(comparison: Comparison, looks: Looks) -> Figure | Missing:
    """One bar an arm, of stacked parts."""
    if comparison.measured_energy:
        counters = [name for name in ("gpu", "cpu") if any(one.own[f"train_{name}_joules"] for one in comparison.arms)]
        parts = {
            f"{what}, {name.upper()}": f"{half}_{name}_joules"
            for name in counters
            for half, what in (("train", "training"), ("test", "evaluation"))
        }
        title, unit = "Energy, measured", "joules of a run, median of its seeds"
        caption = f"Read from the {' and '.join(name.upper() for name in counters)}'s own energy counter."
    else:
        parts = {"training": "train_tflop", "evaluation": "test_tflop"}
        title, unit = "Compute of a run: a proxy for energy", "TFLOP of a run, median of its seeds"
        caption = (
            f"{comparison.no_joules[0].upper()}{comparison.no_joules[1:]}. Shown instead: floating-point operations "
            f"of the cell, computed from the evaluations that were made; what the solver itself adds is not in it."
        )
    shown = [one for one in comparison.arms if any(one.own[name] is not None for name in parts.values())]
    if not shown:
        return Missing(
            "energy",
            title,
            "No run here logged what it took: neither an energy counter's readings nor the number of operations. "
            "Runs of this version log the operations on every machine.",
            "python train.py -m solver=anderson,forward",
        )
    without = len([one for one in comparison.arms if one.arm.counted]) - len(shown)
    if without > 0:
        caption += f" {without} arms logged none and are not shown."
    entries = [Look(what, INK, width=9, opacity=opacity) for what, opacity in zip(parts, _OPACITIES, strict=False)]
    rows: list[Row] = []
    for place, one in enumerate(shown):
        for number, (part, name) in enumerate(parts.items()):
            spread, look = one.own[name], looks[id(one.arm)]
            rows.append(
                {
                    # A name that is there twice would be one bar: the place says which is which, the name labels it.
                    "place": place,
                    "name": name_of(one.arm, looks),
                    "colour": look.colour,
                    "entry": part,
                    "part": number,
                    "x": spread.median if spread is not None else 0.0,
                }
            )
    return Figure("energy", title, caption, [_bars(rows, unit, entries)], entries)


def _bars(rows: list[Row], unit: str, entries: list[Look]) -> alt.LayerChart:
    """The names stand above the bars, where the longest one has room on a narrow screen."""
    names = [{"place": row["place"], "text": textwrap.wrap(row["name"], _LETTERS)} for row in rows]
    names = [name for name, row in zip(names, rows, strict=True) if row["entry"] == entries[0].entry]
    lines = max(len(name["text"]) for name in names)
    step, bar = 22 + 15 * lines, 14
    place = alt.Y("place:O", axis=None, scale=alt.Scale(paddingInner=0, paddingOuter=0.1))
    tooltip = [
        alt.Tooltip("name:N", title="arm"),
        alt.Tooltip("entry:N", title="part"),
        alt.Tooltip("x:Q", title=unit, format=",.4~r"),
    ]
    bars = chart(rows).mark_bar(size=bar, yOffset=(step - bar) / 2 - 3)
    up = alt.ExprRef("-15 * (length(datum.text) - 1)")  # so that the last line lies on the bar
    text = chart(names).mark_text(align="left", baseline="bottom", color=INK, fontSize=12, lineHeight=15, dx=1, dy=up)
    return panel(
        [
            bars.encode(
                alt.X("x:Q", axis=alt.Axis(title=unit, tickCount=6, format=",~r")),
                place,
                alt.Color("colour:N", scale=None),
                opacities(entries),
                alt.Order("part:O"),
                tooltip=tooltip,
            ),
            text.encode(place, alt.Text("text:N"), x=alt.value(0), yOffset=alt.value(step - bar - 6)),
        ],
        height=step * len(names),
    )
