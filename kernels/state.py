"""The tensors that one window keeps between iterations, and the operations that every backend offers on them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The least dtype in which sums over d are taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches, streams and events belong to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


SMALLEST_FLOOR = torch.finfo(torch.float64).tiny
"""What is added to ||f|| in any relative residual, so that 0 / 0 is 0."""


def residual_of_norms(g_norm: Tensor, f_norm: Tensor, dtype: torch.dtype, floor: float = SMALLEST_FLOOR) -> Tensor:
    """``||g|| / (||f|| + floor)``, (B,) in ``dtype``, from float64 norms: 0 where both are 0, the largest number of
    ``dtype`` where only f is (a large residual, and no failure), NaN where either is not finite.
    """
    ratio = g_norm / (f_norm + floor)
    finite = torch.isfinite(g_norm) & torch.isfinite(f_norm)
    return torch.where(finite, ratio.clamp(max=torch.finfo(dtype).max), torch.nan).to(dtype)


class Outcome(IntEnum):
    """How a sample's solve ended; a window tells the first four apart while it runs.

    Example:
        >>> import torch
        >>> from deq.kernels import AndersonWindow, Outcome
        >>> window = AndersonWindow(batch_size=2, dim=1, tol=1e-3)
        >>> _ = window.step(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        >>> [Outcome(code).name for code in window.outcome.tolist()]
        ['CONVERGED', 'MAX_ITER']
    """

    MAX_ITER = 0
    """It would have gone on (in a window: it still moves)."""
    CONVERGED = 1
    """Its relative residual is at most tol."""
    NON_FINITE = 2
    """f was NaN or infinite: twice in a row, or at the first time with nothing to step back to (always so for solvers
    other than Anderson's)."""
    DIVERGED = 3
    """Given up: its relative residual was above :data:`FAR` and did not fall by a twentieth in ``patience`` steps, nor
    was ||f - x|| falling, as it does where the solution is zero: by a twentieth since the oldest row of the window (in
    those steps, for solvers without one)."""
    STAGNATED = 4
    """It would have gone on, but its relative residual had not fallen by a twentieth for 20 steps, and ||f - x|| was
    not falling either."""
    MEAN_MET = 5
    """Its own relative residual is above tol, but the mean of those not given up is not, and that was the test."""


PROGRESS = 0.95
"""A residual below this times the lowest before counts as progress."""

FAR = 0.1
"""Relative residual above which a sample without progress is taken to diverge. Where trained cells stall for long and
then go on, they do it below 0.05."""

PATIENCE = 20
"""Steps without progress after which a sample that is far from a solution is given up."""

# Adaptive windows; what each rule bought is in benchmarks/README.md. With g_bar = sum alpha_i g_i of the last step:

RELAXATION_FAR, RELAXATION_NEAR, NEAR = 1.5, 1.0, 1e-2
"""beta is multiplied by a factor r that is this many times the one that would have been best along the last step,
``r (A - B) / (A - 2 B + C)`` with A = ||g_bar||^2 (and the ridge's part), B = g_bar . g, C = ||g||^2: RELAXATION_NEAR
as the relative residual goes to zero, RELAXATION_FAR from NEAR upwards, with its square root in between. Far from the
solution, where the map bends, longer steps tell more of it."""

SMALLEST_RELAXATION, LARGEST_RELAXATION = 0.7, 2.0
"""Where r is clamped."""

UNPREDICTED = 0.85
"""Rows are only dropped in a step with ||g|| above this times ||g_bar|| ..."""

DROP_FAR, DROP_NEAR = 2.0, 5.0
"""... those whose norm is above DROP_FAR times the newest (DROP_NEAR where the relative residual is at most FAR) ..."""

PROMISE = 0.65
"""... and only if without them ||sum alpha_i g_i|| stays below 1 / PROMISE times what it is with them. A map that bends
between there and here makes their promise worthless; where it is affine, they promise, and keep, much more."""

STALL = 8
"""Steps without progress after which forward steps are taken, until there is progress, or the residual is above BLOW
times the lowest and it is Anderson's turn for as many. A minimum of ||g|| which is no solution holds Anderson's method;
forward iteration drifts past it."""

BLOW = 2.0


def track_progress(residual: Tensor, lowest: Tensor, stalled: Tensor) -> tuple[Tensor, Tensor]:
    """The relative residual that counted as progress last, and the steps since then, after one more: all (n,)."""
    progress = residual < PROGRESS * lowest
    return torch.where(progress, residual, lowest), (stalled + 1).masked_fill_(progress, 0)


class Carried(IntEnum):
    """Columns of what a step hands to the next, :attr:`WindowState.carried`."""

    PREDICTED = 0
    """||sum alpha_i g_i||^2 of the last step, with the ridge's part; infinite before the first."""
    RELAXATION = 1
    """What ``beta`` was multiplied by."""
    LOWEST = 2
    """The relative residual that counted as progress last."""
    STALLED = 3
    """Steps since then."""
    HELD = 4
    """Steps since then, or since forward steps were given up: what :data:`STALL` counts."""


FIRST_CARRIED = (math.inf, 1.0, math.inf, 0.0, 0.0)


@dataclass
class WindowState:
    """Ring buffers over the last m iterations of B samples, each of d elements.

    Row i of ``G``, ``Y``, ``H`` and ``row_residual`` belongs to the same iteration. A row takes part in the
    least-squares problem if and only if its ``row_residual`` is finite and at least 0.
    """

    G: Tensor
    """(B, m, d) residuals g_i = f_i - x_i, in the dtype of the state, or in bfloat16 for a float32 state. Rows of G and
    Y are ``stride`` elements apart."""
    Y: Tensor
    """(B, m, d) mixed rows y_i = x_i + beta g_i, in the dtype of the state."""
    H: Tensor
    """(B, m, m) float64 Gram matrix of G; row and column i hold for filled rows."""
    row_residual: Tensor
    """(B, m) relative residual of each row; inf where the row is empty or not finite, negative where it was dropped."""
    weights: Tensor
    """(B, m) the last alpha, in ring order."""
    residual: Tensor
    """(B,) relative residual of the last x given; frozen samples keep theirs."""
    outcome: Tensor
    """(B,) uint8: an :class:`Outcome`; a sample where it is not 0 is frozen."""
    iterations: Tensor
    """(B,) int32: steps that each sample took before it froze, the last one included. The ring of a sample that took
    k steps has rows 0 to min(k, m) - 1 filled, and its next row goes to k mod m."""
    tally: Tensor
    """(B, 2) int32: how often forward steps began because there was no progress, and steps that fell back to a plain
    damped one because the system could not be solved or f was not finite."""
    carried: Tensor
    """(B, 2, 5) float64: what the last step hands on, see :class:`Carried`, in plane k mod 2 after k steps. Two planes,
    so that no program of a launch reads what another one writes."""
    beta: float
    adaptive: bool
    """Follow the rules above; without them r is 1, and no row is dropped."""
    patience: int
    """Steps without progress after which a sample above FAR is given up; 0 never does."""
    tol: float
    """Freeze a sample at residual <= tol; a negative tol never freezes a finite one."""
    floor: float
    """Added to ||f|| in the relative residual, at least SMALLEST_FLOOR."""
    ridge: float
    scaled: bool
    """Scale H to unit diagonal before the ridge is added (scale-invariant regularisation)."""

    @property
    def window(self) -> int:
        return self.G.shape[1]

    @property
    def stride(self) -> int:
        """Elements from one row of G or Y to the next, at least d."""
        return self.G.stride(1)


BackendName = Literal["auto", "triton", "native", "torch"]


class Backend(Protocol):
    """The three operations behind which all backends stand."""

    name: ClassVar[BackendName]

    def step(self, state: WindowState, x: Tensor, fx: Tensor, out: Tensor, index: Tensor | None) -> None:
        """One Anderson iteration: put (x, fx) into the ring, write the next iterate into ``out``.

        x, fx, out: (n, d) contiguous; ``out`` may be ``x`` or ``fx`` itself. ``index``: (n,) int64, the samples that
        they belong to, each at most once; None for all B in order.
        """

    def residual_norm(self, x: Tensor, fx: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """||f - x|| / (||f|| + floor), (B,) in the accumulator dtype, and ||f - x||, (B,) float64: x, fx (B, d)."""

    def supports(self, window: int) -> bool:
        """Whether a window of this many rows can be handled."""
