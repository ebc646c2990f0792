"""The end of a solve: whether what each sample was told still holds in the batch as it is returned.

Samples stop one by one. Where they are independent, as a solver takes them to be, a sample at its tolerance stays
there whatever the others do. Where they see each other (a mean over the batch, nodes of a graph) it does not. So when
a solve has ended, all that stand still are looked at once more, in the last evaluation, which was one of all of them:
one pass over x and f(x). If a residual is above its tolerance now, the batch is solved as the one system that it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import Outcome, residual_norm
from kernels.state import PATIENCE

from .map import FixedPointMap, Restrict, evaluate

if TYPE_CHECKING:
    from .base import Iteration, Solution, Solver

_ROUNDING = 8.0
"""Units of rounding of the residual's dtype within which two sums of the same numbers are the same."""

_NOISE = 1e-3
"""Of the tolerance. A sample above it by less may have an f that rounds otherwise at every call: it is told as not
converged, but says nothing about other samples."""


class Log:
    """What a solve has cost so far, and what it was asked to keep of its way.

    Args:
        f: the map, (n, ...) -> (n, ...). shape: (B, ...), of the state.
        trace: keep residuals. states_at: the evaluations after which the iterate is kept.
    """

    def __init__(
        self, f: FixedPointMap, shape: torch.Size, trace: bool = False, states_at: Collection[int] = ()
    ) -> None:
        self._f, self.shape, self._states_at = f, shape, states_at
        self.evaluations = self.sample_evaluations = 0
        self.residuals: list[Tensor] | None = [] if trace else None
        self.states: list[Tensor] = []

    def evaluate(self, x: Tensor, f: FixedPointMap | None = None) -> Tensor:
        """f, or another map for some of the samples, at x, (n, d)."""
        self.evaluations += 1
        self.sample_evaluations += len(x)
        return evaluate(f or self._f, x, (len(x), *self.shape[1:]))

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
    """() bool: all samples stand still, so that the batch is returned as it was evaluated."""
    proven: Tensor
    """() bool: every sample that converged stood still while others moved, and did not notice."""
    lost: Tensor
    """() bool: one that converged is above its tolerance now."""

    @staticmethod
    def at(solver: Solver, iteration: Iteration, x: Tensor, fx: Tensor) -> Look:
        """x: (B, d), what the last step returned, which for samples that stand still is what was evaluated."""
        outcome, told = iteration.outcome, iteration.residual
        now = residual_norm(x, fx, floor=solver.floor)
        unchanged = (now - told).abs() <= max(_ROUNDING * torch.finfo(now.dtype).eps, solver.rounding) * told
        converged = outcome == Outcome.CONVERGED
        stands = converged | (outcome == Outcome.MEAN_MET)
        # It stood still when another took a step.
        proven = unchanged & (iteration.iterations < iteration.iterations.max())
        if solver.stop == "mean":
            proven = torch.zeros_like(proven)  # all stop together: nobody stood still while others moved
        lost = converged & ~unchanged & ~(now <= solver.tol * (1 + _NOISE))
        everybody = (proven | ~converged).all() & (solver.stop == "max")
        return Look(torch.where((outcome != 0) & ~unchanged, now, told), stands.all(), everybody, lost.any())

    def read(self) -> list[bool]:
        """whole, proven and lost. Waits for the device, as :class:`~deq.solvers.base.MovingSamples` does."""
        flags = torch.stack([self.whole, self.proven, self.lost])
        if flags.device.type == "cuda":
            here, event = torch.empty(3, dtype=torch.bool, pin_memory=True), torch.cuda.Event()
            here.copy_(flags, non_blocking=True)
            event.record()
            event.synchronize()
            flags = here
        return flags.tolist()


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

    x: (B, d), what the last step returned. fx, evaluated: (B, d), the last evaluation, and where it was; the latter
    where no other can follow.
    """
    look = look or Look.at(solver, iteration, x, fx)
    whole, proven, lost = look.read()
    more = log.evaluations < solver.max_iter
    z, residual = x, look.residual
    if not whole:
        z, best_residual = iteration.best(x.clone())
        # A sample that is given up at once has no better iterate than that which was evaluated.
        whole = bool(((z == x) | (z.isnan() & x.isnan())).all())
    if whole:
        pass
    elif proven and not lost:
        residual = best_residual
    elif more:
        # The best iterates of samples that did not converge are of several evaluations: what do the others say to them?
        fx = log.evaluate(z)
        residual = residual_norm(z, fx, floor=solver.floor)
        log.keep(residual, lambda: z)
        converged = iteration.outcome == Outcome.CONVERGED
        lost = bool((converged & ~(residual <= solver.tol * (1 + _NOISE))).any())
        more = log.evaluations < solver.max_iter
    else:
        assert evaluated is not None
        z = evaluated
    if lost and more:
        return _solve_together(solver, iteration, z, fx, residual, log)
    return solver.account(iteration, z, residual, log)


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
    warnings.warn(
        f"samples of this batch see each other: sample {sample} was at a relative residual of "
        f"{float(iteration.residual[sample]):.1e}, and is at {float(residual[sample]):.1e} since others moved. The "
        "batch is solved as one system from here on; with coupled=True it is from the start, in fewer evaluations",
        RuntimeWarning,
        stacklevel=2,
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
    ended = one.outcome[0]
    if solver.stop == "mean" and lowest <= solver.tol:
        ended = torch.full_like(ended, Outcome.MEAN_MET)
    elif bool(ended == 0) and bool(one.stalled[0] >= PATIENCE):
        ended = torch.full_like(ended, Outcome.STAGNATED)
    found = solver.account(iteration, best, best_residual, log)
    return replace(
        found,
        iterations=found.iterations + (log.evaluations - before),
        outcome=torch.where(found.converged, Outcome.CONVERGED, ended).to(torch.uint8),
        restarts=found.restarts + one.restarts,
        fallbacks=found.fallbacks + one.fallbacks,
    )


def hold_to_the_batch(log: Log, restrict: Restrict, last: Tensor, fx: Tensor, tol: float) -> None:
    """Before samples are left out of the evaluations: asks f about the last one alone, where it was in the batch.

    The last, since what is cut by place instead of by sample then shows. Costs an evaluation of one sample.

    last: (1, d), the iterate of the last sample. fx: (B, d), f in the batch.

    Raises:
        ValueError: if the answer is another than in the batch, by more than the rounding of another batch size.
    """
    number = len(fx) - 1
    expected = fx[number:].double()
    try:
        log.evaluations -= 1  # not one of the batch
        alone = log.evaluate(last, restrict(torch.tensor([number], device=fx.device))).double()
    except Exception as error:
        raise ValueError(
            f"compact=True asks f about some samples alone, but for sample {number} it then fails "
            f"({type(error).__name__}: {error}). {_SHARED}"
        ) from error
    difference = float((alone - expected).norm() / expected.norm())
    rounding = _HALF if torch.is_autocast_enabled(fx.device.type) else _OTHER_BATCH_SIZE * torch.finfo(fx.dtype).eps
    if difference > max(tol, min(rounding, _HALF)):
        raise ValueError(
            f"compact=True asks f about some samples alone, but for sample {number} it then returns something else "
            f"than in the batch (relative difference {difference:.1e}). {_SHARED}"
        )


_OTHER_BATCH_SIZE, _HALF = 1e4, 2**-6
"""Relative difference that the rounding of another batch size may make: in units of the dtype's, and the most, which is
that of half precision and of autocast."""

_SHARED = (
    "Where samples see each other, or the cell keeps something for each of them by itself, use compact=False; where a "
    "tensor of x is shared by all samples name it, DEQ(..., shared=...)"
)
