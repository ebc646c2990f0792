"""Samples that see each other: a right answer, or an honest "not converged", forward and adjoint, whatever the cell."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deq import DEQ
from deq.layer import Implicit, JacobianFree, Phantom, held, jacobian_penalty, spectral_radius
from deq.solvers import Anderson, Broyden, Forward, Outcome, Solution, Solver
from deq.solvers import solver as solver_module

D = torch.float64
Cell = Callable[[Tensor, Tensor], Tensor]

KINDS = (Anderson, Broyden, Forward)
SOLVERS = {
    "anderson": Anderson(tol=1e-8, max_iter=400),
    "anderson, plain": Anderson(tol=1e-8, max_iter=400, window=5, adaptive=False, patience=0),
    "anderson, torch": Anderson(tol=1e-8, max_iter=400, backend="torch"),
    "anderson, mean": Anderson(tol=1e-8, max_iter=400, stop="mean"),
    "broyden": Broyden(tol=1e-8, max_iter=400),
    "broyden, mean": Broyden(tol=1e-8, max_iter=400, stop="mean"),
    "forward": Forward(tol=1e-8, max_iter=400),
    "forward, mean": Forward(tol=1e-8, max_iter=400, stop="mean"),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_way = pytest.mark.parametrize("coupled", [False, True], ids=["found out", "declared"])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="samples of this batch see each other")
        yield


def of_samples(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Relative residuals, (B,) float64, 0 / 0 being 0."""
    g, fz = (f(z) - z).flatten(1).double().norm(dim=1), f(z).flatten(1).double().norm(dim=1)
    return torch.where(g == 0, 0.0, g / fz)


def assert_honest(solution: Solution, f: Callable[[Tensor], Tensor], *, coupled: bool = False) -> None:
    """The invariant: nobody is told converged whose residual in the batch that is returned is above tol."""
    assert solution.tol is not None
    residual = of_samples(f, solution.z)
    if coupled:
        fz = f(solution.z).double()
        residual = ((fz - solution.z.double()).norm() / fz.norm()).expand(len(solution.z))
    rounding = 8 * torch.finfo(solution.z.dtype).eps
    assert (residual[solution.converged] <= solution.tol * (1 + 1e-6) + rounding).all(), solution
    assert torch.equal(solution.converged, solution.residual <= solution.tol)
    assert torch.equal(solution.outcome == Outcome.CONVERGED, solution.converged)


# The smallest case, by hand


def mean_cell(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * z.mean(0, keepdim=True) + x


@each_solver
@each_way
def test_samples_that_see_their_mean(solver: Solver, coupled: bool) -> None:
    x = torch.tensor([[1.0], [3.0]], dtype=D, requires_grad=True)
    layer = DEQ(mean_cell, replace(solver, tol=1e-10), coupled=coupled)
    z = layer(x)
    (z * torch.tensor([[1.0], [8.0]], dtype=D)).sum().backward()
    torch.testing.assert_close(z.detach(), torch.tensor([[3.0], [5.0]], dtype=D), rtol=1e-8, atol=0)
    torch.testing.assert_close(x.grad, torch.tensor([[5.5], [12.5]], dtype=D), rtol=1e-8, atol=0)


@pytest.mark.parametrize("gradient", [JacobianFree(), Phantom(steps=3, damping=1.0)])
def test_gradients_without_a_backward_solve_pass_between_samples(gradient: JacobianFree | Phantom) -> None:
    x = torch.tensor([[1.0], [3.0]], dtype=D, requires_grad=True)
    (DEQ(mean_cell, SOLVERS["forward"], gradient)(x) * torch.tensor([[1.0], [8.0]], dtype=D)).sum().backward()
    v, expected = torch.tensor([[1.0], [8.0]], dtype=D), torch.zeros(2, 1, dtype=D)
    for _ in range(1 if isinstance(gradient, JacobianFree) else 3):
        expected = expected + v
        v = 0.5 * v.mean(0, keepdim=True).expand(2, 1)  # J^T
    torch.testing.assert_close(x.grad, expected)


# Graphs, whose rows are nodes


def neighbours(kind: str, n: int = 30) -> Tensor:
    """(n, n) float64, row-normalised."""
    A = torch.zeros(n, n, dtype=D)
    for i in range(n):
        near = {
            "path": [i - 1, i + 1],
            "ring": [(i - 1) % n, (i + 1) % n],
            "star": [0] if i else list(range(1, n)),
            "random": torch.randint(n, (3,), generator=torch.Generator().manual_seed(i)).tolist(),
            "one way": [i - 1],
        }[kind]
        for j in near:
            if 0 <= j < n and j != i:
                A[i, j] = 1
    return A / A.sum(1, keepdim=True).clamp(min=1)


GRAPHS = ("path", "ring", "star", "random", "one way")


@each_solver
@each_way
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("features", ["one source", "dense"])
def test_nodes_of_a_graph(solver: Solver, coupled: bool, graph: str, features: str) -> None:
    A, n = neighbours(graph), 30
    x = torch.zeros(n, 2, dtype=D) if features == "one source" else torch.randn(n, 2, dtype=D)
    x[0] = 1
    x.requires_grad_()
    weights = torch.randn(n, 2, dtype=D)
    layer = DEQ(lambda z, x: 0.9 * A @ z + x, solver, coupled=coupled)
    z = layer(x)
    (z * weights).sum().backward()
    inverse = torch.linalg.inv(torch.eye(n, dtype=D) - 0.9 * A)
    solution, adjoint = layer.last_solution, layer.last_adjoint
    assert solution is not None
    assert adjoint is not None
    assert_honest(solution, lambda z: 0.9 * A @ z + x.detach(), coupled=coupled)
    assert_honest(adjoint, lambda u: 0.9 * A.T @ u + weights, coupled=coupled)
    # With the mean test one node may be off by as many times tol as there are nodes.
    close = 1e-5 if solver.stop == "max" else 1e-4
    if solution.converged.all():
        assert (z.detach() - inverse @ x.detach()).norm() / z.detach().norm() < close
    if adjoint.converged.all():
        exact = inverse.T @ weights
        assert (x.grad - exact).norm() / exact.norm() < close  # type: ignore[operator]
    if coupled or (isinstance(solver, Broyden | Forward) and solver.stop == "max"):
        assert solution.converged.all(), "what can be solved is"


def test_a_chain_that_a_row_by_row_solve_would_call_done_after_two_evaluations() -> None:
    A = neighbours("path")
    source = torch.zeros(30, 1, dtype=D)
    source[0] = 1
    for solver in SOLVERS.values():
        for cap in range(1, 12):
            solution = replace(solver, max_iter=cap).solve(lambda z: 0.9 * A @ z + source, torch.zeros(30, 1, dtype=D))
            assert solution.evaluations <= cap
            assert_honest(solution, lambda z: 0.9 * A @ z + source)
            assert not solution.converged.all()


# Single vectors


def test_a_single_vector_is_one_system() -> None:
    linear = nn.Linear(64, 64, dtype=D)
    layer = DEQ(lambda z, x: torch.tanh(0.5 * linear(z) + x), Anderson(tol=1e-10))
    x = torch.randn(64, dtype=D)
    grads = []
    for vector in (x, x[None]):
        z = layer(vector)
        grads.append(torch.autograd.grad(z.pow(3).sum(), linear.weight)[0])
        assert z.shape == vector.shape
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)
    solution = Anderson(tol=1e-10).solve(lambda z: torch.tanh(0.5 * linear(z) + x).detach(), torch.zeros(64, dtype=D))
    assert solution.converged.shape == (64,), "the account is each element's"
    assert solution.converged.all()


def test_a_number_for_each_sample_may_still_be_written_as_a_column() -> None:
    slope = torch.linspace(0.1, 0.9, 5, dtype=D)
    column = Forward(tol=1e-9, max_iter=400).solve(lambda z: slope[:, None] * z + 1, torch.zeros(5, 1, dtype=D))
    assert len(set(column.iterations.tolist())) == 5, "each stops by itself"
    vector = Forward(tol=1e-9, max_iter=400).solve(lambda z: slope * z + 1, torch.zeros(5, dtype=D))
    assert len(set(vector.iterations.tolist())) == 1, "one system"
    torch.testing.assert_close(vector.z, column.z[:, 0], rtol=1e-7, atol=0)


# Batch norm


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, dim: int = 6) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim, dtype=D), norm
        self.evaluations = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        return torch.tanh(self.norm(0.5 * self.linear(z) + x))


def unrolled_gradient(cell: nn.Module, x: Tensor, steps: int = 300) -> list[Tensor]:
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = cell(z, x)
    return list(torch.autograd.grad(z.pow(3).sum(), list(cell.parameters())))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_in_training_mode_has_the_gradient_of_the_whole_batch(kind: type[Solver]) -> None:
    cell = Normed(nn.BatchNorm1d(6, dtype=D))
    x = torch.randn(12, 6, dtype=D)
    layer = DEQ(cell, kind(tol=1e-10, max_iter=400))
    layer(x).pow(3).sum().backward()
    assert layer.last_solution is not None
    assert layer.last_solution.converged.all()
    for parameter, expected in zip(cell.parameters(), unrolled_gradient(cell, x), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(6, dtype=D),
        lambda: nn.BatchNorm1d(6, dtype=D, momentum=None),
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3)),
            nn.InstanceNorm1d(2, track_running_stats=True, dtype=D, eps=0.1),
            nn.Flatten(),
        ),
    ],
    ids=["batch norm", "cumulative average", "instance norm"],
)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("gradient", [Implicit(), Phantom(steps=3)])
def test_running_statistics_move_once_a_call_by_those_at_the_fixed_point(
    norm: Callable[[], nn.Module], grad: bool, gradient: Implicit | Phantom
) -> None:
    torch.manual_seed(1)
    cell = Normed(norm())
    twin = Normed(norm())
    twin.load_state_dict(cell.state_dict())
    x = torch.randn(12, 6, dtype=D)
    layer = DEQ(cell, Anderson(tol=1e-12, max_iter=200), gradient)
    for calls in (1, 2):
        with torch.set_grad_enabled(grad):
            z = layer(x)
        twin(z.detach(), x)
        if grad:
            z.sum().backward()
        buffers = zip(cell.named_buffers(), twin.buffers(), strict=True)
        for (name, buffer), expected in buffers:
            torch.testing.assert_close(buffer, expected, rtol=1e-9, atol=1e-11, msg=name)
            if name == "norm.num_batches_tracked":
                assert int(buffer) == calls
    assert cell.evaluations > 10


def test_in_eval_mode_batch_norm_sees_one_sample_and_stays_as_it_is() -> None:
    cell = Normed(nn.BatchNorm1d(6, dtype=D)).eval()
    before = cell.norm.running_mean.clone()  # type: ignore[operator,union-attr]
    layer = DEQ(cell, Anderson(tol=1e-8, max_iter=200))
    x = torch.randn(8, 6, dtype=D) * torch.logspace(1, -2, 8, dtype=D)[:, None]
    layer(x)
    assert layer.last_solution is not None
    assert len(set(layer.last_solution.iterations.tolist())) > 1, "each sample stops by itself"
    assert torch.equal(cell.norm.running_mean, before)  # type: ignore[arg-type]


def test_a_batch_norm_without_running_statistics_mixes_samples_in_eval_mode_too() -> None:
    cell = Normed(nn.BatchNorm1d(6, dtype=D, track_running_stats=False)).eval()
    layer = DEQ(cell, Anderson(tol=1e-8, max_iter=200))
    layer(torch.randn(8, 6, dtype=D))
    assert layer.last_solution is not None
    assert len(set(layer.last_solution.iterations.tolist())) == 1, "the batch is one system"


def test_an_exception_in_the_cell_leaves_running_statistics_as_they_were() -> None:
    class Failing(Normed):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            fz = super().forward(z, x)
            if self.evaluations == 3:
                raise RuntimeError("mine")
            return fz

    cell = Failing(nn.BatchNorm1d(6, dtype=D))
    before = [buffer.clone() for buffer in cell.buffers()]
    with pytest.raises(RuntimeError, match="mine"):
        DEQ(cell)(torch.randn(4, 6, dtype=D))
    assert all(torch.equal(*pair) for pair in zip(cell.buffers(), before, strict=True))


def test_running_statistics_are_refused_where_a_solve_is_recorded() -> None:
    with pytest.raises(ValueError, match="cannot hold the running statistics of the cell's norm, a BatchNorm1d"):
        DEQ(Normed(nn.BatchNorm1d(6, dtype=D)), cuda_graph=True)(torch.randn(4, 6, dtype=D))


def test_batch_norm_inside_a_layer_inside_the_cell() -> None:
    inner = Normed(nn.BatchNorm1d(6, dtype=D))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DEQ(inner, Anderson(tol=1e-12, max_iter=300))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * self.inner(z + x) + x

    layer = DEQ(Outer(), Anderson(tol=1e-9, max_iter=300))
    layer(torch.randn(8, 6, dtype=D)).sum().backward()
    assert layer.last_solution is not None
    assert layer.last_solution.converged.all()
    assert int(inner.norm.num_batches_tracked) == 1  # type: ignore[arg-type]


# Attention over the batch, and others


def attention(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(0.7 * torch.softmax(z @ z.T / z.shape[1] ** 0.5, dim=1) @ z + x)


def contrast(z: Tensor, x: Tensor) -> Tensor:
    return 0.4 * (z - z.mean(0)) / (1 + z.std(0)) + x


def sorted_rows(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * torch.roll(z, 1, dims=0) + x


def local(z: Tensor, x: Tensor) -> Tensor:
    """Only the last two rows see each other."""
    return torch.cat([0.5 * z[:-2], 0.5 * z[-2:].flip(0)]) + x


MIXING: dict[str, Cell] = {f.__name__: f for f in (attention, contrast, sorted_rows, local, mean_cell)}


@each_solver
@each_way
@pytest.mark.parametrize("name", MIXING)
def test_gradients_of_cells_that_mix_are_those_of_an_unrolled_solve(solver: Solver, coupled: bool, name: str) -> None:
    cell = MIXING[name]
    torch.manual_seed(0)
    x = (torch.randn(7, 3, dtype=D) * torch.logspace(0.5, -2, 7, dtype=D)[:, None]).requires_grad_()
    layer = DEQ(cell, solver, coupled=coupled)
    z = layer(x)
    (got,) = torch.autograd.grad(z.pow(2).sum() + z[0].sum(), x)
    exact = torch.zeros_like(x)
    for _ in range(400):
        exact = cell(exact, x)
    (expected,) = torch.autograd.grad(exact.pow(2).sum() + exact[0].sum(), x)
    solution, adjoint = layer.last_solution, layer.last_adjoint
    assert solution is not None
    assert adjoint is not None
    assert_honest(solution, lambda z: cell(z, x.detach()), coupled=coupled)
    if solution.converged.all() and adjoint.converged.all():
        assert (got - expected).norm() / expected.norm() < (1e-5 if solver.stop == "max" else 1e-4)
    else:
        assert solver.stop == "mean", "what can be solved is"


@each_solver
def test_independent_samples_cost_no_evaluation_more_and_say_nothing(solver: Solver) -> None:
    slope = torch.linspace(-0.8, 0.95, 9, dtype=D)
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return slope[:, None] * z.tanh() + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver.solve(f, torch.zeros(9, 4, dtype=D))
    assert calls == solution.evaluations == int(solution.iterations.max())


def test_the_warning_names_the_sample_its_residuals_and_the_fix() -> None:
    x = torch.tensor([[1.0], [3.0]], dtype=D)
    with pytest.warns(RuntimeWarning, match=r"sample \d was at a relative residual of .*e-\d+, .* coupled=True"):
        Anderson(tol=1e-10, max_iter=200).solve(lambda z: mean_cell(z, x), torch.zeros(2, 1, dtype=D))


@each_solver
def test_one_that_is_given_up_may_not_take_the_word_of_the_others(solver: Solver) -> None:
    # Row 0 circles for ever and is given up, returned at its best; row 1 sees it.
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=D)

    def f(z: Tensor) -> Tensor:
        return torch.stack([z[0] @ turn + torch.tensor([1.0, 0.3], dtype=D), 0.5 * z[0] + 0.01 * z[1].tanh() + 1])

    for patience in (0, 3, 20):
        for cap in (5, 30, 60):
            solution = replace(solver, patience=patience, max_iter=cap).solve(f, torch.zeros(2, 2, dtype=D))
            assert_honest(solution, f)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [False, True])
def test_flags_that_are_read_late_change_nothing_of_it(
    kind: type[Solver], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(solver_module.MovingSamples):
        def count(self, outcome: Tensor, lost: Tensor | None = None) -> int:
            before, self._previous = self._previous, -1 if lost is not None and lost else int((outcome == 0).sum())
            return before

    if late:
        monkeypatch.setattr(solver_module, "MovingSamples", Late)
    A = neighbours("ring")
    x = torch.randn(30, 1, dtype=D)
    solution = kind(tol=1e-8, max_iter=400).solve(lambda z: 0.9 * A @ z + x, torch.zeros(30, 1, dtype=D))
    assert_honest(solution, lambda z: 0.9 * A @ z + x)
    assert solution.converged.all()


# One system


@each_solver
def test_one_system_has_one_residual_and_one_end(solver: Solver) -> None:
    x = torch.randn(5, 3, dtype=D)
    solution = solver.solve(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros(5, 3, dtype=D), coupled=True, trace=True)
    assert solution.converged.all()
    assert len(set(solution.residual.tolist())) == len(set(solution.iterations.tolist())) == 1
    assert solution.residual.shape == (5,)
    assert solution.z.shape == (5, 3)
    assert solution.trace is not None
    assert solution.trace.shape == (solution.evaluations, 5)
    assert solution.sample_evaluations == 5 * solution.evaluations
    by_hand = solver.solve(lambda z: 0.5 * torch.tanh(z) + x[None], torch.zeros(1, 5, 3, dtype=D))
    assert torch.equal(solution.z, by_hand.z[0])


def test_one_system_of_several_tensors() -> None:
    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"fine": 0.5 * z["fine"].flip(0) + z["coarse"].mean() + 1, "coarse": 0.1 * z["fine"].sum(1)[:, None]}

    z0 = {"fine": torch.zeros(4, 3, dtype=D), "coarse": torch.zeros(4, 1, dtype=D)}
    solution = Anderson(tol=1e-10).solve(f, z0, coupled=True)
    fz = f(solution.z)
    assert solution.converged.all()
    for name in z0:
        assert solution.z[name].shape == z0[name].shape
        torch.testing.assert_close(fz[name], solution.z[name], rtol=1e-8, atol=1e-8)


def test_coupled_and_compact_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="coupled=True makes one system of the batch"):
        DEQ(mean_cell, Anderson(compact=True), coupled=True)(torch.ones(2, 1))
    with pytest.raises(ValueError, match="coupled must be true or false, got 1"):
        DEQ(mean_cell, coupled=1)  # type: ignore[arg-type]


# Right sides of very different sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_very_different_sizes_in_one_batch(dtype: torch.dtype) -> None:
    sizes = torch.tensor([1e-30, 1e-12, 1.0, 1e12, 1e20, 0.0], dtype=D).to(dtype)
    x = torch.zeros(6, 4, dtype=dtype, requires_grad=True)
    layer = DEQ(lambda z, x: 0.5 * z + x, Forward(tol=1e-2, max_iter=50))
    (layer(x) * sizes[:, None]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:, 0].double() / 2, sizes.double(), rtol=2e-2, atol=0)


def test_the_radius_of_samples_that_see_each_other_is_that_of_the_batch() -> None:
    A = neighbours("ring", 6)
    with pytest.raises(ValueError, match=r"the samples of z see each other.*coupled=True"):
        spectral_radius(lambda z: 0.9 * A @ z, torch.zeros(6, 2, dtype=D))
    found = spectral_radius(lambda z: 0.9 * A @ z, torch.zeros(6, 2, dtype=D), coupled=True, steps=2000)
    torch.testing.assert_close(found.radius, torch.full((6,), 0.9, dtype=D), rtol=1e-2, atol=0)


# The invariant, on random problems


@st.composite
def problems(draw: st.DrawFn) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    batch, dim = draw(st.sampled_from([2, 3, 5, 8])), draw(st.sampled_from([1, 3, 8]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    coupling, norm = draw(st.floats(0, 0.9)), draw(st.floats(0.2, 1.1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    n = batch * dim
    M = torch.randn(n, n, generator=generator, dtype=D)
    own = torch.block_diag(*[torch.ones(dim, dim)] * batch).double()
    M = M * norm / torch.linalg.matrix_norm(M, 2) * (own + coupling * (1 - own))
    b = torch.randn(batch, dim, generator=generator, dtype=D) * 10 ** draw(st.floats(-3, 3))
    M, b = M.to(dtype), b.to(dtype)
    return (lambda z: (M @ z.flatten()).view(batch, dim) + b), torch.zeros(batch, dim, dtype=dtype)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    problems(),
    st.sampled_from(KINDS),
    st.sampled_from([1e-2, 1e-4, 1e-8]),
    st.sampled_from(["max", "mean"]),
    st.sampled_from([2, 7, 25, 300]),
    st.sampled_from([0, 3, 20]),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_nobody_is_told_converged_who_is_not(
    problem: tuple[Callable[[Tensor], Tensor], Tensor],
    kind: type[Solver],
    tol: float,
    stop: str,
    cap: int,
    patience: int,
    every: int,
    coupled: bool,
) -> None:
    f, z0 = problem
    calls = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(z)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solver = kind(tol=tol, max_iter=cap, stop=stop, patience=patience, check_every=every)  # type: ignore[arg-type]
        solution = solver.solve(counted, z0, coupled=coupled)
    assert solution.evaluations <= cap
    assert calls == solution.evaluations + solution.checks
    assert solution.checks <= 1
    assert_honest(solution, f, coupled=coupled)
    assert math.isfinite(float(solution.residual.min()))


# What a first reading by someone else found


@pytest.mark.parametrize("patience", [5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_witness_that_looked_elsewhere_proves_nothing(kind: type[Solver], patience: int) -> None:
    # Row 0 is given up and returned at its best, row 1 sees row 0, and row 2, which sees neither, never ends.
    for seed in range(12):
        P = torch.linalg.qr(torch.randn(4, 4, dtype=D, generator=torch.Generator().manual_seed(seed))).Q

        def f(z: Tensor, P: Tensor = P) -> Tensor:
            wild = 10 + 0.3 * torch.sin(1e3 * z[2] @ P)
            return torch.stack([3 * torch.sin(4 * z[0] @ P) + 1, 0.5 * torch.sin(z[1]) + z[0] + 1, wild])

        solution = kind(tol=1e-6, max_iter=60, patience=patience).solve(f, torch.ones(3, 4, dtype=D))
        assert_honest(solution, f)
        assert solution.evaluations <= 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_that_opens_where_a_neighbour_is_returned(kind: type[Solver]) -> None:
    def f(z: Tensor) -> Tensor:
        turned = z[1] @ torch.tensor([[0.0, -1.01], [1.01, 0.0]], dtype=D) + 0.4
        return torch.stack([torch.relu(z[1] - 1) + 1, turned])

    for cap in range(2, 24):
        solution = kind(tol=1e-6, max_iter=cap, patience=0).solve(f, torch.tensor([[1.0, 1.0], [2.0, 0.5]], dtype=D))
        assert_honest(solution, f)


@pytest.mark.parametrize("atol", [1.0, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_absolute_tolerance_of_the_states_is_none_of_the_gradients(kind: type[Solver], atol: float) -> None:
    x = torch.full((4, 3), 1e3, dtype=D, requires_grad=True)
    solver = kind(tol=1e-6, atol=atol, max_iter=500)
    for gradient in (Implicit(), Implicit(solver)):
        (DEQ(lambda z, x: 0.9 * z + x, solver, gradient)(x) * 1e-6).sum().backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, 1e-5), rtol=1e-4, atol=0)
        x.grad = None


def test_an_adjoint_is_told_in_the_users_units() -> None:
    x = torch.ones(2, 3, dtype=D, requires_grad=True)
    for scale in (None, torch.tensor([1e3, 1.0, 1e-2], dtype=D)):
        for coupled in (False, True):
            layer = DEQ(lambda z, x: 0.5 * z + x, Anderson(tol=1e-10), scale=scale, coupled=coupled)
            layer(x).sum().backward()
            assert layer.last_adjoint is not None
            torch.testing.assert_close(layer.last_adjoint.z, torch.full((2, 3), 2.0, dtype=D), rtol=1e-8, atol=0)


def test_nothing_after_a_call_takes_its_running_statistics_back() -> None:
    cell = Normed(nn.BatchNorm1d(6, dtype=D))
    layer = DEQ(cell, Anderson(tol=1e-8, max_iter=200))
    earlier = layer.equilibrium(torch.randn(12, 6, dtype=D) + 2)
    for calls in range(2, 5):
        found = layer.equilibrium(torch.randn(12, 6, dtype=D) + 2, corrections=(1,))
        before = [buffer.clone() for buffer in cell.buffers()]
        (found.z.square().mean() + jacobian_penalty(found.f, found.z)).backward()
        spectral_radius(earlier.f, earlier.z, coupled=True, steps=3)
        assert all(torch.equal(*pair) for pair in zip(cell.buffers(), before, strict=True))
        assert int(cell.norm.num_batches_tracked) == calls  # type: ignore[arg-type]


def test_corrections_do_not_stand_in_for_the_fixed_point_in_running_statistics() -> None:
    x = torch.randn(12, 6, dtype=D)
    torch.manual_seed(3)
    plain = Normed(nn.BatchNorm1d(6, dtype=D, momentum=1.0))
    corrected = Normed(nn.BatchNorm1d(6, dtype=D, momentum=1.0))
    corrected.load_state_dict(plain.state_dict())
    solver = Anderson(tol=1e-10, max_iter=200)
    DEQ(plain, solver).equilibrium(x)
    DEQ(corrected, solver).equilibrium(x, corrections=(1, 2))
    for one, other in zip(plain.buffers(), corrected.buffers(), strict=True):
        assert torch.equal(one, other)


def test_norms_that_a_function_or_a_method_names_are_seen() -> None:
    norm, linear = nn.BatchNorm1d(6, dtype=D), nn.Linear(6, 6, dtype=D)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear, self.head = nn.BatchNorm1d(6, dtype=D), nn.Linear(6, 6, dtype=D), nn.BatchNorm1d(6)

        def inner(self, z: Tensor) -> Tensor:
            return self.norm(self.linear(z))  # type: ignore[no-any-return]

        def step(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.inner(z) + x)

    model = Model()
    for cell, its_norm in ((lambda z, x: torch.tanh(0.5 * norm(linear(z)) + x), norm), (model.step, model.norm)):
        layer = DEQ(cell, Anderson(tol=1e-8, max_iter=200))
        layer(torch.randn(8, 6, dtype=D)).sum().backward()
        assert layer.last_solution is not None
        assert len(set(layer.last_solution.iterations.tolist())) == 1, "one system"
        assert int(its_norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    assert int(model.head.num_batches_tracked) == 0  # type: ignore[arg-type]


def test_a_sync_batch_norm_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DEQ(Normed(nn.SyncBatchNorm(6, dtype=D)))
    monkeypatch.setattr(held, "_processes", lambda: 4)
    with pytest.raises(ValueError, match="norm, a SyncBatchNorm in training mode, would wait for all 4 processes"):
        layer(torch.randn(4, 6, dtype=D))


# A map that is another at every call says nothing about samples


@pytest.mark.parametrize(
    "module", [nn.MultiheadAttention(6, 2, dropout=0.1), nn.LSTM(6, 6, num_layers=2, dropout=0.1), nn.RReLU()]
)
def test_modules_that_draw_random_numbers_are_refused(module: nn.Module) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = module

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * z + x

    layer = DEQ(Cell())
    with pytest.raises(ValueError, match=r"its part, a .* in training mode, draws random numbers"):
        layer(torch.ones(2, 6))
    layer.eval()(torch.ones(2, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_that_draws_random_numbers_is_refused(kind: type[Solver]) -> None:
    def noisy(z: Tensor) -> Tensor:
        return 0.5 * z + 1 + 1e-3 * torch.rand(())

    with pytest.raises(ValueError, match="f drew random numbers in its second evaluation"):
        kind(tol=1e-6).solve(noisy, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="f drew random numbers"):
        DEQ(lambda z, x: nn.functional.dropout(0.5 * z + x, 0.1), kind(tol=1e-6))(torch.ones(3, 2))


def test_one_that_is_not_finite_does_not_name_the_others() -> None:
    x = torch.randn(8, 3, dtype=D)
    x[2] = torch.nan

    def f(z: Tensor) -> Tensor:
        out = (0.3 * z + x).clone()
        out[0] = out[0] + 0.5 * z[7]
        out[7] = out[7] + 0.35 * z[0]
        return out

    for kind in KINDS:
        solution = kind(tol=1e-8, max_iter=100).solve(f, torch.zeros(8, 3, dtype=D))
        assert (solution.outcome == Outcome.NON_FINITE).nonzero().flatten().tolist() == [2]
        residual = of_samples(f, solution.z)
        assert (residual[solution.converged] <= 1e-8 * (1 + 1e-6)).all()
