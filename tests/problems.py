"""Fixed-point problems with known answers, and a solver to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """f(z) = A z + b with A symmetric, its eigenvalues spread evenly over [lowest, rho]."""

    A: Tensor
    b: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.A + self.b

    @property
    def zero(self) -> Tensor:
        return torch.zeros_like(self.b)

    def solution(self) -> Tensor:
        identity = torch.eye(self.A.shape[0], dtype=self.A.dtype)
        return torch.linalg.solve(identity - self.A, self.b, left=False)

    def scaled(self, factor: float) -> Affine:
        return Affine(self.A, self.b * factor)

    def to(self, dtype: torch.dtype) -> Affine:
        return Affine(self.A.to(dtype), self.b.to(dtype))


def affine(rho: float, *, lowest: float = 0.0, batch: int = 4, dim: int = 100, seed: int = 0) -> Affine:
    """An affine contraction of spectral radius rho, float64."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    A = (Q * torch.linspace(lowest, rho, dim, dtype=torch.float64)) @ Q.T
    return Affine(A, torch.randn(batch, dim, generator=generator, dtype=torch.float64))


def qr_anderson_iterations(
    f: Callable[[Tensor], Tensor], z0: Tensor, *, window: int, tol: float, max_iter: int
) -> Tensor:
    """Evaluations that a textbook Anderson needs, each sample by itself: float64, orthogonal least squares.

    min_gamma || g_k - dG gamma ||, x_next = f_k - dF gamma over the differences of the last ``window`` iterates
    (Walker & Ni 2011, equation 2.4), solved by LAPACK on dG itself: no Gram matrix and no regularisation.
    """
    x = z0.double()
    X: list[Tensor] = []
    F: list[Tensor] = []
    counts = torch.full((x.shape[0],), max_iter)
    running = torch.ones(x.shape[0], dtype=torch.bool)
    for k in range(1, max_iter + 1):
        fx = f(x)
        X, F = [*X, x][-window:], [*F, fx][-window:]
        g = fx - x
        done = running & (g.norm(dim=1) / fx.norm(dim=1) <= tol)
        counts[done] = k
        running &= ~done
        if not running.any():
            break
        x_next = fx
        if len(X) > 1:
            G = torch.stack([f_i - x_i for x_i, f_i in zip(X, F, strict=True)], dim=-1)
            gamma = torch.linalg.lstsq(G.diff(dim=-1), g.unsqueeze(-1), driver="gelsd").solution
            x_next = fx - (torch.stack(F, dim=-1).diff(dim=-1) @ gamma).squeeze(-1)
        x = torch.where(running[:, None], x_next, x)
    return counts
