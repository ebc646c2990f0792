"""``AndersonWindow``: the one place that knows the ring buffer, the Gram matrix, and where they are kept."""

from __future__ import annotations

import math
import numbers
from dataclasses import fields
from typing import Literal, get_args

import torch
from torch import Tensor

from . import history, native_backend
from .state import (
    FIRST_CARRIED,
    PROGRESS,
    SMALLEST_FLOOR,
    Backend,
    BackendName,
    Carried,
    WindowState,
    accumulator_dtype,
)
from .torch_backend import TorchBackend
from .tracing import refuse_transforms, runs_as_it_is

Regularization = Literal["scaled", "absolute"]

DEFAULT_RIDGE: dict[Regularization, float] = {"scaled": 1e-6, "absolute": 1e-4}
"""``scaled``: ten times the rounding of a float32 Gram matrix of unit diagonal, so that the scaled matrix is
positive definite whatever its rows; any value from 1e-12 to 1e-5 gives the same iteration counts
(docs/design/method.md). ``absolute``: the tutorial's, TorchDEQ's and jaxopt's order of magnitude."""

_GATHER_PARTS = 4
"""Parts of the batch in which the best iterates are gathered: two rows of each at a time."""

_ALIGNMENT = 64
"""Bytes: a cache line, and more than the widest access."""

_ROW_MULTIPLE = 16
"""Elements that the stride of a row is a multiple of: what Triton looks for before it takes 16 bytes at a time."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_whole(value: object) -> bool:
    """Whether this is a whole number, NumPy's included."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether this is a real number, NumPy's included."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def validate_window(
    *, window: int, beta: float, regularization: str, ridge: float | None, backend: str, adaptive: bool
) -> None:
    """Raises ValueError, naming value, limit and fix, for options that no window can have."""
    if not is_whole(window):
        raise ValueError(f"window must be a whole number of iterates, at least 1, got {window!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window} (1 is the damped forward iteration)")
    validate_beta(beta)
    if regularization not in get_args(Regularization):
        raise ValueError(f"regularization must be one of {get_args(Regularization)}, got {regularization!r}")
    if ridge is not None and not (is_real(ridge) and ridge >= 0.0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be finite and at least 0, got {ridge!r} (leave it out for the default)")
    if backend not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {backend!r}")
    if not isinstance(adaptive, bool):
        raise ValueError(f"adaptive must be true or false, got {adaptive!r}")
    if adaptive and regularization != "scaled":
        raise ValueError(
            f"adaptive=True needs regularization='scaled', got {regularization!r}, whose ridge is no small part of "
            "what the rules compare (use adaptive=False)"
        )


def validate_beta(beta: object) -> None:
    """Raises ValueError, naming value, limit and fix."""
    if not (is_real(beta) and 0.0 < beta <= 1.0):  # type: ignore[operator]
        raise ValueError(f"beta must be above 0 and at most 1, got {beta!r} (1 is no damping)")


def validate_patience(patience: object) -> None:
    """Raises ValueError, naming value, limit and fix."""
    if not is_whole(patience) or patience < 0:  # type: ignore[operator]
        raise ValueError(
            f"patience must be a whole number of evaluations, at least 0, got {patience!r} (0 never gives up)"
        )


def select_backend(name: BackendName, device: torch.device, dtype: torch.dtype, window: int = 1) -> Backend:
    """``auto`` is Triton on a CUDA or ROCm device, native code on a CPU that has a compiler, and PyTorch elsewhere.

    Raises ValueError where a backend is asked for by name and cannot run.
    """
    candidates = (name,) if name != "auto" else ("triton" if device.type == "cuda" else "native", "torch")
    for candidate in candidates:
        backend, obstacle = _try_backend(candidate, device, dtype)
        if backend is not None and not backend.supports(window):
            backend, obstacle = None, f"holds no window of {window} in its registers or stack"
        if backend is not None:
            return backend
        if candidate == "native" and name == "auto" and device.type == "cpu":
            native_backend.warn_if_broken(dtype)
    raise ValueError(f"backend={name!r} {obstacle} (use backend='auto')")


def _try_backend(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend | None, str]:
    """The backend, or None and what stands in its way."""
    if name == "torch":
        return TorchBackend(), ""
    if name == "native":
        if device.type != "cpu":
            return None, f"runs on a CPU, got device {str(device)!r}"
        obstacle = native_backend.obstacle(dtype)
        return (None, obstacle) if obstacle else (native_backend.NativeBackend(), "")
    try:
        from . import triton_backend
    except ImportError as error:
        return None, f"needs the package triton, which does not import: {error}"
    if device.type != "cuda" and not triton_backend.INTERPRETED:
        return None, f"runs on a CUDA or ROCm device, got device {str(device)!r}"
    return triton_backend.TritonBackend(), ""


class AndersonWindow:
    """The last m iterates of B fixed-point iterations, and the Anderson step from them.

    With g_i = f_i - x_i and y_i = x_i + beta g_i over the window, one step is ::

        alpha  = argmin || sum_i alpha_i g_i ||^2   subject to   sum_i alpha_i = 1
        x_next = sum_i alpha_i y_i      (adaptive: + beta (r - 1) sum_i alpha_i g_i)

    per sample; samples never mix. Only the newest row of the Gram matrix is computed, in at least float32 (its diagonal
    and all norms in float64), and the m x m system is solved in float64. Same input, same bits.

    Nothing raises inside :meth:`step`: for a sample whose system is singular or overflows, the step is the plain
    damped one, ``y`` of the newest row; where f itself is not finite, it is the plain damped step from the iterate
    before (once; a second time in a row, or with a window of 1, the sample is given up: frozen, its residual NaN or
    inf). No gradient is recorded.

    Args:
        batch_size: B, at least 1.
        dim: d, elements of one sample's state, at least 1.
        window: m, iterates kept, at least 1 (1 is the damped forward iteration).
        beta: mixing parameter in (0, 1].
        device: where the history lives (2 m B d elements); default: PyTorch's default device.
        dtype: of states and history: float64, float32, bfloat16 or float16.
        history_dtype: of the residual rows g_i, which weigh the mixed rows (and, adaptive, lengthen the step):
            ``torch.bfloat16`` for a float32 state moves and stores half of them and costs hardly an iteration,
            but ``residual`` is then that of the rounded row, and what :meth:`best` returns is exact to
            2^-9 of its g. The mixed rows stay in ``dtype``: rounded, they would keep the iterates away from the
            solution. Default: ``dtype``.
        backend: ``auto``, ``triton``, ``native`` or ``torch``.
        regularization: ``scaled`` puts the Gram matrix to unit diagonal before ``ridge`` is added, so that rescaling
            f changes nothing; ``absolute`` adds it as it is (what TorchDEQ and jaxopt do).
        ridge: added to the diagonal; default 1e-6 for ``scaled``, 1e-4 for ``absolute``.
        tol: freeze a sample once its relative residual is at most this; None never does.
        floor: at least 0: relative residuals are ``||f - x|| / (||f|| + floor)``. For solutions that may be zero: with
            ``floor = atol / tol`` a sample is frozen at ``||f - x|| <= tol ||f|| + atol``.
        adaptive: multiply beta, sample by sample, by a factor in [0.7, 2] that follows the gain of the last step; drop
            rows that were taken where the map has another slope; take forward steps where there is no progress
            (docs/design/method.md). 3m + 5 units of traffic instead of 2m + 4. Without effect on a window of 1.
        patience: give a sample up (``outcome``) whose relative residual is above 0.1 and has not fallen by a twentieth
            in so many steps; 0 never does.

    Raises:
        ValueError: for an option outside its limits.

    Source: Anderson 1965; Walker & Ni 2011, *Anderson acceleration for fixed-point iterations*.

    Example:
        >>> import torch
        >>> window = AndersonWindow(batch_size=1, dim=3, window=4, dtype=torch.float64)
        >>> x = torch.zeros(1, 3, dtype=torch.float64)
        >>> slope = torch.tensor([0.9, 0.5, -0.7], dtype=torch.float64)
        >>> for _ in range(6):
        ...     x = window.step(x, slope * x + 1)
        >>> bool((x - 1 / (1 - slope)).abs().max() < 1e-2), window.residual.shape
        (True, torch.Size([1]))
    """

    @runs_as_it_is
    def __init__(
        self,
        batch_size: int,
        dim: int,
        window: int = 5,
        beta: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        history_dtype: torch.dtype | None = None,
        backend: BackendName = "auto",
        regularization: Regularization = "scaled",
        ridge: float | None = None,
        tol: float | None = None,
        floor: float = 0.0,
        adaptive: bool = False,
        patience: int = 0,
    ) -> None:
        validate_window(
            window=window, beta=beta, regularization=regularization, ridge=ridge, backend=backend, adaptive=adaptive
        )
        validate_patience(patience)
        refuse_transforms("an AndersonWindow")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        rows_dtype = dtype if history_dtype is None else history_dtype
        if rows_dtype != dtype and (dtype, rows_dtype) != (torch.float32, torch.bfloat16):
            raise ValueError(
                f"history_dtype must be torch.bfloat16 for a torch.float32 state, or the state's own, got "
                f"{rows_dtype} for a {dtype} state"
            )
        if tol is not None and not tol >= 0.0:
            raise ValueError(f"tol must be at least 0, got {tol} (None never freezes a sample)")
        if not (is_real(floor) and floor >= 0.0 and math.isfinite(floor)):
            raise ValueError(f"floor must be finite and at least 0, got {floor!r} (it is added to ||f||)")
        home = torch.device(device) if device is not None else torch.get_default_device()
        self._backend = select_backend(backend, home, dtype, window)
        accumulator = accumulator_dtype(dtype)

        def full(*shape: int, value: float, dtype: torch.dtype = accumulator) -> Tensor:
            return torch.full(shape, value, device=home, dtype=dtype)

        shape = (batch_size, window, -(-dim // _ROW_MULTIPLE) * _ROW_MULTIPLE)
        bytes_of_Y = math.prod(shape) * dtype.itemsize
        start_of_G = -(-bytes_of_Y // _ALIGNMENT) * _ALIGNMENT
        both = history.allocate(self, start_of_G + math.prod(shape) * rows_dtype.itemsize, home)
        Y, G = both[:bytes_of_Y].view(dtype).view(shape), both[start_of_G:].view(rows_dtype).view(shape)
        Y, G = Y[..., :dim], G[..., :dim]
        self._state = WindowState(
            G=G,
            Y=Y,
            H=full(batch_size, window, window, value=0.0, dtype=torch.float64),
            row_residual=full(batch_size, window, value=math.inf),
            weights=full(batch_size, window, value=0.0),
            residual=full(batch_size, value=math.inf),
            outcome=full(batch_size, value=0, dtype=torch.uint8),
            iterations=full(batch_size, value=0, dtype=torch.int32),
            tally=full(batch_size, 2, value=0, dtype=torch.int32),
            carried=full(batch_size, 2, len(FIRST_CARRIED), value=0.0, dtype=torch.float64),
            beta=float(beta),
            adaptive=adaptive and window > 1,
            patience=patience,
            tol=-1.0 if tol is None else float(tol),
            floor=max(float(floor), SMALLEST_FLOOR),
            ridge=DEFAULT_RIDGE[regularization] if ridge is None else float(ridge),
            scaled=regularization == "scaled",
        )
        self._begin()

    def _begin(self) -> None:
        """What the first step is told."""
        # Filled and not copied, for which the host would wait.
        for column, first in enumerate(FIRST_CARRIED):
            self._state.carried[..., column] = first

    @property
    def residual(self) -> Tensor:
        """(B,) relative residual ``||f - x|| / (||f|| + floor)`` of the x last given; a frozen sample keeps its own."""
        return self._state.residual

    @property
    def weights(self) -> Tensor:
        """(B, m) weights alpha of the last step, in ring order (row i holds its steps i, i + m, ...)."""
        return self._state.weights

    @property
    def outcome(self) -> Tensor:
        """(B,) uint8: 0 for a sample that moves, else the :class:`deq.kernels.Outcome` for which it is frozen."""
        return self._state.outcome

    @property
    def frozen(self) -> Tensor:
        """(B,) bool, new each time: samples that :meth:`step` leaves alone from now on."""
        return self._state.outcome != 0

    @property
    def stalled(self) -> Tensor:
        """(B,) float64: steps since the relative residual last fell by a twentieth; 0 where ||f - x|| is falling."""
        state = self._state
        steps = state.iterations.long()
        samples = torch.arange(len(steps), device=steps.device)
        newest, oldest = (steps - 1) % state.window, torch.where(steps < state.window, 0, steps % state.window)
        sizes = torch.diagonal(state.H, dim1=1, dim2=2)
        size = sizes[samples, newest]
        # Since the oldest row, and not by chance: no row between is smaller.
        filled = torch.arange(state.window, device=steps.device) < steps[:, None]
        shrinks = (size < PROGRESS**2 * sizes[samples, oldest]) & ((size[:, None] <= sizes) | ~filled).all(dim=1)
        return torch.where(shrinks, 0.0, state.carried[samples, steps % 2, Carried.STALLED])

    @property
    def restarts(self) -> Tensor:
        """(B,) int32: how often an adaptive window lost all rows but the newest, since there was no progress."""
        return self._state.tally[:, 0]

    @property
    def fallbacks(self) -> Tensor:
        """(B,) int32: plain damped steps, taken since the system could not be solved or f was not finite."""
        return self._state.tally[:, 1]

    @property
    def iterations(self) -> Tensor:
        """(B,) int32: steps each sample took part in."""
        return self._state.iterations

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets all iterates, in place: every sample starts anew with an empty window."""
        state = self._state
        for tensor, value in (
            (state.H, 0.0),
            (state.row_residual, math.inf),
            (state.weights, 0.0),
            (state.residual, math.inf),
            (state.outcome, 0),
            (state.iterations, 0),
            (state.tally, 0),
        ):
            tensor.fill_(value)
        self._begin()

    @runs_as_it_is
    @torch.no_grad()
    def step(self, x: Tensor, fx: Tensor, *, out: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Takes x and f(x), both (B, d); returns the next iterate, (B, d).

        With ``index``, (n,) int64, only these samples take the step (each at most once; on a GPU the
        values are not checked), and x, fx and the result are
        (n, d): what became of the others stays in the window.

        The result is written to ``out`` if given: a contiguous (B, d) tensor, which may be ``x`` or ``fx`` itself
        (whoever keeps that tensor sees it change, autograd says so). For frozen samples, and for one that freezes in
        this very step, it is x.

        Raises:
            ValueError: if a shape, dtype or device is not the window's.
            NotImplementedError: inside a ``torch.func`` transform, and for dual numbers.
        """
        refuse_transforms("a step of an AndersonWindow", x, fx)
        state = self._state
        batch_size, _, dim = state.G.shape
        if index is not None:
            if index.ndim != 1 or index.dtype != torch.int64 or index.device != state.G.device or len(index) == 0:
                raise ValueError(
                    f"index must be (n,) int64 on {state.G.device} with n at least 1, "
                    f"got {tuple(index.shape)} {index.dtype} on {index.device}"
                )
            if index.device.type == "cpu" and not (index.min() >= 0 and index.max() < batch_size):
                raise ValueError(
                    f"index must name samples 0 to {batch_size - 1}, got {int(index.min())} to {int(index.max())}"
                )
            index, batch_size = index.contiguous(), len(index)
        for name, tensor in (("x", x), ("fx", fx), ("out", out)):
            if tensor is None:
                continue
            if tensor.shape != (batch_size, dim) or tensor.dtype != state.Y.dtype:
                raise ValueError(
                    f"{name} must be ({batch_size}, {dim}) {state.Y.dtype} like this window, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
            if tensor.device != state.G.device:
                raise ValueError(f"{name} is on {tensor.device}, this window is on {state.G.device}")
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        elif not out.is_contiguous() or out.is_neg():
            what = "a lazily negated view" if out.is_neg() else f"strides {out.stride()}"
            raise ValueError(f"out must be contiguous, got {what} (give a tensor of its own)")
        for name, tensor in (("x", x), ("fx", fx)):
            if tensor.data_ptr() != out.data_ptr() and torch._C._overlaps(tensor, out):
                raise ValueError(f"out overlaps {name} in part: give {name} itself or a tensor of its own")
        self._backend.step(state, _as_stored(x), _as_stored(fx), out, index)
        if not out.is_inference():
            # Kernels write past autograd's eyes: what it saved of ``out`` before must not pass for up to date.
            torch.autograd.graph.increment_version(out)
        return out

    def __copy__(self) -> AndersonWindow:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, object]) -> AndersonWindow:
        """A window of its own history, in the same state as this one."""
        state = self._state
        batch_size, window, dim = state.G.shape
        twin = AndersonWindow(
            *(batch_size, dim, window, state.beta),
            device=state.Y.device,
            dtype=state.Y.dtype,
            history_dtype=state.G.dtype,
            backend=self._backend.name,
            regularization="scaled" if state.scaled else "absolute",
            ridge=state.ridge,
            tol=None if state.tol < 0 else state.tol,
            floor=state.floor,
            adaptive=state.adaptive,
            patience=state.patience,
        )
        with torch.no_grad():
            for field in fields(state):
                tensor = getattr(state, field.name)
                if isinstance(tensor, Tensor):
                    getattr(twin._state, field.name).copy_(tensor)
            for rows in (twin._state.G, twin._state.Y):
                # The kernels read the padding of a row along with it.
                rows.as_strided((batch_size, window, state.stride), rows.stride())[..., dim:].zero_()
        memo[id(self)] = twin
        return twin

    @torch.no_grad()
    def best(self, x: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The iterate of lowest residual still in the window, and that residual: (B, d), (B,).

        Converged samples keep their row of ``x``, and so do those of which no row is finite. No iterate is stored for
        this: x_i = y_i - beta g_i, exact up to the rounding of one subtraction in the state's dtype, and of g_i with
        a ``history_dtype``. The result is written to ``out`` if given, which may be ``x`` itself.
        """
        state = self._state
        lowest, index = state.row_residual.abs().min(dim=1)
        samples = torch.arange(index.shape[0], device=index.device)
        keep = (state.residual <= state.tol) | torch.isinf(lowest)
        if out is None:
            out = torch.empty_like(x)
        # Some samples at a time: what is gathered on the way stays small beside the state.
        size = -(-len(index) // _GATHER_PARTS)
        for begin in range(0, len(index), size):
            part = slice(begin, begin + size)
            rows = samples[part], index[part]
            z = state.Y[rows].sub_(state.G[rows], alpha=state.beta)
            torch.where(keep[part, None], x[part], z, out=out[part])
        return out, torch.where(keep, state.residual, lowest)


def _as_stored(tensor: Tensor) -> Tensor:
    """Contiguous, and with the sign that its memory holds: the imaginary part of a conjugate is negated lazily."""
    return tensor.contiguous().resolve_neg()


def residual_norm(x: Tensor, fx: Tensor, *, floor: float = 0.0, backend: BackendName = "auto") -> Tensor:
    """Relative residual ``||f - x|| / (||f|| + floor)`` of each sample: (B, d), (B, d) -> (B,).

    Sums are taken in float64; the result is float32 (float64 for float64 input), 0 where f = x = 0.

    Raises:
        ValueError: if the shapes are not both (B, d), or dtypes differ.

    Example:
        >>> import torch
        >>> residual_norm(torch.tensor([[0.0, 4.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([0.6000])
    """
    return residual_and_size(x, fx, floor, backend)[0]


def residual_and_size(x: Tensor, fx: Tensor, floor: float, backend: BackendName = "auto") -> tuple[Tensor, Tensor]:
    """:func:`residual_norm`, (B,), and ``||f - x||``, (B,) float64."""
    if x.ndim != 2 or x.shape != fx.shape or x.dtype != fx.dtype:
        raise ValueError(
            f"x and fx must be (B, d) of one dtype, got {tuple(x.shape)} {x.dtype} and {tuple(fx.shape)} {fx.dtype}"
        )
    chosen = select_backend(backend, x.device, x.dtype)
    return chosen.residual_norm(_as_stored(x), _as_stored(fx), max(floor, SMALLEST_FLOOR))
