"""Gradients through a fixed point z* = f(z*): what ``backward`` does at the output of a DEQ layer.

Both are attached to one evaluation of f at z*, the only one that autograd records. Its output f(z*) is not what the
layer returns: the layer returns z* itself, so that training and inference see the same numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deq.solvers.base import FixedPointMap, Restrict, Solution, Solver
from kernels.state import accumulator_dtype

Record = Callable[[Solution], None]
SolveAdjoint = Callable[[Solver, Tensor, Tensor], Solution]
"""(solver, z, b), z and b (B, ...) -> the solution of u = J^T u + b with J = df/dz at z, from u = b."""


class Gradient(ABC):
    """How the gradient with respect to z* reaches the parameters and the input of f."""

    @abstractmethod
    def attach(
        self,
        f: FixedPointMap,
        z_star: Tensor,
        solver: Solver,
        record: Record,
        restrict: Restrict | None = None,
        solve_adjoint: SolveAdjoint | None = None,
    ) -> Tensor:
        """Returns z*, (B, ...), with a gradient.

        Args:
            f: the map, differentiable in whatever it closes over.
            restrict: f for some samples alone, for solvers that compact; what it closes over is detached.
            z_star: (B, ...) the fixed point, detached.
            solver: the layer's own solver, for gradients that need one and were given none.
            solve_adjoint: the backward solve as recorded graphs; None: products with the recorded evaluation of f.
            record: called with the account of the backward solve, if there is one, during ``backward``.
        """


@dataclass(frozen=True)
class Implicit(Gradient):
    """The implicit function theorem: with J = df/dz at z*, the adjoint u solves ``u = J^T u + dL/dz*``.

    That is a fixed point too, solved by any solver with its own tolerance and cap. Cost: one recorded evaluation of
    f, then one vector-Jacobian product an iteration; memory does not depend on the number of iterations. Each
    sample's right side is scaled by a power of two to norm about 1 for the solve, which the linear equation does not
    notice and which keeps gradients of any magnitude clear of underflow.

    Args:
        solver: of the adjoint equation; default: the layer's own.

    Source: Bai, Kolter & Koltun 2019, theorem 1.

    Example:
        >>> from deq.solvers import Anderson
        >>> Implicit(solver=Anderson(window=5, tol=1e-2, max_iter=30)).solver.tol
        0.01
    """

    solver: Solver | None = None

    def attach(
        self,
        f: FixedPointMap,
        z_star: Tensor,
        solver: Solver,
        record: Record,
        restrict: Restrict | None = None,
        solve_adjoint: SolveAdjoint | None = None,
    ) -> Tensor:
        z = z_star.detach().requires_grad_()
        with torch.enable_grad():
            f_star = f(z)
        result: Tensor = _Adjoint.apply(f_star, z, z_star, self.solver or solver, record, restrict, solve_adjoint)
        return result


@dataclass(frozen=True)
class JacobianFree(Gradient):
    """The gradient through one application of f at z*, as if J were 0: u = dL/dz*. No backward solve.

    Source: Fung et al. 2021, *JFB: Jacobian-free backpropagation for implicit networks*.

    Example:
        >>> JacobianFree()
        JacobianFree()
    """

    def attach(
        self,
        f: FixedPointMap,
        z_star: Tensor,
        solver: Solver,
        record: Record,
        restrict: Restrict | None = None,
        solve_adjoint: SolveAdjoint | None = None,
    ) -> Tensor:
        with torch.enable_grad():
            f_star = f(z_star.detach())
        result: Tensor = _PassThrough.apply(f_star, z_star)
        return result


class _PassThrough(torch.autograd.Function):
    """The value of z*, the gradient of f(z*)."""

    @staticmethod
    def forward(ctx: Any, f_star: Tensor, z_star: Tensor) -> Tensor:
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        _refuse_second_derivatives()
        return grads[0], None


class _Adjoint(torch.autograd.Function):
    """The value of z*; on the way back, solves for u and hands it to f(z*)."""

    @staticmethod
    def forward(
        ctx: Any,
        f_star: Tensor,
        z: Tensor,
        z_star: Tensor,
        solver: Solver,
        record: Record,
        restrict: Restrict | None,
        solve_adjoint: SolveAdjoint | None,
    ) -> Tensor:
        ctx.save_for_backward(f_star, z)
        ctx.solver, ctx.record, ctx.restrict, ctx.solve_adjoint = solver, record, restrict, solve_adjoint
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        _refuse_second_derivatives()
        f_star, z = ctx.saved_tensors
        scale = _power_of_two_norm(grads[0])
        right_side = grads[0] / scale

        recorded_again = 0

        def restrict(index: Tensor) -> FixedPointMap:
            # The products of some samples alone need an evaluation recorded for these alone.
            nonlocal recorded_again
            z_part = z.detach()[index].requires_grad_()
            with torch.enable_grad():
                f_part = ctx.restrict(index)(z_part)
            recorded_again += len(index)
            return _adjoint_map(f_part, z_part, right_side[index])

        if ctx.solve_adjoint is not None:
            solution = ctx.solve_adjoint(ctx.solver, z, right_side)
        else:
            solution = ctx.solver.solve(
                _adjoint_map(f_star, z, right_side), right_side, restrict=restrict if ctx.restrict is not None else None
            )
        u = solution.z * scale
        ctx.record(replace(solution, z=u, sample_evaluations=solution.sample_evaluations + recorded_again))
        return u, None, None, None, None, None, None


def _refuse_second_derivatives() -> None:
    # Autograd's own once_differentiable says nothing where the incoming gradient is a constant: a silent wrong answer.
    if torch.is_grad_enabled():
        raise RuntimeError("a DEQ layer has no second derivatives: leave out create_graph=True")


def _adjoint_map(f_star: Tensor, z: Tensor, right_side: Tensor) -> FixedPointMap:
    """u -> J^T u + right side, with J = df/dz where f_star = f(z) was recorded."""

    def adjoint_map(u: Tensor) -> Tensor:
        # Only z is asked for, so that no weight gradient is computed here. A cell that does not use z has J = 0.
        product: Tensor
        (product,) = torch.autograd.grad(f_star, z, u, retain_graph=True, materialize_grads=True)
        return product + right_side

    return adjoint_map


def _power_of_two_norm(v: Tensor) -> Tensor:
    """The power of two next above each sample's norm, as far as its dtype has it, (B, 1, ...): dividing is exact.

    1 for a zero sample.
    """
    largest = v.flatten(1).abs().amax(dim=1).to(accumulator_dtype(v.dtype))
    # The largest element first: the squares of small gradients would underflow.
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    norm = torch.linalg.vector_norm(v.flatten(1) / unit[:, None], dim=1, dtype=unit.dtype)
    limits = torch.finfo(v.dtype)
    lowest, highest = math.ceil(math.log2(limits.tiny)), math.floor(math.log2(limits.max) - 1e-3)
    exponent = (exponent + torch.frexp(norm).exponent).clamp(lowest, highest)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return scale.to(v.dtype).view(-1, *(1,) * (v.ndim - 1))
