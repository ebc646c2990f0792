"""A short training run with forward iteration and with Anderson: step time, evaluations, accuracy. No Hydra, no W&B.

    python -m benchmarks.train --steps 300 [--data DIR]

The same model, data, order and seed for every solver; only the solver of both fixed points differs. Seconds are those
of the training steps, the first tenth left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.cell import first_batches, load_data
from benchmarks.record import RESULTS, default_device, show_and_save, synchronize
from deq.data import Batches
from deq.layer import Implicit
from deq.models import EquilibriumClassifier
from deq.solvers import Anderson, Forward, Solver
from deq.solvers.solver import Stop


def measure(solver: Solver, cuda_graph: bool, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    data, sizes = load_data(options.data, options.cache)
    batches = Batches(data.to(device), options.batch, options.seed)
    gradient = Implicit(solver)
    model = EquilibriumClassifier(
        data.channels,
        data.size,
        len(data.classes),
        solver=solver,
        gradient=gradient,
        cuda_graph=cuda_graph,
        **sizes,
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    seconds: list[float] = []
    forward: list[int] = []
    backward: list[int] = []
    met = {"forward": 0, "backward": 0}
    for images, labels in first_batches(batches, options.steps):
        synchronize(device)
        start = time.perf_counter()
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        solution, adjoint = model.deq.last_solution, model.deq.last_adjoint
        assert solution is not None
        assert adjoint is not None
        forward.append(solution.evaluations)
        backward.append(adjoint.evaluations)
        met["forward"] += int(solution.residual.mean() <= solver.tol)
        met["backward"] += int(adjoint.residual.mean() <= solver.tol)
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in batches.test():
            correct += int((model(images).argmax(dim=1) == labels).sum())
    timed = seconds[len(seconds) // 10 :]
    return [
        f"{statistics.median(timed) * 1e3:.1f}",
        f"{min(timed) * 1e3:.1f} to {max(timed) * 1e3:.1f}",
        f"{statistics.mean(forward):.1f}",
        f"{statistics.mean(backward):.1f}",
        f"{met['forward'] / len(seconds):.0%}",
        f"{met['backward'] / len(seconds):.0%}",
        f"{correct / len(data.test):.2%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/ in it")
    parser.add_argument("--cache", default="~/.cache/anderson-deq", help="where decoded images are kept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--cap", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    stop: Stop = "mean"
    solvers: dict[str, Solver] = {
        "forward iteration": Forward(tol=options.tol, max_iter=options.cap, stop=stop),
        "Anderson m = 5": Anderson(window=5, tol=options.tol, max_iter=options.cap, stop=stop),
        "Anderson m = 5, absolute": Anderson(
            window=5, tol=options.tol, max_iter=options.cap, stop=stop, regularization="absolute"
        ),
    }
    rows = [[name, *measure(solver, False, options)] for name, solver in solvers.items()]
    if torch.device(options.device).type == "cuda":
        for name in ("forward iteration", "Anderson m = 5"):
            rows.append([f"{name}, CUDA graphs", *measure(solvers[name], True, options)])
    data = "digits" if options.data == "digits" else "images"
    show_and_save(
        f"train-{data}",
        f"python -m benchmarks.train --data {data} --steps {options.steps} --batch {options.batch}",
        f"{options.steps} steps of {options.batch} images, tol {options.tol:g} of the batch mean, cap {options.cap}, "
        f"Adam at {options.lr:g}, float32; f fwd and f bwd: evaluations a solve.",
        ["solver", "ms a step", "range", "f fwd", "f bwd", "fwd met tol", "bwd met tol", "test accuracy"],
        rows,
        options.out,
    )


if __name__ == "__main__":
    main()
