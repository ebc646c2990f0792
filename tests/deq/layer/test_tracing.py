"""What reads a layer instead of running it: compiled around to the bit, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.autograd import forward_ad

from deq import DEQ
from deq.kernels import AndersonWindow
from deq.layer import JacobianFree, Phantom
from deq.solvers import Anderson, Broyden, Forward, Solver


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


@pytest.fixture(autouse=True)
def forget_what_is_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def without_parameters() -> DEQ:
    return DEQ(lambda z, x: torch.tanh(0.5 * z + x), Anderson())


# Compiled models. Of the inductor's options those that change what is traced; the code that it makes is not ours.


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("inside", ["alone", "in a model"])
def test_a_compiled_model_gives_the_eager_bits_at_every_batch_size(
    backend: str, dynamic: bool | None, inside: str
) -> None:
    layer = DEQ(Cell(), Anderson(tol=1e-4))
    model = layer if inside == "alone" else nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 3))
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for batch in (4, 5, 4, 1, 3):
        x = torch.randn(batch, 8)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(x)
            out.square().sum().backward()
            results.append([out.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for got, expected in zip(results[1], results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "reduce-overhead"])
def test_the_default_compiler_too(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), DEQ(Cell()))
    compiled = torch.compile(model, **options)
    for batch in (4, 5):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_compiled_train_step_and_a_compiled_loop_around_the_window() -> None:
    model = nn.Sequential(nn.Linear(8, 8), DEQ(Cell()))
    x = torch.randn(4, 8)

    def step(x: Tensor) -> Tensor:
        return model(x).square().mean()

    def loop(x: Tensor) -> Tensor:
        window, z = AndersonWindow(4, 8), torch.zeros(4, 8)
        for _ in range(5):
            z = window.step(z, torch.tanh(0.5 * z + x))
        return z

    def solve(x: Tensor) -> Tensor:
        return Anderson().solve(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x)).z + 1

    for function in (step, loop, solve):
        assert torch.equal(torch.compile(function, backend="eager")(x), function(x))


def test_a_compiled_cell_stays_compiled_inside_a_compiled_model() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    cell = Cell()
    cell.compile(backend=counter)
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), DEQ(cell)), backend="eager")
    model(torch.randn(4, 8)).sum().backward()
    assert counter.frame_count >= 1


@pytest.mark.parametrize("inside", [False, True])
def test_fullgraph_is_refused_and_says_why(inside: bool) -> None:
    layer = without_parameters()
    model = nn.Sequential(nn.Linear(8, 8), layer) if inside else layer
    with pytest.raises(Exception, match=r"a fixed-point solve runs until .* leave fullgraph=True out, and compile"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 8))


# What would keep one path of a solve


class _Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = without_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 2)  # type: ignore[no-any-return]


def fake(model: nn.Module, x: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return model(torch.zeros(x.shape))  # type: ignore[no-any-return]


TRACES: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "torch.jit.script": (lambda model, x: torch.jit.script(model), "torch.jit.script cannot compile a DEQ layer"),
    "torch.jit.trace": (torch.jit.trace, "cannot be traced by torch.jit.trace, .* trace the cell"),
    "torch.fx": (lambda model, x: torch.fx.symbolic_trace(model), "cannot be traced by torch.fx, .* make it a leaf"),
    "torch.export": (lambda model, x: torch.export.export(model, (x,)), "cannot be exported, .* export the cell"),
    "a fake tensor": (fake, "needs data, .* call it on a real one"),
    "the meta device": (lambda model, x: model(x.to("meta")), "needs data, .* call it on a real one"),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", TRACES)
@pytest.mark.filterwarnings("ignore")
def test_what_would_keep_one_path_of_a_solve_is_refused(name: str, inside: bool) -> None:
    trace, says = TRACES[name]
    with pytest.raises(NotImplementedError, match=says) as refused:
        trace(_Seen() if inside else without_parameters(), torch.randn(4, 8))
    assert "\n" not in str(refused.value)


# Function transforms and forward mode

TRANSFORMS: dict[str, tuple[Callable[[Callable[[Tensor], Tensor], Tensor], Any], str]] = {
    "grad": (lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), "torch.func.grad, vjp, jacrev or hessian"),
    "vjp": (lambda f, x: torch.func.vjp(f, x), "torch.func.grad, vjp"),
    "jacrev": (lambda f, x: torch.func.jacrev(f)(x), "torch.func.grad, vjp"),
    "jacfwd": (lambda f, x: torch.func.jacfwd(f)(x), "torch.func.jvp or jacfwd"),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (x,)), "torch.func.jvp or jacfwd"),
    "hessian": (lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x), "torch.func"),
    "vmap": (lambda f, x: torch.func.vmap(f)(x.expand(3, 4, 8)), "torch.func.vmap: call it on one batch"),
    "forward-mode jacobian": (
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
        "tangents of forward mode|torch.func",
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("what", ["layer", "solve", "window"])
def test_function_transforms_are_refused(name: str, what: str) -> None:
    transform, says = TRANSFORMS[name]
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "layer": without_parameters(),
        "solve": lambda x: Anderson().solve(lambda z: torch.tanh(0.5 * z + x), torch.zeros(4, 8)).z,
        "window": lambda x: AndersonWindow(4, 8).step(x, torch.tanh(x)),
    }
    with pytest.raises(NotImplementedError, match=says) as refused:
        transform(functions[what], torch.randn(4, 8))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Forward()])
@pytest.mark.parametrize("where", ["x", "z0", "a weight", "a buffer", "what the cell closes over"])
def test_a_dual_number_is_refused_wherever_it_comes_from(solver: Solver, where: str) -> None:
    x, one = torch.randn(4, 8), torch.ones(())
    with forward_ad.dual_level():

        def dual(tensor: Tensor, name: str) -> Tensor:
            return forward_ad.make_dual(tensor, torch.ones_like(tensor)) if where == name else tensor

        factor = dual(one, "what the cell closes over")

        class Duals(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.tensor(0.5), requires_grad=False)
                self.register_buffer("shift", torch.zeros(8))

            def forward(self, z: Tensor, x: Tensor) -> Tensor:
                weight, shift = dual(self.weight, "a weight"), dual(self.shift, "a buffer")
                return torch.tanh(weight * factor * z + x + shift)

        layer = DEQ(Duals(), solver)
        with pytest.raises(NotImplementedError, match="tangents of forward mode"):
            layer(dual(x, "x"), z0=dual(torch.zeros(4, 8), "z0"))


def test_outside_a_dual_the_layer_works_while_one_is_about() -> None:
    layer, x = without_parameters(), torch.randn(4, 8)
    expected = layer(x)
    with forward_ad.dual_level():
        assert torch.equal(layer(x), expected)


def test_gradients_by_the_batch_are_refused_and_one_by_one_they_are_right() -> None:
    layer, x = DEQ(lambda z, x: torch.tanh(0.5 * z + x), Anderson(tol=1e-10)), torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="takes no gradients by the batch"):
        torch.autograd.functional.jacobian(layer, x, vectorize=True)
    z = layer(x)
    slope = 1 - z.square()
    expected = torch.diag_embed((slope / (1 - 0.5 * slope)).flatten()).view(3, 2, 3, 2)
    torch.testing.assert_close(torch.autograd.functional.jacobian(layer, x), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gradient", [JacobianFree(), Phantom(steps=2)])
def test_gradients_without_a_solve_may_be_taken_by_the_batch(gradient: JacobianFree | Phantom) -> None:
    layer = DEQ(lambda z, x: torch.tanh(0.5 * z + x), Anderson(tol=1e-10), gradient)
    x = torch.randn(3, 2, dtype=torch.float64)
    got = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(layer, x))


def test_a_transform_inside_the_cell_is_the_cells_own_affair() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return -0.4 * torch.func.vmap(torch.func.grad(lambda z: z.square().sum() / 2))(z) + x

    layer = DEQ(cell, Anderson(tol=1e-8))
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    torch.testing.assert_close(z, x / 1.4, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 1.4), rtol=1e-6, atol=0)
