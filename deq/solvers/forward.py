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
        tol, max_iter, stop: see :class:`~deq.solvers.base.Solver`.

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

    def start(self, x: Tensor) -> _ForwardIteration:
        return _ForwardIteration(x, self.beta, self._freeze_tol)


class _ForwardIteration:
    """Two buffers that change places, so that the iterate last evaluated is still there when the solve ends."""

    def __init__(self, x: Tensor, beta: float, freeze_tol: float | None) -> None:
        self._beta = beta
        self._freeze_tol = -1.0 if freeze_tol is None else freeze_tol
        self._evaluated, self._spare = x, torch.empty_like(x)
        self.residual = torch.full((x.shape[0],), torch.inf, dtype=accumulator_dtype(x.dtype), device=x.device)
        self.frozen = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        self.iterations = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)

    def step(self, x: Tensor, fx: Tensor) -> Tensor:
        active = ~self.frozen
        self.iterations += active
        self.residual = torch.where(active, residual_norm(x, fx), self.residual)
        self.frozen = self.frozen | (self.residual <= self._freeze_tol) | ~torch.isfinite(self.residual)
        # y = f - (1 - beta) (f - x): beta = 1 gives f itself, without rounding.
        moved = fx if self._beta == 1.0 else torch.lerp(fx, x, 1.0 - self._beta)
        self._evaluated = x
        x_next, self._spare = torch.where(self.frozen[:, None], x, moved, out=self._spare), x
        return x_next

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluated, self.residual
