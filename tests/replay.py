"""CUDA graphs played on a CPU: what launches is written down and launched again, on the same tensors.

As on a device, a replay runs no Python of the work, only its operations, into the tensors of the recording; whatever
the work asked for on the host, or took from outside, is as it was when it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from deq.kernels import triton_backend

Launch = Callable[[], None]

_ASKS_FOR_A_VALUE = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::masked_select")


@dataclass
class _Tape:
    launches: list[Launch] = field(default_factory=list)

    def replay(self) -> None:
        for launch in self.launches:
            launch()


_recording: list[_Tape] = []


class _WriteDown(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _ASKS_FOR_A_VALUE:
            raise RuntimeError(f"{name} asks for a tensor's value, which stops a capture")
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        aliases = any(output.alias_info is not None for output in func._schema.returns)
        if aliases and not func._schema.is_mutable:
            return result  # a view: it stays where it is

        def launch() -> None:
            again = func(*args, **kwargs)
            if not aliases:
                for output, new in zip(outputs, (x for x in tree_leaves(again) if isinstance(x, Tensor)), strict=True):
                    output.data.copy_(new)  # data: a replay is nothing that autograd notices

        _recording[-1].launches.append(launch)
        return result


class _Kernel:
    """A Triton kernel whose launches are written down while something is recorded."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            def run() -> None:
                with _disable_current_modes():
                    self._kernel[grid](*args, **kwargs)

            run()
            if _recording:
                _recording[-1].launches.append(run)

        return launch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


class ReplayingRecorder:
    """See :class:`deq.solvers.captured.Recorder`. Unlike a capture, recording does the work, once."""

    def __init__(self, records_loops: bool = True) -> None:
        self.records_loops = records_loops
        self.recordings = self.replays = 0

    def warm_up(self, work: Launch) -> None:
        work()

    @contextmanager
    def _tape(self) -> Iterator[_Tape]:
        tape = _Tape()
        _recording.append(tape)
        try:
            yield tape
        finally:
            _recording.pop()

    def record(self, work: Launch) -> Launch:
        self.recordings += 1
        with self._tape() as tape, _WriteDown():
            work()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay

    def loop(self, going: Tensor, body: Launch) -> None:
        with self._tape() as tape:
            body()

        def launch() -> None:
            turns = 0
            with _disable_current_modes():
                while bool(going):
                    tape.replay()
                    turns += 1
                    assert turns < 10_000, "a loop that does not end"

        _recording[-1].launches.append(launch)


@pytest.fixture
def triton_launches_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_push", "_reduce", "_mix", "_update", "_residual_partials"):
        monkeypatch.setattr(triton_backend, name, _Kernel(getattr(triton_backend, name)))
