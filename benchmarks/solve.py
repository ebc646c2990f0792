"""Time, evaluations and sample evaluations to tolerance: forward iteration, ours, and every peer.

    python -m benchmarks.solve --cell CELL.npz [CELL.npz ...]

Problems: affine maps of spectral radius 0.9 and 0.99, and for each trained cell (``python -m benchmarks.cell`` makes
one) its equilibrium from z = 0 and the adjoint equation at the point that 100 forward iterations give. Every solver
is run twice. Once watched: at every call of f the relative residual of every sample is looked at, and a sample counts
as solved at the first call at which it is at tol. Then timed, unwatched, the median of rounds taken in turns.
Unconverged samples are counted at the cap. *Sample evaluations* are evaluations of f summed over the samples handed
to it, until the solver returned: what the solver cost, not only what it needed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import altair as alt
import torch
from torch import Tensor

from benchmarks.cell import load_cell
from benchmarks.peers import ON_A_GPU, PEERS, FixedPointMap, Solve, installed
from benchmarks.problems import Affine, affine
from benchmarks.record import RESULTS, default_device, device_name, folder_of, seconds, show_and_save, synchronize
from deq.kernels import residual_norm
from deq.report.figures import style
from deq.solvers import Anderson, Forward, Solver
from deq.solvers.captured import CapturedSolve, recorder_for
from deq.solvers.map import Restrict


@dataclass(frozen=True)
class Problem:
    """z = f(z) for z (B, d) float32, from z0; ``restrict`` gives f for some samples alone."""

    name: str
    f: FixedPointMap
    z0: Tensor
    restrict: Restrict
    records: bool = True
    """Whether f can be recorded as a CUDA graph here: an adjoint was recorded by autograd, on another stream."""


def affine_problem(rho: float, device: torch.device) -> Problem:
    f = affine(rho, lowest=-rho, batch=32, dim=256).to(torch.float32, device)
    return Problem(f"affine, rho {rho}", f, f.zero, lambda index: Affine(f.A, f.b[index]))


def cell_problems(path: Path, device: torch.device) -> list[Problem]:
    """The equilibrium and the adjoint equation of a trained cell."""
    cell, injection = load_cell(path, device)
    batch = injection.shape[0]

    def flat(index: Tensor) -> FixedPointMap:
        x = injection[index]
        return lambda z: cell(z.view(x.shape), x).flatten(1)

    everyone = torch.arange(batch, device=device)
    equilibrium = Problem(
        f"{path.stem} equilibrium", flat(everyone), torch.zeros(batch, injection[0].numel(), device=device), flat
    )
    with torch.no_grad():
        z = torch.zeros_like(injection)
        for _ in range(100):
            z = cell(z, injection)
    torch.manual_seed(1)
    right_side = 1e-4 * torch.randn(z.shape).to(device)  # drawn on the CPU: the same on every device

    def adjoint(index: Tensor) -> FixedPointMap:
        with torch.enable_grad():
            z_part = z[index].requires_grad_()
            f_part = cell(z_part, injection[index])

        def product(u: Tensor) -> Tensor:
            (Ju,) = torch.autograd.grad(f_part, z_part, u.view(f_part.shape), retain_graph=True)
            return (Ju + right_side[index]).flatten(1)

        return product

    return [
        equilibrium,
        Problem(f"{path.stem} adjoint", adjoint(everyone), torch.zeros_like(equilibrium.z0), adjoint, False),
    ]


class Watched:
    """f with eyes: which call first met each tolerance, for every sample, and how many samples were evaluated."""

    def __init__(self, problem: Problem, *tols: float) -> None:
        self.problem, self.tols = problem, torch.tensor(tols, device=problem.z0.device)
        self.first = torch.zeros(len(tols), problem.z0.shape[0], dtype=torch.int64, device=problem.z0.device)
        """(tolerances, B), 0 for never."""
        self.calls = self.sample_evaluations = 0

    def on(self, f: FixedPointMap, index: Tensor) -> FixedPointMap:
        def watched(z: Tensor) -> Tensor:
            fz = f(z)
            self.calls += 1
            self.sample_evaluations += z.shape[0]
            met = residual_norm(z, fz) <= self.tols[:, None]
            first = self.first[:, index]
            self.first[:, index] = torch.where(met & (first == 0), self.calls, first)
            return fz

        return watched

    @property
    def f(self) -> FixedPointMap:
        return self.on(self.problem.f, torch.arange(self.first.shape[1], device=self.first.device))

    def restrict(self, index: Tensor) -> FixedPointMap:
        return self.on(self.problem.restrict(index), index)


def evaluations_needed(first: Tensor, cap: int) -> list[str]:
    """Their mean and 90th percentile, and the share of samples that never got there. first: (B,), 0 for never."""
    needed = torch.where(first == 0, cap, first).float()
    never = 100 * (first == 0).float().mean().item()
    return [f"{needed.mean():.1f}", f"{needed.quantile(0.9):.0f}", f"{never:.0f} %"]


Run = Callable[[FixedPointMap, Tensor, Restrict, float, int], object]


def ours(make: Callable[[float, int], Solver]) -> Run:
    return lambda f, z0, restrict, tol, cap: make(tol, cap).solve(f, z0, restrict=restrict)


def peer(solve: Solve, window: int) -> Run:
    return lambda f, z0, restrict, tol, cap: solve(f, z0, tol, cap, window)


def solvers(device: torch.device) -> dict[str, Run]:
    """Ours and the peers that are installed and take tensors of this device."""
    runs: dict[str, Run] = {
        "forward iteration": ours(lambda tol, cap: Forward(tol=tol, max_iter=cap)),
        "forward iteration, compact": ours(lambda tol, cap: Forward(tol=tol, max_iter=cap, compact=True)),
        "plain Anderson m = 5": ours(lambda tol, cap: Anderson(window=5, adaptive=False, tol=tol, max_iter=cap)),
        "plain Anderson m = 10": ours(lambda tol, cap: Anderson(window=10, adaptive=False, tol=tol, max_iter=cap)),
        "Anderson m = 5": ours(lambda tol, cap: Anderson(window=5, tol=tol, max_iter=cap)),
        "Anderson m = 10": ours(lambda tol, cap: Anderson(window=10, tol=tol, max_iter=cap)),
        "Anderson m = 10, compact": ours(lambda tol, cap: Anderson(window=10, tol=tol, max_iter=cap, compact=True)),
    }
    for name, solve in installed(tuple(PEERS) if device.type == "cpu" else ON_A_GPU).items():
        window = 10 if name.startswith("TorchDEQ and") else 5
        runs[name if "broyden" in name else f"{name}, m = {window}"] = peer(solve, window)
    return runs


RECORDED = ", CUDA graphs"
MINE = ("Anderson", "plain Anderson", "forward")


def recorded_solvers(problem: Problem, tol: float, cap: int) -> dict[str, Run]:
    """Replays of solves on this problem, recorded here; none without a CUDA device."""
    device = problem.z0.device
    if device.type != "cuda" or not problem.records:
        return {}
    found: dict[str, Run] = {}
    for name, solver in {
        "forward iteration": Forward(tol=tol, max_iter=cap),
        "Anderson m = 5": Anderson(window=5, tol=tol, max_iter=cap),
        "Anderson m = 10": Anderson(window=10, tol=tol, max_iter=cap),
    }.items():
        recorded = CapturedSolve(solver, problem.f, problem.z0, recorder_for(device))
        found[name + RECORDED] = lambda f, z0, restrict, tol, cap, recorded=recorded: recorded(z0)  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cell", type=Path, nargs="*", default=[], help="trained cells, as benchmarks.cell writes them"
    )
    parser.add_argument("--tol", type=float, default=1e-2, help="relative residual, every sample")
    parser.add_argument("--cap", type=int, default=50, help="evaluations at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    device = torch.device(options.device)
    problems = [affine_problem(rho, device) for rho in (0.9, 0.99)]
    problems += [problem for path in options.cell for problem in cell_problems(path, device)]
    rows: list[list[object]] = []
    traces: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for problem in problems:
        runs = solvers(device)
        watched = {name: Watched(problem, options.tol) for name in runs}
        for name, run in runs.items():
            watch = watched[name]
            run(watch.f, problem.z0, watch.restrict, options.tol, options.cap)
        timed = runs | recorded_solvers(problem, options.tol, options.cap)
        times: dict[str, list[float]] = {name: [] for name in timed}
        arguments = (problem.f, problem.z0, problem.restrict, options.tol, options.cap)
        for _ in range(options.rounds):
            for name, run in timed.items():
                times[name].append(seconds(partial(run, *arguments), device))
        baseline = watched["forward iteration"]
        for name in timed:
            # Recorded or not, the iterates are the same to the bit.
            watch = watched[name.removesuffix(RECORDED)]
            ratios = [a / b for a, b in zip(times["forward iteration"], times[name], strict=True)]
            # A time is a speed only where as many samples were solved.
            solved = int((watch.first > 0).sum()) >= int((baseline.first > 0).sum())
            rows.append(
                [
                    problem.name,
                    name,
                    *evaluations_needed(watch.first[0], options.cap),
                    watch.sample_evaluations,
                    f"{watch.sample_evaluations / baseline.sample_evaluations:.2f}",
                    f"{statistics.median(times[name]) * 1e3:.0f}",
                    f"{min(times[name]) * 1e3:.0f} to {max(times[name]) * 1e3:.0f}",
                    f"{statistics.median(ratios):.2f}" if solved else "-",
                ]
            )
        traces[problem.name] = residual_against_seconds(problem, options.cap)
    stem = f"solve-tol{options.tol:g}"
    show_and_save(
        stem,
        f"python -m benchmarks.solve --cell {' '.join(path.name for path in options.cell)} --tol {options.tol:g}",
        f"Relative residual {options.tol:g} of every sample, at most {options.cap} evaluations, B = 32, float32, "
        f"{options.rounds} rounds, {torch.get_num_threads()} threads.",
        ["problem", "solver", "mean", "90 %", "never", "sample evaluations", "of forward", "ms", "range", "speedup"],
        rows,
        options.out,
    )
    if options.out is not None:
        draw(traces, options.tol, folder_of(options.out) / f"{stem}.png")


def residual_against_seconds(problem: Problem, cap: int) -> dict[str, list[tuple[float, float]]]:
    """The batch's mean relative residual against the seconds since the solve began, watching left out of the time."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, run in solvers(problem.z0.device).items():
        if "compact" in name:
            continue
        curve: list[tuple[float, float]] = []
        watching = 0.0
        start = time.perf_counter()

        def f(z: Tensor, curve: list[tuple[float, float]] = curve) -> Tensor:
            nonlocal watching
            fz = problem.f(z)
            synchronize(z.device)
            now = time.perf_counter()
            curve.append((now - start - watching, float(residual_norm(z, fz).mean())))  # noqa: B023
            watching += time.perf_counter() - now
            return fz

        run(f, problem.z0, problem.restrict, 0.0, cap)
        curves[name] = curve
    return curves


def draw(traces: dict[str, dict[str, list[tuple[float, float]]]], tol: float, path: Path) -> None:
    """One panel a problem: residual against seconds."""
    names = list(next(iter(traces.values())))
    looks = {name: _look(name, number) for number, name in enumerate(names)}
    entries = [*looks.values(), style.rule_look(f"tol {tol:g}")]
    panels = []
    for title, found in traces.items():
        # As far as this project's take, and a bit: a peer may take ten times that.
        right = 1.6 * max(curve[-1][0] for name, curve in found.items() if name.startswith(MINE))
        rows = style.drawable(
            (
                {"name": name, "entry": looks[name].entry, "x": seconds, "y": residual}
                for name, curve in sorted(found.items(), key=lambda item: item[0].startswith(MINE))
                for seconds, residual in curve
                if seconds <= right
            ),
        )
        residuals = [row["y"] for row in rows]
        y = style.logarithmic(alt.Y, "mean relative residual", min([*residuals, tol]), max([*residuals, tol]))
        layers = style.curves(rows, entries, style.linear(alt.X, "seconds", domain=[0, right], nice=False), y)
        panels.append(style.panel([*style.rules([(tol, entries[-1])], entries), *layers], title))
    caption = f"Of single solves on {device_name()}, watching left out of the time. Thick: this project's solvers."
    style.Figure(path.stem, "Mean relative residual against seconds", caption, panels, entries).save(path)
    print(f"drawn to {path}")


def _look(name: str, number: int) -> style.Look:
    """This project's solvers thick, of the peers' thin lines those beyond the palette dotted."""
    if name == "forward iteration":
        return style.baseline_look(name)
    colour, again = style.PALETTE[(number - 1) % len(style.PALETTE)], number > len(style.PALETTE)
    return style.Look(name, colour, (2, 3) if again else (1, 0), 2.6 if name.startswith(MINE) else 1.2)


if __name__ == "__main__":
    main()
