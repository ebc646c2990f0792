"""Solvers of fixed-point equations z = f(z), one file each, one small interface."""

from deq.kernels import Outcome

from .anderson import Anderson
from .broyden import Broyden
from .forward import Forward
from .solution import Solution
from .solver import Solver

__all__ = ["Anderson", "Broyden", "Forward", "Outcome", "Solution", "Solver"]
