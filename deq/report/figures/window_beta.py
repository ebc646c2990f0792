"""Window against mixing parameter, a map for each setting of the other knobs."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from deq.report.arms import shown_knob
from deq.report.compare import ArmNumbers, Comparison, main_baseline
from deq.report.figures.accuracy import short
from deq.report.figures.style import GRID, Figure, Missing, Row, chart, panel

_MOST_MAPS = 4
_VARIED = {"solver.window", "solver.beta"}


def figures(comparison: Comparison) -> list[Figure | Missing]:
    """Seconds to the target, where there is one, and evaluations of f."""
    key, title = "window-beta", "Window and mixing parameter"
    groups: dict[str, list[ArmNumbers]] = {}
    for one in comparison.arms:
        if one.arm.knobs.keys() >= _VARIED and one.arm.counted:
            rest = {name: value for name, value in one.arm.knobs.items() if name not in _VARIED}
            groups.setdefault(repr(sorted(rest.items(), key=lambda item: item[0])), []).append(one)
    maps = [group for group in groups.values() if all(len({one.arm.knobs[n] for one in group}) > 1 for n in _VARIED)]
    if not maps:
        sentence = "Window and β were not both swept here, so there is no map of the two."
        return [Missing(key, title, sentence, "python train.py -m solver=anderson,forward window=2,5,10 beta=0.5,1.0")]
    # The knobs that tell the maps apart.
    apart = [
        name
        for name in sorted({name for group in maps for name in group[0].arm.knobs} - _VARIED)
        if len({repr(group[0].arm.knobs.get(name)) for group in maps}) > 1
    ]
    shown = [
        (group, " · ".join(shown_knob(name, group[0].arm.knobs[name]) for name in apart if name in group[0].arm.knobs))
        for group in maps[:_MOST_MAPS]
    ]
    left_out = len(maps) - len(shown)
    more = f" {left_out} more maps are left out; the table has their numbers." if left_out else ""
    found: list[Figure | Missing] = []
    if any(one.against for group in maps for one in group):
        baseline = main_baseline(comparison)
        aim = "the target" if comparison.target is not None else "the best test accuracy"
        of = f" of {short(baseline)}" if baseline is not None and comparison.target is None else ""
        caption = (
            f"Seconds of training until {aim}{of} is reached, median of the seeds that reach it; "
            f"darker is sooner.{more}"
        )
        panels = [_map([_seconds(one) for one in group], "seconds", about) for group, about in shown]
        found.append(Figure(key, f"{title}: seconds to the target", caption, panels))
    caption = (
        "Evaluations of f that a training step took, forward and backward solve together, mean over the run, median of "
        f"the seeds; darker is fewer.{more}"
    )
    panels = [_map([_evaluations(one) for one in group], "evaluations", about) for group, about in shown]
    return [*found, Figure(f"{key}-evaluations", f"{title}: evaluations of f", caption, panels)]


def _cell(one: ArmNumbers, value: float | None, lines: Sequence[str]) -> Row:
    knobs = one.arm.knobs
    return {"window": knobs["solver.window"], "beta": knobs["solver.beta"], "value": value, "text": list(lines)}


def _seconds(one: ArmNumbers) -> Row:
    first = next(iter(one.against.values()), None)
    spread = first.seconds if first is not None else None
    lines = [f"{spread.median:.3g} s"] if spread is not None else []
    if first is not None and first.never:
        lines.append(f"{first.never} of {len(first.pairs)} never")
    return _cell(one, spread.median if spread is not None else None, lines)


def _evaluations(one: ArmNumbers) -> Row:
    both = [spread for side in ("forward", "backward") if (spread := one.own[f"{side}_evaluations"]) is not None]
    if not both:
        return _cell(one, None, ["none"])
    return _cell(one, sum(spread.median for spread in both), [" + ".join(f"{spread.median:.1f}" for spread in both)])


def _map(cells: list[Row], unit: str, title: str) -> alt.LayerChart:
    """A table of colours with a text in every cell; one that was not run is grey and says so."""
    windows, betas = ({cell[name] for cell in cells} for name in ("window", "beta"))
    known = {(cell["window"], cell["beta"]) for cell in cells}
    rows = cells + [
        {"window": window, "beta": beta, "value": None, "text": ["not run"]}
        for window in windows
        for beta in betas
        if (window, beta) not in known
    ]
    values = [cell["value"] for cell in cells if cell["value"] is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    for row in rows:
        dark = row["value"] is not None and row["value"] < (low + high) / 2 and high > low
        row["ink"] = "white" if dark else "black" if row["value"] is not None else "gray"
    x = alt.X("window:O", axis=alt.Axis(title="window", labelAngle=0))
    y = alt.Y("beta:O", axis=alt.Axis(title="mixing parameter β"), sort="descending")
    legend = alt.Legend(title=unit, gradientLength=180, gradientThickness=10)
    colour = alt.Color(
        "value:Q", scale=alt.Scale(scheme="viridis", domain=[low, high if high > low else low + 1]), legend=legend
    )
    tooltip = [
        alt.Tooltip("window:O"),
        alt.Tooltip("beta:O", title="β"),
        alt.Tooltip("value:Q", title=unit, format=".4~g"),
    ]
    grey = chart([row for row in rows if row["value"] is None]).mark_rect(color=GRID)
    cell = chart([row for row in rows if row["value"] is not None]).mark_rect()
    text = chart(rows).mark_text(fontSize=12, lineHeight=15, baseline="middle", color=alt.ExprRef("datum.ink"))
    return panel(
        [
            grey.encode(x, y),
            cell.encode(x, y, colour, tooltip=tooltip),
            text.encode(x, y, alt.Text("text:N")),
        ],
        title,
    )
