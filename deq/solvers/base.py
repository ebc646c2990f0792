"""What a solver is: an iteration, a stopping test, and an honest account of both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, cast, get_args

import torch
from torch import Tensor
from typing_extensions import TypeVar

from kernels import Outcome, residual_norm
from kernels.state import FAR, PATIENCE, accumulator_dtype, on_device, track_progress
from kernels.window import validate_patience

from .plotting import plot_residuals
from .state import Nest, Packing, flatten, unflatten

Stop = Literal["max", "mean"]
FixedPointMap = Callable[[Tensor], Tensor]
"""f: (B, ...) -> (B, ...), the same shape, dtype and device; samples do not mix."""
State = TypeVar("State", bound=Nest, default=Tensor)
"""A tensor, (B, ...), or a tuple, list or dict of states: several scales of one model."""


@dataclass(frozen=True, repr=False)
class Solution(Generic[State]):
    """What a solve found, per sample, and what it cost. All tensors are detached and on the state's device.

    Example:
        >>> import torch
        >>> from deq.solvers import Forward
        >>> x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])
        >>> solution = Forward(tol=1e-3).solve(lambda z: 0.5 * z + x, torch.zeros(2, 2), trace=True)
        >>> solution.outcomes, solution.converged, solution.z.isfinite().all(), solution.trace.shape
        ({'converged': 1, 'non_finite': 1}, tensor([ True, False]), tensor(True), torch.Size([10, 2]))
    """

    z: State
    """(B, ...) the iterate of lowest relative residual still in the solver's window, or (Broyden's method) of all.

    In the structure of ``z0`` where that is a nest of tensors; residuals are then those of all of them together."""
    residual: Tensor
    """(B,) relative residual ``||f(z) - z|| / ||f(z)||`` at ``z``; NaN or inf where f was never finite."""
    iterations: Tensor
    """(B,) int32: evaluations of f that each sample took part in before it converged or was given up."""
    evaluations: int
    """Evaluations of f, batch-wide."""
    sample_evaluations: int
    """Evaluations of f summed over the samples that took part in each: B x evaluations without compaction."""
    converged: Tensor
    """(B,) bool: residual <= tol. With ``history_dtype=bfloat16`` both are those of rounded residual rows."""
    outcome: Tensor
    """(B,) uint8: why each sample stopped, an :class:`~deq.solvers.Outcome`; :attr:`outcomes` counts them by name."""
    restarts: Tensor
    """(B,) int32: how often an adaptive window started anew because there was no progress, or Broyden's memory was
    full."""
    fallbacks: Tensor
    """(B,) int32: plain damped steps of Anderson's method, taken since a system could not be solved or f was not
    finite; 0 for other solvers."""
    trace: Tensor | None = None
    """(K, B) residual after each of the K evaluations, with ``solve(..., trace=True)``."""
    states: tuple[State, ...] = ()
    """(B, ...) each: the iterates that ``solve(..., states_at=)`` asked for, as far as the solve came."""
    tol: float | None = None
    """The tolerance that the solver had."""

    @property
    def idle_evaluations(self) -> int:
        """Evaluations in which no sample moved: what it cost that the host looked late, or not every time."""
        return self.evaluations - int(self.iterations.max())

    @property
    def outcomes(self) -> dict[str, int]:
        """Samples by how they ended: ``{"converged": 30, "stagnated": 2}``, the most frequent first."""
        counts = {name.name.lower(): int((self.outcome == name).sum()) for name in Outcome}
        return {name: count for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count}

    def plot(self, ax: Any | None = None, *, label: str | None = None) -> Any:
        """Draws the relative residual against evaluations of f, on a log axis; needs ``solve(..., trace=True)``.

        The line is the median over the samples, the band reaches from the 10th to the 90th percentile, the dashed line
        is the tolerance. Samples that were given up are left out. Several solutions share one axis: ::

            ax = None
            for solver in (Anderson(), Forward()):
                ax = solver.solve(f, z0, trace=True).plot(ax, label=type(solver).__name__)

        The solve of a DEQ layer is drawn by doing it again: ``solver.solve(layer.equilibrium(x).f, z0, trace=True)``.

        Args:
            ax: a matplotlib axis to draw on; default: that of a new figure.
            label: for the legend.

        Returns: the axis.

        Raises:
            ValueError: for a solution without a trace.
            ImportError: if matplotlib is not installed.
        """
        return plot_residuals(self.trace, self.tol, ax, label)

    def __repr__(self) -> str:
        count, total = int(self.converged.sum()), self.converged.numel()
        others = "".join(
            f", {number} {'at ' if name == 'max_iter' else ''}{name}"
            for name, number in self.outcomes.items()
            if name != "converged"
        )
        leaves, skeleton = flatten(self.z, "z")
        shapes = unflatten(skeleton, [tuple(leaf.shape) for leaf in leaves])
        return (
            f"Solution({count} of {total} converged{others}, {self.evaluations} evaluations, "
            f"iterations {_spread(self.iterations.float(), '.0f')}, residual {_spread(self.residual, '.1e')}, "
            f"z {shapes} {leaves[0].dtype})"
        )


def _spread(values: Tensor, form: str) -> str:
    """Smallest to largest, or to nan if there is one."""
    low, high = values.nan_to_num(math.inf, math.inf, -math.inf).min().item(), values.max().item()
    return f"{high:{form}}" if low in (high, math.inf) else f"{low:{form}} to {high:{form}}"


Restrict = Callable[[Tensor], FixedPointMap]
"""Index of samples, (n,) int64 -> the map for these alone."""


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
        """Takes x and f(x) into account; returns the next iterate. May write into x, never into fx.

        x, fx: (n, d), those of the samples in ``index``, (n,) int64, or (B, d) where it is None.
        """

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The iterate of lowest residual, (B, d), and that residual, (B,).

        x: (B, d), what the last step that a sample took part in returned for it; may be overwritten.
        """

    def reset(self) -> None:
        """As new, in the same memory."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Fixed points of z = f(z), all samples of a batch at once.

    The stopping test is on the relative residual ``||f(z) - z|| / ||f(z)||`` of each sample. With ``stop="max"``
    the solve ends when every sample is at ``tol`` or below, and a sample that gets there is frozen: it is not moved
    any more. With ``stop="mean"`` it ends when the mean of the samples that were not given up is, and no other is
    frozen before. At most ``max_iter`` evaluations of f are made.

    With ``compact`` the evaluations of f shrink with the number of samples that still move: once a quarter of those
    evaluated has frozen, f is asked about the others alone. That needs a map that can be restricted to some samples
    (``solve(..., restrict=)``; a DEQ layer does it by itself) and that treats samples independently.

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
        Forward(tol=0.0001, max_iter=50, stop='mean', compact=False, check_every=1, patience=20, beta=1.0)
        >>> Forward(max_iter=0)
        Traceback (most recent call last):
        ValueError: max_iter must be at least 1, got 0
    """

    tol: float = 1e-3
    max_iter: int = 50
    stop: Stop = "max"
    compact: bool = False
    check_every: int = 1
    patience: int = PATIENCE

    def __post_init__(self) -> None:
        """Raises ValueError, naming value, limit and fix."""
        if not (self.tol >= 0.0 and math.isfinite(self.tol)):
            raise ValueError(f"tol must be finite and at least 0, got {self.tol} (relative: 1e-2 to 1e-6 are usual)")
        if isinstance(self.max_iter, bool) or not isinstance(self.max_iter, int):
            raise ValueError(f"max_iter must be a whole number of evaluations of f, got {self.max_iter!r}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter}")
        if isinstance(self.check_every, bool) or not isinstance(self.check_every, int) or self.check_every < 1:
            raise ValueError(f"check_every must be a whole number of evaluations, at least 1, got {self.check_every!r}")
        validate_patience(self.patience)
        if self.stop not in get_args(Stop):
            raise ValueError(f"stop must be one of {get_args(Stop)}, got {self.stop!r}")
        if not isinstance(self.compact, bool):
            raise ValueError(f"compact must be true or false, got {self.compact!r}")

    @abstractmethod
    def start(self, x: Tensor, *, in_place: bool = False) -> Iteration:
        """The state of a solve that begins at x, (B, d) contiguous; ``in_place`` if every step is to write into x."""

    @torch.no_grad()
    def solve(
        self,
        f: Callable[[State], State],
        z0: State,
        *,
        trace: bool = False,
        restrict: Callable[[Tensor], Callable[[State], State]] | None = None,
        states_at: Collection[int] = (),
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

        Raises:
            ValueError: if ``z0`` has no elements, is not floating point, not dense, or is of several batch sizes,
                dtypes or devices; if f returns another structure, shape, dtype or device, or writes into its argument;
                if ``compact`` is on without ``restrict``; if ``states_at`` names an evaluation that is never made.

        Example:
            >>> import torch
            >>> from deq.solvers import Forward
            >>> z0 = {"high": torch.zeros(2, 4, 3), "low": torch.zeros(2, 5)}
            >>> f = lambda z: {"high": 0.5 * z["high"] + 1, "low": 0.5 * z["low"] + z["high"].mean((1, 2))[:, None]}
            >>> solution = Forward(tol=1e-4).solve(f, z0)
            >>> solution.z["low"].shape, solution.converged
            (torch.Size([2, 5]), tensor([True, True]))
        """
        if isinstance(z0, Tensor):
            found: Any = self._solve(cast(FixedPointMap, f), z0, trace, cast("Restrict | None", restrict), states_at)
            return cast("Solution[State]", found)
        packing = Packing(z0)
        parts = None if restrict is None else (lambda index: packing.flat_map(restrict(index)))
        found = self._solve(packing.flat_map(f), packing.pack(z0), trace, parts, states_at)
        states = tuple(packing.unpack(state) for state in found.states)
        return cast("Solution[State]", replace(found, z=packing.unpack(found.z), states=states))

    def _solve(
        self, f: FixedPointMap, z0: Tensor, trace: bool, restrict: Restrict | None, states_at: Collection[int]
    ) -> Solution:
        validate_start(z0)
        if self.compact and restrict is None:
            raise ValueError(
                "compact=True needs restrict=, which gives f for some samples alone (or use compact=False)"
            )
        for number in states_at:
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= self.max_iter:
                raise ValueError(
                    f"iterates are kept after evaluations 1 to max_iter={self.max_iter}, got {number!r}: name others, "
                    "or raise max_iter"
                )
        with on_device(z0.device):
            return self._iterate(f, z0, trace, restrict, states_at)

    def _iterate(
        self, f: FixedPointMap, z0: Tensor, trace: bool, restrict: Restrict | None, states_at: Collection[int]
    ) -> Solution:
        batch_size = z0.shape[0]
        x = z0.reshape(batch_size, -1).clone(memory_format=torch.contiguous_format)
        x_all, index = x, None
        iteration = self.start(x)
        moving = MovingSamples(batch_size, x.device)
        residuals: list[Tensor] = []
        states: list[Tensor] = []
        evaluations = sample_evaluations = 0
        while evaluations < self.max_iter:
            fx = _evaluate(f, x, (x.shape[0], *z0.shape[1:]))
            evaluations += 1
            sample_evaluations += x.shape[0]
            x = iteration.step(x, fx, index)
            if trace:
                residuals.append(iteration.residual.clone())
            if evaluations in states_at:
                states.append(_put(x_all, x, index).clone().view(z0.shape))
            if evaluations % self.check_every != 0:
                continue
            left = moving.count(iteration.outcome)
            if left == 0:
                break
            if self.compact and restrict is not None and left <= _COMPACT_AT * x.shape[0]:
                x_all = _put(x_all, x, index)
                # Samples that move come first; should one have frozen since they were counted, it is along for a while.
                index = torch.argsort(iteration.outcome != 0, stable=True)[:left].sort().values
                x = x_all[index]
                f = restrict(index)
        z, residual = iteration.best(_put(x_all, x, index))
        found = self.account(iteration, z.view(z0.shape), residual, evaluations, sample_evaluations)
        return replace(found, trace=torch.stack(residuals) if trace else None, states=tuple(states))

    def account(
        self, iteration: Iteration, z: Tensor, residual: Tensor, evaluations: int, sample_evaluations: int
    ) -> Solution:
        """The solution at the end of an iteration, whose own tensors may be written to afterwards."""
        converged = residual <= self.tol
        outcome = iteration.outcome.clone()
        # Without indexing by a mask, for which the host would have to wait.
        outcome.masked_fill_((outcome == Outcome.MAX_ITER) & (iteration.stalled >= PATIENCE), Outcome.STAGNATED)
        outcome.masked_fill_(converged, Outcome.CONVERGED)
        return Solution(
            z=z,
            residual=residual,
            iterations=iteration.iterations.clone(),
            evaluations=evaluations,
            sample_evaluations=sample_evaluations,
            converged=converged,
            outcome=outcome,
            restarts=iteration.restarts.clone(),
            fallbacks=iteration.fallbacks.clone(),
            tol=self.tol,
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


def validate_start(z0: Tensor) -> None:
    """Raises ValueError, naming value, limit and fix, for what no solve can start from."""
    if z0.ndim < 1 or z0.numel() == 0 or not z0.is_floating_point():
        raise ValueError(
            f"z0 must be (B, ...) floating point with at least one element, got {tuple(z0.shape)} {z0.dtype}: "
            "leave empty batches out, give each sample a row, and turn whole numbers into floats"
        )
    if z0.layout != torch.strided:
        raise ValueError(f"z0 must be a dense tensor, got one of {z0.layout}: give z0.to_dense()")
    if z0.dtype.itemsize < 2:
        raise ValueError(
            f"z0 must be float64, float32, bfloat16 or float16, got {z0.dtype}: let f convert, and give z0.half()"
        )


class Books:
    """What iterations without an :class:`kernels.AndersonWindow` keep of every sample."""

    def __init__(self, x: Tensor, solver: Solver) -> None:
        self._solver = solver
        batch_size = x.shape[0]
        self.residual = torch.full((batch_size,), torch.inf, dtype=accumulator_dtype(x.dtype), device=x.device)
        self.lowest = self.residual.clone()
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
        residual = torch.where(active, residual_norm(x, fx), self.residual[part])
        self.residual[part] = residual
        lowest, stalled = track_progress(residual, self.lowest[part], self.stalled[part])
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
        self.lowest.fill_(torch.inf)
        for tensor in (self.outcome, self.iterations, self.stalled, self.restarts, self.fallbacks):
            tensor.zero_()


_COMPACT_AT = 0.75
"""Share of the samples last evaluated at which the others are left out: a new batch size costs f something, too."""


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

    def count(self, outcome: Tensor) -> int:
        """outcome: (B,) uint8, 0 for samples that move."""
        moving = (outcome == 0).sum()
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


def _put(x_all: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """The iterates of all samples: (B, d)."""
    return x if index is None else x_all.index_copy(0, index, x)


def _evaluate(f: FixedPointMap, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """f at the flat iterate x, flat again and checked."""
    # Inference tensors count no versions; under inference mode a write into the argument goes unnoticed.
    version = None if x.is_inference() else x._version
    fz = f(x.view(shape))
    if not isinstance(fz, Tensor) or fz.shape != shape or fz.dtype != x.dtype or fz.device != x.device:
        got = f"{tuple(fz.shape)} {fz.dtype} on {fz.device}" if isinstance(fz, Tensor) else type(fz).__name__
        raise ValueError(f"f must return what it is given, {shape} {x.dtype} on {x.device}, but it returned {got}")
    if version is not None and x._version != version:
        raise ValueError("f wrote into its argument, which is the solver's iterate: let f work on z.clone()")
    return fz.reshape(x.shape)
