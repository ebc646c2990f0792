"""What holds for every solver and every batch: samples stand alone, scale does not matter, a solution is a solution.

The map works element by element, so that no bit of it depends on the batch: what differs is the solver's doing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deq.kernels import native_backend
from deq.solvers import Anderson, Broyden, Forward, Solution, Solver

NO_COMPILER = native_backend.obstacle(torch.float32)
SOLVERS: dict[str, Solver] = {
    "anderson_torch": Anderson(backend="torch"),
    "anderson_native": Anderson(backend="native"),
    "anderson_plain": Anderson(adaptive=False),
    "forward": Forward(),
    "broyden": Broyden(),
}
each_solver = pytest.mark.parametrize(
    "solver",
    [
        pytest.param(
            solver,
            id=name,
            marks=pytest.mark.skipif(name == "anderson_native" and bool(NO_COMPILER), reason=NO_COMPILER or "runs"),
        )
        for name, solver in SOLVERS.items()
    ],
)
quickly = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Elementwise:
    """f(z) = unit (slope sin(z / unit) + shift), z (B, d): a contraction where slopes are below 1."""

    slope: Tensor
    shift: Tensor
    unit: float = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        return self.unit * (self.slope * torch.sin(z / self.unit) + self.shift)

    def of(self, samples: Any) -> Elementwise:
        return replace(self, slope=self.slope[samples], shift=self.shift[samples])

    @property
    def zero(self) -> Tensor:
        return torch.zeros_like(self.shift)


@st.composite
def maps(draw: st.DrawFn) -> Elementwise:
    """Of a few samples, from easy to hard, one of them perhaps solved at the start."""
    batch, dim = draw(st.integers(1, 6)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    steepest = draw(st.sampled_from([0.3, 0.9, 0.98]))
    slope = steepest * (2 * torch.rand(batch, dim, generator=generator, dtype=dtype) - 1)
    shift = torch.randn(batch, dim, generator=generator, dtype=dtype)
    if draw(st.booleans()):
        shift[draw(st.integers(0, batch - 1))] = 0.0
    return Elementwise(slope, shift)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {"tol": draw(st.sampled_from([1e-2, 1e-4])), "max_iter": draw(st.sampled_from([3, 20, 80]))}


def equal(one: Solution, other: Solution, samples: Any = slice(None), scale: float = 1.0) -> None:
    """The bits of ``one`` are those of these samples of ``other``, times ``scale``."""
    assert torch.equal(one.z, scale * other.z[samples])
    for name in ("residual", "iterations", "converged", "outcome", "restarts", "fallbacks"):
        assert torch.equal(getattr(one, name), getattr(other, name)[samples]), name


@each_solver
@quickly
@given(f=maps(), options=options(), data=st.data())
def test_permuting_the_batch_permutes_the_answer(
    solver: Solver, f: Elementwise, options: dict[str, Any], data: st.DataObject
) -> None:
    solver = replace(solver, **options)
    order = data.draw(st.permutations(range(len(f.shift))))
    permuted = f.of(order)
    equal(solver.solve(permuted, permuted.zero), solver.solve(f, f.zero), order)


@each_solver
@quickly
@given(f=maps(), options=options(), data=st.data())
def test_splitting_a_batch_gives_the_same_answers(
    solver: Solver, f: Elementwise, options: dict[str, Any], data: st.DataObject
) -> None:
    solver = replace(solver, **options)
    whole = solver.solve(f, f.zero)
    cut = data.draw(st.integers(0, len(f.shift)))
    for samples in (range(cut), range(cut, len(f.shift))):
        if samples:
            part = f.of(list(samples))
            equal(solver.solve(part, part.zero), whole, list(samples))


@each_solver
@quickly
@given(f=maps(), options=options(), exponent=st.integers(-30, 30))
def test_rescaling_the_space_of_f_by_a_power_of_two_rescales_the_answer(
    solver: Solver, f: Elementwise, options: dict[str, Any], exponent: int
) -> None:
    solver = replace(solver, **options)
    scaled = replace(f, unit=2.0**exponent)
    equal(solver.solve(scaled, scaled.zero), solver.solve(f, f.zero), scale=2.0**exponent)


@each_solver
@quickly
@given(f=maps(), options=options())
def test_restarting_from_the_solution_stops_at_once(solver: Solver, f: Elementwise, options: dict[str, Any]) -> None:
    solver = replace(solver, **options)
    solution = solver.solve(f, f.zero)
    assume(bool(solution.converged.all()))
    again = solver.solve(f, solution.z)
    assert again.evaluations == 1
    assert torch.equal(again.z, solution.z)
    assert torch.equal(again.residual, solution.residual)


@each_solver
@quickly
@given(f=maps(), options=options())
def test_a_solve_repeats_to_the_bit(solver: Solver, f: Elementwise, options: dict[str, Any]) -> None:
    solver = replace(solver, **options)
    first, second = solver.solve(f, f.zero, trace=True), solver.solve(f, f.zero, trace=True)
    equal(first, second)
    assert first.trace is not None
    assert second.trace is not None
    assert torch.equal(first.trace, second.trace)


def test_what_splitting_is_held_to_sees_a_solver_that_mixes_samples() -> None:
    # The control: a map that mixes them does give another answer.
    f = Elementwise(torch.full((2, 3), 0.5), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    mixed = Forward().solve(lambda z: f(z) + 0.1 * z.mean(dim=0), f.zero)
    with pytest.raises(AssertionError):
        equal(Forward().solve(f.of([0]), f.of([0]).zero), mixed, [0])
