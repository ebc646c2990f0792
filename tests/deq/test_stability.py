"""Stability: the Jacobian penalty and the spectral radius against dense Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from deq.solvers.base import FixedPointMap
from deq.stability import jacobian_penalty, spectral_radius


class Cell(nn.Module):
    """A smooth contraction: tanh(W z + x)."""

    def __init__(self, dim: int = 6, contraction: float = 0.6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        weight = torch.randn(dim, dim, dtype=dtype)
        self.weight = nn.Parameter(weight * contraction / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x)


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
        assert float(one) == 256.0
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
