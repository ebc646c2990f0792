"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deq.kernels import AndersonWindow, BackendName, Regularization
from deq.kernels.window import validate_window

from .solver import Solver


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration with a window of m iterates; see :class:`deq.kernels.AndersonWindow` for the formula.

    Each iteration costs one evaluation of f and one update of 3m + 5 passes over the state, 2m + 4 if not adaptive.

    Args:
        window: m, at least 1 (1 is the damped forward iteration).
        beta: mixing parameter in (0, 1]; 1 mixes the values f_i, smaller values pull towards the iterates x_i.
        tol, atol, max_iter, stop, compact, check_every, patience: see :class:`~deq.solvers.Solver`.
        regularization: ``scaled`` (unaffected by the scale of f) or ``absolute`` (what TorchDEQ and jaxopt do).
        ridge: strength of the regularisation; default 1e-6 for ``scaled``, 1e-4 for ``absolute``.
        adaptive: let each sample lengthen or shorten its steps by what the last one brought, drop rows that were taken
            where the map has another slope, and step forward out of a stall; see :class:`deq.kernels.AndersonWindow`.
            Off, it is the method of the textbooks. Default: on where ``scaled``, off where ``absolute``, which is there
            to compare and cannot adapt.
        history_dtype: ``bfloat16`` keeps the residual rows of a float32 state in half the memory and traffic, see
            :class:`deq.kernels.AndersonWindow`; default: the state's.
        backend: ``auto``, ``triton``, ``native`` or ``torch``.

    Raises:
        ValueError: for an option outside its limits.

    Source: Anderson 1965; Walker & Ni 2011.

    Example:
        >>> import torch
        >>> solution = Anderson(window=3, tol=1e-6).solve(torch.cos, torch.zeros(2, 4))
        >>> solution.z[0, 0], solution.evaluations < 10, solution.converged
        (tensor(0.7391), True, tensor([True, True]))
    """

    window: int = 10
    beta: float = 1.0
    regularization: Regularization = "scaled"
    ridge: float | None = None
    adaptive: bool | None = None
    history_dtype: Literal["bfloat16"] | torch.dtype | None = None
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_window(
            window=self.window,
            beta=self.beta,
            regularization=self.regularization,
            ridge=self.ridge,
            backend=self.backend,
            adaptive=self._adapts,
        )
        if self.history_dtype not in (None, "bfloat16", torch.bfloat16):
            raise ValueError(f"history_dtype must be 'bfloat16' or left out, got {self.history_dtype!r}")

    @property
    def rounding(self) -> float:
        return 0.0 if self.history_dtype is None else torch.finfo(torch.bfloat16).eps

    @property
    def _adapts(self) -> bool:
        return self.regularization == "scaled" if self.adaptive is None else self.adaptive

    def start(self, x: Tensor, *, in_place: bool = False) -> _AndersonIteration:
        # In place anyway: a frozen sample is never touched.
        window = AndersonWindow(
            x.shape[0],
            x.shape[1],
            self.window,
            self.beta,
            device=x.device,
            dtype=x.dtype,
            history_dtype=torch.bfloat16 if self.history_dtype is not None else None,
            backend=self.backend,
            regularization=self.regularization,
            ridge=self.ridge,
            adaptive=self._adapts,
            # Under the mean test every sample goes on lowering the mean until all stop together.
            tol=self.tol if self.stop == "max" else None,
            floor=self.floor,
            patience=self.patience,
        )
        return _AndersonIteration(window, self, x)


class _AndersonIteration:
    """An AndersonWindow that updates the iterate in place, so that frozen samples are never touched."""

    def __init__(self, window: AndersonWindow, solver: Anderson, x: Tensor) -> None:
        self._window, self._solver = window, solver
        self.residual, self.outcome, self.iterations = window.residual, window.outcome, window.iterations
        self.restarts, self.fallbacks = window.restarts, window.fallbacks
        self._spare = torch.empty_like(x) if solver.stop == "mean" else x

    @property
    def stalled(self) -> Tensor:
        """(B,) float64, see :class:`~deq.solvers.iteration.Iteration`."""
        return self._window.stalled

    def step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        if self._solver.stop == "max":
            return self._window.step(x, fx, out=x, index=index)
        # Whether it was the last step is known after it: the batch stays where the mean was met.
        moved = self._window.step(x, fx, out=self._spare[: len(x)], index=index)
        self._solver.stop_at_mean(self.residual, self.outcome)
        stays = (self.outcome if index is None else self.outcome[index]) != 0
        return torch.where(stays[:, None], x, moved, out=x)

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._window.best(x, out=x)

    def reset(self) -> None:
        self._window.reset()
