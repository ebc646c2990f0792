"""What one sample's weights are, in registers: the system, the rules of an adaptive window, and the sample's books.

Nothing here is as long as the state: the kernels of ``triton_backend.py`` hand a sample's new Gram row in and get its
weights out. The rules are those of ``torch_backend.py`` (:func:`_weigh` there), with the constants of ``state.py``.
"""

import triton
import triton.language as tl

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
    Carried,
    Outcome,
)

_FAR, _PROGRESS, _STALL, _BLOW = (tl.constexpr(value) for value in (FAR, PROGRESS, STALL, BLOW))
_UNPREDICTED_SQUARED, _PROMISE_SQUARED = tl.constexpr(UNPREDICTED**2), tl.constexpr(PROMISE**2)
_DROP_FAR_SQUARED, _DROP_NEAR_SQUARED = tl.constexpr(DROP_FAR**2), tl.constexpr(DROP_NEAR**2)
_RELAXATION_NEAR, _RELAXATION_BEYOND = tl.constexpr(RELAXATION_NEAR), tl.constexpr(RELAXATION_FAR - RELAXATION_NEAR)
_NEAR = tl.constexpr(NEAR)
_SMALLEST_RELAXATION, _LARGEST_RELAXATION = tl.constexpr(SMALLEST_RELAXATION), tl.constexpr(LARGEST_RELAXATION)
_CONVERGED, _NON_FINITE = tl.constexpr(int(Outcome.CONVERGED)), tl.constexpr(int(Outcome.NON_FINITE))
_DIVERGED = tl.constexpr(int(Outcome.DIVERGED))
_PREDICTED, _RELAXATION, _LOWEST, _STALLED, _HELD = (tl.constexpr(int(column)) for column in Carried)
_CARRIED = tl.constexpr(len(Carried))


@triton.jit
def solve(H, S, valid, ridge, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    """alpha of min || sum alpha_i g_i ||^2, sum alpha_i = 1, over valid rows: Gauss-Jordan on (S H S + ridge I) w = S.

    H: (ROWS, ROWS) float64, S: (ROWS,) float64, valid: (ROWS,) bool; alpha: (ROWS,) float64, 0 on other rows, and
    1 / the minimum (with the ridge's part), (). The matrix is symmetric positive definite, so that no pivoting is
    needed.
    """
    row = tl.arange(0, ROWS)
    both = valid[:, None] & valid[None, :]
    diagonal = row[:, None] == row[None, :]
    S = tl.where(valid, S, 0.0)
    A = tl.where(both, S[:, None] * H * S[None, :], 0.0)
    A += tl.where(diagonal, tl.where(valid, ridge, 1.0)[:, None], 0.0)
    w = S
    for k in tl.static_range(WINDOW):
        pivot_row = tl.sum(tl.where(row[:, None] == k, A, 0.0), axis=0)
        pivot_column = tl.sum(tl.where(row[None, :] == k, A, 0.0), axis=1)
        pivot = tl.sum(tl.where(row == k, pivot_row, 0.0), axis=0)
        pivot_w = tl.sum(tl.where(row == k, w, 0.0), axis=0)
        factor = tl.where(row == k, 0.0, pivot_column * (1.0 / pivot))
        A -= factor[:, None] * pivot_row[None, :]
        w -= factor * pivot_w
    w = S * w / tl.sum(tl.where(diagonal, A, 0.0), axis=1)
    total = tl.sum(w, axis=0)
    return tl.where(valid, w / total, 0.0), total


@triton.jit
def weigh(
    h,
    f_squared,
    gain,
    sample,
    steps,
    H_ptr,
    row_residual_ptr,
    carried_ptr,
    beta: tl.float64,
    tol: tl.float64,
    floor: tl.float64,
    ridge: tl.float64,
    patience,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    LARGEST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """From the new Gram row to the weights: (alpha (ROWS,), beta (r - 1) (), residual (), row residuals (ROWS,),
    outcome () int, what the next step is told (predicted, relaxation, lowest, stalled, held), whether the system was
    solved).

    Every program of a sample finds the same, whether the first has already written what it found or not: ``carried`` is
    read in one plane and written in the other, and a row that was dropped stays dropped.
    """
    row = tl.arange(0, ROWS)
    slot = steps % WINDOW
    in_use = (row <= steps) & (row < WINDOW)
    newest = row == slot
    g_squared = tl.sum(tl.where(newest, h, 0.0), axis=0)
    infinity = float("inf")
    finite = (g_squared < infinity) & (f_squared < infinity)
    # Where only f is zero the residual is the largest number, which is large and no failure.
    ratio = tl.sqrt(g_squared) / (tl.sqrt(f_squared) + tl.full((), floor, tl.float64))
    residual = tl.where(finite, tl.where(ratio < LARGEST, ratio, LARGEST), float("nan")).to(ACCUMULATOR)
    converged = residual <= tl.full((), tol, ACCUMULATOR)

    carried = carried_ptr + (sample * 2 + steps % 2) * _CARRIED
    lowest = tl.load(carried + _LOWEST)
    stalled = tl.load(carried + _STALLED)
    wide_residual = residual.to(tl.float64)
    progress = wide_residual < lowest * _PROGRESS
    lowest = tl.where(progress, wide_residual, lowest)
    stalled = tl.where(progress, 0.0, stalled + 1.0)

    entry = tl.where(finite, residual, infinity)
    row_residual = tl.load(row_residual_ptr + sample * WINDOW + row, mask=in_use, other=infinity)
    row_residual = tl.where(newest, entry, row_residual)
    valid = (row_residual >= 0.0) & (row_residual < infinity)
    H_here = H_ptr + sample * WINDOW * WINDOW
    old = tl.load(H_here + row[:, None] * WINDOW + row[None, :], mask=in_use[:, None] & in_use[None, :], other=0.0)
    H = tl.where(newest[:, None], h[None, :], tl.where(newest[None, :], h[:, None], old))
    H_diagonal = tl.sum(tl.where(row[:, None] == row[None, :], H, 0.0), axis=1)
    S = tl.full((ROWS,), 1.0, tl.float64)
    if SCALED:
        S = 1.0 / tl.sqrt(H_diagonal)
    wide_ridge = tl.full((), ridge, tl.float64)
    longer = tl.zeros((), ACCUMULATOR)
    relaxation = tl.full((), 1.0, tl.float64)
    held = tl.zeros((), tl.float64)
    if ADAPTIVE:
        relaxation = tl.load(carried + _RELAXATION)
        held = tl.minimum(tl.load(carried + _HELD) + 1.0, stalled)
        held = tl.where((held >= _STALL) & (wide_residual > lowest * _BLOW), 0.0, held)
        forward = (held >= _STALL) & finite
        kept = valid & (newest | (forward == 0))

        predicted = tl.load(carried + _PREDICTED)
        near_share = tl.sqrt(tl.minimum(wide_residual / _NEAR, 1.0))
        best = (_RELAXATION_NEAR + near_share * _RELAXATION_BEYOND) * relaxation
        best = best * (predicted - gain) / (predicted - 2.0 * gain + g_squared)
        follows = tl.minimum(tl.maximum(best, _SMALLEST_RELAXATION), _LARGEST_RELAXATION)
        relaxation = tl.where((tl.abs(best) < infinity) & finite, follows, relaxation)

        limit = tl.where(wide_residual > _FAR, tl.full((), _DROP_FAR_SQUARED, tl.float64), _DROP_NEAR_SQUARED)
        near = kept & (newest | (H_diagonal <= limit * g_squared))
        # No row may leave in a step that is not finite: it may be the one to step back to.
        unpredicted = (g_squared > predicted * _UNPREDICTED_SQUARED) & finite
        fewer = unpredicted & (tl.sum(tl.where(kept & (near == 0), 1, 0), axis=0) > 0)
        alpha = tl.zeros((ROWS,), tl.float64)
        total = tl.zeros((), tl.float64)
        # A second time, without the rows that are far, only where they are to be judged.
        attempt = 0
        while attempt < 1 + fewer.to(tl.int32):
            candidates = (kept & (attempt == 0)) | (near & (attempt > 0))
            found, found_total = solve(H, S, candidates, wide_ridge, WINDOW, ROWS)
            taken = (attempt == 0) | (found_total > total * _PROMISE_SQUARED)
            alpha = tl.where(taken, found, alpha)
            total = tl.where(taken, found_total, total)
            kept = kept & (candidates | (taken == 0))
            attempt += 1
        row_residual = tl.where(valid & (kept == 0), -row_residual, row_residual)
        longer = (tl.full((), beta, tl.float64) * (relaxation - 1.0)).to(ACCUMULATOR)
    else:
        alpha, total = solve(H, S, valid, wide_ridge, WINDOW, ROWS)

    # Fallbacks of this sample alone: see AndersonWindow.
    solved = (tl.sum(tl.where(tl.abs(alpha) < infinity, 0, 1), axis=0) == 0) & finite
    before = (row == (slot + WINDOW - 1) % WINDOW) & valid
    recovers = tl.sum(tl.where(before, 1, 0), axis=0) > 0
    alpha = tl.where(solved, alpha, tl.where(newest, 1.0, 0.0))
    alpha = tl.where(finite, alpha, tl.where(before, 1.0, 0.0)).to(ACCUMULATOR)
    longer = tl.where(solved, longer, 0.0)
    predicted = tl.where(solved, 1.0 / total, infinity)
    oldest = tl.where(steps + 1 < WINDOW, 0, (steps + 1) % WINDOW)
    then_squared = tl.sum(tl.where(row == oldest, H_diagonal, 0.0), axis=0)
    shrinks = finite & (g_squared < then_squared * _PROGRESS * _PROGRESS)
    diverged = (patience > 0) & (stalled >= patience) & (lowest > _FAR) & (shrinks == 0)
    outcome = tl.where(diverged, _DIVERGED, 0)
    outcome = tl.where((finite == 0) & (recovers == 0), _NON_FINITE, outcome)
    outcome = tl.where(converged, _CONVERGED, outcome)
    return alpha, longer, residual, row_residual, outcome, predicted, relaxation, lowest, stalled, held, solved


@triton.jit
def keep_books(
    h,
    alpha,
    residual,
    row_residual,
    outcome,
    predicted,
    relaxation,
    lowest,
    stalled,
    held,
    solved,
    sample,
    steps,
    H_ptr,
    row_residual_ptr,
    weights_ptr,
    residual_ptr,
    outcome_ptr,
    iterations_ptr,
    tally_ptr,
    carried_ptr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    """What the next iteration needs to know of this one."""
    row = tl.arange(0, ROWS)
    slot = steps % WINDOW
    in_use = (row <= steps) & (row < WINDOW)
    H_here = H_ptr + sample * WINDOW * WINDOW
    tl.store(H_here + slot * WINDOW + row, h, mask=in_use)
    tl.store(H_here + row * WINDOW + slot, h, mask=in_use)
    if ADAPTIVE:  # rows may have been dropped
        tl.store(row_residual_ptr + sample * WINDOW + row, row_residual, mask=in_use)
        if held == _STALL:
            tl.store(tally_ptr + sample * 2, tl.load(tally_ptr + sample * 2) + 1)
    else:
        entry = tl.where(residual == residual, residual, float("inf"))
        tl.store(row_residual_ptr + sample * WINDOW + slot, entry)
    if (solved == 0) & (outcome == 0):
        tl.store(tally_ptr + sample * 2 + 1, tl.load(tally_ptr + sample * 2 + 1) + 1)
    tl.store(weights_ptr + sample * WINDOW + row, alpha, mask=in_use)
    tl.store(residual_ptr + sample, residual)
    tl.store(iterations_ptr + sample, steps + 1)
    carried = carried_ptr + (sample * 2 + (steps + 1) % 2) * _CARRIED
    if ADAPTIVE:
        tl.store(carried + _PREDICTED, predicted)
        tl.store(carried + _RELAXATION, relaxation)
        tl.store(carried + _HELD, held)
    tl.store(carried + _LOWEST, lowest)
    tl.store(carried + _STALLED, stalled)
    if outcome != 0:
        tl.store(outcome_ptr + sample, outcome)
