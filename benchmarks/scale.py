"""Does the answer depend on the scale of f? Evaluations to tolerance for right sides from 1e-6 to 1e6.

    python -m benchmarks.scale

An affine contraction, the same in every row but for the factor on its right side, so that in exact arithmetic every
solver that is free of units takes the same number of evaluations in every column. TorchDEQ's ``anderson_solver`` runs
beside ours if it is installed (extra ``bench``), with its own default regularisation and the same window. Evaluations
are counted at f itself, up to the first iterate that meets the tolerance; residuals are recomputed in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import Solve, installed
from benchmarks.problems import Affine, affine
from benchmarks.record import RESULTS, show_and_save
from deq.kernels.naive import relative_residual
from deq.solvers import Anderson, Forward, Solver

FACTORS = (1e-6, 1e-3, 1.0, 1e3, 1e6)


def ours(make: Callable[[float, int, int], Solver]) -> Solve:
    return lambda f, z0, tol, max_iter, window: make(tol, max_iter, window).solve(f, z0).z


SOLVERS: dict[str, Solve] = {
    "forward iteration": ours(lambda tol, cap, m: Forward(tol=tol, max_iter=cap)),
    "Anderson, scaled (ours, default)": ours(lambda tol, cap, m: Anderson(window=m, tol=tol, max_iter=cap)),
    "Anderson, scaled, plain (ours)": ours(
        lambda tol, cap, m: Anderson(window=m, adaptive=False, tol=tol, max_iter=cap)
    ),
    "Anderson, absolute (ours)": ours(
        lambda tol, cap, m: Anderson(window=m, tol=tol, max_iter=cap, regularization="absolute")
    ),
}


def evaluations(solve: Solve, problem: Affine, tol: float, max_iter: int, window: int) -> str:
    """Evaluations of f until every sample has met the tolerance, or '>cap'."""
    exact = Affine(problem.A.double(), problem.b.double())
    met = torch.zeros(problem.b.shape[0], dtype=torch.bool)
    count = needed = 0

    def f(z: Tensor) -> Tensor:
        nonlocal count, needed, met
        count += 1
        if not met.all():
            # Rounding to float32 leaves a relative residual of about 1e-7 in the recomputation.
            met = met | (relative_residual(z, exact(z.double())) <= tol * 1.1 + 1e-7)
            needed = count
        return problem(z)

    solve(f, problem.zero, tol, max_iter, window)
    return str(needed) if met.all() else f">{count}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.9, help="spectral radius")
    parser.add_argument("--tol", type=float, default=1e-6, help="relative residual, every sample")
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--cap", type=int, default=300, help="evaluations at most")
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    solvers = SOLVERS | installed(("TorchDEQ anderson_solver",))
    problem = affine(options.rho, lowest=-options.rho).to(torch.float32)
    rows = [
        [name, *(evaluations(solve, problem.scaled(s), options.tol, options.cap, options.window) for s in FACTORS)]
        for name, solve in solvers.items()
    ]
    show_and_save(
        "scale",
        "python -m benchmarks.scale",
        f"Affine, rho = {options.rho}, B = 4, d = 100, float32, relative residual {options.tol:g} of every sample, "
        f"window {options.window}, at most {options.cap} evaluations; evaluations of f by factor on the right side.",
        ["solver", *(f"x {factor:g}" for factor in FACTORS)],
        rows,
        options.out,
    )


if __name__ == "__main__":
    main()
