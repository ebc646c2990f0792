"""Relative residual of one solve against evaluations of f and against seconds: what an iteration costs and brings.

An iteration of Anderson's method costs more than one of forward iteration, by the *mixing penalty*, and brings the
residual down faster, so that there is a *crossover*: a residual below which it is ahead (arXiv 2410.19460, figure 1).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from deq.records import curves as measured
from deq.records.traces import Penalty, Trace, crossing, mixing_penalty
from deq.report.arms import Arm
from deq.report.compare import Comparison
from deq.report.figures import style
from deq.report.figures.looks import Looks, merit
from deq.report.runs import Run

_MOST_FIGURES = 3
"""Of a report; the table has the numbers of all runs."""


def figures(comparison: Comparison, looks: Looks) -> list[style.Figure | style.Missing]:
    """A figure for each of the foremost arms: the run of its lowest seed, forward iteration beside its solver."""
    with_traces = []
    for one in comparison.arms:
        runs = [run for run in one.arm.runs if run.traces and run.traces.baseline and run.traces.others]
        if runs:
            with_traces.append((one, min(runs, key=lambda run: (str(type(run.seed)), run.seed, str(run.folder)))))
    if not with_traces:
        sentence = "No run here has the traces of a solve beside forward iteration's (traces.json)."
        title = "Relative residual of one solve"
        return [style.Missing("residual", title, sentence, "python train.py experiment=crossover")]
    best = comparison.best
    with_traces.sort(
        key=lambda pair: (pair[0] is not best, looks[id(pair[0].arm)].faint, *(-m for m in merit(pair[0])))
    )
    return [
        _of_run(one.arm, run, looks[id(one.arm)], "residual" if number == 0 else f"residual-{number + 1}")
        for number, (one, run) in enumerate(with_traces[:_MOST_FIGURES])
    ]


def _of_run(arm: Arm, run: Run, look: style.Look, key: str) -> style.Figure:
    traces = run.traces
    assert traces is not None
    # Of several windows it is the one of the run's own.
    window = arm.knobs.get("solver.window")
    own = next((one for one in traces.others if re.search(rf" m = {window}\b", one.solver)), traces.others[0])
    about = (
        f" Samples: {traces.batch}, with the model that this run trained, seed {run.seed}. Seconds: median of repeats"
        f"{f', on {traces.device}' if traces.device else ''}."
    )
    if traces.tol is not None and traces.stop == "max":
        about += " Solves of training stop when the worst sample, not the mean, is at tol."
    title = f"Relative residual of one solve: {arm.label}"
    colour = style.PALETTE[0] if look.faint else look.colour
    return draw(traces.curves, traces.tol, highlight=own.solver, title=title, about=about, key=key, colour=colour)


def draw(
    traces: Sequence[Trace],
    tol: float | None = None,
    *,
    highlight: str | None = None,
    title: str = "Relative residual of one solve",
    about: str = "",
    key: str = "crossover",
    colour: str = style.PALETTE[0],
) -> style.Figure:
    """Mean relative residual against evaluations and against seconds, with crossover, mixing penalty and gain.

    Args:
        traces: at least one; the first that is a baseline is the one that others are held against.
        tol: where the tolerance line is drawn, and the gain read.
        highlight: the solver whose crossover, mixing penalty and gain are marked; default: of those that are no
            baseline, the one that is ahead of the rest at the end.
        about: sentences for the caption. colour: of the highlighted curve.
    """
    others = [trace for trace in traces if not trace.baseline]
    forward = next((trace for trace in traces if trace.baseline), None)
    own = next((trace for trace in others if trace.solver == highlight), None)
    if own is None:
        own = min(others, key=lambda trace: trace.residual_mean[-1], default=None)
    spare = itertools.cycle(one for one in style.PALETTE if one != colour)
    looks: dict[str, style.Look] = {}
    for trace in traces:
        if trace.baseline:
            looks[trace.solver] = style.baseline_look(trace.solver, second=trace is not forward)
        else:
            bold = trace is own
            looks[trace.solver] = style.Look(trace.solver, colour if bold else next(spare), width=2.6 if bold else 2.0)
    if tol:
        looks[""] = style.rule_look(f"tol {tol:g}")  # no solver's
    views = [_View(traces, forward, own, looks, tol, against) for against in ("evaluations", "seconds")]
    low, high = (end(view.heights()[i] for view in views) for i, end in enumerate((min, max)))
    panels = [view.panel(low, high) for view in views]
    banded = " and ".join(trace.solver for trace in (forward, own) if trace is not None)
    caption = f"Line: mean of the samples; band, for {banded}: their 10th to 90th percentile.{about}"
    if any(view.crossings() for view in views):
        caption += " Diamond: from here on the solver's curve stays below forward iteration's."
    if own is not None and views[1].penalty() is not None:
        caption += f" Bracket: what {own.solver} takes longer than forward iteration for as many evaluations."
    return style.Figure(key, title, caption, panels, list(looks.values()))


@dataclass(frozen=True)
class _View:
    """The same curves against one of the two. ``own``: the solver whose marks are drawn."""

    traces: Sequence[Trace]
    forward: Trace | None
    own: Trace | None
    looks: dict[str, style.Look]
    tol: float | None
    against: str

    @property
    def unit(self) -> str:
        if self.against == "evaluations":
            return "evaluations"
        return "ms" if max(trace.seconds[-1] for trace in self.traces) < 2 else "s"

    def x(self, value: float) -> float:
        """Where on the axis, which is in its unit."""
        return 1e3 * value if self.unit == "ms" else value

    @property
    def right(self) -> float:
        return self.x(max(getattr(trace, self.against)[-1] for trace in self.traces))

    def rows(self) -> list[style.Row]:
        found: list[style.Row] = []
        for trace in sorted(self.traces, key=lambda trace: (trace.baseline, trace is self.own)):
            name = {"name": trace.solver, "entry": self.looks[trace.solver].entry}
            columns = (getattr(trace, self.against), trace.residual_mean, trace.residual_p10, trace.residual_p90)
            for at, mean, p10, p90 in zip(*columns, strict=True):
                # More than two bands would hide each other.
                band = {"low": p10, "high": p90} if trace in (self.forward, self.own) else {}
                found.append({**name, "x": self.x(at), "y": mean, **band})
        return style.drawable(found)

    def heights(self) -> tuple[float, float]:
        """The lowest and the highest residual that the axis needs."""
        values = [row[name] for row in self.rows() for name in ("low", "y", "high") if name in row]
        values += [self.tol] if self.tol else []
        low, high = min(values, default=0.1) / 1.2, max(values, default=1.0) * 1.2
        if self.own is not None and self.penalty() is not None:
            # Below the bracket there is room for its words, three lines.
            low = min(low, self.own.residual_mean[self.common - 1] / (high / low) ** 0.25)
        return low, high

    def panel(self, low: float, high: float) -> alt.LayerChart:
        """The panel with its marks, over these residuals."""
        entries = list(self.looks.values())
        title = "evaluations of f" if self.against == "evaluations" else f"time since the solve began, {self.unit}"
        x = style.linear(alt.X, title, whole=self.against == "evaluations", domain=[0, self.right], nice=False)
        y = style.logarithmic(alt.Y, "relative residual, mean", low, high)
        marks: list[alt.Chart] = []
        if self.forward is not None and self.own is not None:
            marks = [
                *self._bracket(self.forward, self.own),
                *self._gain(self.forward, self.own),
                *self._told(self.forward, self.own, low, high),
            ]
        return style.panel(
            [
                *style.rules([(self.tol, entries[-1])] if self.tol else [], entries),
                *style.curves(self.rows(), entries, x, y),
                *marks,
                *style.diamonds(self.crossings(), entries),
            ]
        )

    def crossings(self) -> list[style.Row]:
        """Where each solver's curve goes below forward iteration's for good, the own one's last."""
        found: list[style.Row] = []
        for trace in sorted(self.traces, key=lambda trace: trace is self.own):
            if self.forward is not None and not trace.baseline:
                cross = crossing(self.forward, trace, self.against)
                if cross is not None:
                    what = f"below forward iteration from a residual of {cross.residual:.2g} on"
                    entry = self.looks[trace.solver].entry
                    found.append({"x": self.x(cross.x), "y": cross.residual, "entry": entry, "what": what})
        return found

    def _at(self, x: float, y: float, **more: Any) -> style.Row:
        """A place of one of the own solver's marks, which the page hides with its curve."""
        assert self.own is not None
        return {"x": self.x(x), "y": y, "entry": self.looks[self.own.solver].entry, **more}

    def _told(self, forward: Trace, own: Trace, low: float, high: float) -> list[alt.Chart]:
        """Words in the upper right corner, which curves that fall leave free, and a line from them to the crossover."""
        cross = crossing(forward, own, self.against)
        if cross is not None:
            amount = f"{self.x(cross.x):.3g} {self.unit}"
            text = f"crossover: ahead below residual {cross.residual:.2g},\nafter {amount}"
        elif measured.ahead(own.points(self.against), forward.points(self.against)):
            text = f"no crossover: {own.solver} is ahead\nfrom the first iterations"
        else:
            text = "no crossover so far"
        told = style.words(self._at(0, high, text=text) | {"x": self.right}, align="right", baseline="top")
        if cross is None:
            return told
        end = {"x2": 0.8 * self.right, "y2": high * (low / high) ** 0.11}
        line = style.chart([self._at(cross.x, cross.residual, **end)]).mark_rule(color=style.INK, strokeWidth=0.8)
        return [line.encode(alt.X("x:Q"), alt.Y("y:Q"), alt.X2("x2:Q"), alt.Y2("y2:Q")), *told]

    def _gain(self, forward: Trace, own: Trace) -> list[alt.Chart]:
        """An arrow along the tolerance line from forward iteration's count to that of the own solver."""
        tol = self.tol or 0.0
        there, before = (
            next((at for at, residual in trace.points(self.against) if residual <= tol), None)
            for trace in (own, forward)
        )
        end = before if before is not None else getattr(forward, self.against)[-1]
        if not tol or there is None or end <= there:
            return []
        ratio = f"{'more than ' if before is None else ''}{end / there:.1f}×"
        text = f"{ratio} fewer evaluations" if self.against == "evaluations" else f"{ratio} sooner"
        # Curves that fall leave the place above the line free, to the right of where the slower one meets it.
        place = {"align": "left", "dx": 4} if 2 * self.x(end) < self.right else {"align": "right"}
        arrow = style.chart([self._at(there, tol, x2=self.x(end))])
        tip = arrow.mark_point(shape="triangle-left", filled=True, color=style.GAIN, size=90, opacity=1, xOffset=4)
        return [
            arrow.mark_rule(color=style.GAIN, strokeWidth=2).encode(alt.X("x:Q"), alt.Y("y:Q"), alt.X2("x2:Q")),
            tip.encode(alt.X("x:Q"), alt.Y("y:Q")),
            *style.words(self._at(end, tol, text=text), style.GAIN, baseline="bottom", dy=-5, **place),
        ]

    @property
    def common(self) -> int:
        """As many evaluations as both made."""
        return min(len(trace.seconds) for trace in (self.forward, self.own) if trace is not None)

    def penalty(self) -> Penalty | None:
        """None also where there is no place for its bracket, which lies at a residual of 0 or on evaluations."""
        if self.forward is None or self.own is None or self.against == "evaluations":
            return None
        ends = [trace.residual_mean[self.common - 1] for trace in (self.forward, self.own)]
        return mixing_penalty(self.forward, self.own) if all(0 < end < math.inf for end in ends) else None

    def _bracket(self, forward: Trace, own: Trace) -> list[alt.Chart]:
        """Between the times at which both have made as many evaluations, where it is the longest."""
        penalty, last = self.penalty(), self.common - 1
        if penalty is None:
            return []
        (begin, top), (end, y) = ((trace.seconds[last], trace.residual_mean[last]) for trace in (forward, own))
        each = f"{1e3 * penalty.seconds:+.2g} ms\nan iteration ({100 * penalty.share:+.0f} %)"
        text = f"mixing penalty: {each};\nhere: {self.common} iterations"
        ends = style.chart([self._at(begin, y), self._at(end, y)])
        drop = style.chart([self._at(begin, top, y2=y)]).mark_rule(
            color=style.BASELINE, strokeWidth=0.8, strokeDash=[2, 3]
        )
        across = style.chart([self._at(begin, y, x2=self.x(end))]).mark_rule(color=style.INK, strokeWidth=1.8)
        tick = ends.mark_point(shape="stroke", angle=90, size=140, strokeWidth=1.8, color=style.INK, opacity=1)
        return [
            drop.encode(alt.X("x:Q"), alt.Y("y:Q"), alt.Y2("y2:Q")),
            across.encode(alt.X("x:Q"), alt.Y("y:Q"), alt.X2("x2:Q")),
            tick.encode(alt.X("x:Q"), alt.Y("y:Q")),
            *style.words(self._at(max(begin, end), y, text=text), align="right", baseline="top", dy=9),
        ]
