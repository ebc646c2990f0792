"""The recorded solves of one DEQ layer, forward and adjoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deq.kernels.state import on_device
from deq.layer.gradients import adjoint_map, recorded
from deq.solvers import Solution, Solver, captured
from deq.solvers.captured import CapturedSolve
from deq.solvers.map import FixedPointMap

MapOf = Callable[[Sequence[Tensor]], FixedPointMap]
"""The tensors of x -> f, the map z -> cell(z, x)."""


@dataclass(frozen=True)
class _Forward:
    """z* = f(z*) with an x that is copied in."""

    x: list[Tensor]
    solve: CapturedSolve


@dataclass(frozen=True)
class _Adjoint:
    """u = J^T u + right side, with J = df/dz at a z that is copied in: f is evaluated there once, also by replay."""

    x: list[Tensor]
    z: Tensor
    right_side: Tensor
    evaluate: Callable[[], None]
    solve: CapturedSolve


class LayerGraphs:
    """The most recently used recorded solves of one layer.

    A recording belongs to one shape, dtype and stride of x and z, to one solver, to one cell and its training flags,
    and to the places in memory of its parameters and buffers; whatever else the cell reads must be a tensor that stays
    where it is. Parameters that an optimiser updates in place need no new recording.

    Args:
        capacity: recordings kept, at least 1; each holds the history of one solve and the memory of one evaluation.
    """

    def __init__(self, capacity: int = 8) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 recording, got {capacity}")
        self.capacity = capacity
        self._recorded: OrderedDict[Hashable, _Forward | _Adjoint] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recorded)

    def __reduce__(self) -> tuple[type[LayerGraphs], tuple[int]]:
        # A copy of a layer has parameters of its own, and a graph cannot be copied.
        return LayerGraphs, (self.capacity,)

    def solve(
        self, solver: Solver, map_of: MapOf, cell: object, x: Sequence[Tensor], z0: Tensor, mode: Hashable
    ) -> Solution:
        """``solver.solve(map_of(x), z0)``, recorded at the first call.

        Args:
            cell: what map_of calls; a module is looked into.
            mode: whatever else the map depends on.
        """

        def record() -> _Forward:
            here = [tensor.detach().clone() for tensor in x]
            return _Forward(here, CapturedSolve(solver, map_of(here), z0.detach(), captured.recorder_for(z0.device)))

        kept = self._get(("forward", solver, mode, _key(cell, *x, z0)), record)
        assert isinstance(kept, _Forward)
        _copy(x, kept.x)
        return kept.solve(z0.detach())

    def solve_adjoint(
        self,
        solver: Solver,
        map_of: MapOf,
        cell: object,
        x: Sequence[Tensor],
        z: Tensor,
        right_side: Tensor,
        mode: Hashable,
    ) -> Solution:
        """Solves u = J^T u + right side from u = right side, J = df/dz at z, recorded at the first call.

        Costs an evaluation of f at z more than the solve, which ``sample_evaluations`` counts.
        """

        def record() -> _Adjoint:
            recorder = captured.recorder_for(z.device)
            x_here = [tensor.detach().clone() for tensor in x]
            z_here, b_here = z.detach().clone().requires_grad_(), right_side.clone()
            f = map_of(x_here)
            f_star: list[Tensor] = []

            def evaluate() -> None:
                f_star[:] = [recorded(f, z_here)]

            with on_device(z.device):
                recorder.warm_up(evaluate)
                replay = recorder.record(evaluate)
                replay()
            # By iterations: autograd launches on the stream that f was recorded on, and the body of a recorded loop
            # is recorded on one of its own. Not again: what f_star has saved is written to by each replay.
            products = adjoint_map(f_star[0], z_here, b_here)
            return _Adjoint(
                x_here,
                z_here,
                b_here,
                replay,
                CapturedSolve(solver, products, right_side, recorder, whole=False, again=False),
            )

        kept = self._get(("adjoint", solver, mode, _key(cell, *x, z)), record)
        assert isinstance(kept, _Adjoint)
        with torch.no_grad():
            _copy(x, kept.x)
            kept.z.copy_(z.detach())
            kept.right_side.copy_(right_side)
        with on_device(z.device):
            kept.evaluate()
        solution = kept.solve(right_side)
        return replace(solution, sample_evaluations=solution.sample_evaluations + len(right_side))

    def _get(self, key: Hashable, record: Callable[[], _Forward | _Adjoint]) -> _Forward | _Adjoint:
        if key in self._recorded:
            self._recorded.move_to_end(key)
        else:
            # First, so that the memory of the oldest is there for the newest.
            while len(self._recorded) >= self.capacity:
                self._recorded.popitem(last=False)
            # What is recorded in inference mode is replayed outside, too, where its tensors could not be written to.
            with torch.inference_mode(False):
                self._recorded[key] = record()
        return self._recorded[key]


def _copy(tensors: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    for tensor, place in zip(tensors, places, strict=True):
        place.copy_(tensor.detach())


class _Same:
    """Equal to what holds the very same object."""

    def __init__(self, held: object) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._held is self._held

    def __hash__(self) -> int:
        return id(self._held)


def _key(cell: object, *tensors: Tensor) -> Hashable:
    modules = list(cell.modules()) if isinstance(cell, nn.Module) else []
    fixed = [tensor for module in modules for kept in (module._parameters, module._buffers) for tensor in kept.values()]
    return (
        # The cell itself, which the key so keeps alive: another may have the same parameters, or none.
        _Same(cell),
        tuple((id(module), module.training) for module in modules),
        tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors),
        tuple(
            (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in fixed if tensor is not None
        ),
    )
