"""Deep equilibrium models with Anderson acceleration."""

from deq.layer import DEQ, Equilibrium
from deq.warm_start import WarmStart

__all__ = ["DEQ", "Equilibrium", "WarmStart"]
