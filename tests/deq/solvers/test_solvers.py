"""Anderson and forward iteration as solvers: counts, tolerances, freezing, honesty, and what bad input gets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.problems import affine
from deq.kernels.naive import relative_residual
from deq.solvers import Anderson, Broyden, Forward, Solution, Solver
from tests.reference_anderson import qr_anderson_iterations

SOLVERS = [Anderson(tol=1e-5, max_iter=300), Forward(tol=1e-5, max_iter=300), Broyden(tol=1e-5, max_iter=300)]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=["anderson", "forward", "broyden"])


class Counted:
    """A map that counts its evaluations."""

    def __init__(self, f: object) -> None:
        self.f, self.count = f, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.count += 1
        result: Tensor = self.f(z)  # type: ignore[operator]
        return result


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("lowest", [0.0, -1.0], ids=["positive", "symmetric"])
def test_iteration_counts_are_those_of_a_float64_qr_anderson(rho: float, lowest: float) -> None:
    f = affine(rho, lowest=lowest * rho)
    for window in range(1, 11):
        expected = qr_anderson_iterations(f, f.zero, window=window, tol=1e-6, max_iter=2000)
        got = Anderson(window=window, adaptive=False, tol=1e-6, max_iter=2000).solve(f, f.zero)
        assert got.converged.all()
        allowed = torch.clamp(expected * 0.1, min=1.0)
        assert ((got.iterations - expected).abs() <= allowed).all(), (window, got.iterations, expected)


@pytest.mark.parametrize("window", [2, 5, 10])
def test_iteration_counts_in_float32_are_not_above_those_of_float64_qr(window: int) -> None:
    # At rho = 0.99 float32's own rounding perturbs the iterates enough to change the counts, mostly to fewer.
    for rho in (0.5, 0.9):
        f = affine(rho)
        expected = qr_anderson_iterations(f, f.zero, window=window, tol=1e-5, max_iter=500)
        got = Anderson(window=window, tol=1e-5, max_iter=500).solve(f.to(torch.float32), f.zero.float())
        assert ((got.iterations - expected) <= torch.clamp(expected * 0.1, min=1.0)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_counts_do_not_change_when_the_right_side_is_rescaled(dtype: torch.dtype) -> None:
    solver = Anderson(window=5, tol=1e-6, max_iter=200)
    f = affine(0.9).to(dtype)
    reference = solver.solve(f, f.zero)
    assert reference.converged.all()
    for factor in (1e-6, 1e-3, 1e3, 1e6):
        scaled = solver.solve(f.scaled(factor), f.zero)
        assert scaled.converged.all()
        assert (scaled.iterations - reference.iterations).abs().max() <= 1, factor


def test_absolute_regularisation_loses_its_way_when_the_right_side_is_small() -> None:
    # The control for the test above: the same counts do change under the peers' regularisation.
    solver = Anderson(window=5, tol=1e-6, max_iter=300, regularization="absolute")
    f = affine(0.9)
    assert solver.solve(f.scaled(1e3), f.zero).evaluations * 2 < solver.solve(f.scaled(1e-3), f.zero).evaluations


@each_solver
def test_the_residual_returned_is_the_one_at_z(solver: Solver) -> None:
    f = affine(0.95).to(torch.float32)
    for max_iter in (3, 300):
        solution = type(solver)(tol=1e-5, max_iter=max_iter).solve(f, f.zero)
        recomputed = relative_residual(solution.z, f(solution.z)).float()
        torch.testing.assert_close(solution.residual, recomputed, rtol=0.05, atol=1e-7)
        assert torch.equal(solution.converged, solution.residual <= 1e-5)


@each_solver
def test_evaluations_are_counted_honestly(solver: Solver) -> None:
    f = Counted(affine(0.8))
    solution = solver.solve(f, f.f.zero, trace=True)  # type: ignore[attr-defined]
    assert solution.evaluations == f.count == int(solution.iterations.max())
    assert solution.trace is not None
    assert solution.trace.shape == (f.count, 4)


@each_solver
def test_the_trace_holds_each_samples_residual_until_it_freezes(solver: Solver) -> None:
    f = affine(0.9)
    f.b[0] = 0  # solved by the first evaluation
    solution = solver.solve(f, f.zero, trace=True)
    assert solution.trace is not None
    assert solution.iterations[0] == 1
    assert (solution.iterations[1:] > 5).all()
    for sample, count in enumerate(solution.iterations.tolist()):
        assert (solution.trace[: count - 1, sample] > 1e-5).all()
        assert (solution.trace[count - 1 :, sample] == solution.residual[sample]).all()


@each_solver
def test_a_converged_sample_is_not_moved_while_others_go_on(solver: Solver) -> None:
    f = affine(0.9, batch=2)
    f.b[1] = torch.linalg.eigh(f.A).eigenvectors[:, 10]  # one eigenvalue, about 0.09: done in a few steps
    alone = type(solver)(tol=1e-2, max_iter=100).solve(lambda z: f(torch.cat([z, z]))[:1], f.zero[:1])
    seen: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return f(z)

    both = type(solver)(tol=1e-2, max_iter=100).solve(watched, f.zero)
    first, last = sorted(both.iterations.tolist())
    assert first < last, "the problem must have one sample done before the other"
    early = int(both.iterations.argmin())
    for z in seen[first - 1 :]:
        assert torch.equal(z[early], both.z[early])
    torch.testing.assert_close(both.z[0], alone.z[0])


def test_stop_mean_ends_earlier_than_max_and_freezes_nobody() -> None:
    f = affine(0.95)
    f.b[0] *= torch.linspace(1, 0, 100) ** 8
    most = Anderson(tol=1e-4, max_iter=100, stop="max").solve(f, f.zero)
    mean = Anderson(tol=1e-4, max_iter=100, stop="mean").solve(f, f.zero, trace=True)
    assert mean.evaluations <= most.evaluations
    assert mean.trace is not None
    means = mean.trace.mean(dim=1)
    assert means[-1] <= 1e-4 < means[-2]
    assert (mean.iterations == mean.evaluations).all()


@each_solver
def test_the_cap_is_kept_and_the_best_iterate_returned(solver: Solver) -> None:
    # An expansion: forward iteration gets worse with every step.
    f = affine(1.5)
    solution = type(solver)(tol=1e-12, max_iter=7).solve(f, f.zero, trace=True)
    assert solution.evaluations == 7
    assert solution.trace is not None
    window = {Anderson: 5, Forward: 1, Broyden: 7}[type(solver)]
    best = solution.trace[-window:].min(dim=0).values
    torch.testing.assert_close(solution.residual, best)
    torch.testing.assert_close(relative_residual(solution.z, f(solution.z)), best)


@each_solver
@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 7), (2, 3, 4, 5)])
def test_any_shape_comes_back_as_it_was(solver: Solver, shape: tuple[int, ...]) -> None:
    solution = solver.solve(torch.cos, torch.zeros(shape))
    assert solution.z.shape == shape
    assert solution.residual.shape == solution.iterations.shape == solution.converged.shape == shape[:1]
    torch.testing.assert_close(solution.z, torch.full(shape, 0.7390851), rtol=1e-4, atol=0)


@each_solver
def test_channels_last_and_non_contiguous_starts(solver: Solver) -> None:
    z0 = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    expected = solver.solve(lambda z: 0.5 * torch.sin(z) + 1, z0.contiguous()).z
    got = solver.solve(lambda z: (0.5 * torch.sin(z) + 1).to(memory_format=torch.channels_last), z0)
    assert torch.equal(got.z, expected)
    assert torch.equal(solver.solve(torch.cos, torch.zeros(5, 2).t()).z, solver.solve(torch.cos, torch.zeros(2, 5)).z)


@each_solver
def test_neither_z0_nor_what_f_returns_is_written_to(solver: Solver) -> None:
    constant, z0 = torch.ones(2, 3), torch.zeros(2, 3)
    solution = solver.solve(lambda z: constant, z0)
    assert torch.equal(constant, torch.ones(2, 3))
    assert torch.equal(z0, torch.zeros(2, 3))
    assert torch.equal(solution.z, constant)
    assert solution.evaluations == 2
    solution.z.zero_()
    assert torch.equal(constant, torch.ones(2, 3)), "z must not share memory with what f returned"


@each_solver
def test_a_map_that_reuses_its_output_buffer(solver: Solver) -> None:
    buffer = torch.empty(2, 3)
    expected = solver.solve(torch.cos, torch.zeros(2, 3))
    got = solver.solve(lambda z: torch.cos(z, out=buffer), torch.zeros(2, 3))
    assert torch.equal(got.z, expected.z)
    assert got.evaluations == expected.evaluations


@each_solver
def test_the_identity_has_converged_at_once(solver: Solver) -> None:
    z0 = torch.randn(3, 4)
    solution = solver.solve(lambda z: z, z0)
    assert torch.equal(solution.z, z0)
    assert solution.evaluations == 1
    assert solution.converged.all()


@each_solver
def test_restarting_from_the_solution_stops_at_once(solver: Solver) -> None:
    f = affine(0.9)
    solution = solver.solve(f, f.zero)
    again = solver.solve(f, solution.z)
    assert again.evaluations == 1
    assert torch.equal(again.z, solution.z)


@each_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_does_not_touch_the_others(solver: Solver, bad: float) -> None:
    f = affine(0.9)

    def spoilt(z: Tensor) -> Tensor:
        fz = f(z)
        fz[2, 5] = bad
        return fz

    clean, solution = solver.solve(f, f.zero), solver.solve(spoilt, f.zero)
    others = [0, 1, 3]
    assert torch.equal(solution.z[others], clean.z[others])
    assert solution.evaluations == clean.evaluations, "a sample given up must not keep the others waiting"
    assert not solution.converged[2]
    assert torch.isfinite(solution.z).all()


@each_solver
@pytest.mark.parametrize("stop", ["max", "mean"])
def test_a_batch_that_is_never_finite_ends_early(solver: Solver, stop: str) -> None:
    solution = type(solver)(tol=1e-3, max_iter=40, stop=stop).solve(  # type: ignore[arg-type]
        lambda z: z + math.nan, torch.zeros(2, 3)
    )
    assert solution.evaluations <= 2
    assert not solution.converged.any()
    assert torch.isfinite(solution.z).all()


@each_solver
def test_an_exception_in_f_is_the_users_own(solver: Solver) -> None:
    error = KeyError("mine")

    def f(z: Tensor) -> Tensor:
        raise error

    with pytest.raises(KeyError) as caught:
        solver.solve(f, torch.zeros(2, 3))
    assert caught.value is error


@each_solver
@pytest.mark.parametrize(
    ("f", "message"),
    [
        (
            lambda z: z[:, :2],
            r"f must return what it is given, \(2, 3\) torch.float32 on cpu, but it returned \(2, 2\)",
        ),
        (lambda z: z.double(), r"but it returned \(2, 3\) torch.float64"),
        (lambda z: None, "but it returned NoneType"),
        (lambda z: z.add_(1), "f wrote into its argument"),
    ],
)
def test_a_map_that_breaks_the_contract_is_named(solver: Solver, f: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver.solve(f, torch.zeros(2, 3))  # type: ignore[arg-type]


@each_solver
@pytest.mark.parametrize("z0", [torch.zeros(0, 3), torch.zeros(3, 0), torch.tensor(1.0), torch.zeros(2, 3).long()])
def test_a_start_without_elements_is_refused(solver: Solver, z0: Tensor) -> None:
    with pytest.raises(ValueError, match=r"z0 must be \(B, \.\.\.\) floating point with at least one element, got"):
        solver.solve(lambda z: z, z0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1e-3}, "tol must be finite and at least 0, got -0.001"),
        ({"tol": math.nan}, "tol must be finite and at least 0, got nan"),
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"max_iter": 2.5}, "max_iter must be a whole number"),
        ({"check_every": 0}, "check_every must be a whole number of evaluations, at least 1, got 0"),
        ({"check_every": 1.5}, "check_every must be a whole number"),
        ({"stop": "any"}, "stop must be one of .* got 'any'"),
        ({"beta": 0.0}, "beta must be above 0 and at most 1, got 0.0"),
        ({"beta": 1.5}, "beta must be above 0 and at most 1, got 1.5"),
    ],
)
@pytest.mark.parametrize("kind", [Anderson, Broyden, Forward])
def test_bad_options_are_refused_on_construction(kind: type[Solver], options: dict[str, object], message: str) -> None:
    if kind is Broyden and "beta" in options:
        pytest.skip("has no beta")
    with pytest.raises(ValueError, match=message):
        kind(**options)  # type: ignore[arg-type]


def test_window_options_are_refused_on_construction() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Anderson(window=0)
    with pytest.raises(ValueError, match="memory must be a whole number of pairs of vectors, at least 1, got 0"):
        Broyden(memory=0)
    with pytest.raises(ValueError, match="regularization must be one of"):
        Anderson(regularization="none")  # type: ignore[arg-type]


def test_anderson_of_window_1_is_forward_iteration() -> None:
    f = affine(0.9)
    for beta in (1.0, 0.6):
        anderson = Anderson(window=1, beta=beta, tol=1e-5, max_iter=400).solve(f, f.zero)
        forward = Forward(beta=beta, tol=1e-5, max_iter=400).solve(f, f.zero)
        assert torch.equal(anderson.iterations, forward.iterations)
        torch.testing.assert_close(anderson.z, forward.z)


def test_anderson_needs_far_fewer_evaluations_than_forward() -> None:
    f = affine(0.9)
    anderson, forward = (kind(tol=1e-6, max_iter=300).solve(f, f.zero) for kind in (Anderson, Forward))
    assert anderson.converged.all()
    assert forward.converged.all()
    assert anderson.evaluations * 2 < forward.evaluations
    torch.testing.assert_close(anderson.z, f.solution(), rtol=1e-3, atol=1e-3)


def test_permuting_the_batch_permutes_the_answer() -> None:
    f = affine(0.9)
    order = torch.tensor([2, 0, 3, 1])
    plain = Anderson(tol=1e-5).solve(f, f.zero)
    f.b.copy_(f.b[order])
    permuted = Anderson(tol=1e-5).solve(f, f.zero)
    torch.testing.assert_close(permuted.z, plain.z[order])
    assert torch.equal(permuted.iterations, plain.iterations[order])


@each_solver
def test_solves_leave_no_graph_behind_and_work_in_inference_mode(solver: Solver) -> None:
    z0 = torch.zeros(2, 3, requires_grad=True)
    solution = solver.solve(torch.cos, z0)
    assert not solution.z.requires_grad
    with torch.inference_mode():
        inferred = solver.solve(torch.cos, torch.zeros(2, 3))
    assert torch.equal(inferred.z, solution.z)


@pytest.mark.parametrize("memory", [1, 2])
def test_broyden_with_hardly_any_memory(memory: int) -> None:
    f = affine(0.5)
    solution = Broyden(tol=1e-6, max_iter=100, memory=memory).solve(f, f.zero)
    assert solution.converged.all()
    torch.testing.assert_close(solution.residual, relative_residual(solution.z, f(solution.z)), rtol=1e-6, atol=0)


def test_under_autocast_broyden_takes_the_same_steps() -> None:
    f = affine(0.9).to(torch.float32).scaled(1e6)
    solver = Broyden(tol=1e-5, max_iter=300)
    expected = solver.solve(f, f.zero)

    def in_float32(z: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return f(z)

    with torch.autocast("cpu", dtype=torch.float16):
        found = solver.solve(in_float32, f.zero)
    assert torch.equal(found.z, expected.z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_reach_what_their_rounding_allows(dtype: torch.dtype) -> None:
    f = affine(0.5).to(dtype)
    solution = Anderson(tol=2e-2, max_iter=40).solve(f, f.zero)
    assert solution.converged.all()
    assert solution.z.dtype == dtype
    assert solution.residual.dtype == torch.float32


def test_a_solution_reads_in_one_line() -> None:
    solution = Anderson(tol=1e-3).solve(torch.cos, torch.zeros(2, 3))
    assert isinstance(solution, Solution)
    text = repr(solution)
    assert "\n" not in text
    assert text.startswith(f"Solution(2 of 2 converged, {solution.evaluations} evaluations, iterations ")


def test_a_solution_with_a_sample_given_up_still_shows_the_residuals_of_the_others() -> None:
    x = torch.tensor([[1.0], [math.nan]])
    some = Forward(tol=1e-3).solve(lambda z: 0.5 * z + x, torch.zeros(2, 1))
    assert "1 of 2 converged" in repr(some)
    assert f"residual {some.residual[0]:.1e} to nan" in repr(some)
    assert "residual nan," in repr(Forward().solve(lambda z: z + math.nan, torch.zeros(2, 1)))


@each_solver
@pytest.mark.parametrize(("slope", "shift", "start"), [(0.5, 1.0, -2.0), (-1.0, 2.0, 0.0)])
def test_a_map_that_passes_through_zero_is_not_given_up(
    solver: Solver, slope: float, shift: float, start: float
) -> None:
    # f(z) = slope z + shift is exactly 0 at the start, or one step later.
    solution = solver.solve(lambda z: slope * z + shift, torch.full((1, 3), start))
    assert torch.isfinite(solution.residual).all()
    if slope > 0 or not isinstance(solver, Forward):
        assert solution.converged.all()
        torch.testing.assert_close(solution.z, torch.full((1, 3), shift / (1 - slope)), rtol=1e-3, atol=0)
    else:
        assert solution.outcomes == {"diverged": 1}, "an oscillation that comes no nearer"
        assert solution.evaluations == solver.patience + 1
        patient = replace(solver, patience=0).solve(lambda z: slope * z + shift, torch.full((1, 3), start))
        assert patient.evaluations == solver.max_iter
        assert patient.outcomes == {"stagnated": 1}


@pytest.mark.parametrize("kind", [Anderson, Broyden, Forward])
@pytest.mark.parametrize("stop", ["max", "mean"])
def test_looking_seldom_costs_idle_evaluations_and_changes_no_bit(kind: type[Solver], stop: str) -> None:
    f = affine(0.9)
    always = kind(tol=1e-5, max_iter=400, stop=stop).solve(f, f.zero)  # type: ignore[arg-type]
    every = 7
    assert always.evaluations % every != 0, "or nothing would be left to see"
    seldom = kind(tol=1e-5, max_iter=400, stop=stop, check_every=every).solve(f, f.zero)  # type: ignore[arg-type]
    assert always.idle_evaluations == 0
    assert seldom.evaluations == -(-always.evaluations // every) * every
    assert seldom.idle_evaluations == seldom.evaluations - always.evaluations
    assert torch.equal(seldom.z, always.z)
    assert torch.equal(seldom.residual, always.residual)
    assert torch.equal(seldom.iterations, always.iterations)


def test_looking_seldom_never_goes_beyond_the_cap() -> None:
    f = affine(0.9)
    solution = Anderson(tol=1e-12, max_iter=10, check_every=7).solve(f, f.zero)
    assert solution.evaluations == 10
    assert solution.idle_evaluations == 0
