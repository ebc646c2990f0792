"""Triton backend: an Anderson iteration in two launches, or one for a small state, with no host in between.

Launch 1, ``_push``: residual row, mixed row, partial sums of the new Gram row and of ||f||^2.
Launch 2, ``_mix``:  finish the row, solve m x m in registers, mix, and keep the books of each sample.

``_update`` does both where one program holds a whole sample (d up to ``launch.fused_dim``). ``_reduce`` stands between
the two where a sample has so many partial sums that reading them in every program of ``_mix`` would cost traffic.

Traffic per element of the state: launch 1 reads x, f and m - 1 rows of G and writes one row of G and of Y; launch 2
reads m rows of Y and writes x_next: 2m + 4 in all (``_update`` keeps the newest y: 2m + 3). An adaptive window reads
one row of G more in launch 1, and all m in launch 2: 3m + 5 (``_update``: 3m + 3). Partial sums are added in
one fixed order and no atomics are used, so the same input gives the same bits. Every program first looks whether its
sample is frozen; if so it leaves without touching the history. The row to write is counted on the device, sample by
sample: every iteration is the same launch, which a CUDA graph can replay.
"""

import functools
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .launch import device_key, fused_dim, fused_options, fused_shape, mix_options, split_shape, warp_size
from .state import BackendName, WindowState, accumulator_dtype, on_device, residual_of_norms
from .triton_weights import keep_books, weigh

MAX_WINDOW = 32
"""Rows that the solve in registers is built for (a tile of MAX_WINDOW^2 float64 over one or two warps)."""

_FINISH_BLOCKS = 16
"""Partial sums that are added up at a time."""

_REDUCE_BLOCKS = 128
"""Partial sums of a sample from which on ``_reduce`` adds them up once, and not every program of ``_mix`` again: they
would be more than a tenth of what such a program reads at m = 5."""


@triton.jit
def _weighted(product, weight_ptr):
    """alpha_i times a product with g_i: 0 where there is no weight, whatever the row holds: () float64."""
    weight = tl.load(weight_ptr).to(tl.float64)
    return tl.where(weight != 0.0, weight * product, 0.0)


@triton.jit
def _product_with_last(g, weight_ptr, old_row, element, stride):
    """alpha_i g . g_i for the row that g takes the place of: () float64."""
    weight = tl.load(weight_ptr)
    old = tl.load(old_row, mask=element < tl.where(weight != 0.0, stride, 0), other=0.0)
    # It may not be written over before all threads have read it.
    tl.debug_barrier()
    return _weighted(tl.sum(g.to(tl.float64) * old.to(tl.float64), axis=0), weight_ptr)


@triton.jit
def _push(
    x_ptr,
    f_ptr,
    G_ptr,
    Y_ptr,
    partial_ptr,
    outcome_ptr,
    iterations_ptr,
    pushed_ptr,
    weights_ptr,
    index_ptr,
    beta: tl.float64,
    dim,
    stride,
    blocks,
    WINDOW: tl.constexpr,
    UNDAMPED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    INDEXED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample. partial: (n, blocks, WINDOW + 2), the columns after the rows' for
    ||f||^2 and, where the window is adaptive, for g . (the combined residual of the last step), whose weights are still
    there: ``_mix`` writes the next.

    Row ``row`` of x and f belongs to sample index[row] of the window, or to sample ``row`` where it is not INDEXED.
    ``iterations`` is read here and written by ``_mix``, ``pushed`` the other way round: no program can read a count
    that another one of its launch has changed.
    """
    program = tl.program_id(0)
    position = (program // blocks).to(tl.int64)
    sample = tl.load(index_ptr + position) if INDEXED else position
    block = program % blocks
    steps = tl.load(iterations_ptr + sample)
    if tl.load(outcome_ptr + sample) != 0:
        return
    if block == 0:
        tl.store(pushed_ptr + sample, steps)
    slot = steps % WINDOW
    # Within a sample, offsets fit int32 only for d < 2^31: they are 64-bit throughout.
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < dim
    # Rows of the history are padded to a stride that 16-byte accesses divide, whatever dim; the padding holds zeros.
    held = element < stride
    x = tl.load(x_ptr + position * dim + element, mask=inside, other=0.0).to(ACCUMULATOR)
    f = tl.load(f_ptr + position * dim + element, mask=inside, other=0.0).to(ACCUMULATOR)
    # The Gram matrix belongs to the rows as they are stored: round first, then multiply.
    g_stored = (f - x).to(G_ptr.dtype.element_ty)
    g = g_stored.to(ACCUMULATOR)
    first_row = sample * WINDOW
    new_row = (first_row + slot) * stride + element
    out = partial_ptr + program.to(tl.int64) * (WINDOW + 2)
    gain = tl.zeros((), tl.float64)
    if ADAPTIVE:
        gain += _product_with_last(g, weights_ptr + sample * WINDOW + slot, G_ptr + new_row, element, stride)
    tl.store(G_ptr + new_row, g_stored, mask=held)
    y = f if UNDAMPED else f - tl.full((), 1.0 - beta, ACCUMULATOR) * g
    tl.store(Y_ptr + new_row, y.to(Y_ptr.dtype.element_ty), mask=held)

    for row in tl.static_range(WINDOW):
        if row <= steps:
            if row == slot:
                # In float64: products of 1e-20 are zero in float32, and a residual of zero would pass for converged.
                tl.store(out + row, tl.sum(g.to(tl.float64) * g.to(tl.float64), axis=0))
            else:
                other = tl.load(G_ptr + (first_row + row) * stride + element, mask=held, other=0.0)
                product = tl.sum(g.to(tl.float64) * other.to(tl.float64), axis=0)
                tl.store(out + row, product)
                if ADAPTIVE:
                    gain += _weighted(product, weights_ptr + sample * WINDOW + row)
    tl.store(out + WINDOW, tl.sum(f.to(tl.float64) * f.to(tl.float64), axis=0))
    if ADAPTIVE:
        tl.store(out + WINDOW + 1, gain)


@triton.jit
def _add_up(
    partial,
    row,
    in_use,
    blocks,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    FINISH_BLOCKS: tl.constexpr,
):
    """The new Gram row, ||f||^2 and the product with the last combined residual of one sample, in one order: (ROWS,),
    () and () float64."""
    h = tl.zeros((ROWS,), tl.float64)
    f_squared = tl.zeros((), tl.float64)
    gain = tl.zeros((), tl.float64)
    first = 0
    while first < blocks:
        part = first + tl.arange(0, FINISH_BLOCKS)
        line = partial + part.to(tl.int64) * (WINDOW + 2)
        tile = tl.load(line[:, None] + row[None, :], mask=(part < blocks)[:, None] & in_use[None, :], other=0.0)
        h += tl.sum(tile, axis=0)
        f_squared += tl.sum(tl.load(line + WINDOW, mask=part < blocks, other=0.0), axis=0)
        if ADAPTIVE:
            gain += tl.sum(tl.load(line + WINDOW + 1, mask=part < blocks, other=0.0), axis=0)
        first += FINISH_BLOCKS
    return h, f_squared, gain


@triton.jit
def _reduce(
    partial_ptr,
    outcome_ptr,
    pushed_ptr,
    index_ptr,
    blocks,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    INDEXED: tl.constexpr,
    FINISH_BLOCKS: tl.constexpr,
):
    """One program: all partial sums of one sample, added up into the first of them."""
    position = tl.program_id(0).to(tl.int64)
    sample = tl.load(index_ptr + position) if INDEXED else position
    if tl.load(outcome_ptr + sample) != 0:
        return
    row = tl.arange(0, ROWS)
    in_use = (row <= tl.load(pushed_ptr + sample)) & (row < WINDOW)
    partial = partial_ptr + position * blocks * (WINDOW + 2)
    h, f_squared, gain = _add_up(partial, row, in_use, blocks, WINDOW, ROWS, ADAPTIVE, FINISH_BLOCKS)
    tl.debug_barrier()
    tl.store(partial + row, h, mask=in_use)
    tl.store(partial + WINDOW, f_squared)
    if ADAPTIVE:
        tl.store(partial + WINDOW + 1, gain)


@triton.jit
def _longer_step(alpha, longer, G_ptr, first_row, element, stride, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    """``longer * sum_i alpha_i g_i`` at ``element``; nothing is read where ``longer`` is 0."""
    row = tl.arange(0, ROWS)
    combined = tl.zeros(element.shape, alpha.dtype)
    for i in tl.static_range(WINDOW):
        weight = longer * tl.sum(tl.where(row == i, alpha, 0.0), axis=0)
        G_row = G_ptr + (first_row + i) * stride + element
        g = tl.load(G_row, mask=element < tl.where(weight != 0.0, stride, 0), other=0.0)
        combined += weight * g.to(alpha.dtype)
    return combined


@triton.jit
def _mix(
    x_ptr,
    out_ptr,
    G_ptr,
    Y_ptr,
    H_ptr,
    partial_ptr,
    row_residual_ptr,
    weights_ptr,
    residual_ptr,
    outcome_ptr,
    iterations_ptr,
    tally_ptr,
    carried_ptr,
    pushed_ptr,
    index_ptr,
    beta: tl.float64,
    tol: tl.float64,
    floor: tl.float64,
    ridge: tl.float64,
    patience,
    dim,
    stride,
    blocks,
    sums,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    INDEXED: tl.constexpr,
    LARGEST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    FINISH_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample, of which ``sums`` partial sums are to be added up.

    Every program of a sample solves the same tiny system, with the same bits; only the first writes the books. Another
    may read ``outcome`` before or after that write: either way it does the same, since a sample that freezes here keeps
    its x. The row and column of H that the first writes are read by no other: they come from the partial sums."""
    program = tl.program_id(0)
    position = (program // blocks).to(tl.int64)
    sample = tl.load(index_ptr + position) if INDEXED else position
    block = program % blocks
    steps = tl.load(pushed_ptr + sample)
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < dim
    x_here = x_ptr + position * dim + element
    out_here = out_ptr + position * dim + element
    if tl.load(outcome_ptr + sample) != 0:
        if not IN_PLACE:
            tl.store(out_here, tl.load(x_here, mask=inside), mask=inside)
        return

    row = tl.arange(0, ROWS)
    in_use = (row <= steps) & (row < WINDOW)
    partial = partial_ptr + position * blocks * (WINDOW + 2)
    h, f_squared, gain = _add_up(partial, row, in_use, sums, WINDOW, ROWS, ADAPTIVE, FINISH_BLOCKS)
    alpha, longer, residual, row_residual, outcome, predicted, relaxation, lowest, stalled, held, solved = weigh(
        h,
        f_squared,
        gain,
        sample,
        steps,
        H_ptr,
        row_residual_ptr,
        carried_ptr,
        beta,
        tol,
        floor,
        ridge,
        patience,
        WINDOW,
        ROWS,
        SCALED,
        ADAPTIVE,
        LARGEST,
        ACCUMULATOR,
    )
    if block == 0:
        keep_books(
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
            WINDOW,
            ROWS,
            ADAPTIVE,
        )
    if outcome != 0:
        if not IN_PLACE:
            tl.store(out_here, tl.load(x_here, mask=inside), mask=inside)
        return

    mixed = tl.zeros((BLOCK,), ACCUMULATOR)
    for i in tl.static_range(WINDOW):
        # A row of no weight is not read: it may be empty, or hold the NaN that took it out.
        weight = tl.sum(tl.where(row == i, alpha, 0.0), axis=0)
        Y_row = Y_ptr + (sample * WINDOW + i) * stride + element
        y = tl.load(Y_row, mask=element < tl.where(weight != 0.0, stride, 0), other=0.0)
        mixed += weight * y.to(ACCUMULATOR)
    if ADAPTIVE:
        mixed += _longer_step(alpha, longer, G_ptr, sample * WINDOW, element, stride, WINDOW, ROWS)
    tl.store(out_here, mixed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _update(
    x_ptr,
    f_ptr,
    out_ptr,
    G_ptr,
    Y_ptr,
    H_ptr,
    row_residual_ptr,
    weights_ptr,
    residual_ptr,
    outcome_ptr,
    iterations_ptr,
    tally_ptr,
    carried_ptr,
    index_ptr,
    beta: tl.float64,
    tol: tl.float64,
    floor: tl.float64,
    ridge: tl.float64,
    patience,
    dim,
    stride,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    UNDAMPED: tl.constexpr,
    SCALED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    INDEXED: tl.constexpr,
    LARGEST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a whole sample of up to BLOCK elements, the whole iteration."""
    position = tl.program_id(0).to(tl.int64)
    sample = tl.load(index_ptr + position) if INDEXED else position
    steps = tl.load(iterations_ptr + sample)
    element = tl.arange(0, BLOCK).to(tl.int64)
    inside = element < dim
    x_stored = tl.load(x_ptr + position * dim + element, mask=inside, other=0.0)
    out_here = out_ptr + position * dim + element
    if tl.load(outcome_ptr + sample) != 0:
        if not IN_PLACE:
            tl.store(out_here, x_stored, mask=inside)
        return
    slot = steps % WINDOW
    f = tl.load(f_ptr + position * dim + element, mask=inside, other=0.0).to(ACCUMULATOR)
    # As in _push: the Gram matrix and the mix belong to the rows as they are stored.
    g_stored = (f - x_stored.to(ACCUMULATOR)).to(G_ptr.dtype.element_ty)
    g = g_stored.to(ACCUMULATOR)
    y = f if UNDAMPED else f - tl.full((), 1.0 - beta, ACCUMULATOR) * g
    y_stored = y.to(Y_ptr.dtype.element_ty)
    first_row = sample * WINDOW
    new_row = (first_row + slot) * stride + element
    held = element < stride
    gain = tl.zeros((), tl.float64)
    if ADAPTIVE:
        gain += _product_with_last(g, weights_ptr + first_row + slot, G_ptr + new_row, element, stride)
    tl.store(G_ptr + new_row, g_stored, mask=held)
    tl.store(Y_ptr + new_row, y_stored, mask=held)
    row = tl.arange(0, ROWS)
    h = tl.where(row == slot, tl.sum(g.to(tl.float64) * g.to(tl.float64), axis=0), tl.zeros((ROWS,), tl.float64))
    f_squared = tl.sum(f.to(tl.float64) * f.to(tl.float64), axis=0)
    # Rows that take no part are masked, not branched around, which would wait for one row after the other.
    for i in tl.static_range(WINDOW):
        end = tl.where((i < steps) & (i != slot), stride, 0)
        other = tl.load(G_ptr + (first_row + i) * stride + element, mask=element < end, other=0.0)
        h += tl.where((row == i) & (row != slot), tl.sum(g.to(tl.float64) * other.to(tl.float64), axis=0), 0.0)
    if ADAPTIVE:
        last = tl.load(weights_ptr + first_row + row, mask=(row < WINDOW) & (row != slot), other=0.0).to(tl.float64)
        gain += tl.sum(tl.where(last != 0.0, last * h, 0.0), axis=0)
    alpha, longer, residual, row_residual, outcome, predicted, relaxation, lowest, stalled, held, solved = weigh(
        h,
        f_squared,
        gain,
        sample,
        steps,
        H_ptr,
        row_residual_ptr,
        carried_ptr,
        beta,
        tol,
        floor,
        ridge,
        patience,
        WINDOW,
        ROWS,
        SCALED,
        ADAPTIVE,
        LARGEST,
        ACCUMULATOR,
    )
    # All warps of this program have read the books before one of them writes.
    tl.debug_barrier()
    keep_books(
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
        WINDOW,
        ROWS,
        ADAPTIVE,
    )
    if outcome != 0:
        if not IN_PLACE:
            tl.store(out_here, x_stored, mask=inside)
        return
    weight = tl.sum(tl.where(row == slot, alpha, 0.0), axis=0)
    # 0 * NaN is NaN: where f is not finite the newest row has no weight.
    mixed = tl.where(weight != 0.0, weight * y_stored.to(ACCUMULATOR), 0.0)
    for i in tl.static_range(WINDOW):
        weight = tl.sum(tl.where((row == i) & (row != slot), alpha, 0.0), axis=0)
        Y_row = Y_ptr + (first_row + i) * stride + element
        y_row = tl.load(Y_row, mask=element < tl.where(weight != 0.0, stride, 0), other=0.0)
        mixed += weight * y_row.to(ACCUMULATOR)
    if ADAPTIVE:
        newest = tl.where(row == slot, alpha, 0.0)
        weight = longer * tl.sum(newest, axis=0)
        mixed += tl.where(weight != 0.0, weight * g, 0.0)
        mixed += _longer_step(alpha - newest, longer, G_ptr, first_row, element, stride, WINDOW, ROWS)
    tl.store(out_here, mixed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _residual_partials(x_ptr, f_ptr, partial_ptr, dim, blocks, ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr):
    """partial: (B, blocks, 2), sums of (f - x)^2 and of f^2 over one block."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    element = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < dim
    x = tl.load(x_ptr + sample * dim + element, mask=inside, other=0.0).to(ACCUMULATOR)
    f = tl.load(f_ptr + sample * dim + element, mask=inside, other=0.0).to(ACCUMULATOR)
    g = (f - x).to(tl.float64)
    f = f.to(tl.float64)
    out = partial_ptr + program.to(tl.int64) * 2
    tl.store(out, tl.sum(g * g, axis=0))
    tl.store(out + 1, tl.sum(f * f, axis=0))


INTERPRETED = isinstance(_push, InterpretedFunction)
"""Whether TRITON_INTERPRET=1 was set when this module was imported."""

_TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


_device_key = functools.cache(device_key)


class TritonBackend:
    """See :class:`deq.kernels.state.Backend`."""

    name: ClassVar[BackendName] = "triton"

    _pushed: Tensor

    def __init__(self, largest_fused: int | None = None, reduce_blocks: int = _REDUCE_BLOCKS) -> None:
        self._largest_fused, self._reduce_blocks = largest_fused, reduce_blocks
        self._partial: Tensor | None = None

    def supports(self, window: int) -> bool:
        return 1 <= window <= MAX_WINDOW

    def step(self, state: WindowState, x: Tensor, fx: Tensor, out: Tensor, index: Tensor | None) -> None:
        batch_size, window, dim = state.G.shape
        lanes, name = warp_size(x.device), _device_key(x.device)
        itemsize = (x.element_size(), state.G.element_size())
        fused = dim <= (
            fused_dim(window, itemsize, state.adaptive) if self._largest_fused is None else self._largest_fused
        )
        if fused:
            block, warps = fused_shape(dim, window, lanes, itemsize=itemsize, device=name, adaptive=state.adaptive)
        else:
            block, blocks, warps = split_shape(
                dim, window, lanes, itemsize=itemsize, device=name, adaptive=state.adaptive
            )
        shared: dict[str, Any] = {
            "WINDOW": window,
            "ACCUMULATOR": _TL_DTYPE[accumulator_dtype(x.dtype)],
            "ADAPTIVE": state.adaptive,
            "INDEXED": index is not None,
            "BLOCK": block,
            "num_warps": warps,
        }
        of_system: dict[str, Any] = {
            "ROWS": triton.next_power_of_2(window),
            "SCALED": state.scaled,
            "IN_PLACE": out.data_ptr() == x.data_ptr(),
            "LARGEST": torch.finfo(state.residual.dtype).max,
        }
        books = (
            *(state.row_residual, state.weights, state.residual, state.outcome, state.iterations),
            *(state.tally, state.carried),
        )
        samples = state.outcome if index is None else index  # a pointer that is not read where there is no index
        undamped = state.beta == 1.0
        nvidia = not INTERPRETED and torch.version.hip is None
        with on_device(x.device):
            if fused:
                _update[(x.shape[0],)](
                    *(x, fx, out, state.G, state.Y, state.H, *books, samples),
                    *(state.beta, state.tol, state.floor, state.ridge, state.patience, dim, state.stride),
                    UNDAMPED=undamped,
                    **of_system,
                    **shared,
                    **(fused_options(warps, itemsize, state.adaptive) if nvidia else {}),
                )
                return
            if self._partial is None:
                self._partial = state.H.new_empty(batch_size, blocks, window + 2)
                self._pushed = torch.empty_like(state.iterations)
            grid = (x.shape[0] * blocks,)
            _push[grid](
                *(x, fx, state.G, state.Y, self._partial, state.outcome, state.iterations, self._pushed),
                *(state.weights, samples),
                *(state.beta, dim, state.stride, blocks),
                UNDAMPED=undamped,
                **shared,
            )
            sums = blocks
            if blocks > self._reduce_blocks:
                _reduce[(x.shape[0],)](
                    *(self._partial, state.outcome, self._pushed, samples, blocks),
                    WINDOW=window,
                    ROWS=of_system["ROWS"],
                    ADAPTIVE=state.adaptive,
                    INDEXED=index is not None,
                    FINISH_BLOCKS=_FINISH_BLOCKS,
                    num_warps=4,
                )
                sums = 1
            _mix[grid](
                *(x, out, state.G, state.Y, state.H, self._partial, *books, self._pushed, samples),
                *(state.beta, state.tol, state.floor, state.ridge, state.patience, dim, state.stride, blocks, sums),
                FINISH_BLOCKS=_FINISH_BLOCKS,
                **of_system,
                **shared,
                **(mix_options(state.adaptive, itemsize) if nvidia else {}),
            )

    def residual_norm(self, x: Tensor, fx: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        batch_size, dim = x.shape
        block, blocks, warps = split_shape(dim, warp_size=warp_size(x.device))
        dtype = accumulator_dtype(x.dtype)
        partial = torch.empty(batch_size, blocks, 2, device=x.device, dtype=torch.float64)
        with on_device(x.device):
            _residual_partials[(batch_size * blocks,)](
                x, fx, partial, dim, blocks, ACCUMULATOR=_TL_DTYPE[dtype], BLOCK=block, num_warps=warps
            )
        g, f = partial.sum(dim=1).sqrt().unbind(dim=1)
        return residual_of_norms(g, f, dtype, floor), g
