"""What bad input gets: a clear error, or the right result for every other sample; never a crash, never a silent NaN.

Each row of the tables is a cell and an input, tried through ``Solver.solve`` and through a DEQ layer with its gradient.
The cells work element by element, so that the bits of a sample do not depend on how many others there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq import DEQ
from deq.kernels import native_backend
from deq.layer import Gradient, Implicit, JacobianFree, Phantom, Unrolled, VariationalDropout
from deq.solvers import Anderson, Broyden, Forward, Solution, Solver

SOLVERS: dict[str, Solver] = {
    "anderson_torch": Anderson(backend="torch", tol=1e-4, max_iter=60),
    "anderson_native": Anderson(backend="native", tol=1e-4, max_iter=60),
    "forward": Forward(tol=1e-4, max_iter=60),
    "broyden": Broyden(tol=1e-4, max_iter=60),
}
NO_COMPILER = native_backend.obstacle(torch.float32)
each_solver = pytest.mark.parametrize(
    "solver",
    [
        pytest.param(
            solver,
            id=name,
            marks=pytest.mark.skipif(name == "anderson_native" and bool(NO_COMPILER), reason=NO_COMPILER or "runs"),
        )
        for name, solver in SOLVERS.items()
    ],
)
GRADIENTS: dict[str, Callable[[Solver], Gradient]] = {
    "implicit": Implicit,
    "jacobian_free": lambda solver: JacobianFree(),
    "phantom": lambda solver: Phantom(steps=3),
    "unrolled": lambda solver: Unrolled(steps=3),
}
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
Cell = Callable[[Tensor, Tensor], Any]
GOOD = 0.1 * torch.arange(1.0, 16.0).view(3, 5)
"""x of three samples that every solver solves in different numbers of evaluations."""


def good_cell(z: Tensor, x: Tensor) -> Tensor:
    return torch.sin(0.5 * z) + x


def after(first: int, make: Callable[[], Cell]) -> Callable[[], Cell]:
    """The good cell for its first evaluations, another one from then on."""

    def made() -> Cell:
        other, count = make(), 0

        def cell(z: Tensor, x: Tensor) -> Any:
            nonlocal count
            count += 1
            return other(z, x) if count > first else good_cell(z, x)

        return cell

    return made


def bad_at(value: float, where: Any) -> Cell:
    """The good cell, but for one element of some samples."""

    def cell(z: Tensor, x: Tensor) -> Tensor:
        mask = torch.zeros_like(z)
        mask[where] = 1.0
        return good_cell(z, x).masked_fill(mask.bool(), value)

    return cell


def in_place(z: Tensor, x: Tensor) -> Tensor:
    return z.mul_(0.5).add_(x)


def in_place_and_another_returned(z: Tensor, x: Tensor) -> Tensor:
    z[1] = 0.0
    return good_cell(z, x)


NEAR = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-3, torch.float64: 1e-3}
"""How near the answer is to be, relatively: in half precision what rounding leaves."""


def for_dtype(solver: Solver, dtype: torch.dtype) -> Solver:
    if dtype.itemsize > 2:
        return solver
    if isinstance(solver, Anderson) and solver.backend == "native":
        solver = replace(solver, backend="auto")  # which leaves half precision to PyTorch; by name it is refused
    return replace(solver, tol=NEAR[dtype])


# What is refused.


@dataclass(frozen=True)
class Refused:
    """A cell, made anew for each try, or a start that no solve can work with, and what the error must say."""

    says: str
    cell: Callable[[], Cell] = lambda: good_cell
    x: Tensor = GOOD


CONTRACT = r"f must return what it is given, \(3, 5\) torch.float32 on cpu, but it returned "
ELEMENTS = r"z0 must be \(B, \.\.\.\) floating point with at least one element, got .*: leave empty batches out"

REFUSED = {
    "f_drops_an_element": Refused(CONTRACT + r"\(3, 4\)", lambda: lambda z, x: good_cell(z, x)[:, :4]),
    "f_drops_a_sample": Refused(CONTRACT + r"\(2, 5\)", lambda: lambda z, x: good_cell(z, x)[:2]),
    "f_adds_a_dimension": Refused(CONTRACT + r"\(3, 5, 1\)", lambda: lambda z, x: good_cell(z, x)[..., None]),
    "f_returns_one_sample_for_all": Refused(CONTRACT + r"\(1, 5\)", lambda: lambda z, x: good_cell(z, x)[:1]),
    "f_changes_shape_later": Refused(CONTRACT + r"\(5, 3\)", after(2, lambda: lambda z, x: good_cell(z, x).t())),
    "f_returns_another_dtype": Refused(CONTRACT + r".*torch.float64", lambda: lambda z, x: good_cell(z, x).double()),
    "f_changes_dtype_later": Refused(CONTRACT + r".*torch.float16", after(2, lambda: lambda z, x: z.half())),
    "f_returns_another_device": Refused(CONTRACT + r".*on meta", lambda: lambda z, x: good_cell(z, x).to("meta")),
    "f_returns_nothing": Refused(CONTRACT + "NoneType", lambda: lambda z, x: None),
    "f_returns_a_pair": Refused(CONTRACT + "tuple", lambda: lambda z, x: (good_cell(z, x), x)),
    "f_works_in_place": Refused(r"f wrote into its argument.* let f work on z\.clone\(\)", lambda: in_place),
    "f_works_in_place_later": Refused("f wrote into its argument", after(2, lambda: in_place)),
    "f_works_in_place_on_one_sample": Refused("f wrote into its argument", lambda: in_place_and_another_returned),
    "no_samples": Refused(ELEMENTS, x=torch.zeros(0, 5)),
    "no_elements": Refused(ELEMENTS, x=torch.zeros(3, 0)),
    "no_batch": Refused(ELEMENTS, x=torch.tensor(1.0)),
    "whole_numbers": Refused(ELEMENTS, x=torch.ones(3, 5, dtype=torch.int64)),
    "complex_numbers": Refused(ELEMENTS, x=torch.ones(3, 5, dtype=torch.complex64)),
    "eight_bits": Refused("z0 must be float64, .*got torch.float8", x=GOOD.to(torch.float8_e4m3fn)),
    "sparse": Refused(r"z0 must be a dense tensor, .*z0\.to_dense\(\)", x=GOOD.to_sparse()),
}
each_refusal = pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)


@each_solver
@each_refusal
def test_what_no_solve_can_work_with_is_refused_by_name(solver: Solver, row: Refused) -> None:
    cell = row.cell()
    with pytest.raises(ValueError, match=row.says):
        solver.solve(lambda z: cell(z, row.x), torch.zeros_like(row.x))


@each_solver
@each_refusal
def test_what_no_layer_can_work_with_is_refused_by_name(solver: Solver, row: Refused) -> None:
    layer = DEQ(row.cell(), solver, Implicit(solver))
    with pytest.raises(ValueError, match=row.says):
        layer(row.x.clone().requires_grad_() if row.x.is_floating_point() else row.x)
    # Nothing is left of it: the layer gives what a new one gives.
    layer.cell = good_cell
    assert torch.equal(layer(GOOD), DEQ(good_cell, solver, Implicit(solver))(GOOD))


# What spoils some samples.


@dataclass(frozen=True)
class Spoilt:
    """A cell, made anew for each try, that no solve can finish for the samples named; the others are those of x."""

    cell: Callable[[], Cell]
    samples: tuple[int, ...]
    x: Tensor = GOOD


HUGE = torch.tensor([[0.5, 0.25], [6e4, 6e4], [-0.5, 1.0]], dtype=torch.float16)
"""The second sample's residual at z0 = -x overflows in half precision."""


def overflowing(z: Tensor, x: Tensor) -> Tensor:
    """f - z is beyond 65,504 wherever z has not the sign of x."""
    return torch.where(x.abs() > 1e4, torch.where(z * x.sign() > 0, -x, x), 0.5 * torch.sin(z) + x)


SPOILT = {
    **{
        f"{name}_in_one_sample_{when}": Spoilt(after(first, lambda value=value: bad_at(value, (1, 3))), (1,))
        for name, value in (("nan", math.nan), ("inf", math.inf), ("minus_inf", -math.inf))
        for when, first in (("at_once", 0), ("later", 3))
    },
    "nan_in_two_samples": Spoilt(lambda: bad_at(math.nan, [0, 2]), (0, 2)),
    "nan_in_all_samples": Spoilt(lambda: bad_at(math.nan, slice(None)), (0, 1, 2)),
    "inf_in_all_samples_later": Spoilt(after(3, lambda: bad_at(math.inf, slice(None))), (0, 1, 2)),
    "nan_in_the_injection": Spoilt(lambda: good_cell, (1,), GOOD.index_fill(0, torch.tensor([1]), math.nan)),
    "fp16_overflow_in_the_residual": Spoilt(lambda: overflowing, (1,), HUGE),
    "fp32_overflow_of_f": Spoilt(lambda: lambda z, x: torch.where(x > 1.05, 1e38 + 10 * z, good_cell(z, x)), (2,)),
}
each_spoilt = pytest.mark.parametrize("row", SPOILT.values(), ids=SPOILT)


def others(row: Spoilt) -> list[int]:
    return [sample for sample in range(len(row.x)) if sample not in row.samples]


def check_spoilt(solution: Solution, clean: Solution | None, row: Spoilt) -> None:
    """clean: of the other samples alone, None where there are none."""
    bad, good = list(row.samples), others(row)
    assert not solution.converged[bad].any()
    assert torch.isfinite(solution.z).all(), "what is returned is the last finite iterate, marked as not converged"
    if clean is not None:
        for name in ("z", "residual", "iterations", "converged"):
            assert torch.equal(getattr(solution, name)[good], getattr(clean, name)), name


@each_solver
@each_spoilt
@pytest.mark.parametrize("stop", ["max", "mean"])
def test_a_spoilt_sample_is_reported_and_changes_no_bit_of_the_others(solver: Solver, row: Spoilt, stop: str) -> None:
    solver = replace(for_dtype(solver, row.x.dtype), stop=stop)
    cell, good = row.cell(), others(row)
    solution = solver.solve(lambda z: cell(z, row.x), torch.zeros_like(row.x))
    clean = solver.solve(lambda z: good_cell_of(row)(z, row.x[good]), torch.zeros_like(row.x[good])) if good else None
    if stop == "mean" and clean is not None and solution.evaluations != clean.evaluations:
        # A sample that is still finite takes part in the mean: only that it is reported can be asked for.
        clean = None
    check_spoilt(solution, clean, row)
    if clean is None and not good:
        assert solution.evaluations <= 8, "where no sample is left there is nothing to go on for"


def good_cell_of(row: Spoilt) -> Cell:
    return overflowing if row.x.dtype == torch.float16 else good_cell


@each_solver
@each_gradient
@each_spoilt
def test_a_spoilt_sample_changes_no_bit_of_the_gradients_of_the_others(
    solver: Solver, gradient: Callable[[Solver], Gradient], row: Spoilt
) -> None:
    solver = for_dtype(solver, row.x.dtype)
    good = others(row)

    def solved(cell: Cell, x: Tensor) -> tuple[Tensor, DEQ]:
        x = x.clone().requires_grad_()
        layer = DEQ(cell, solver, gradient(solver))
        layer(x).square().sum().backward()
        assert x.grad is not None
        return x.grad, layer

    grad, layer = solved(row.cell(), row.x)
    assert layer.last_solution is not None
    if not good:
        check_spoilt(layer.last_solution, None, row)
        return
    clean_grad, clean = solved(good_cell_of(row), row.x[good])
    check_spoilt(layer.last_solution, clean.last_solution, row)
    assert torch.equal(grad[good], clean_grad)
    assert (layer.last_adjoint is None) == (clean.last_adjoint is None)
    if layer.last_adjoint is not None and clean.last_adjoint is not None:
        assert torch.equal(layer.last_adjoint.converged[good], clean.last_adjoint.converged)


# What is unusual, and right.


@dataclass(frozen=True)
class Unusual:
    """A cell and an input that look odd and have an answer."""

    cell: Cell
    x: Tensor
    z: Callable[[Tensor], Tensor]
    """x -> the fixed point."""
    z0: Callable[[Tensor], Tensor] = torch.zeros_like
    evaluations: int | None = None
    """How many it takes at most, where that is known."""
    gradient: bool = True
    """Whether the adjoint equation has a solution."""


def halved(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * z + x


SYMMETRIC = torch.eye(4).expand(3, 4, 4).contiguous()
IMAGES = torch.linspace(0.1, 2, 2 * 3 * 4 * 5).view(2, 3, 4, 5)

UNUSUAL = {
    "one_sample": Unusual(halved, GOOD[:1], lambda x: 2 * x),
    "one_element": Unusual(halved, GOOD[:, :1], lambda x: 2 * x),
    "one_sample_of_one_element": Unusual(halved, GOOD[:1, :1], lambda x: 2 * x),
    "no_dimension_but_the_batch": Unusual(halved, GOOD[:, 0], lambda x: 2 * x),
    "f_returns_its_input": Unusual(lambda z, x: z, GOOD, lambda x: x, torch.clone, 1, gradient=False),
    "f_returns_a_view_of_its_input": Unusual(
        lambda z, x: z.view(5, 3).view(3, 5), GOOD, lambda x: x, torch.clone, 1, gradient=False
    ),
    "f_transposes_without_a_copy": Unusual(lambda z, x: z.mT, SYMMETRIC, lambda x: x, torch.clone, 1, gradient=False),
    "f_is_constant": Unusual(lambda z, x: x.sin(), GOOD, torch.sin, evaluations=3),
    "f_is_zero": Unusual(lambda z, x: 0.0 * x, GOOD, lambda x: 0.0 * x, evaluations=1),
    "f_returns_the_same_tensor_each_time": Unusual(lambda z, x: x, GOOD, torch.clone, evaluations=3),
    "channels_last": Unusual(halved, IMAGES.to(memory_format=torch.channels_last), lambda x: 2 * x),
    "f_returns_channels_last": Unusual(
        lambda z, x: halved(z, x).to(memory_format=torch.channels_last), IMAGES, lambda x: 2 * x
    ),
    "transposed": Unusual(halved, GOOD.t(), lambda x: 2 * x),
    "every_second_element": Unusual(halved, GOOD[:, ::2], lambda x: 2 * x),
    "expanded": Unusual(halved, GOOD[:1].expand(3, 5), lambda x: 2 * x),
    "f_returns_an_expanded_tensor": Unusual(
        lambda z, x: halved(z[:, :1], x[:, :1]).expand(3, 5), GOOD, lambda x: 2 * x[:, :1].expand(3, 5)
    ),
    "tiny": Unusual(halved, 1e-30 * GOOD, lambda x: 2 * x),
    "large": Unusual(halved, 1e30 * GOOD, lambda x: 2 * x),
    "float64": Unusual(halved, GOOD.double(), lambda x: 2 * x),
    "bfloat16": Unusual(halved, GOOD.bfloat16(), lambda x: 2 * x),
    "half": Unusual(halved, GOOD.half(), lambda x: 2 * x),
}
each_unusual = pytest.mark.parametrize("row", UNUSUAL.values(), ids=UNUSUAL)


@each_solver
@each_unusual
def test_what_is_unusual_is_solved(solver: Solver, row: Unusual) -> None:
    solver = for_dtype(solver, row.x.dtype)
    kept, given = row.x.clone(), row.z0(row.x)
    solution = solver.solve(lambda z: row.cell(z, row.x), given)
    assert torch.equal(row.x, kept)
    assert torch.equal(given, row.z0(row.x)), "z0 is not modified"
    assert solution.converged.all()
    assert solution.z.shape == row.x.shape
    torch.testing.assert_close(solution.z, row.z(row.x), rtol=5 * NEAR[row.x.dtype], atol=1e-6)
    assert row.evaluations is None or solution.evaluations <= row.evaluations
    # Strides and memory are the caller's business, values the solver's: the same bits from a contiguous input.
    straight = solver.solve(lambda z: row.cell(z, row.x.contiguous()).contiguous(), given.contiguous())
    assert torch.equal(solution.z, straight.z)


@each_solver
@each_unusual
def test_what_is_unusual_has_its_gradient_through_a_layer(solver: Solver, row: Unusual) -> None:
    solver = for_dtype(solver, row.x.dtype)
    x = row.x.clone().requires_grad_()
    layer = DEQ(row.cell, solver, Implicit(solver))
    z = layer(x, z0=row.z0(row.x))
    assert torch.isfinite(z).all()
    if not z.requires_grad:  # f does not depend on x: nothing to differentiate
        assert not row.gradient
        return
    z.sum().backward()
    assert layer.last_adjoint is not None
    assert layer.last_adjoint.converged.all()
    exact = row.x.clone().requires_grad_()
    row.z(exact).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad, exact.grad, rtol=5 * NEAR[row.x.dtype], atol=1e-6)


@pytest.mark.parametrize(
    ("larger", "largest"),
    [
        (Anderson(window=50, backend="torch", max_iter=7, tol=0.0), {"window": 7}),
        (Anderson(window=50, backend="auto", max_iter=7, tol=0.0), {"window": 7}),
        (Broyden(memory=50, max_iter=7, tol=0.0), {"memory": 7}),
    ],
    ids=["anderson_torch", "anderson_auto", "broyden"],
)
def test_a_window_larger_than_max_iter_is_one_that_never_fills(larger: Solver, largest: dict[str, int]) -> None:
    x = torch.randn(3, 40)
    f = lambda z: torch.tanh(z.roll(1, 1)) * 0.9 + x  # noqa: E731
    found = larger.solve(f, torch.zeros_like(x))
    filled = replace(larger, **largest).solve(f, torch.zeros_like(x))  # type: ignore[arg-type]
    assert found.evaluations == 7
    assert torch.isfinite(found.z).all()
    torch.testing.assert_close(found.z, filled.z, rtol=1e-5, atol=1e-6)


def test_a_map_without_a_solution_of_its_adjoint_is_reported_and_finite() -> None:
    # f(z) = z + 0 x: every z is a fixed point, u = u + dL/dz has no solution.
    for solver in SOLVERS.values():
        if isinstance(solver, Anderson) and solver.backend == "native" and NO_COMPILER:
            continue
        x = GOOD.clone().requires_grad_()
        layer = DEQ(lambda z, x: z + 0.0 * x, solver, Implicit(solver))
        layer(x, z0=GOOD).sum().backward()
        assert layer.last_solution is not None
        assert layer.last_solution.converged.all()
        assert layer.last_adjoint is not None
        assert not layer.last_adjoint.converged.any()
        assert torch.isfinite(layer.last_adjoint.z).all()


# The user's own exceptions.


class Held(nn.Module):
    """A cell with all that a layer holds during a solve: a mask, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        self.dropout = VariationalDropout(0.3)
        self.fails_after, self.count = 10**9, 0
        self.error = KeyError("the user's own")

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        if self.count > self.fails_after:
            raise self.error
        return self.dropout(torch.tanh(0.5 * self.linear(z) + x))


def state_left(cell: Held) -> tuple[object, ...]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = sum(len(getattr(module, kind)) for module in cell.modules() for kind in kinds)
    parametrizations: Any = cell.linear.parametrizations
    return cell.dropout._masks, hooks, type(parametrizations.weight).__name__, list(cell.state_dict())


@each_solver
def test_an_exception_in_f_comes_out_as_it_is_and_leaves_nothing_behind(solver: Solver) -> None:
    error = KeyError("the user's own")

    def failing(z: Tensor, x: Tensor) -> Tensor:
        raise error

    before = solver.solve(lambda z: good_cell(z, GOOD), torch.zeros_like(GOOD))
    for first in (0, 2):
        cell = after(first, lambda: failing)()
        with pytest.raises(KeyError) as caught:
            solver.solve(lambda z, cell=cell: cell(z, GOOD), torch.zeros_like(GOOD))
        assert caught.value is error
    again = solver.solve(lambda z: good_cell(z, GOOD), torch.zeros_like(GOOD))
    assert torch.equal(again.z, before.z)
    assert torch.equal(again.residual, before.residual)
    assert again.evaluations == before.evaluations


@each_solver
@each_gradient
def test_an_exception_in_a_cell_leaves_no_mask_no_weight_and_no_hook_behind(
    solver: Solver, gradient: Callable[[Solver], Gradient]
) -> None:
    cell = Held()
    layer = DEQ(cell, solver, gradient(solver))
    before = state_left(cell)

    def trained() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        cell.zero_grad()
        z = layer(GOOD)
        z.square().sum().backward()
        return (z.detach(), *(parameter.grad.clone() for parameter in cell.parameters() if parameter.grad is not None))

    expected = trained()
    cell.count = 0
    layer(GOOD)
    recorded = cell.count  # of the solve and, last, what autograd records
    for fails_after in (0, 2, recorded - 1):
        cell.count, cell.fails_after = 0, fails_after
        with pytest.raises(KeyError) as caught:
            layer(GOOD)
        assert caught.value is cell.error
        assert state_left(cell) == before
        cell.fails_after = 10**9
        for got, wanted in zip(trained(), expected, strict=True):
            assert torch.equal(got, wanted)


class FailsBackward(torch.autograd.Function):
    """The identity, whose gradient raises what it was given."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        raise ctx.error


@each_solver
def test_an_exception_in_the_backward_solve_comes_out_as_it_is(solver: Solver) -> None:
    error = KeyError("the user's own")
    layer = DEQ(lambda z, x: FailsBackward.apply(good_cell(z, x), error), solver, Implicit(solver))
    x = GOOD.clone().requires_grad_()
    z = layer(x)
    with pytest.raises(KeyError) as caught:
        z.sum().backward()
    assert caught.value is error
    assert layer.last_adjoint is None
    layer.cell = good_cell
    x.grad = None
    layer(x).sum().backward()
    fresh = GOOD.clone().requires_grad_()
    DEQ(good_cell, solver, Implicit(solver))(fresh).sum().backward()
    assert torch.equal(x.grad, fresh.grad)  # type: ignore[arg-type]
