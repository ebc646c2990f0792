"""Test accuracy against seconds of training."""

from __future__ import annotations

import altair as alt

from deq.report.arms import FORWARD, Arm
from deq.report.compare import Comparison
from deq.report.figures.looks import NOT_EVALUATED, Looks, course, legend
from deq.report.figures.style import Figure, Look, Missing, Row, curves, diamonds, linear, panel, rule_look, rules


def figure(comparison: Comparison, looks: Looks) -> Figure | Missing:
    """Curves, the accuracies that times are taken to, and a diamond where an arm is there."""
    key, title = "accuracy", "Test accuracy against seconds of training"
    rows, shown = course(comparison, looks, "test/accuracy", 100.0, x="time/train_s")
    if not rows:
        return Missing(key, title, NOT_EVALUATED)
    targets = _targets(comparison, looks)
    entries = [*legend(looks, shown), *(look for _, look in targets)]
    reached = _reached(comparison, looks)
    caption = (
        "Line: median of the seeds at each evaluation, band: their range. Seconds of training steps alone, without "
        "evaluation."
    )
    if reached:
        aim = "the target" if comparison.target is not None else "the baseline's best accuracy"
        caption += f" Diamond: median seconds until {aim}, where all seeds reach it."
    x, y = linear(alt.X, "seconds of training"), linear(alt.Y, "test accuracy, %")
    layers = [*rules(targets, entries), *curves(rows, entries, x, y, points=True), *diamonds(reached, entries)]
    return Figure(key, title, caption, [panel(layers)], entries)


def _targets(comparison: Comparison, looks: Looks) -> list[tuple[float, Look]]:
    if comparison.target is not None:
        return [(100 * comparison.target, rule_look(f"target: {100 * comparison.target:g} % (--target)"))]
    found = []
    for arm in comparison.baselines[:2]:
        best = next(one for one in comparison.arms if one.arm is arm).own["test_accuracy_best"]
        if best is not None:
            entry = f"target: best of {short(arm)}, {100 * best.median:.2f} % (median)"
            found.append((100 * best.median, rule_look(entry, looks[id(arm)].colour)))
    return found


def _reached(comparison: Comparison, looks: Looks) -> list[Row]:
    found = []
    for one in comparison.arms:
        first, look = next(iter(one.against.values()), None), looks[id(one.arm)]
        # The median of the seeds that reach it would flatter an arm of which others do not.
        if first is None or first.never or look.faint or first.seconds is None or first.target is None:
            continue
        seconds = first.seconds.median
        what = f"all seeds at the target, median {seconds:.4g} s"
        found.append({"x": seconds, "y": 100 * first.target.median, "entry": look.entry, "what": what})
    return found


def short(arm: Arm) -> str:
    """A baseline's name within a sentence."""
    return "forward iteration" if arm.solver == FORWARD else "the tutorial's forward iteration"
