"""What stays the same through every evaluation of f in one solve: masks of dropout, weights that are computed, and the
running statistics of norms.

A fixed point exists only where f is one map. A layer holds what its cell would otherwise draw or compute anew in each
evaluation, from the solve's first evaluation to the last product of its backward pass. It is kept by that solve, not
by the cell: two uses of one layer hold two sets, and nothing is left when the graph is gone. A call of a layer counts
as one call of the norms in its cell: their running statistics move once, by those of the last evaluation, at z*.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Literal, cast, get_args

from torch import Tensor, distributed, nn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

Per = Literal["element", "channel"]
Context = Callable[[Tensor | None], AbstractContextManager[object]]
"""Index of samples, (n,) int64 or None for all -> the context in which f is evaluated for these."""


class VariationalDropout(nn.Module):
    """Dropout whose mask is drawn once a solve, a new one for each sample, and is the same in all evaluations of f.

    For cells of a :class:`deq.DEQ`, which keeps the masks: in the forward solve, in the adjoint's, and for the samples
    left over where a solver compacts. Where a cell calls one such module several times in an evaluation, each call has
    its own mask. Elements are zeroed with probability p and the others divided by 1 - p; in eval mode, or with
    p = 0, x is returned as it is. Masks come from the global generator of x's device.

    Args:
        p: probability of an element, or a channel, to be zeroed, at least 0 and below 1.
        per: ``element``, or ``channel`` for masks (B, C, 1, ...), the same all over a channel.

    Raises:
        ValueError: for an option outside its limits.
        RuntimeError: in training mode outside a solve, where there is nothing for a mask to be the same in.

    Source: Gal & Ghahramani 2016, *A theoretically grounded application of dropout in recurrent neural networks*;
    Bai, Kolter & Koltun 2019 (in DEQs).

    Example:
        >>> import torch
        >>> from deq import DEQ
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear, self.dropout = torch.nn.Linear(8, 8), VariationalDropout(0.2)
        ...     def forward(self, z, x):
        ...         return self.dropout(torch.tanh(0.5 * self.linear(z) + x))
        >>> layer = DEQ(Cell())
        >>> z = layer(torch.randn(4, 8))
        >>> layer.last_solution.converged.all()
        tensor(True)
    """

    def __init__(self, p: float = 0.5, per: Per = "element") -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, got {p!r}")
        if per not in get_args(Per):
            raise ValueError(f"per must be one of {get_args(Per)}, got {per!r}")
        self.p, self.per = p, per
        self._masks: _Masks | None = None  # of the solve that is evaluating f, during an evaluation

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ...) floating point, or (B, C, ...) with ``per="channel"``. Returns: the same."""
        if not self.training or self.p == 0:
            return x
        if self._masks is None:
            raise RuntimeError(
                "a VariationalDropout in training mode was called outside a solve, which would hold its mask: give the "
                "DEQ layer a cell that is an nn.Module with it inside, evaluate DEQ.equilibrium(x).f, or call eval()"
            )
        return x * self._masks.take(x, self.p, self.per)

    def extra_repr(self) -> str:
        return f"p={self.p}, per={self.per!r}"


class _Masks:
    """The masks of one dropout in one solve: one for each of its calls in an evaluation of f."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._drawn: list[Tensor] = []
        self._call, self._index = 0, cast("Tensor | None", None)

    @contextmanager
    def lent_to(self, dropout: VariationalDropout, index: Tensor | None) -> Iterator[None]:
        """The masks of the samples in ``index`` for one evaluation of f."""
        if dropout._masks is not None:
            raise ValueError(
                "a VariationalDropout cannot be held by two solves, one inside the other: take it out of the cell of "
                "the DEQ layer that is inside another's cell"
            )
        self._call, self._index = 0, index
        dropout._masks = self
        try:
            yield
        finally:
            dropout._masks = self._index = None

    def take(self, x: Tensor, p: float, per: Per) -> Tensor:
        """The next mask, for x."""
        if self._call == len(self._drawn):
            if self._index is not None:
                raise ValueError(
                    f"a VariationalDropout was called {self._call + 1} times in an evaluation of f and at most "
                    f"{self._call} times before compaction, so that there is no mask: use compact=False"
                )
            shape = x.shape if per == "element" else (*x.shape[:2], *(1,) * (x.ndim - 2))
            self._drawn.append(x.detach().new_empty(shape).bernoulli_(1 - p).div_(1 - p))
        mask = self._drawn[self._call]
        self._call += 1
        if self._index is None:
            return mask
        if len(mask) != self._batch_size:
            raise ValueError(
                f"compact=True picks masks by sample, but a VariationalDropout was given {len(mask)} rows where the "
                f"batch is {self._batch_size}: keep the batch first in its input, or use compact=False"
            )
        return mask[self._index]


class _StandIn(nn.Module):
    """Stands where a parametrisation stood: its value in the threads that hold one, the computation in others."""

    def __init__(self, computed: nn.Module) -> None:
        super().__init__()
        self.computed = (computed,)  # not a module of this one
        self.values: dict[int, list[Tensor]] = {}

    def forward(self) -> Tensor:
        held = self.values.get(threading.get_ident())
        value: Tensor = held[-1] if held else self.computed[0]()
        return value


_swapping = threading.Lock()


@contextmanager
def _stands_in(parametrizations: nn.ModuleDict, name: str, value: Tensor, index: Tensor | None) -> Iterator[None]:
    """The value of a weight instead of its computation, for one evaluation of f, whichever samples it is for.

    Threads may evaluate one cell at the same time: the last to leave puts the parametrisation back.
    """
    here = threading.get_ident()
    with _swapping:
        found = parametrizations[name]
        stand_in = found if isinstance(found, _StandIn) else _StandIn(found)
        stand_in.values.setdefault(here, []).append(value)
        parametrizations[name] = stand_in
    try:
        yield
    finally:
        with _swapping:
            stand_in.values[here].pop()
            if not stand_in.values[here]:
                del stand_in.values[here]
            if not stand_in.values:
                parametrizations[name] = stand_in.computed[0]


class _RunningStatistics:
    """The running statistics of one norm: one call of the layer moves them once, from where they were before."""

    def __init__(self, norm: _NormBase) -> None:
        self._buffers = list(norm.buffers(recurse=False))
        self._before = [buffer.clone() for buffer in self._buffers]
        self._moved = False

    @contextmanager
    def held(self, index: Tensor | None) -> Iterator[None]:
        # Once they have moved, they are left as they are found: others may have moved them since.
        before = [buffer.clone() for buffer in self._buffers] if self._moved else self._before
        self._put(before)
        try:
            yield
        except BaseException:
            self._put(before)
            raise
        if self._moved:
            self._put(before)

    def move(self) -> None:
        """Leaves them as the evaluation before has moved them; no other does."""
        self._moved = True

    def _put(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.data.copy_(value)  # data: autograd keeps the buffers of an evaluation, and does not read them


def statistics_over_the_batch(cell: object) -> str | None:
    """The batch norm of a cell that takes its statistics from the batch, and so mixes samples: "norm is a BatchNorm1d".

    None where there is none that can be seen.
    """
    for name, module in modules_of(cell):
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return f"{name or 'module'} is a {type(module).__name__}"
    return None


def modules_of(cell: object) -> list[tuple[str, nn.Module]]:
    """The modules in a cell, with their names. Of a function: those that it closes over or names, and of a method those
    of its object that it names, and so on for the functions and methods that these name.
    """
    found: dict[nn.Module, str] = {}
    seen: set[object] = set()

    def walk(part: object, path: str) -> None:
        if isinstance(part, nn.Module):
            for name, module in part.named_modules(prefix=path):
                found.setdefault(module, name)
            return
        function = inspect.unwrap(part) if callable(part) else None
        while isinstance(function, functools.partial):
            function = function.func
        owner = getattr(function, "__self__", None)
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or (function, id(owner)) in seen:
            return
        seen.add((function, id(owner)))
        for name, closed in inspect.getclosurevars(function).nonlocals.items():
            walk(closed, name)
        for name in function.__code__.co_names:
            if name in function.__globals__:
                walk(function.__globals__[name], name)
            elif isinstance(owner, nn.Module):
                walk(getattr(owner, name, None), name)

    walk(cell, "")
    return [(name, module) for module, name in found.items()]


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _draws(module: nn.Module) -> str | None:
    """What a module of PyTorch's, other than a dropout, draws random numbers by in training mode."""
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0:
        return f"dropout={module.dropout}"
    if isinstance(module, nn.RReLU) and module.lower != module.upper:
        return f"lower={module.lower}, upper={module.upper}"
    return None


def hold(cell: object, batch_size: int, *, cuda_graph: bool = False) -> Held:
    """Computes every parametrised weight of the cell, once, and makes room for its dropouts' masks.

    Weights are recorded by autograd where it is on, and serve evaluations with and without: all gradients meet in the
    one computation. With ``cuda_graph`` weights are left to be computed in each evaluation, since a recording must not
    read a tensor that the next step replaces.

    Args:
        cell: a module is looked into, with the modules inside; a function for norms, as far as :func:`modules_of` sees.
        batch_size: samples of the solve.

    Raises:
        ValueError: if the cell is another map at every call and cannot be held: an ordinary dropout in training mode,
            the hook of ``torch.nn.utils.spectral_norm``, a dropout of attention or of an RNN, a VariationalDropout in
            a DEQ layer inside; for a SyncBatchNorm in training mode on several processes; with
            ``cuda_graph`` also a VariationalDropout, a norm with running statistics or a parametrisation that has a
            state (``spectral_norm``), all in training mode.
    """
    contexts: list[Context] = []
    statistics: list[_RunningStatistics] = []
    for path, module in modules_of(cell):
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            if cuda_graph:
                raise ValueError(
                    f"cuda_graph=True cannot hold the running statistics of the cell's {path or 'module'}, a "
                    f"{type(module).__name__} in training mode: use cuda_graph=False"
                )
            statistics.append(_RunningStatistics(module))
            contexts.append(statistics[-1].held)
    for path, module in cell.named_modules() if isinstance(cell, nn.Module) else ():
        name = path or "module"
        if isinstance(module, SyncBatchNorm) and module.training and _processes() > 1:
            raise ValueError(
                f"a solve makes as many evaluations as its own samples need, but in each the cell's {name}, a "
                f"SyncBatchNorm in training mode, would wait for all {_processes()} processes: use a GroupNorm, or a "
                "batch norm of each process's own"
            )
        if module.training and (drawn := _draws(module)) is not None:
            raise ValueError(
                f"a fixed point needs a cell that is the same map at every call, but its {name}, a "
                f"{type(module).__name__} in training mode, draws random numbers ({drawn}): set that to 0, and use "
                "deq.layer.VariationalDropout"
            )
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"a fixed point needs a cell that is the same map at every call, but its {name} is a "
                f"{type(module).__name__} in training mode: use deq.layer.VariationalDropout"
            )
        if module.training and any(
            type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values()
        ):
            raise ValueError(
                f"a fixed point needs a cell that is the same map at every call, but the hook of spectral_norm on its "
                f"{name} changes the weight at each: use torch.nn.utils.parametrizations.spectral_norm"
            )
        if isinstance(module, VariationalDropout) and module.training and module.p > 0:
            if cuda_graph:
                raise ValueError(f"cuda_graph=True cannot draw the masks of the cell's {name}: use cuda_graph=False")
            contexts.append(partial(_Masks(batch_size).lent_to, module))
        if parametrize.is_parametrized(module):
            parametrizations = cast(nn.ModuleDict, module.parametrizations)
            for weight, computed in parametrizations.items():
                if not cuda_graph:
                    contexts.append(partial(_stands_in, parametrizations, weight, getattr(module, weight)))
                elif any(part.training and next(part.buffers(), None) is not None for part in computed.children()):
                    raise ValueError(
                        f"cuda_graph=True computes the cell's {name}.{weight} in every evaluation, but its "
                        "parametrisation has a state that changes each time: use cuda_graph=False"
                    )
    return Held(contexts, statistics)


class Held:
    """What one solve holds: called with an index of samples, or None, it is the context of an evaluation for these."""

    def __init__(self, contexts: list[Context], statistics: list[_RunningStatistics]) -> None:
        self._contexts, self._statistics = contexts, statistics

    def __call__(self, index: Tensor | None) -> AbstractContextManager[object]:
        return self._all(index) if self._contexts else nullcontext()

    @contextmanager
    def _all(self, index: Tensor | None) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context(index))
            yield

    def move_statistics(self) -> None:
        """Running statistics stay where the evaluation before has moved them; evaluations after it move none."""
        for statistics in self._statistics:
            statistics.move()
