"""The hot loops of Anderson acceleration: torch and triton only, no neural networks."""

from .window import AndersonWindow, BackendName, Regularization, residual_norm

__all__ = ["AndersonWindow", "BackendName", "Regularization", "residual_norm"]
