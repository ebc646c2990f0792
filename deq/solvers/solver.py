"""What a solver is: options, a loop around the steps of its iteration, a stopping test, and an honest account."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from deq.kernels import Outcome
from deq.kernels.state import PATIENCE, on_device
from deq.kernels.tracing import refuse_tracing, runs_as_it_is
from deq.kernels.window import is_real, is_whole, validate_patience

from .batch import Log, Look, conclude, go_on_together, hold_to_the_batch, verify
from .iteration import Iteration, MovingSamples
from .map import FixedPointMap, Restrict, validate_start
from .solution import Solution, State
from .state import Coordinates

Stop = Literal["max", "mean"]

_FIRST_LOOK = 20
"""Evaluations after which samples that stand still are looked at while others go on, and again after twice as many."""

_COMPACT_AT = 0.75
"""Share of the samples last evaluated at which the others are left out: a new batch size costs f something, too."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Fixed points of z = f(z), all samples of a batch at once.

    The stopping test is on the relative residual ``||f(z) - z|| / ||f(z)||`` of each sample. With ``stop="max"``
    the solve ends when every sample is at ``tol`` or below, and a sample that gets there is frozen: it is not moved
    any more. With ``stop="mean"`` it ends when the mean of the samples that were not given up is, and no other is
    frozen before; the batch is then returned as it was in that evaluation. At most ``max_iter`` evaluations of f are
    made.

    A row of the state is a sample, and samples are taken to be independent. That is checked: when a solve ends, the
    residuals of frozen samples are looked at again in its last evaluation. Where the others have moved one away from
    its tolerance, a warning says so and the rest of the evaluations goes to the batch as one system. No sample is ever
    told ``converged`` whose residual in the batch that is returned is above ``tol``. Where rows are known to see each
    other (nodes of a graph, attention over the batch) ``solve(..., coupled=True)`` treats the batch as one system
    from the start: one residual, one set of weights, one end.

    With ``compact`` the evaluations of f shrink with the number of samples that still move: once a quarter of those
    evaluated has frozen, f is asked about the others alone. That needs a map that can be restricted to some samples
    (``solve(..., restrict=)``; a DEQ layer does it by itself) and that treats samples independently: that is looked at
    with one of them alone before others are left out, and in an evaluation of all at the end.

    On a GPU the loop never waits for the iteration that it has just launched: how many samples still move is read
    one iteration late, through pinned memory. That costs one evaluation more, in which nothing moves. The host asks
    after every ``check_every`` evaluations; a larger number saves it some work where f is very cheap, and costs up to
    ``check_every - 1`` evaluations more (``solution.idle_evaluations``). What is found is the same.

    A sample that is far from a solution, at a relative residual above 0.1, and has not come nearer by a twentieth in
    ``patience`` evaluations is taken to diverge and given up: frozen, and returned at the best iterate that the solver
    still holds. Of 19 samples of random cells that forward iteration had given up, none converged later; plain Anderson
    (``adaptive=False``) may need longer: 0 goes on to the cap.

    Args:
        tol: at least 0; 1e-2 to 1e-6 are usual.
        atol: at least 0: the test is ``||f(z) - z|| <= tol ||f(z)|| + atol``, and residuals are relative to
            ``||f(z)|| + atol / tol``. For solutions that may be zero.
        max_iter: evaluations of f at most, at least 1.
        stop: ``max`` or ``mean``.
        compact: leave samples that have converged out of the evaluations.
        check_every: evaluations between two looks at who still moves, at least 1.
        patience: evaluations, or 0 to go on to ``max_iter`` in any case.

    Raises:
        ValueError: for an option outside its limits.

    Example:
        >>> from deq.solvers import Forward
        >>> Forward(tol=1e-4, stop="mean")
        Forward(tol=0.0001, atol=0.0, max_iter=50, stop='mean', compact=False, check_every=1, patience=20, beta=1.0)
        >>> Forward(max_iter=0)
        Traceback (most recent call last):
        ValueError: max_iter must be at least 1, got 0
    """

    tol: float = 1e-3
    atol: float = 0.0
    max_iter: int = 50
    stop: Stop = "max"
    compact: bool = False
    check_every: int = 1
    patience: int = PATIENCE

    def __post_init__(self) -> None:
        """Raises ValueError, naming value, limit and fix."""
        if not (is_real(self.tol) and self.tol >= 0.0 and math.isfinite(self.tol)):
            raise ValueError(f"tol must be finite and at least 0, got {self.tol!r} (relative: 1e-2 to 1e-6 are usual)")
        if not (is_real(self.atol) and self.atol >= 0.0 and math.isfinite(self.atol)):
            raise ValueError(f"atol must be finite and at least 0, got {self.atol!r} (0: the test is relative alone)")
        if self.atol > 0.0 and self.tol == 0.0:
            raise ValueError(f"atol={self.atol} needs a tol above 0, got 0: give tol=1e-12 for a test that is absolute")
        if not is_whole(self.max_iter):
            raise ValueError(f"max_iter must be a whole number of evaluations of f, got {self.max_iter!r}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter}")
        if not is_whole(self.check_every) or self.check_every < 1:
            raise ValueError(f"check_every must be a whole number of evaluations, at least 1, got {self.check_every!r}")
        validate_patience(self.patience)
        if self.stop not in get_args(Stop):
            raise ValueError(f"stop must be one of {get_args(Stop)}, got {self.stop!r}")
        if not isinstance(self.compact, bool):
            raise ValueError(f"compact must be true or false, got {self.compact!r}")
        for field in fields(self):  # NumPy's numbers print, compare and pickle otherwise
            value = getattr(self, field.name)
            if is_real(value) and type(value) not in (int, float):
                object.__setattr__(self, field.name, int(value) if is_whole(value) else float(value))

    @property
    def floor(self) -> float:
        """Added to ||f|| in the relative residual, so that <= tol says ``||f - x|| <= tol ||f|| + atol``."""
        return self.atol / self.tol if self.atol else 0.0

    @property
    def rounding(self) -> float:
        """Relative error of the residuals that an iteration tells, beyond that of its arithmetic."""
        return 0.0

    @abstractmethod
    def start(self, x: Tensor, *, in_place: bool = False) -> Iteration:
        """The state of a solve that begins at x, (B, d) contiguous; ``in_place`` if every step is to write into x."""

    @runs_as_it_is
    @torch.no_grad()
    def solve(
        self,
        f: Callable[[State], State],
        z0: State,
        *,
        trace: bool = False,
        restrict: Callable[[Tensor], Callable[[State], State]] | None = None,
        states_at: Collection[int] = (),
        coupled: bool = False,
        scale: Any = None,
        check: bool = True,
    ) -> Solution[State]:
        """Iterates from ``z0`` until the stopping test holds or ``max_iter`` evaluations are made.

        Args:
            f: (B, ...) -> (B, ...), of the same shape, dtype and device. It must not write into its argument, nor
                keep it: the next iterate takes its place.
            z0: (B, ...) floating point, the initial iterate; it is not modified. Or a tuple, list or dict of such
                tensors, or a nest of them, of one batch size, dtype and device: f is then given views, in that
                structure, of one flat iterate (no copies; rows are D elements apart, D being the elements a sample
                has in all of them), and what it returns is copied into one.
            trace: keep the residual of every sample after every evaluation.
            restrict: index, (n,) int64 -> f for these samples alone, (n, ...) -> (n, ...); needed by ``compact``.
            states_at: keep a copy of the iterates that follow these evaluations, counted from 1 to ``max_iter``.
            coupled: the rows of the batch see each other: solve it as one system, whose residual is that of all rows
                together. A ``z0`` of one dimension, a single vector, always is (unless ``compact``).
            scale: sizes of the components, above 0, in the shape of one sample's state or one that broadcasts to it
                (for a nest: a nest of such, or of numbers): residuals and weights are those of z / scale. Where a
                component of 1e6 stands beside others of 1, the norm of z is that of the one alone.
            check: evaluate f once more where the batch as it is returned was not evaluated yet, if somebody is told
                converged. Off, for a caller that evaluates f there anyway (``solution.verified``).

        Raises:
            ValueError: if ``z0`` has no elements, is not floating point, not dense, or is of several batch sizes,
                dtypes or devices; if f returns another structure, shape, dtype or device, or writes into its argument;
                if ``compact`` is on without ``restrict``, with ``coupled``, or with a map that answers otherwise for
                a sample alone; if ``states_at`` names an evaluation that is never made; for a ``scale`` that is not
                above 0 or does not fit.
            NotImplementedError: inside a ``torch.func`` transform, and for dual numbers.

        Example:
            >>> import torch
            >>> from deq.solvers import Forward
            >>> z0 = {"high": torch.zeros(2, 4, 3), "low": torch.zeros(2, 5)}
            >>> f = lambda z: {"high": 0.5 * z["high"] + 1, "low": 0.5 * z["low"] + z["high"].mean((1, 2))[:, None]}
            >>> solution = Forward(tol=1e-4).solve(f, z0)
            >>> solution.z["low"].shape, solution.converged
            (torch.Size([2, 5]), tensor([True, True]))
        """
        for name, value in (("coupled", coupled), ("trace", trace), ("check", check)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        coordinates = Coordinates(z0, coupled=coupled, scale=scale, compact=self.compact)
        flat_map = coordinates.flat_map
        parts = None if restrict is None else (lambda index: flat_map(restrict(index)))
        found: Any = self._solve(flat_map(f), coordinates.pack(z0), trace, parts, tuple(states_at), check)
        return cast("Solution[State]", coordinates.account(found))

    def _solve(
        self,
        f: FixedPointMap,
        z0: Tensor,
        trace: bool,
        restrict: Restrict | None,
        states_at: Collection[int],
        check: bool,
    ) -> Solution:
        validate_start(z0)
        refuse_tracing("a fixed-point solve", z0)
        if self.compact and restrict is None:
            raise ValueError(
                "compact=True needs restrict=, which gives f for some samples alone (or use compact=False)"
            )
        for number in states_at:
            if not is_whole(number) or not 1 <= number <= self.max_iter:
                raise ValueError(
                    f"iterates are kept after evaluations 1 to max_iter={self.max_iter}, got {number!r}: name others, "
                    "or raise max_iter"
                )
        with on_device(z0.device):
            return self._iterate(z0, restrict, Log(f, z0.shape, trace=trace, states_at=states_at, check=check))

    def _iterate(self, z0: Tensor, restrict: Restrict | None, log: Log) -> Solution:
        x = z0.reshape(len(z0), -1).clone(memory_format=torch.contiguous_format)
        x_all, index, part, evaluated = x, None, None, None
        iteration = self.start(x)  # of Anderson: around an AndersonWindow, kernels/window.py
        moving = MovingSamples(len(z0), x.device)
        left, look_at = len(z0), _FIRST_LOOK
        while True:
            fx = log.evaluate(x, part)
            if log.evaluations == self.max_iter and index is None and (left < len(z0) or self.stop == "mean"):
                evaluated = x.clone()  # the step may write into it
            last = x[-1:].clone() if self.compact else x  # where f of the last sample was taken
            x = iteration.step(x, fx, index)
            log.keep(iteration.residual, lambda: _put(x_all, x, index))  # noqa: B023
            if log.evaluations == self.max_iter:
                break
            if log.evaluations % self.check_every != 0:
                continue
            lost = None
            if left < len(z0) and log.evaluations >= look_at and index is None:
                lost, look_at = Look.at(self, iteration, x, fx).lost, 2 * look_at
            left = moving.count(iteration.outcome, lost)
            if left == 0:
                break
            if left < 0:
                return go_on_together(self, iteration, x, log)
            if self.compact and restrict is not None and left <= _COMPACT_AT * x.shape[0]:
                x_all = _put(x_all, x, index)
                # Samples that move come first; should one have frozen since they were counted, it is along for a while.
                smaller = torch.argsort(iteration.outcome != 0, stable=True)[:left].sort().values
                if part is None:
                    hold_to_the_batch(log, restrict, last, fx, self.tol)
                index, part = smaller, restrict(smaller)
                x = x_all[index]
        if index is None:
            return conclude(self, iteration, x, fx, log, evaluated)
        z, residual = iteration.best(_put(x_all, x, index))
        log.verified = False
        found = self.account(iteration, z, residual, log)
        if not log.check:
            return found
        found = verify(self, found, log.look_again(z))
        return replace(found, checks=log.checks, sample_evaluations=log.sample_evaluations)

    def account(
        self, iteration: Iteration, z: Tensor, residual: Tensor, log: Log, *, everybody: bool = False
    ) -> Solution:
        """The solution at the end of an iteration, whose own tensors may be written to afterwards.

        z, residual: (B, d) and (B,), what is returned. everybody: whether all samples met the stopping test.
        """
        converged = residual <= self.tol
        outcome = iteration.outcome.clone()
        # Without indexing by a mask, for which the host would have to wait.
        if not everybody:
            outcome.masked_fill_((outcome == Outcome.MAX_ITER) & (iteration.stalled >= PATIENCE), Outcome.STAGNATED)
        # A sample that was at its tolerance once, and is not in the batch that is returned.
        outcome.masked_fill_(outcome == Outcome.CONVERGED, Outcome.MAX_ITER)
        outcome.masked_fill_(converged, Outcome.CONVERGED)
        return Solution(
            z=z.view(log.shape),
            residual=residual,
            iterations=iteration.iterations.clone(),
            evaluations=log.evaluations,
            sample_evaluations=log.sample_evaluations,
            converged=converged,
            outcome=outcome,
            restarts=iteration.restarts.clone(),
            fallbacks=iteration.fallbacks.clone(),
            trace=log.trace,
            states=tuple(log.states),
            tol=self.tol,
            checks=log.checks,
            verified=log.verified,
        )

    def stopping_residual(self, solution: Solution[Any]) -> Tensor:
        """(): what the stopping test compared with tol: the batch's largest residual, or the mean over the samples
        that were not given up (over all, where all were).

        Example:
            >>> import torch
            >>> from deq.solvers import Forward
            >>> solver = Forward(tol=1e-2)
            >>> bool(solver.stopping_residual(solver.solve(torch.cos, torch.zeros(2, 4))) <= 1e-2)
            True
        """
        if self.stop == "max":
            return solution.residual.max()
        given_up = (solution.outcome == Outcome.NON_FINITE) | (solution.outcome == Outcome.DIVERGED)
        given_up &= ~given_up.all()
        return torch.where(given_up, 0.0, solution.residual).sum() / (~given_up).sum()

    def stop_at_mean(self, residual: Tensor, outcome: Tensor) -> None:
        """Ends the solve of all samples that move, in ``outcome``, where their mean meets the test. Both (B,)."""
        # Samples that were given up are left out; they do not keep the others from stopping.
        moving = outcome == 0
        met = torch.where(moving, residual, 0.0).sum() / moving.sum() <= self.tol
        outcome.masked_fill_(moving & met, Outcome.MEAN_MET)


def _put(x_all: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """The iterates of all samples: (B, d)."""
    return x if index is None else x_all.index_copy(0, index, x)
