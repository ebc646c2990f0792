"""The hot loops of Anderson acceleration: torch and triton only, no neural networks."""

from .state import BackendName, Outcome
from .window import AndersonWindow, Regularization, residual_norm

__all__ = ["AndersonWindow", "BackendName", "Outcome", "Regularization", "residual_norm"]
