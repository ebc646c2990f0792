"""Training steps leave nothing behind: no tensor, no hook, no memory, whatever the gradient and the solver."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deq import DEQ, WarmStart
from deq.layer import Gradient, Implicit, JacobianFree, Phantom, Unrolled, VariationalDropout
from deq.solvers import Anderson, Broyden, Forward, Solver
from tests.left_behind import hooks_of, live_tensors, resident_bytes

STEPS = 40
GRADIENTS: dict[str, Callable[[Solver], Gradient]] = {
    "Implicit": Implicit,
    "JacobianFree": lambda solver: JacobianFree(),
    "Phantom": lambda solver: Phantom(steps=3),
    "Unrolled": lambda solver: Unrolled(steps=3),
}
SOLVERS: dict[str, Solver] = {
    "Anderson": Anderson(window=3, tol=1e-3, max_iter=20),
    "Forward": Forward(tol=1e-3, max_iter=20),
    "Broyden": Broyden(memory=4, tol=1e-3, max_iter=20),
    "Anderson, compact": Anderson(window=3, tol=1e-3, max_iter=20, compact=True),
}


class Cell(nn.Module):
    """With all that a layer holds during a solve: a mask, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.dropout = VariationalDropout(0.1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(0.8 * self.linear(z) + x))


def training(gradient: Callable[[Solver], Gradient], solver: Solver) -> tuple[nn.Module, Callable[[], None]]:
    """A tiny model and a step of its training."""
    model = nn.Sequential(nn.Linear(16, 16), DEQ(Cell(), solver, gradient(solver)), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels, everyone = torch.randn(8, 16), torch.randint(4, (8,)), torch.arange(8)
    starts = WarmStart(samples=8)

    def step() -> None:
        z = model[1](model[0](images), z0=starts.of(everyone))
        starts.keep(everyone, model[1].last_solution)
        loss = nn.functional.cross_entropy(model[2](z), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return model, step


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_training_steps_leave_no_tensor_and_no_hook_behind(
    gradient: Callable[[Solver], Gradient], solver: Solver
) -> None:
    model, step = training(gradient, solver)
    for _ in range(5):  # the optimizer's state, the accounts of the first solve
        step()
    tensors, hooks = live_tensors(), hooks_of(model)
    for _ in range(STEPS):
        step()
    assert live_tensors() <= tensors  # fewer where one of an earlier test went meanwhile
    assert hooks_of(model) == hooks == 0
    assert model[1].cell.dropout._masks is None  # type: ignore[union-attr,index]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_step_that_leaves_a_tensor_behind_would_be_seen() -> None:
    # The control: what a leak of one small tensor a step looks like.
    _, step = training(Implicit, replace(SOLVERS["Anderson"], max_iter=5))
    step()
    kept, tensors, resident = [], live_tensors(), resident_bytes()
    for _ in range(20):
        step()
        kept.append(torch.randn(2**17))
    assert live_tensors() - tensors == len(kept)
    assert resident_bytes() - resident > 20 * 2**17 * 4 * 0.5
