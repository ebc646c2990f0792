"""A solver to compare with: Anderson acceleration as the textbooks write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
