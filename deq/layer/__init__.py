"""The equilibrium as a layer: DEQ, how gradients pass it, and what keeps its training stable."""

from deq.layer.gradients import Gradient, Implicit, JacobianFree, Phantom, Unrolled
from deq.layer.held import VariationalDropout
from deq.layer.layer import DEQ, Equilibrium
from deq.layer.stability import (
    SpectralRadius,
    StabilityLosses,
    correction_loss,
    jacobian_penalty,
    spectral_radius,
)
from deq.layer.warm_start import WarmStart

__all__ = [
    "DEQ",
    "Equilibrium",
    "Gradient",
    "Implicit",
    "JacobianFree",
    "Phantom",
    "SpectralRadius",
    "StabilityLosses",
    "Unrolled",
    "VariationalDropout",
    "WarmStart",
    "correction_loss",
    "jacobian_penalty",
    "spectral_radius",
]
