"""The stopping test: relative and absolute, solutions that are zero, numbers of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deq import DEQ
from deq.kernels import AndersonWindow, residual_norm
from deq.models.tutorial import TutorialForward
from deq.solvers import Anderson, Broyden, Forward, Solver
from tests.conftest import BACKENDS, KERNEL_DEVICE

D = torch.float64
KINDS = (Anderson, Broyden, Forward)
TURN = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=D)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["max", "mean"])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_a_solution_of_zero_is_found_with_an_absolute_tolerance(kind: type[Solver], stop: str, scale: float) -> None:
    solver = kind(tol=1e-3, atol=1e-8 * scale, max_iter=200, stop=stop)  # type: ignore[arg-type]
    solution = solver.solve(lambda z: 0.7 * z @ TURN, scale * torch.ones(8, 2, dtype=D))
    assert solution.converged.all()
    g, f = (0.7 * solution.z @ TURN - solution.z).norm(dim=1), (0.7 * solution.z @ TURN).norm(dim=1)
    assert (g <= 1e-3 * f + 1e-8 * scale * (1 + 1e-9)).all()
    torch.testing.assert_close(solution.residual, g / (f + 1e-8 * scale / 1e-3), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_sample_on_its_way_to_zero_is_not_given_up(adaptive: bool) -> None:
    turns = torch.block_diag(*[0.95 * TURN] * 8)  # more planes than a window has rows
    for solver in (Forward(max_iter=60), Anderson(window=2, max_iter=60, adaptive=adaptive)):
        solution = solver.solve(lambda z: z @ turns, torch.randn(4, 16, dtype=D))
        assert set(solution.outcomes) <= {"max_iter", "converged"}, solution


def test_one_that_circles_still_is() -> None:
    solution = Forward(max_iter=60).solve(lambda z: z @ TURN, torch.ones(4, 2, dtype=D))
    assert solution.outcomes == {"diverged": 4}
    growing = Forward(max_iter=60).solve(lambda z: 1.1 * z @ TURN, torch.ones(4, 2, dtype=D))
    assert growing.outcomes == {"diverged": 4}


def test_without_an_absolute_tolerance_nothing_is_added() -> None:
    x, fx = torch.randn(3, 5), torch.randn(3, 5)
    expected = (fx - x).norm(dim=1) / fx.norm(dim=1)
    torch.testing.assert_close(residual_norm(x, fx), expected)
    torch.testing.assert_close(residual_norm(x, fx, floor=2.0), (fx - x).norm(dim=1) / (fx.norm(dim=1) + 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adaptive", [True, False])
def test_every_backend_adds_the_same_floor(backend: str, adaptive: bool) -> None:
    device = KERNEL_DEVICE if backend == "triton" else "cpu"
    window = AndersonWindow(
        3,
        5,
        window=3,
        tol=1e-2,
        floor=0.5,
        adaptive=adaptive,
        backend=backend,
        device=device,  # type: ignore[arg-type]
    )
    x = torch.randn(3, 5, device=device)
    for _ in range(5):
        fx = 0.5 * x.tanh()
        expected = (fx - x).norm(dim=1) / (fx.norm(dim=1) + 0.5)
        moving = ~window.frozen
        x_next = window.step(x, fx)
        torch.testing.assert_close(window.residual[moving], expected[moving], rtol=1e-5, atol=1e-7)
        assert torch.equal(window.frozen[moving], expected[moving] <= 1e-2)
        x = x_next


def test_a_layer_with_a_solution_of_zero_has_its_gradient() -> None:
    x = torch.zeros(3, 4, dtype=D, requires_grad=True)
    layer = DEQ(lambda z, x: 0.5 * torch.sin(z) + x, Anderson(tol=1e-6, atol=1e-10, max_iter=100))
    z = layer(x, z0=torch.ones(3, 4, dtype=D))
    z.sum().backward()
    assert layer.last_solution is not None
    assert layer.last_solution.converged.all()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0), rtol=1e-5, atol=0)


# Options of every kind


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_numpy_are_numbers(kind: type[Solver]) -> None:
    solver = kind(
        tol=np.float32(0.25), max_iter=np.int64(50), patience=np.int32(7), check_every=np.int8(1), atol=np.float64(0.5)
    )
    assert solver == kind(tol=0.25, max_iter=50, patience=7, check_every=1, atol=0.5)
    assert "np." not in repr(solver)
    assert solver.solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3)).converged.all()


OPTIONS: list[tuple[type[Solver], dict[str, Any], str]] = [
    *((kind, {"tol": "1e-3"}, "tol must be finite and at least 0, got '1e-3'") for kind in KINDS),
    *((kind, {"tol": None}, "tol must be finite and at least 0, got None") for kind in KINDS),
    (Forward, {"tol": True}, "tol must be finite and at least 0, got True"),
    (Forward, {"tol": torch.tensor(1e-3)}, "tol must be finite"),
    (Forward, {"atol": -1.0}, "atol must be finite and at least 0, got -1.0"),
    (Forward, {"atol": "0"}, "atol must be finite and at least 0, got '0'"),
    (Forward, {"atol": float("inf")}, "atol must be finite"),
    (Forward, {"tol": 0.0, "atol": 1e-3}, "atol=0.001 needs a tol above 0, got 0: give tol=1e-12"),
    (Forward, {"max_iter": 50.0}, "max_iter must be a whole number of evaluations of f, got 50.0"),
    (Forward, {"max_iter": "50"}, "max_iter must be a whole number of evaluations of f, got '50'"),
    (Forward, {"beta": "1"}, "beta must be above 0 and at most 1, got '1'"),
    (Anderson, {"beta": None}, "beta must be above 0 and at most 1, got None"),
    (Anderson, {"ridge": "small"}, "ridge must be finite and at least 0, got 'small'"),
    (Anderson, {"window": 5.0}, "window must be a whole number of iterates, at least 1, got 5.0"),
    (Anderson, {"patience": "20"}, "patience must be a whole number of evaluations, at least 0, got '20'"),
    (TutorialForward, {"atol": 1e-6}, "TutorialForward knows no absolute tolerance, got atol=1e-06"),
    (Broyden, {"memory": "10"}, "memory must be a whole number of pairs of vectors, at least 1, got '10'"),
]


@pytest.mark.parametrize(("kind", "options", "message"), OPTIONS)
def test_other_options_are_refused_in_a_sentence(kind: type[Solver], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_floor_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floor must be finite and at least 0, got -1\.0"):
        AndersonWindow(2, 3, floor=-1.0)


def test_atol_is_a_knob() -> None:
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from tests.test_train import ROOT

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("config", ["solver.atol=1e-6"])
    assert instantiate(config.solver).atol == 1e-6
    assert instantiate(config.adjoint).atol == 0.0, "the adjoint's right side is brought to norm 1"


def of_zero(z: Tensor) -> Tensor:
    return 0.5 * z


@pytest.mark.parametrize("kind", KINDS)
def test_zero_from_zero_is_done_at_once(kind: type[Solver]) -> None:
    solution = kind().solve(of_zero, torch.zeros(2, 3))
    assert solution.converged.all()
    assert solution.evaluations == 1
