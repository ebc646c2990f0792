"""The networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from deq.layer import Implicit
from deq.models import EquilibriumClassifier, ResidualCell
from deq.solvers import Anderson

SOLVER = Anderson(tol=1e-3, max_iter=50)
SMALL = {"channels": 8, "inner": 16, "groups": 4, "pool": 2}


def classifier(image_channels: int = 1, size: int = 8, **sizes: Any) -> EquilibriumClassifier:
    return EquilibriumClassifier(image_channels, size, 10, solver=SOLVER, gradient=Implicit(solver=SOLVER), **sizes)


def test_paper_model_on_cifar10_has_64842_parameters() -> None:
    assert sum(parameter.numel() for parameter in classifier(3, 32).parameters()) == 64_842


def test_cell_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    cell = ResidualCell(8, 16, groups=4)
    z, x = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    y = cell.norm1(functional.relu(functional.conv2d(z, cell.conv1.weight, padding=1)))
    y = cell.norm2(x + functional.conv2d(y, cell.conv2.weight, padding=1))
    assert torch.equal(cell(z, x), cell.norm3(functional.relu(z + y)))


def test_cells_weights_carry_the_names_and_shapes_of_the_trained_cells() -> None:
    shapes = {name: tuple(value.shape) for name, value in classifier(3, 32).deq.state_dict().items()}
    norms = {f"cell.norm{i}.{kind}": (64 if i == 1 else 48,) for i in (1, 2, 3) for kind in ("weight", "bias")}
    assert shapes == {"cell.conv1.weight": (64, 48, 3, 3), "cell.conv2.weight": (48, 64, 3, 3), **norms}


def test_convolutions_of_the_cell_start_small_enough_to_contract() -> None:
    torch.manual_seed(0)
    weight = classifier(3, 32).deq.state_dict()["cell.conv1.weight"]
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = classifier(**SMALL)
    functional.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)
    assert model.deq.last_adjoint is not None


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"channels": 0}, "model.channels must be an integer of at least 1, got 0"),
        ({"groups": 7}, "model.channels must be a multiple of model.groups=7, got 48"),
        ({"inner": 60}, "model.inner must be a multiple of model.groups=8, got 60"),
        ({"pool": 3}, "model.pool must divide the image size, 8 pixels, got 3"),
        ({"init_std": 0.0}, "model.init_std must be a number above 0, such as 0.01, got 0.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_value_and_limit(sizes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        classifier(**sizes)
