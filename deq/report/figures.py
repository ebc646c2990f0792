"""What every figure of the report shows, once, for the page (plotly) and the PNG files (matplotlib) alike."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from deq.report.arms import FORWARD, Arm, shown_knob
from deq.report.compare import ArmNumbers, Comparison, Spread, Trade, main_baseline
from deq.report.runs import Run, Trace

Dash = Literal["solid", "dash", "dot"]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
"""Okabe and Ito's colours, which the colour-blind tell apart, but for a wine red in the place of their pale yellow."""
BASELINE, SECOND_BASELINE, FAINT, RULE = "#222222", "#8C6D31", "#B8BEC6", "#6B7280"

MOST_COLOURED = len(PALETTE)
"""Arms beside the baselines that have a colour; of more, the fastest have one and the others are grey."""
_MOST_TRACES = 3
"""Figures of traces; the table has the numbers of all."""


@dataclass(frozen=True)
class Style:
    """How an arm looks in every figure. ``entry``: its line of the legend, which all grey arms share."""

    colour: str
    dash: Dash
    width: float
    entry: str
    faint: bool = False


@dataclass(frozen=True)
class Line:
    """A curve; ``low`` and ``high``, if there, are the edges of a band around it, as long as x and y."""

    name: str
    style: Style
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    markers: bool = False


@dataclass(frozen=True)
class Rule:
    """A thin line across the panel at ``y``; what it means is in the legend, where no curve can run over it."""

    y: float
    style: Style


@dataclass(frozen=True)
class Mark:
    """A point that is pointed out. A text, if there is one, begins at ``text_at`` (x, y) and a line leads to it."""

    x: float
    y: float
    style: Style
    text: str = ""
    text_at: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Bracket:
    """A horizontal distance from ``x0`` to ``x1`` at ``y``, with its meaning."""

    x0: float
    x1: float
    y: float
    text: str
    colour: str


@dataclass(frozen=True)
class Bars:
    """One bar an arm, of stacked parts. ``parts``: part's name → a value for each arm."""

    styles: list[Style]
    names: list[str]
    parts: dict[str, list[float]]


@dataclass(frozen=True)
class Heat:
    """A table of colours. ``values[i][j]`` belongs to ``y[i]`` and ``x[j]``; None is a cell without a value."""

    x: list[str]
    y: list[str]
    values: list[list[float | None]]
    texts: list[list[str]]
    unit: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    x_title: str
    y_title: str
    title: str = ""
    log_y: bool = False
    from_zero: bool = False
    lines: list[Line] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    brackets: list[Bracket] = field(default_factory=list)
    bars: Bars | None = None
    heat: Heat | None = None


@dataclass(frozen=True)
class Figure:
    """Panels under one title with one legend. ``key`` names its files."""

    key: str
    title: str
    caption: str
    panels: list[Panel]
    legend: list[Style] = field(default_factory=list)


@dataclass(frozen=True)
class Missing:
    """A figure that has no data: what is missing, and the command that would provide it."""

    key: str
    title: str
    sentence: str
    command: str | None = None


Drawn = Figure | Missing


def styles_of(comparison: Comparison) -> dict[int, Style]:
    """``id`` of an arm → how it looks."""
    styles: dict[int, Style] = {}
    chosen = comparison.baselines or [one.arm for one in comparison.arms if one.arm.is_baseline][:1]
    main = main_baseline(comparison)
    for arm in chosen:
        colour = BASELINE if arm.solver == FORWARD else SECOND_BASELINE
        dash: Dash = "dash" if arm is main or arm.solver == FORWARD else "dot"
        styles[id(arm)] = Style(colour, dash, 2.4, f"{arm.label} (baseline)")
    others = [one for one in comparison.arms if id(one.arm) not in styles]
    coloured = others
    if len(others) > MOST_COLOURED:
        coloured = sorted(others, key=_merit, reverse=True)[: MOST_COLOURED - 1]
        # In the order of the table, so that neighbours there are neighbours in the legend.
        coloured = [one for one in others if any(one is other for other in coloured)]
    for one, colour in zip(coloured, PALETTE, strict=False):
        styles[id(one.arm)] = Style(colour, "solid", 2.0, one.arm.label)
    rest = [one for one in others if id(one.arm) not in styles]
    for one in rest:
        styles[id(one.arm)] = Style(FAINT, "solid", 0.9, f"{len(rest)} other arms", faint=True)
    return styles


def _merit(one: ArmNumbers) -> tuple[float, float, float]:
    first = next(iter(one.against.values()), None)
    accuracy = one.own["test_accuracy_best"]
    never = first.never if first is not None else 0
    return (-never, one.speedup or 0.0, accuracy.median if accuracy is not None else 0.0)


def figures_of(comparison: Comparison) -> list[Drawn]:
    """All figures in the order of the page."""
    styles = styles_of(comparison)
    return [
        _accuracy(comparison, styles),
        *_residuals(comparison, styles),
        _over_epochs(
            comparison,
            styles,
            "evaluations",
            "Evaluations of f in the course of training",
            ("solver/forward_evaluations", "solver/backward_evaluations"),
            "evaluations a solve, mean",
            1.0,
            "Mean over the solves since the evaluation before; line: median of the seeds, band: their range.",
        ),
        _over_epochs(
            comparison,
            styles,
            "unconverged",
            "Samples that did not converge",
            ("solver/forward_unconverged_fraction", "solver/backward_unconverged_fraction"),
            "samples above tol, %",
            100.0,
            "Share of samples whose relative residual was above tol when their solve ended, in the training steps "
            "since the evaluation before; line: median of the seeds, band: their range.",
        ),
        _energy(comparison, styles),
        *_heat_maps(comparison),
    ]


def _legend(comparison: Comparison, styles: dict[int, Style], shown: Sequence[Arm]) -> list[Style]:
    """The legend's lines for the arms of a figure: baselines first, the grey ones last."""
    entries: dict[str, Style] = {}
    for arm in [*comparison.baselines, *shown]:
        style = styles[id(arm)]
        if any(arm is one for one in shown):
            entries.setdefault(style.entry, style)
    return sorted(entries.values(), key=lambda style: style.faint)


def _accuracy(comparison: Comparison, styles: dict[int, Style]) -> Drawn:
    key, title = "accuracy", "Test accuracy against seconds of training"
    lines, shown, marks = [], [], []
    for one in comparison.arms:
        curve = _over_evaluations(one.arm, "test/accuracy", 100.0, x="time/train_s")
        if curve is None:
            continue
        style = styles[id(one.arm)]
        x, y, low, high = curve
        band = not style.faint and len(one.arm.counted) > 1
        lines.append(
            Line(one.arm.label, style, x, y, low if band else None, high if band else None, markers=not style.faint)
        )
        shown.append(one.arm)
        first = next(iter(one.against.values()), None)
        # The median of the seeds that reach it would flatter an arm of which others do not.
        reached = first is not None and not first.never and not style.faint
        if reached and first is not None and first.seconds is not None and first.target is not None:
            marks.append(Mark(first.seconds.median, 100 * first.target.median, style))
    if not lines:
        return Missing(key, title, "No run has been evaluated yet: a run's first evaluation ends its first epoch.")
    rules = []
    if comparison.target is not None:
        rules.append(_rule(100 * comparison.target, f"target: {100 * comparison.target:g} % (--target)"))
    else:
        for arm in comparison.baselines[:2]:
            best = _numbers(comparison, arm).own["test_accuracy_best"]
            if best is not None:
                entry = f"target: best of {_short(arm)}, {100 * best.median:.2f} % (median)"
                rules.append(_rule(100 * best.median, entry, styles[id(arm)].colour))
    caption = (
        "Line: median of the seeds at each evaluation, band: their range. Seconds of training steps alone, without "
        "evaluation."
    )
    if marks:
        aim = "the target" if comparison.target is not None else "the baseline's best accuracy"
        caption += f" Diamond: median seconds until {aim}, where all seeds reach it."
    return Figure(
        key,
        title,
        caption,
        [Panel("seconds of training", "test accuracy, %", lines=_faint_first(lines), rules=rules, marks=marks)],
        [*_legend(comparison, styles, shown), *(rule.style for rule in rules)],
    )


def _rule(y: float, entry: str, colour: str = RULE) -> Rule:
    return Rule(y, Style(colour, "dot", 1.2, entry))


def _short(arm: Arm) -> str:
    return "forward iteration" if arm.solver == FORWARD else "the tutorial's forward iteration"


def _numbers(comparison: Comparison, arm: Arm) -> ArmNumbers:
    return next(one for one in comparison.arms if one.arm is arm)


def _faint_first(lines: list[Line]) -> list[Line]:
    """Grey lines below the coloured ones, the baselines on top."""
    return sorted(lines, key=lambda line: (not line.style.faint, "(baseline)" in line.style.entry))


def _over_evaluations(
    arm: Arm, metric: str, factor: float, x: str | bool
) -> tuple[list[float], list[float], list[float], list[float]] | None:
    """Median x, and median, lowest and highest value over the seeds at each evaluation.

    x: a metric, or whether to count epochs rather than steps.
    """
    points: dict[int, list[tuple[float, float]]] = {}
    for run in arm.counted:
        for number, one in enumerate(run.evaluations):
            value = one.get(metric)
            at = one.get(x) if isinstance(x, str) else float(one.epoch if x else one.step)
            if value is not None and at is not None:
                points.setdefault(number, []).append((at, factor * value))
    if not points:
        return None
    rows = [points[number] for number in sorted(points)]
    return (
        [statistics.median(at for at, _ in row) for row in rows],
        [statistics.median(value for _, value in row) for row in rows],
        [min(value for _, value in row) for row in rows],
        [max(value for _, value in row) for row in rows],
    )


def _over_epochs(
    comparison: Comparison,
    styles: dict[int, Style],
    key: str,
    title: str,
    metrics: tuple[str, str],
    y_title: str,
    factor: float,
    caption: str,
) -> Drawn:
    panels, shown = [], []
    # Runs that are also evaluated within an epoch have several points in it.
    epochs = [[one.epoch for one in run.evaluations] for arm in comparison.arms for run in arm.arm.counted]
    by_epoch = all(len(set(numbers)) == len(numbers) for numbers in epochs)
    for name, metric in zip(("forward solve", "backward solve"), metrics, strict=True):
        lines = []
        for one in comparison.arms:
            curve = _over_evaluations(one.arm, metric, factor, by_epoch)
            if curve is not None:
                style = styles[id(one.arm)]
                x, y, low, high = curve
                band = not style.faint and len(one.arm.counted) > 1
                few = len(x) < 30 and not style.faint
                lines.append(Line(one.arm.label, style, x, y, low if band else None, high if band else None, few))
                shown.append(one.arm)
        if lines:
            panels.append(
                Panel(
                    "epoch" if by_epoch else "training steps", y_title, name, from_zero=True, lines=_faint_first(lines)
                )
            )
    if not panels:
        return Missing(key, title, "No run has been evaluated yet: a run's first evaluation ends its first epoch.")
    if len(panels) == 1:
        caption += " The runs here have no other solve to show: their gradient solves no adjoint equation."
    return Figure(key, title, caption, panels, _legend(comparison, styles, shown))


def _residuals(comparison: Comparison, styles: dict[int, Style]) -> list[Drawn]:
    """A figure for each of the foremost arms: the run of its lowest seed, forward iteration beside its solver."""
    title = "Relative residual of one solve"
    with_traces: list[tuple[ArmNumbers, Run]] = []
    for one in comparison.arms:
        runs = [run for run in one.arm.runs if run.traces and run.traces.baseline and run.traces.others]
        if runs:
            with_traces.append((one, min(runs, key=lambda run: (str(type(run.seed)), run.seed, str(run.folder)))))
    if not with_traces:
        sentence = "No run here has the traces of a solve beside forward iteration's (traces.json)."
        return [Missing("residual", title, sentence, "python train.py experiment=crossover")]
    best = comparison.best
    with_traces.sort(
        key=lambda pair: (pair[0] is not best, styles[id(pair[0].arm)].faint, *(-m for m in _merit(pair[0])))
    )
    return [
        _residual(comparison, styles, one.arm, run, "residual" if number == 0 else f"residual-{number + 1}")
        for number, (one, run) in enumerate(with_traces[:_MOST_TRACES])
    ]


def _residual(comparison: Comparison, styles: dict[int, Style], arm: Arm, run: Run, key: str) -> Figure:
    traces = run.traces
    assert traces is not None
    assert traces.baseline is not None
    forward, others = traces.baseline, traces.others
    scale, unit = (1e3, "ms") if max(curve.seconds[-1] for curve in traces.curves) < 1 else (1.0, "s")
    own = styles[id(arm)]
    spare = [colour for colour in PALETTE if colour != own.colour]
    looks = {id(forward): Style(BASELINE, "dash", 2.4, f"{forward.solver} (baseline)")}
    for curve in traces.curves:
        if curve.baseline and curve is not forward:
            looks[id(curve)] = Style(SECOND_BASELINE, "dot", 2.4, f"{curve.solver} (baseline)")
    # The run's own solver has its arm's colour; of several windows it is the one of the run's window.
    window = arm.knobs.get("solver.window")
    mine = next((curve for curve in others if re.search(rf" m = {window}\b", curve.solver)), others[0])
    colours = itertools.cycle(spare)
    for curve in others:
        colour = own.colour if curve is mine and not own.faint else next(colours)
        looks[id(curve)] = Style(colour, "solid", 2.0, curve.solver)
    by_solver = {trade.solver: trade for trade in comparison.trades if trade.run is run}
    # One text a panel: of the solver that crosses first in seconds, else of the first.
    crossing = [t for t in by_solver.values() if t.by_seconds is not None]
    told = min(crossing, key=lambda t: t.by_seconds.x if t.by_seconds else 0.0, default=None)
    told = told or next(iter(by_solver.values()), None)

    seconds = _residual_panel(traces.curves, looks, lambda c: [scale * t for t in c.seconds], unit, traces.tol)
    counts = _residual_panel(traces.curves, looks, lambda c: [float(k) for k in c.evaluations], None, traces.tol)
    for curve in others:
        trade = by_solver[curve.solver]
        cross = trade.by_seconds
        if cross is not None:
            text = f"crossover: {cross.residual:.1e}<br>at {scale * cross.x:.3g} {unit}" if trade is told else ""
            seconds.marks.append(Mark(scale * cross.x, cross.residual, looks[id(curve)], text, _free_corner(seconds)))
        cross = trade.by_evaluations
        if cross is not None:
            text = f"crossover: {cross.residual:.1e}<br>at {cross.x:.3g} evaluations" if trade is told else ""
            counts.marks.append(Mark(cross.x, cross.residual, looks[id(curve)], text, _free_corner(counts)))
    caption = (
        f"Mean over {traces.batch} (band: 10th to 90th percentile) with the model that this run trained, seed "
        f"{run.seed}; seconds from the start of the solve, median of repeats"
        f"{f', on {traces.device}' if traces.device else ''}. "
        f"Diamond: from here on the solver's curve stays below forward iteration's."
    )
    if told is not None and told.penalty_s is not None:
        curve = next(curve for curve in others if curve.solver == told.solver)
        bracket = _penalty_bracket(told, curve, forward, scale, looks[id(curve)].colour)
        if bracket is not None:
            seconds.brackets.append(bracket)
            caption += f" Bracket: what {told.solver} takes longer than forward iteration for as many evaluations."
    if traces.tol is not None and traces.stop == "max":
        caption += " Solves of training stop when the worst sample, not the mean, is at tol."
    return Figure(
        key,
        f"Relative residual of one solve: {arm.label}",
        caption,
        [seconds, counts],
        [*looks.values(), *(rule.style for rule in counts.rules)],
    )


def _residual_panel(
    curves: Sequence[Trace],
    looks: dict[int, Style],
    x: Callable[[Trace], list[float]],
    unit: str | None,
    tol: float | None,
) -> Panel:
    lines = [Line(curve.solver, looks[id(curve)], x(curve), curve.mean, curve.low, curve.high) for curve in curves]
    return Panel(
        f"time since the solve began, {unit}" if unit else "evaluations of f",
        "relative residual, mean",
        "against time" if unit else "against evaluations",
        log_y=True,
        lines=sorted(lines, key=lambda line: "(baseline)" in line.style.entry),
        rules=[_rule(tol, f"tol {tol:g}")] if tol is not None else [],
    )


def _free_corner(panel: Panel) -> tuple[float, float]:
    """A point at the lower left, which curves that fall leave free. The y axis is logarithmic."""
    x = [value for line in panel.lines for value in line.x]
    y = [value for line in panel.lines for value in line.low or line.y]
    top = max(value for line in panel.lines for value in line.high or line.y)
    return min(x) + 0.02 * (max(x) - min(x)), min(y) * (top / min(y)) ** 0.1


def _penalty_bracket(trade: Trade, curve: Trace, forward: Trace, scale: float, colour: str) -> Bracket | None:
    common = sorted(set(curve.evaluations) & set(forward.evaluations))
    if not common or trade.penalty_s is None:
        return None
    count = common[-1]  # where it is the longest
    ours, theirs = curve.evaluations.index(count), forward.evaluations.index(count)
    share = f" ({100 * trade.penalty:+.0f} %)" if trade.penalty is not None else ""
    return Bracket(
        scale * forward.seconds[theirs],
        scale * curve.seconds[ours],
        forward.mean[theirs],
        f"mixing penalty<br>{1e3 * trade.penalty_s:+.2g} ms an iteration{share}",
        colour,
    )


def _energy(comparison: Comparison, styles: dict[int, Style]) -> Drawn:
    key = "energy"
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
            key,
            title,
            "No run here logged what it took: neither an energy counter's readings nor the number of operations. "
            "Runs of this version log the operations on every machine.",
            "python train.py -m solver=anderson,forward",
        )
    without = len([one for one in comparison.arms if one.arm.counted]) - len(shown)
    if without > 0:
        caption += f" {without} arms logged none and are not shown."

    def median(one: ArmNumbers, name: str) -> float:
        spread = one.own[name]
        return spread.median if spread is not None else 0.0

    bars = Bars(
        [styles[id(one.arm)] for one in shown],
        [f"{one.arm.label}{' (baseline)' if '(baseline)' in styles[id(one.arm)].entry else ''}" for one in shown],
        {what: [median(one, name) for one in shown] for what, name in parts.items()},
    )
    return Figure(key, title, caption, [Panel(unit, "", bars=bars)])


def _heat_maps(comparison: Comparison) -> list[Drawn]:
    """Window against mixing parameter, a panel for each setting of the other knobs."""
    key, title = "window-beta", "Window and mixing parameter"
    groups: dict[str, list[ArmNumbers]] = {}
    varied = {"solver.window", "solver.beta"}
    for one in comparison.arms:
        if varied <= one.arm.knobs.keys() and one.arm.counted:
            rest = {name: value for name, value in one.arm.knobs.items() if name not in varied}
            groups.setdefault(repr(sorted(rest.items(), key=lambda item: item[0])), []).append(one)
    maps = [group for group in groups.values() if all(len(_swept(group, name)) > 1 for name in varied)]
    if not maps:
        sentence = "Window and β were not both swept here, so there is no map of the two."
        return [Missing(key, title, sentence, "python train.py -m solver=anderson,forward window=2,5,10 beta=0.5,1.0")]
    by_time = any(one.against for group in maps for one in group)
    # The knobs that tell the maps apart.
    apart = [
        name
        for name in sorted({name for group in maps for name in group[0].arm.knobs} - varied)
        if len({repr(group[0].arm.knobs.get(name)) for group in maps}) > 1
    ]
    shown = [
        (group, " · ".join(shown_knob(name, group[0].arm.knobs[name]) for name in apart if name in group[0].arm.knobs))
        for group in maps[:4]
    ]
    left_out = len(maps) - len(shown)
    more = f" {left_out} more maps are left out; the table has their numbers." if left_out else ""
    by_count = Figure(
        f"{key}-evaluations",
        f"{title}: evaluations of f",
        "Evaluations of f that a training step took, forward and backward solve together, mean over the run, median of "
        f"the seeds; darker is fewer.{more}",
        [_heat(group, False, about) for group, about in shown],
    )
    if not by_time:
        return [by_count]
    baseline = main_baseline(comparison)
    aim = "the target" if comparison.target is not None else "the best test accuracy"
    of = f" of {_short(baseline)}" if baseline is not None and comparison.target is None else ""
    caption = (
        f"Seconds of training until {aim}{of} is reached, median of the seeds that reach it; darker is sooner.{more}"
    )
    panels = [_heat(group, True, about) for group, about in shown]
    return [Figure(key, f"{title}: seconds to the target", caption, panels), by_count]


def _swept(group: Sequence[ArmNumbers], name: str) -> list[float]:
    return sorted({one.arm.knobs[name] for one in group})


def _heat(group: Sequence[ArmNumbers], by_time: bool, title: str) -> Panel:
    windows, betas = _swept(group, "solver.window"), _swept(group, "solver.beta")
    cells = {(one.arm.knobs["solver.beta"], one.arm.knobs["solver.window"]): one for one in group}

    def cell(beta: float, window: float) -> tuple[float | None, str]:
        one = cells.get((beta, window))
        if one is None:
            return None, "not run"
        first = next(iter(one.against.values()), None)
        spread: Spread | None
        if by_time:
            spread = first.seconds if first is not None else None
            never = f"{first.never} of {len(first.pairs)} never" if first is not None and first.never else ""
            text = f"{spread.median:.3g} s" if spread is not None else ""
            return spread.median if spread is not None else None, "<br>".join(part for part in (text, never) if part)
        both = [spread for side in ("forward", "backward") if (spread := one.own[f"{side}_evaluations"]) is not None]
        if not both:
            return None, "none"
        return sum(spread.median for spread in both), " + ".join(f"{spread.median:.1f}" for spread in both)

    table = [[cell(beta, window) for window in windows] for beta in betas]
    return Panel(
        "window",
        "mixing parameter β",
        title,
        heat=Heat(
            [f"{window:g}" for window in windows],
            [f"{beta:g}" for beta in betas],
            [[value for value, _ in row] for row in table],
            [[text for _, text in row] for row in table],
            "seconds" if by_time else "evaluations",
        ),
    )
