"""What a solver is: an iteration, a stopping test, and an honest account of both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Stop = Literal["max", "mean"]
FixedPointMap = Callable[[Tensor], Tensor]
"""f: (B, ...) -> (B, ...), the same shape, dtype and device; samples do not mix."""


@dataclass(frozen=True, repr=False)
class Solution:
    """What a solve found, per sample, and what it cost. All tensors are detached and on the state's device."""

    z: Tensor
    """(B, ...) the iterate of lowest relative residual still in the solver's window."""
    residual: Tensor
    """(B,) relative residual ``||f(z) - z|| / ||f(z)||`` at ``z``; NaN or inf where f was never finite."""
    iterations: Tensor
    """(B,) int32: evaluations of f that each sample took part in before it converged or was given up."""
    evaluations: int
    """Evaluations of f, batch-wide."""
    converged: Tensor
    """(B,) bool: residual <= tol."""
    trace: Tensor | None = None
    """(K, B) residual after each of the K evaluations, with ``solve(..., trace=True)``."""

    def __repr__(self) -> str:
        count, total = int(self.converged.sum()), self.converged.numel()
        return (
            f"Solution({count} of {total} converged, {self.evaluations} evaluations, "
            f"iterations {_spread(self.iterations.float(), '.0f')}, residual {_spread(self.residual, '.1e')}, "
            f"z {tuple(self.z.shape)} {self.z.dtype})"
        )


def _spread(values: Tensor, form: str) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


class Iteration(Protocol):
    """The state of one solve; made anew for each. x and fx are (B, d)."""

    @property
    def residual(self) -> Tensor:
        """(B,) relative residual of the x last given."""

    @property
    def frozen(self) -> Tensor:
        """(B,) bool: samples that are left alone from now on."""

    @property
    def iterations(self) -> Tensor:
        """(B,) int32: steps that each sample took part in."""

    def step(self, x: Tensor, fx: Tensor) -> Tensor:
        """Takes x and f(x) into account; returns the next iterate. May write into x, never into fx."""

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The iterate of lowest residual, and that residual. x: what the last step returned."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Fixed points of z = f(z), all samples of a batch at once.

    The stopping test is on the relative residual ``||f(z) - z|| / ||f(z)||`` of each sample. With ``stop="max"``
    the solve ends when every sample is at ``tol`` or below, and a sample that gets there is frozen: it is not moved
    any more. With ``stop="mean"`` it ends when the batch mean is, and no sample is frozen before. At most
    ``max_iter`` evaluations of f are made.
    """

    tol: float = 1e-3
    max_iter: int = 50
    stop: Stop = "max"

    def __post_init__(self) -> None:
        """Raises ValueError, naming value, limit and fix."""
        if not (self.tol >= 0.0 and math.isfinite(self.tol)):
            raise ValueError(f"tol must be at least 0, got {self.tol} (it is relative: 1e-2 to 1e-6 are usual)")
        if isinstance(self.max_iter, bool) or not isinstance(self.max_iter, int):
            raise ValueError(f"max_iter must be a whole number of evaluations of f, got {self.max_iter!r}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter}")
        if self.stop not in get_args(Stop):
            raise ValueError(f"stop must be one of {get_args(Stop)}, got {self.stop!r}")

    @abstractmethod
    def start(self, x: Tensor) -> Iteration:
        """The state of a solve that begins at x, (B, d) contiguous."""

    @torch.no_grad()
    def solve(self, f: FixedPointMap, z0: Tensor, *, trace: bool = False) -> Solution:
        """Iterates from ``z0`` until the stopping test holds or ``max_iter`` evaluations are made.

        Args:
            f: (B, ...) -> (B, ...), of the same shape, dtype and device. It must not write into its argument.
            z0: (B, ...) floating point, the initial iterate; it is not modified.
            trace: keep the residual of every sample after every evaluation.

        Raises:
            ValueError: if ``z0`` has no elements or is not floating point, or f returns another shape, dtype or
                device, or writes into its argument.
        """
        if z0.ndim < 1 or z0.numel() == 0 or not z0.is_floating_point():
            raise ValueError(
                f"z0 must be (B, ...) floating point with at least one element, got {tuple(z0.shape)} {z0.dtype}"
            )
        x = z0.reshape(z0.shape[0], -1).clone(memory_format=torch.contiguous_format)
        iteration = self.start(x)
        residuals: list[Tensor] = []
        evaluations = 0
        while evaluations < self.max_iter:
            fx = _evaluate(f, x, z0)
            evaluations += 1
            x = iteration.step(x, fx)
            if trace:
                residuals.append(iteration.residual.clone())
            if self._finished(iteration):
                break
        z, residual = iteration.best(x)
        return Solution(
            z=z.view(z0.shape),
            residual=residual,
            iterations=iteration.iterations.clone(),
            evaluations=evaluations,
            converged=residual <= self.tol,
            trace=torch.stack(residuals) if trace else None,
        )

    @property
    def _freeze_tol(self) -> float | None:
        # Under the mean test every sample goes on lowering the mean until all stop together.
        return self.tol if self.stop == "max" else None

    def _finished(self, iteration: Iteration) -> bool:
        done = iteration.frozen.all()
        if self.stop == "mean":
            # Samples whose f is not finite are given up; they do not keep the others from stopping.
            mean = torch.where(iteration.frozen, 0.0, iteration.residual).sum() / (~iteration.frozen).sum()
            done = done | (mean <= self.tol)
        return bool(done)


def _evaluate(f: FixedPointMap, x: Tensor, z0: Tensor) -> Tensor:
    """f at the flat iterate x, flat again and checked."""
    # Inference tensors count no versions; under inference mode a write into the argument goes unnoticed.
    version = None if x.is_inference() else x._version
    fz = f(x.view(z0.shape))
    if not isinstance(fz, Tensor) or fz.shape != z0.shape or fz.dtype != z0.dtype or fz.device != z0.device:
        got = f"{tuple(fz.shape)} {fz.dtype} on {fz.device}" if isinstance(fz, Tensor) else type(fz).__name__
        raise ValueError(
            f"f must return what it is given, {tuple(z0.shape)} {z0.dtype} on {z0.device}, but it returned {got}"
        )
    if version is not None and x._version != version:
        raise ValueError("f wrote into its argument, which is the solver's iterate: let f work on z.clone()")
    return fz.reshape(x.shape)
