"""``DEQ``: a layer whose output is a fixed point."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deq.gradients import Backward, Gradient, Implicit, JacobianFree
from deq.graphs import LayerGraphs
from deq.held import hold
from deq.solvers import Anderson, Solution, Solver
from deq.solvers.base import FixedPointMap, validate_start
from deq.solvers.state import Nest, Packing, flatten, unflatten


@dataclass(frozen=True)
class Equilibrium:
    """A fixed point, and what losses on the way to it and on the map around it need.

    Example:
        >>> import torch
        >>> found = DEQ(lambda z, x: x + 0 * z).equilibrium(torch.ones(1, 1), corrections=(1,))
        >>> found.z, found.states, found.f(torch.zeros(1, 1))
        (tensor([[1.]]), (tensor([[1.]]),), tensor([[1.]]))
    """

    z: Any
    """(B, ...), or a nest of such: the fixed point, with the layer's gradient."""
    states: tuple[Any, ...]
    """Iterates on the way, like z, with the gradient of one evaluation of f at each (``JacobianFree``)."""
    f: Callable[[Any], Any]
    """The map that was solved, x and all: its dropout masks and parametrised weights are those of the solve."""


class DEQ(nn.Module):
    """The deep equilibrium layer: z* with ``z* = cell(z*, x)``.

    Args:
        cell: (z, x) -> z; z and x are tensors, (B, ...), of one shape unless ``z0`` is given, or nests of them: tuples,
            named tuples, lists and dicts, for models of several scales. The tensors of a nested z are views of one
            buffer, whose rows are D elements apart, D being the elements that a sample has in all of them. A cell that
            is no module cannot be looked into: that it treats samples independently is then taken on trust by
            ``compact``.
        solver: finds z*; default ``Anderson()``.
        gradient: how gradients pass; default ``Implicit()``, its adjoint solved by ``solver``.
        cuda_graph: record evaluation and update once for each shape as a CUDA graph and replay it, in the forward and
            in the adjoint solve; where PyTorch can (2.14, CUDA 12.4), the whole forward solve is one launch. Needs a
            CUDA or ROCm device. Found and counted is the same. For cells that launch many small kernels. What the
            cell reads besides z, x, its parameters and its buffers must be tensors that stay where they are in
            memory; hooks and other Python code in the cell run when it is recorded, and not again. At most
            ``graphs.capacity`` recordings are kept.

    Attributes:
        last_solution: account of the last forward solve, None before the first.
        last_adjoint: account of the backward solve that belongs to it, None until ``backward`` has run (and always
            for gradients without one).
        graphs: what is recorded, with ``cuda_graph``.

    Under autocast the state is kept in float32 and what the cell returns is cast to it.

    Raises:
        ValueError: from a call, see :meth:`equilibrium`; of a ``backward`` whose solve needs x or a parameter as it
            was, if that has changed.

    Source: Bai, Kolter & Koltun 2019, *Deep equilibrium models*.

    Example:
        >>> import torch
        >>> from deq.gradients import Implicit
        >>> from deq.solvers import Anderson
        >>> weight = torch.nn.Linear(8, 8)
        >>> layer = DEQ(
        ...     lambda z, x: torch.tanh(0.5 * weight(z) + x),
        ...     solver=Anderson(window=5, tol=1e-4),
        ...     gradient=Implicit(solver=Anderson(window=5, tol=1e-4)),
        ... )
        >>> layer(torch.randn(2, 8)).sum().backward()
        >>> layer.last_solution.converged, layer.last_adjoint.converged, weight.weight.grad.shape
        (tensor([True, True]), tensor([True, True]), torch.Size([8, 8]))

        Two scales, one injection:

        >>> pair = DEQ(lambda z, x: (torch.tanh(weight(z[0]) / 2 + x), torch.tanh(z[1] / 2 + z[0][:, :4])))
        >>> fine, coarse = pair(torch.randn(2, 8), z0=(torch.zeros(2, 8), torch.zeros(2, 4)))
        >>> fine.shape, coarse.shape
        (torch.Size([2, 8]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        cell: Callable[[Any, Any], Any],
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        *,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.solver = solver if solver is not None else Anderson()
        self.gradient = gradient if gradient is not None else Implicit()
        self.cuda_graph, self.graphs = cuda_graph, LayerGraphs()
        self.last_solution: Solution[Any] | None = None
        self.last_adjoint: Solution[Any] | None = None

    def forward(self, x: Nest, z0: Nest | None = None) -> Any:
        """The fixed point, (B, ...), started from ``z0`` (zeros in the shape of x unless given).

        A ``z0`` that is a nest of tensors, of one batch size, dtype and device, makes the state one; the fixed point
        is returned in its structure, and so are ``last_solution.z`` and ``last_adjoint.z``. Its tensors are views of
        one buffer.

        Raises:
            ValueError: see :meth:`equilibrium`.
        """
        return self.equilibrium(x, z0).z

    def equilibrium(self, x: Nest, z0: Nest | None = None, *, corrections: Collection[int] = ()) -> Equilibrium:
        """The fixed point with its map, and the iterates after the evaluations numbered in ``corrections``.

        The layer keeps nothing of it. A solve that ends earlier has fewer states. Cost: one recorded evaluation of f
        for each state. For :func:`deq.stability.correction_loss`, ``jacobian_penalty`` and ``spectral_radius``.

        Args:
            x, z0: as in a call of the layer.
            corrections: evaluations, counted from 1 to the solver's ``max_iter``.

        Raises:
            ValueError: if the cell returns another structure, shape, dtype or device than the state's; if z0 (x, where
                there is none) has no elements or is not floating point; if z0 is of several batch sizes, dtypes or
                devices; if the cell is another map at every call (a dropout in training mode, see
                :func:`deq.held.hold`); if a solver compacts and the cell has a batch norm in training mode;
                with ``cuda_graph``, if the state is not on a CUDA or ROCm device, a solver compacts, there is a DEQ
                layer in the cell, or corrections are asked for; if a correction is never reached.

        Example:
            >>> import torch
            >>> layer = DEQ(lambda z, x: 0.5 * z + x, Anderson(window=1))
            >>> [z.item() for z in layer.equilibrium(torch.ones(1, 1), corrections=(1, 3)).states]
            [1.0, 1.75]
        """
        inputs, x_skeleton = flatten(x, "x")
        device_type = inputs[0].device.type
        autocast = torch.is_autocast_enabled(device_type)
        autocast_dtype = torch.get_autocast_dtype(device_type)
        if z0 is None:
            starts, skeleton = [torch.zeros_like(tensor) for tensor in inputs], x_skeleton
        else:
            starts, skeleton = flatten(z0, "z0")
        if autocast:
            starts = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in starts]
        # From here on a state is one tensor.
        packing = None if isinstance(skeleton, int) else Packing(unflatten(skeleton, starts))
        start = starts[0] if packing is None else packing.pack(unflatten(skeleton, starts))

        validate_start(start)
        held = hold(self.cell, len(start), cuda_graph=self.cuda_graph)

        def map_of(inputs: Sequence[Tensor], index: Tensor | None = None) -> FixedPointMap:
            x = unflatten(x_skeleton, inputs)

            def f(z: Any) -> Any:
                if not autocast:
                    with held(index):
                        return self.cell(z, x)
                # Named again, since the backward solve may call this where autocast is off. A recording must not read
                # a weight that autocast has cast before.
                with torch.autocast(device_type, dtype=autocast_dtype, cache_enabled=cache_enabled), held(index):
                    return self.cell(z, x).to(z.dtype) if packing is None else self.cell(z, x)

            return f if packing is None else packing.flat_map(f, cast=autocast)

        cache_enabled = torch.is_autocast_cache_enabled() and not self.cuda_graph
        # All that a recording depends on besides the shapes and the cell.
        mode = (autocast_dtype if autocast else None, repr(x_skeleton), repr(packing))
        recorded_with = self._versions(inputs)

        def refuse_changes() -> None:
            if self._versions(inputs) != recorded_with:
                raise ValueError(
                    "x or the cell's parameters were modified in place or replaced between the forward and the "
                    "backward pass, which a backward solve that compacts or replays a graph needs as they were: use "
                    "compact=False and cuda_graph=False"
                )

        def restrict(index: Tensor) -> FixedPointMap:
            refuse_changes()
            return map_of([tensor.detach()[index] for tensor in inputs], index)

        def solve_adjoint(solver: Solver, z: Tensor, right_side: Tensor) -> Solution:
            refuse_changes()
            return self.graphs.solve_adjoint(solver, map_of, self.cell, inputs, z, right_side, mode)

        def unpacked(flat: Tensor) -> Any:
            return flat if packing is None else packing.unpack(flat)

        def account(solution: Solution) -> Solution[Any]:
            return replace(solution, z=unpacked(solution.z))

        f = map_of(inputs)
        # For the caller: of nests, where the state is one.
        f_of_states = f if packing is None else (lambda z: packing.unpack(f(packing.pack(z))))
        given = restrict if self._compacts() else None
        if self.cuda_graph:
            if corrections:
                raise ValueError(
                    f"cuda_graph=True replays a solve without its iterates, but corrections={tuple(corrections)} were "
                    "asked for: use cuda_graph=False"
                )
            self._refuse_nested_graphs()
            solution = self.graphs.solve(self.solver, map_of, self.cell, inputs, start, mode)
        else:
            solution = self.solver.solve(f, start, restrict=given, states_at=corrections)
        # The states belong to the caller: an account is kept until the next call.
        states, solution = solution.states, replace(solution, states=())
        found = self.last_solution = account(solution)
        self.last_adjoint = None
        if not torch.is_grad_enabled():
            # A copy, as with a gradient: what is returned is the caller's to write to, the account is not.
            return Equilibrium(unpacked(solution.z.clone()), tuple(map(unpacked, states)), f_of_states)

        def record(adjoint: Solution) -> None:
            # A layer used twice in one graph keeps the accounts of its last use, both of them.
            if self.last_solution is found:
                self.last_adjoint = account(adjoint)

        replayed = solve_adjoint if self.cuda_graph else None
        backward = Backward(self.solver, record, given, replayed)
        z = self.gradient.attach(f, solution.z, backward)
        on_the_way = (JacobianFree().attach(f, state, backward) for state in states)
        z_star = z if packing is None else packing.release(z)
        return Equilibrium(z_star, tuple(map(unpacked, on_the_way)), f_of_states)

    def _versions(self, inputs: Sequence[Tensor]) -> list[tuple[int, int]]:
        """What tells whether tensors are the same and unchanged (inference tensors count nothing: left out)."""
        parameters = self.cell.parameters() if isinstance(self.cell, nn.Module) else ()
        return [(id(tensor), tensor._version) for tensor in (*inputs, *parameters) if not tensor.is_inference()]

    def _refuse_nested_graphs(self) -> None:
        for name, module in self.cell.named_modules() if isinstance(self.cell, nn.Module) else ():
            if isinstance(module, DEQ):
                raise ValueError(
                    f"cuda_graph=True cannot record a cell with a DEQ layer in it, here {name or 'itself'}, which "
                    "looks at its own flags: use cuda_graph=False on the outer layer"
                )

    def _compacts(self) -> bool:
        """Whether any solver of this layer compacts; raises ValueError if the cell cannot bear it."""
        adjoint = self.gradient.solver if isinstance(self.gradient, Implicit) else None
        if not (self.solver.compact or (adjoint is not None and adjoint.compact)):
            return False
        for name, module in self.cell.named_modules() if isinstance(self.cell, nn.Module) else ():
            if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
                raise ValueError(
                    f"compact=True needs a cell that treats samples independently, but its {name or 'module'} is a "
                    f"{type(module).__name__} in training mode, which mixes them: use compact=False or a GroupNorm"
                )
        return True

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}"
