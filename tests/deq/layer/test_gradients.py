"""Gradients through the fixed point: right, at constant memory, and at home in autograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from deq import DEQ
from deq.layer import Gradient, Implicit, JacobianFree, Phantom, Unrolled
from deq.solvers import Anderson, Forward, Solver
from deq.solvers.scaling import power_of_two_norm

TIGHT = Anderson(window=5, tol=1e-13, max_iter=200)
GRADIENTS: list[Gradient] = [Implicit(), JacobianFree(), Phantom(steps=4, damping=0.7), Unrolled(steps=3)]
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda gradient: type(gradient).__name__.lower())


class Cell(nn.Module):
    """A smooth contraction: tanh(W z + x), the spectral norm of W about ``contraction``."""

    def __init__(self, dim: int = 6, contraction: float = 0.6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        weight = torch.randn(dim, dim, dtype=dtype)
        self.weight = nn.Parameter(weight * contraction / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x)


def layer_and_input(gradient: Gradient | None = None, solver: Solver = TIGHT) -> tuple[DEQ, Tensor]:
    layer = DEQ(Cell(), solver=solver, gradient=gradient)
    return layer, torch.randn(3, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("solver", [TIGHT, Forward(tol=1e-13, max_iter=400)], ids=["anderson", "forward"])
def test_gradcheck_of_the_layer(solver: Solver) -> None:
    layer = DEQ(Cell(dim=4), solver=solver, gradient=Implicit(solver))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, {"cell.weight": weight}, (x,))
        return result

    assert gradcheck(f, (x, layer.cell.weight), eps=1e-6, atol=1e-6)  # type: ignore[union-attr]


def test_implicit_is_the_gradient_of_200_unrolled_steps() -> None:
    layer, x = layer_and_input()
    layer(x).pow(2).sum().backward()
    implicit = (x.grad, layer.cell.weight.grad)  # type: ignore[union-attr]
    z = torch.zeros_like(x)
    for _ in range(200):
        z = layer.cell(z, x)
    unrolled = torch.autograd.grad(z.pow(2).sum(), (x, layer.cell.weight))  # type: ignore[union-attr]
    for got, expected in zip(implicit, unrolled, strict=True):
        assert got is not None
        assert (got - expected).norm() / expected.norm() < 1e-6


def test_jacobian_free_is_the_gradient_of_one_step() -> None:
    layer, x = layer_and_input(JacobianFree())
    z_star = layer(x)
    z_star.pow(2).sum().backward()
    one_step = layer.cell(z_star.detach(), x)
    expected = torch.autograd.grad(one_step, (x, layer.cell.weight), 2 * z_star.detach())  # type: ignore[union-attr]
    for got, wanted in zip((x.grad, layer.cell.weight.grad), expected, strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(got, wanted)
    assert layer.last_adjoint is None


def neumann(layer: DEQ, x: Tensor, steps: int, damping: float) -> tuple[Tensor, Tensor]:
    """Gradients of sum(z*^2) in x and the weight from the series itself: u = damping sum_i (A^T)^i dL/dz*."""
    with torch.no_grad():
        z_star = layer(x)
    u = torch.empty_like(z_star)
    for sample in range(len(x)):
        J = torch.func.jacrev(lambda z, s=sample: layer.cell(z, x[s].detach()))(z_star[sample])
        A = (1 - damping) * torch.eye(len(J), dtype=J.dtype) + damping * J.detach()
        u[sample] = damping * sum(torch.linalg.matrix_power(A.T, i) @ (2 * z_star[sample]) for i in range(steps))
    grads: tuple[Tensor, Tensor] = torch.autograd.grad(layer.cell(z_star, x), (x, layer.cell.weight), u)  # type: ignore[union-attr,assignment]
    return grads


@pytest.mark.parametrize(
    ("gradient", "steps", "damping"),
    [(Phantom(1, 0.5), 1, 0.5), (Phantom(4, 0.7), 4, 0.7), (Phantom(3, 1.0), 3, 1.0), (Unrolled(3), 3, 1.0)],
    ids=repr,
)
def test_phantom_and_unrolled_are_the_neumann_series_cut_where_they_say(
    gradient: Gradient, steps: int, damping: float
) -> None:
    layer, x = layer_and_input(gradient)
    layer(x).pow(2).sum().backward()
    for got, expected in zip((x.grad, layer.cell.weight.grad), neumann(layer, x, steps, damping), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(got, expected)
    assert layer.last_adjoint is None


@pytest.mark.parametrize("gradient", [Phantom(steps=120, damping=0.7), Unrolled(steps=80)], ids=repr)
def test_with_many_steps_phantom_and_unrolled_become_the_implicit_gradient(gradient: Gradient) -> None:
    grads = []
    for kind in (gradient, Implicit()):
        torch.manual_seed(3)
        layer, x = layer_and_input(kind)
        layer(x).pow(2).sum().backward()
        grads.append((x.grad, layer.cell.weight.grad))  # type: ignore[union-attr]
    torch.testing.assert_close(grads[0], grads[1])


def test_phantom_converges_where_unrolled_grows() -> None:
    # J = -1.5: the fixed point is found by Anderson, forward iteration leaves it.
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    exact = 1 / 2.5
    grads = []
    for gradient in (Phantom(steps=30, damping=0.5), Unrolled(steps=30)):
        out = DEQ(lambda z, x: -1.5 * z + x, solver=TIGHT, gradient=gradient)(x)
        grads.append(torch.autograd.grad(out.sum(), x)[0].item())
    assert grads[0] == pytest.approx(exact, rel=1e-6)
    assert abs(grads[1]) > 1e3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phantom(steps=0), r"steps must be a whole number of evaluations of f, at least 1, got 0"),
        (lambda: Phantom(steps=2.5), r"steps must be a whole number .*, got 2.5"),  # type: ignore[arg-type]
        (lambda: Phantom(damping=0.0), r"damping must be above 0 and at most 1, got 0.0 \(1 takes the plain steps\)"),
        (lambda: Phantom(damping=1.5), r"damping must be above 0 and at most 1, got 1.5"),
        (lambda: Phantom(damping=float("nan")), r"damping must be above 0 and at most 1, got nan"),
        (lambda: Unrolled(steps=-1), r"steps must be a whole number .*, at least 1, got -1"),
        (lambda: Unrolled(steps=True), r"steps must be a whole number .*, got True"),
    ],
)
def test_options_outside_their_limits_are_refused_by_value(make: Callable[[], Gradient], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Counting(nn.Module):
    """A cell that counts its evaluations."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.count = cell, 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        result: Tensor = self.cell(z, x)
        return result


def saved_bytes(work: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # an address stays one tensor's as long as the tensor lives
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("gradient", "recorded"),
    [(Implicit(), 1), (JacobianFree(), 1), (Phantom(4, 0.5), 4), (Unrolled(4), 4), (Unrolled(8), 8)],
    ids=repr,
)
def test_each_gradient_costs_the_evaluations_and_the_memory_that_it_says(gradient: Gradient, recorded: int) -> None:
    solver = Anderson(tol=1e-4, max_iter=50)
    cell = Counting(Cell(dim=64))
    layer = DEQ(cell, solver=solver, gradient=gradient)
    x = torch.randn(16, 64, dtype=torch.float64)
    outputs: list[Tensor] = []
    saved = saved_bytes(lambda: outputs.append(layer(x)))
    assert layer.last_solution is not None
    assert cell.count == layer.last_solution.evaluations + recorded
    outputs[0].sum().backward()
    assert cell.count == layer.last_solution.evaluations + recorded, "backward evaluates f no more"
    z, weight = 16 * 64 * 8, 64 * 64 * 8
    # An evaluation keeps its argument and the tanh's value, which is the next one's argument at damping 1. The weight
    # is kept once, and only where a product with J is going to be asked for.
    steps = recorded * (z if isinstance(gradient, Unrolled) else 2 * z)
    products = weight if recorded > 1 or isinstance(gradient, Implicit) else 0
    assert steps + products <= saved <= steps + products + z


def test_jacobian_free_points_the_same_way_as_implicit() -> None:
    grads = []
    for gradient in (Implicit(), JacobianFree()):
        torch.manual_seed(3)
        layer, x = layer_and_input(gradient)
        layer(x).pow(2).sum().backward()
        assert x.grad is not None
        grads.append(x.grad.flatten())
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.5
    assert not torch.allclose(grads[0], grads[1])


@each_gradient
def test_training_and_inference_return_the_same_numbers(gradient: Gradient) -> None:
    layer, x = layer_and_input(gradient, Anderson(tol=1e-2))
    trained = layer(x)
    with torch.no_grad():
        inferred = layer(x)
    assert trained.requires_grad
    assert not inferred.requires_grad
    assert torch.equal(trained, inferred)
    assert layer.last_solution is not None
    assert torch.equal(inferred, layer.last_solution.z)


def test_both_solves_are_kept_on_the_layer() -> None:
    adjoint_solver = Anderson(window=3, tol=1e-4, max_iter=30)
    layer, x = layer_and_input(Implicit(adjoint_solver), Anderson(tol=1e-6))
    assert layer.last_solution is None
    out = layer(x)
    assert layer.last_solution is not None
    assert layer.last_solution.converged.all()
    assert layer.last_adjoint is None
    out.sum().backward()
    adjoint = layer.last_adjoint
    assert adjoint is not None
    assert (adjoint.residual <= 1e-4).all()
    assert 1 < adjoint.evaluations < 30
    # u = J^T u + dL/dz*, checked with the Jacobian itself.
    z = layer.last_solution.z
    for sample in range(3):
        J = torch.func.jacrev(lambda z, s=sample: layer.cell(z, x[s]))(z[sample])
        expected = torch.linalg.solve(torch.eye(6, dtype=z.dtype) - J.T, torch.ones(6, dtype=z.dtype))
        torch.testing.assert_close(adjoint.z[sample], expected, rtol=1e-3, atol=1e-3)
    layer(x)
    assert layer.last_adjoint is None, "the account of an older backward must not stand beside a newer forward"


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
def test_the_adjoint_solve_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    # In float32 the squares of gradients of 1e-30 are zero.
    cell = Cell(dtype=torch.float32, contraction=0.9)
    layer = DEQ(cell, solver=Anderson(tol=1e-5), gradient=Implicit(Anderson(tol=1e-5)))
    x = torch.randn(4, 6)
    layer(x).sum().backward()
    assert layer.last_adjoint is not None
    expected, reference = cell.weight.grad, layer.last_adjoint
    cell.weight.grad = None
    (layer(x).sum() * scale).backward()
    assert torch.equal(layer.last_adjoint.iterations, reference.iterations)
    assert layer.last_adjoint.converged.all()
    torch.testing.assert_close(cell.weight.grad, expected * scale, rtol=1e-4, atol=1e-6 * scale)  # type: ignore[operator]


def test_a_sample_without_gradient_costs_nothing_and_stays_zero() -> None:
    layer, x = layer_and_input()
    layer(x)[1:].sum().backward()
    assert layer.last_adjoint is not None
    assert layer.last_adjoint.iterations[0] == 1
    assert layer.last_adjoint.converged.all()
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.zeros(6, dtype=torch.float64))


@each_gradient
def test_backward_twice_with_retain_graph_gives_the_same_gradients_and_without_it_torchs_own_error(
    gradient: Gradient,
) -> None:
    layer, x = layer_and_input(gradient)
    loss = layer(x).pow(2).sum()
    inputs = (x, layer.cell.weight)  # type: ignore[union-attr]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)  # type: ignore[arg-type]
    second = torch.autograd.grad(loss, inputs)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)  # type: ignore[arg-type]


def test_several_layers_in_one_model() -> None:
    first, second = DEQ(Cell(), solver=TIGHT), DEQ(Cell(), solver=TIGHT)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: second(2 * first(x)), (x,), atol=1e-6)
    assert first.last_adjoint is not None
    assert second.last_adjoint is not None


class Nested(nn.Module):
    """A cell that solves a fixed point of its own in every evaluation."""

    def __init__(self, gradient: Gradient) -> None:
        super().__init__()
        self.inner = DEQ(Cell(dim=4), solver=TIGHT, gradient=gradient)
        self.outer = Cell(dim=4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        result: Tensor = self.outer(0.5 * self.inner(z), x)
        return result


def test_a_layer_inside_the_cell_of_another() -> None:
    cell = Nested(Implicit())
    layer = DEQ(cell, solver=Anderson(tol=1e-12, max_iter=100))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        weights = {"cell.inner.cell.weight": inner, "cell.outer.weight": outer}
        result: Tensor = torch.func.functional_call(layer, weights, (x,))
        return result

    assert gradcheck(f, (x, cell.inner.cell.weight, cell.outer.weight), atol=1e-6)  # type: ignore[union-attr]


@each_gradient
def test_every_gradient_passes_a_layer_inside_the_cell_of_another(gradient: Gradient) -> None:
    cell = Nested(gradient)
    layer = DEQ(cell, solver=Anderson(tol=1e-10, max_iter=100), gradient=gradient)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    loss = layer(x).sum()
    first = torch.autograd.grad(loss, (x, *layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, (x, *layer.parameters()))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


@each_gradient
def test_parameters_without_gradient_and_inputs_without_gradient(gradient: Gradient) -> None:
    layer = DEQ(Cell(), solver=TIGHT, gradient=gradient)
    x = torch.randn(2, 6, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.cell.weight.grad is not None  # type: ignore[union-attr]
    layer.requires_grad_(False)
    x.requires_grad_()
    layer.cell.weight.grad = None  # type: ignore[union-attr]
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.cell.weight.grad is None  # type: ignore[union-attr]


@each_gradient
def test_the_output_requires_a_gradient_only_if_something_does(gradient: Gradient) -> None:
    layer = DEQ(Cell(), solver=TIGHT, gradient=gradient).requires_grad_(False)
    x = torch.randn(2, 6, dtype=torch.float64)
    frozen = layer(x)
    assert not frozen.requires_grad
    assert layer.last_solution is not None
    frozen.zero_()
    assert layer.last_solution.z.any(), "what is returned is the caller's to write to"
    outer = DEQ(Nested(gradient), solver=TIGHT, gradient=gradient).requires_grad_(False)
    assert not outer(torch.randn(2, 4, dtype=torch.float64)).requires_grad
    outer.cell.inner.requires_grad_()  # type: ignore[union-attr]
    assert outer(torch.randn(2, 4, dtype=torch.float64)).requires_grad
    assert layer(x.requires_grad_()).requires_grad
    # A cell whose value is a leaf, and one whose value is z itself.
    assert DEQ(lambda z, x: x, solver=TIGHT, gradient=gradient)(x).requires_grad
    assert not DEQ(lambda z, x: z, solver=TIGHT, gradient=gradient)(x).requires_grad


def test_the_backward_pass_leaves_no_gradient_at_z() -> None:
    seen: list[Tensor] = []

    def cell(z: Tensor, x: Tensor) -> Tensor:
        seen.append(z)
        return 0.5 * torch.tanh(z) + x

    x = torch.randn(2, 6, requires_grad=True)
    DEQ(cell)(x).sum().backward()
    node = seen[-1].grad_fn
    assert node is not None
    (leaf,) = [parent.variable for parent, _ in node.next_functions if parent is not None]  # type: ignore[attr-defined]
    assert leaf.shape == x.shape
    assert leaf.grad is None


def test_a_cell_that_ignores_z() -> None:
    layer = DEQ(lambda z, x: 2 * x, solver=TIGHT)
    x = torch.ones(2, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


def test_the_output_may_be_modified_in_place() -> None:
    layer, x = layer_and_input()
    out = layer(x)
    assert layer.last_solution is not None
    kept = layer.last_solution.z.clone()
    out.relu_().sum().backward()
    assert torch.equal(layer.last_solution.z, kept)
    assert x.grad is not None
    with torch.no_grad():
        out = layer(x)
    out.zero_()
    assert torch.equal(layer.last_solution.z, kept)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_in_the_cell_is_refused_and_the_other_kind_gives_the_gradient() -> None:
    # The reentrant kind hides its parameters from the graph: a layer that trusts the graph trains nothing.
    linear = nn.Linear(6, 6).double()

    def gradient_of(reentrant: bool | None) -> Tensor:
        def block(z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.3 * linear(z) + x)

        def cell(z: Tensor, x: Tensor) -> Tensor:
            found: Tensor = block(z, x) if reentrant is None else checkpoint(block, z, x, use_reentrant=reentrant)
            return found

        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
        linear.zero_grad()
        DEQ(cell, solver=TIGHT)(x).sum().backward()
        assert linear.weight.grad is not None
        return linear.weight.grad

    torch.testing.assert_close(gradient_of(False), gradient_of(None))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        gradient_of(True)


@each_gradient
def test_a_second_derivative_is_refused_in_a_sentence(gradient: Gradient) -> None:
    layer, x = layer_and_input(gradient)
    for loss in (layer(x).sum(), layer(x).pow(2).sum()):
        with pytest.raises(RuntimeError, match="no second derivatives: leave out create_graph=True"):
            torch.autograd.grad(loss, x, create_graph=True)


@each_gradient
def test_every_gradient_under_autocast_is_that_in_float32_but_for_rounding(gradient: Gradient) -> None:
    cell = Cell(dtype=torch.float32)
    layer = DEQ(cell, solver=Anderson(tol=5e-3, max_iter=30), gradient=gradient)
    x = torch.randn(16, 6)
    grads = []
    for enabled in (False, True):
        cell.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = layer(x)
        assert out.dtype == torch.float32
        out.pow(2).sum().backward()
        assert cell.weight.grad is not None
        grads.append(cell.weight.grad)
    assert not torch.equal(*grads)
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


@each_gradient
def test_every_gradient_passes_a_compiled_cell(gradient: Gradient) -> None:
    torch.compiler.reset()
    cell = Cell()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for used in (cell, torch.compile(cell)):
        loss = DEQ(used, solver=TIGHT, gradient=gradient)(x).pow(2).sum()
        first = torch.autograd.grad(loss, (x, cell.weight), retain_graph=isinstance(gradient, Implicit))
        grads.append(first)
    torch.testing.assert_close(grads[0], grads[1])


def test_under_autocast_the_state_stays_float32() -> None:
    linear = nn.Linear(6, 6)
    layer = DEQ(lambda z, x: torch.tanh(0.3 * linear(z) + x), solver=Anderson(tol=1e-3, max_iter=30))
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(linear(x))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert linear.weight.grad is not None
    assert torch.isfinite(linear.weight.grad).all()
    assert layer.last_adjoint is not None
    assert layer.last_adjoint.residual.max() < 2e-2


def test_warm_start_from_the_solution_stops_at_once() -> None:
    layer, x = layer_and_input(solver=Anderson(tol=1e-6))
    z_star = layer(x).detach()
    again = layer(x, z0=z_star)
    assert layer.last_solution is not None
    assert layer.last_solution.evaluations == 1
    assert torch.equal(again, z_star)


def test_a_cell_that_changes_the_shape_is_named() -> None:
    layer = DEQ(lambda z, x: z[:, :2])
    with pytest.raises(ValueError, match=r"f must return what it is given, \(3, 6\)"):
        layer(torch.randn(3, 6))


class PeakBytes(TorchDispatchMode):
    """The largest number of bytes that results of operations held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
                    self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_bytes(work: Callable[[], object]) -> int:
    gc.collect()
    with PeakBytes() as mode:
        work()
    return mode.peak


def test_memory_does_not_grow_with_the_number_of_iterations() -> None:
    cell = Cell(dim=512, contraction=0.99, dtype=torch.float32)
    x = torch.randn(16, 512)
    saved: list[int] = []
    peaks: list[int] = []
    for max_iter in (6, 30):
        solver = Anderson(window=3, tol=0.0, max_iter=max_iter)
        layer = DEQ(cell, solver=solver, gradient=Implicit(solver))
        saved.append(0)
        cell.weight.grad = None

        def count(tensor: Tensor) -> Tensor:
            saved[-1] += tensor.nbytes
            return tensor

        def step(layer: DEQ = layer) -> None:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                out = layer(x)
            out.sum().backward()

        peaks.append(peak_bytes(step))
        assert layer.last_solution is not None
        assert layer.last_adjoint is not None
        assert layer.last_solution.evaluations == layer.last_adjoint.evaluations == max_iter
    assert saved[0] == saved[1] > 0
    # 2 m B d of history, 4 bytes each, is the least that could be there: the measurement sees it.
    assert peaks[0] > 2 * 3 * 16 * 512 * 4
    assert peaks[1] <= peaks[0] * 1.01


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 5000.0), (torch.float32, 1.8e38), (torch.float32, 1e-38)])
def test_the_scale_of_a_right_side_is_finite_and_above_zero(dtype: torch.dtype, size: float) -> None:
    scale = power_of_two_norm(torch.full((2, 64), size, dtype=dtype))
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_an_input_changed_in_place_is_named_where_the_backward_solve_needs_it() -> None:
    solver = Anderson(window=3, tol=1e-8, max_iter=100, compact=True)
    layer = DEQ(Cell(), solver=solver, gradient=Implicit(solver))
    x = torch.randn(8, 6, dtype=torch.float64) * torch.logspace(1, -3, 8, dtype=torch.float64)[:, None]
    h = x.clone()
    out = layer(h)
    h.mul_(0)
    with pytest.raises(ValueError, match="modified in place or replaced"):
        out.sum().backward()


def test_swapped_parameters_are_named_where_the_backward_solve_needs_them() -> None:
    solver = Anderson(window=3, tol=1e-8, max_iter=100, compact=True)
    layer = DEQ(Cell(), solver=solver, gradient=Implicit(solver))
    x = torch.randn(8, 6, dtype=torch.float64) * torch.logspace(1, -3, 8, dtype=torch.float64)[:, None]
    weight = torch.randn(6, 6, dtype=torch.float64).mul(0.1).requires_grad_()
    out = torch.func.functional_call(layer, {"cell.weight": weight}, (x,))
    with pytest.raises(ValueError, match="modified in place or replaced"):
        out.sum().backward()


def test_a_layer_used_twice_keeps_both_accounts_of_its_last_use() -> None:
    layer, x = layer_and_input()
    (layer(x[:2]).sum() + layer(x).sum()).backward()
    assert layer.last_solution is not None
    assert layer.last_adjoint is not None
    assert layer.last_solution.z.shape == layer.last_adjoint.z.shape == (3, 6)
