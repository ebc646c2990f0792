"""``DEQ``: a layer whose output is a fixed point."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deq.kernels.tracing import refuse_tracing, runs_as_it_is
from deq.layer.gradients import Backward, Gradient, Implicit, JacobianFree
from deq.layer.graphs import LayerGraphs
from deq.layer.held import hold, statistics_over_the_batch
from deq.solvers import Anderson, Solution, Solver
from deq.solvers.batch import verify
from deq.solvers.map import FixedPointMap
from deq.solvers.state import Coordinates, Nest, Skeleton, flatten, matched, unflatten


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
    aux: Any = None
    """What a cell with ``aux=True`` returns beside the next state, at z."""


class DEQ(nn.Module):
    """The deep equilibrium layer: z* with ``z* = cell(z*, x)``.

    A row of z is a sample: what a solver stops by itself and gives weights of its own. Samples that see each other are
    noticed when a solve ends, see :class:`~deq.solvers.Solver`; where they are known to, say ``coupled=True``. A batch
    norm in the cell that takes its statistics from the batch says so by itself, and moves its running statistics once
    a call, at z*.

    Args:
        cell: (z, x) -> z; z and x are tensors, (B, ...), of one shape unless ``z0`` is given, or nests of them: tuples,
            named tuples, lists and dicts, for models of several scales. The tensors of a nested z are views of one
            buffer, whose rows are D elements apart, D being the elements that a sample has in all of them. A cell that
            is no module cannot be looked into, but for the norms that a function or a method names.
        solver: finds z*; default ``Anderson()``.
        gradient: how gradients pass; default ``Implicit()``, its adjoint solved by ``solver``.
        cuda_graph: record evaluation and update once for each shape as a CUDA graph and replay it, in the forward and
            in the adjoint solve; where PyTorch can (2.14, CUDA 12.4), the whole forward solve is one launch. Needs a
            CUDA or ROCm device. Found and counted is the same. For cells that launch many small kernels. What the
            cell reads besides z, x, its parameters and its buffers must be tensors that stay where they are in
            memory; hooks and other Python code in the cell run when it is recorded, and not again. At most
            ``graphs.capacity`` recordings are kept.
        coupled: the samples see each other (nodes of a graph, attention over the batch): the batch is solved as one
            system, forward and backward, with one residual, one set of weights and one end. A z of one dimension, a
            single vector, always is.
        shared: keys of x (places, where it is a tuple or list) whose tensors belong to all samples together: a solver
            that compacts hands them on whole.
        scale: sizes of the components of z, above 0, as :meth:`deq.solvers.Solver.solve` takes them; the adjoint's are
            their inverses, so that gradients are as exact as those of a loss in units of these sizes.
        aux: the cell returns (z, anything): a call returns (z*, that), with what it is at z*. That is one more
            evaluation, through which gradients pass.

    Attributes:
        last_solution: account of the last forward solve, None before the first.
        last_adjoint: account of the backward solve that belongs to it, None until ``backward`` has run (and always
            for gradients without one).
        graphs: what is recorded, with ``cuda_graph``.

    To be recomputed by ``torch.utils.checkpoint`` a layer is a bad choice: it keeps the activations of one evaluation,
    and a backward solve would recompute the forward solve for each of its products.

    Under autocast the state is kept in float32 and what the cell returns is cast to it.

    Raises:
        ValueError: from a call, see :meth:`equilibrium`; of a ``backward`` whose solve needs x or a parameter as it
            was, if that has changed.

    Source: Bai, Kolter & Koltun 2019, *Deep equilibrium models*.

    Example:
        >>> import torch
        >>> from deq.layer import Implicit
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
        coupled: bool = False,
        shared: Collection[Any] = (),
        scale: Any = None,
        aux: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(shared, str) or not isinstance(shared, Collection):
            raise ValueError(f"shared must be a list of keys of x, got {shared!r}: give [{shared!r}]")
        for name, value in (("coupled", coupled), ("aux", aux), ("cuda_graph", cuda_graph)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if not callable(cell) or isinstance(cell, type):
            raise ValueError(f"cell must be a module or a function (z, x) -> z, got {cell!r}")
        if not (solver is None or isinstance(solver, Solver)):
            raise ValueError(f"solver must be a solver such as Anderson(), got {solver!r}")
        if not (gradient is None or isinstance(gradient, Gradient)):
            raise ValueError(f"gradient must be a gradient such as Implicit(), got {gradient!r}")
        adjoint = gradient.solver if isinstance(gradient, Implicit) else None
        if not (adjoint is None or isinstance(adjoint, Solver)):
            raise ValueError(f"the solver of Implicit must be a solver such as Anderson(), got {adjoint!r}")
        self.coupled, self.shared, self.scale, self.aux = coupled, tuple(shared), scale, aux
        self._coordinates: dict[Hashable, Coordinates] = {}
        self.cell = cell
        self.solver = solver if solver is not None else Anderson()
        self.gradient = gradient if gradient is not None else Implicit()
        self.cuda_graph, self.graphs = cuda_graph, LayerGraphs()
        self.last_solution: Solution[Any] | None = None
        self.last_adjoint: Solution[Any] | None = None

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            "torch.jit.script cannot compile a DEQ layer, whose loop is Python: keep the layer eager, and compile its "
            "cell, cell.compile()"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The accounts of the last call are the caller's data, and no part of the model.
        return self.__dict__ | {"last_solution": None, "last_adjoint": None, "_coordinates": {}}

    @runs_as_it_is
    def forward(self, x: Nest, z0: Nest | None = None) -> Any:
        """The fixed point, (B, ...), started from ``z0`` (zeros in the shape of x unless given).

        A ``z0`` that is a nest of tensors, of one batch size, dtype and device, makes the state one; the fixed point
        is returned in its structure, and so are ``last_solution.z`` and ``last_adjoint.z``. Its tensors are views of
        one buffer.

        Raises:
            ValueError, NotImplementedError: see :meth:`equilibrium`.
        """
        found = self.equilibrium(x, z0)
        return (found.z, found.aux) if self.aux else found.z

    @runs_as_it_is
    def equilibrium(self, x: Nest, z0: Nest | None = None, *, corrections: Collection[int] = ()) -> Equilibrium:
        """The fixed point with its map, and the iterates after the evaluations numbered in ``corrections``.

        The layer keeps nothing of it. A solve that ends earlier has fewer states. Cost: one recorded evaluation of f
        for each state. For :func:`deq.layer.correction_loss`, ``jacobian_penalty`` and ``spectral_radius``.

        Args:
            x, z0: as in a call of the layer.
            corrections: evaluations, counted from 1 to the solver's ``max_iter``.

        Raises:
            ValueError: if the cell returns another structure, shape, dtype or device than the state's; if z0 (x, where
                there is none) has no elements or is not floating point; if z0 is of several batch sizes, dtypes or
                devices; if the cell is another map at every call (a dropout in training mode, see
                :func:`deq.layer.held.hold`); if a solver compacts and the cell has a batch norm in training mode;
                with ``cuda_graph``, if the state is not on a CUDA or ROCm device, a solver compacts, there is a DEQ
                layer in the cell, or corrections are asked for; if a correction is never reached; if a solver compacts
                and the samples are ``coupled``, or a tensor of x that is not ``shared`` has no row for each sample;
                for a ``scale`` that is not above 0 or does not fit.
            NotImplementedError: inside ``torch.func`` transforms, for dual numbers, and while the layer is traced.

        Example:
            >>> import torch
            >>> layer = DEQ(lambda z, x: 0.5 * z + x, Anderson(window=1))
            >>> [z.item() for z in layer.equilibrium(torch.ones(1, 1), corrections=(1, 3)).states]
            [1.0, 1.75]
        """
        if _is_traced(x):
            refuse_tracing("a DEQ layer", x)
        inputs, x_skeleton = flatten(x, "x")
        starts, skeleton = (inputs, x_skeleton) if z0 is None else flatten(z0, "z0")
        refuse_tracing("a DEQ layer", *inputs, *starts)
        if not isinstance(corrections, Iterable):
            raise ValueError(f"corrections must be a list of evaluations such as [3, 6], got {corrections!r}")
        corrections = tuple(corrections)
        device_type = inputs[0].device.type
        autocast = torch.is_autocast_enabled(device_type)
        autocast_dtype = torch.get_autocast_dtype(device_type)
        if z0 is None:
            starts = [torch.zeros_like(tensor) for tensor in inputs]
        if autocast:
            starts = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in starts]
        # From here on a state is one tensor, with a row for each system to solve.
        compacts = self._compacts()
        coupled = self.coupled or statistics_over_the_batch(self.cell) is not None
        z0 = unflatten(skeleton, starts)
        coordinates = self._coordinates_of(z0, coupled, compacts)
        start = coordinates.pack(z0)
        shared = self._shared(x_skeleton)
        if compacts:
            self._refuse_rows_that_are_no_samples(x, x_skeleton, shared, coordinates.batch_size)
        self._materialise(x, z0)
        held = hold(self.cell, coordinates.batch_size, cuda_graph=self.cuda_graph)
        cache_enabled = torch.is_autocast_cache_enabled() and not self.cuda_graph

        def cell_at(z: Any, x: Any, index: Tensor | None = None) -> Any:
            if not autocast:
                with held(index):
                    return self.cell(z, x)
            # Named again, since the backward solve may call this where autocast is off. A recording must not read a
            # weight that autocast has cast before.
            with torch.autocast(device_type, dtype=autocast_dtype, cache_enabled=cache_enabled), held(index):
                return self.cell(z, x)

        def map_of(inputs: Sequence[Tensor], index: Tensor | None = None) -> FixedPointMap:
            x = unflatten(x_skeleton, inputs)

            def f(z: Any) -> Any:
                return _without_aux(cell_at(z, x, index)) if self.aux else cell_at(z, x, index)

            return coordinates.flat_map(f, cast=autocast)

        # All that a recording depends on besides the shapes and the cell.
        mode = (autocast_dtype if autocast else None, repr(x_skeleton), repr(coordinates))
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
            parts = [t.detach() if number in shared else t.detach()[index] for number, t in enumerate(inputs)]
            return map_of(parts, index)

        def solve_adjoint(solver: Solver, z: Tensor, right_side: Tensor) -> Solution:
            refuse_changes()
            return self.graphs.solve_adjoint(solver, map_of, self.cell, inputs, z, right_side, mode)

        f = map_of(inputs)
        given = restrict if compacts else None
        recording = torch.is_grad_enabled()
        if self.cuda_graph:
            if corrections:
                raise ValueError(
                    f"cuda_graph=True replays a solve without its iterates, but corrections={corrections} were asked "
                    "for: use cuda_graph=False"
                )
            self._refuse_nested_graphs()
            solution = self.graphs.solve(self.solver, map_of, self.cell, inputs, start, mode)
        else:
            # With a gradient f is evaluated at z* anyway.
            solution = self.solver.solve(f, start, restrict=given, states_at=corrections, check=not recording)
        # The states belong to the caller: an account is kept until the next call.
        states, solution = solution.states, replace(solution, states=())
        self.last_adjoint = None

        def f_of_states(z: Any) -> Any:
            return coordinates.unpack(f(coordinates.pack(z)))

        def found(z_star: Any, states: Iterable[Tensor]) -> Equilibrium:
            aux = _aux(cell_at(z_star, x)) if self.aux else None
            return Equilibrium(z_star, tuple(map(coordinates.unpack, states)), f_of_states, aux)

        if not recording:
            held.move_statistics()
            self.last_solution = coordinates.account(solution)
            # A copy, as with a gradient: what is returned is the caller's to write to, the account is not.
            return found(coordinates.unpack(solution.z.clone()), states)

        at_z_star: list[Tensor] = []

        def watched(z: Tensor) -> Tensor:
            fz = f(z)
            if not at_z_star and z.data_ptr() == solution.z.data_ptr():
                at_z_star.append(fz.detach())
                held.move_statistics()
            return fz

        def record(adjoint: Solution) -> None:
            # A layer used twice in one graph keeps the accounts of its last use, both of them.
            if self.last_solution is account:
                self.last_adjoint = coordinates.account(adjoint, adjoint=True)

        replayed = solve_adjoint if self.cuda_graph else None
        backward = Backward(self.solver, record, given, replayed, held=lambda: held(None))
        z = self.gradient.attach(watched, solution.z, backward)
        held.move_statistics()
        if not solution.verified:
            with torch.no_grad():
                fz = at_z_star[0] if at_z_star else f(solution.z)
                solution = verify(self.solver, solution, fz)
        account = self.last_solution = coordinates.account(solution)
        on_the_way = [JacobianFree().attach(f, state, backward) for state in states]
        return found(coordinates.release(z), on_the_way)

    def _coordinates_of(self, z0: Nest, coupled: bool, compacts: bool) -> Coordinates:
        """Made once for each kind of state: a scale is looked at when it is first used."""
        leaves, skeleton = flatten(z0, "z0")
        shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        key = (repr(skeleton), shapes, coupled, compacts, id(self.scale))
        if key not in self._coordinates:
            if len(self._coordinates) >= _KINDS_OF_STATES:
                self._coordinates.clear()
            self._coordinates[key] = Coordinates(z0, coupled=coupled, scale=self.scale, compact=compacts)
        return self._coordinates[key]

    def _materialise(self, x: Any, z0: Any) -> None:
        """Lazy parameters and buffers take their shapes before anything is kept of them."""
        if not isinstance(self.cell, nn.Module) or not any(
            map(is_lazy, (*self.cell.parameters(), *self.cell.buffers()))
        ):
            return
        modes = {module: module.training for module in self.cell.modules()}
        self.cell.eval()  # draws no mask, and moves no statistics
        try:
            with torch.no_grad():
                self.cell(z0, x)
        finally:
            for module, training in modes.items():
                module.training = training

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
        mixing = statistics_over_the_batch(self.cell)
        if mixing is not None:
            raise ValueError(
                f"compact=True needs a cell that treats samples independently, but its {mixing} in training mode, "
                "which mixes them: use compact=False or a GroupNorm"
            )
        return True

    def _shared(self, x_skeleton: Skeleton) -> set[int]:
        """The numbers of the tensors of x that belong to all samples."""
        numbers: set[int] = set()
        for key in self.shared:
            if isinstance(x_skeleton, int):
                raise ValueError(f"shared={list(self.shared)} names parts of x, but x is one tensor: leave it out")
            try:
                part = x_skeleton[key]
            except (LookupError, TypeError):
                names = [*x_skeleton] if isinstance(x_skeleton, Mapping) else f"places 0 to {len(x_skeleton) - 1}"
                raise ValueError(f"shared names {key!r}, which x does not have: it has {names}") from None
            numbers.update(_numbers(part))
        return numbers

    def _refuse_rows_that_are_no_samples(
        self, x: Nest, x_skeleton: Skeleton, shared: set[int], batch_size: int
    ) -> None:
        for number, (path, tensor) in enumerate(matched(x, x_skeleton, "x")):
            if number not in shared and (tensor.ndim == 0 or len(tensor) != batch_size):
                raise ValueError(
                    f"compact=True leaves samples out of x, but {path} is {tuple(tensor.shape)}, and has no row for "
                    f"each of the {batch_size} samples: name its key in DEQ(..., shared=[...]) if it belongs to all "
                    "of them, or use compact=False"
                )

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}"


_KINDS_OF_STATES = 32
"""Kept of shapes, dtypes and devices of a layer's states."""


def _is_traced(x: object) -> bool:
    """Whether torch.fx stands something else in the place of a tensor."""
    return isinstance(x, torch.fx.Proxy)


def _numbers(skeleton: Skeleton) -> list[int]:
    """Of the tensors in a part of a nest."""
    if isinstance(skeleton, int):
        return [skeleton]
    return [
        number for part in (skeleton.values() if isinstance(skeleton, dict) else skeleton) for number in _numbers(part)
    ]


def _without_aux(returned: Any) -> Any:
    """The state of a cell that returns (z, aux)."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        got = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        raise ValueError(f"aux=True needs a cell that returns the tuple (z, aux), but it returned {got}")
    return returned[0]


def _aux(returned: Any) -> Any:
    _without_aux(returned)
    return returned[1]
