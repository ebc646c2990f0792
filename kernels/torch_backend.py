"""PyTorch backend (the CPU's): incremental Gram matrix, batched matrix-vector products, LAPACK for m x m.

It decides on the host whether a rare branch is taken, which costs nothing on a CPU and a synchronisation on a GPU;
on a GPU the Triton backend is the one to use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state import WindowState, accumulator_dtype, residual_of_norms


class TorchBackend:
    """See :class:`kernels.state.Backend`."""

    def supports(self, window: int) -> bool:
        return window >= 1

    def step(
        self, state: WindowState, x: Tensor, fx: Tensor, out: Tensor, index: Tensor | None, slot: int, filled: int
    ) -> None:
        part = state if index is None else state.take(index)
        finite = _push(part, x, fx, slot, filled)
        _solve(part, slot, filled, finite)
        _mix(part, x, out, filled)
        if index is not None:
            state.put(index, part)

    def residual_norm(self, x: Tensor, fx: Tensor) -> Tensor:
        return residual_of_norms(_norm(fx - x), _norm(fx), accumulator_dtype(x.dtype))


def _norm(v: Tensor) -> Tensor:
    # In float64: squares of 1e-20 are zero in float32, and a residual of zero would pass for converged.
    norm: Tensor = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)
    return norm


def _products(rows: Tensor, row_norms: Tensor, g: Tensor, g_norm: Tensor) -> Tensor:
    """Inner products of g, (B, d), with rows, (B, n, d): (B, n) float64. Norms: (B, n) and (B,) float64.

    Not by ``bmm``: it sums one element after the other, and at d = 49,152 in float32 that costs a relative error of
    1e-5, ten times the ridge. ``sum`` adds pairwise, to 1e-7. Both sides are brought to norm about 1 by powers of two
    first, so that no product underflows.
    """
    dtype = accumulator_dtype(g.dtype)
    g_unit = _power_of_two(g_norm)
    g = g.to(dtype) * g_unit.to(dtype)[:, None]
    products = []
    for row, norm in zip(rows.unbind(dim=1), row_norms.unbind(dim=1), strict=True):
        unit = _power_of_two(norm)
        scaled = row.to(dtype) * unit.to(dtype)[:, None]
        products.append(scaled.mul_(g).sum(dim=1).double() / unit / g_unit)
    return torch.stack(products, dim=1)


def _power_of_two(norm: Tensor) -> Tensor:
    """About 1 / norm, (B,) float64, a power of two that float32 can hold; 1 for zero and for what is not finite."""
    exponent = torch.frexp(norm).exponent.clamp(-126, 126)
    usable = torch.isfinite(norm) & (norm > 0)
    return torch.where(usable, torch.ldexp(torch.ones_like(norm), -exponent), 1.0)


def _push(state: WindowState, x: Tensor, fx: Tensor, slot: int, filled: int) -> Tensor:
    """Residual row, mixed row, new Gram row, residuals. Returns which samples' new rows are finite, (B,) bool."""
    G, Y, H = state.G, state.Y, state.H
    active = ~state.frozen
    g = torch.sub(fx, x)
    given_up = state.frozen & ~(state.residual <= state.tol)
    kept = (G[given_up, slot], Y[given_up, slot])
    G[:, slot] = g
    # y = x + beta g written so that beta = 1 stores f itself, without rounding.
    torch.sub(fx, g, alpha=1.0 - state.beta, out=Y[:, slot])
    G[given_up, slot], Y[given_up, slot] = kept  # their best iterate is still to be read from the window
    g_norm = _norm(g)
    H[:, slot, slot] = g_norm.square()
    row_norms = torch.diagonal(H, dim1=1, dim2=2)[:, :filled].sqrt()
    h = _products(G[:, :filled], row_norms, g, g_norm)
    h[:, slot] = g_norm.square()
    H[:, slot, :filled] = h
    H[:, :filled, slot] = h

    residual = residual_of_norms(g_norm, _norm(fx), state.residual.dtype)
    finite = torch.isfinite(residual)
    rows_now = torch.where(finite, residual, torch.inf)
    state.row_residual[:, slot] = torch.where(active, rows_now, state.row_residual[:, slot])
    if not bool(finite.all()):
        # 0 * NaN is NaN: rows that do not take part must not hold one.
        bad = active & ~finite
        G[bad, slot] = 0
        Y[bad, slot] = 0
        H[bad, slot, :] = 0
        H[bad, :, slot] = 0
    state.residual.copy_(torch.where(active, residual, state.residual))
    state.iterations += active
    return finite


def _solve(state: WindowState, slot: int, filled: int, finite: Tensor) -> None:
    """The m x m systems of all samples, their weights, and who is frozen from now on."""
    valid = state.row_residual[:, :filled] < torch.inf
    H = state.H[:, :filled, :filled]
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    S = torch.where(valid, diagonal.rsqrt() if state.scaled else torch.ones_like(diagonal), 0.0)
    A = torch.where(valid[:, :, None] & valid[:, None, :], S[:, :, None] * H * S[:, None, :], 0.0)
    # A row that takes no part gets a one on the diagonal and a zero on the right: its weight is zero.
    A.diagonal(dim1=1, dim2=2).add_(torch.where(valid, state.ridge, 1.0))
    w = S * torch.linalg.solve_ex(A, S).result
    alpha = w / w.sum(dim=1, keepdim=True)

    # Fallbacks, for the sample concerned alone. A system that cannot be solved: the plain damped step from the
    # newest row. A newest row that is not finite: the plain damped step from the row before it.
    newest = torch.zeros_like(alpha)
    newest[:, slot] = 1.0
    solved = torch.isfinite(alpha).all(dim=1)
    alpha = torch.where(solved[:, None], alpha, newest)
    converged = state.residual <= state.tol
    given_up = torch.zeros_like(converged)
    if not bool(finite.all()):
        before = torch.zeros_like(alpha)
        if filled > 1:
            before[:, (slot - 1) % state.window] = 1.0
        recovers = (before * valid).sum(dim=1) > 0
        alpha = torch.where(finite[:, None], alpha, before)
        given_up = ~finite & ~recovers
    state.weights[:, :filled] = torch.where(state.frozen[:, None], state.weights[:, :filled], alpha)
    state.frozen |= converged | given_up


def _mix(state: WindowState, x: Tensor, out: Tensor, filled: int) -> None:
    """``out = sum_i alpha_i y_i`` for samples that are not frozen, ``x`` for the others."""
    rows = state.Y[:, :filled]
    weights = state.weights[:, None, :filled]
    unused = weights[:, 0] == 0
    if bool(unused.any()):
        # 0 * NaN is NaN, and a row that was never written may hold one.
        rows = torch.where(unused[:, :, None], 0, rows)
    if rows.dtype == weights.dtype and not bool(state.frozen.any()):
        torch.bmm(weights, rows, out=out.unsqueeze(1))
        return
    mixed = torch.bmm(weights, rows.to(weights.dtype)).squeeze(1).to(out.dtype)
    torch.where(state.frozen[:, None], x, mixed, out=out)
