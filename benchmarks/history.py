"""What a history in bfloat16 costs in evaluations, in three forms, against float32.

    python -m benchmarks.history --cell CELL.npz [CELL.npz ...]

The update is written out here in plain PyTorch (float32 state, weights by ``deq.kernels.naive`` in float64), so that
forms the library does not have can be tried beside the one that it has:

- ``residual rows``: g_i rounded, y_i not. ``AndersonWindow(history_dtype=torch.bfloat16)``.
- ``both rows``: g_i and y_i rounded.
- ``differences``: g_i and y_i - y_(i-1) rounded; only the newest y_i is kept in float32.

Traffic is in units of B d elements of float32. Evaluations: mean over samples, unconverged ones counted at the cap,
and the share never converged.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import RESULTS, default_device, show_and_save
from benchmarks.solve import Problem, affine_problem, cell_problems
from deq.kernels.naive import anderson_weights

FORMS: dict[str, Callable[[int], float]] = {
    "float32": lambda m: 2 * m + 4.0,
    "residual rows": lambda m: 1.5 * m + 4.0,
    "both rows": lambda m: m + 3.5,
    "differences": lambda m: m + 6.0,
}
"""Name -> units that an update at window m moves."""


def rounded(t: Tensor) -> Tensor:
    """The nearest bfloat16, in the dtype of t."""
    return t.to(torch.bfloat16).to(t.dtype)


@torch.no_grad()
def residuals(problem: Problem, form: str, m: int, cap: int, tol: float) -> Tensor:
    """(K, B) relative residual of every evaluation, until every sample was once at tol."""
    x = problem.z0.clone()
    batch, dim = x.shape
    G, Y = x.new_zeros(2, batch, m, dim)
    y_before = torch.zeros_like(x)
    seen: list[Tensor] = []
    met = torch.zeros(batch, dtype=torch.bool, device=x.device)
    for k in range(cap):
        y = problem.f(x)
        g = y - x
        seen.append(g.norm(dim=1) / y.norm(dim=1))
        met |= seen[-1] <= tol
        if met.all():
            break
        slot, filled = k % m, min(k + 1, m)
        G[:, slot] = g if form == "float32" else rounded(g)
        Y[:, slot] = {"both rows": rounded(y), "differences": rounded(y - y_before)}.get(form, y)
        y_before = y
        alpha = anderson_weights(G[:, :filled]).to(x.dtype)
        if form != "differences":
            x = torch.bmm(alpha[:, None], Y[:, :filled]).squeeze(1)
            continue
        # y_(k-j) is y less the j newest differences.
        x, older = y.clone(), torch.ones_like(alpha[:, 0])
        for j in range(filled - 1):
            older = older - alpha[:, (k - j) % m]
            x -= older[:, None] * Y[:, (k - j) % m]
    return torch.stack(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cell", type=Path, nargs="*", default=[], help="trained cells, as benchmarks.cell writes them"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--tols", type=float, nargs="+", default=[1e-2, 1e-3], help="and 1e-6 on the affine maps")
    parser.add_argument("--cap", type=int, default=100, help="of the cells; 300 on the affine maps")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    device = torch.device(options.device)
    problems = [(affine_problem(rho, device), [*options.tols, 1e-6], 3 * options.cap) for rho in (0.9, 0.99)]
    problems += [
        (problem, options.tols, options.cap) for path in options.cell for problem in cell_problems(path, device)
    ]
    columns = [*options.tols, 1e-6]
    rows: list[list[object]] = []
    for problem, tols, cap in problems:
        for m in options.windows:
            for form, units in FORMS.items():
                seen = residuals(problem, form, m, cap, min(tols))
                cells = []
                for tol in tols:
                    met = seen <= tol
                    first = torch.where(met.any(dim=0), met.float().argmax(dim=0) + 1, cap).float()
                    never = (~met.any(dim=0)).float().mean()
                    cells.append(f"{first.mean():.1f}" + (f" ({never:.0%} never)" if never > 0 else ""))
                cells += ["-"] * (len(columns) - len(cells))
                rows.append([problem.name, m, form, f"{units(m):.1f}", *cells])
                print(*rows[-1], flush=True)
    show_and_save(
        "history",
        f"python -m benchmarks.history --cell {' '.join(path.name for path in options.cell)}",
        f"Evaluations to tolerance, B = 32, float32 state, cap {options.cap} ({3 * options.cap} on affine maps).",
        ["problem", "m", "bfloat16", "units", *(f"tol {tol:g}" for tol in columns)],
        rows,
        options.out,
    )


if __name__ == "__main__":
    main()
