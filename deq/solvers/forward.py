"""Forward (Picard) iteration: the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deq.kernels.window import validate_beta

from .iteration import Books
from .solver import Solver


@dataclass(frozen=True, kw_only=True)
class Forward(Solver):
    """Forward iteration ``x_next = x + beta (f(x) - x)``, each sample stopping by itself.

    Args:
        beta: damping in (0, 1]; 1 is the plain iteration ``x_next = f(x)``.
        tol, atol, max_iter, stop, compact, check_every, patience: see :class:`~deq.solvers.Solver`.

    Raises:
        ValueError: for an option outside its limits.

    Source: Picard 1890; damped: Krasnoselskii 1955 and Mann 1953.

    Example:
        >>> import torch
        >>> Forward(tol=1e-3).solve(torch.cos, torch.zeros(2, 4)).evaluations
        19
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_beta(self.beta)

    def start(self, x: Tensor, *, in_place: bool = False) -> _ForwardIteration:
        return _ForwardIteration(x, self, in_place)


class _ForwardIteration(Books):
    """Two buffers that change places, so that the iterate last evaluated is still there when the solve ends.

    In place, the iterate evaluated is copied aside instead.
    """

    def __init__(self, x: Tensor, solver: Forward, in_place: bool) -> None:
        super().__init__(x, solver)
        self._beta, self._in_place = solver.beta, in_place
        self._evaluated, self._spare = x, torch.empty_like(x)
        self._index: Tensor | None = None

    def step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        frozen = self.enter(x, fx, index)
        # y = f - (1 - beta) (f - x): beta = 1 gives f itself, without rounding.
        moved = fx if self._beta == 1.0 else torch.lerp(fx, x, 1.0 - self._beta)
        self._index = index
        if self._in_place:
            self._evaluated = self._spare.copy_(x)
            return torch.where(frozen[:, None], x, moved, out=x)
        if self._spare.shape != x.shape:
            self._spare = torch.empty_like(x)
        x_next, self._spare = torch.where(frozen[:, None], x, moved, out=self._spare), x
        self._evaluated = x
        return x_next

    def reset(self) -> None:
        super().reset()  # what was evaluated is written over by the first step

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Samples that were left out are frozen, at the iterate that they were last evaluated at.
        z = self._evaluated if self._index is None else x.index_copy(0, self._index, self._evaluated)
        return z, self.residual
