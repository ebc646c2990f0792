"""Active-set compaction: the same answers for fewer evaluations of f, refused where samples mix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.problems import Affine, affine
from deq import DEQ
from deq.layer import Implicit
from deq.solvers import Anderson, Broyden, Forward, Solver
from deq.solvers import solver as solver_module

KINDS = pytest.mark.parametrize("kind", [Anderson, Broyden, Forward])


def uneven() -> Affine:
    """Eight samples that take from a few to many iterations: their right sides reach ever slower eigenvectors."""
    f = affine(0.95, batch=8)
    vectors = torch.linalg.eigh(f.A).eigenvectors
    for sample in range(8):
        reach = 10 + 12 * sample
        f.b[sample] = vectors[:, :reach] @ torch.ones(reach, dtype=torch.float64)
    return f


def restricted(f: Affine) -> Callable[[Tensor], Affine]:
    return lambda index: Affine(f.A, f.b[index])


@KINDS
def test_compaction_gives_the_same_iterates_for_fewer_sample_evaluations(kind: type[Solver]) -> None:
    f = uneven()
    options = {"tol": 1e-6, "max_iter": 300}
    plain = kind(**options).solve(f, f.zero)  # type: ignore[arg-type]
    compact = kind(**options, compact=True).solve(f, f.zero, restrict=restricted(f))  # type: ignore[arg-type]
    assert plain.sample_evaluations == 8 * plain.evaluations
    assert int(compact.iterations.sum()) <= compact.sample_evaluations < 0.8 * plain.sample_evaluations
    assert torch.equal(compact.iterations, plain.iterations)
    assert compact.evaluations == plain.evaluations
    torch.testing.assert_close(compact.z, plain.z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compact.residual, plain.residual, rtol=1e-6, atol=1e-12)


@KINDS
def test_samples_that_never_converge_come_back_with_their_best_iterate(kind: type[Solver]) -> None:
    f = uneven()
    options = {"tol": 1e-3, "max_iter": 7}
    plain = kind(**options).solve(f, f.zero)  # type: ignore[arg-type]
    compact = kind(**options, compact=True).solve(f, f.zero, restrict=restricted(f))  # type: ignore[arg-type]
    assert 0 < int(plain.converged.sum()) < 8
    assert torch.equal(compact.converged, plain.converged)
    torch.testing.assert_close(compact.z, plain.z, rtol=1e-9, atol=1e-9)


@KINDS
def test_a_sample_given_up_is_left_out_and_keeps_what_it_had(kind: type[Solver]) -> None:
    f = uneven()
    f.b[3] = torch.nan
    solution = kind(tol=1e-6, max_iter=300, compact=True).solve(f, f.zero, restrict=restricted(f))
    others = [0, 1, 2, 4, 5, 6, 7]
    assert solution.converged[others].all()
    assert not solution.converged[3]
    assert torch.isfinite(solution.z).all()


def test_compaction_without_a_map_that_restricts_is_refused() -> None:
    with pytest.raises(ValueError, match="compact=True needs restrict="):
        Anderson(compact=True).solve(torch.cos, torch.zeros(2, 3))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.mul_(0.9 / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def test_a_layer_compacts_both_solves_and_gives_the_same_gradient() -> None:
    cell = Cell()
    # Saturated samples are done at once, small ones take long.
    x = torch.randn(8, 12, dtype=torch.float64) * torch.logspace(1, -2, 8, dtype=torch.float64)[:, None]
    grads, costs = [], []
    for compact in (False, True):
        solver = Anderson(window=3, tol=1e-9, max_iter=200, compact=compact)
        layer = DEQ(cell, solver=solver, gradient=Implicit(solver))
        x.grad = None
        x.requires_grad_()
        cell.zero_grad()
        layer(x).square().sum().backward()
        assert layer.last_solution is not None
        assert layer.last_adjoint is not None
        assert layer.last_solution.converged.all()
        assert layer.last_adjoint.converged.all()
        assert x.grad is not None
        assert cell.linear.weight.grad is not None
        grads.append((x.grad.clone(), cell.linear.weight.grad.clone()))
        costs.append(layer.last_solution.sample_evaluations + layer.last_adjoint.sample_evaluations)
    for plain, compacted in zip(*grads, strict=True):
        torch.testing.assert_close(compacted, plain, rtol=1e-6, atol=1e-9)
    assert costs[1] < costs[0]


def test_under_autocast_the_restricted_adjoint_is_recorded_under_autocast_too() -> None:
    linear = nn.Linear(12, 12)
    solver = Anderson(window=3, tol=1e-2, max_iter=30, compact=True)
    layer = DEQ(lambda z, x: torch.tanh(0.5 * linear(z) + x), solver=solver, gradient=Implicit(solver))
    x = torch.randn(8, 12) * torch.logspace(1, -2, 8)[:, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(linear(x))
    out.sum().backward()
    assert linear.weight.grad is not None
    assert torch.isfinite(linear.weight.grad).all()


def test_a_cell_with_batch_norm_in_training_mode_is_refused_by_name() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(12)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            result: Tensor = 0.1 * self.norm(z) + x
            return result

    layer = DEQ(Mixing(), solver=Anderson(compact=True))
    with pytest.raises(ValueError, match="its norm is a BatchNorm1d in training mode"):
        layer(torch.randn(4, 12))
    layer.eval()
    layer(torch.randn(4, 12))
    DEQ(Mixing(), solver=Anderson(compact=False))(torch.randn(4, 12))


class Late(solver_module.MovingSamples):
    """The GPU's way of counting, played on a CPU."""

    def count(self, outcome: Tensor, lost: Tensor | None = None) -> int:
        late, self._previous = self._previous, -1 if lost is not None and lost else int((outcome == 0).sum())
        return late


@KINDS
@pytest.mark.parametrize("stop", ["max", "mean"])
@pytest.mark.parametrize("compact", [False, True])
def test_reading_the_flags_late_costs_one_evaluation_and_changes_no_bit(
    kind: type[Solver], stop: str, compact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = uneven()
    solver = kind(tol=1e-5, max_iter=300, stop=stop, compact=compact)  # type: ignore[arg-type]
    at_once = solver.solve(f, f.zero, restrict=restricted(f))
    monkeypatch.setattr(solver_module, "MovingSamples", Late)
    late = solver.solve(f, f.zero, restrict=restricted(f))
    assert late.evaluations == at_once.evaluations + 1
    assert torch.equal(late.iterations, at_once.iterations)
    if not compact:  # another batch size may round f's products otherwise
        assert torch.equal(late.z, at_once.z)
        assert torch.equal(late.residual, at_once.residual)
    assert (late.residual <= at_once.residual * (1 + 1e-6)).all()
