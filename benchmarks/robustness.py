"""Evaluations to tolerance on problems that are hard for fixed-point solvers: every solver, every peer, one run.

    python -m benchmarks.robustness --cell CELL.npz [CELL.npz ...]

Problems: affine maps of spectral radius 0.9 and 0.99, one whose eigenvalues lie on both sides of zero, rotations and
an expansion, on which forward iteration cannot converge, a map of spectral radius 1.5 that nothing here solves (what
counts is how soon a solver returns), and for each trained cell (``python -m benchmarks.cell`` makes
one) its equilibrium and its adjoint equation. A sample is solved at the first evaluation at which its relative residual
is at the tolerance; one that never is counts as the cap. Every solver runs once, at the tighter tolerance.

GMRES, on the linear problems, is what no method that combines all iterates can beat: the smallest residual over the
whole Krylov space, or over spaces of 10 with restarts.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import ON_A_GPU, PEERS, installed
from benchmarks.problems import Affine
from benchmarks.record import RESULTS, default_device, show_and_save
from benchmarks.solve import (
    Problem,
    Run,
    Watched,
    affine_problem,
    cell_problems,
    evaluations_needed,
    ours,
    peer,
)
from deq.solvers import Anderson, Broyden, Forward


def of_matrix(name: str, A: Tensor, device: torch.device, batch: int = 32) -> Problem:
    """z = z A + b with random b, (batch, d) float32; A: (d, d) float64."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(batch, len(A), generator=generator, dtype=torch.float64)
    f = Affine(A, b).to(torch.float32, device)
    return Problem(name, f, f.zero, lambda index: Affine(f.A, f.b[index]))


def rotations(dim: int, radius: float, seed: int = 1) -> Tensor:
    """(dim, dim) float64: rotations in planes, by angles spread over (pi / 4, pi), times ``radius``."""
    A = torch.zeros(dim, dim, dtype=torch.float64)
    for plane in range(dim // 2):
        angle = math.pi * (0.25 + 0.75 * (plane + 1) / (dim // 2 + 1))
        cosine, sine = radius * math.cos(angle), radius * math.sin(angle)
        A[2 * plane : 2 * plane + 2, 2 * plane : 2 * plane + 2] = torch.tensor([[cosine, -sine], [sine, cosine]])
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    rotated: Tensor = Q @ A @ Q.T
    return rotated


def with_spectrum(eigenvalues: Tensor, seed: int = 1) -> Tensor:
    """(d, d) float64, symmetric, with these eigenvalues, (d,) float64."""
    dim = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    A: Tensor = (Q * eigenvalues) @ Q.T
    return A


def linear_problems(device: torch.device) -> list[Problem]:
    """Maps z -> z A + b."""
    expanding = torch.cat([torch.linspace(-3, -1.5, 4), torch.linspace(-0.9, 0.9, 252)]).double()
    return [
        affine_problem(0.9, device),
        affine_problem(0.99, device),
        of_matrix("all eigenvalues positive, 0 to 0.99", with_spectrum(torch.linspace(0, 0.99, 256).double()), device),
        of_matrix(
            "all eigenvalues negative, -0.95 to 0", with_spectrum(torch.linspace(-0.95, 0, 256).double()), device
        ),
        of_matrix("two rotations, radius 1", rotations(4, 1.0), device),
        of_matrix("eight rotations, radius 1", rotations(16, 1.0), device),
        of_matrix("two rotations, radius 1.2", rotations(4, 1.2), device),
        of_matrix("four eigenvalues in -3 to -1.5, the rest in -0.9 to 0.9", with_spectrum(expanding), device),
        of_matrix("128 rotations, radius 1.5", rotations(256, 1.5), device),
    ]


def gmres(problem: Problem, tols: Sequence[float], cap: int, restart: int | None) -> Tensor:
    """Evaluations of f until each of ``tols``, (tolerances, B), 0 where the cap came first; f must be affine.

    GMRES (Saad & Schultz 1986) for u = J u + f(0), least squares in float64: the residual after each evaluation is
    known without another one.
    """
    f, z0 = problem.f, problem.z0
    first = torch.zeros(len(tols), len(z0), dtype=torch.int64, device=z0.device)
    limits = torch.tensor(tols, dtype=torch.float64, device=z0.device)[:, None]
    shift = f(torch.zeros_like(z0)).double()
    u, residual = torch.zeros_like(shift), shift
    used = 1
    while used < cap:
        basis = [residual / residual.norm(dim=1, keepdim=True).clamp_min(TINY)]
        images: list[Tensor] = []
        start, right_side = u, residual
        for _ in range(min(restart or cap, cap - used)):
            images.append(basis[-1] - (f(basis[-1].to(z0.dtype)).double() - shift))
            used += 1
            W, V = torch.stack(images, dim=2), torch.stack(basis, dim=2)
            weights = torch.linalg.lstsq(W, right_side[:, :, None]).solution
            u, residual = start + (V @ weights)[:, :, 0], right_side - (W @ weights)[:, :, 0]
            met = residual.norm(dim=1) / (u + residual).norm(dim=1) <= limits  # f(u) = u + residual
            first = torch.where(met & (first == 0), used, first)
            if bool((first > 0).all()):
                return first
            v = images[-1]
            for _ in range(2):  # twice, so that rounding leaves nothing of the others in it
                v = v - (V @ (V.mT @ v[:, :, None]))[:, :, 0]
            basis.append(v / v.norm(dim=1, keepdim=True).clamp_min(TINY))
    return first


TINY = 1e-300


def solvers(device: torch.device) -> dict[str, Run]:
    """Ours and the peers that are installed and take tensors of this device."""
    runs: dict[str, Run] = {
        FORWARD: ours(lambda tol, cap: Forward(tol=tol, max_iter=cap)),
    }
    for m in (5, 10):
        runs[f"Anderson, adaptive, m = {m}"] = ours(
            lambda tol, cap, m=m: Anderson(window=m, adaptive=True, tol=tol, max_iter=cap)  # type: ignore[misc]
        )
    for m in (2, 5, 10):
        runs[f"Anderson, plain, m = {m}"] = ours(
            lambda tol, cap, m=m: Anderson(window=m, adaptive=False, tol=tol, max_iter=cap)  # type: ignore[misc]
        )
    runs["Broyden"] = ours(lambda tol, cap: Broyden(tol=tol, max_iter=cap))
    for name, solve in installed(tuple(PEERS) if device.type == "cpu" else ON_A_GPU).items():
        if "broyden" in name:
            runs[name] = peer(solve, 5)
        else:
            runs |= {f"{name}, m = {m}": peer(solve, m) for m in (5, 10)}
    return runs


def problems(cells: list[Path], device: torch.device) -> list[tuple[Problem, bool, bool]]:
    """(problem, linear, of a trained cell)"""
    found = [(problem, True, False) for problem in linear_problems(device)]
    for path in cells:
        equilibrium, adjoint = cell_problems(path, device)
        found += [(equilibrium, False, True), (adjoint, True, True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cell", type=Path, nargs="*", default=[], help="trained cells, as benchmarks.cell writes them"
    )
    parser.add_argument("--tols", type=float, nargs="+", default=[1e-2, 1e-3], help="for the cells")
    parser.add_argument("--linear-tols", type=float, nargs="+", default=[1e-3, 1e-6], help="for the linear maps")
    parser.add_argument("--cap", type=int, default=100, help="evaluations at most for the cells")
    parser.add_argument("--linear-cap", type=int, default=300, help="evaluations at most for the linear maps")
    parser.add_argument("--only", nargs="+", help="solvers whose names begin so, forward iteration aside")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    device = torch.device(options.device)
    runs = {
        name: run
        for name, run in solvers(device).items()
        if options.only is None or name == FORWARD or name.startswith(tuple(options.only))
    }
    rows: list[list[object]] = []
    short: list[list[object]] = []
    for problem, linear, of_cell in problems(options.cell, device):
        tols, cap = (options.tols, options.cap) if of_cell else (options.linear_tols, options.linear_cap)
        first: dict[str, Tensor] = {}
        calls: dict[str, str] = {}
        for name, run in runs.items():
            watch = Watched(problem, *tols)
            run(watch.f, problem.z0, watch.restrict, min(tols), cap)
            first[name], calls[name] = watch.first, str(watch.calls)
        if linear:
            for name, restart in (("GMRES, all rows", None), ("GMRES(10)", 10)):
                first[name] = gmres(problem, tols, cap, restart)
        for number, tol in enumerate(tols):
            needed = {name: evaluations_needed(seen[number], cap) for name, seen in first.items()}
            rows += [
                [problem.name, f"{tol:g}", name, *numbers, calls.get(name, "-")] for name, numbers in needed.items()
            ]
            short.append([problem.name, f"{tol:g}", *(_best(needed, group) for group in GROUPS.values())])
            print(*short[-1], sep="  ", file=sys.stderr, flush=True)
    command = f"python -m benchmarks.robustness --cell {' '.join(path.name for path in options.cell)}"
    conditions = (
        f"Evaluations of f a sample, B = 32, float32: mean and 90th percentile, those that never came to the tolerance "
        f"counted as the cap ({options.cap}; {options.linear_cap} for the linear maps), and their share;"
        "evaluations of the batch until the solver returned."
    )
    head = ["problem", "tol", "solver", "mean", "90 %", "never", "returned after"]
    show_and_save("robustness", command, conditions, head, rows, options.out)
    conditions = (
        "Mean evaluations (share never there). Of several windows or solvers, the best in each row. " + conditions
    )
    show_and_save("robustness-short", command, conditions, ["problem", "tol", *GROUPS], short, options.out)


FORWARD = "forward iteration"
GROUPS = {
    FORWARD: (FORWARD,),
    "plain Anderson, best of m = 2, 5, 10": ("Anderson, plain",),
    "adaptive Anderson, m = 10": ("Anderson, adaptive, m = 10",),
    "Broyden": ("Broyden",),
    "TorchDEQ": ("TorchDEQ",),
    "jaxopt": ("jaxopt",),
    "SCS aa": ("SCS",),
    "SciPy": ("SciPy",),
    "GMRES, all rows": ("GMRES, all rows",),
}
"""Columns of the short table, and how the names of their solvers begin."""


def _best(needed: dict[str, list[str]], names: tuple[str, ...]) -> str:
    """Of these solvers, the one with the lowest mean."""
    found = [numbers for name, numbers in needed.items() if name.startswith(names)]
    if not found:
        return "-"
    mean, _, never = min(found, key=lambda numbers: float(numbers[0]))
    return mean if never == "0 %" else f"{mean} ({never})"


if __name__ == "__main__":
    main()
