"""Solvers of fixed-point equations z = f(z), one file each, one small interface."""

from deq.kernels import Outcome

from .anderson import Anderson
from .base import Solution, Solver
from .broyden import Broyden
from .forward import Forward

__all__ = ["Anderson", "Broyden", "Forward", "Outcome", "Solution", "Solver"]
