"""Why each sample of a solve stopped, and what becomes of samples that cannot be solved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.problems import affine
from benchmarks.robustness import rotations, with_spectrum
from deq.solvers import Anderson, Broyden, Forward, Outcome, Solver

SOLVERS = [
    Anderson(tol=1e-4),
    Anderson(tol=1e-4, backend="torch"),
    Anderson(tol=1e-4, adaptive=False),
    Forward(tol=1e-4),
    Broyden(tol=1e-4),
]
each_solver = pytest.mark.parametrize(
    "solver", SOLVERS, ids=["anderson", "anderson, torch", "plain anderson", "forward", "broyden"]
)


def nowhere(z: Tensor) -> Tensor:
    """As good as random numbers: no solver comes nearer than chance."""
    return 1 + 3 * torch.sin(1e4 * z + torch.arange(z.shape[1]))


def of_three_kinds(z: Tensor) -> Tensor:
    """One sample that converges, one that is NaN, one that comes no nearer."""
    return torch.cat([0.1 * z[:1] + 1, z[1:2] * torch.nan, nowhere(z[2:])])


START = torch.full((3, 40), 0.3)


@each_solver
def test_every_sample_says_why_it_stopped(solver: Solver) -> None:
    solution = replace(solver, max_iter=100).solve(of_three_kinds, START)
    assert [Outcome(code).name for code in solution.outcome.tolist()] == ["CONVERGED", "NON_FINITE", "DIVERGED"]
    assert solution.outcomes == {"converged": 1, "non_finite": 1, "diverged": 1}
    assert "1 of 3 converged, 1 non_finite, 1 diverged" in repr(solution)
    assert solution.evaluations < 100
    assert solution.z[[0, 2]].isfinite().all()
    early = replace(solver, max_iter=3).solve(affine(0.99), affine(0.99).zero)
    assert early.outcomes == {"max_iter": 4}
    assert "4 at max_iter" in repr(early)


@each_solver
def test_a_sample_that_comes_no_nearer_is_given_up_and_no_other(solver: Solver) -> None:
    start = START[:2]
    patient = replace(solver, max_iter=200)

    def f(z: Tensor) -> Tensor:
        return torch.cat([nowhere(z[:1]), 0.97 * z[1:] + 0.01])

    solution = patient.solve(f, start)
    assert solution.outcome[0] == Outcome.DIVERGED
    assert solution.iterations[0] < 100
    alone = patient.solve(lambda z: 0.97 * z + 0.01, start[1:])
    assert torch.equal(solution.z[1], alone.z[0])
    assert solution.outcome[1] == alone.outcome[0] != Outcome.DIVERGED
    endless = replace(patient, patience=0).solve(f, start)
    assert endless.evaluations == 200
    assert endless.outcome[0] == Outcome.STAGNATED


@each_solver
def test_under_the_mean_test_a_sample_above_tol_says_so(solver: Solver) -> None:
    # Nine samples are there at the second step, so that the tenth may be ten times as far away; the last never is.
    f = affine(0.9, batch=11, dim=20)
    slopes = torch.tensor([[0.0]] * 9 + [[0.9], [0.0]], dtype=torch.float64)

    mean = replace(solver, stop="mean", tol=1e-3, max_iter=400)

    solution = mean.solve(lambda z: slopes[:10] * z.sin() + f.b[:10], f.zero[:10])
    met = float(solution.residual[9]) > 1e-3
    assert met or not isinstance(solver, Forward)
    assert solution.outcome.tolist() == [Outcome.CONVERGED] * 9 + [Outcome.MEAN_MET if met else Outcome.CONVERGED]
    assert mean.stopping_residual(solution) <= 1e-3

    def with_one_that_never_is(z: Tensor) -> Tensor:
        return torch.cat([(slopes * z.sin() + f.b)[:10], nowhere(z[10:])])

    solution = mean.solve(with_one_that_never_is, f.zero)
    assert solution.outcomes == {"converged": 10, "diverged": 1}
    assert mean.stopping_residual(solution) <= 1e-3 < solution.residual.mean()


@pytest.mark.parametrize("radius", [1.0, 1.2, 1.5])
def test_rotations_that_forward_iteration_never_solves_are_solved(radius: float) -> None:
    A = rotations(32, radius)
    b = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = Anderson(tol=1e-6, max_iter=300).solve(lambda z: z @ A + b, torch.zeros_like(b))
    assert solution.converged.all(), solution
    forward = Forward(tol=1e-6, max_iter=300).solve(lambda z: z @ A + b, torch.zeros_like(b))
    assert not forward.converged.any()
    assert set(forward.outcomes) == {"diverged"}


@pytest.mark.parametrize(("lowest", "highest"), [(-0.9, 0.9), (-0.99, 0.99), (0.0, 0.99), (-0.95, 0.0), (-3.0, 0.5)])
def test_adaptive_windows_do_not_lose_to_plain_ones(lowest: float, highest: float) -> None:
    A = with_spectrum(torch.linspace(lowest, highest, 100, dtype=torch.float64))
    b = torch.randn(16, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def evaluations(solver: Solver) -> float:
        solution = solver.solve(lambda z: z @ A + b, torch.zeros_like(b))
        assert solution.converged.all() or not solver.adaptive
        return float(solution.iterations.double().mean())

    for tol in (1e-3, 1e-6):
        adaptive = evaluations(Anderson(adaptive=True, tol=tol, max_iter=1000))
        plain = min(
            evaluations(Anderson(window=m, adaptive=False, patience=0, tol=tol, max_iter=1000)) for m in (2, 5, 10)
        )
        assert adaptive <= 1.1 * plain + 0.5, (tol, adaptive, plain)


def test_restarts_and_fallbacks_are_counted_sample_by_sample() -> None:
    solution = Anderson(tol=1e-4, max_iter=60).solve(of_three_kinds, START)
    assert solution.restarts[2] > 0, "forward steps out of the stall"
    assert solution.restarts[0] == 0
    # The sample that is NaN has nothing to fall back to.
    assert solution.fallbacks.tolist()[:2] == [0, 0]

    def nan_once(z: Tensor) -> Tensor:
        evaluations.append(len(z))
        return z.cos() * (torch.nan if len(evaluations) == 3 else 1.0)

    evaluations: list[int] = []
    assert Anderson(tol=1e-4).solve(nan_once, START).fallbacks.tolist() == [1, 1, 1]
    assert Anderson(tol=1e-4, adaptive=False).solve(nowhere, START[:1]).restarts.tolist() == [0]
    memory = Broyden(tol=1e-9, memory=3, max_iter=200).solve(affine(0.9), affine(0.9).zero)
    assert (memory.restarts > 0).all()


@pytest.mark.parametrize("patience", [-1, 1.5, True])
def test_other_patience_is_refused(patience: object) -> None:
    with pytest.raises(ValueError, match="patience must be a whole number of evaluations, at least 0"):
        Forward(patience=patience)  # type: ignore[arg-type]
