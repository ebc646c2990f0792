"""What CONTRIBUTING.md promises: a new solver is one file and one YAML, and has all that the others have."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from deq import DEQ, Implicit
from deq.measure.crossover import named
from deq.solvers import Solver
from tests.test_train import train

SOLVER = '''
"""The heavy ball: forward iteration with a share of the step before (Polyak 1964)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deq.solvers import Solver
from deq.solvers.iteration import Books


@dataclass(frozen=True, kw_only=True)
class HeavyBall(Solver):
    """``x_next = x + beta (f(x) - x) + momentum (x - x_before)``."""

    beta: float = 1.0
    momentum: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum!r}")

    def start(self, x: Tensor, *, in_place: bool = False) -> HeavyBallIteration:
        return HeavyBallIteration(x, self)


class HeavyBallIteration(Books):
    def __init__(self, x: Tensor, solver: HeavyBall) -> None:
        super().__init__(x, solver)
        self.beta, self.momentum = solver.beta, solver.momentum
        self.evaluated = x.clone()

    def step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        part = slice(None) if index is None else index
        frozen = self.enter(x, fx, index)
        moved = x + self.beta * (fx - x) + self.momentum * (x - self.evaluated[part])
        self.evaluated[part] = x
        return torch.where(frozen[:, None], x, moved, out=x)

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.evaluated, self.residual
'''

CONFIG = """
_target_: heavy_ball.HeavyBall
beta: ${beta}
momentum: 0.2
tol: ${tol}
max_iter: ${max_iter}
stop: ${stop}
compact: ${compact}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "heavy_ball.py").write_text(SOLVER)
    (tmp_path / "conf/solver").mkdir(parents=True)
    (tmp_path / "conf/solver/heavy_ball.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def solver(folder: Path) -> Solver:
    spec = importlib.util.spec_from_file_location("heavy_ball", folder / "heavy_ball.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["heavy_ball"] = module
    spec.loader.exec_module(module)
    made = module.HeavyBall(tol=1e-6, max_iter=200)
    assert isinstance(made, Solver)
    return made


def test_it_trains_is_measured_and_checked_from_the_command_line(folder: Path) -> None:
    here = {"folder": folder, "PYTHONPATH": f"{folder}:{Path(__file__).parent.parent}"}
    asked = ("--config-dir", "conf", "solver=heavy_ball", "experiment=smoke")
    run = train(*asked, "solver.momentum=0.1", "hydra.run.dir=run", **here)
    assert run.returncode == 0, run.stderr
    assert "HeavyBall: tol=0.01 max_iter=30 stop=max beta=1.0 momentum=0.1" in run.stdout
    traces = json.loads((folder / "run/traces.json").read_text())["traces"]
    assert [trace["solver"] for trace in traces] == ["forward iteration", "HeavyBall"]
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["solver/unconverged_fraction"] < 0.1
    assert summary["speedup/solver_residual"] <= 0.01

    refused = train(*asked, "solver.momentum=2", **here)
    assert (refused.returncode, refused.stderr) == (2, "error: momentum must be at least 0 and below 1, got 2\n")


def test_its_samples_stop_one_by_one_and_shrink_the_evaluations(solver: Solver) -> None:
    slopes = torch.tensor([[0.1], [0.5], [0.8], [0.9]], dtype=torch.float64)
    sizes: list[int] = []

    def restricted(index: Tensor) -> object:
        def f(z: Tensor) -> Tensor:
            sizes.append(len(z))
            return slopes[index] * z + 1

        return f

    start = torch.zeros(4, 3, dtype=torch.float64)
    solution = solver.solve(lambda z: slopes * z + 1, start)
    assert solution.outcomes == {"converged": 4}
    assert solution.iterations.tolist() == sorted(solution.iterations.tolist())
    torch.testing.assert_close(solution.z, (1 / (1 - slopes)).expand(4, 3), rtol=1e-4, atol=0.0)
    compacted = replace(solver, compact=True).solve(lambda z: slopes * z + 1, start, restrict=restricted)  # type: ignore[arg-type]
    assert torch.equal(compacted.z, solution.z)
    assert 1 in sizes


def test_it_solves_both_equations_of_a_layer(solver: Solver) -> None:
    weight = torch.randn(5, 5, dtype=torch.float64) / 10
    layer = DEQ(lambda z, x: torch.tanh(z @ weight + x), solver=solver, gradient=Implicit(solver=solver))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-4)
    assert named(solver) == "HeavyBall"
