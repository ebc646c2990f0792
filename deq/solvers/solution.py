"""What a solve found and what it cost, sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic

from torch import Tensor
from typing_extensions import TypeVar

from deq.kernels import Outcome

from .plotting import plot_residuals
from .state import Nest, flatten, unflatten

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
    """(B,) relative residual ``||f(z) - z|| / (||f(z)|| + atol / tol)`` at ``z``; NaN or inf where f was never finite.

    The same for all samples where they were solved as one system (``coupled``)."""
    iterations: Tensor
    """(B,) int32: evaluations of f that each sample took part in before it converged or was given up."""
    evaluations: int
    """Evaluations of f, batch-wide."""
    sample_evaluations: int
    """Evaluations of f, and checks, summed over the samples that took part in each: B x their number without
    compaction."""
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
    checks: int = 0
    """Evaluations of f beside ``evaluations``, of the batch as it is returned: 1 where samples that did not converge
    are returned beside others that did, or where the solver compacted; else 0."""
    verified: bool = True
    """False where ``solve(..., check=False)`` left such a check to the caller."""

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
