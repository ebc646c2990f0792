"""Deep equilibrium models with Anderson acceleration."""

from deq.layer import DEQ

__all__ = ["DEQ"]
