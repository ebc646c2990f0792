"""Stability: penalty and spectral radius against dense Jacobians, corrections, and what a solve holds."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils import parametrizations

from deq import DEQ
from deq.kernels import native_backend
from deq.layer import (
    Gradient,
    Implicit,
    JacobianFree,
    Phantom,
    StabilityLosses,
    VariationalDropout,
    correction_loss,
    jacobian_penalty,
    spectral_radius,
)
from deq.models import EquilibriumClassifier
from deq.solvers import Anderson, Broyden, Forward, Solver, captured
from deq.solvers.map import FixedPointMap
from tests.deq.layer.test_gradients import Cell
from tests.left_behind import hooks_of, live_tensors, resident_bytes
from tests.replay import ReplayingRecorder, triton_launches_are_recorded  # noqa: F401


def jacobians(f: FixedPointMap, z: Tensor) -> Tensor:
    """(B, d, d), dense, from the whole batch's Jacobian."""
    J = torch.autograd.functional.jacobian(f, z).reshape(len(z), z[0].numel(), len(z), z[0].numel())
    return J.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The penalty


def test_the_penalty_is_the_squared_frobenius_norm_over_d_within_its_standard_error() -> None:
    cell, x, z = Cell(), torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    J = jacobians(lambda z: cell(z, x), z)
    exact = J.square().sum() / J[..., 0].numel()
    # Var v^T M v = 2 (||M||_F^2 - sum of squares of the diagonal) for random signs, M = J J^T, samples independent.
    M = J @ J.mT
    variance = 2 * (M.square().sum() - M.diagonal(dim1=1, dim2=2).square().sum()) / z.numel() ** 2
    probes = 2000
    estimate = jacobian_penalty(lambda z: cell(z, x), z, probes, seeded())
    error = math.sqrt(float(variance) / probes)
    assert abs(float((estimate - exact).detach())) < 4 * error
    assert error < 0.02 * float(exact), "the bound has to tell something"


def test_one_probe_of_signs_is_exact_for_a_diagonal_jacobian() -> None:
    slope, z = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    penalty = jacobian_penalty(lambda z: slope * torch.sin(z), z)
    torch.testing.assert_close(penalty, (slope * torch.cos(z)).square().mean())


def test_gradcheck_of_the_penalty_with_the_same_probes() -> None:
    x, z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, dtype=torch.float64)
    weight = Cell(4).weight

    def penalty(weight: Tensor, x: Tensor) -> Tensor:
        return jacobian_penalty(lambda z: torch.tanh(z @ weight + x), z, 2, seeded())

    assert gradcheck(penalty, (weight, x))


def test_the_penalty_does_not_move_the_fixed_point() -> None:
    z = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    cell = Cell()
    jacobian_penalty(lambda z: cell(z, torch.ones_like(z)), z).backward()
    assert z.grad is None
    assert cell.weight.grad is not None
    assert cell.weight.grad.norm() > 0


def test_the_penalty_of_a_constant_map_is_zero_and_may_be_part_of_a_loss() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert jacobian_penalty(lambda z: torch.ones_like(z), torch.zeros(2, 3)) == 0
    (jacobian_penalty(lambda z: x, torch.zeros(2, 3)) + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_squares_are_summed_in_float32(dtype: torch.dtype) -> None:
    # 4096 squares of 16 are 1,048,576: too much for float16, too fine for a sum in bfloat16.
    slope = nn.Parameter(torch.full((4096,), 16.0))
    with torch.autocast("cpu", dtype=dtype):
        penalty = jacobian_penalty(lambda z: z.to(dtype) * slope.to(dtype), torch.zeros(1, 4096))
        half = jacobian_penalty(lambda z: z * slope.to(dtype), torch.zeros(1, 4096, dtype=dtype))
    for one in (penalty, half):
        assert one.dtype == torch.float32
        assert one.item() == 256.0
    penalty.backward()
    torch.testing.assert_close(slope.grad, torch.full((4096,), 2 * 16 / 4096))


def test_the_penalty_of_a_compiled_cell_is_that_of_the_cell() -> None:
    cell = Cell(dtype=torch.float32)
    x, z = torch.randn(2, 6), torch.randn(2, 6)
    expected = jacobian_penalty(lambda z: cell(z, x), z, 1, seeded())
    (wanted,) = torch.autograd.grad(expected, cell.weight)
    cell.compile()
    cell(z.requires_grad_(), x).sum().backward()
    got = jacobian_penalty(lambda z: cell(z, x), z, 1, seeded())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, cell.weight)[0], wanted)


@pytest.mark.parametrize("probes", [0, -1, True, 1.5])
def test_a_number_of_probes_that_is_none_is_refused(probes: int) -> None:
    with pytest.raises(ValueError, match=r"probes must be a whole number, at least 1, got"):
        jacobian_penalty(torch.sin, torch.zeros(1, 1), probes)


# The spectral radius


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_radius_of_rotations_is_exact_though_no_eigenvalue_is_real(dtype: torch.dtype) -> None:
    radii = torch.tensor([0.3, 0.9, 1.0, 1.7], dtype=dtype)
    angles = torch.tensor([0.1, 1.0, math.pi / 2, 3.0], dtype=dtype)
    A = torch.stack([torch.cos(angles), -torch.sin(angles), torch.sin(angles), torch.cos(angles)], 1).view(4, 2, 2)
    A = radii[:, None, None] * A
    found = spectral_radius(lambda z: (A @ z[..., None])[..., 0], torch.zeros(4, 2, dtype=dtype))
    torch.testing.assert_close(found.radius, radii)
    assert found.converged.all()
    assert found.steps == 1


@pytest.mark.parametrize("pair", ["complex", "opposite", "single"])
def test_the_radius_is_that_of_the_dominant_eigenvalues_whatever_they_are(pair: str) -> None:
    blocks = {"complex": [[0.0, -0.8], [0.8, 0.0]], "opposite": [[0.8, 0.0], [0.0, -0.8]], "single": [[0.8]]}
    block = torch.tensor(blocks[pair], dtype=torch.float64)
    rest = torch.diag(torch.linspace(-0.5, 0.5, 6, dtype=torch.float64))
    basis = torch.randn(6 + len(block), 6 + len(block), dtype=torch.float64)
    A = basis @ torch.block_diag(block, rest) @ torch.linalg.inv(basis)
    found = spectral_radius(lambda z: z @ A.T, torch.zeros(2, len(A), dtype=torch.float64), tol=1e-8)
    assert found.converged.all()
    torch.testing.assert_close(found.radius, torch.full((2,), 0.8, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_radius_of_random_matrices_is_that_of_their_eigenvalues() -> None:
    A = torch.randn(20, 8, 8, dtype=torch.float64)
    found = spectral_radius(lambda z: (A @ z[..., None])[..., 0], A[..., 0], steps=1000, tol=1e-6)
    assert found.converged.sum() >= 18
    error = (found.radius / torch.linalg.eigvals(A).abs().amax(dim=1) - 1).abs()
    assert (error[found.converged] < 1e-4).all()
    assert (error < 1e-2).all(), "where two pairs are about as large, the growth still tells their modulus"


def test_the_radius_is_taken_at_z_of_a_nonlinear_map_of_any_shape() -> None:
    cell, x, z = Cell(), torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    exact = torch.linalg.eigvals(jacobians(lambda z: cell(z, x), z)).abs().amax(dim=1)
    found = spectral_radius(lambda z: cell(z.flatten(1), x).view(3, 2, 3), z.view(3, 2, 3), steps=2000, tol=1e-7)
    torch.testing.assert_close(found.radius, exact, rtol=1e-3, atol=0)
    assert not found.radius.requires_grad


def test_a_sample_that_has_not_converged_says_so_and_tells_how_fast_vectors_grow() -> None:
    # Four eigenvalues of modulus 0.9, in two planes: a block of two vectors settles in neither.
    A = torch.zeros(4, 4, dtype=torch.float64)
    for start, angle in ((0, 0.3), (2, 2.0)):
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        A[start : start + 2, start : start + 2] = 0.9 * turn
    found = spectral_radius(lambda z: z @ A, torch.zeros(5, 4, dtype=torch.float64), steps=200)
    assert found.steps == 200
    assert not found.converged.any()
    torch.testing.assert_close(found.radius, torch.full((5,), 0.9, dtype=torch.float64))


def test_constant_zero_and_not_finite_jacobians() -> None:
    z = torch.zeros(2, 3)
    constant = spectral_radius(lambda z: torch.ones_like(z), z)
    assert torch.equal(constant.radius, torch.zeros(2))
    assert constant.converged.all()
    assert torch.equal(spectral_radius(lambda z: 0 * z, z).radius, torch.zeros(2))
    broken = spectral_radius(lambda z: z * torch.tensor([[math.nan], [2.0]]), z)
    assert torch.isnan(broken.radius[0])
    assert broken.radius[1] == 2
    assert broken.converged.tolist() == [False, True]


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "steps must be"), ({"tol": -1.0}, "tol must be")])
def test_options_of_the_radius_outside_their_limits_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_radius(torch.sin, torch.zeros(1, 1), **options)  # type: ignore[arg-type]


# Corrections


@pytest.mark.parametrize("solver", [Anderson(tol=1e-9), Forward(tol=1e-9), Broyden(tol=1e-9)], ids=repr)
def test_states_are_the_iterates_that_a_solve_capped_there_goes_on_from(solver: Solver) -> None:
    cell, x = Cell(), torch.randn(3, 6, dtype=torch.float64)
    inputs: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        inputs.append(z.clone())
        return cell(z, x)

    solution = solver.solve(f, torch.zeros_like(x), states_at=(5, 2))
    assert solution.evaluations > 6
    for state, number in zip(solution.states, (2, 5), strict=True):
        assert torch.equal(state, inputs[number]), "what evaluation number + 1 is made at"
    assert solver.solve(f, torch.zeros_like(x)).states == ()


@pytest.mark.parametrize("kind", [Anderson, Forward, Broyden])
def test_compaction_gives_the_same_states_those_of_frozen_samples_included(kind: type[Solver]) -> None:
    cell = Cell(contraction=0.9)
    x = torch.randn(8, 6, dtype=torch.float64) * torch.logspace(1.5, -2, 8, dtype=torch.float64)[:, None]
    plain, compact = (
        DEQ(cell, kind(tol=1e-7, max_iter=100, compact=one)).equilibrium(x, corrections=(2, 6, 9, 12))
        for one in (False, True)
    )
    assert len(plain.states) == len(compact.states) >= 3
    for expected, got in zip(plain.states, compact.states, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_a_state_has_the_gradient_of_one_evaluation_there_and_leaves_that_of_the_fixed_point_alone() -> None:
    layer, x = DEQ(Cell(), Anderson(tol=1e-12, max_iter=100)), torch.randn(3, 6, dtype=torch.float64)
    weight = layer.cell.weight  # type: ignore[union-attr]
    equilibrium = layer.equilibrium(x, corrections=(2,))
    (state,) = equilibrium.states
    one_step = layer.cell(state.detach(), x)
    (expected,) = torch.autograd.grad(one_step, weight, 2 * state.detach())
    torch.testing.assert_close(torch.autograd.grad(state.square().sum(), weight)[0], expected)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(equilibrium.z.square().sum(), weight)[0], plain)
    with torch.no_grad():
        assert torch.equal(layer.equilibrium(x, corrections=(2,)).states[0], state)
    assert layer.last_solution is not None
    assert layer.last_solution.states == (), "the layer keeps none of them"


def test_the_correction_loss_weighs_the_last_iterate_by_gamma_and_each_before_it_by_gamma_more() -> None:
    states = [torch.tensor([value], requires_grad=True) for value in (1.0, 10.0, 100.0)]
    total = correction_loss(torch.Tensor.mean, states, gamma=0.5)
    assert total.item() == 0.125 * 1 + 0.25 * 10 + 0.5 * 100
    total.backward()
    assert [state.grad.item() for state in states] == [0.125, 0.25, 0.5]  # type: ignore[union-attr]
    assert correction_loss(torch.Tensor.mean, []).item() == 0.0
    with pytest.raises(ValueError, match="gamma must be a number above 0 and at most 1, got 0"):
        correction_loss(torch.Tensor.mean, states, gamma=0)


@pytest.mark.parametrize("number", [0, 31, True, 2.0])
def test_a_correction_that_is_never_reached_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=r"evaluations 1 to max_iter=30, got"):
        DEQ(Cell(), Anderson(max_iter=30)).equilibrium(torch.zeros(1, 6, dtype=torch.float64), corrections=(number,))


def test_corrections_of_a_recorded_solve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cuda_graph=True replays .* use cuda_graph=False"):
        DEQ(Cell(), cuda_graph=True).equilibrium(torch.zeros(1, 6), corrections=(3,))


def test_an_iterate_on_the_way_does_not_touch_the_batch_statistics_that_evaluation_uses() -> None:
    solver = Anderson(tol=1e-2)
    model = EquilibriumClassifier(1, 8, 10, solver=solver, gradient=Implicit(), channels=8, inner=8, groups=4, pool=4)
    before = {name: buffer.clone() for name, buffer in model.head.named_buffers()}
    z = torch.randn(4, 8, 8, 8) + 3
    logits = model.classify(z)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.head.named_buffers())
    torch.testing.assert_close(logits, model.head(z))
    assert not torch.equal(model.head[0].running_mean, before["0.running_mean"])


# Weights that are computed


class Normed(nn.Module):
    """A cell whose weight is parametrised, and what counts the computations of that weight."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module], dim: int = 6) -> None:
        super().__init__()
        self.linear = norm(nn.Linear(dim, dim, dtype=torch.float64))
        self.evaluations = self.computations = 0
        self.linear.parametrizations.weight[0].register_forward_hook(self._count)  # type: ignore[index,union-attr]

    def _count(self, *_: Any) -> None:
        self.computations += 1

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        return torch.tanh(0.6 * self.linear(z) + x)


def uneven_input() -> Tensor:
    x = torch.randn(8, 6, dtype=torch.float64) * torch.logspace(1, -2, 8, dtype=torch.float64)[:, None]
    return x.requires_grad_()


NORMS = {"weight": parametrizations.weight_norm, "spectral": parametrizations.spectral_norm}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@each_norm
@pytest.mark.parametrize("compact", [False, True])
def test_a_parametrised_weight_is_computed_once_a_training_step(norm: Any, compact: bool) -> None:
    cell = Normed(norm)
    solver = Anderson(tol=1e-9, max_iter=100, compact=compact)
    layer = DEQ(cell, solver, Implicit(solver))
    for step in range(1, 4):
        layer(uneven_input()).square().sum().backward()
        assert cell.evaluations > 10 * step
        assert cell.computations == step
    with torch.no_grad():
        layer.eval()(uneven_input())
    assert cell.computations == 4
    assert not cell.linear.parametrizations.weight[0].training, "the parametrisation itself is back in its place"  # type: ignore[index,union-attr]


@each_norm
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("gradient", [Implicit(), JacobianFree(), Phantom(3, 0.7)], ids=repr)
def test_gradients_are_those_of_weights_computed_in_every_evaluation(
    norm: Any, compact: bool, gradient: Gradient
) -> None:
    cell = Normed(norm).eval()  # where spectral_norm is one function of its weight
    other = copy.deepcopy(cell)
    solver = Anderson(tol=1e-12, max_iter=200, compact=compact)
    x = uneven_input()
    for one in (cell, other):
        # A cell that is no module cannot be looked into, and nothing in it is held.
        layer = DEQ(one if one is cell else lambda z, x: other(z, x), solver, gradient)
        layer(x).square().sum().backward()
    assert cell.computations < other.computations
    for got, expected in zip(cell.parameters(), other.parameters(), strict=True):
        assert got.grad is not None
        assert got.grad.norm() > 0
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-8, atol=1e-10)


@each_norm
def test_gradcheck_of_a_layer_with_a_parametrised_weight(norm: Any) -> None:
    cell = Normed(norm, dim=3).eval()
    solver = Anderson(tol=1e-13, max_iter=200)
    layer, x = DEQ(cell, solver), torch.randn(2, 3, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def f(*values: Tensor) -> Tensor:
        z: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return z

    assert gradcheck(f, values, eps=1e-6, atol=1e-6)


def test_spectral_norm_in_training_mode_moves_its_vector_once_a_solve_and_the_map_stays_the_same() -> None:
    cell = Normed(parametrizations.spectral_norm)
    twin = copy.deepcopy(cell.linear)
    layer = DEQ(cell, Anderson(tol=1e-10, max_iter=100))
    equilibrium = layer.equilibrium(torch.randn(4, 6, dtype=torch.float64))
    weight = twin.weight  # one access, one step of its power iteration
    assert torch.equal(cell.linear.parametrizations.weight[0]._u, twin.parametrizations.weight[0]._u)  # type: ignore[index,union-attr]
    with torch.no_grad():
        first, second = equilibrium.f(equilibrium.z), equilibrium.f(equilibrium.z)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, equilibrium.z, rtol=1e-8, atol=1e-8)
    del weight


def test_an_error_in_the_cell_leaves_its_parametrisation_and_dropout_as_they_were() -> None:
    class Failing(Dropped):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            super().forward(z, x)
            raise KeyError("mine")

    cell = Failing()
    computed = cell.linear.parametrizations.weight  # type: ignore[union-attr]
    with pytest.raises(KeyError, match="mine"):
        DEQ(cell)(torch.zeros(2, 6, dtype=torch.float64))
    assert cell.linear.parametrizations.weight is computed  # type: ignore[union-attr]
    assert cell.dropout._masks is None


def test_two_threads_in_one_cell_leave_its_parametrisation_in_place() -> None:
    entered, joined, left = threading.Event(), threading.Event(), threading.Event()

    class Meeting(Normed):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            if threading.current_thread() is threading.main_thread():
                entered.set()
                joined.wait(30)
            else:
                joined.set()
                left.wait(30)
            return super().forward(z, x)

    cell = Meeting(parametrizations.weight_norm)
    computed = cell.linear.parametrizations.weight  # type: ignore[union-attr]
    layer, x = DEQ(cell, Forward(max_iter=1)), torch.randn(2, 6, dtype=torch.float64)
    found = []

    @torch.no_grad()
    def solve() -> None:
        found.append(layer(x))

    def join() -> None:
        entered.wait(30)
        solve()

    other = threading.Thread(target=join)
    other.start()
    solve()
    left.set()
    other.join()
    assert cell.linear.parametrizations.weight is computed  # type: ignore[union-attr]
    assert torch.equal(*found)
    assert cell.computations == 2, "each solve holds a weight of its own"


@pytest.mark.usefixtures("triton_launches_are_recorded")
def test_a_recorded_solve_computes_the_weight_in_every_replay_and_refuses_one_that_would_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It launches nothing that can be recorded.
    monkeypatch.setattr(native_backend, "obstacle", lambda dtype: "is left out")
    monkeypatch.setattr(captured, "recorder_for", lambda device: ReplayingRecorder(records_loops=False))
    x = torch.randn(3, 6, dtype=torch.float64)
    cell, solver = Normed(parametrizations.weight_norm), Forward(tol=1e-10, max_iter=100)
    recorded, plain = DEQ(cell, solver, Implicit(solver), cuda_graph=True), DEQ(cell, solver, Implicit(solver))
    for _ in range(3):
        grads = []
        for layer in (recorded, plain):
            cell.zero_grad()
            layer(x).square().sum().backward()
            grads.append([parameter.grad for parameter in cell.parameters()])
        torch.testing.assert_close(grads[0], grads[1])
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.mul_(1.1)
    spectral = DEQ(Normed(parametrizations.spectral_norm), solver, cuda_graph=True)
    with pytest.raises(ValueError, match=r"linear\.weight in every evaluation, but .* use cuda_graph=False"):
        spectral(x)
    spectral.eval()(x)
    with pytest.raises(ValueError, match=r"masks of the cell's dropout: use cuda_graph=False"):
        DEQ(Dropped(), solver, cuda_graph=True)(x)


# Dropout


class Dropped(nn.Module):
    """Two dropouts, one of them called twice, and a parametrised weight."""

    def __init__(self, dim: int = 6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(dim, dim, dtype=dtype))
        self.dropout, self.other = VariationalDropout(0.3), VariationalDropout(0.2)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(0.6 * self.linear(self.dropout(z)) + x))
        result: Tensor = self.other(hidden)
        return result


def masks_of(f: FixedPointMap, dropout: VariationalDropout, z: Tensor) -> list[Tensor]:
    """What the dropout multiplied its inputs with in one evaluation of f."""
    found: list[Tensor] = []
    handle = dropout.register_forward_hook(lambda module, args, output: found.append((output / args[0]).detach()))
    f(z)
    handle.remove()
    return found


def test_masks_are_the_same_in_a_solve_and_new_in_the_next() -> None:
    layer, x, z = DEQ(Dropped()), torch.randn(64, 6, dtype=torch.float64), torch.ones(64, 6, dtype=torch.float64)
    first, second = layer.equilibrium(x), layer.equilibrium(x)
    cell = layer.cell
    assert isinstance(cell, Dropped)
    assert layer.last_solution is not None
    assert layer.last_solution.converged.all()
    mask, later_mask = masks_of(first.f, cell.dropout, z)
    torch.testing.assert_close(masks_of(first.f, cell.dropout, z), [mask, later_mask], rtol=0, atol=1e-12)
    for different in (later_mask, *masks_of(second.f, cell.dropout, z), mask.roll(1, dims=0)):
        assert not torch.allclose(mask, different), "each call, each solve and each sample has a mask of its own"
    kept = mask > 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / 0.7))
    assert 0.62 < kept.double().mean() < 0.78  # 384 draws of 0.7: 3.4 standard errors
    torch.testing.assert_close(first.f(first.z), first.z, rtol=1e-2, atol=1e-2)


def test_masks_follow_the_seed_and_eval_mode_has_none() -> None:
    layer, x = DEQ(Dropped()), torch.randn(4, 6, dtype=torch.float64)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(VariationalDropout().eval()(x), x)
    assert torch.equal(VariationalDropout(0.0)(x), x)


def test_a_mask_per_channel_is_one_number_all_over_a_channel() -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = VariationalDropout(0.5, per="channel")

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.4 * self.dropout(z) + x

    layer, z = DEQ(Channels()), torch.ones(4, 16, 3, 5)
    (mask,) = masks_of(layer.equilibrium(z).f, layer.cell.dropout, z)  # type: ignore[union-attr,arg-type]
    assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("gradient", [Implicit(), JacobianFree(), Phantom(3, 0.7)], ids=repr)
def test_with_compaction_every_sample_keeps_its_masks_in_both_solves(gradient: Gradient) -> None:
    cell, x = Dropped(), uneven_input()
    results = []
    for compact in (False, True):
        solver = Anderson(tol=1e-11, max_iter=200, compact=compact)
        layer = DEQ(cell, solver, gradient)
        torch.manual_seed(5)
        z = layer(x)
        layer(x.flip(0))  # another solve of the same layer, before the backward pass of the first
        results.append((z, *torch.autograd.grad(z.square().sum(), (x, *cell.parameters()))))
        solution = layer.last_solution
        assert solution is not None
        assert solution.converged.all()
        assert (solution.sample_evaluations < 8 * solution.evaluations) == compact
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)


def test_gradcheck_of_a_layer_with_dropout() -> None:
    cell = Dropped(3)
    layer = DEQ(cell, Anderson(tol=1e-13, max_iter=200))

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        result: Tensor = layer(x)
        return result

    assert gradcheck(f, (torch.randn(2, 3, dtype=torch.float64, requires_grad=True),), eps=1e-6, atol=1e-6)


def test_a_dropout_that_mixes_samples_into_its_rows_is_refused_where_a_solver_compacts() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = VariationalDropout(0.2)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.9 * self.dropout(torch.tanh(z).reshape(-1, 3)).reshape(z.shape) + x

    x = uneven_input().detach()
    with pytest.raises(ValueError, match=r"given 16 rows where the batch is 8: .* use compact=False"):
        DEQ(Rows(), Anderson(tol=1e-9, max_iter=100, compact=True))(x)
    DEQ(Rows(), Anderson(tol=1e-9, max_iter=100))(x)


def test_a_dropout_outside_a_solve_or_held_by_two_is_refused() -> None:
    dropout = VariationalDropout(0.2)
    with pytest.raises(RuntimeError, match=r"called outside a solve"):
        DEQ(lambda z, x: 0.5 * dropout(z) + x)(torch.ones(2, 3))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DEQ(Dropped())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * self.inner(z) + x

    with pytest.raises(ValueError, match=r"held by two solves, one inside the other"):
        DEQ(Outer())(torch.ones(2, 6, dtype=torch.float64))
    DEQ(Outer()).eval()(torch.ones(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_a_dropout_that_draws_at_every_call_is_refused_in_training_mode(kind: type[nn.Module]) -> None:
    class Drawing(nn.Module):
        def __init__(self, p: float = 0.5) -> None:
            super().__init__()
            self.drop = kind(p)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            result: Tensor = 0.5 * self.drop(z) + x
            return result

    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match=rf"its drop is a {kind.__name__} in training mode: use deq\.layer\.Varia"):
        DEQ(Drawing())(x)
    DEQ(Drawing()).eval()(x)
    DEQ(Drawing(0.0))(x)


def test_the_hook_of_the_older_spectral_norm_is_refused_in_training_mode() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.utils.spectral_norm(nn.Linear(3, 3))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * torch.tanh(self.linear(z)) + x

    with pytest.raises(ValueError, match=r"hook of spectral_norm on its linear changes"):
        DEQ(Hooked())(torch.ones(2, 3))
    DEQ(Hooked()).eval()(torch.ones(2, 3))


@pytest.mark.parametrize("options", [{"p": 1.0}, {"p": -0.1}, {"p": True}, {"per": "batch"}])
def test_options_of_the_dropout_outside_their_limits_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(p must be at least 0 and below 1|per must be one of)"):
        VariationalDropout(**options)


# All of it, for long


def test_a_thousand_training_steps_leave_nothing_behind() -> None:
    torch.manual_seed(0)
    solver = Anderson(window=3, tol=1e-3, max_iter=30)
    cell = Dropped(16, torch.float32)
    model = nn.Sequential(nn.Linear(16, 16), DEQ(cell, solver, Implicit(solver)), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = torch.randn(8, 16), torch.randint(4, (8,))

    def step() -> None:
        equilibrium = model[1].equilibrium(model[0](images), corrections=(2,))

        def loss_at(z: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model[2](z), labels)

        loss = loss_at(equilibrium.z) + correction_loss(loss_at, equilibrium.states)
        loss = loss + 0.1 * jacobian_penalty(equilibrium.f, equilibrium.z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(50):  # the optimizer's state, the allocators' pools
        step()
    tensors, hooks, resident = live_tensors(), hooks_of(model), resident_bytes()
    for _ in range(1000):
        step()
    assert live_tensors() <= tensors  # fewer where one of an earlier test went meanwhile
    assert hooks_of(model) == hooks == 0
    assert cell.dropout._masks is None
    assert (
        resident_bytes() - resident < 8 * 2**20
    )  # one tensor of 8 x 16 kept in each step would be 0.5 MB, a graph more


def test_losses_that_are_off_draw_no_number_and_a_probability_is_that_of_a_step() -> None:
    before = torch.get_rng_state()
    assert not any(StabilityLosses().takes_penalty() for _ in range(10))
    assert all(StabilityLosses(jacobian_weight=1.0).takes_penalty() for _ in range(10))
    assert torch.equal(torch.get_rng_state(), before)
    taken = sum(StabilityLosses(jacobian_weight=1.0, jacobian_probability=0.25).takes_penalty() for _ in range(1000))
    assert 195 < taken < 305  # 250, four standard errors


def test_the_stability_tools_take_the_nest_that_a_layer_of_nests_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    A *= 0.8 / torch.linalg.eigvals(A).abs().max()

    def cell(z: dict[str, Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([z["high"].flatten(1), z["low"]], dim=1) @ A
        return {"high": flat[:, :2].view(-1, 2, 1) + x["high"], "low": flat[:, 2:] + x["low"]}

    layer = DEQ(cell, Anderson(tol=1e-8, max_iter=100))
    x = {"high": torch.ones(3, 2, 1, dtype=torch.float64), "low": torch.ones(3, 3, dtype=torch.float64)}
    equilibrium = layer.equilibrium(x, corrections=(1, 2))
    assert [state["low"].shape for state in equilibrium.states] == [(3, 3), (3, 3)]
    torch.testing.assert_close(equilibrium.f(equilibrium.z), equilibrium.z, rtol=1e-6, atol=1e-6)
    found = spectral_radius(equilibrium.f, equilibrium.z, steps=2000, tol=1e-6)
    torch.testing.assert_close(found.radius, torch.full((3,), 0.8, dtype=torch.float64), rtol=1e-3, atol=0)
    penalty = jacobian_penalty(equilibrium.f, equilibrium.z, probes=2000, generator=generator)
    assert float(penalty) == pytest.approx(float(A.square().sum()) / 5, rel=0.1)
