"""The tensors that one window keeps between iterations, and the operations that every backend offers on them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The least dtype in which sums over d are taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches, streams and events belong to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def residual_of_norms(g_norm: Tensor, f_norm: Tensor, dtype: torch.dtype) -> Tensor:
    """``||g|| / ||f||``, (B,) in ``dtype``, from float64 norms: 0 where both are 0, the largest number of ``dtype``
    where only f is (a large residual, and no failure), NaN where either is not finite.
    """
    ratio = g_norm / (f_norm + torch.finfo(torch.float64).tiny)
    finite = torch.isfinite(g_norm) & torch.isfinite(f_norm)
    return torch.where(finite, ratio.clamp(max=torch.finfo(dtype).max), torch.nan).to(dtype)


FIRST_RELAXATION = 1.25
"""Adaptive windows: beta's factor before anything is known."""

OVER_RELAXATION = 1.5
"""Adaptive windows: beta's factor is drawn towards this multiple of the one that would have been best along the last
combined residual, ``r <A - B> / <A - 2 B + C>`` with A = ||g_bar||^2, B = g_bar . g, C = ||g||^2."""

LARGEST_RELAXATION = 2.0
"""Adaptive windows: beta's factor stays between 1 and this."""

FAR, DROP_FAR, DROP_NEAR = 0.1, 2.0, 5.0
"""Adaptive windows: a row leaves for good once its norm is above DROP_FAR times the newest (DROP_NEAR where the
relative residual is at most FAR): the map has another slope where it was taken ..."""

UNPREDICTED = 0.7
"""... but only in a step whose residual is above this times that of the combined rows: where the map is affine and
contracts fast enough, old rows are as good as new ones."""


@dataclass
class WindowState:
    """Ring buffers over the last m iterations of B samples, each of d elements.

    Row i of ``G``, ``Y``, ``H`` and ``row_residual`` belongs to the same iteration. A row takes part in the
    least-squares problem if and only if its ``row_residual`` is finite.
    """

    G: Tensor
    """(B, m, d) residuals g_i = f_i - x_i, in the dtype of the state, or in bfloat16 for a float32 state. Rows of G and
    Y are ``stride`` elements apart."""
    Y: Tensor
    """(B, m, d) mixed rows y_i = x_i + beta g_i, in the dtype of the state."""
    H: Tensor
    """(B, m, m) float64 Gram matrix of G; row and column i hold for filled rows."""
    row_residual: Tensor
    """(B, m) relative residual of each row; inf where the row is empty or not finite."""
    weights: Tensor
    """(B, m) the last alpha, in ring order."""
    residual: Tensor
    """(B,) relative residual of the last x given; frozen samples keep theirs."""
    frozen: Tensor
    """(B,) bool: converged to ``tol``, or given up because f is not finite there."""
    iterations: Tensor
    """(B,) int32: steps that each sample took before it froze, the last one included. The ring of a sample that took
    k steps has rows 0 to min(k, m) - 1 filled, and its next row goes to k mod m."""
    row_beta: Tensor
    """(B, m) the mixing parameter of each row of Y."""
    relaxation: Tensor
    """(B,) float64: what ``beta`` is multiplied by in the next row; 1 unless ``adaptive``."""
    combined: Tensor
    """(B, 2) float64: ||sum_i alpha_i g_i||^2 of the last step, which column k mod 2 holds after k steps (``adaptive``
    alone). Two, so that no program of a launch reads what another one writes."""
    beta: float
    adaptive: bool
    """Drop rows that no longer fit, and let ``relaxation`` follow the gain: see the constants above."""
    tol: float
    """Freeze a sample at residual <= tol; a negative tol never freezes a finite one."""
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

    def residual_norm(self, x: Tensor, fx: Tensor) -> Tensor:
        """Relative residual ||f - x|| / ||f||: (B, d), (B, d) -> (B,) in the accumulator dtype."""

    def supports(self, window: int) -> bool:
        """Whether a window of this many rows can be handled."""
