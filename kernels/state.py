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
    beta: float
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
