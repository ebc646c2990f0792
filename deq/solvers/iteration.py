"""What a method brings: one step after another, and the books of every sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deq.kernels import Outcome
from deq.kernels.state import FAR, PROGRESS, accumulator_dtype, track_progress
from deq.kernels.window import residual_and_size

if TYPE_CHECKING:
    from .solver import Solver


class Iteration(Protocol):
    """The state of one solve; made anew for each."""

    @property
    def residual(self) -> Tensor:
        """(B,) relative residual of the x last given."""

    @property
    def outcome(self) -> Tensor:
        """(B,) uint8: 0 for a sample that moves, else the :class:`Outcome` for which it is left alone from now on."""

    @property
    def stalled(self) -> Tensor:
        """(B,): steps since the relative residual last fell by a twentieth."""

    @property
    def restarts(self) -> Tensor:
        """(B,) int32: see :class:`Solution`."""

    @property
    def fallbacks(self) -> Tensor:
        """(B,) int32: see :class:`Solution`."""

    @property
    def iterations(self) -> Tensor:
        """(B,) int32: steps that each sample took part in."""

    def step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        """Takes x and f(x) into account; returns the next iterate: x itself for samples that stand still after it
        (``outcome``). May write into x, never into fx.

        x, fx: (n, d), those of the samples in ``index``, (n,) int64, or (B, d) where it is None.
        """

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The iterate of lowest residual, sample by sample, (B, d), and that residual, (B,).

        x: (B, d), what the last step that a sample took part in returned for it; may be overwritten.
        """

    def reset(self) -> None:
        """As new, in the same memory."""


class Books:
    """What iterations without an :class:`deq.kernels.AndersonWindow` keep of every sample."""

    def __init__(self, x: Tensor, solver: Solver) -> None:
        self._solver = solver
        batch_size = x.shape[0]
        self.residual = torch.full((batch_size,), torch.inf, dtype=accumulator_dtype(x.dtype), device=x.device)
        self.lowest = self.residual.clone()
        self._size = torch.full_like(self.residual, torch.inf, dtype=torch.float64)
        self.outcome = torch.zeros(batch_size, dtype=torch.uint8, device=x.device)
        self.iterations, self.stalled, self.restarts, self.fallbacks = torch.zeros(
            4, batch_size, dtype=torch.int32, device=x.device
        )

    def enter(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        """Takes an evaluation, x and fx (n, d), into account; returns which of these samples stay at x, (n,) bool."""
        part = slice(None) if index is None else index
        solver, before = self._solver, self.outcome[part]
        active = before == 0
        self.iterations[part] += active
        residual, size = residual_and_size(x, fx, solver.floor)
        residual = torch.where(active, residual, self.residual[part])
        self.residual[part] = residual
        lowest, stalled = track_progress(residual, self.lowest[part], self.stalled[part])
        # A sample on its way to zero makes progress, too, though its relative residual stays.
        stalled.masked_fill_(size < PROGRESS * self._size[part], 0)
        self._size[part] = torch.where(stalled == 0, size, self._size[part])
        self.lowest[part], self.stalled[part] = lowest, stalled
        # Few operations: where f is cheap, each of them is felt.
        given_up = (stalled >= solver.patience) & (lowest > FAR) if solver.patience else torch.zeros_like(active)
        now = given_up.to(before.dtype).mul_(Outcome.DIVERGED).masked_fill_(residual.isnan(), Outcome.NON_FINITE)
        if solver.stop == "max":
            now.masked_fill_(residual <= solver.tol, Outcome.CONVERGED)
        outcome = torch.where(active, now, before)
        self.outcome[part] = outcome
        if solver.stop == "mean":
            # Before the step, so that what is frozen stays at the iterate that its residual belongs to.
            solver.stop_at_mean(self.residual, self.outcome)
            outcome = self.outcome[part]
        return outcome != 0

    def reset(self) -> None:
        """As new, in the same memory."""
        self.residual.fill_(torch.inf)
        for tensor in (self.lowest, self._size):
            tensor.fill_(torch.inf)
        for tensor in (self.outcome, self.iterations, self.stalled, self.restarts, self.fallbacks):
            tensor.zero_()


class MovingSamples:
    """How many samples still move, for the host: at once on a CPU, one iteration late on a GPU.

    There the count of the iteration before is waited for, so that the device always has an iteration in hand. A late
    count is never too low: samples freeze and stay frozen.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._late = device.type == "cuda"
        self._previous = batch_size
        if self._late:
            self._counts = torch.full((2,), batch_size, dtype=torch.int64, pin_memory=True)
            self._events = (torch.cuda.Event(), torch.cuda.Event())
            self._reads = 0

    def count(self, outcome: Tensor, lost: Tensor | None = None) -> int:
        """outcome: (B,) uint8, 0 for samples that move. lost, () bool: whether to say -1 instead."""
        moving = (outcome == 0).sum()
        if lost is not None:
            moving = torch.where(lost, -1, moving)
        if not self._late:
            return int(moving)
        now = self._reads % 2
        self._counts[now].copy_(moving, non_blocking=True)
        self._events[now].record()
        self._reads += 1
        if self._reads == 1:
            return self._previous
        self._events[1 - now].synchronize()
        return int(self._counts[1 - now])
