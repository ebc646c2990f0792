"""The speedup probe."""

from __future__ import annotations

import copy

import pytest
import torch

from deq.layer import JacobianFree
from deq.measure.probe import Comparison, Reading, SpeedupProbe
from deq.models import EquilibriumClassifier
from deq.records.errors import UserError
from deq.solvers import Anderson, Solver


def model(solver: Solver) -> EquilibriumClassifier:
    torch.manual_seed(0)
    return EquilibriumClassifier(
        1, 8, 10, solver=solver, gradient=JacobianFree(), channels=8, inner=16, groups=4, pool=2
    )


IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_both_solves_are_counted_timed_and_compared() -> None:
    comparison = SpeedupProbe(max_iter=200).compare(model(Anderson(tol=1e-4, max_iter=50)), IMAGES)
    metrics = comparison.metrics()
    assert comparison.forward.residual <= 1e-4
    assert comparison.solver.residual <= 1e-4
    assert metrics["speedup/evaluations"] == comparison.forward.evaluations / comparison.solver.evaluations
    assert metrics["speedup/evaluations"] > 1
    for reading in (comparison.forward, comparison.solver):
        assert reading.seconds is not None
        assert reading.spread is not None
        assert reading.spread[0] <= reading.seconds <= reading.spread[1]
    assert metrics["speedup/solver"] == pytest.approx(metrics["speedup/forward_s"] / metrics["speedup/solver_s"])


def test_a_solve_that_does_not_get_to_tol_is_never_a_number() -> None:
    comparison = SpeedupProbe(max_iter=3).compare(model(Anderson(tol=1e-6)), IMAGES)
    assert comparison.forward.seconds is None
    assert set(comparison.metrics()) == {"speedup/forward_residual", "speedup/solver_residual"}
    assert comparison.metrics()["speedup/forward_residual"] > 1e-6


def test_one_side_alone_gives_its_own_numbers_and_no_ratio() -> None:
    comparison = Comparison(forward=Reading(100, 0.2, None), solver=Reading(10, 0.001, 0.5))
    assert set(comparison.metrics()) == {
        "speedup/forward_residual",
        "speedup/solver_residual",
        "speedup/solver_evaluations",
        "speedup/solver_s",
    }


def test_probe_has_a_cap_of_its_own() -> None:
    tight = model(Anderson(tol=1e-4, max_iter=1))
    assert SpeedupProbe(max_iter=200).compare(tight, IMAGES).solver.seconds is not None


def test_probe_leaves_training_as_it_was() -> None:
    network = model(Anderson(tol=1e-3)).train()
    network(IMAGES)
    before, account = copy.deepcopy(network.state_dict()), network.deq.last_solution
    rng = torch.get_rng_state()
    SpeedupProbe().compare(network, IMAGES)
    assert network.training
    assert network.deq.last_solution is account
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"probe.repeats must be an integer of at least 1, got 0"):
        SpeedupProbe(repeats=0)
