"""The end of a solve: whether what each sample was told still holds in the batch as it is returned.

Samples stop one by one. Where they are independent, as a solver takes them to be, a sample at its tolerance stays
there whatever the others do. Where they see each other (a mean over the batch, nodes of a graph) it does not. So when
a solve has ended, all that stand still are looked at once more:

- in the last evaluation, if that was one of the batch as it is returned (all samples stand still): one pass over x and
  f(x). If a residual is above its tolerance now, the rest of the evaluations goes to the batch as the one system that
  it is;
- in one evaluation more, a *check*, if samples that did not converge are returned beside others that did: their best
  iterates are of several evaluations.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deq.kernels import Outcome, residual_norm
from deq.kernels.state import PATIENCE

from .map import FixedPointMap, Restrict, evaluate, random_state

if TYPE_CHECKING:
    from .iteration import Iteration
    from .solution import Solution
    from .solver import Solver

_ROUNDING = 8.0
"""Units of rounding of a dtype within which two sums of the same numbers are the same."""

_NOISE = 1e-3
"""Of the tolerance. A sample above it by less may have an f that rounds otherwise at every call: it is told as not
converged, but says nothing about other samples."""


class Log:
    """What a solve has cost so far, and what it was asked to keep of its way.

    Args:
        f: the map, (n, ...) -> (n, ...). shape: (B, ...), of the state.
        trace: keep residuals. states_at: the evaluations after which the iterate is kept.
        check: evaluate f where the batch is returned, if it was not yet.
        again: whether f can be evaluated once the solve's own loop has ended.
    """

    def __init__(
        self,
        f: FixedPointMap,
        shape: torch.Size,
        *,
        trace: bool = False,
        states_at: Collection[int] = (),
        check: bool = True,
        again: bool = True,
    ) -> None:
        self._f, self.shape, self._states_at = f, shape, states_at
        self.check, self.again = check, again
        self.evaluations = self.sample_evaluations = self.checks = 0
        self.verified = True
        self.residuals: list[Tensor] | None = [] if trace else None
        self.states: list[Tensor] = []

    def evaluate(self, x: Tensor, f: FixedPointMap | None = None) -> Tensor:
        """f, or another map for some of the samples, at x, (n, d)."""
        self.evaluations += 1
        # From the second on, since masks that are held are drawn in the first.
        drawn = random_state(x.device) if self.evaluations == 2 else None
        fx = self.ask(x, f)
        if drawn is not None and not torch.equal(drawn, random_state(x.device)):
            raise ValueError(
                "f drew random numbers in its second evaluation, so that it is another map at every call and has no "
                "fixed point: draw them before the solve, or use deq.layer.VariationalDropout"
            )
        return fx

    def look_again(self, z: Tensor) -> Tensor:
        """f at z, (n, d): a check, which is no step of the solve."""
        self.checks += 1
        return self.ask(z)

    def ask(self, x: Tensor, f: FixedPointMap | None = None) -> Tensor:
        """f, or another map, at x, (n, d), which counts for the samples alone."""
        self.sample_evaluations += len(x)
        return evaluate(f or self._f, x, (len(x), *self.shape[1:]), first=self.evaluations == 1)

    def keep(self, residual: Tensor, x: Callable[[], Tensor]) -> None:
        """residual: (B,) of the evaluation; x: gives the next iterate, (B, d)."""
        if self.residuals is not None:
            self.residuals.append(residual.clone())
        if self.evaluations in self._states_at:
            self.states.append(x().clone().view(self.shape))

    @property
    def trace(self) -> Tensor | None:
        """(K, B)"""
        return None if self.residuals is None else torch.stack(self.residuals)


@dataclass(frozen=True)
class Look:
    """What the last evaluation says of samples that stand still. Tensors only: it can be recorded in a graph."""

    residual: Tensor
    """(B,) of each sample in that evaluation."""
    whole: Tensor
    """() bool: all samples stand still where they are to be returned, so that this was an evaluation of that batch."""
    told: Tensor
    """() bool: somebody may be told converged."""
    lost: Tensor
    """() bool: one that converged is above its tolerance now."""

    @staticmethod
    def at(solver: Solver, iteration: Iteration, x: Tensor, fx: Tensor) -> Look:
        """x: (B, d), what the last step returned, which for samples that stand still is what was evaluated."""
        outcome, told = iteration.outcome, iteration.residual
        now = residual_norm(x, fx, floor=solver.floor)
        unchanged = (now - told).abs() <= max(_ROUNDING * torch.finfo(now.dtype).eps, solver.rounding) * told
        residual = torch.where(unchanged | (outcome == 0), told, now)
        if solver.stop == "mean":  # all stop together, and anybody may be told converged at the end
            whole = (outcome == Outcome.MEAN_MET).all()
            return Look(residual, whole, torch.ones_like(whole), torch.zeros_like(whole))
        converged = outcome == Outcome.CONVERGED
        lost = converged & ~(now <= _clear(solver, x))
        return Look(residual, converged.all(), converged.any(), lost.any())

    def read(self) -> list[bool]:
        """whole, told and lost. Waits for the device, as :class:`~deq.solvers.iteration.MovingSamples` does."""
        flags = torch.stack([self.whole, self.told, self.lost])
        if flags.device.type == "cuda":
            here, event = torch.empty(3, dtype=torch.bool, pin_memory=True), torch.cuda.Event()
            here.copy_(flags, non_blocking=True)
            event.record()
            event.synchronize()
            flags = here
        return flags.tolist()


def _clear(solver: Solver, x: Tensor) -> float:
    """A residual above this is above tol, and not by the rounding of f."""
    return solver.tol * (1 + max(_NOISE, solver.rounding)) + _ROUNDING * torch.finfo(x.dtype).eps


def conclude(
    solver: Solver,
    iteration: Iteration,
    x: Tensor,
    fx: Tensor,
    log: Log,
    evaluated: Tensor | None = None,
    look: Look | None = None,
) -> Solution:
    """The solution of a batch that was evaluated as a whole.

    x: (B, d), what the last step returned. fx, evaluated: (B, d), the last evaluation, and where it was: x, if all
    samples stand still; without it f may be evaluated once more than it need be.
    """
    look = look or Look.at(solver, iteration, x, fx)
    everybody, told, lost = look.read()
    z, residual = x, look.residual
    if not told:
        z, residual = iteration.best(x)
    elif not everybody:
        before = x if evaluated is None else evaluated
        z, best_residual = iteration.best(x.clone())
        if solver.stop == "mean":  # where the mean was met, the batch is what it was then
            met = iteration.outcome == Outcome.MEAN_MET
            z, best_residual = torch.where(met[:, None], x, z), torch.where(met, look.residual, best_residual)
        if torch.equal(z, before):
            pass  # this was an evaluation of the batch as it is returned
        elif not log.again:
            z = before
        elif not log.check:
            residual, log.verified = best_residual, False
        else:
            fx = log.look_again(z)
            residual = residual_norm(z, fx, floor=solver.floor)
            lost = bool(((iteration.outcome == Outcome.CONVERGED) & ~(residual <= _clear(solver, z))).any())
    if lost and log.verified and log.again and log.evaluations < solver.max_iter:
        return _solve_together(solver, iteration, z, fx, residual, log)
    return solver.account(iteration, z, residual, log, everybody=everybody)


def verify(solver: Solver, solution: Solution, fz: Tensor) -> Solution:
    """A solution that was left unverified, told by the residuals of the batch as it is returned. fz: (B, ...), f there.

    Raises:
        ValueError: if the solver compacts, and a sample has lost in the whole batch what it met among some of it.
    """
    z = solution.z.flatten(1) if solution.z.ndim > 1 else solution.z[:, None]
    residual = residual_norm(z, fz.reshape(z.shape), floor=solver.floor)
    if not solver.compact:
        converged = residual <= solver.tol
        outcome = solution.outcome.masked_fill(solution.converged & ~converged, Outcome.MAX_ITER)
        outcome = outcome.masked_fill(converged, Outcome.CONVERGED)
        return replace(solution, residual=residual, converged=converged, outcome=outcome, verified=True)
    lost = solution.converged & ~(residual <= solver.tol + _other_batch_size(z))
    if bool(lost.any()):
        sample = int(lost.int().argmax())
        raise ValueError(
            f"compact=True needs samples that do not see each other, but sample {sample} converged among some of them, "
            f"and is at a relative residual of {float(residual[sample]):.1e} among all. {_SHARED}"
        )
    return replace(solution, verified=True)


def _other_batch_size(x: Tensor) -> float:
    """Relative difference that the rounding of f in another batch size may make."""
    if x.dtype == torch.float64:
        return 1e-12
    return 1e-3 if x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type) else 2**-6


def go_on_together(solver: Solver, iteration: Iteration, x: Tensor, log: Log) -> Solution:
    """The rest of a solve as one system, from x, (B, d)."""
    fx = log.evaluate(x)
    residual = residual_norm(x, fx, floor=solver.floor)
    log.keep(residual, lambda: x)
    return _solve_together(solver, iteration, x, fx, residual, log)


def _solve_together(
    solver: Solver, iteration: Iteration, z: Tensor, fz: Tensor, residual: Tensor, log: Log
) -> Solution:
    """Goes on from z, (B, d), with the batch as one system: one set of weights, until all samples hold at once."""
    sample = int(((iteration.outcome == Outcome.CONVERGED) & ~(residual <= solver.tol)).int().argmax())
    if solver not in _told:  # once, though every step of a training would have other numbers
        _told.add(solver)
        warnings.warn(
            f"samples of this batch see each other: sample {sample} was at a relative residual of "
            f"{float(iteration.residual[sample]):.1e}, and is at {float(residual[sample]):.1e} since others moved. The "
            "batch is solved as one system from here on; with coupled=True it is from the start, in fewer evaluations",
            RuntimeWarning,
            stacklevel=_level_of_the_caller(),
        )
    x, fx, before = z.clone(), fz, log.evaluations
    # Its own test is left to the samples'.
    one = replace(solver, tol=0.0, atol=0.0, stop="max", compact=False).start(x.view(1, -1), in_place=True)
    best, best_residual, lowest = z.clone(), residual, math.inf
    while True:
        reached = float(residual.max() if solver.stop == "max" else residual.mean())
        if reached < lowest:
            best, best_residual, lowest = best.copy_(x), residual, reached
        ends = reached <= solver.tol or log.evaluations == solver.max_iter or bool(one.outcome != 0)
        if not ends:
            x = one.step(x.view(1, -1), fx.reshape(1, -1), None).view(x.shape)
        if log.evaluations > before:
            log.keep(residual, lambda: x)  # noqa: B023
        if ends:
            break
        fx = log.evaluate(x)
        residual = residual_norm(x, fx, floor=solver.floor)
    # Its own residual may be zero where that of a small sample is not.
    ended = Outcome.MAX_ITER if bool(one.outcome[0] == Outcome.CONVERGED) else Outcome(int(one.outcome[0]))
    if solver.stop == "mean" and lowest <= solver.tol:
        ended = Outcome.MEAN_MET
    elif ended == Outcome.MAX_ITER and bool(one.stalled[0] >= PATIENCE):
        ended = Outcome.STAGNATED
    elif ended == Outcome.NON_FINITE:  # those whose own f is
        ended = Outcome.MAX_ITER
    found = solver.account(iteration, best, best_residual, log)
    outcome = torch.full_like(found.outcome, ended).masked_fill_(~torch.isfinite(best_residual), Outcome.NON_FINITE)
    return replace(
        found,
        iterations=found.iterations + (log.evaluations - before),
        outcome=outcome.masked_fill_(found.converged, Outcome.CONVERGED),
        restarts=found.restarts + one.restarts,
        fallbacks=found.fallbacks + one.fallbacks,
    )


_told: set[Solver] = set()
"""Solvers that have warned."""


def _level_of_the_caller() -> int:
    """The stack level, for a warning, of the first frame that is neither this project's nor PyTorch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("deq", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def hold_to_the_batch(log: Log, restrict: Restrict, last: Tensor, fx: Tensor, tol: float) -> None:
    """Before samples are left out of the evaluations: asks f about the last one alone, where it was in the batch.

    The last, since what is cut by place instead of by sample then shows. Costs an evaluation of one sample.

    last: (1, d), the iterate of the last sample. fx: (B, d), f in the batch.

    Raises:
        ValueError: if the answer is another than in the batch, by more than the rounding of another batch size.
    """
    number = len(fx) - 1
    expected, part = fx[number:].double(), restrict(torch.tensor([number], device=fx.device))
    try:
        alone = log.ask(last, part).double()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"compact=True asks f about some samples alone, but for sample {number} it then fails "
            f"({type(error).__name__}: {error}). {_SHARED}"
        ) from error
    difference = float((alone - expected).norm() / expected.norm()) if bool(expected.isfinite().all()) else 0.0
    # In a backward pass autocast is off, though f may have been recorded under it.
    if not difference <= max(tol, 1e-12 if fx.dtype == torch.float64 else 2**-6):
        raise ValueError(
            f"compact=True asks f about some samples alone, but for sample {number} it then returns something else "
            f"than in the batch (relative difference {difference:.1e}). {_SHARED}"
        )


_SHARED = (
    "Where samples see each other, or the cell keeps something for each of them by itself, use compact=False; where a "
    "tensor of x is shared by all samples name it, DEQ(..., shared=...)"
)
