"""An adaptive window written down plainly, one sample at a time, in float64: what all backends are held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deq.kernels.state import (
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
)

Row = tuple[int, Tensor, Tensor]
"""(step, g, y)"""


def smallest(rows: list[Row], ridge: float = 1e-6) -> tuple[Tensor, float]:
    """The weights of the rows, and the minimum with the ridge's part, alpha^T (H + ridge diag(H)) alpha."""
    G = torch.stack([row[1] for row in rows])
    H = G @ G.T
    S = H.diagonal().rsqrt()
    w = S * torch.linalg.solve(S[:, None] * H * S + ridge * torch.eye(len(rows), dtype=H.dtype), S)
    return w / w.sum(), float(1 / w.sum())


class AdaptiveReference:
    """One sample. ``step(x, fx)`` takes (d,) tensors and returns the next iterate."""

    def __init__(self, window: int, beta: float = 1.0) -> None:
        self.window, self.beta, self.relaxation = window, beta, 1.0
        self.rows: list[Row] = []
        """Oldest first."""
        self.steps = self.stalled = self.held = self.restarts = self.drops = 0
        self.lowest = self.predicted = math.inf
        self.combined: Tensor | None = None

    def step(self, x: Tensor, fx: Tensor) -> Tensor:
        x, fx = x.double(), fx.double()
        g = fx - x
        newest = (self.steps, g, x + self.beta * g)
        rows = [*(row for row in self.rows if row[0] > self.steps - self.window), newest]
        self.steps += 1
        if self.window == 1:
            return newest[2]
        residual = float(g.norm() / fx.norm())

        self.stalled = 0 if residual < PROGRESS * self.lowest else self.stalled + 1
        if self.stalled == 0:
            self.lowest = residual
        self.held = min(self.held + 1, self.stalled)
        if self.held >= STALL and residual > BLOW * self.lowest:
            self.held = 0
        if self.held >= STALL:
            rows = [newest]
        self.restarts += self.held == STALL

        if self.combined is not None:
            C, B = float(g.dot(g)), float(self.combined.dot(g))
            A = self.predicted
            factor = RELAXATION_NEAR + (RELAXATION_FAR - RELAXATION_NEAR) * math.sqrt(min(residual / NEAR, 1.0))
            best = factor * self.relaxation * (A - B) / (A - 2 * B + C)
            self.relaxation = min(max(best, SMALLEST_RELAXATION), LARGEST_RELAXATION)

        alpha, least = smallest(rows)
        limit = DROP_FAR if residual > FAR else DROP_NEAR
        near = [row for row in rows if row is newest or row[1].norm() <= limit * g.norm()]
        if len(near) < len(rows) and float(g.dot(g)) > UNPREDICTED**2 * self.predicted:
            fewer, least_of_fewer = smallest(near)
            if least > PROMISE**2 * least_of_fewer:
                rows, alpha, least = near, fewer, least_of_fewer
                self.drops += 1
        self.rows, self.predicted = rows, least
        self.combined = alpha @ torch.stack([row[1] for row in rows])
        mixed: Tensor = alpha @ torch.stack([row[2] for row in rows])
        return mixed + self.beta * (self.relaxation - 1.0) * self.combined
