"""A compiled cell under an implicit gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deq import DEQ
from deq.solvers import Anderson


class Cell(nn.Module):
    """Two layers, so that the backward pass has something saved in between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        result: Tensor = 0.3 * torch.tanh(self.outer(torch.tanh(self.inner(z)))) + x
        return result


def test_a_compiled_cell_has_the_gradients_of_the_cell() -> None:
    cell = Cell()
    compiled = copy.deepcopy(cell)
    compiled.compile()
    donated_buffer = torch._functorch.config.donated_buffer
    x = torch.randn(4, 8)
    for one in (cell, compiled):
        layer = DEQ(one, solver=Anderson(tol=1e-6))
        layer(x).square().sum().backward()
        assert layer.last_adjoint is not None
        assert layer.last_adjoint.evaluations > 2  # several products with one recorded evaluation
    for expected, got in zip(cell.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-6)
    assert torch._functorch.config.donated_buffer is donated_buffer, "the process's setting is left as it was"


@pytest.mark.parametrize("compact", [False, True])
def test_a_compiled_cell_may_meet_several_batch_sizes(compact: bool) -> None:
    # The last batch of an epoch is smaller, and compaction leaves fewer and fewer samples.
    torch._dynamo.reset()
    cell = Cell()
    compiled = copy.deepcopy(cell)
    compiled.compile()
    for samples in (9, 4, 9):
        x = torch.randn(samples, 8) * torch.logspace(0, -3, samples)[:, None]
        for one in (cell, compiled):
            one.zero_grad()
            DEQ(one, solver=Anderson(tol=1e-6, compact=compact))(x).square().sum().backward()
        for expected, got in zip(cell.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5)


class TwoScales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        both = torch.tanh(0.4 * self.linear(torch.cat([z["fine"].flatten(1), z["coarse"]], dim=1)) + x)
        return {"fine": both[:, :6].reshape(-1, 2, 3), "coarse": both[:, 6:]}


def test_a_compiled_cell_of_a_nested_state_has_the_gradients_of_the_cell() -> None:
    cell = TwoScales()
    compiled = copy.deepcopy(cell)
    compiled.compile()
    x = torch.randn(4, 8)
    for one in (cell, compiled):
        z = DEQ(one, solver=Anderson(tol=1e-6))(x, z0={"fine": torch.zeros(4, 2, 3), "coarse": torch.zeros(4, 2)})
        (z["fine"].square().sum() + z["coarse"].cos().sum()).backward()
    for expected, got in zip(cell.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-6)
