"""Curves of the residual: what an iteration takes, and where one curve goes below another for good.

Needs nothing but Python, so that a report, which reads files alone, has the very numbers of the run that wrote them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
"""(seconds or evaluations, relative residual), in their order."""


class Crossing(NamedTuple):
    """Where a curve goes below another for good."""

    x: float
    """Seconds or evaluations."""
    residual: float


def crossing(ours: Points, theirs: Points) -> Crossing | None:
    """Where ``ours`` goes below ``theirs`` and stays there, as far as both were followed.

    Between its points a curve is straight on a logarithmic axis, as it is drawn. None if it does not, or if it has been
    below from the first on (:func:`ahead` tells the two apart).

    Example:
        >>> forward, anderson = [(1, 1e-1), (2, 1e-2), (3, 1e-3), (4, 1e-4)], [(2, 1e-1), (4, 1e-6)]
        >>> crossing(anderson, forward)
        Crossing(x=2.666..., residual=0.0021...)
    """
    gaps = _gaps(ours, theirs)
    if not gaps or gaps[-1][1] >= 0:
        return None
    behind = [index for index, (_, gap) in enumerate(gaps) if gap >= 0]
    if not behind:
        return None
    (x0, gap0), (x1, gap1) = gaps[behind[-1]], gaps[behind[-1] + 1]
    x = x0 + (x1 - x0) * gap0 / (gap0 - gap1)
    return Crossing(x, math.exp(_at(_logs(ours), x)))


def ahead(ours: Points, theirs: Points) -> bool:
    """Whether ``ours`` is below ``theirs`` where the first of the two ends."""
    gaps = _gaps(ours, theirs)
    return bool(gaps) and gaps[-1][1] < 0


def seconds_an_iteration(seconds: Sequence[float]) -> float | None:
    """Median over the iterations after the first, which sets the solve up; None where there is no other.

    Args:
        seconds: when each iterate was there.
    """
    steps = [after - before for before, after in itertools.pairwise(seconds)]
    return statistics.median(steps) if steps else None


def _gaps(ours: Points, theirs: Points) -> list[tuple[float, float]]:
    """(x, log of our residual less log of theirs) at every x of both, where both are."""
    a, b = _logs(ours), _logs(theirs)
    if not a or not b:
        return []
    begin, end = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
    return [(x, _at(a, x) - _at(b, x)) for x in sorted({x for x, _ in (*a, *b) if begin <= x <= end})]


def _logs(points: Points) -> list[tuple[float, float]]:
    """Without what has no logarithm."""
    return [(x, math.log(residual)) for x, residual in points if residual > 0 and math.isfinite(residual)]


def _at(curve: list[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[0][1] if x <= curve[0][0] else curve[-1][1]
