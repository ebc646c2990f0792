"""Recorded solves, on a CPU that plays the graphs; on a device: tests/kernels/test_gpu.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.problems import affine
from deq import DEQ
from deq.kernels import native_backend, residual_norm, window
from deq.layer import Implicit, JacobianFree
from deq.solvers import Anderson, Broyden, Forward, Solver, captured
from deq.solvers.captured import CapturedSolve, _while_nodes_available, recorder_for
from tests.replay import ReplayingRecorder, triton_launches_are_recorded  # noqa: F401

pytestmark = pytest.mark.usefixtures("triton_launches_are_recorded", "every_backend_can_be_recorded")

SOLVERS = {
    "Anderson": Anderson(window=2, tol=1e-2, max_iter=20, backend="triton"),
    "Anderson, damped": Anderson(window=2, beta=0.5, tol=3e-2, max_iter=20, backend="triton"),
    "Anderson, mean": Anderson(window=2, tol=1e-2, max_iter=20, stop="mean", backend="triton"),
    "Anderson, cap": Anderson(window=3, tol=0.0, max_iter=5, backend="triton"),
    "Forward": Forward(tol=1e-3, max_iter=60),
    "Forward, damped": Forward(tol=1e-3, max_iter=60, beta=0.7),
    "Broyden": Broyden(tol=1e-3, max_iter=30, memory=4),
    "Forward, mean": Forward(tol=1e-3, max_iter=60, stop="mean"),
    "Forward, cap": Forward(tol=0.0, max_iter=9),
}


@pytest.fixture
def every_backend_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    # The C++ backend launches nothing that could be written down.
    monkeypatch.setattr(native_backend, "obstacle", lambda dtype: "is left out")
    assert window.native_backend is native_backend


@pytest.fixture(params=[True, False], ids=["whole solve", "by iterations"])
def recorders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[ReplayingRecorder]:
    """The recorders that layers make."""
    made: list[ReplayingRecorder] = []

    def make(device: torch.device) -> ReplayingRecorder:
        made.append(ReplayingRecorder(records_loops=request.param))
        return made[-1]

    monkeypatch.setattr(captured, "recorder_for", make)
    return made


class Cell(nn.Module):
    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        product: Tensor = torch.tanh(0.4 * self.linear(z) + x)
        return product


def layer(cell: nn.Module, *, cuda_graph: bool, solver: Solver = SOLVERS["Forward"]) -> DEQ:
    # Forward iteration unless named, since interpreted kernels take their time.
    return DEQ(cell, solver, Implicit(replace(solver, tol=1e-2)), cuda_graph=cuda_graph)


def assert_same(a: DEQ, b: DEQ, x: Tensor) -> None:
    """Same bits in what is found, in its account, and in all gradients."""
    results = []
    for deq in (a, b):
        here = x.clone().requires_grad_()
        deq.zero_grad()
        z = deq(here)
        (z * torch.linspace(-1, 1, z.numel()).view(z.shape)).sum().backward()
        assert deq.last_solution is not None
        assert deq.last_adjoint is not None
        account = [
            [solution.z, solution.residual, solution.iterations, torch.tensor(solution.evaluations)]
            for solution in (deq.last_solution, deq.last_adjoint)
        ]
        results.append([z, here.grad, *[p.grad for p in deq.parameters()], *account[0], *account[1]])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("whole", [True, False], ids=["whole solve", "by iterations"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_recorded_solve_is_the_solve_to_the_bit_from_every_start(name: str, whole: bool) -> None:
    solver, f = SOLVERS[name], affine(0.5, batch=3, dim=8).to(torch.float32, "cpu")
    f.b[1] *= 0
    recorder = ReplayingRecorder(records_loops=whole)
    recorded = CapturedSolve(solver, f, f.zero, recorder)
    assert recorded.whole == whole
    for start in (f.zero, 100 * torch.randn(3, 8), f.zero):
        expected, got, before = solver.solve(f, start), recorded(start), recorder.replays
        assert torch.equal(got.z, expected.z)
        assert torch.equal(got.residual, expected.residual)
        assert torch.equal(got.iterations, expected.iterations)
        assert torch.equal(got.converged, expected.converged)
        assert (got.evaluations, got.sample_evaluations) == (expected.evaluations, expected.sample_evaluations)
        recorded(start)
        assert recorder.replays - before == (1 if whole else expected.evaluations)
    assert recorder.recordings == 1


@pytest.mark.parametrize("whole", [True, False], ids=["whole solve", "by iterations"])
@pytest.mark.parametrize("name", ["Anderson", "Anderson, mean", "Forward", "Forward, mean", "Broyden"])
def test_a_recorded_solve_notices_samples_that_see_each_other(name: str, whole: bool) -> None:
    A = torch.diag(torch.ones(5), 1)[:6, :6] * 0.4 + torch.diag(torch.ones(5), -1) * 0.4  # nodes of a path
    source = torch.zeros(6, 2)
    source[0] = 1
    solver = replace(SOLVERS[name], tol=1e-3, max_iter=40)

    def f(z: Tensor) -> Tensor:
        return A @ z + source

    recorded = CapturedSolve(solver, f, torch.zeros(6, 2), ReplayingRecorder(records_loops=whole))
    for start in (torch.zeros(6, 2), torch.ones(6, 2), torch.zeros(6, 2)):
        got = recorded(start)
        residual = residual_norm(got.z, f(got.z))
        assert (residual[got.converged] <= 1e-3 * (1 + 1e-4)).all()
        assert got.evaluations <= 40
        if solver.stop == "max":
            assert got.converged.all()


def test_what_a_recorded_solve_returned_stays_as_it_was() -> None:
    f = affine(0.5, batch=2, dim=8).to(torch.float32, "cpu")
    recorded = CapturedSolve(SOLVERS["Anderson"], f, f.zero, ReplayingRecorder())
    first = recorded(f.zero)
    kept = [tensor.clone() for tensor in (first.z, first.residual, first.iterations, first.converged)]
    recorded(torch.randn(2, 8))
    for tensor, copied in zip((first.z, first.residual, first.iterations, first.converged), kept, strict=True):
        assert torch.equal(tensor, copied)


def test_f_that_is_not_finite_in_one_sample_leaves_the_others_as_they_are(recorders: list[ReplayingRecorder]) -> None:
    cell = Cell()
    x = torch.randn(3, 12)
    bad = x.clone()
    bad[1, 3] = torch.nan
    graphed, plain = layer(cell, cuda_graph=True), layer(cell, cuda_graph=False)
    with torch.no_grad():
        graphed(x)
        z, expected = graphed(bad), plain(bad)
    assert torch.equal(z[[0, 2]], expected[[0, 2]])
    assert graphed.last_solution is not None
    assert not graphed.last_solution.converged[1]
    with torch.no_grad():
        assert torch.equal(graphed(x), plain(x)), "nothing is left of it"


@pytest.mark.parametrize("solver", [SOLVERS["Anderson"], SOLVERS["Forward"]], ids=["Anderson", "Forward"])
def test_inputs_that_change_and_parameters_updated_in_place_give_what_they_give_without_graphs(
    solver: Solver, recorders: list[ReplayingRecorder]
) -> None:
    cell = Cell()
    graphed, plain = layer(cell, cuda_graph=True, solver=solver), layer(cell, cuda_graph=False, solver=solver)
    optimiser = torch.optim.SGD(cell.parameters(), lr=0.3)
    for _ in range(3):
        assert_same(graphed, plain, torch.randn(2, 12))
        optimiser.step()
    assert len(recorders) == 2, "one for the forward and one for the adjoint solve, both at the first step"


def test_each_shape_is_recorded_once_and_the_oldest_is_forgotten(recorders: list[ReplayingRecorder]) -> None:
    cell = Cell()
    graphed, plain = layer(cell, cuda_graph=True), layer(cell, cuda_graph=False)
    graphed.graphs.capacity = 4
    for batch in (2, 3, 2, 3):
        assert_same(graphed, plain, torch.randn(batch, 12))
    assert (len(recorders), len(graphed.graphs)) == (4, 4)
    assert_same(graphed, plain, torch.randn(5, 12))
    assert (len(recorders), len(graphed.graphs)) == (6, 4)
    assert_same(graphed, plain, torch.randn(3, 12))
    assert len(recorders) == 6, "used later than the other"
    assert_same(graphed, plain, torch.randn(2, 12))
    assert len(recorders) == 8


def recorded_anew(change: Callable[[DEQ], None], recorders: list[ReplayingRecorder]) -> None:
    deq = layer(Cell(), cuda_graph=True)
    deq(torch.randn(2, 12)).sum().backward()
    assert len(recorders) == 2
    change(deq)
    assert_same(deq, layer(deq.cell, cuda_graph=False, solver=deq.solver), torch.randn(2, 12))
    assert len(recorders) == 4


def test_a_parameter_that_was_replaced_is_recorded_anew(recorders: list[ReplayingRecorder]) -> None:
    def change(deq: DEQ) -> None:
        assert isinstance(deq.cell, Cell)
        deq.cell.linear.weight = nn.Parameter(deq.cell.linear.weight.detach() / 2)

    recorded_anew(change, recorders)


def test_a_parameter_of_other_strides_at_the_same_place_is_recorded_anew(recorders: list[ReplayingRecorder]) -> None:
    def change(deq: DEQ) -> None:
        assert isinstance(deq.cell, Cell)
        deq.cell.linear.weight.data = deq.cell.linear.weight.data.t()

    recorded_anew(change, recorders)


def test_what_inference_mode_records_serves_training_too(recorders: list[ReplayingRecorder]) -> None:
    deq = layer(Cell(), cuda_graph=True)
    x = torch.randn(2, 12)
    with torch.inference_mode():
        inferred = deq(x)
    assert torch.equal(deq(x), inferred)
    assert len(recorders) == 1
    assert_same(deq, layer(deq.cell, cuda_graph=False), x)
    with torch.inference_mode():
        assert torch.equal(deq(x), inferred)


def test_another_cell_is_recorded_anew(recorders: list[ReplayingRecorder]) -> None:
    def change(deq: DEQ) -> None:
        deq.cell = Cell()

    recorded_anew(change, recorders)
    deq = DEQ(lambda z, x: 0.5 * z + x, SOLVERS["Forward"], cuda_graph=True)
    x = torch.ones(2, 3)
    with torch.no_grad():
        deq(x)
        deq.cell = lambda z, x: 0.2 * z + x
        assert torch.equal(deq(x), DEQ(deq.cell, SOLVERS["Forward"])(x))


def test_training_and_evaluation_are_recorded_apart(recorders: list[ReplayingRecorder]) -> None:
    recorded_anew(lambda deq: (deq.eval(), None)[1], recorders)


def test_another_dtype_is_recorded_apart(recorders: list[ReplayingRecorder]) -> None:
    deq = layer(Cell().double(), cuda_graph=True)
    x = torch.randn(2, 12, dtype=torch.float64)
    with torch.no_grad():
        assert deq(x).dtype == torch.float64
    deq.float()
    with torch.no_grad():
        assert deq(x.float()).dtype == torch.float32


def test_autocast_reads_the_weights_as_they_are_and_not_as_it_cast_them_before(
    recorders: list[ReplayingRecorder],
) -> None:
    cell = Cell()
    graphed, plain = layer(cell, cuda_graph=True), layer(cell, cuda_graph=False)
    x = torch.randn(2, 12)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cell(x, x)  # casts the weights, and keeps them while this context lasts
            assert_same(graphed, plain, x)
        with torch.no_grad():
            cell.linear.weight.mul_(0.5)
    assert_same(graphed, plain, x)


def test_two_uses_of_a_layer_in_one_graph_keep_their_own_inputs(recorders: list[ReplayingRecorder]) -> None:
    cell = Cell()
    grads = []
    for graph in (True, False):
        deq = layer(cell, cuda_graph=graph)
        x = torch.linspace(-1, 1, 24).view(2, 12).requires_grad_()
        cell.zero_grad()
        (deq(deq(x)) * deq(2 * x)).sum().backward()
        assert cell.linear.weight.grad is not None
        grads.append([x.grad, cell.linear.weight.grad.clone()])
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


def test_an_input_changed_in_place_before_the_backward_pass_is_refused(recorders: list[ReplayingRecorder]) -> None:
    x = torch.randn(2, 12)
    z = layer(Cell(), cuda_graph=True)(x)
    x.mul_(2)
    with pytest.raises(ValueError, match="modified in place"):
        z.sum().backward()


class TwoScales(Cell):
    """A state in two tensors that is handed back in the other order, and an input in two."""

    def forward(self, z: Any, x: Any) -> dict[str, Tensor]:
        fine, coarse = super().forward(joined(z), joined(x)).split([8, 4], dim=1)
        return {"coarse": coarse, "fine": fine.view(-1, 2, 4)}


def joined(z: dict[str, Tensor]) -> Tensor:
    return torch.cat([z["fine"].flatten(1), z["coarse"]], dim=1)


@pytest.mark.parametrize("solver", [SOLVERS["Anderson"], SOLVERS["Forward"]], ids=["Anderson", "Forward"])
def test_a_nested_state_is_recorded_as_one_tensor_to_the_bit(
    solver: Solver, recorders: list[ReplayingRecorder]
) -> None:
    cell = TwoScales()
    graphed, plain = layer(cell, cuda_graph=True, solver=solver), layer(cell, cuda_graph=False, solver=solver)
    for _ in range(2):
        flat = torch.randn(2, 12)
        z0 = {"fine": torch.randn(2, 2, 4), "coarse": torch.randn(2, 4)}
        results = []
        for deq in (graphed, plain):
            x = flat.clone().requires_grad_()
            cell.zero_grad()
            out = deq({"fine": x[:, :8].reshape(2, 2, 4), "coarse": x[:, 8:]}, z0=z0)
            (joined(out) * torch.linspace(-1, 1, 24).view(2, 12)).sum().backward()
            assert deq.last_solution is not None
            assert deq.last_adjoint is not None
            adjoint = joined(deq.last_adjoint.z)
            results.append([joined(out), x.grad, adjoint, *[p.grad for p in cell.parameters()]])
        for got, expected in zip(*results, strict=True):
            assert got is not None
            assert torch.equal(got, expected)
    assert len(recorders) == 2


def test_the_same_tensors_in_another_structure_are_recorded_apart(recorders: list[ReplayingRecorder]) -> None:
    deq = DEQ(lambda z, x: {key: 0.5 * z[key] + x * (key == "a") for key in z}, SOLVERS["Forward"], cuda_graph=True)
    x = torch.ones(2, 3)
    with torch.no_grad():
        for keys in (("a", "b"), ("b", "a"), ("b", "c")):
            z = deq(x, z0={key: torch.ones(2, 3) for key in keys})
            assert {key: bool((value > 1).all()) for key, value in z.items()} == {key: key == "a" for key in keys}
    assert len(recorders) == 3


def test_the_jacobian_free_gradient_needs_no_second_recording(recorders: list[ReplayingRecorder]) -> None:
    deq = DEQ(Cell(), SOLVERS["Forward"], JacobianFree(), cuda_graph=True)
    deq(torch.randn(2, 12)).sum().backward()
    assert len(recorders) == 1


def test_the_adjoint_costs_one_evaluation_of_f_more_and_says_so(recorders: list[ReplayingRecorder]) -> None:
    deq = layer(Cell(), cuda_graph=True)
    deq(torch.randn(3, 12)).sum().backward()
    assert deq.last_adjoint is not None
    assert deq.last_adjoint.sample_evaluations == 3 * (deq.last_adjoint.evaluations + 1)


def test_a_loop_that_cannot_be_recorded_is_recorded_by_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: ReplayingRecorder, going: Tensor, body: Callable[[], None]) -> None:
        raise RuntimeError("no random numbers in a while node")

    monkeypatch.setattr(ReplayingRecorder, "loop", fails)
    f = affine(0.5, batch=2, dim=8).to(torch.float32, "cpu")
    with pytest.warns(UserWarning, match="by iterations: no random numbers"):
        recorded = CapturedSolve(SOLVERS["Forward"], f, f.zero, ReplayingRecorder())
    assert not recorded.whole
    assert torch.equal(recorded(f.zero).z, SOLVERS["Forward"].solve(f, f.zero).z)


def test_f_that_asks_for_a_value_stops_the_recording() -> None:
    def f(z: Tensor) -> Tensor:
        return z / 2 if float(z.sum()) < 1 else z / 3

    with pytest.raises(RuntimeError, match="asks for a tensor's value"):
        CapturedSolve(SOLVERS["Anderson"], f, torch.zeros(2, 3), ReplayingRecorder(records_loops=False))


def test_what_cannot_be_recorded_is_refused_with_a_way_out() -> None:
    cell = Cell()
    with pytest.raises(ValueError, match=r"CUDA or ROCm device, got a state on cpu: use cuda_graph=False"):
        layer(cell, cuda_graph=True)(torch.zeros(2, 12))
    compacting = Anderson(compact=True)
    with pytest.raises(ValueError, match="compact=True changes the shape"):
        CapturedSolve(compacting, torch.cos, torch.zeros(2, 3), ReplayingRecorder())
    nested = DEQ(lambda z, x: z, cuda_graph=True)
    nested.cell = layer(cell, cuda_graph=False)
    with pytest.raises(ValueError, match="a DEQ layer in it"):
        nested(torch.zeros(2, 12))


def test_a_copy_of_a_layer_records_for_itself(recorders: list[ReplayingRecorder]) -> None:
    deq = layer(Cell(), cuda_graph=True)
    x = torch.randn(2, 12)
    with torch.no_grad():
        z = deq(x)
        for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
            assert len(other.graphs) == 0
            assert torch.equal(other(x), z)


@pytest.mark.parametrize(
    ("cuda", "hip", "methods", "available"),
    [
        ("13.0", None, True, True),
        ("12.4", None, True, True),
        ("12.1", None, True, False),
        ("13.0", None, False, False),
        (None, "6.4", True, False),
        (None, None, True, False),
    ],
)
def test_the_whole_solve_is_recorded_where_pytorch_has_while_nodes(
    cuda: str | None, hip: str | None, methods: bool, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)

    class Graph:
        if methods:
            begin_capture_to_while_node = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    assert _while_nodes_available.__wrapped__() == available


def test_there_is_no_recorder_without_a_device() -> None:
    with pytest.raises(ValueError, match="use cuda_graph=False"):
        recorder_for(torch.device("cpu"))
