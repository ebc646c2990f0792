"""What needs a real device: everything here is skipped, and says so, where there is none.

Imports nothing but PyTorch, Triton, pytest and this project, so that it runs where only those are installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from benchmarks.problems import Affine, affine
from deq import DEQ
from deq.kernels import AndersonWindow, residual_norm
from deq.kernels.naive import anderson_update, relative_residual
from deq.layer import Implicit
from deq.models import EquilibriumClassifier
from deq.solvers import Anderson, Forward, Solver
from deq.solvers.captured import CapturedSolve, _while_nodes_available, recorder_for

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Any operation that waits for the device is an error, from the point where the test turns it on."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def sequence(steps: int, batch: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    X = torch.randn(steps, batch, dim, dtype=torch.float64)
    F = X + torch.randn(steps, batch, dim, dtype=torch.float64)
    return X.to(dtype), F.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [1, 33, 1024, 4099, 49_152])
def test_step_is_the_reference_on_the_device(dim: int, dtype: torch.dtype) -> None:
    for m in (1, 2, 3, 5, 8, 10, 16):
        if dim < 4 * m:
            continue
        X, F = sequence(m + 2, 3, dim, dtype)
        for beta in (1.0, 0.4):
            window = AndersonWindow(3, dim, window=m, beta=beta, dtype=dtype, device="cuda", backend="triton")
            for x, fx in zip(X.cuda(), F.cuda(), strict=True):
                got = window.step(x, fx)
            expected = anderson_update(X[-m:].transpose(0, 1), F[-m:].transpose(0, 1), beta=beta)
            error = (got.cpu().double() - expected).abs().max() / F.double().abs().max()
            assert error < TOLERANCE[dtype], (m, beta)
            residual = relative_residual(X[-1], F[-1])
            torch.testing.assert_close(window.residual.cpu().double(), residual, rtol=TOLERANCE[dtype], atol=0)
            torch.testing.assert_close(residual_norm(x, fx), window.residual, rtol=1e-5, atol=0)


def test_two_runs_give_the_same_bits_and_a_bad_sample_changes_no_other() -> None:
    X, F = (tensor.cuda() for tensor in sequence(8, 64, 5000, torch.float32))

    def run(F: torch.Tensor) -> torch.Tensor:
        window = AndersonWindow(64, 5000, window=5, device="cuda")
        for x, fx in zip(X, F, strict=True):
            out = window.step(x, fx)
        return out

    first = run(F)
    for _ in range(5):
        assert torch.equal(run(F), first)
    F[4, 7, 4321] = math.nan
    others = [sample for sample in range(64) if sample != 7]
    assert torch.equal(run(F)[others], first[others])


def test_offsets_beyond_32_bits() -> None:
    batch, m, dim = 3, 3, 2**28
    window = AndersonWindow(batch, dim, window=m, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(batch, dim, dtype=torch.bfloat16, device="cuda")
    slope = torch.tensor([0.5, -0.5, 0.25], device="cuda", dtype=torch.bfloat16)[:, None]
    for _ in range(6):
        x = window.step(x, slope * x + 1, out=x)
    expected = (1 / (1 - slope.float())).expand(batch, 2)
    torch.testing.assert_close(x[:, [0, -1]].float(), expected, rtol=1e-2, atol=0)


def test_no_synchronisation_in_a_step(no_synchronisation: None) -> None:
    X, F = (tensor.cuda() for tensor in sequence(6, 3, 5000, torch.float32))
    window = AndersonWindow(3, 5000, window=3, tol=1e-3, device="cuda")
    window.step(X[0], F[0])
    torch.cuda.set_sync_debug_mode("error")
    for x, fx in zip(X, F, strict=True):
        window.step(x, fx, out=x)


@pytest.mark.parametrize("kind", [Anderson, Forward])
@pytest.mark.parametrize("stop", ["max", "mean"])
def test_no_synchronisation_in_a_solve(kind: type[Solver], stop: str, no_synchronisation: None) -> None:
    f = affine(0.9).to(torch.float32, "cuda")
    solver = kind(tol=1e-4, max_iter=200, stop=stop)  # type: ignore[arg-type]
    solver.solve(f, f.zero)
    z0 = f.zero
    torch.cuda.set_sync_debug_mode("error")
    solution = solver.solve(f, z0)
    torch.cuda.set_sync_debug_mode("default")
    assert solution.residual.mean() <= 1e-4
    assert int(solution.iterations.max()) + 1 == solution.evaluations, "one evaluation late"


@pytest.mark.parametrize("kind", [Anderson, Forward])
@pytest.mark.parametrize("compact", [False, True])
def test_a_solve_on_the_device_is_the_solve_on_the_cpu(kind: type[Solver], compact: bool) -> None:
    f = affine(0.9, batch=8)
    f.b[:4] *= torch.linspace(0, 1, 100, dtype=torch.float64)
    on_device = f.to(torch.float64, "cuda")
    solver = kind(tol=1e-6, max_iter=400, compact=compact)
    here = solver.solve(f, f.zero, restrict=lambda index: Affine(f.A, f.b[index]))
    there = solver.solve(on_device, on_device.zero, restrict=lambda index: Affine(on_device.A, on_device.b[index]))
    assert there.converged.all()
    assert (there.iterations.cpu() - here.iterations).abs().max() <= 1
    torch.testing.assert_close(there.z.cpu(), here.z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compact", [False, True])
def test_the_gradient_on_the_device_is_the_gradient_on_the_cpu(compact: bool) -> None:
    linear = torch.nn.Linear(20, 20, dtype=torch.float64)
    x = torch.randn(6, 20, dtype=torch.float64)
    grads = []
    for device in ("cpu", "cuda"):
        solver = Anderson(tol=1e-10, max_iter=300, compact=compact)
        layer = DEQ(lambda z, x: torch.tanh(0.5 * linear(z) + x), solver=solver, gradient=Implicit(solver))
        linear.to(device).zero_grad()
        layer(x.to(device)).square().sum().backward()
        assert linear.weight.grad is not None
        grads.append(linear.weight.grad.cpu().clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-8)


WHOLE = [
    pytest.param(
        True, marks=pytest.mark.skipif(not _while_nodes_available(), reason="this PyTorch captures no while nodes")
    ),
    False,
]


@pytest.mark.parametrize("stop", ["max", "mean"])
@pytest.mark.parametrize("kind", [Anderson, Forward])
@pytest.mark.parametrize("whole", WHOLE)
def test_a_recorded_solve_is_the_solve_to_the_bit(whole: bool, kind: type[Solver], stop: str) -> None:
    for dim in (100, 5000):  # one launch an update, and two
        f = affine(0.9, batch=8, dim=dim).to(torch.float32, "cuda")
        f.b[:4] *= torch.linspace(0, 1, dim, device="cuda")
        solver = kind(tol=1e-4, max_iter=200, stop=stop)  # type: ignore[arg-type]
        recorded = CapturedSolve(solver, f, f.zero, recorder_for(f.b.device), whole=whole)
        assert recorded.whole == whole
        for start in (f.zero, torch.randn_like(f.zero), 1e3 * torch.randn_like(f.zero), f.zero):
            expected, got = solver.solve(f, start), recorded(start)
            assert torch.equal(got.z, expected.z)
            assert torch.equal(got.residual, expected.residual)
            assert torch.equal(got.iterations, expected.iterations)
            late = 0 if whole else 1
            assert got.evaluations <= int(got.iterations.max()) + late


@pytest.mark.parametrize("whole", WHOLE)
def test_replays_never_wait_for_the_device(whole: bool, no_synchronisation: None) -> None:
    f = affine(0.9).to(torch.float32, "cuda")
    solver = Anderson(tol=1e-4, max_iter=200)
    recorded = CapturedSolve(solver, f, f.zero, recorder_for(f.b.device), whole=whole)
    replay = recorded._replay_solve if whole else recorded._replay_iteration
    assert replay is not None
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        replay()


@pytest.mark.parametrize("kind", [Anderson, Forward])
def test_a_layer_with_graphs_trains_to_the_bit_as_one_without(kind: type[Solver]) -> None:
    solver = kind(tol=1e-3, max_iter=40)
    weights = []
    for cuda_graph in (True, False):
        torch.manual_seed(0)
        model = EquilibriumClassifier(
            3, 8, 10, solver=solver, gradient=Implicit(solver), channels=16, inner=16, pool=4, cuda_graph=cuda_graph
        ).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in (4, 7, 4, 7, 4):
            images = torch.randn(batch, 3, 8, 8).cuda()
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        assert len(model.deq.graphs) == (4 if cuda_graph else 0)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    for got, expected in zip(*weights, strict=True):
        # cuDNN adds some weight gradients with atomics.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "dim", "window"), [(100, 49_152, 5), (128, 1024, 5), (16, 262_144, 10)])
def test_a_solve_takes_less_than_three_states_beyond_its_history(batch: int, dim: int, window: int) -> None:
    slope = torch.rand(dim, device="cuda").mul(0.9)
    shift = torch.randn(batch, dim, device="cuda")
    value = torch.empty_like(shift)
    z0 = torch.zeros_like(shift)
    solver = Anderson(window=window, tol=1e-6, max_iter=30)

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(shift, z, slope, out=value)

    solver.solve(f, z0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    solution = solver.solve(f, z0)
    unit = batch * dim * 4
    assert solution.z.numel() == batch * dim
    assert torch.cuda.max_memory_allocated() - before < (2 * window + 3) * unit
