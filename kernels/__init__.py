"""The hot loops of Anderson acceleration: torch and triton only, no neural networks."""

from .state import BackendName
from .window import AndersonWindow, Regularization, residual_norm

__all__ = ["AndersonWindow", "BackendName", "Regularization", "residual_norm"]
