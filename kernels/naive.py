"""What the operations *are*: plain float64, nothing incremental, nothing fused.

Every backend is held to these lines. Symbols as in docs/design/method.md: iterates x_i, values f_i = f(x_i),
residuals g_i = f_i - x_i, weights alpha_i, mixing parameter beta; B samples, m rows in the window, d elements.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_residual(x: Tensor, fx: Tensor) -> Tensor:
    """``||f - x|| / ||f||`` per sample: (B, d), (B, d) -> (B,) float64; 0 where f = x."""
    g, f = (fx.double() - x.double()).norm(dim=1), fx.double().norm(dim=1)
    return torch.where(g == 0, torch.zeros_like(g), g / f)


def anderson_weights(G: Tensor, *, regularization: str = "scaled", ridge: float = 1e-6) -> Tensor:
    """Weights that minimise ``||sum_i alpha_i g_i||^2 (+ ridge)`` subject to ``sum_i alpha_i = 1``.

    ``scaled``:   (S H S + ridge I) w = S 1,  alpha = S w / sum(S w),  S = diag(H)^-1/2;
    ``absolute``: the same with S = I (the *Deep Implicit Layers* tutorial, TorchDEQ, jaxopt).

    G: (B, m, d), the residual rows. Returns (B, m) float64.
    """
    G = G.double()
    H = G @ G.mT
    S = torch.diagonal(H, dim1=1, dim2=2).rsqrt() if regularization == "scaled" else torch.ones_like(H[:, 0])
    A = S[:, :, None] * H * S[:, None, :] + ridge * torch.eye(H.shape[1], dtype=H.dtype, device=H.device)
    w = S * torch.linalg.solve(A, S)
    alpha: Tensor = w / w.sum(dim=1, keepdim=True)
    return alpha


def anderson_update(
    X: Tensor, F: Tensor, *, beta: float = 1.0, regularization: str = "scaled", ridge: float = 1e-6
) -> Tensor:
    """``x_next = sum_i alpha_i (x_i + beta g_i)``. X, F: (B, m, d), the window. Returns (B, d) float64."""
    X, F = X.double(), F.double()
    G = F - X
    alpha = anderson_weights(G, regularization=regularization, ridge=ridge)
    return (alpha[:, :, None] * (X + beta * G)).sum(dim=1)
