"""The programs of a launch may run in any order, and in the middle of one another: the bits stay the same.

A GPU starts the programs of a launch in an order of its own, and many are under way at once. Triton's interpreter runs
one after the other, in which no race would show; here it runs them in other orders.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from deq.kernels import AndersonWindow, Outcome, Regularization, residual_norm
from deq.kernels.state import STALL, Carried
from deq.kernels.triton_backend import TritonBackend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="decides what Triton's interpreter runs next")

Order = Literal["first to last", "last to first", "shuffled", "interrupted"]
OTHER_ORDERS: tuple[Order, ...] = ("last to first", "shuffled", "interrupted")
_INTERRUPTED_AT = 1 / 16  # of the accesses to memory, of which a program makes 12 to 50


@contextmanager
def programs_run(order: Order, seed: int = 0) -> Iterator[None]:
    """``shuffled`` draws an order for every launch. ``interrupted`` does too, and at some of its loads and stores a
    program stands still until others have run, which may be interrupted in turn."""
    builder = interpreter.interpreter_builder
    chance = random.Random(seed)

    def run_another() -> None:
        """The next program of the launch that is under way, if one is left."""

    def reordered(program: Callable[..., None]) -> Callable[..., None]:
        """What the interpreter is to call as often as the launch has programs."""
        waiting: list[int] | None = None

        @functools.wraps(program)
        def run_next(**arguments: Any) -> None:
            nonlocal waiting, run_another
            if waiting is None:
                waiting = list(range(builder.grid_dim[0]))  # taken from its end
                if order == "first to last":
                    waiting.reverse()
                elif order != "last to first":
                    chance.shuffle(waiting)
                run_another = functools.partial(run_next, **arguments)
            if waiting:
                here = builder.grid_idx
                builder.set_grid_idx(waiting.pop(), 0, 0)
                program(**arguments)
                builder.grid_idx = here

        run_next.__signature__ = inspect.signature(program)  # type: ignore[attr-defined]
        return run_next

    def interruptible(access: Callable[..., Any]) -> Callable[..., Any]:
        def accessed(*arguments: Any) -> Any:
            if chance.random() < _INTERRUPTED_AT:
                run_another()
            return access(*arguments)

        return accessed

    begin = interpreter.GridExecutor.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter.GridExecutor,
            "__init__",
            lambda executor, program, *options: begin(executor, reordered(program), *options),
        )
        if order == "interrupted":
            for name in ("create_masked_load", "create_masked_store"):
                patch.setattr(builder, name, interruptible(getattr(builder, name)))
        yield


@triton.jit
def _reads_what_its_neighbour_writes(x_ptr):
    program = tl.program_id(0)
    before = tl.load(x_ptr + program)
    tl.store(x_ptr + program + 1, before + 1)


@triton.jit
def _counts_without_an_atomic(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit
def _keeps_to_its_own(x_ptr):
    program = tl.program_id(0)
    tl.store(x_ptr + program, tl.load(x_ptr + program) + program)


PROGRAMS = 64


def result_of(kernel: Any, order: Order) -> list[int]:
    x = torch.zeros(PROGRAMS + 1, dtype=torch.int32)
    with programs_run(order):
        kernel[(PROGRAMS,)](x)
    return x.tolist()


def test_another_order_shows_a_race() -> None:
    expected = list(range(PROGRAMS + 1))
    assert result_of(_reads_what_its_neighbour_writes, "first to last") == expected
    for order in OTHER_ORDERS:
        assert result_of(_reads_what_its_neighbour_writes, order) != expected, order


def test_an_interruption_shows_a_race_that_no_order_of_whole_programs_does() -> None:
    for order in ("first to last", "last to first", "shuffled"):
        assert result_of(_counts_without_an_atomic, order)[0] == PROGRAMS
    assert result_of(_counts_without_an_atomic, "interrupted")[0] < PROGRAMS


def test_every_program_runs_once_in_every_order() -> None:
    for order in ("first to last", *OTHER_ORDERS):
        assert result_of(_keeps_to_its_own, order) == [*range(PROGRAMS), 0], order


@dataclass(frozen=True)
class Case:
    dim: int
    adaptive: bool
    window: int = 3
    fused: bool = False
    reduced: bool = False
    beta: float = 1.0
    output: Literal["fresh", "x", "f"] = "fresh"
    indexed: bool = False
    dtype: torch.dtype = torch.float32
    history_dtype: torch.dtype | None = None
    regularization: Regularization = "scaled"
    seed: int = 0

    def __str__(self) -> str:
        launches = 1 if self.fused else 3 if self.reduced else 2
        return f"launches={launches},d={self.dim},{'adaptive' if self.adaptive else 'plain'}"


# One value for each branch of the kernels, both of "if" and of "else". A program of two launches holds up to 1024
# elements: 2500 are three programs a sample (one is neither its first, which keeps the books, nor its last), 1030 are
# two, 40 and 37 one; none is a multiple of what a program holds, nor of what a row is padded to. Where a sample has
# several programs, what might get in their way comes together: the adaptive rules, by which one program drops rows
# that the others read, with and without _reduce; an output over x or f, which others may still read; an index, by which
# a sample's place in the launch is not its place in the window. One launch has one program a sample: each branch once,
# at a size that costs milliseconds. Windows of 3, for which the system has a row too many; of 2 where it costs most.
CASES = (
    Case(dim=2500, adaptive=True, window=2, seed=1),
    Case(dim=1030, adaptive=True, reduced=True, beta=0.6, output="x", indexed=True, seed=2),
    Case(dim=1030, adaptive=False, reduced=True, beta=0.6, output="f", history_dtype=torch.bfloat16, seed=3),
    Case(dim=40, adaptive=False, output="x", indexed=True, regularization="absolute", seed=4),
    Case(dim=37, adaptive=False, fused=True, beta=0.6, indexed=True, dtype=torch.float64, seed=5),
    Case(dim=37, adaptive=True, fused=True, output="x", history_dtype=torch.bfloat16, seed=6),
)

STEPS = 6  # twice around a ring of 3
CONVERGES, BAD_ONCE, BAD_TWICE, STALLS = range(4)
ABSENT = {0: STALLS, 3: BAD_ONCE}  # where there is an index: step -> who does not take it


def sequence(case: Case) -> tuple[Tensor, Tensor]:
    """Iterates and values that no map connects, (STEPS, 4, d) each, of four samples that meet everything on the way."""
    generator = torch.Generator().manual_seed(case.seed)
    X, G = torch.randn(2, STEPS, 4, case.dim, generator=generator, dtype=torch.float64)
    # Two long rows that promise a step which the third does not keep: an adaptive window drops them.
    u, *e = torch.linalg.qr(torch.randn(case.dim, 4, generator=generator, dtype=torch.float64)).Q.T
    G[:3, CONVERGES] = case.dim**0.5 * torch.stack([2**0.5 * e[0] + 8 * u, 2**0.5 * e[1] - 8 * u, e[2]])
    G[3:, CONVERGES] *= 1e-6
    F = X + G
    F[1, BAD_ONCE, -1] = torch.nan
    F[2:4, BAD_TWICE, 0] = torch.nan
    return X.to(case.dtype), F.to(case.dtype)


def bits(tensor: Tensor) -> Tensor:
    """NaN is as good as any other: (bytes,)."""
    return tensor.contiguous().flatten().view(torch.uint8).clone()


def solve(case: Case, order: Order) -> tuple[AndersonWindow, list[dict[str, Tensor]]]:
    """All steps: the window, and the bits of everything after each."""
    X, F = sequence(case)
    window = AndersonWindow(
        *(4, case.dim, case.window, case.beta),
        device="cpu",
        dtype=case.dtype,
        history_dtype=case.history_dtype,
        backend="triton",
        regularization=case.regularization,
        tol=1e-4,
        adaptive=case.adaptive,
        patience=STALL + 2,
    )
    window._backend = TritonBackend(
        largest_fused=None if case.fused else 0, **({"reduce_blocks": 1} if case.reduced else {})
    )
    state = window._state
    # The padding of the rows too; what has not been written is NaN.
    history = torch.empty(0, dtype=torch.uint8).set_(state.G.untyped_storage()).fill_(255)
    # As if it had gone on for a while: what takes STALL steps comes within these.
    state.carried[STALLS, 0, [Carried.LOWEST, Carried.STALLED, Carried.HELD]] = torch.tensor(
        [0.5, STALL - 3, STALL - 3], dtype=torch.float64
    )
    after = []
    with programs_run(order, case.seed):
        for k, (x, fx) in enumerate(zip(X, F, strict=True)):
            index = None
            if case.indexed:
                index = torch.tensor([sample for sample in (2, 0, 3, 1) if sample != ABSENT.get(k)])
                x, fx = x[index], fx[index]
            x_next = window.step(x, fx, out={"fresh": None, "x": x, "f": fx}[case.output], index=index)
            everything = {field.name: getattr(state, field.name) for field in fields(state)}
            tensors = {name: value for name, value in everything.items() if isinstance(value, Tensor)}
            tensors |= {"x_next": x_next, "history": history}
            after.append({name: bits(tensor) for name, tensor in tensors.items()})
    return window, after


@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_in_any_order_give_the_same_bits(case: Case) -> None:
    window, expected = solve(case, "first to last")
    ends = [Outcome.CONVERGED, Outcome.MAX_ITER, Outcome.NON_FINITE, Outcome.DIVERGED]
    assert window.outcome.tolist() == ends, "a branch was not taken"
    assert window.fallbacks.tolist() == [0, 1, 1, 0]
    assert window.restarts.tolist() == [0, 0, 0, int(case.adaptive)]
    third = expected[2]["row_residual"].view(window.residual.dtype).view(4, case.window)
    assert bool((third[CONVERGES] < 0).any()) == case.adaptive, "rows are dropped"
    for order in OTHER_ORDERS:
        _, after = solve(case, order)
        differ = [
            (k, name)
            for k in range(STEPS)
            for name in expected[k]
            if not torch.equal(after[k][name], expected[k][name])
        ]
        assert differ == [], order


def test_a_residual_in_any_order_has_the_same_bits() -> None:
    X, F = sequence(CASES[0])
    norms = []
    for order in ("first to last", *OTHER_ORDERS):
        with programs_run(order):
            norms.append(bits(residual_norm(X[1], F[1], backend="triton")))
    assert all(torch.equal(norm, norms[0]) for norm in norms)
