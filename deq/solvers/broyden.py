"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deq.kernels.state import accumulator_dtype
from deq.kernels.window import is_whole

from .iteration import Books
from .scaling import power_of_two_norm
from .solver import Solver


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's "good" method on g(x) = f(x) - x with all secant equations of its memory, from the Jacobian -I.

    With the steps s_i between iterates, y_i the changes of g along them, and w_i = s_i + y_i those of f, one step is ::

        B      = -I + (Y + S) (S^T S)^-1 S^T        the matrix nearest to -I with B s_i = y_i for every i
        x_next = x - B^-1 g = f - W c   where   S^T Y c = S^T g

    per sample; samples are independent. No step is longer than the one before, or than g where that is longer. When
    the memory is full it starts anew from the newest pair: that needs fewer evaluations than to drop the oldest pair
    at each step. It starts anew, too, where S^T Y is as good as singular.

    From the second iteration on an iteration costs one evaluation of f and three passes over ``memory`` rows, in plain
    PyTorch. The memory is 2 ``memory`` B d elements, in float32 at least. It is not that of a
    :class:`deq.kernels.AndersonWindow`: steps of a slow iteration, taken as differences of rows y_i and g_i, would be
    lost in their rounding, and the Gram matrix there holds no product of a step with a residual.

    Args:
        memory: pairs (s_i, y_i) kept, at least 1.
        tol, atol, max_iter, stop, compact, check_every, patience: see :class:`~deq.solvers.Solver`.

    Raises:
        ValueError: for an option outside its limits.

    Source: Broyden 1965; Fang & Saad 2009, *Two classes of multisecant methods for nonlinear acceleration* (type I);
    Bai, Kolter & Koltun 2019 (Broyden's method in DEQs).

    Example:
        >>> import torch
        >>> Broyden(tol=1e-6).solve(torch.cos, torch.zeros(2, 4)).evaluations < 10
        True
    """

    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.memory) or self.memory < 1:
            raise ValueError(f"memory must be a whole number of pairs of vectors, at least 1, got {self.memory!r}")

    def start(self, x: Tensor, *, in_place: bool = False) -> _BroydenIteration:
        # In place anyway.
        return _BroydenIteration(x, self)


_SINGULAR = 1e-7
"""Of the pivot of a new pair, relative to ||s||^2: below it S^T Y is as good as singular. The rounding of float32; from
1e-2 on the pairs that a slow affine map needs are lost (measured, rho = 0.99: 289 evaluations instead of 74)."""


_ROW_MULTIPLE = 16
"""Elements that the stride of a row is a multiple of, so that all rows are equally aligned: what a matrix product sums
first depends on that, and a sample's bits must not depend on its place in the batch."""


class _BroydenIteration(Books):
    """Pairs are kept at norms ||s|| about 1, by powers of two, so that no product of them over- or underflows.

    The inverse M of K = S^T Y grows with the memory, by bordering: with c = S^T y the new column of K, r = s^T Y its
    new row and the pivot q = s.y - r M c, ::

        M += (M c - e) (r M - e)^T / q        e the unit vector of the new pair

    Which pair is written is counted on the device, so that every iteration is the same launches.
    """

    def __init__(self, x: Tensor, solver: Broyden) -> None:
        super().__init__(x, solver)
        batch_size, dim = x.shape
        self._memory, self._dtype = solver.memory, accumulator_dtype(x.dtype)
        stride = -(-dim // _ROW_MULTIPLE) * _ROW_MULTIPLE
        self._S, self._W = x.new_zeros(2, batch_size, solver.memory, stride, dtype=self._dtype)
        self._vectors = x.new_zeros(batch_size, 3, stride, dtype=self._dtype)  # g, y, s of this step
        self._M = x.new_zeros(batch_size, solver.memory, solver.memory, dtype=torch.float64)
        self._length = x.new_zeros(batch_size, dtype=torch.float64)  # of the last step
        self._x_before, self._g_before = x.new_zeros(2, batch_size, dim, dtype=self._dtype)
        self._best = x.clone()
        self._best_residual = torch.full_like(self.residual, torch.inf)

    def step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        # Autocast is for f: in half precision the products here lose the secant equation, or overflow.
        with torch.autocast(x.device.type, enabled=False):
            return self._step(x, fx, index)

    def _step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        samples = torch.arange(len(x), device=x.device) if index is None else index
        stays = self.enter(x, fx, index)[:, None]
        full = (self.iterations[samples] > 2) & ((self.iterations[samples] - 2) % self._memory == 0)
        self.restarts[samples] += full & ~stays[:, 0]
        self._keep_best(x, samples)
        here = x.to(self._dtype)
        g = fx.to(self._dtype) - here
        # Which pair of the memory is the newest; at the first evaluation there is none.
        slot = (self.iterations[samples].long() - 2) % self._memory
        unit = power_of_two_norm(g)
        vectors = self._vectors[: len(x)]
        vectors[:, 0, : x.shape[1]] = g / unit
        self._remember(vectors, here, g, samples, slot)
        # Views where all samples are here: a copy of both histories would cost more than the rest of the step.
        S, W = (self._S, self._W) if index is None else (self._S[index], self._W[index])
        S_g = self._border(vectors, S, W, samples, slot)
        longest = self._length[samples] / unit[:, 0]
        p = unit * self._direction(vectors[:, 0], S_g, W, samples, longest.to(self._dtype))[:, : x.shape[1]]
        return torch.where(stays, x, (here + p).to(x.dtype), out=x)

    def _keep_best(self, x: Tensor, samples: Tensor) -> None:
        residual = self.residual[samples]
        better = residual < self._best_residual[samples]
        self._best[samples] = torch.where(better[:, None], x, self._best[samples])
        self._best_residual[samples] = torch.where(better, residual, self._best_residual[samples])

    def _remember(self, vectors: Tensor, here: Tensor, g: Tensor, samples: Tensor, slot: Tensor) -> None:
        """The pair of this step, also into ``vectors``; zeros where there is none, or it cannot be told in numbers."""
        s, y = here - self._x_before[samples], g - self._g_before[samples]
        unit = power_of_two_norm(s)
        s, y = s / unit, y / unit
        length = torch.linalg.vector_norm(s, dim=1)
        usable = (self.iterations[samples] > 1) & torch.isfinite(torch.linalg.vector_norm(y, dim=1)) & (length > 0)
        pair = vectors[:, 1:, : here.shape[1]]
        pair[:, 0], pair[:, 1] = torch.where(usable[:, None], y, 0.0), torch.where(usable[:, None], s, 0.0)
        self._S[samples, slot], self._W[samples, slot] = vectors[:, 2], vectors[:, 1] + vectors[:, 2]
        self._length[samples] = torch.where(usable, length.double() * unit[:, 0], 0.0)
        self._x_before[samples], self._g_before[samples] = here, g

    def _border(self, vectors: Tensor, S: Tensor, W: Tensor, samples: Tensor, slot: Tensor) -> Tensor:
        """The newest pair into M; returns S^T g, (n, m) float64. S, W: (n, m, d)."""
        # Vectors from the left: on a CPU that is several times as fast as from the right.
        S_g, column, S_s = torch.bmm(vectors, S.mT).double().unbind(dim=1)
        row = torch.bmm(vectors[:, 2:], W.mT).double().squeeze(1) - S_s
        # A full memory starts anew.
        M = torch.where((slot == 0)[:, None, None], 0.0, self._M[samples])
        e = torch.zeros_like(row).scatter_(1, slot[:, None], 1.0)
        M_column, row_M = _times(M, column), _times(M.mT, row)
        diagonal, squared = ((v * e).sum(dim=1) for v in (column, S_s))
        pivot = diagonal - (row * M_column).sum(dim=1)
        alone = ~(pivot.abs() > _SINGULAR * squared)[:, None]
        left, right = torch.where(alone, 0.0, M_column) - e, torch.where(alone, 0.0, row_M) - e
        right = right / torch.where(alone, diagonal[:, None], pivot[:, None])
        M = torch.where(alone[:, :, None], 0.0, M) + left[:, :, None] * right[:, None, :]
        # No pair at all is left where the newest is orthogonal to its y, or there is none.
        found = torch.isfinite(M).all(dim=2).all(dim=1)
        self._M[samples] = torch.where(found[:, None, None], M, 0.0)
        return S_g

    def _direction(self, g: Tensor, S_g: Tensor, W: Tensor, samples: Tensor, longest: Tensor) -> Tensor:
        """The step from x, (n, d), no longer than ``longest``, (n,), or g where that is longer."""
        c = _times(self._M[samples], S_g).to(g.dtype)
        p = g - torch.bmm(c[:, None], W).squeeze(1)
        length, plain = torch.linalg.vector_norm(p, dim=1), torch.linalg.vector_norm(g, dim=1)
        p = p * (torch.maximum(longest, plain) / length).clamp(max=1.0)[:, None]
        return torch.where((torch.isfinite(length) & (length > 0))[:, None], p, g)

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.isfinite(self._best_residual)
        return torch.where(found[:, None], self._best, x), torch.where(found, self._best_residual, self.residual)

    def reset(self) -> None:
        # What is read of S and W is written before, but for zeros times what is there, which is finite.
        super().reset()
        self._M.zero_()
        self._length.zero_()
        self._best_residual.fill_(torch.inf)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """(n, m, m), (n, m) -> (n, m)."""
    return torch.bmm(matrix, vector[:, :, None]).squeeze(2)
