"""Forward (Picard) iteration: the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import residual_norm
from kernels.state import accumulator_dtype

from .base import Solver


@dataclass(frozen=True, kw_only=True)
class Forward(Solver):
    """Forward iteration ``x_next = x + beta (f(x) - x)``, each sample stopping by itself.

    Args:
        beta: damping in (0, 1]; 1 is the plain iteration ``x_next = f(x)``.
        tol, max_iter, stop, compact, check_every: see :class:`~deq.solvers.base.Solver`.

    Raises:
        ValueError: for an option outside its limits.

    Example:
        >>> import torch
        >>> Forward(tol=1e-3).solve(torch.cos, torch.zeros(2, 4)).evaluations
        19
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.beta <= 1.0:
            raise ValueError(f"beta must be above 0 and at most 1, got {self.beta} (1 is no damping)")

    def start(self, x: Tensor, *, in_place: bool = False) -> _ForwardIteration:
        return _ForwardIteration(x, self, in_place)


class _ForwardIteration:
    """Two buffers that change places, so that the iterate last evaluated is still there when the solve ends.

    In place, the iterate evaluated is copied aside instead.
    """

    def __init__(self, x: Tensor, solver: Forward, in_place: bool) -> None:
        self._solver, self._in_place = solver, in_place
        self._evaluated, self._spare = x, torch.empty_like(x)
        self._index: Tensor | None = None
        self.residual = torch.full((x.shape[0],), torch.inf, dtype=accumulator_dtype(x.dtype), device=x.device)
        self.frozen = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        self.iterations = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)

    def step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        part = slice(None) if index is None else index
        active = ~self.frozen[part]
        self.iterations[part] += active
        residual = torch.where(active, residual_norm(x, fx), self.residual[part])
        self.residual[part] = residual
        frozen = ~active | ~torch.isfinite(residual)
        if self._solver.stop == "max":
            frozen |= residual <= self._solver.tol
        self.frozen[part] = frozen
        if self._solver.stop == "mean":
            # Before the step, so that what is frozen stays at the iterate that its residual belongs to.
            self.frozen |= self._solver.mean_is_met(self.residual, self.frozen)
            frozen = self.frozen[part]
        # y = f - (1 - beta) (f - x): beta = 1 gives f itself, without rounding.
        beta = self._solver.beta
        moved = fx if beta == 1.0 else torch.lerp(fx, x, 1.0 - beta)
        self._index = index
        if self._in_place:
            self._evaluated = self._spare.copy_(x)
            return torch.where(frozen[:, None], x, moved, out=x)
        if self._spare.shape != x.shape:
            self._spare = torch.empty_like(x)
        x_next, self._spare = torch.where(frozen[:, None], x, moved, out=self._spare), x
        self._evaluated = x
        return x_next

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Samples that were left out are frozen, at the iterate that they were last evaluated at.
        z = self._evaluated if self._index is None else x.index_copy(0, self._index, self._evaluated)
        return z, self.residual

    def reset(self) -> None:
        self.residual.fill_(torch.inf)
        self.frozen.zero_()
        self.iterations.zero_()
