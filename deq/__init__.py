"""Deep equilibrium models with Anderson acceleration."""

from deq.layer import DEQ
from deq.warm_start import WarmStart

__all__ = ["DEQ", "WarmStart"]
