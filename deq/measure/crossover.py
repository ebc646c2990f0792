"""What the crossover figure shows: relative residual against seconds and evaluations, forward iteration and others.

An iteration of Anderson's method costs more than one of forward iteration, by the *mixing penalty*, and brings the
residual down faster, so that there is a *crossover*: a residual below which it is ahead (arXiv 2410.19460, figure 1).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deq.kernels.state import on_device
from deq.models.tutorial import TutorialForward, TutorialSolver
from deq.records.errors import UserError, in_yaml
from deq.records.traces import Trace, crossing, mixing_penalty
from deq.solvers import Forward, Solver
from deq.solvers.state import Nest, flatten, mapped

FORWARD = "forward iteration"


@dataclass(frozen=True)
class Crossover:
    """What is measured at the end of a run, on the first test batch, with the model that was trained.

    Args:
        windows: windows of Anderson's method, beside the run's own solver and forward iteration; other solvers have
            none.
        max_iter: evaluations of f in each solve, at least 2; none stops at a tolerance.
        repeats: timed solves of each, of which the median is reported, at least 1.
        picture: draw ``crossover.png`` into the run's folder.

    Raises:
        UserError: for an option outside its limits.

    Example:
        >>> Crossover(windows=[2, 5], max_iter=40).repeats
        5
    """

    windows: Sequence[int] = ()
    max_iter: int = 60
    repeats: int = 5
    picture: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_iter", 2), ("repeats", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"crossover.{name} must be an integer of at least {least}, got {in_yaml(value)}")
        if not isinstance(self.picture, bool):
            raise UserError(f"crossover.picture must be true or false, got {in_yaml(self.picture)}")
        windows: object = self.windows
        if isinstance(windows, str) or not isinstance(windows, Sequence):
            raise UserError(f"crossover.windows must be a list, such as [2,5,10], got {in_yaml(windows)}")
        for window in windows:
            if isinstance(window, bool) or not isinstance(window, int) or window < 1:
                raise UserError(f"crossover.windows must be integers of at least 1, got {in_yaml(window)}")

    def solvers(self, solver: Solver) -> dict[str, Solver]:
        """Name -> solver: forward iteration, the run's own, and it again with each of ``windows``."""
        found: dict[str, Solver] = {FORWARD: Forward(max_iter=self.max_iter)}
        if not isinstance(solver, Forward):
            found[named(solver)] = solver
        for window in self.windows if hasattr(solver, "window") else ():
            other = replace(solver, window=window)  # type: ignore[call-arg]  # it has one
            found[named(other)] = other
        order = sorted(found.items(), key=lambda item: (item[0] != FORWARD, getattr(item[1], "window", 0)))
        return dict(order)

    def measure(
        self, cell: Callable[[Any, Any], Any], injection: Nest, solver: Solver
    ) -> tuple[list[Trace], dict[str, Any]]:
        """The traces and what ``traces.json`` says about them. injection: (B, ...), the cell's second argument, or a
        nest of such."""
        traces = measure_traces(cell, injection, self.solvers(solver), max_iter=self.max_iter, repeats=self.repeats)
        first = flatten(injection, "x")[0][0]
        device = first.device
        about = {
            "batch": f"{len(first)} test images",
            "stop": "mean" if isinstance(solver, TutorialSolver) else solver.stop,
            "tol": solver.tol,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "repeats": self.repeats,
        }
        return traces, about


def named(solver: Solver) -> str:
    """``Anderson m = 5, plain``: the solver and what tells it from others in one figure."""
    kind = type(solver).__name__
    if isinstance(solver, Forward | TutorialForward):
        damped = f", β = {solver.beta:g}" if isinstance(solver, Forward) and solver.beta != 1 else ""
        return FORWARD + damped if isinstance(solver, Forward) else f"{FORWARD}, as the tutorial writes it"
    name = kind.removeprefix("Tutorial")
    if hasattr(solver, "window"):
        name += f" m = {solver.window}"
    if getattr(solver, "beta", 1) != 1:
        name += f", β = {solver.beta:g}"  # type: ignore[attr-defined]
    if getattr(solver, "regularization", "scaled") != "scaled":
        name += f", {solver.regularization}"  # type: ignore[attr-defined]
    elif getattr(solver, "adaptive", None) is False:
        name += ", plain"
    return f"{name}, as the tutorial writes it" if isinstance(solver, TutorialSolver) else name


@torch.no_grad()
def measure_traces(
    cell: Callable[[Any, Any], Any],
    injection: Nest,
    solvers: Mapping[str, Solver],
    *,
    max_iter: int = 60,
    repeats: int = 5,
) -> list[Trace]:
    """Solves z = cell(z, injection) with every solver, from zeros and past any tolerance; keeps residuals and times.

    The loops are those of :meth:`Solver.solve`, also for a layer that replays recorded graphs. The solvers take turns,
    so that a machine that slows down slows all of them; the residuals are kept in a solve of its own, whose time does
    not count. On a GPU the times are those of events in its stream.

    Args:
        cell: (z, x) -> z. injection: x, (B, ...), or a nest of such, in the shapes of z.
        solvers: name for people -> solver; their ``tol``, ``max_iter``, ``patience`` and ``compact`` are not used.
        max_iter: evaluations in each solve. repeats: timed solves of each, at least 1.

    Example:
        >>> import torch
        >>> from deq.solvers import Anderson, Forward
        >>> solvers = {"forward iteration": Forward(), "Anderson m = 3": Anderson(window=3)}
        >>> forward, anderson = measure_traces(lambda z, x: torch.cos(z + x), torch.rand(4, 8), solvers, max_iter=10)
        >>> anderson.residual_mean[-1] < forward.residual_mean[-1], len(anderson.seconds)
        (True, 10)
    """
    with on_device(flatten(injection, "x")[0][0].device):
        return _measure_traces(cell, injection, solvers, max_iter, repeats)


def _measure_traces(
    cell: Callable[[Any, Any], Any],
    injection: Nest,
    solvers: Mapping[str, Solver],
    max_iter: int,
    repeats: int,
) -> list[Trace]:
    start = mapped(injection, torch.zeros_like)
    endless = {
        name: replace(solver, tol=0.0, max_iter=max_iter, patience=0, compact=False) for name, solver in solvers.items()
    }

    def f(z: Any) -> Any:
        return cell(z, injection)

    residuals: dict[str, Tensor] = {}
    for name, solver in endless.items():
        trace = solver.solve(f, start, trace=True).trace
        assert trace is not None
        residuals[name] = trace.double().cpu()
    clock = _Clock(flatten(injection, "x")[0][0].device)
    times: dict[str, list[list[float]]] = {name: [] for name in endless}
    for _ in range(repeats):
        for name, solver in endless.items():
            # In training a solve finds the memory of the one before, not that of a solver with another window.
            replace(solver, max_iter=1).solve(f, start)
            clock.start()
            solver.solve(clock.watching(f), start)
            times[name].append(clock.seconds())
    return [
        _trace(name, solvers[name], residuals[name], [list(column) for column in zip(*times[name], strict=False)])
        for name in endless
    ]


def _trace(name: str, solver: Solver, residuals: Tensor, seconds: list[list[float]]) -> Trace:
    """residuals: (K, B) float64. seconds: for each evaluation, those of the repeats."""
    percentiles = torch.nanquantile(residuals, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=1)
    # A solve may end early, at a residual of exactly 0.
    count = min(len(residuals), len(seconds))
    low, median, high = (row[:count].tolist() for row in percentiles)
    return Trace(
        solver=name,
        kind=type(solver).__name__.lower(),
        baseline=isinstance(solver, Forward | TutorialForward),
        evaluations=list(range(1, count + 1)),
        seconds=[statistics.median(column) for column in seconds[:count]],
        residual_mean=residuals[:count].nanmean(dim=1).tolist(),
        residual_p10=low,
        residual_median=median,
        residual_p90=high,
    )


class _Clock:
    """When each evaluation of a solve began, and when the solve ended."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self._marks = []
        self._mark()

    def watching(self, f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def watched(z: Any) -> Any:
            self._mark()
            return f(z)

        return watched

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """For every evaluation: from the start until the next one began, for the last until now."""
        self._mark()
        first, _, *after = self._marks
        if not self._cuda:
            return [mark - first for mark in after]
        torch.cuda.synchronize(self._device)
        return [first.elapsed_time(mark) / 1e3 for mark in after]


def metrics_of(traces: Sequence[Trace], solver: Solver) -> dict[str, float]:
    """The mixing penalty and the crossover of the run's own solver, by their names in :mod:`deq.records.metrics`."""
    by_name = {trace.solver: trace for trace in traces}
    forward, own = by_name.get(FORWARD), by_name.get(named(solver))
    if forward is None or own is None or own.baseline:
        return {}
    penalty, cross = mixing_penalty(forward, own), crossing(forward, own)
    found: dict[str, float] = {}
    if penalty is not None:
        found |= {"crossover/mixing_penalty_s": penalty.seconds, "crossover/mixing_penalty": penalty.share}
    return found if cross is None else found | {"crossover/residual": cross.residual}
