"""What a layer takes besides a cell and x: what samples share, what a cell returns beside z, sizes of components."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq import DEQ
from deq.layer import Gradient, Implicit, JacobianFree, Phantom
from deq.solvers import Anderson, Broyden, Forward, Solver

D = torch.float64
COMPACT = Anderson(tol=1e-9, max_iter=300, compact=True)
PLAIN = Anderson(tol=1e-9, max_iter=300)


# What samples share, where a solver leaves some of them out


def features(batch: int = 4) -> Tensor:
    """Some are done at once, others take long."""
    return torch.randn(batch, 6, 5, dtype=D) * torch.logspace(1.5, -2, batch, dtype=D)[:, None, None]


def with_positions(z: Tensor, x: dict[str, Tensor]) -> Tensor:
    return torch.tanh(0.9 * z * torch.sigmoid(x["pos"]) + x["feats"])


def with_edges(z: Tensor, x: dict[str, Tensor]) -> Tensor:
    source, target = x["edges"]
    message = torch.zeros_like(z).index_add(1, target, z[:, source])
    return torch.tanh(0.3 * message + x["feats"])


def solved(cell: Any, x: Any, solver: Solver, **options: Any) -> tuple[Tensor, Tensor, DEQ]:
    """z*, the gradient of the features, and the layer."""
    feats = x["feats"].clone().requires_grad_()
    layer = DEQ(cell, solver, Implicit(solver), **options)
    z = layer({**x, "feats": feats}, z0=torch.zeros(feats.shape, dtype=D))
    (gradient,) = torch.autograd.grad(z.pow(2).sum(), feats)
    return z.detach(), gradient, layer


EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
SHARED = {
    "positions": (with_positions, {"pos": torch.randn(6, 5, dtype=D)}, ["pos"]),
    "edges": (with_edges, {"edges": EDGES}, ["edges"]),
    "as many positions as samples": (
        lambda z, x: torch.tanh(0.9 * z * torch.sigmoid(x["pos"].mean(0)) + x["feats"]),
        {"pos": torch.randn(4, 5, dtype=D)},
        ["pos"],
    ),
    "a nest of both": (
        lambda z, x: with_edges(with_positions(z, {"pos": x["graph"]["pos"], "feats": 0 * z}), {**x, **x["graph"]}),
        {"graph": {"pos": torch.randn(6, 5, dtype=D), "edges": EDGES}},
        ["graph"],
    ),
    "a number": (
        lambda z, x: torch.tanh(x["slope"] * z + x["feats"]),
        {"slope": torch.tensor(0.7, dtype=D)},
        ["slope"],
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_named_as_shared_is_handed_on_whole(name: str) -> None:
    cell, others, shared = SHARED[name]
    x = {"feats": features(), **others}
    z, gradient, layer = solved(cell, x, COMPACT, shared=shared)
    expected, expected_gradient, _ = solved(cell, x, PLAIN)
    torch.testing.assert_close(z, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-8)
    assert layer.last_solution is not None
    assert layer.last_solution.sample_evaluations < 4 * layer.last_solution.evaluations, "nothing was left out"


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_and_not_named_is_refused(name: str) -> None:
    cell, others, _ = SHARED[name]
    with pytest.raises(ValueError, match=r"compact=True .*DEQ\(..., shared=") as refused:
        solved(cell, {"feats": features(), **others}, COMPACT)
    assert "\n" not in str(refused.value)


EARLY_AND_LATE = torch.tensor([0.0, 0.0, 0.0, 0.9, 0.95, 0.97], dtype=D)[:, None]


def test_a_cell_that_fails_for_some_samples_alone_says_what_asked_it() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        if len(z) != 6:
            raise IndexError("six, please")
        return EARLY_AND_LATE * z + x

    with pytest.raises(ValueError, match=r"for sample \d it then fails \(IndexError: six, please\)"):
        DEQ(cell, COMPACT)(torch.ones(6, 3, dtype=D))


def test_samples_that_see_each_other_are_refused_where_a_solver_compacts() -> None:
    def cell(z: Tensor, x: dict[str, Tensor]) -> Tensor:
        return x["slope"] * z.tanh() + 0.2 * z.mean(0) + x["b"]

    x = {"slope": EARLY_AND_LATE, "b": torch.ones(6, 3, dtype=D)}
    with pytest.raises(ValueError, match=r"for sample 5 it then returns something else than in the batch"):
        DEQ(cell, Anderson(tol=1e-2, max_iter=300, compact=True))(x, z0=torch.zeros(6, 3, dtype=D))


def test_what_a_cell_keeps_for_each_sample_by_itself_is_refused_where_a_solver_compacts() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return EARLY_AND_LATE[: len(z)] * z.tanh() + x  # of the first samples, whichever these are

    with pytest.raises(ValueError, match=r"for sample 5 it then returns something else than in the batch"):
        DEQ(cell, COMPACT)(torch.ones(6, 3, dtype=D))


@pytest.mark.parametrize(
    ("shared", "x", "message"),
    [
        (["positions"], {"a": torch.ones(2, 3)}, r"shared names 'positions', which x does not have: it has \['a'\]"),
        ([2], (torch.ones(2, 3), torch.ones(2, 3)), "shared names 2, which x does not have: it has places 0 to 1"),
        ([0], torch.ones(2, 3), r"shared=\[0\] names parts of x, but x is one tensor"),
    ],
)
def test_a_name_that_x_does_not_have_is_refused(shared: list[Any], x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DEQ(lambda z, x: z, shared=shared)(x, z0=torch.zeros(2, 3))


def test_one_name_must_be_in_a_list() -> None:
    with pytest.raises(ValueError, match=r"shared must be a list of keys of x, got 'pos': give \['pos'\]"):
        DEQ(with_positions, shared="pos")


LAST_SEES_NOBODY = {
    "later rows": lambda z: z.flip(0).cumsum(0).flip(0) - z,
    "a pair": lambda z: torch.cat([z[1:2], z[:1], torch.zeros_like(z[2:])]) * 3,
    "a ring with padding": lambda z: torch.cat([z[:5].roll(1, 0), torch.zeros_like(z[5:])]),
}


@pytest.mark.parametrize("name", LAST_SEES_NOBODY)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [Anderson, Broyden, Forward])
def test_samples_that_see_each_other_are_noticed_at_the_end_too(name: str, grad: bool, kind: type[Solver]) -> None:
    slopes = torch.tensor([0.9] * 5 + [0.0] * 3, dtype=D)[:, None]

    def cell(z: Tensor, x: dict[str, Tensor]) -> Tensor:
        others = LAST_SEES_NOBODY[name](z) if len(z) > 1 else 0 * z
        return x["slope"] * z.tanh() + 0.1 * others + x["b"]

    x = {"slope": slopes, "b": torch.randn(8, 2, dtype=D)}
    layer = DEQ(cell, kind(tol=1e-8, max_iter=400, compact=True))
    with torch.set_grad_enabled(grad):
        try:
            z = layer(x, z0=torch.zeros(8, 2, dtype=D))
        except ValueError as error:
            assert "compact=True" in str(error)  # noqa: PT017
        else:
            residual = (cell(z, x) - z).norm(dim=1) / cell(z, x).norm(dim=1)
            assert layer.last_solution is not None
            assert (residual[layer.last_solution.converged] <= 1e-8 * (1 + 1e-4)).all()


# What a cell returns beside z


class WithEnergy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=D)

    def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tanh(0.5 * self.linear(z) + x), {"energy": (z * self.linear(z)).sum(1)}


@pytest.mark.parametrize("gradient", [Implicit(), JacobianFree(), Phantom(steps=3)])
@pytest.mark.parametrize("grad", [True, False])
def test_aux_is_what_the_cell_returns_at_the_fixed_point(gradient: Gradient, grad: bool) -> None:
    cell = WithEnergy()
    x = torch.randn(3, 4, dtype=D)
    layer = DEQ(cell, Anderson(tol=1e-11, max_iter=200), gradient, aux=True)
    with torch.set_grad_enabled(grad):
        z, aux = layer(x)
    torch.testing.assert_close(aux["energy"], cell(z, x)[1]["energy"])
    assert aux["energy"].requires_grad == grad
    assert layer.last_solution is not None
    assert torch.equal(layer.last_solution.z, z)
    assert layer.equilibrium(x).aux is not None


def test_gradients_of_aux_pass_the_fixed_point() -> None:
    cell, x = WithEnergy(), torch.randn(3, 4, dtype=D)
    _, aux = DEQ(cell, Anderson(tol=1e-12, max_iter=200), aux=True)(x)
    got = torch.autograd.grad(aux["energy"].sum(), list(cell.parameters()))
    z = torch.zeros_like(x)
    for _ in range(200):
        z = cell(z, x)[0]
    expected = torch.autograd.grad(cell(z, x)[1]["energy"].sum(), list(cell.parameters()))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_aux_beside_a_nested_state_and_under_compaction() -> None:
    def cell(z: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        return {"a": torch.tanh(0.8 * z["a"] + x), "b": 0.3 * z["b"] + z["a"][:, :2]}, [z["b"]]

    x = torch.randn(6, 4, dtype=D) * torch.logspace(1, -2, 6, dtype=D)[:, None]
    z, (b,) = DEQ(cell, COMPACT, Implicit(COMPACT), aux=True)(
        x.requires_grad_(), z0={"a": torch.zeros(6, 4, dtype=D), "b": torch.zeros(6, 2, dtype=D)}
    )
    assert torch.equal(b, z["b"])
    b.sum().backward()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("aux", "returned", "message"),
    [
        (False, lambda z: (z, 3), r"f must return what it is given, .* but it returned tuple of 2: .* aux=True"),
        (True, lambda z: z, r"aux=True needs a cell that returns the tuple \(z, aux\), but it returned Tensor"),
        (True, lambda z: (z, 1, 2), "but it returned a tuple of 3"),
    ],
)
def test_another_number_of_things_is_named(aux: bool, returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DEQ(lambda z, x: returned(0.5 * z + x), aux=aux)(torch.ones(2, 3))


# Sizes of components

TARGET = torch.tensor([1e6, 1.0, -1.0, 1.0], dtype=D)
SLOPE = torch.tensor([0.1, 0.9, 0.9, 0.9], dtype=D)


def uneven(z: Tensor, x: Tensor | float = 0.0) -> Tensor:
    return TARGET + x + SLOPE * (z - TARGET)


@pytest.mark.parametrize(
    "solver", [Anderson(tol=1e-5, max_iter=300), Forward(tol=1e-5, max_iter=300), Broyden(tol=1e-5)]
)
def test_components_beside_a_million_are_solved_where_their_sizes_are_given(solver: Solver) -> None:
    start = torch.zeros(2, 4, dtype=D)
    alone = solver.solve(uneven, start)
    scaled = solver.solve(uneven, start, scale=TARGET.abs())
    assert (alone.z[:, 1:] - TARGET[1:]).abs().max() > 0.1, "or there is nothing to show"
    torch.testing.assert_close(scaled.z, TARGET.expand(2, 4), rtol=1e-3, atol=0)
    assert scaled.converged.all()
    inside = ((uneven(scaled.z) - scaled.z) / TARGET).norm(dim=1) / (uneven(scaled.z) / TARGET).norm(dim=1)
    torch.testing.assert_close(scaled.residual, inside, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("coupled", [False, True])
def test_a_scaled_layer_has_the_gradient_of_one_that_is_not(coupled: bool) -> None:
    W = 0.2 * torch.randn(4, 4, dtype=D)
    x = torch.randn(3, 4, dtype=D, requires_grad=True)
    grads = []
    for scale in (None, torch.tensor([1e4, 1.0, 1e-3, 5.0])):
        layer = DEQ(lambda z, x: torch.tanh(z @ W + x), Anderson(tol=1e-12), scale=scale, coupled=coupled)
        grads.append(torch.autograd.grad(layer(x).pow(3).sum(), x)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-10)


def test_nests_are_scaled_tensor_by_tensor() -> None:
    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"big": 1e6 + 0.1 * (z["big"] - 1e6), "small": 1 + 0.9 * (z["small"] - 1)}

    z0 = {"big": torch.zeros(2, 3, dtype=D), "small": torch.zeros(2, 5, dtype=D)}
    solution = Forward(tol=1e-5, max_iter=300).solve(f, z0, scale={"big": 1e6, "small": torch.ones(5)})
    torch.testing.assert_close(solution.z["small"], torch.ones(2, 5, dtype=D), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor([1.0, 0.0, 1.0, 1.0]), "scale must be above 0 and finite everywhere"),
        (torch.tensor([1.0, torch.nan, 1.0, 1.0]), "scale must be above 0 and finite everywhere"),
        (-1.0, "scale must be above 0"),
        (torch.ones(3), r"scale must have the shape of one sample's state, \(4,\), .* got \(3,\)"),
        (torch.ones(2, 4), r"got \(2, 4\)"),
        ("large", "scale must be"),
        ({"a": 1.0}, "scale must be"),
    ],
)
def test_a_scale_that_is_none_is_refused(scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DEQ(uneven, scale=scale)(torch.ones(2, 4, dtype=D))


# A layer as a thing


def test_accounts_are_no_part_of_a_saved_or_copied_layer() -> None:
    model = nn.Sequential(DEQ(WithEnergy(), aux=True))
    sizes = []
    for batch in (2, 20_000):
        model[0](torch.randn(batch, 4, dtype=D))
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(file.tell())
    assert sizes[1] <= sizes[0] + 64
    assert model[0].last_solution is not None, "they stay on the layer itself"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].last_solution is None
        assert torch.equal(twin[0](torch.ones(2, 4, dtype=D))[0], model[0](torch.ones(2, 4, dtype=D))[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "lazy",
    [
        lambda: nn.LazyLinear(4),
        lambda: nn.Sequential(nn.LazyLinear(7), nn.ReLU(), nn.LazyLinear(4)),
        lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()),
    ],
)
def test_lazy_modules_take_their_shapes_at_the_first_call(lazy: Callable[[], nn.Module], autocast: bool) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lazy()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.3 * self.inner(z) + x)

    layer = DEQ(Cell(), Anderson(tol=1e-2 if autocast else 1e-5))
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z = layer(x)
    z.sum().backward()
    assert layer.last_solution is not None
    assert layer.last_solution.converged.all()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_start_of_one_row_for_many_samples_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"give z0 a row for each of the 64 samples of x, z0.expand\(64, ...\)"):
        DEQ(lambda z, x: 0.5 * z + x)(torch.randn(64, 8), z0=torch.zeros(1, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DEQ(None), "cell must be a module or a function"),  # type: ignore[arg-type]
        (lambda: DEQ(nn.Linear), "cell must be a module or a function"),
        (lambda: DEQ(uneven, "anderson"), r"solver must be a solver such as Anderson\(\), got 'anderson'"),  # type: ignore[arg-type]
        (lambda: DEQ(uneven, Anderson), "solver must be a solver"),  # type: ignore[arg-type]
        (lambda: DEQ(uneven, None, Implicit), "gradient must be a gradient"),  # type: ignore[arg-type]
        (lambda: DEQ(uneven, None, Implicit(3)), "the solver of Implicit must be a solver"),  # type: ignore[arg-type]
        (lambda: DEQ(uneven, aux=1), "aux must be true or false, got 1"),  # type: ignore[arg-type]
        (lambda: DEQ(uneven, shared=5), "shared must be a list of keys of x, got 5"),  # type: ignore[arg-type]
        (lambda: DEQ(uneven).equilibrium(torch.ones(2, 4), corrections=3), "corrections must be a list"),  # type: ignore[arg-type]
        (lambda: PLAIN.solve(uneven, torch.ones(2, 4, dtype=D), coupled="no"), "coupled must be true or false"),  # type: ignore[arg-type]
        (lambda: PLAIN.solve(lambda z: z.to_sparse(), torch.ones(2, 4)), "layout torch.sparse_coo: return a dense one"),
    ],
)
def test_what_is_none_of_these_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_iterators_name_evaluations_as_lists_do() -> None:
    layer = DEQ(lambda z, x: 0.5 * z + x)
    assert len(layer.equilibrium(torch.ones(2, 3), corrections=iter([1, 2])).states) == 2  # type: ignore[arg-type]


def test_a_write_into_the_argument_is_seen_in_inference_mode_too() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="f wrote into its argument"):
        PLAIN.solve(lambda z: z.mul_(0.5).add_(1), torch.zeros(2, 3))
    with torch.inference_mode():
        assert PLAIN.solve(lambda z: z, torch.ones(2, 3)).converged.all()
