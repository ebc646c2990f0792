"""Both backends of AndersonWindow against the float64 reference, and what happens to samples that misbehave."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.problems import affine
from deq.kernels import AndersonWindow, BackendName, Regularization, history, residual_norm
from deq.kernels.naive import anderson_update, anderson_weights, relative_residual
from deq.kernels.state import Carried
from deq.kernels.triton_backend import TritonBackend
from deq.solvers import Anderson
from tests.conftest import BACKENDS as BACKEND_NAMES
from tests.conftest import KERNEL_DEVICE
from tests.reference_adaptive import AdaptiveReference

TWO_LAUNCHES = "triton, two launches"
"""Triton as it handles a state too large for one program, whatever its size."""
BACKENDS = (*BACKEND_NAMES, TWO_LAUNCHES)

# Relative to the largest element of the window, for well-conditioned problems (condition of the scaled Gram matrix
# below 100). float32 holds the 1e-5; half precisions are bounded by the rounding of the rows that they store
# and of the iterate that they return. (Triton's interpreter cuts bfloat16 off where devices round to nearest.)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

# Triton's interpreter is far slower than a backend for the CPU. What it runs are the branches of the kernels
# (kernels/triton_backend.py), which these decide:
# - the window: 1; a power of two, for which the system has as many rows as the window; another, for which it has more;
#   the largest of those that the other backends are all tried with;
# - the size: a sample in one program or in several; never a multiple of what a program holds;
# - beta: 1 (UNDAMPED) or below.
# Every value of one meets some value of the others, not each. On a device nothing is left out.
INTERPRETED = not torch.cuda.is_available()
few = settings(quick, max_examples=15) if INTERPRETED else quick


def of_each_branch(names: str, everything: Iterable[Any], interpreted: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes by backend and ``names``: by everything, and Triton's interpreter by some."""
    everything, interpreted = list(everything), list(interpreted)
    assert set(interpreted) <= set(everything)
    cases = [
        (backend, *values)
        for backend in BACKENDS
        for values in (interpreted if INTERPRETED and backend.startswith("triton") else everything)
    ]
    return pytest.mark.parametrize(f"backend, {names}", cases)


def device_of(backend: str) -> str:
    return KERNEL_DEVICE if backend.startswith("triton") else "cpu"


def random_sequence(
    steps: int, batch: int, dim: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Iterates and values that no map connects: (steps, batch, dim) each."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(steps, batch, dim, generator=generator, dtype=torch.float64) * scale
    F = X + torch.randn(steps, batch, dim, generator=generator, dtype=torch.float64) * scale
    return X.to(dtype), F.to(dtype)


def run(window: AndersonWindow, X: Tensor, F: Tensor) -> Tensor:
    """Feeds the whole sequence; returns the last x_next, on the CPU."""
    device = window.residual.device
    x_next = X[0]
    for x, fx in zip(X, F, strict=True):
        x_next = window.step(x.to(device), fx.to(device))
    return x_next.cpu()


def name_of(backend: str) -> BackendName:
    """What a user would type."""
    return backend.partition(",")[0]  # type: ignore[return-value]


def make(backend: str, X: Tensor, m: int, **options: object) -> AndersonWindow:
    _, batch, dim = X.shape
    window = AndersonWindow(
        batch,
        dim,
        window=m,
        dtype=X.dtype,
        backend=name_of(backend),
        device=device_of(backend),
        **options,  # type: ignore[arg-type]
    )
    if backend == TWO_LAUNCHES:
        window._backend = TritonBackend(largest_fused=0)
    return window


def rows(sequence: Tensor, m: int) -> Tensor:
    """The last m entries as (B, m, d)."""
    return sequence[-m:].transpose(0, 1)


def condition(G: Tensor) -> float:
    G = G.double() / G.double().norm(dim=2, keepdim=True)
    return float(torch.linalg.cond(G @ G.mT).max())


def relative_error(got: Tensor, expected: Tensor, scale: Tensor) -> float:
    return float((got.double() - expected).abs().max() / scale.double().abs().max())


any_step = given(
    m=st.integers(1, 16),
    steps=st.integers(1, 20),
    batch=st.integers(1, 4),
    dim=st.integers(1, 200) | st.sampled_from([1023, 1024, 1025, 2500]),
    beta=st.sampled_from([1.0, 0.7, 0.1]),
    dtype=st.sampled_from(list(TOLERANCE)),
    regularization=st.sampled_from(["scaled", "absolute"]),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("backend", ["torch", "native"])
@quick
@any_step
def test_step_is_the_reference(backend: str, **drawn: Any) -> None:
    check_step(backend, **drawn)


@pytest.mark.parametrize("backend", ["triton", TWO_LAUNCHES])
@few
@any_step
def test_step_of_the_kernels_is_the_reference(backend: str, **drawn: Any) -> None:
    check_step(backend, **drawn)


def check_step(
    backend: str,
    m: int,
    steps: int,
    batch: int,
    dim: int,
    beta: float,
    dtype: torch.dtype,
    regularization: Regularization,
    seed: int,
) -> None:
    X, F = random_sequence(steps, batch, dim, dtype=dtype, seed=seed)
    X_window, F_window = rows(X, m), rows(F, m)
    assume(condition(F_window - X_window) < 100)
    assume(backend != "native" or dtype in (torch.float32, torch.float64))
    window = make(backend, X, m, beta=beta, regularization=regularization)
    x_next = run(window, X, F)

    ridge = 1e-6 if regularization == "scaled" else 1e-4
    expected = anderson_update(X_window, F_window, beta=beta, regularization=regularization, ridge=ridge)
    assert relative_error(x_next, expected, F_window) < TOLERANCE[dtype]
    alpha = anderson_weights(F_window.double() - X_window.double(), regularization=regularization, ridge=ridge)
    in_ring = torch.zeros(batch, m, dtype=torch.float64)
    in_ring[:, [i % m for i in range(max(0, steps - m), steps)]] = alpha
    assert relative_error(window.weights.cpu(), in_ring, torch.ones(1)) < TOLERANCE[dtype]
    residual = relative_residual(X[-1], F[-1])
    torch.testing.assert_close(window.residual.cpu().double(), residual, rtol=TOLERANCE[dtype], atol=0)


more_rows_than_dimensions = given(m=st.integers(2, 16), dim=st.integers(1, 8), seed=st.integers(0, 1000))


@pytest.mark.parametrize("backend", ["torch", "native"])
@quick
@more_rows_than_dimensions
def test_weights_are_as_good_as_optimal_when_there_are_more_rows_than_dimensions(backend: str, **drawn: Any) -> None:
    check_weights(backend, **drawn)


@pytest.mark.parametrize("backend", ["triton", TWO_LAUNCHES])
@few
@more_rows_than_dimensions
def test_weights_of_the_kernels_are_as_good_as_optimal_then(backend: str, **drawn: Any) -> None:
    check_weights(backend, **drawn)


def check_weights(backend: str, m: int, dim: int, seed: int) -> None:
    # The minimiser is not unique here, so that weights cannot be compared: what they achieve can.
    X, F = random_sequence(m, 1, dim, seed=seed)
    window = make(backend, X, m)
    run(window, X, F)
    G = (rows(F, m) - rows(X, m)).double()
    combined = (window.weights.cpu().double()[:, :, None] * G).sum(dim=1).norm(dim=1)
    best = (anderson_weights(G)[:, :, None] * G).sum(dim=1).norm(dim=1)
    assert (combined <= best * 1.01 + 1e-3 * G.norm(dim=2).amax(dim=1)).all()
    torch.testing.assert_close(window.weights.cpu().sum(dim=1), torch.ones(1), rtol=0, atol=1e-4)


@of_each_branch("m", [(m,) for m in range(1, 17)], [(1,), (2,), (3,), (8,), (16,)])
def test_every_window_from_1_to_16_while_the_ring_fills_and_after(backend: str, m: int) -> None:
    X, F = random_sequence(m + 3, 1, 70, seed=m)
    window = make(backend, X, m)
    for k in range(1, m + 4):
        x_next = window.step(X[k - 1].to(window.residual.device), F[k - 1].to(window.residual.device)).cpu()
        expected = anderson_update(rows(X[:k], m), rows(F[:k], m))
        assert relative_error(x_next, expected, F) < 1e-5, k


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_beyond_16_takes_the_same_path(backend: str) -> None:
    X, F = random_sequence(30, 1, 300)
    assert relative_error(run(make(backend, X, 20), X, F), anderson_update(rows(X, 20), rows(F, 20)), F) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gram_matrix_stays_more_exact_than_the_ridge_at_the_papers_size(backend: str) -> None:
    # Rows of one sign, as slow convergence gives them: the worst case for a long sum in float32.
    X, F = random_sequence(3, 1, 49_152)
    F = X + (F - X).abs()
    window = make(backend, X, 3)
    run(window, X, F)
    G = rows(F, 3).double() - rows(X, 3).double()
    scale = G.norm(dim=2)
    error = (window._state.H.cpu().double() - G @ G.mT) / (scale[:, :, None] * scale[:, None, :])
    assert error.abs().max() < 3e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_window_1_is_the_damped_forward_iteration(backend: str, beta: float) -> None:
    X, F = random_sequence(4, 3, 33)
    x_next = run(make(backend, X, 1, beta=beta), X, F)
    torch.testing.assert_close(x_next, X[-1] + beta * (F[-1] - X[-1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    X, F = random_sequence(7, 3, 2050)
    first, second = (run(make(backend, X, 4), X, F) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_and_fresh_output_are_the_same(backend: str) -> None:
    X, F = random_sequence(5, 2, 40)
    fresh, in_place = make(backend, X, 3), make(backend, X, 3)
    for x, fx in zip(X, F, strict=True):
        x, fx = x.to(device_of(backend)), fx.to(device_of(backend))
        kept = x.clone()
        expected = fresh.step(x, fx)
        assert torch.equal(x, kept), "step without out= must not touch its input"
        assert in_place.step(x, fx, out=x) is x
        assert torch.equal(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_may_be_written_over_f(backend: str) -> None:
    X, F = random_sequence(9, 2, 40)
    F[3, 1] = X[3, 1] * (1 + 1e-6)  # and over that of a frozen sample
    fresh, over = make(backend, X, 7, tol=1e-4), make(backend, X, 7, tol=1e-4)
    for x, fx in zip(X.to(device_of(backend)), F.to(device_of(backend)), strict=True):
        expected = fresh.step(x, fx)
        assert torch.equal(over.step(x, fx, out=fx), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_input(backend: str) -> None:
    X, F = random_sequence(5, 3, 40)
    strided, contiguous = make(backend, X, 3), make(backend, X, 3)
    for x, fx in zip(X, F, strict=True):
        x, fx = x.to(device_of(backend)), fx.to(device_of(backend))
        got = strided.step(x.t().contiguous().t(), fx.repeat(1, 2)[:, :40])
        assert torch.equal(got, contiguous.step(x, fx))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_sample_leaves_all_others_bit_identical(backend: str, bad: float) -> None:
    X, F = random_sequence(6, 4, 50)
    clean = run(make(backend, X, 3), X, F)
    F_bad = F.clone()
    F_bad[2, 1, 7] = bad
    spoilt = run(make(backend, X, 3), X, F_bad)
    others = [0, 2, 3]
    assert torch.equal(spoilt[others], clean[others])
    assert torch.isfinite(spoilt).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_non_finite_value_takes_the_plain_damped_step_from_the_iterate_before(backend: str) -> None:
    X, F = random_sequence(3, 2, 50)
    F[2, 0] = math.nan
    window = make(backend, X, 3, beta=0.5)
    x_next = run(window, X, F)
    torch.testing.assert_close(x_next[0], 0.5 * (X[1, 0] + F[1, 0]), rtol=1e-6, atol=1e-6)
    assert not window.frozen.any()
    again = run(window, X[2:], F[2:])
    assert window.frozen.tolist() == [True, False], "twice in a row: given up"
    assert torch.equal(again[0], X[2, 0])
    # The good iterate still in the window is there to be returned.
    z, residual = window.best(again.to(window.residual.device))
    torch.testing.assert_close(z[0].cpu(), X[1, 0], rtol=1e-5, atol=1e-6)
    assert residual[0].item() == pytest.approx(relative_residual(X[1], F[1])[0].item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_that_is_never_finite_is_given_up_where_it_stands(backend: str) -> None:
    X, F = random_sequence(1, 2, 50)
    F[0, 1, 3] = math.nan
    window = make(backend, X, 3)
    x_next = run(window, X, F)
    assert window.frozen.tolist() == [False, True]
    z, residual = window.best(x_next.to(window.residual.device))
    assert torch.equal(z[1].cpu(), X[0, 1])
    assert not residual[1] < math.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_singular_system_falls_back_to_the_plain_damped_step_of_that_sample_alone(backend: str) -> None:
    X, F = random_sequence(3, 3, 20)
    X[:, 1], F[:, 1] = X[0, 1], F[0, 1]  # three times the same row, and no ridge: exactly singular
    window = make(backend, X, 3, beta=0.5, ridge=0.0)
    x_next = run(window, X, F)
    torch.testing.assert_close(x_next[1], 0.5 * (X[0, 1] + F[0, 1]), rtol=1e-5, atol=1e-6)
    for sample in (0, 2):
        alone = anderson_update(rows(X, 3)[[sample]], rows(F, 3)[[sample]], beta=0.5, ridge=0.0)
        assert relative_error(x_next[[sample]], alone, F) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exact_fixed_point_stays_where_it_is(backend: str) -> None:
    X, F = random_sequence(3, 2, 20)
    F[2, 0] = X[2, 0]
    window = make(backend, X, 3)
    x_next = run(window, X, F)
    assert window.residual[0] == 0
    torch.testing.assert_close(x_next[0], X[2, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_of_the_norm_is_a_bad_row_not_a_crash(backend: str) -> None:
    X, F = random_sequence(3, 2, 20)
    F[2, 0] = 3e38
    window = make(backend, X, 3)
    assert torch.isfinite(run(window, X, F)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_samples_are_left_alone(backend: str) -> None:
    X, F = random_sequence(4, 3, 60)
    F[1, 1] = X[1, 1] * (1 + 1e-4)
    window = make(backend, X, 3, tol=1e-3)
    device = window.residual.device
    x = run(window, X[:2], F[:2])
    assert window.frozen.tolist() == [False, True, False]
    assert torch.equal(x[1], X[1, 1]), "the sample that converges keeps the iterate that did"
    residual, history = window.residual[1].item(), window._state.G[1].clone()
    for k in (2, 3):
        x = window.step(X[k].to(device), F[k].to(device)).cpu()
        assert torch.equal(x[1], X[k, 1])
    assert window.residual[1].item() == residual
    assert window.iterations.tolist() == [4, 2, 4]
    if backend != "torch":
        # A frozen program leaves before it touches the history, filled or not.
        torch.testing.assert_close(window._state.G[1], history, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [2.0**-80, 2.0**-64, 2.0**-10, 2.0**10, 2.0**64, 2.0**80])
def test_weights_do_not_change_when_f_is_rescaled(backend: str, factor: float) -> None:
    X, F = random_sequence(5, 2, 80)
    plain, scaled = make(backend, X, 4), make(backend, X, 4)
    x_next, x_scaled = run(plain, X, F), run(scaled, X * factor, F * factor)
    assert torch.equal(x_scaled, x_next * factor), "a power of two rescales without rounding: same bits"
    assert torch.equal(plain.weights, scaled.weights)
    assert torch.equal(plain.residual, scaled.residual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_absolute_regularisation_turns_into_averaging_when_f_is_small(backend: str) -> None:
    X, F = random_sequence(4, 2, 80, scale=1e-5)
    window = make(backend, X, 4, regularization="absolute")
    run(window, X, F)
    torch.testing.assert_close(window.weights.cpu(), torch.full((2, 4), 0.25), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_best_returns_the_iterate_of_lowest_residual_in_the_window(backend: str) -> None:
    X, F = random_sequence(6, 5, 90)
    window = make(backend, X, 4, beta=0.6)
    x_next = run(window, X, F)
    residuals = torch.stack([relative_residual(x, fx) for x, fx in zip(X, F, strict=True)])[-4:]
    lowest, index = residuals.min(dim=0)
    z, residual = window.best(x_next.to(window.residual.device))
    torch.testing.assert_close(residual.cpu().double(), lowest, rtol=1e-5, atol=0)
    expected = X[-4:][index, torch.arange(5)]
    torch.testing.assert_close(z.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(
    batch=st.integers(1, 5),
    dim=st.integers(1, 100) | st.sampled_from([1024, 3000]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 100),
)
def test_residual_norm_is_the_reference(backend: str, batch: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    X, F = random_sequence(1, batch, dim, dtype=dtype, seed=seed)
    assume(backend != "native" or dtype in (torch.float32, torch.float64))
    x, fx = X[0].to(device_of(backend)), F[0].to(device_of(backend))
    got = residual_norm(x, fx, backend=name_of(backend))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.cpu().double(), relative_residual(X[0], F[0]), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_norm_of_zero_is_zero(backend: str) -> None:
    zero = torch.zeros(2, 5, device=device_of(backend))
    assert residual_norm(zero, zero, backend=name_of(backend)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 2.5}, "window must be a whole number"),
        ({"beta": 0.0}, "beta must be above 0 and at most 1, got 0.0"),
        ({"beta": 1.5}, "beta must be above 0 and at most 1, got 1.5"),
        ({"beta": math.nan}, "beta must be above 0 and at most 1, got nan"),
        ({"tol": -1.0}, "tol must be at least 0, got -1.0"),
        ({"ridge": -1e-3}, "ridge must be finite and at least 0, got -0.001"),
        ({"regularization": "relative"}, "regularization must be one of .* got 'relative'"),
        ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
        ({"dtype": torch.int32}, "dtype must be one of .* got torch.int32"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"backend": "triton", "window": 64}, "holds no window of 64"),
    ],
)
def test_bad_options_are_refused_with_value_and_limit(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"batch_size": 2, "dim": 8, "device": "cpu"} | options
    with pytest.raises(ValueError, match=message):
        AndersonWindow(**arguments)  # type: ignore[arg-type]


def test_bad_input_is_refused_with_what_was_expected() -> None:
    window = AndersonWindow(2, 8, device="cpu")
    good = torch.zeros(2, 8)
    for x, fx in ((torch.zeros(2, 9), good), (good, torch.zeros(3, 8)), (good.double(), good), (good, good.bfloat16())):
        with pytest.raises(ValueError, match=r"must be \(2, 8\) torch.float32 like this window, got"):
            window.step(x, fx)
    with pytest.raises(ValueError, match="out must be contiguous"):
        window.step(good, good, out=torch.zeros(8, 2).t())
    with pytest.raises(ValueError, match=r"must be \(B, d\) of one dtype"):
        residual_norm(good, torch.zeros(2, 9))


def test_native_answers_do_not_depend_on_the_number_of_threads() -> None:
    X, F = random_sequence(4, 3, 100_000)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(run(make("native", X, 3), X, F))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_splitting_a_batch_gives_the_same_bits() -> None:
    X, F = random_sequence(4, 6, 500)
    whole = run(make("native", X, 3), X, F)
    halves = [
        run(make("native", part, 3), part, part_F) for part, part_F in ((X[:, :2], F[:, :2]), (X[:, 2:], F[:, 2:]))
    ]
    assert torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_a_history_beyond_the_caches_gives_the_same_bits(beta: float) -> None:
    # 77 MB as a whole, 39 MB in halves; an odd d, so that rows start at every alignment.
    X, F = random_sequence(5, 32, 100_003)
    whole = run(make("native", X, 3, beta=beta), X, F)
    halves = [
        run(make("native", X[:, part], 3, beta=beta), X[:, part], F[:, part]) for part in (slice(16), slice(16, 32))
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_without_a_compiler_the_cpu_uses_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from deq.kernels import native_backend, torch_backend

    monkeypatch.setenv("ANDERSON_NATIVE", "0")
    native_backend.load_library.cache_clear()
    try:
        window = AndersonWindow(2, 8, device="cpu")
        assert isinstance(window._backend, torch_backend.TorchBackend)
        with pytest.raises(ValueError, match="backend='native' is turned off by ANDERSON_NATIVE=0"):
            AndersonWindow(2, 8, device="cpu", backend="native")
    finally:
        native_backend.load_library.cache_clear()


@pytest.fixture
def compile_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The native library is looked for, and compiled, in an empty cache."""
    from deq.kernels import native_backend

    def forget() -> None:
        native_backend.load_library.cache_clear()
        native_backend.warn_if_broken.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield
    forget()


def test_a_compiler_command_may_have_words(
    compile_anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    wrapper = tmp_path / "cache for g++"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{wrapper}' g++")
    assert AndersonWindow(2, 8, device="cpu")._backend.name == "native"
    assert not recwarn.list


def test_a_wrong_compiler_is_named_once_and_the_next_one_tried(
    compile_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deq.kernels import native_backend

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert AndersonWindow(2, 8, device="cpu")._backend.name == "native", "by g++"
    native_backend.load_library.cache_clear()
    monkeypatch.setattr(native_backend.shutil, "which", lambda name: None)
    with pytest.warns(RuntimeWarning, match="several times slower.*no-such-compiler"):
        assert AndersonWindow(2, 8, device="cpu")._backend.name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AndersonWindow(2, 8, device="cpu")
        AndersonWindow(2, 8, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"backend='native' cannot be compiled \(no-such-compiler: .*use backend='auto'"
    ):
        AndersonWindow(2, 8, device="cpu", backend="native")


def test_what_the_compiler_says_reaches_the_user(compile_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from deq.kernels import native_backend

    monkeypatch.setattr(native_backend, "_FLAGS", ("-fno-such-flag",))
    monkeypatch.setattr(native_backend.shutil, "which", lambda name: "g++" if name == "g++" else None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"cannot be compiled \(g\+\+: .*-fno-such-flag"):
        AndersonWindow(2, 8, device="cpu", backend="native")


def test_a_library_that_was_cut_short_is_compiled_again(compile_anew: None, tmp_path: Path) -> None:
    from deq.kernels import native_backend

    AndersonWindow(2, 8, device="cpu", backend="native")
    (path,) = tmp_path.rglob("native-*.so")
    path.unlink()  # this process has it mapped
    path.write_bytes(b"\x7fELF")
    native_backend.load_library.cache_clear()
    AndersonWindow(2, 8, device="cpu", backend="native")
    assert path.stat().st_size > 10_000


def test_half_precision_on_a_cpu_uses_pytorch() -> None:
    from deq.kernels import native_backend, torch_backend

    assert isinstance(AndersonWindow(2, 8, device="cpu")._backend, native_backend.NativeBackend)
    half = AndersonWindow(2, 8, device="cpu", dtype=torch.bfloat16)
    assert isinstance(half._backend, torch_backend.TorchBackend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_some_samples_is_their_part_of_a_step_of_all(backend: str) -> None:
    X, F = random_sequence(6, 5, 90)
    device = device_of(backend)
    index = torch.tensor([0, 2, 4], device=device)
    whole, part = make(backend, X, 3), make(backend, X, 3)
    for k, (x, fx) in enumerate(zip(X.to(device), F.to(device), strict=True)):
        expected = whole.step(x, fx)
        if k < 3:
            got = part.step(x, fx)
            assert torch.equal(got, expected)
        else:
            got = part.step(x[index], fx[index], index=index)
            assert torch.equal(got, expected[index])
    assert torch.equal(part.residual[index], whole.residual[index])
    assert part.iterations.tolist() == [6, 3, 6, 3, 6]
    others = [1, 3]
    residuals = torch.stack([relative_residual(x, fx) for x, fx in zip(X[:3], F[:3], strict=True)])
    torch.testing.assert_close(part.best(expected)[1][others].cpu().double(), residuals.min(dim=0).values[others])


def test_an_index_that_does_not_fit_is_refused() -> None:
    window = AndersonWindow(4, 8, device="cpu")
    x = torch.zeros(2, 8)
    for index in (torch.tensor([0.0, 1.0]), torch.zeros(0, dtype=torch.int64), torch.tensor([[0, 1]])):
        with pytest.raises(ValueError, match=r"index must be \(n,\) int64"):
            window.step(x, x, index=index)
    with pytest.raises(ValueError, match=r"x must be \(3, 8\)"):
        window.step(x, x, index=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
def test_a_norm_that_float32_cannot_square_is_no_convergence_and_no_failure(backend: str, scale: float) -> None:
    X, F = random_sequence(3, 2, 60, scale=scale)
    window = make(backend, X, 3, tol=1e-3)
    assert torch.isfinite(run(window, X, F)).all()
    assert not window.frozen.any()
    residual = relative_residual(X[-1], F[-1])
    torch.testing.assert_close(window.residual.cpu().double(), residual, rtol=1e-5, atol=0)
    got = residual_norm(X[-1].to(device_of(backend)), F[-1].to(device_of(backend)), backend=name_of(backend))
    torch.testing.assert_close(got.cpu().double(), residual, rtol=1e-5, atol=0)


def test_an_index_out_of_range_is_refused_on_a_cpu() -> None:
    window = AndersonWindow(2, 8, device="cpu")
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="index must name samples 0 to 1, got -1 to 9"):
        window.step(x, x, index=torch.tensor([-1, 9]))


def test_without_a_home_the_native_code_is_kept_in_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    from deq.kernels import native_backend

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert native_backend._cache_folder().is_dir()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_f_of_zero_is_a_large_residual_and_no_failure(backend: str) -> None:
    X, F = random_sequence(3, 2, 20)
    F[:2, 0] = 0
    window = make(backend, X, 3)
    x_next = run(window, X[:2], F[:2])
    assert window.residual[0].item() == torch.finfo(torch.float32).max
    assert not window.frozen.any()
    expected = anderson_update(rows(X[:2], 3), rows(F[:2], 3))
    torch.testing.assert_close(x_next.double(), expected, rtol=1e-4, atol=1e-4)
    assert residual_norm(X[0].to(device_of(backend)), F[0].to(device_of(backend)), backend=name_of(backend))[0] > 1e38


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_never_written_does_not_reach_a_sample_that_joins_later(backend: str) -> None:
    window = make(backend, torch.zeros(1, 2, 3), 4)
    # Both histories, the padding of their rows included: every bit set is NaN.
    everything = torch.empty(0, dtype=torch.uint8, device=device_of(backend))
    everything.set_(window._state.G.untyped_storage()).fill_(255)
    assert window._state.Y.isnan().all()
    x = torch.zeros(2, 3, device=device_of(backend))
    window.step(x[:1], torch.cos(x[:1]), index=torch.tensor([0], device=x.device))
    for _ in range(4):
        x = window.step(x, torch.cos(x))
    assert torch.isfinite(x).all()


def test_adding_up_the_partial_sums_once_gives_the_same_bits() -> None:
    X, F = random_sequence(5, 2, 5000)
    directly, once = make(TWO_LAUNCHES, X, 3), make(TWO_LAUNCHES, X, 3)
    once._backend = TritonBackend(largest_fused=0, reduce_blocks=1)
    assert torch.equal(run(once, X, F), run(directly, X, F))


@pytest.mark.parametrize("dim", [1, 1000, 1025, 4096])
def test_one_launch_and_two_agree(dim: int) -> None:
    X, F = random_sequence(7, 2, dim)
    one, two = make("triton", X, 4, tol=1e-9), make(TWO_LAUNCHES, X, 4, tol=1e-9)
    torch.testing.assert_close(run(one, X, F), run(two, X, F), rtol=1e-5, atol=1e-5)
    assert torch.equal(one.iterations, two.iterations)
    torch.testing.assert_close(one.residual, two.residual, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_that_joins_later_fills_a_ring_of_its_own(backend: str) -> None:
    X, F = random_sequence(9, 2, 70)
    device = device_of(backend)
    window, alone = make(backend, X, 3), make(backend, X[:, 1:], 3)
    first = torch.tensor([0], device=device)
    for k, (x, fx) in enumerate(zip(X.to(device), F.to(device), strict=True)):
        if k < 4:
            window.step(x[:1], fx[:1], index=first)
            continue
        got = window.step(x, fx)
        assert torch.equal(got[1], alone.step(x[1:], fx[1:])[0]), "a hole in the ring"
    assert window.iterations.tolist() == [9, 5]
    assert torch.equal(window.weights[1], alone.weights[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_autograd_saved_may_not_be_written_over_unnoticed(backend: str) -> None:
    X, F = (tensor[0].to(device_of(backend)) for tensor in random_sequence(1, 2, 30))
    window = make(backend, X[None], 2)
    weight = torch.ones(30, device=X.device, requires_grad=True)
    loss = (X * weight).sum()  # saves X
    window.step(X, F, out=X)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_that_is_negated_lazily_counts_as_what_it_shows(backend: str) -> None:
    X, F = (tensor[0].to(device_of(backend)) for tensor in random_sequence(1, 2, 30))
    negated = torch.complex(torch.zeros_like(X), -X).conj().imag.contiguous()
    lazily = torch._neg_view(-X)
    assert lazily.is_neg() and torch.equal(lazily, X) and torch.equal(negated, X)  # noqa: PT018
    windows = make(backend, X[None], 2), make(backend, X[None], 2)
    assert torch.equal(windows[0].step(lazily, F), windows[1].step(X, F))
    assert torch.equal(windows[0].residual, windows[1].residual)
    assert torch.equal(residual_norm(lazily, F), residual_norm(X, F))
    with pytest.raises(ValueError, match="out must be contiguous, got a lazily negated view"):
        windows[0].step(X, F, out=lazily)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_goes_on_by_itself(backend: str, how: Callable[[AndersonWindow], AndersonWindow]) -> None:
    X, F = random_sequence(6, 2, 30)
    original = make(backend, X, 3, beta=0.7, tol=1e-9, regularization="absolute", ridge=1e-5)
    run(original, X[:4], F[:4])
    # What the twin's history is made of may hold anything, between the rows too.
    history._kept = torch.full((original._state.Y.untyped_storage().nbytes(),), 255, dtype=torch.uint8)
    twin = how(original)
    if backend == TWO_LAUNCHES:
        twin._backend = TritonBackend(largest_fused=0)
    del original
    gc.collect()
    # A history that was let go of is taken by the next window of its size.
    run(make(backend, X, 3), F, X)
    fresh = make(backend, X, 3, beta=0.7, tol=1e-9, regularization="absolute", ridge=1e-5)
    assert torch.equal(run(twin, X[4:], F[4:]), run(fresh, X, F))
    assert torch.equal(twin.iterations, fresh.iterations)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_given_up_gives_no_weight(backend: str) -> None:
    X, F = random_sequence(1, 2, 30)
    F[0, 0, 0] = math.nan
    window = make(backend, X, 1)
    assert torch.equal(run(window, X, F)[0], X[0, 0])
    assert window.frozen.tolist() == [True, False]
    assert window.weights.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tol_is_compared_in_the_precision_of_the_residual(backend: str) -> None:
    X, F = random_sequence(1, 2, 30)
    residual = residual_norm(X[0].to(device_of(backend)), F[0].to(device_of(backend)), backend=name_of(backend))
    # A double just below the float32 residual, and nearest to it among float32 numbers.
    tol = float(residual[0]) * (1 - 1e-9)
    window = make(backend, X, 2, tol=tol)
    run(window, X, F)
    assert bool(window.frozen[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_best_may_be_written_over_the_last_iterate(backend: str) -> None:
    X, F = random_sequence(5, 7, 30)
    F[4, 2] = X[4, 2] * (1 + 1e-5)
    window = make(backend, X, 3, tol=1e-4)
    x = run(window, X, F).to(device_of(backend))
    z, residual = window.best(x)
    again, same = window.best(x, out=x)
    assert again is x
    assert torch.equal(z, x)
    assert torch.equal(z[2].cpu(), X[4, 2]), "converged: untouched"
    assert torch.equal(residual, same)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what Triton's interpreter reads and writes")
@pytest.mark.parametrize(("backend", "beyond_2m"), [(TWO_LAUNCHES, 4), ("triton", 3)])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_traffic_is_that_of_the_model(backend: str, beyond_2m: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    batch, dim = 2, 1504  # a multiple of 16: else rows are padded to one
    X, F = random_sequence(m + 2, batch, dim)
    window = make(backend, X, m)
    run(window, X[:-1], F[:-1])
    x, fx, out = X[-1].clone(), F[-1].clone(), torch.empty(batch, dim)
    state = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (x, fx, out, window._state.G, window._state.Y)]
    moved = 0

    def counted(name: str, mask_position: int) -> None:
        access = getattr(interpreter_builder, name)

        def count(ptrs: Any, *rest: Any) -> object:
            nonlocal moved
            inside = [(ptrs.data >= low) & (ptrs.data < high) for low, high in state]
            moved += sum(int((rest[mask_position].data & part).sum()) for part in inside)
            return access(ptrs, *rest)

        monkeypatch.setattr(interpreter_builder, name, count)

    counted("create_masked_load", 0)
    counted("create_masked_store", 1)
    window.step(x, fx, out=out)
    assert moved == (2 * m + beyond_2m) * batch * dim


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("dim", [33, 2500])
@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_rows_in_bfloat16_weigh_mixed_rows_that_are_not_rounded(backend: str, dim: int, beta: float) -> None:
    m, (X, F) = 4, random_sequence(7, 3, dim)
    window = make(backend, X, m, beta=beta, history_dtype=torch.bfloat16)
    got = run(window, X, F)
    order = [k % m for k in range(len(X) - m, len(X))]  # the ring's rows, the oldest first
    G = window._state.G[:, order].cpu()
    assert G.dtype == torch.bfloat16
    g = rows(F - X, m)
    assert ((G.float() - g).abs() <= 2**-7 * g.abs()).all()
    alpha = anderson_weights(G)
    expected = (alpha[:, :, None] * (rows(F, m).double() - (1 - beta) * G.double())).sum(dim=1)
    assert relative_error(got, expected, F) < 1e-5
    residual = G[:, -1].double().norm(dim=1) / F[-1].double().norm(dim=1)
    torch.testing.assert_close(window.residual.cpu().double(), residual, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_residual_rows_in_bfloat16_cost_no_iterations(backend: BackendName) -> None:
    for rho, tol in ((0.9, 1e-6), (0.99, 1e-4)):
        f = affine(rho, lowest=-rho, batch=8, dim=256).to(torch.float32, "cpu")
        full, half = (
            Anderson(window=5, tol=tol, max_iter=300, backend=backend, history_dtype=history).solve(f, f.zero)
            for history in (None, "bfloat16")
        )
        assert half.converged.all()
        assert half.iterations.float().mean() <= 1.05 * full.iterations.float().mean()


def test_half_the_rows_take_half_the_memory() -> None:
    full = AndersonWindow(2, 1024, window=4)._state
    half = AndersonWindow(2, 1024, window=4, history_dtype=torch.bfloat16)._state
    assert (half.G.nbytes, half.Y.nbytes) == (full.G.nbytes / 2, full.Y.nbytes)


@pytest.mark.parametrize(
    ("dtype", "history_dtype"),
    [(torch.float64, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_other_history_dtypes_are_refused(dtype: torch.dtype, history_dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"history_dtype must be torch\.bfloat16 for a torch\.float32 state"):
        AndersonWindow(2, 8, dtype=dtype, history_dtype=history_dtype)


@of_each_branch(
    "m, dim, beta",
    itertools.product([1, 2, 3, 7], [17, 1030, 2100], [1.0, 0.6]),
    # 7 with several programs a sample: rows are dropped, by which one program changes what the others read.
    [(1, 17, 0.6), (2, 17, 0.6), (2, 1030, 1.0), (3, 17, 1.0), (3, 1030, 0.6), (7, 17, 0.6), (7, 1030, 1.0)],
)
def test_an_adaptive_window_is_the_reference(backend: str, m: int, dim: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(m)
    slope = torch.rand(3, dim, generator=generator, dtype=torch.float64) * 1.8 - 0.9
    start, shift = torch.randn(2, 3, dim, generator=generator, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        # An affine map, one with bends, so that rows are dropped, and one that nothing solves, so that all stall.
        return torch.stack(
            [
                slope[0] * x[0] + shift[0],
                slope[1] * x[1] + shift[1] + 2 * torch.sin(x[1]),
                shift[2] + 10 * torch.sin(9 * x[2]),
            ]
        )

    window = make(backend, start[None], m, beta=beta, adaptive=True)
    references = [AdaptiveReference(m, beta) for _ in range(3)]
    x = start.clone()
    for _ in range(30):
        fx = f(x)
        expected = torch.stack([r.step(before, after) for r, before, after in zip(references, x, fx, strict=True)])
        x = run(window, x[None], fx[None])  # each step from the window's own iterate: rounding must not add up
        assert relative_error(x, expected, expected) < 1e-6
        if m > 1:
            relaxation = window._state.carried[:, references[0].steps % 2, Carried.RELAXATION]
            assert relaxation.tolist() == pytest.approx([r.relaxation for r in references], rel=1e-4)
    restarts = [r.restarts for r in references]
    assert window.restarts.tolist() == restarts
    assert m == 1 or (sum(restarts) > 0 and (m < 7 or sum(r.drops for r in references) > 0)), "nothing was tested"
    best, residual = window.best(x.to(device_of(backend)))
    torch.testing.assert_close(
        residual_norm(best, f(best.cpu()).to(best.device)), residual, rtol=1e-6, atol=0, msg="not the iterate it says"
    )
