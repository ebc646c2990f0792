"""A solve that is recorded once and replayed: CUDA graphs of evaluation and update, and of the whole loop.

An iteration is a few dozen launches; where the state is small, launching them takes the host longer than running them
takes the device. A graph is launched once. Where PyTorch can capture a loop whose end is decided on the device (a
while node: PyTorch 2.14 on CUDA 12.4 or later), a whole solve is one launch, its stopping test included; elsewhere it
is one launch an iteration, and the host looks one iteration late, as it does without graphs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from deq.kernels.state import on_device

from .batch import Log, Look, conclude
from .iteration import Books, MovingSamples
from .map import FixedPointMap, evaluate
from .solution import Solution

if TYPE_CHECKING:
    from .solver import Solver

Work = Callable[[], None]
"""Launches on tensors that stay where they are."""


class Recorder(Protocol):
    """What records work and gives back what replays it, on the same tensors."""

    @property
    def records_loops(self) -> bool:
        """Whether ``loop`` can be recorded."""

    def warm_up(self, work: Work) -> None:
        """Does the work where it will be recorded: what is compiled, tuned or allocated once must not be recorded."""

    def record(self, work: Work) -> Work:
        """Records the work, without doing it; returns what does it. The work must not ask for a tensor's value."""

    def loop(self, going: Tensor, body: Work) -> None:
        """Inside ``record``: the body again and again while ``going``, () bool, which the body writes, is true."""


class CudaRecorder:
    """CUDA graphs on one device, all on one stream and with one memory pool.

    One stream, because autograd runs a node's backward on the stream that its forward was recorded on.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def records_loops(self) -> bool:
        return _while_nodes_available()

    def warm_up(self, work: Work) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay

    def loop(self, going: Tensor, body: Work) -> None:
        with _while_node(going) as graph:
            body()
            graph.set_conditional_handle_for_current_node(going)


@contextmanager
def _while_node(going: Tensor) -> Iterator[Any]:
    # Any: PyTorch before 2.14 has none of these methods.
    graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
    graph.begin_capture_to_while_node(going)
    try:
        yield graph
    finally:
        graph.end_capture_to_conditional_node()


@functools.cache
def _while_nodes_available() -> bool:
    if torch.version.hip is not None or torch.version.cuda is None:
        return False
    toolkit = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return toolkit >= (12, 4) and hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")


def recorder_for(device: torch.device) -> Recorder:
    """Raises ValueError where nothing can be recorded."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA or ROCm device, got a state on {device}: use cuda_graph=False")
    return CudaRecorder(device)


class CapturedSolve:
    """One solver on one map at one shape, recorded; a call copies its start in and replays.

    The iterates, their evaluations and their updates are those of ``solver.solve``, to the bit. The solve keeps its
    history (2 m B d elements for Anderson) and its scratch memory as long as it lives.

    Args:
        solver: any that does not compact.
        f: reads nothing but z and tensors that stay where they are; their values may change between calls.
        z0: (B, ...) what the first start looks like. f is evaluated there to warm up.
        recorder: what records.
        whole: record the whole loop where the recorder can.
        again: whether f may be evaluated outside of the recording, when its solve has ended. Where not, samples that
            see each other are told as not converged.

    Raises:
        ValueError: for a solver that compacts: its evaluations change their shape as they go.
    """

    @torch.no_grad()
    def __init__(
        self,
        solver: Solver,
        f: FixedPointMap,
        z0: Tensor,
        recorder: Recorder,
        *,
        whole: bool = True,
        again: bool = True,
    ) -> None:
        if solver.compact:
            raise ValueError(
                "compact=True changes the shape of the evaluations, which a recorded graph cannot: use compact=False "
                "or cuda_graph=False"
            )
        self._solver, self._f, self._shape, self._again = solver, f, z0.shape, again
        self._x = z0.reshape(len(z0), -1).clone(memory_format=torch.contiguous_format)
        self._iteration, self._evaluated = solver.start(self._x, in_place=True), torch.empty_like(self._x)
        kind = type(self._iteration)
        if issubclass(kind, Books) and kind.reset is Books.reset:
            raise ValueError(
                f"{kind.__name__} does not say what a new solve begins with, which a recorded one needs: write "
                "reset(), which calls super().reset(), or use cuda_graph=False"
            )
        self._count = torch.zeros((), dtype=torch.int64, device=z0.device)
        self._going = torch.ones((), dtype=torch.bool, device=z0.device)
        self._replay_solve: Work | None = None
        with on_device(z0.device):
            recorder.warm_up(self._once)
            if whole and recorder.records_loops:
                try:
                    self._replay_solve = recorder.record(lambda: self._whole(recorder))
                except RuntimeError as error:
                    # A loop cannot hold all that a graph can, random numbers for one.
                    warnings.warn(f"the loop was not recorded as a whole, but by iterations: {error}", stacklevel=2)
            if self._replay_solve is None:
                self._replay_iteration = recorder.record(self._iterate)

    @property
    def whole(self) -> bool:
        """Whether a solve is a single launch."""
        return self._replay_solve is not None

    def _once(self) -> None:
        """All that will be recorded, so that nothing is loaded or compiled while it is."""
        self._begin()
        self._iterate()
        self._look()
        self._finish()

    def _begin(self) -> None:
        self._iteration.reset()
        self._count.zero_()
        self._going.fill_(True)

    def _iterate(self) -> None:
        # Kept, and so left alone by what else is recorded: it is looked at again when the solve has ended.
        self._fx = evaluate(self._f, self._x, self._shape)
        self._evaluated.copy_(self._x)
        self._iteration.step(self._x, self._fx, None)

    def _look(self) -> None:
        self._count.add_(1)
        self._going.copy_((self._iteration.outcome == 0).any() & (self._count < self._solver.max_iter))

    def _whole(self, recorder: Recorder) -> None:
        self._begin()

        def body() -> None:
            self._iterate()
            self._look()

        recorder.loop(self._going, body)
        self._finish()

    def _finish(self) -> None:
        self._last_look = Look.at(self._solver, self._iteration, self._x, self._fx)

    @torch.no_grad()
    def __call__(self, z0: Tensor) -> Solution:
        """z0: (B, ...), of the shape, dtype and device recorded; not modified. See :meth:`Solver.solve`.

        Raises:
            ValueError: if z0 is another.
        """
        recorded = (self._shape, self._x.dtype, self._x.device)
        if (z0.shape, z0.dtype, z0.device) != recorded:
            raise ValueError(
                f"z0 must be what was recorded, {tuple(recorded[0])} {recorded[1]} on {recorded[2]}, "
                f"got {tuple(z0.shape)} {z0.dtype} on {z0.device}: make a CapturedSolve for it"
            )
        with on_device(z0.device):
            return self._solve(z0)

    def _solve(self, z0: Tensor) -> Solution:
        self._x.copy_(z0.reshape(self._x.shape))
        log = Log(self._f, self._shape, again=self._again)
        look = None
        if self._replay_solve is not None:
            self._replay_solve()
            log.evaluations, look = int(self._count), self._last_look
        else:
            self._iteration.reset()
            moving = MovingSamples(len(z0), z0.device)
            while log.evaluations < self._solver.max_iter:
                self._replay_iteration()
                log.evaluations += 1
                if log.evaluations % self._solver.check_every == 0 and moving.count(self._iteration.outcome) == 0:
                    break
        log.sample_evaluations = log.evaluations * len(z0)
        # The next call writes over all of this.
        last = not self._again or log.evaluations == self._solver.max_iter
        evaluated = self._evaluated if last else None
        found = conclude(self._solver, self._iteration, self._x, self._fx, log, evaluated, look)
        return replace(found, z=found.z.clone(), residual=found.residual.clone())
