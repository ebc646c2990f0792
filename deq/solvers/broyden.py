"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.state import accumulator_dtype

from .base import Books, Solver


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's "good" method on g(x) = f(x) - x, its inverse Jacobian -I plus the last ``memory`` rank-one terms.

    From the second iteration on an iteration costs one evaluation of f and four passes over 2 ``memory`` rows: twice
    the traffic of :class:`Anderson` and more, in plain PyTorch. Without a line search. Samples are independent.

    Args:
        memory: rank-one terms kept, at least 1; when they are full the oldest makes room.
        tol, max_iter, stop, compact, check_every: see :class:`~deq.solvers.base.Solver`.

    Raises:
        ValueError: for an option outside its limits.

    Source: Broyden 1965; Bai, Kolter & Koltun 2019 (in DEQs).

    Example:
        >>> import torch
        >>> Broyden(tol=1e-6).solve(torch.cos, torch.zeros(2, 4)).evaluations < 10
        True
    """

    memory: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"memory must be a whole number of rank-one terms, at least 1, got {self.memory!r}")

    def start(self, x: Tensor, *, in_place: bool = False) -> _BroydenIteration:
        # In place anyway.
        return _BroydenIteration(x, self)


class _BroydenIteration(Books):
    """B = -I + sum_i u_i v_i^T approximates the inverse Jacobian of g, the step is p = -B g.

    With s the step taken and y = g_new - g:  v = B^T s,  u = (s - B y) / (s . B y),  B += u v^T.
    """

    def __init__(self, x: Tensor, solver: Broyden) -> None:
        super().__init__(x, solver)
        batch_size, dim = x.shape
        self._dtype = accumulator_dtype(x.dtype)
        self._U, self._V = x.new_zeros(2, batch_size, solver.memory, dim, dtype=self._dtype)
        self._x_before, self._g_before = x.new_zeros(2, batch_size, dim, dtype=self._dtype)
        self._best = x.clone()
        self._best_residual = torch.full_like(self.residual, torch.inf)

    def step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        # Autocast is for f: in half precision the products here lose the secant equation, or overflow.
        with torch.autocast(x.device.type, enabled=False):
            return self._step(x, fx, index)

    def _step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        samples = torch.arange(len(x), device=x.device) if index is None else index
        first = (self.iterations[samples] == 0)[:, None]
        slot = ((self.iterations[samples] - 1) % self._U.shape[1]).long()
        stays = self.enter(x, fx, index)[:, None]
        residual = self.residual[samples]
        better = (residual < self._best_residual[samples])[:, None]
        self._best[samples] = torch.where(better, x, self._best[samples])
        self._best_residual[samples] = torch.where(better[:, 0], residual, self._best_residual[samples])

        here, g = x.to(self._dtype), (fx - x).to(self._dtype)
        s, y = here - self._x_before[samples], g - self._g_before[samples]
        # Views where all samples are here: a copy of both histories would cost more than the rest of the step.
        U, V = (self._U, self._V) if index is None else (self._U[index], self._V[index])
        By = _combine(U, _products(V, y)) - y
        v = _combine(V, _products(U, s)) - s
        denominator = (s * By).sum(dim=1, keepdim=True)
        u = (s - By) / denominator
        # No update where there is no step yet, or the secant equation has no solution; and none for what stays.
        usable = (
            torch.isfinite(u).all(dim=1, keepdim=True) & torch.isfinite(v).all(dim=1, keepdim=True) & ~first & ~stays
        )
        line = torch.arange(len(x), device=x.device)
        keep = ~(usable | stays)
        U[line, slot] = torch.where(usable, u, torch.where(keep, 0.0, U[line, slot]))
        V[line, slot] = torch.where(usable, v, torch.where(keep, 0.0, V[line, slot]))
        if index is not None:
            self._U[index], self._V[index] = U, V
        self._x_before[samples] = torch.where(stays, self._x_before[samples], here)
        self._g_before[samples] = torch.where(stays, self._g_before[samples], g)
        p = g - _combine(U, _products(V, g))
        return torch.where(stays, x, (here + p).to(x.dtype), out=x)

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.isfinite(self._best_residual)
        return torch.where(found[:, None], self._best, x), torch.where(found, self._best_residual, self.residual)

    def reset(self) -> None:
        super().reset()
        self._U.zero_()
        self._V.zero_()
        self._best_residual.fill_(torch.inf)


def _products(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products: (n, m, d), (n, d) -> (n, m)."""
    return torch.bmm(rows, vector[:, :, None]).squeeze(2)


def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of rows: (n, m, d), (n, m) -> (n, d)."""
    return torch.bmm(weights[:, None], rows).squeeze(1)
