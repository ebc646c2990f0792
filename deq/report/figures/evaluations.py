"""What the solves took in the course of training: evaluations of f, and samples that did not converge."""

from __future__ import annotations

import altair as alt

from deq.report.compare import Comparison
from deq.report.figures.looks import NOT_EVALUATED, Looks, course, legend
from deq.report.figures.style import Figure, Missing, curves, linear, panel


def count(comparison: Comparison, looks: Looks) -> Figure | Missing:
    """Evaluations of f."""
    metrics = {"forward solve": "solver/forward_evaluations", "backward solve": "solver/backward_evaluations"}
    caption = "Mean over the solves since the evaluation before; line: median of the seeds, band: their range."
    words = ("Evaluations of f in the course of training", "evaluations a solve, mean", caption)
    return _figure(comparison, looks, "evaluations", words, metrics, 1.0)


def unconverged(comparison: Comparison, looks: Looks) -> Figure | Missing:
    """The share of samples whose solve ended above tol."""
    metrics = {
        "forward solve": "solver/forward_unconverged_fraction",
        "backward solve": "solver/backward_unconverged_fraction",
    }
    caption = (
        "Share of samples whose relative residual was above tol when their solve ended, in the training steps "
        "since the evaluation before; line: median of the seeds, band: their range."
    )
    words = ("Samples that did not converge", "samples above tol, %", caption)
    return _figure(comparison, looks, "unconverged", words, metrics, 100.0)


def _figure(
    comparison: Comparison,
    looks: Looks,
    key: str,
    words: tuple[str, str, str],
    metrics: dict[str, str],
    factor: float,
) -> Figure | Missing:
    """A panel for each solve. words: title, y axis, caption. metrics: the solve's name → its metric."""
    title, y_title, caption = words
    # Runs that are also evaluated within an epoch have several points in it.
    epochs = [[one.epoch for one in run.evaluations] for arm in comparison.arms for run in arm.arm.counted]
    by_epoch = all(len(set(numbers)) == len(numbers) for numbers in epochs)
    found = {name: course(comparison, looks, metric, factor, by_epoch) for name, metric in metrics.items()}
    found = {name: both for name, both in found.items() if both[0]}
    if not found:
        return Missing(key, title, NOT_EVALUATED)
    entries = legend(looks, [arm for _, shown in found.values() for arm in shown])
    panels = []
    for name, (rows, _) in found.items():
        top = max(row["high"] if "high" in row else row["y"] for row in rows) or 1.0
        at = [row["x"] for row in rows]
        x = linear(alt.X, "epoch" if by_epoch else "training steps", whole=True, domain=[min(at), max(at)], nice=False)
        y = linear(alt.Y, y_title, domain=[-0.03 * top, 1.06 * top], nice=False)  # a line at 0 is drawn whole
        points = len(set(at)) < 30
        panels.append(panel(curves(rows, entries, x, y, points=points), name))
    if len(panels) == 1:
        caption += " The runs here have no other solve to show: their gradient solves no adjoint equation."
    return Figure(key, title, caption, panels, entries)
