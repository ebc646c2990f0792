"""An adaptive window written down plainly, one sample at a time, in float64: what all backends are held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.naive import anderson_weights
from kernels.state import (
    DROP_FAR,
    DROP_NEAR,
    FAR,
    FIRST_RELAXATION,
    LARGEST_RELAXATION,
    OVER_RELAXATION,
    UNPREDICTED,
)


class AdaptiveReference:
    """One sample. ``step(x, fx)`` takes (d,) tensors and returns the next iterate."""

    def __init__(self, window: int, beta: float = 1.0) -> None:
        self.window, self.beta, self.relaxation = window, beta, FIRST_RELAXATION
        self.rows: list[tuple[int, Tensor, Tensor]] = []
        """(step, g, y), oldest first."""
        self.steps = 0
        self.combined: Tensor | None = None

    def step(self, x: Tensor, fx: Tensor) -> Tensor:
        g = (fx - x).double()
        y = x.double() + self.beta * self.relaxation * g
        kept = [row for row in self.rows if row[0] > self.steps - self.window]
        if self.combined is not None:
            before, now = self.combined.dot(self.combined), g.dot(g)
            if now > UNPREDICTED**2 * before:
                limit = DROP_FAR if math.sqrt(now) > FAR * float(fx.double().norm()) else DROP_NEAR
                kept = [row for row in kept if row[1].norm() <= limit * g.norm()]
            difference = self.combined - g
            best = OVER_RELAXATION * self.relaxation * float(self.combined.dot(difference) / difference.dot(difference))
            if math.isfinite(best):
                self.relaxation = math.sqrt(self.relaxation * min(max(best, 1.0), LARGEST_RELAXATION))
        self.rows = [*kept, (self.steps, g, y)]
        self.steps += 1
        G = torch.stack([row[1] for row in self.rows])
        Y = torch.stack([row[2] for row in self.rows])
        alpha = anderson_weights(G[None])[0]
        self.combined = alpha @ G
        return alpha @ Y
