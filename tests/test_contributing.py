"""What CONTRIBUTING.md promises: a new solver or model is one file and one YAML, and has all that the others have."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.problems import affine
from deq import DEQ, Implicit, Phantom
from deq.cli.build import build_model
from deq.layer import Gradient
from deq.measure.crossover import named
from deq.models import EquilibriumModel
from deq.models.tutorial import TutorialAnderson
from deq.records.errors import UserError
from deq.solvers import Forward, Solver
from deq.solvers.captured import CapturedSolve
from deq.solvers.iteration import Books
from tests.deq.layer.test_graphs import every_backend_can_be_recorded  # noqa: F401
from tests.replay import ReplayingRecorder, triton_launches_are_recorded  # noqa: F401
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
        self.evaluated, self.velocity = x.clone(), torch.zeros_like(x)

    def step(self, x: Tensor, fx: Tensor, index: Tensor | None) -> Tensor:
        part = slice(None) if index is None else index
        frozen = self.enter(x, fx, index)
        self.velocity[part] = self.beta * (fx - x) + self.momentum * self.velocity[part]
        self.evaluated[part] = x
        return torch.where(frozen[:, None], x, x + self.velocity[part], out=x)

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.evaluated, self.residual

    def reset(self) -> None:
        super().reset()
        self.velocity.zero_()
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

MODEL = '''
"""Two scales: each sees the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from deq import DEQ
from deq.layer import Gradient
from deq.models import EquilibriumModel
from deq.solvers import Solver


class TwoScaleCell(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fine, self.coarse, self.down = (
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False) for stride in (1, 1, 2)
        )
        for convolution in (self.fine, self.coarse, self.down):
            nn.init.normal_(convolution.weight, std=0.01)

    def forward(self, z: dict[str, Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
        up = functional.interpolate(z["coarse"], scale_factor=2)
        fine = torch.tanh(self.fine(z["fine"]) + 0.3 * up + x["fine"])
        return {"fine": fine, "coarse": torch.tanh(self.coarse(z["coarse"]) + self.down(z["fine"]) + x["coarse"])}


class Head(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, classes)

    def forward(self, z: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.linear(torch.cat([z["fine"].mean((2, 3)), z["coarse"].mean((2, 3))], dim=1))
        return logits


class TwoScaleClassifier(EquilibriumModel):
    def __init__(
        self, image_channels: int, image_size: int, classes: int, *, solver: Solver, gradient: Gradient, channels: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.deq = DEQ(TwoScaleCell(channels), solver=solver, gradient=gradient)
        self.head = Head(channels, classes)

    def inject(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.stem(images)
        return {"fine": fine, "coarse": functional.avg_pool2d(fine, 2)}
'''

MODEL_CONFIG = """
_target_: two_scale.TwoScaleClassifier
_partial_: true
channels: 8
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "heavy_ball.py").write_text(SOLVER)
    (tmp_path / "conf/solver").mkdir(parents=True)
    (tmp_path / "conf/solver/heavy_ball.yaml").write_text(CONFIG)
    (tmp_path / "two_scale.py").write_text(MODEL)
    (tmp_path / "conf/model").mkdir()
    (tmp_path / "conf/model/two_scale.yaml").write_text(MODEL_CONFIG)
    return tmp_path


def asked(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:{Path(__file__).parent.parent}"
    return train("--config-dir", "conf", "experiment=smoke", *overrides, folder=folder, PYTHONPATH=path)


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


def test_a_new_solver_trains_is_measured_and_checked_from_the_command_line(folder: Path) -> None:
    run = asked(folder, "solver=heavy_ball", "solver.momentum=0.1", "hydra.run.dir=run")
    assert run.returncode == 0, run.stderr
    assert "HeavyBall: tol=0.01 max_iter=30 stop=max beta=1.0 momentum=0.1" in run.stdout
    traces = json.loads((folder / "run/traces.json").read_text())["traces"]
    assert [trace["solver"] for trace in traces] == ["forward iteration", "HeavyBall"]
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["solver/unconverged_fraction"] < 0.1
    assert summary["speedup/solver_residual"] <= 0.01

    refused = asked(folder, "solver=heavy_ball", "solver.momentum=2")
    assert (refused.returncode, refused.stderr) == (2, "error: momentum must be at least 0 and below 1, got 2\n")


@pytest.mark.parametrize(
    "knobs",
    [
        ("warm_start=true", "epochs=2", "max_steps=null", "compact=true", "data.train_size=64"),
        ("stability.jacobian_weight=0.1", "stability.corrections=[2,4]", "precision=bf16", "crossover.windows=[2]"),
    ],
)
def test_a_model_of_two_scales_trains_and_is_measured_as_any_other(folder: Path, knobs: tuple[str, ...]) -> None:
    run = asked(folder, "model=two_scale", *knobs, "hydra.run.dir=run")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    summary = json.loads((folder / "run/summary.json").read_text())
    assert {"speedup/forward_residual", "crossover/mixing_penalty", "energy/tflop", "test/accuracy"} <= summary.keys()
    assert summary["solver/forward_evaluations"] > 1


HEAD = "        self.head = Head(channels, classes)\n"
LAYER = "DEQ(TwoScaleCell(channels), solver=solver, gradient=gradient)"
MAKE = "make its layer with DEQ(cell, solver=solver, gradient=gradient)"
SLIPS = {
    "no head": (HEAD, "", "has no head: make self.head, a module from z* to logits, in its __init__"),
    "a function for a head": (
        HEAD,
        "        self.head = lambda z: z\n",
        ".head is a function: make self.head, a module from z* to logits, in its __init__",
    ),
    "no layer": (f"        self.deq = {LAYER}\n", "", "has no deq: make self.deq = DEQ(cell, solver=solver, gradient"),
    "the cell for a layer": (LAYER, "TwoScaleCell(channels)", ".deq is a TwoScaleCell: make self.deq = DEQ(cell, solv"),
    "a function for a cell": (
        "DEQ(TwoScaleCell(channels)",
        "DEQ(TwoScaleCell(channels).forward",
        "must be a torch.nn.Module, got a method",
    ),
    "a solver of its own": (
        "solver=solver, ",
        "",
        f"has another solver (Anderson) than the command line asks for (Forward): {MAKE}",
    ),
    "a gradient of its own": (
        ", gradient=gradient",
        "",
        f"has another gradient (Implicit) than the command line asks for (Phantom): {MAKE}",
    ),
}


def built(text: str, solver: Solver, gradient: Gradient, **top: bool) -> EquilibriumModel:
    """What ``train.py`` makes of a model in a file with this text."""
    module = ModuleType("two_scale")
    exec(text, vars(module))
    sys.modules["two_scale"] = module
    node = {"_target_": "two_scale.TwoScaleClassifier", "_partial_": True, "channels": 8}
    config = OmegaConf.create({"model": node, "cuda_graph": False} | top)
    return build_model(config, solver=solver, gradient=gradient, image_channels=1, image_size=8, classes=10)


@pytest.mark.parametrize("slip", SLIPS)
def test_a_model_that_would_not_train_as_it_is_asked_is_refused(slip: str) -> None:
    right, wrong, sentence = SLIPS[slip]
    assert right in MODEL
    built(MODEL, Forward(), Phantom())
    with pytest.raises(UserError) as refusal:
        built(MODEL.replace(right, wrong), Forward(), Phantom())
    assert "TwoScaleClassifier" in str(refusal.value)
    assert sentence in str(refusal.value)


def test_what_a_models_layer_does_not_take_up_is_refused() -> None:
    with pytest.raises(UserError, match=r"cuda_graph=true does not reach the layer of TwoScaleClassifier: write"):
        built(MODEL, Forward(), Phantom(), cuda_graph=True)
    with pytest.raises(UserError, match=r"TutorialAnderson brings the tutorial's layer along, which TwoScaleClassif"):
        built(MODEL, TutorialAnderson(), Implicit())


def test_a_head_of_too_many_outputs_is_refused(folder: Path) -> None:
    (folder / "two_scale.py").write_text(MODEL.replace("2 * channels, classes)", "2 * channels, classes + 3)"))
    run = asked(folder, "model=two_scale")
    assert (run.returncode, run.stderr) == (
        2,
        "error: the head of TwoScaleClassifier must return logits, (64, 10) here, got (64, 13): give its last layer as "
        "many outputs as there are classes\n",
    )


def test_a_new_solvers_samples_stop_one_by_one_and_shrink_the_evaluations(solver: Solver) -> None:
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


@pytest.mark.usefixtures("triton_launches_are_recorded", "every_backend_can_be_recorded")
@pytest.mark.parametrize("whole", [True, False], ids=["whole solve", "by iterations"])
def test_a_new_solvers_recorded_solve_is_the_solve_to_the_bit(solver: Solver, whole: bool) -> None:
    f = affine(0.5, batch=3, dim=8).to(torch.float32, "cpu")
    solver = replace(solver, tol=1e-3)
    recorded = CapturedSolve(solver, f, f.zero, ReplayingRecorder(records_loops=whole))
    for start in (f.zero, 100 * torch.randn(3, 8), f.zero):
        expected, got = solver.solve(f, start), recorded(start)
        assert torch.equal(got.z, expected.z)
        assert torch.equal(got.residual, expected.residual)
        assert got.evaluations == expected.evaluations


def test_an_iteration_that_does_not_say_how_it_begins_is_not_recorded(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(solver.start(torch.zeros(1, 2)))
    forgetful = type("Forgetful", (kind,), {"reset": Books.reset})
    f = affine(0.5, batch=3, dim=8).to(torch.float32, "cpu")
    monkeypatch.setattr(type(solver), "start", lambda self, x, *, in_place=False: forgetful(x, self))
    with pytest.raises(ValueError, match=r"Forgetful does not say what a new"):
        CapturedSolve(solver, f, f.zero, ReplayingRecorder(records_loops=False))


@pytest.mark.parametrize("declared", [True, False])
def test_a_new_solver_takes_samples_that_see_each_other_as_one_system(solver: Solver, declared: bool) -> None:
    A = (torch.diag(torch.ones(5), 1) + torch.diag(torch.ones(5), -1)) * 0.4  # nodes of a path
    source = torch.zeros(6, 2)
    source[0] = 1
    known = contextlib.nullcontext() if declared else pytest.warns(RuntimeWarning, match="see each other")
    with known:
        solution = replace(solver, tol=1e-3).solve(lambda z: A @ z + source, torch.zeros(6, 2), coupled=declared)
    exact = torch.linalg.solve(torch.eye(6) - A, source)
    assert solution.converged.all()
    torch.testing.assert_close(solution.z, exact, rtol=0.0, atol=2e-2)


def test_a_new_solver_solves_both_equations_of_a_layer(solver: Solver) -> None:
    weight = torch.randn(5, 5, dtype=torch.float64) / 10
    layer = DEQ(lambda z, x: torch.tanh(z @ weight + x), solver=solver, gradient=Implicit(solver=solver))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-4)
    assert named(solver) == "HeavyBall"
