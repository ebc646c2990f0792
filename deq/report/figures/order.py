"""All figures of a report, in the order of its page."""

from __future__ import annotations

from deq.report.compare import Comparison
from deq.report.figures import accuracy, crossover, energy, evaluations, window_beta
from deq.report.figures.looks import looks_of
from deq.report.figures.style import Figure, Missing


def figures_of(comparison: Comparison) -> list[Figure | Missing]:
    """Each drawn, or said to be missing."""
    looks = looks_of(comparison)
    return [
        accuracy.figure(comparison, looks),
        *crossover.figures(comparison, looks),
        evaluations.count(comparison, looks),
        evaluations.unconverged(comparison, looks),
        energy.figure(comparison, looks),
        *window_beta.figures(comparison),
    ]
