"""Memory against depth: what ``backward`` needs of K unrolled evaluations of f, and of an equilibrium layer.

    python -m benchmarks.memory

Counted, not timed: the bytes of all tensors that autograd keeps for ``backward``, each storage once, parameters and the
input left out. The cell is the paper's. The layer solves with K evaluations too, without a tolerance; its solver's
history, 2 m B d elements while a solve lasts, is not kept for ``backward`` and stands in a column of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import RESULTS, show_and_save
from deq import DEQ, Implicit, Phantom
from deq.models.classifier import ResidualCell
from deq.solvers import Anderson

DEPTHS = (5, 10, 20, 40)
WINDOW = 5
STEPS = 5


def kept_for_backward(forward: Callable[[], Tensor], apart: list[Tensor]) -> int:
    """Bytes of the storages that autograd keeps while ``forward`` runs, those of the tensors ``apart`` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in apart}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(kept.values())


def unrolled(cell: ResidualCell, x: Tensor, depth: int) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(depth):
        z = cell(z, x)
    return z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="pixels to a side")
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    torch.manual_seed(0)
    cell = ResidualCell(channels=48, inner=64)
    x = torch.randn(options.batch, 48, options.size, options.size)
    apart = [x, *cell.parameters()]
    rows = []
    for depth in DEPTHS:
        solver = Anderson(window=WINDOW, tol=0.0, max_iter=depth, patience=0)
        counts = [
            kept_for_backward(partial(unrolled, cell, x, depth), apart),
            kept_for_backward(partial(DEQ(cell, solver, Phantom(steps=STEPS)), x), apart),
            kept_for_backward(partial(DEQ(cell, solver, Implicit()), x), apart),
            2 * WINDOW * x.numel() * x.itemsize,
        ]
        rows.append([depth, *(f"{count / 2**20:.1f}" for count in counts)])
    show_and_save(
        "memory",
        "python -m benchmarks.memory",
        f"The paper's cell, B = {options.batch}, d = {x[0].numel():,}, float32; MiB that autograd keeps for backward, "
        f"and, last, MiB of the solver's history (window of {WINDOW}) while the solve lasts.",
        ["evaluations", "unrolled", f"Phantom({STEPS})", "Implicit", "history, during the solve"],
        rows,
        options.out,
    )


if __name__ == "__main__":
    main()
