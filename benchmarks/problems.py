"""Fixed-point problems of known difficulty, shared by the benchmarks and the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """f(z) = z A + b with A symmetric: z, b (B, d); A (d, d)."""

    A: Tensor
    b: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.A + self.b

    @property
    def zero(self) -> Tensor:
        """(B, d) zeros: the usual start."""
        return torch.zeros_like(self.b)

    def solution(self) -> Tensor:
        """(B, d) the fixed point, by direct solve."""
        identity = torch.eye(self.A.shape[0], dtype=self.A.dtype)
        z: Tensor = torch.linalg.solve(identity - self.A, self.b, left=False)
        return z

    def scaled(self, factor: float) -> Affine:
        """The same problem, its right side and so its solution multiplied by ``factor``."""
        return Affine(self.A, self.b * factor)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Affine:
        return Affine(self.A.to(device, dtype), self.b.to(device, dtype))


def affine(rho: float, *, lowest: float = 0.0, batch: int = 4, dim: int = 100, seed: int = 0) -> Affine:
    """An affine map, float64, whose eigenvalues are spread evenly over [lowest, rho]; a contraction for rho < 1."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    A = (Q * torch.linspace(lowest, rho, dim, dtype=torch.float64)) @ Q.T
    return Affine(A, torch.randn(batch, dim, generator=generator, dtype=torch.float64))
