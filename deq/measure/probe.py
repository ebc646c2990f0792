"""The speedup probe: what the run's solver buys over forward iteration, on one batch, to the same residual."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deq.layer import DEQ
from deq.models import EquilibriumModel
from deq.models.tutorial import TutorialForward, TutorialSolver
from deq.records.errors import UserError, in_yaml
from deq.solvers import Forward, Solution, Solver
from deq.solvers.state import Nest, flatten


@dataclass(frozen=True)
class Reading:
    """One solver on the probe's batch. ``seconds`` is the median of the repeats, ``spread`` the least and the most;
    both are None where the solve did not get to tol."""

    evaluations: int
    residual: float
    seconds: float | None
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """Forward iteration beside the run's solver."""

    forward: Reading
    solver: Reading

    def metrics(self) -> dict[str, float]:
        """Metric name → value. Counts, seconds and ratios are absent for a solve that did not get to tol."""
        metrics: dict[str, float] = {}
        for name, reading in (("forward", self.forward), ("solver", self.solver)):
            metrics[f"speedup/{name}_residual"] = reading.residual
            if reading.seconds is not None:
                metrics[f"speedup/{name}_evaluations"] = reading.evaluations
                metrics[f"speedup/{name}_s"] = reading.seconds
        if self.forward.seconds is not None and self.solver.seconds is not None:
            metrics["speedup/solver"] = self.forward.seconds / self.solver.seconds
            metrics["speedup/evaluations"] = self.forward.evaluations / self.solver.evaluations
        return metrics


@dataclass(frozen=True)
class SpeedupProbe:
    """Solves one fixed batch with both solvers: same start, same tol and stopping test, a cap of its own.

    Args:
        max_iter: cap on the evaluations of f of either solve, at least 1.
        repeats: timed solves of each, of which the median is reported, at least 1.
    """

    max_iter: int = 100
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("max_iter", "repeats"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"probe.{name} must be an integer of at least 1, got {in_yaml(value)}")

    @torch.no_grad()
    def compare(self, model: EquilibriumModel, images: Tensor) -> Comparison:
        """images: (B, C, H, W) float. Leaves the model's mode, batch statistics and accounts as they were."""
        was_training = model.training
        model.eval()
        try:
            injection = model.inject(images)
            solver = replace(model.deq.solver, max_iter=self.max_iter)
            # To the same stopping test: the tutorial's reads one residual of the whole batch.
            baseline: Solver = (
                TutorialForward(tol=solver.tol, max_iter=self.max_iter)
                if isinstance(solver, TutorialSolver)
                else Forward(tol=solver.tol, stop=solver.stop, max_iter=self.max_iter)
            )
            # In turns, so that a machine that slows down slows both.
            graphs = model.deq.cuda_graph
            runs = [_Timed(model.deq.cell, one, injection, cuda_graph=graphs) for one in (baseline, solver)]
            for _ in range(self.repeats):
                for run in runs:
                    if run.converged:
                        run.time()
            return Comparison(*(run.reading() for run in runs))
        finally:
            model.train(was_training)


class _Timed:
    """A solver on one injection; the first solve warms up and tells whether there is anything to time."""

    def __init__(self, cell: Callable[..., Any], solver: Solver, injection: Nest, *, cuda_graph: bool) -> None:
        # A layer of its own around the shared cell: the model's layer keeps the accounts of its last solves.
        self._layer, self._injection = DEQ(cell, solver=solver, cuda_graph=cuda_graph), injection
        self._device = flatten(injection, "x")[0][0].device
        self._seconds: list[float] = []
        self._layer(injection)
        solution = self._layer.last_solution
        assert solution is not None
        self._solution: Solution[Any] = solution
        self._residual = float(solver.stopping_residual(solution))
        self.converged = self._residual <= solver.tol

    def time(self) -> None:
        _synchronize(self._device)
        start = time.perf_counter()
        self._layer(self._injection)
        _synchronize(self._device)
        self._seconds.append(time.perf_counter() - start)

    def reading(self) -> Reading:
        return Reading(
            evaluations=self._solution.evaluations,
            residual=self._residual,
            seconds=statistics.median(self._seconds) if self._seconds else None,
            spread=(min(self._seconds), max(self._seconds)) if self._seconds else None,
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
