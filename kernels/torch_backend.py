"""PyTorch backend (the CPU's): incremental Gram matrix, batched matrix-vector products, LAPACK for m x m.

It decides on the host whether a rare branch is taken, which costs nothing on a CPU and a synchronisation on a GPU;
on a GPU the Triton backend is the one to use.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .state import (
    BLOW,
    DROP_FAR,
    DROP_NEAR,
    FAR,
    LARGEST_RELAXATION,
    NEAR,
    PROGRESS,
    PROMISE,
    RELAXATION_FAR,
    RELAXATION_NEAR,
    SMALLEST_RELAXATION,
    STALL,
    UNPREDICTED,
    BackendName,
    Outcome,
    WindowState,
    accumulator_dtype,
    residual_of_norms,
    track_progress,
)


class TorchBackend:
    """See :class:`deq.kernels.state.Backend`."""

    name: ClassVar[BackendName] = "torch"

    def supports(self, window: int) -> bool:
        return window >= 1

    def step(self, state: WindowState, x: Tensor, fx: Tensor, out: Tensor, index: Tensor | None) -> None:
        # Autocast is for f: products and the mix would be taken in half precision.
        with torch.autocast(x.device.type, enabled=False):
            self._step(state, x, fx, out, index)

    def _step(self, state: WindowState, x: Tensor, fx: Tensor, out: Tensor, index: Tensor | None) -> None:
        samples = torch.arange(len(x), device=x.device) if index is None else index
        moving = state.outcome[samples] == 0
        if bool(moving.all()):
            _advance(state, samples, x, fx, out, whole=index is None)
            return
        part, f_part = x[moving], fx[moving]  # copies, before ``out`` is written, which may be either
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        if bool(moving.any()):
            _advance(state, samples[moving], part, f_part, part, whole=False)
            out[moving] = part

    def residual_norm(self, x: Tensor, fx: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        size = _norm(fx - x)
        return residual_of_norms(size, _norm(fx), accumulator_dtype(x.dtype), floor), size


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
    residual = residual_of_norms(g_norm, f_norm, state.residual.dtype, state.floor)
    finite = torch.isfinite(residual)
    # y = x + beta g written so that beta = 1 stores f itself, without rounding.
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
    state.residual[samples] = residual
    state.iterations[samples] += 1

    last = state.weights[samples, :rows].double()
    products = h.scatter(1, slot[:, None], outlived[:, None])
    gain = torch.where(last != 0, last * products, 0.0).sum(dim=1)
    alpha, relaxation, stays = _weigh(state, samples, H[:, :rows, :rows], in_use, slot, steps, finite, gain)
    state.weights[samples, :rows] = torch.where(in_use, alpha, state.weights[samples, :rows])
    # One path for all cases, so that a sample's bits do not depend on what its neighbours do.
    mixed = _combine(alpha, state.Y[:, :rows] if whole else state.Y[samples, :rows], in_use)
    longer = alpha * (state.beta * (relaxation - 1.0)).to(alpha.dtype)[:, None]
    if bool(longer.any()):
        mixed += _combine(longer, state.G[:, :rows] if whole else state.G[samples, :rows], in_use)
    torch.where(stays[:, None], x, mixed.to(out.dtype), out=out)


def _combine(weights: Tensor, rows: Tensor, in_use: Tensor) -> Tensor:
    """``sum_i weights_i rows_i`` over the rows that are in use: (n, rows), (n, rows, d), (n, rows) bool -> (n, d)."""
    if not bool(in_use.all()):
        # 0 * NaN is NaN, and a row that was never written may hold one. Those written hold none.
        rows = torch.where(in_use[:, :, None], rows, 0)
    return torch.bmm(weights[:, None], rows.to(weights.dtype)).squeeze(1)


def _weigh(
    state: WindowState,
    samples: Tensor,
    H: Tensor,
    in_use: Tensor,
    slot: Tensor,
    steps: Tensor,
    finite: Tensor,
    gain: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights alpha, (n, rows), what beta is multiplied by, (n,), and which samples stay where they are, (n,) bool.

    H: (n, rows, rows), its newest row included; gain: (n,) float64, g . (the combined residual of the last step). Keeps
    the books, those of the rows excepted.
    """
    rows = H.shape[1]
    row = torch.arange(rows, device=H.device)
    newest = row == slot[:, None]
    residual = state.residual[samples].double()
    carried = state.carried[samples, steps % 2]
    predicted, relaxation, lowest, stalled, held = carried.unbind(dim=1)

    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    squared = torch.where(newest, diagonal, 0.0).sum(dim=1)
    oldest = torch.where(steps + 1 < state.window, 0, (steps + 1) % state.window)
    shrinks = finite & (squared < PROGRESS**2 * diagonal.gather(1, oldest[:, None])[:, 0])
    lowest, stalled = track_progress(residual, lowest, stalled)
    held = torch.minimum(held + 1, stalled)
    row_residual = state.row_residual[samples, :rows]
    valid = in_use & (row_residual >= 0) & (row_residual < torch.inf)
    kept = valid
    if state.adaptive:
        held = torch.where((held >= STALL) & (residual > BLOW * lowest), 0.0, held)
        forward = (held >= STALL) & finite
        state.tally[samples, 0] += (held == STALL).int()
        kept = valid & (newest | ~forward[:, None])

        factor = RELAXATION_NEAR + (RELAXATION_FAR - RELAXATION_NEAR) * (residual / NEAR).clamp(max=1.0).sqrt()
        best = factor * relaxation * (predicted - gain) / (predicted - 2 * gain + squared)
        follows = best.clamp(SMALLEST_RELAXATION, LARGEST_RELAXATION)
        relaxation = torch.where(torch.isfinite(best) & finite, follows, relaxation)

        limit = torch.where(residual > FAR, DROP_FAR**2, DROP_NEAR**2)
        near = kept & (newest | (diagonal <= (limit * squared)[:, None]))
        alpha, total = _solve(state, H, kept)
        fewer, total_of_fewer = _solve(state, H, near)
        drops = (squared > UNPREDICTED**2 * predicted) & (total_of_fewer > PROMISE**2 * total)
        drops &= (near != kept).any(dim=1)
        alpha = torch.where(drops[:, None], fewer, alpha)
        total = torch.where(drops, total_of_fewer, total)
        kept = torch.where(drops[:, None], near, kept)
        state.row_residual[samples, :rows] = torch.where(valid & ~kept, -row_residual, row_residual)
    else:
        alpha, total = _solve(state, H, kept)

    # Fallbacks, for the sample concerned alone. A system that cannot be solved: the plain damped step from the
    # newest row. A newest row that is not finite: the plain damped step from the row before it.
    solved = torch.isfinite(alpha).all(dim=1) & finite
    alpha = torch.where(solved[:, None], alpha, newest.to(alpha.dtype))
    before = (row == ((slot - 1) % state.window)[:, None]) & valid
    alpha = torch.where(finite[:, None], alpha, before.to(alpha.dtype)).to(state.weights.dtype)
    state.carried[samples, (steps + 1) % 2] = torch.stack(
        [torch.where(solved, 1.0 / total, torch.inf), relaxation, lowest, stalled, held], dim=1
    )
    outcome = torch.zeros_like(state.outcome[samples])
    if state.patience:
        outcome[(stalled >= state.patience) & (lowest > FAR) & ~shrinks] = Outcome.DIVERGED
    outcome[~finite & ~before.any(dim=1)] = Outcome.NON_FINITE
    outcome[state.residual[samples] <= state.tol] = Outcome.CONVERGED
    state.outcome[samples] = outcome
    state.tally[samples, 1] += (~solved & (outcome == 0)).int()
    return alpha, torch.where(solved, relaxation, 1.0), outcome != 0


def _solve(state: WindowState, H: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The m x m systems over the valid rows, (n, rows) bool: alpha, (n, rows), 0 on other rows, and 1 / min, (n,)."""
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    S = torch.where(valid, diagonal.rsqrt() if state.scaled else torch.ones_like(diagonal), 0.0)
    A = torch.where(valid[:, :, None] & valid[:, None, :], S[:, :, None] * H * S[:, None, :], 0.0)
    # A row that takes no part gets a one on the diagonal and a zero on the right: its weight is zero.
    A.diagonal(dim1=1, dim2=2).add_(torch.where(valid, torch.full_like(diagonal, state.ridge), 1.0))
    w = S * torch.linalg.solve_ex(A, S).result
    total = w.sum(dim=1)
    return w / total[:, None], total
