"""The tutorial's solvers and layer: the same fixed points and gradients, by its own loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.problems import affine
from deq import DEQ
from deq.layer import Implicit, JacobianFree
from deq.models import EquilibriumClassifier
from deq.models.tutorial import TutorialAnderson, TutorialDEQ, TutorialForward, TutorialSolver
from deq.solvers import Anderson, Forward, Solver
from deq.training.interrupt import SignalWatch
from tests.deq.training.test_training import trainer

SOLVERS = [TutorialForward(tol=1e-5, max_iter=300), TutorialAnderson(tol=1e-5, max_iter=300)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_they_solve_and_stop_at_one_residual_of_the_whole_batch(solver: TutorialSolver) -> None:
    problem = affine(0.8).to(torch.float64)
    solution = solver.solve(problem, problem.zero, trace=True)
    assert solver.stopping_residual(solution) < 1e-5
    torch.testing.assert_close(solution.z, problem.solution(), rtol=1e-3, atol=1e-3)
    assert solution.trace is not None
    assert len(solution.trace) == solution.evaluations
    assert solution.sample_evaluations == 4 * solution.evaluations
    short = type(solver)(tol=1e-5, max_iter=7).solve(problem, problem.zero)
    assert short.evaluations == 7
    assert short.outcomes == {"max_iter": 4}


def test_forward_iteration_takes_as_many_evaluations_as_this_project_does_for_one_sample() -> None:
    problem = affine(0.8, batch=1)
    theirs = TutorialForward(tol=1e-5, max_iter=300).solve(problem, problem.zero)
    ours = Forward(tol=1e-5, max_iter=300).solve(problem, problem.zero)
    assert theirs.evaluations == ours.evaluations
    # It hands on f of the iterate whose residual it has read.
    torch.testing.assert_close(theirs.z, problem(ours.z))


def test_the_iterates_of_anderson_are_those_of_an_absolute_ridge() -> None:
    problem = affine(0.9, batch=1)
    theirs = TutorialAnderson(window=4, ridge=1e-4, tol=0.0, max_iter=12).solve(problem, problem.zero, trace=True)
    ours = Anderson(window=4, regularization="absolute", ridge=1e-4, tol=0.0, max_iter=12)
    expected = ours.solve(problem, problem.zero, trace=True)
    assert theirs.trace is not None
    assert expected.trace is not None
    torch.testing.assert_close(theirs.trace, expected.trace, rtol=1e-6, atol=0)


def test_the_layer_has_the_gradient_of_this_projects_layer() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 6).double()
    x = torch.randn(3, 6, dtype=torch.float64)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * linear(z) + x)

    def gradients(layer: DEQ) -> list[Tensor]:
        given = x.clone().requires_grad_()
        loss = layer(given).square().sum()
        return list(torch.autograd.grad(loss, [given, *linear.parameters()]))

    tight = {"tol": 1e-10, "max_iter": 200}
    layer = TutorialDEQ(cell, TutorialForward(**tight))  # type: ignore[arg-type]
    theirs = gradients(layer)
    ours = gradients(DEQ(cell, Forward(**tight), Implicit(Forward(**tight))))  # type: ignore[arg-type]
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert layer.last_adjoint is not None
    assert TutorialForward(**tight).stopping_residual(layer.last_adjoint) < 1e-10  # type: ignore[arg-type]


def test_it_evaluates_the_cell_twice_more_than_its_solver_says() -> None:
    calls = 0

    def cell(z: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.5 * z + x

    layer = TutorialDEQ(cell, TutorialForward(tol=1e-3))
    layer(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert layer.last_solution is not None
    assert calls == layer.last_solution.evaluations + 2


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_classifier_with_a_solver_of_the_tutorial_has_its_layer_and_trains(solver: Solver, tmp_path: Path) -> None:
    run = trainer(tmp_path, solver=replace(solver, tol=1e-2, max_iter=30), epochs=1)  # type: ignore[type-var]
    assert isinstance(run.model.deq, TutorialDEQ)
    summary = run.run()
    assert 0 < summary["train/loss"] < 3
    assert summary["solver/backward_evaluations"] > 1
    calls = []
    hook = run.model.deq.cell.register_forward_hook(lambda module, given, result: calls.append(len(result)))
    before = run.position.test_sample_evaluations
    run._evaluate(SignalWatch())
    hook.remove()
    # One evaluation more a sample than the solves took.
    assert run.position.test_sample_evaluations - before == sum(calls)


def test_the_probe_holds_forward_iteration_of_the_tutorial_against_it(tmp_path: Path) -> None:
    """Both stop at one residual of the whole batch; to bring every sample to tol takes longer."""
    run = trainer(tmp_path, solver=TutorialForward(tol=1e-2, max_iter=60), epochs=1)
    summary = run.run()
    assert summary["speedup/evaluations"] == 1


def test_what_the_tutorial_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="implicit gradient alone, got JacobianFree"):
        TutorialDEQ(torch.add, TutorialForward(), JacobianFree())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither cuda_graph=true"):
        EquilibriumClassifier(1, 8, 10, solver=TutorialForward(), gradient=Implicit(), cuda_graph=True)
    layer = TutorialDEQ(lambda z, x: 0.5 * z + x, TutorialForward())
    with pytest.raises(ValueError, match="leave z0 out"):
        layer(torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="leave stability out"):
        layer.equilibrium(torch.ones(1, 1))
    with pytest.raises(ValueError, match="leave states_at out"):
        TutorialForward().solve(torch.cos, torch.zeros(1, 1), states_at=(1,))
    with pytest.raises(ValueError, match="use cuda_graph=False"):
        TutorialForward().start(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="window must be at least 2, got 1"):
        TutorialAnderson(window=1)
    with pytest.raises(ValueError, match=r"beta must be above 0 and at most 1, got 1\.5"):
        TutorialAnderson(beta=1.5)
    with pytest.raises(ValueError, match=r"ridge must be at least 0, got -1"):
        TutorialAnderson(ridge=-1.0)
