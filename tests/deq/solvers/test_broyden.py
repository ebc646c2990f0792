"""Broyden's method: the matrix that its docstring says, and a memory that may fill up."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from benchmarks.problems import affine
from deq.solvers import Broyden

Map = Callable[[Tensor], Tensor]


def dense_broyden_iterates(f: Map, x: Tensor, memory: int, steps: int) -> list[Tensor]:
    """The iterates of one sample, (d,) float64 each, by the matrix B itself."""
    S: list[Tensor] = []
    Y: list[Tensor] = []
    iterates, g, length = [x], f(x) - x, 0.0
    for _ in range(steps):
        B = -torch.eye(len(x), dtype=x.dtype)
        if S:
            rows, changes = torch.stack(S, dim=1), torch.stack(Y, dim=1)
            B = B + (changes + rows) @ torch.linalg.pinv(rows)  # (S^T S)^-1 S^T
        p = -torch.linalg.solve(B, g)
        p = p * min(1.0, max(length, g.norm().item()) / p.norm().item())
        x_next = x + p
        g_next = f(x_next) - x_next
        if len(S) == memory:
            S, Y = [], []
        S.append(x_next - x)
        Y.append(g_next - g)
        x, g, length = x_next, g_next, p.norm().item()
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 20])
def test_the_iterates_are_those_of_the_dense_matrix(memory: int) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(12, 12, generator=generator, dtype=torch.float64) * 0.3
    b = torch.randn(3, 12, generator=generator, dtype=torch.float64)

    def f(z: Tensor, b: Tensor = b) -> Tensor:
        return torch.tanh(z @ A) + b

    seen: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return f(z)

    Broyden(memory=memory, tol=0.0, max_iter=9).solve(watched, torch.zeros_like(b))
    for sample in range(3):
        expected = dense_broyden_iterates(lambda z, s=sample: f(z, b[s]), torch.zeros(12).double(), memory, 8)  # type: ignore[misc]
        for number, z in enumerate(expected):
            torch.testing.assert_close(seen[number][sample], z, rtol=1e-6, atol=1e-8)


def test_in_one_dimension_it_is_the_secant_method() -> None:
    seen: list[float] = []

    def watched(z: Tensor) -> Tensor:
        seen.append(float(z))
        return torch.cos(z)

    Broyden(tol=1e-14, max_iter=6).solve(watched, torch.full((1, 1), 0.5, dtype=torch.float64))

    def g(z: float) -> float:
        return float(torch.cos(torch.tensor(z, dtype=torch.float64))) - z

    for before, here, after in zip(seen, seen[1:], seen[2:], strict=False):
        assert after == pytest.approx(here - g(here) * (here - before) / (g(here) - g(before)), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [2, 5, 10])
def test_a_memory_that_is_full_loses_no_sample(memory: int, dtype: torch.dtype) -> None:
    # Dropping the oldest term out of a product of rank-one terms, as was done, left most of these unsolved for ever.
    f = affine(0.9, lowest=-0.9, batch=16).to(dtype)
    solution = Broyden(memory=memory, tol=1e-6, max_iter=120).solve(f, f.zero)
    assert solution.converged.all()
    assert solution.evaluations < {2: 70, 5: 45, 10: 40}[memory]


def test_with_a_pair_for_each_dimension_a_linear_map_is_solved_exactly() -> None:
    f = affine(0.8, lowest=-0.8, batch=3, dim=6)
    solution = Broyden(memory=6, tol=1e-9, max_iter=20).solve(f, f.zero)
    assert solution.converged.all()
    assert solution.evaluations <= 6 + 2


def test_a_map_without_slope_against_the_step_is_answered_by_plain_steps() -> None:
    # A quarter turn about 1: the change of g along a step s is -s plus a vector orthogonal to it; a half turn of
    # the residual, z + 1, has none at all.
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    found = Broyden(tol=1e-5, max_iter=20).solve(lambda z: (z - 1) @ turn + 1, torch.zeros(1, 2))
    assert found.converged.all()
    lost = Broyden(tol=1e-5, max_iter=20).solve(lambda z: z + 1, torch.zeros(1, 2))
    assert not lost.converged.any()
    assert torch.isfinite(lost.z).all()


def test_no_step_is_longer_than_the_last_or_than_the_residual() -> None:
    f = affine(0.99, batch=8)
    seen: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return f(z)

    Broyden(tol=0.0, max_iter=30).solve(watched, f.zero)
    last = torch.zeros(8).double()
    for here, after in pairwise(seen):
        step = (after - here).norm(dim=1)
        assert (step <= torch.maximum(last, (f(here) - here).norm(dim=1)) * (1 + 1e-9)).all()
        last = step
