"""How each arm looks, the same in every figure, and its curve in the course of training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from deq.report.arms import FORWARD, Arm
from deq.report.compare import ArmNumbers, Comparison, main_baseline
from deq.report.figures.style import FAINT, PALETTE, Look, Row, baseline_look

MOST_COLOURED = len(PALETTE)
"""Arms beside the baselines that have a colour; of more, the fastest have one and the others are grey."""

NOT_EVALUATED = "No run has been evaluated yet: a run's first evaluation ends its first epoch."

Looks = dict[int, Look]
"""``id`` of an arm → how it looks."""


def looks_of(comparison: Comparison) -> Looks:
    """The look of every arm: grey first and the baselines last, the order in which they are drawn."""
    chosen = comparison.baselines or [one.arm for one in comparison.arms if one.arm.is_baseline][:1]
    main = main_baseline(comparison)
    baselines = {id(arm): baseline_look(arm.label, second=arm.solver != FORWARD and arm is not main) for arm in chosen}
    others = [one for one in comparison.arms if id(one.arm) not in baselines]
    coloured = others
    if len(others) > MOST_COLOURED:
        best = {id(one) for one in sorted(others, key=merit, reverse=True)[: MOST_COLOURED - 1]}
        # In the order of the table, so that neighbours there are neighbours in the legend.
        coloured = [one for one in others if id(one) in best]
    solid = {id(one.arm): Look(one.arm.label, colour) for one, colour in zip(coloured, PALETTE, strict=False)}
    rest = [one for one in others if id(one.arm) not in solid]
    grey = Look(f"{len(rest)} other arms", FAINT, width=0.9, faint=True)
    return {id(one.arm): grey for one in rest} | solid | baselines


def merit(one: ArmNumbers) -> tuple[float, float, float]:
    """What the arms that are shown are chosen by: every seed at the target first, then the speedup."""
    first = next(iter(one.against.values()), None)
    accuracy = one.own["test_accuracy_best"]
    never = first.never if first is not None else 0
    return (-never, one.speedup or 0.0, accuracy.median if accuracy is not None else 0.0)


def legend(looks: Looks, shown: Sequence[Arm]) -> list[Look]:
    """The legend's lines for the arms of a figure: baselines first, the grey ones last."""
    entries = {looks[id(arm)].entry: looks[id(arm)] for arm in shown}
    return sorted(entries.values(), key=lambda look: (look.faint, look.dash == (1, 0)))


def name_of(arm: Arm, looks: Looks) -> str:
    """What hovering calls it: a baseline is named as one, and a grey arm, too, has its own name."""
    look = looks[id(arm)]
    return arm.label if look.faint else look.entry


def course(
    comparison: Comparison, looks: Looks, metric: str, factor: float, x: str | bool
) -> tuple[list[Row], list[Arm]]:
    """A metric at each evaluation: median of the seeds, and as the band their range. Rows, and the arms that have any.

    Args:
        x: a metric, or whether to count epochs rather than steps.
    """
    rows: list[Row] = []
    shown = []
    order = list(looks)
    for arm in sorted((one.arm for one in comparison.arms), key=lambda arm: order.index(id(arm))):
        points: dict[int, list[tuple[float, float]]] = {}
        for run in arm.counted:
            for number, one in enumerate(run.evaluations):
                value = one.get(metric)
                at = one.get(x) if isinstance(x, str) else float(one.epoch if x else one.step)
                if value is not None and at is not None:
                    points.setdefault(number, []).append((at, factor * value))
        if points:
            shown.append(arm)
        look = looks[id(arm)]
        for number in sorted(points):
            values = [value for _, value in points[number]]
            row: Row = {"name": name_of(arm, looks), "entry": look.entry}
            row |= {"x": statistics.median(at for at, _ in points[number]), "y": statistics.median(values)}
            if not look.faint and len(arm.counted) > 1:
                row |= {"low": min(values), "high": max(values)}
            rows.append(row)
    return rows, shown
