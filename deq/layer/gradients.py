"""Gradients through a fixed point z* = f(z*): what ``backward`` does at the output of a DEQ layer.

All are attached to evaluations of f at z* or from z* on, the only ones that autograd records. Their outputs are not
what the layer returns: whatever the gradient, it returns z* itself, so that training and inference see the same
numbers and ``last_solution`` is the account of what was returned. f(z*) and what a few more steps give differ from z*
by no more than the solve was asked for.

=====================  ======================  ==================================  =============================
gradient               evaluations recorded    more work in ``backward``           memory, activations of f
=====================  ======================  ==================================  =============================
``Implicit``           1                       a solve: one product J^T u an       1, and the solver's history
                                               evaluation
``JacobianFree``       1                       none                                1
``Phantom(k, damping)``  k                     k - 1 products                      k
``Unrolled(k)``        k                       k - 1 products                      k
=====================  ======================  ==================================  =============================
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deq.kernels.tracing import refuse_batched_gradients
from deq.solvers import Solution, Solver
from deq.solvers.map import FixedPointMap, Restrict
from deq.solvers.scaling import power_of_two_of_batch

__all__ = ["Backward", "Gradient", "Implicit", "JacobianFree", "Phantom", "Unrolled", "Unrolling"]

Record = Callable[[Solution], None]
Held = Callable[[], contextlib.AbstractContextManager[object]]
SolveAdjoint = Callable[[Solver, Tensor, Tensor], Solution]
"""(solver, z, b), z and b (B, ...) -> the solution of u = J^T u + b with J = df/dz at z, from u = b."""


@dataclass(frozen=True)
class Backward:
    """What a layer gives its gradient for a backward solve.

    Example:
        >>> import torch
        >>> from deq.solvers import Anderson
        >>> accounts = []
        >>> backward = Backward(Anderson(tol=1e-5), record=accounts.append)
        >>> x, z_star = torch.ones(2, 3, requires_grad=True), torch.full((2, 3), 2.0)
        >>> Implicit().attach(lambda z: 0.5 * z + x, z_star, backward).sum().backward()
        >>> x.grad.allclose(torch.tensor(2.0)), accounts[0].converged  # 1 / (1 - 0.5)
        (True, tensor([True, True]))
    """

    solver: Solver
    """The layer's own, for gradients that need one and were given none."""
    record: Record
    """Called with the account of the backward solve, if there is one, during ``backward``."""
    restrict: Restrict | None = None
    """f for some samples alone, for solvers that compact; what it closes over is detached."""
    solve_adjoint: SolveAdjoint | None = None
    """The backward solve as recorded graphs; None: products with the recorded evaluation of f."""
    held: Held = contextlib.nullcontext
    """The context of an evaluation of f, in which a product may have to do it again (a checkpoint in the cell)."""


class Gradient(ABC):
    """How the gradient with respect to z* reaches the parameters and the input of f; the interface of all.

    Example:
        >>> import torch
        >>> from deq import DEQ
        >>> class Detached(Gradient):
        ...     def attach(self, f, z_star, backward):
        ...         return z_star
        >>> DEQ(lambda z, x: 0.5 * z + x, gradient=Detached())(torch.ones(1, 1, requires_grad=True)).requires_grad
        False
    """

    @abstractmethod
    def attach(self, f: FixedPointMap, z_star: Tensor, backward: Backward) -> Tensor:
        """Returns z*, (B, ...), with a gradient.

        Args:
            f: the map, differentiable in whatever it closes over.
            z_star: (B, ...) the fixed point, detached.
            backward: what a backward solve needs.
        """


@dataclass(frozen=True)
class Implicit(Gradient):
    """The implicit function theorem: with J = df/dz at z*, the adjoint u solves ``u = J^T u + dL/dz*``.

    That is a fixed point too, solved by any solver with its own tolerance and cap. Cost: one recorded evaluation of
    f, then one vector-Jacobian product an iteration; memory does not depend on the number of iterations. The right
    side is scaled by a power of two for the solve, one for the whole batch, which the linear equation does not notice
    and which keeps gradients of any magnitude clear of underflow.

    Args:
        solver: of the adjoint equation; default: the layer's own. Its ``atol`` is not used, having no unit there.

    Source: Bai, Kolter & Koltun 2019, theorem 1.

    Example:
        >>> from deq.solvers import Anderson
        >>> Implicit(solver=Anderson(window=5, tol=1e-2, max_iter=30)).solver.tol
        0.01
    """

    solver: Solver | None = None

    def attach(self, f: FixedPointMap, z_star: Tensor, backward: Backward) -> Tensor:
        with torch.enable_grad():
            z = _Source.apply(z_star.detach().requires_grad_())
        f_star = recorded(f, z)
        if not _depends_on_more_than_z(f_star):
            return z_star.clone()
        solver = self.solver or backward.solver
        solver = replace(solver, atol=0.0) if solver.atol else solver
        result: Tensor = _Adjoint.apply(f_star, z, z_star, solver, backward)
        return result


class Unrolling(Gradient):
    """A gradient through a few recorded steps from z* on, without a backward solve.

    Example:
        >>> import torch
        >>> from deq import DEQ
        >>> class Twice(Unrolling):
        ...     def unroll(self, f, z):
        ...         return f(f(z))
        >>> x = torch.ones(1, 1, requires_grad=True)
        >>> DEQ(lambda z, x: 0.5 * z + x, gradient=Twice())(x).backward()
        >>> x.grad  # 1 + 0.5
        tensor([[1.5000]])
    """

    @abstractmethod
    def unroll(self, f: FixedPointMap, z: Tensor) -> Tensor:
        """What the steps from z, (B, ...) and detached, lead to; recorded where autograd is on."""

    def attach(self, f: FixedPointMap, z_star: Tensor, backward: Backward) -> Tensor:
        with torch.enable_grad():
            unrolled = self.unroll(f, z_star.detach())
        result: Tensor = _PassThrough.apply(unrolled, z_star)
        return result


@dataclass(frozen=True)
class JacobianFree(Unrolling):
    """The gradient through one application of f at z*, as if J were 0: u = dL/dz*. No backward solve.

    Cost: one recorded evaluation of f and its activations.

    Source: Fung et al. 2021, *JFB: Jacobian-free backpropagation for implicit networks*.

    Example:
        >>> JacobianFree()
        JacobianFree()
    """

    def unroll(self, f: FixedPointMap, z: Tensor) -> Tensor:
        return f(z)


@dataclass(frozen=True)
class Phantom(Unrolling):
    """The gradient through ``steps`` damped steps ``z <- (1 - damping) z + damping f(z)`` from z*, z* held constant.

    That is the adjoint's Neumann series cut after ``steps`` terms: with A = (1 - damping) I + damping J,
    ``u = damping (I + A^T + ... + (A^T)^(steps - 1)) dL/dz*``, which tends to the implicit gradient where the damped
    iteration contracts. More steps come closer; damping below 1 keeps the series from growing where J has
    eigenvalues near -1 or beyond, and shortens the gradient. ``layer(x)`` is z* nevertheless, not the iterate after
    the steps (which TorchDEQ returns): it is as close to the fixed point as the solve was asked to come.

    Cost: ``steps`` recorded evaluations of f and the activations of all of them; no backward solve, so that
    ``last_adjoint`` stays None.

    Args:
        steps: at least 1; 1 is ``JacobianFree`` times ``damping``.
        damping: in (0, 1]; 1 is ``Unrolled(steps)``.

    Raises:
        ValueError: for an option outside its limits.

    Source: Geng et al. 2021, *On training implicit models*.

    Example:
        >>> import torch
        >>> from deq import DEQ
        >>> from deq.solvers import Anderson
        >>> x = torch.tensor([[1.0]], requires_grad=True)
        >>> DEQ(lambda z, x: 0.5 * z + x, Anderson(tol=1e-6), Phantom(steps=2, damping=0.5))(x).backward()
        >>> x.grad  # 0.5 (1 + 0.75); the implicit gradient is 1 / (1 - 0.5) = 2
        tensor([[0.8750]])
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        _validate_steps(self.steps)
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {self.damping!r} (1 takes the plain steps)")

    def unroll(self, f: FixedPointMap, z: Tensor) -> Tensor:
        for _ in range(self.steps):
            z = torch.lerp(z, f(z), self.damping) if self.damping < 1 else f(z)
        return z


@dataclass(frozen=True)
class Unrolled(Unrolling):
    """The gradient through ``steps`` plain evaluations ``z <- f(z)`` from z*, z* held constant.

    Not through the solve: its iterations are never recorded, z0 gets no gradient, and how z* was found does not matter.
    It is backpropagation through the end of a forward iteration that has converged, cut after ``steps``:
    ``u = (I + J^T + ... + (J^T)^(steps - 1)) dL/dz*``, the same as ``Phantom(steps, damping=1)``. It tends to the
    implicit gradient where f contracts. ``layer(x)`` is z*, not the iterate after the steps.

    Cost: ``steps`` recorded evaluations of f and the activations of all of them; no backward solve.

    Args:
        steps: at least 1; 1 is ``JacobianFree``.

    Raises:
        ValueError: for an option outside its limits.

    Source: Werbos 1990, *Backpropagation through time: what it does and how to do it* (truncated).

    Example:
        >>> import torch
        >>> from deq import DEQ
        >>> from deq.solvers import Anderson
        >>> x = torch.tensor([[1.0]], requires_grad=True)
        >>> DEQ(lambda z, x: 0.5 * z + x, Anderson(tol=1e-6), Unrolled(steps=3))(x).backward()
        >>> x.grad  # 1 + 0.5 + 0.25
        tensor([[1.7500]])
    """

    steps: int = 5

    def __post_init__(self) -> None:
        _validate_steps(self.steps)

    def unroll(self, f: FixedPointMap, z: Tensor) -> Tensor:
        return Phantom(self.steps, damping=1.0).unroll(f, z)


def _validate_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of evaluations of f, at least 1, got {steps!r}")


class _PassThrough(torch.autograd.Function):
    """The value of z*, the gradient of what the recorded steps lead to."""

    @staticmethod
    def forward(ctx: Any, unrolled: Tensor, z_star: Tensor) -> Tensor:
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        _refuse_second_derivatives()
        return grads[0], None


class _Source(torch.autograd.Function):
    """z* as the adjoint asks for its gradient. What ``backward`` itself brings here ends here: as a leaf, z* would
    gather a gradient of its own size that nobody reads.
    """

    @staticmethod
    def forward(ctx: Any, z_star: Tensor) -> Tensor:
        return z_star.view_as(z_star)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def _nodes(value: Tensor) -> Iterator[Any]:
    """The nodes of the graph that recorded ``value``, each once, as far as z*."""
    nodes: list[Any] = [value.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or node.name() == f"{_Source.__name__}Backward":
            continue
        seen.add(node)
        yield node
        nodes.extend(parent for parent, _ in node.next_functions)


def _depends_on_more_than_z(f_star: Tensor) -> bool:
    """Whether a parameter or an input of f is there to have a gradient.

    Ends at the first that is found: few nodes of f are looked at, as a weight comes after the state in most of them.
    """
    if f_star.grad_fn is None:
        return f_star.requires_grad
    # A checkpoint of the reentrant kind hides what is inside from the graph. If it is asked for J^T u, it says so.
    return any(not node.next_functions or node.name() == "CheckpointFunctionBackward" for node in _nodes(f_star))


def recorded(f: FixedPointMap, z: Tensor) -> Tensor:
    """f(z), recorded so that many products can be taken with it.

    Raises:
        RuntimeError: if f is compiled, and a product changes what the next one reads.
    """
    with torch.enable_grad(), _repeatable_backward():
        f_z = f(z)
    if _anything_is_compiled():
        _refuse_products_that_change(f_z, z)
    return f_z


_repeatable: weakref.WeakSet[type] = weakref.WeakSet()
"""Kinds of nodes, one a compiled graph, whose products were seen to stay as they are."""


def _refuse_products_that_change(f_z: Tensor, z: Tensor) -> None:
    """Takes a product twice with what is compiled and was not looked at yet: PyTorch 2.14 writes over what it has
    recorded where it compiles a cell once more because z came with other strides.
    """
    if f_z.grad_fn is None or (z.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    new = {type(node) for node in _nodes(f_z) if node.name() == "CompiledFunctionBackward"} - {*_repeatable}
    if not new:
        return
    product = adjoint_map(f_z, z, torch.zeros_like(f_z))
    u = torch.arange(f_z.numel(), device=f_z.device, dtype=torch.float64).cos().to(f_z.dtype).view_as(f_z)
    first, second = product(u), product(u)
    size = first.norm()
    if not size.isfinite() or size == 0:  # says nothing: weights of zero, or a step that is lost; look the next time
        return
    if not (second - first).norm() <= torch.finfo(f_z.dtype).eps ** 0.5 * size:
        raise RuntimeError(
            "the compiled cell gives another product J^T u when it is asked for the same one again, so that gradients "
            "would be wrong: compile it with dynamic=False, or call torch.compiler.reset() and give it z of one layout"
        )
    _repeatable.update(new)


def _anything_is_compiled() -> bool:
    """Whether anything was, in this process."""
    return "torch._functorch.config" in sys.modules


def _repeatable_backward() -> contextlib.AbstractContextManager[Any]:
    """A compiled cell's backward frees what it was given unless it is compiled otherwise, and the adjoint solve asks
    for many products with one evaluation. Where it is compiled for several batch sizes, PyTorch looks again when it is
    called.
    """
    if not _anything_is_compiled():
        return contextlib.nullcontext()
    import torch._functorch.config as functorch_config

    patched: contextlib.AbstractContextManager[Any] = functorch_config.patch(donated_buffer=False)
    return patched


class _Adjoint(torch.autograd.Function):
    """The value of z*; on the way back, solves for u and hands it to f(z*)."""

    @staticmethod
    def forward(ctx: Any, f_star: Tensor, z: Tensor, z_star: Tensor, solver: Solver, backward: Backward) -> Tensor:
        ctx.save_for_backward(f_star, z)
        ctx.solver, ctx.layer = solver, backward
        return z_star.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        _refuse_second_derivatives()
        refuse_batched_gradients("the backward solve of a DEQ layer", grads[0])
        f_star, z = ctx.saved_tensors
        layer: Backward = ctx.layer
        # One for all samples: a factor for each would not pass J^T where samples see each other.
        scale = power_of_two_of_batch(grads[0])
        right_side = grads[0] / scale

        recorded_again = 0

        def restrict(index: Tensor) -> FixedPointMap:
            # The products of some samples alone need an evaluation recorded for these alone.
            nonlocal recorded_again
            assert layer.restrict is not None
            z_part = z.detach()[index].requires_grad_()
            f_part = recorded(layer.restrict(index), z_part)
            recorded_again += len(index)
            return adjoint_map(f_part, z_part, right_side[index])

        if layer.solve_adjoint is not None:
            solution = layer.solve_adjoint(ctx.solver, z, right_side)
        else:
            solution = ctx.solver.solve(
                adjoint_map(f_star, z, right_side, layer.held),
                right_side,
                restrict=restrict if layer.restrict is not None else None,
            )
        u = solution.z * scale
        layer.record(replace(solution, z=u, sample_evaluations=solution.sample_evaluations + recorded_again))
        return u, None, None, None, None


def _refuse_second_derivatives() -> None:
    # Autograd's own once_differentiable says nothing where the incoming gradient is a constant: a silent wrong answer.
    if torch.is_grad_enabled():
        raise RuntimeError("a DEQ layer has no second derivatives: leave out create_graph=True")


def adjoint_map(f_star: Tensor, z: Tensor, right_side: Tensor, held: Held = contextlib.nullcontext) -> FixedPointMap:
    """u -> J^T u + right side, with J = df/dz where f_star = f(z) was recorded; ``held`` as in :class:`Backward`."""

    def mapped(u: Tensor) -> Tensor:
        # Only z is asked for, so that no weight gradient is computed here. A cell that does not use z has J = 0.
        product: Tensor
        with _repeatable_backward(), held():
            (product,) = torch.autograd.grad(f_star, z, u, retain_graph=True, materialize_grads=True)
        return product + right_side

    return mapped
