"""What one Anderson update costs, above the evaluation of f, against the copy floor and against every peer.

    python -m benchmarks.update --batch 100 --dim 49152 --window 5

An update at window m moves at least 2m + 4 units of B d elements (benchmarks/README.md). The floor is the time in
which this machine copies that many bytes, measured in the same run. The overhead of every solver is measured the same
way: a whole solve of K iterations minus K evaluations of the same f, per iteration; f is an elementwise map, cheap
and never converged. At the paper's size, d = 48 * 32 * 32, one evaluation of the paper's cell is timed too: what an
update must be small against. All are timed in turns, round after round, and ratios are taken within a round: the
median and the range over rounds are printed.

On a CPU what a peer costs depends on its process: one that allocates tensors in every iteration pays for fresh pages
unless something before it has taught the allocator to keep them. ``--peers torchdeq --no-compile`` measures the pair
in a process that holds nothing else, as in a training run; without options all share one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import ON_A_GPU, Solve, installed
from benchmarks.record import RESULTS, default_device, seconds, show_and_save
from deq.kernels import AndersonWindow
from deq.kernels.history import ask_for_large_pages
from deq.models.classifier import ResidualCell
from deq.solvers import Anderson, Forward
from deq.solvers.captured import CapturedSolve, recorder_for

PEERS = {"torchdeq": "TorchDEQ anderson_solver", "aa": "SCS aa (type II)"}
PEER_NAMES = (*PEERS, "jaxopt")
Work = Callable[[], object]


REPEATS = 5
"""Runs of a single short piece of work that are timed together, after one that is not: caches and pages are warm."""


def seconds_repeated(work: Work, device: torch.device) -> float:
    """One of REPEATS runs, warm."""
    work()

    def repeated() -> None:
        for _ in range(REPEATS):
            work()

    return seconds(repeated, device) / REPEATS


def copy_of(elements: int, device: torch.device) -> Work:
    """Copies float32 elements, between pages as large as those of a window's history."""
    source, target = torch.empty(2, elements, device=device)
    if device.type == "cpu":
        ask_for_large_pages(source)
        ask_for_large_pages(target)
    source.normal_()
    return lambda: target.copy_(source)


class Elementwise:
    """f(z) = s z + c with a slope of its own for each element, 0 to 0.99: no window of 16 ever spans it."""

    def __init__(self, batch: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.slope = torch.rand(dim, generator=generator).mul(0.99).to(device, dtype)
        self.shift = torch.randn(batch, dim, generator=generator).to(device, dtype)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.addcmul(self.shift, z, self.slope)


CELL = "the paper's cell, one evaluation"
CELL_DIM = 48 * 32 * 32


def papers_cell(batch: int, device: torch.device) -> Callable[[], Tensor]:
    """One evaluation of the paper's cell (48 channels, 64 inner, 32 x 32) without gradients."""
    torch.manual_seed(0)
    cell = ResidualCell(48, 64).to(device).eval()
    z, injection = torch.randn(2, batch, 48, 32, 32, device=device)

    @torch.no_grad()
    def evaluate() -> Tensor:
        result: Tensor = cell(z, injection)
        return result

    return evaluate


def eager_update(X: Tensor, F: Tensor, ridge: float = 1e-6) -> Tensor:
    """The formula as one would write it in PyTorch, nothing kept between iterations: (B, m, d) twice -> (B, d)."""
    G = F - X
    H = torch.bmm(G, G.transpose(1, 2))
    S = torch.diagonal(H, dim1=1, dim2=2).rsqrt()
    A = S[:, :, None] * H * S[:, None, :] + ridge * torch.eye(H.shape[1], dtype=H.dtype, device=H.device)
    w = S * torch.linalg.solve(A, S)
    return torch.bmm((w / w.sum(dim=1, keepdim=True)).unsqueeze(1), F).squeeze(1)


class IncrementalUpdate:
    """The same formula with a Gram matrix kept between iterations, as two loops for ``torch.compile``.

    Full windows only. x, fx: (B, d); G, Y: (B, m, d); H: (B, m, m).
    """

    def __init__(self, G: Tensor, Y: Tensor, ridge: float = 1e-6) -> None:
        self.G, self.Y, self.H = G, Y, torch.bmm(G, G.mT)
        self.ridge = ridge * torch.eye(G.shape[1], device=G.device)
        self.steps = 0
        self._push, self._mix = torch.compile(self._products), torch.compile(self._combination)

    @staticmethod
    def _products(x: Tensor, fx: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = fx - x
        return g, (G * g[:, None]).sum(dim=2), g.square().sum(dim=1)

    @staticmethod
    def _combination(alpha: Tensor, Y: Tensor) -> Tensor:
        return (alpha[:, :, None] * Y).sum(dim=1)

    def __call__(self, x: Tensor, fx: Tensor) -> Tensor:
        slot = self.steps % self.G.shape[1]
        self.steps += 1
        g, h, norm = self._push(x, fx, self.G)
        self.G[:, slot], self.Y[:, slot] = g, fx
        h[:, slot] = norm
        self.H[:, slot], self.H[:, :, slot] = h, h
        S = torch.diagonal(self.H, dim1=1, dim2=2).rsqrt()
        w = S * torch.linalg.solve(S[:, :, None] * self.H * S[:, None, :] + self.ridge, S)
        return self._mix(w / w.sum(dim=1, keepdim=True), self.Y)


def jaxopt_overhead(f: Elementwise, z0: Tensor, window: int, iterations: int) -> Callable[[], float] | None:
    """jaxopt jitted, one problem a sample by vmap, f in JAX: seconds an iteration above f, measured in JAX."""
    try:
        import jax
        import jax.numpy as jnp
        from jaxopt import AndersonAcceleration
    except ImportError:
        return None
    slope, shift = jnp.asarray(f.slope.numpy()), jnp.asarray(f.shift.numpy())

    def one(start: jax.Array, c: jax.Array) -> jax.Array:
        solver = AndersonAcceleration(
            lambda z: slope * z + c, history_size=window, maxiter=iterations, tol=0.0, implicit_diff=False
        )
        result: jax.Array = solver.run(start).params
        return result

    solve = jax.jit(jax.vmap(one))
    evaluate = jax.jit(lambda z: slope * z + shift)
    start = jnp.asarray(z0.numpy())
    solve(start, shift).block_until_ready()
    evaluate(start).block_until_ready()

    def measure() -> float:
        begin = time.perf_counter()
        solve(start, shift).block_until_ready()
        whole = time.perf_counter() - begin
        begin = time.perf_counter()
        z = start
        for _ in range(iterations):
            z = evaluate(z).block_until_ready()
        return (whole - (time.perf_counter() - begin)) / iterations

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dim", type=int, default=CELL_DIM)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20, help="K, of one solve")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peers", nargs="*", choices=PEER_NAMES, default=PEER_NAMES, help="all unless named: what runs in one process"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="the compiled formula too"
    )
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    device, batch, dim, m = torch.device(options.device), options.batch, options.dim, options.window
    iterations: int = options.iterations
    f = Elementwise(batch, dim, device, torch.float32)
    z0 = torch.zeros_like(f.shift)
    unit = batch * dim * 4
    copy = copy_of((m + 2) * batch * dim, device)

    def repeat_f() -> None:
        z = z0
        for _ in range(iterations):
            z = f(z)

    def overhead(solve: Solve) -> Callable[[], float]:
        def measure() -> float:
            whole = seconds(lambda: solve(f, z0, 0.0, iterations, m), device)
            return (whole - seconds(repeat_f, device)) / iterations

        return measure

    xs = [torch.randn(batch, dim, device=device) for _ in range(3)]
    out = torch.empty_like(z0)

    def step_of(**options: Any) -> Callable[[], float]:
        window = AndersonWindow(batch, dim, window=m, device=device, **options)
        steps = iter(range(10**9))

        def one_step() -> None:
            k = next(steps)
            window.step(xs[k % 3], xs[(k + 1) % 3], out=out)

        for _ in range(m):
            one_step()
        return lambda: seconds_repeated(one_step, device)

    evaluate_cell = papers_cell(batch, device) if dim == CELL_DIM else None
    X, F = torch.randn(batch, m, dim, device=device), torch.randn(batch, m, dim, device=device)
    measures: dict[str, Callable[[], float]] = {
        f"copy floor, {2 * m + 4} units": lambda: seconds_repeated(copy, device),
        "AndersonWindow.step": step_of(),
        "plain Anderson (ours), overhead in a solve": overhead(
            lambda f, z, tol, cap, w: Anderson(window=w, adaptive=False, tol=tol, max_iter=cap).solve(f, z).z
        ),
        "Anderson (ours, adaptive), overhead in a solve": overhead(
            lambda f, z, tol, cap, w: Anderson(window=w, tol=tol, max_iter=cap, patience=0).solve(f, z).z
        ),
        "Forward (ours), overhead in a solve": overhead(
            lambda f, z, tol, cap, w: Forward(tol=tol, max_iter=cap).solve(f, z).z
        ),
        "AndersonWindow.step, residual rows in bf16": step_of(history_dtype=torch.bfloat16),
        "AndersonWindow.step, backend='torch'": step_of(backend="torch"),
        "formula, eager PyTorch, one update": lambda: seconds_repeated(lambda: eager_update(X, F), device),
    }
    if evaluate_cell is not None:
        measures[CELL] = lambda: seconds_repeated(evaluate_cell, device)
    if device.type == "cuda":
        # Above K evaluations of f that are replayed themselves: the same f, launched the same way.
        recorder = recorder_for(device)
        recorder.warm_up(repeat_f)
        replay_f = recorder.record(repeat_f)
        recorded_solver = Anderson(window=m, adaptive=False, tol=0.0, max_iter=iterations)
        for whole in (True, False):
            recorded = CapturedSolve(recorded_solver, f, z0, recorder_for(device), whole=whole)
            if whole and not recorded.whole:
                continue  # this PyTorch has no while nodes
            launch = "the whole solve one graph" if whole else "one graph an iteration"

            def recorded_overhead(recorded: CapturedSolve = recorded) -> float:
                return (seconds(lambda: recorded(z0), device) - seconds(replay_f, device)) / iterations

            measures[f"plain Anderson (ours), {launch}, overhead in a solve"] = recorded_overhead
    if options.compile:
        incremental = IncrementalUpdate(torch.randn_like(F), torch.randn_like(F))
        measures["incremental, torch.compile, one update"] = lambda: seconds_repeated(
            lambda: incremental(xs[0], xs[1]), device
        )
        compiled = torch.compile(eager_update)
        measures["formula, torch.compile, one update"] = lambda: seconds_repeated(lambda: compiled(X, F), device)
    for name, solve in installed(tuple(PEERS[peer] for peer in options.peers if peer in PEERS)).items():
        if device.type == "cpu" or name in ON_A_GPU:
            measures[f"{name}, overhead in a solve"] = overhead(solve)
    with_jaxopt = device.type == "cpu" and "jaxopt" in options.peers
    jaxopt = jaxopt_overhead(f, z0, m, iterations) if with_jaxopt else None
    if jaxopt is not None:
        measures["jaxopt (jit, vmap), overhead in a solve"] = jaxopt

    for measure in measures.values():
        measure()
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(options.rounds):
        for name, measure in measures.items():
            taken[name].append(measure())

    floor, ours = (taken[name] for name in list(measures)[:3:2])

    def over(base: list[float] | None, times: list[float]) -> str:
        """The median over rounds of times / base."""
        return f"{statistics.median(t / b for t, b in zip(times, base, strict=True)):.2f}" if base else "-"

    rows = []
    for name, times in taken.items():
        median = statistics.median(times)
        rows.append(
            [
                name,
                f"{median * 1e3:.3f}",
                f"{min(times) * 1e3:.3f} to {max(times) * 1e3:.3f}",
                f"{(2 * m + 4) * unit / median / 1e9:.1f}",
                over(floor, times),
                over(ours, times),
                over(taken.get(CELL), times),
            ]
        )
    everyone = set(options.peers) == set(PEER_NAMES)
    flags = "" if everyone else f" --peers {' '.join(options.peers)}"
    flags += "" if options.compile else " --no-compile"
    show_and_save(
        f"update-b{batch}-d{dim}-m{m}" + ("" if everyone else "-" + "-".join(options.peers)),
        f"python -m benchmarks.update --batch {batch} --dim {dim} --window {m} --iterations {iterations} "
        f"--rounds {options.rounds}{flags}",
        f"B = {batch}, d = {dim}, m = {m}, float32, K = {iterations}, {options.rounds} rounds, "
        f"{torch.get_num_threads()} threads.",
        [
            "what",
            "ms, median",
            "ms, range",
            f"GB/s at {2 * m + 4} units",
            "over floor",
            "over plain ours in a solve",
            "over the cell",
        ],
        rows,
        options.out,
    )


if __name__ == "__main__":
    main()
