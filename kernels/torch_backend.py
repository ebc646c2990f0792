"""PyTorch backend (the CPU's): incremental Gram matrix, batched matrix-vector products, LAPACK for m x m.

It decides on the host whether a rare branch is taken, which costs nothing on a CPU and a synchronisation on a GPU;
on a GPU the Triton backend is the one to use.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .state import (
    DROP_FAR,
    DROP_NEAR,
    FAR,
    LARGEST_RELAXATION,
    OVER_RELAXATION,
    UNPREDICTED,
    BackendName,
    WindowState,
    accumulator_dtype,
    residual_of_norms,
)


class TorchBackend:
    """See :class:`kernels.state.Backend`."""

    name: ClassVar[BackendName] = "torch"

    def supports(self, window: int) -> bool:
        return window >= 1

    def step(self, state: WindowState, x: Tensor, fx: Tensor, out: Tensor, index: Tensor | None) -> None:
        samples = torch.arange(len(x), device=x.device) if index is None else index
        moving = ~state.frozen[samples]
        if bool(moving.all()):
            _advance(state, samples, x, fx, out, whole=index is None)
            return
        part, f_part = x[moving], fx[moving]  # copies, before ``out`` is written, which may be either
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        if bool(moving.any()):
            _advance(state, samples[moving], part, f_part, part, whole=False)
            out[moving] = part

    def residual_norm(self, x: Tensor, fx: Tensor) -> Tensor:
        return residual_of_norms(_norm(fx - x), _norm(fx), accumulator_dtype(x.dtype))


def _norm(v: Tensor) -> Tensor:
    # In float64: squares of 1e-20 are zero in float32, and a residual of zero would pass for converged.
    norm: Tensor = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)
    return norm


def _products(rows: list[Tensor], row_norms: Tensor, g: Tensor, g_norm: Tensor) -> Tensor:
    """Inner products of g, (B, d), with n rows, (B, d) each: (B, n) float64. Norms: (B, n) and (B,) float64.

    Not by ``bmm``: it sums one element after the other, and at d = 49,152 in float32 that costs a relative error of
    1e-5, ten times the ridge. ``sum`` adds pairwise, to 1e-7. Both sides are brought to norm about 1 by powers of two
    first, so that no product underflows.
    """
    dtype = accumulator_dtype(g.dtype)
    g_unit = _power_of_two(g_norm)
    g = g.to(dtype) * g_unit.to(dtype)[:, None]
    products = []
    scaled = torch.empty_like(g)
    for row, norm in zip(rows, row_norms.unbind(dim=1), strict=True):
        unit = _power_of_two(norm)
        torch.mul(row, unit.to(dtype)[:, None], out=scaled)
        products.append(scaled.mul_(g).sum(dim=1).double() / unit / g_unit)
    return torch.stack(products, dim=1)


def _power_of_two(norm: Tensor) -> Tensor:
    """About 1 / norm, (B,) float64, a power of two that float32 can hold; 1 for zero and for what is not finite."""
    exponent = torch.frexp(norm).exponent.clamp(-126, 126)
    usable = torch.isfinite(norm) & (norm > 0)
    return torch.where(usable, torch.ldexp(torch.ones_like(norm), -exponent), 1.0)


def _advance(state: WindowState, samples: Tensor, x: Tensor, fx: Tensor, out: Tensor, *, whole: bool) -> None:
    """The iteration of ``samples``, (n,) int64, none of them frozen; ``whole`` if they are all B in order."""
    n, m = len(samples), state.window
    line = torch.arange(n, device=x.device)
    steps = state.iterations[samples].long()
    slot, filled = steps % m, (steps + 1).clamp(max=m)
    rows = int(filled.max())

    def history(ring: Tensor, i: int) -> Tensor:
        return ring[:, i] if whole else ring[samples, i]

    # The Gram matrix belongs to the rows as they are stored: round first, then multiply.
    g = torch.sub(fx, x).to(state.G.dtype)
    g_norm, f_norm = _norm(g), _norm(fx)
    residual = residual_of_norms(g_norm, f_norm, state.residual.dtype)
    finite = torch.isfinite(residual)
    # y = x + beta g written so that beta = 1 stores f itself, without rounding.
    if state.adaptive:
        beta = state.beta * state.relaxation[samples]
        state.row_beta[samples, slot] = beta.to(state.row_beta.dtype)
        dtype = accumulator_dtype(fx.dtype)
        y = torch.addcmul(fx.to(dtype), g.to(dtype), (1.0 - beta).to(dtype)[:, None], value=-1).to(fx.dtype)
    else:
        y = torch.sub(fx, g, alpha=1.0 - state.beta)
    if not bool(finite.all()):
        # 0 * NaN is NaN: rows that do not take part must not hold one.
        g[~finite], y[~finite] = 0, 0
        g_norm = torch.where(finite, g_norm, 0.0)
    H = state.H[samples]
    outlived = torch.zeros_like(g_norm)
    if state.adaptive and rows == m:
        # With the row that g takes the place of, which may have had weight in the last step.
        outlived = _products([state.G[samples, slot]], H[line, slot, slot].sqrt()[:, None], g, g_norm)[:, 0]
    state.G[samples, slot], state.Y[samples, slot] = g, y

    in_use = torch.arange(rows, device=x.device) < filled[:, None]
    row_norms = torch.diagonal(H, dim1=1, dim2=2)[:, :rows].sqrt()
    h = _products([history(state.G, i) for i in range(rows)], row_norms, g, g_norm)
    h[line, slot] = g_norm.square()
    # A row that was never written may hold anything.
    h = torch.where(in_use, h, 0.0)
    H[line, slot, :rows] = h
    H[line, :rows, slot] = h
    state.H[samples] = H
    state.row_residual[samples, slot] = torch.where(finite, residual, torch.inf)
    if state.adaptive:
        _adapt(state, samples, H, slot, residual, steps, outlived)
    state.residual[samples] = residual
    state.iterations[samples] += 1

    alpha, stays = _weights(state, samples, H[:, :rows, :rows], in_use, slot, finite)
    if state.adaptive:
        valid = (in_use & (state.row_residual[samples, :rows] < torch.inf)).double()
        taking_part = torch.where(valid[:, :, None] * valid[:, None] > 0, H[:, :rows, :rows], 0.0)
        combined = torch.einsum("ni,nij,nj->n", alpha.double(), taking_part, alpha.double())
        state.combined[samples, (steps + 1) % 2] = combined.clamp(min=0)
    state.weights[samples, :rows] = torch.where(in_use, alpha, state.weights[samples, :rows])
    state.frozen[samples] = stays
    # One path for all cases, so that a sample's bits do not depend on what its neighbours do.
    mixed_rows = state.Y[:, :rows] if whole else state.Y[samples, :rows]
    unused = alpha == 0
    if bool(unused.any()):
        # 0 * NaN is NaN, and a row that was never written may hold one.
        mixed_rows = torch.where(unused[:, :, None], 0, mixed_rows)
    mixed = torch.bmm(alpha[:, None], mixed_rows.to(alpha.dtype)).squeeze(1)
    torch.where(stays[:, None], x, mixed.to(out.dtype), out=out)


def _adapt(
    state: WindowState,
    samples: Tensor,
    H: Tensor,
    slot: Tensor,
    residual: Tensor,
    steps: Tensor,
    outlived: Tensor,
) -> None:
    """The rules of an adaptive window (state.py), once the newest row of H, (n, m, m), is there.

    Rows that no longer fit leave, and the next row's mixing parameter follows the gain of the last step, whose weights
    ``state.weights`` still are. outlived: (n,) float64, g . (the row that g takes the place of).
    """
    line = torch.arange(len(samples), device=H.device)
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    newest, combined = diagonal[line, slot], state.combined[samples, steps % 2]
    limit = torch.where(residual > FAR, DROP_FAR, DROP_NEAR).double()
    unpredicted = torch.isfinite(residual) & (newest > UNPREDICTED**2 * combined)
    dropped = unpredicted[:, None] & (diagonal > limit.square()[:, None] * newest[:, None])
    in_use = torch.arange(state.window, device=H.device) <= steps[:, None]
    row_residual = state.row_residual[samples]
    state.row_residual[samples] = torch.where(dropped & in_use, torch.inf, row_residual)

    weights = state.weights[samples].double()
    products = H[line, slot].scatter(1, slot[:, None], outlived[:, None])
    product = torch.where(weights != 0, weights * products, 0.0).sum(dim=1)
    relaxation = state.relaxation[samples]
    best = OVER_RELAXATION * relaxation * (combined - product) / (combined - 2 * product + newest)
    follows = (relaxation * best.clamp(1.0, LARGEST_RELAXATION)).sqrt()
    state.relaxation[samples] = torch.where(torch.isfinite(best), follows, relaxation)


def _weights(
    state: WindowState, samples: Tensor, H: Tensor, in_use: Tensor, slot: Tensor, finite: Tensor
) -> tuple[Tensor, Tensor]:
    """The m x m systems: alpha, (n, rows), and which samples stay where they are, (n,) bool. H: (n, rows, rows)."""
    rows = H.shape[1]
    valid = in_use & (state.row_residual[samples, :rows] < torch.inf)
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    S = torch.where(valid, diagonal.rsqrt() if state.scaled else torch.ones_like(diagonal), 0.0)
    A = torch.where(valid[:, :, None] & valid[:, None, :], S[:, :, None] * H * S[:, None, :], 0.0)
    # A row that takes no part gets a one on the diagonal and a zero on the right: its weight is zero.
    A.diagonal(dim1=1, dim2=2).add_(torch.where(valid, state.ridge, 1.0))
    w = S * torch.linalg.solve_ex(A, S).result
    alpha = w / w.sum(dim=1, keepdim=True)

    # Fallbacks, for the sample concerned alone. A system that cannot be solved: the plain damped step from the
    # newest row. A newest row that is not finite: the plain damped step from the row before it.
    row = torch.arange(rows, device=H.device)
    newest = (row == slot[:, None]).to(alpha.dtype)
    alpha = torch.where(torch.isfinite(alpha).all(dim=1, keepdim=True), alpha, newest)
    before = (row == ((slot - 1) % state.window)[:, None]) & valid
    alpha = torch.where(finite[:, None], alpha, before.to(alpha.dtype)).to(state.weights.dtype)
    return alpha, (state.residual[samples] <= state.tol) | (~finite & ~before.any(dim=1))
