"""What it costs to measure energy and operations, as a share of a training step; and how joules of equal runs spread.

    python -m benchmarks.energy [--runs 3]

A run reads its counters twice for every row it logs and every evaluation, and counts the cell's operations once. Both
are timed alone, and held against the steps between two rows (log_every, 50 by default). Where the machine has no
counter, the reading is timed on a stand-in: files laid out like Linux's RAPL, read by the same code; no joules are then
reported. Where it has one, equal short trainings are run, and their joules and the spread of these are in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

from benchmarks.cell import first_batches, load_data
from benchmarks.record import RESULTS, default_device, show_and_save, synchronize
from deq.data import Batches
from deq.layer import Implicit
from deq.measure.energy import EnergyMeter, EnergyOptions, counters_of
from deq.measure.flops import CellFlops
from deq.models import EquilibriumClassifier
from deq.solvers import Anderson
from deq.training.statistics import Sums

LOG_EVERY = 50
"""Steps between two rows, as conf/config.yaml has it."""


def train(options: argparse.Namespace, meter: EnergyMeter, sums: Sums) -> tuple[EquilibriumClassifier, list[float]]:
    """A short training under the meter; returns the model and the seconds of each step."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    data, sizes = load_data(options.data, options.cache)
    batches = Batches(data.to(device), options.batch, seed=0)
    solver = Anderson(tol=1e-2, max_iter=25)
    model = EquilibriumClassifier(
        data.channels, data.size, len(data.classes), solver=solver, gradient=Implicit(solver), **sizes
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    taken: list[float] = []
    with meter.measure("train"):
        for images, labels in first_batches(batches, options.steps):
            synchronize(device)
            start = time.perf_counter()
            logits = model(images)
            loss = functional.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            synchronize(device)
            taken.append(time.perf_counter() - start)
            sums.add(loss, logits, labels, model.deq, solver)
    return model, taken


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """A CPU package's counter as Linux shows it, which stands still."""
    import zeus.device.cpu as cpu
    from zeus.device.cpu import rapl

    with tempfile.TemporaryDirectory() as folder:
        zone = Path(folder) / "intel-rapl" / "intel-rapl:0"
        zone.mkdir(parents=True)
        for name, content in (("name", "package-0"), ("energy_uj", "1000000"), ("max_energy_range_uj", "262143328850")):
            (zone / name).write_text(content)
        still: Any = SimpleNamespace(get_num_wraparounds=lambda: 0)
        with (
            mock.patch.object(rapl, "RAPL_DIR", str(zone.parent)),
            mock.patch.object(cpu, "_cpus", None),
            mock.patch.object(rapl.RAPLFile, "wraparound_tracker", still),
        ):
            rapl.rapl_is_available.cache_clear()
            try:
                yield
            finally:
                rapl.rapl_is_available.cache_clear()


def median_of(work: Any, repeats: int) -> float:
    """Median seconds."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/ in it")
    parser.add_argument("--cache", default="~/.cache/anderson-deq", help="where decoded images are kept")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3, help="equal trainings whose joules are compared")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    device = torch.device(options.device)

    measured = counters_of(device) is not None
    with contextlib.nullcontext() if measured else stand_in():
        meter = EnergyMeter(EnergyOptions(), device, warn=print)
        assert meter.counters

        def read() -> None:
            with meter.measure("train"):
                pass

        read()
        pair = median_of(read, 200)
    off = EnergyMeter(EnergyOptions(measure=False), device, warn=print)
    sums = Sums()
    model, taken = train(options, off, sums)
    step = statistics.median(taken)
    solution = model.deq.last_solution
    assert solution is not None
    cell, state = model.deq.cell, solution.z[:1]
    assert isinstance(cell, nn.Module)
    count = median_of(lambda: CellFlops.of(cell, state), 5)
    flops = CellFlops.of(cell, state)
    proxy = median_of(lambda: flops.train_tflop(sums.values(), model.deq, model.deq.gradient), 50)
    rows: list[list[object]] = [["one training step", f"{step * 1e3:.2f} ms", "", ""]]

    def add(what: str, seconds: float, steps: float, often: str) -> None:
        rows.append([what, f"{seconds * 1e3:.3f} ms", often, f"{seconds / steps / step:.4%}"])

    names = " and ".join(meter.counters).upper() if measured else "a stand-in for RAPL"
    add(f"reading the counters, begin and end ({names})", pair, LOG_EVERY, f"once in {LOG_EVERY} steps")
    add("operations from the account of the solves", proxy, LOG_EVERY, f"once in {LOG_EVERY} steps")
    add("counting the cell's operations", count, options.steps, f"once a run, here of {options.steps} steps")
    total = (pair + proxy) / LOG_EVERY + count / options.steps
    rows.append(["all of it", "", "", f"{total / step:.4%}"])
    if measured:
        joules: dict[str, list[float]] = {name: [] for name in meter.counters}
        for _ in range(options.runs):
            meter = EnergyMeter(EnergyOptions(), device, warn=print)
            train(options, meter, Sums())
            for name, values in joules.items():
                values.append(meter.metrics()[f"energy/{name}_joules"])
        for name, values in joules.items():
            spread = (max(values) - min(values)) / statistics.median(values)
            each = ", ".join(f"{value:.1f}" for value in values)
            rows.append([f"{name.upper()} joules of {options.runs} equal runs", each, f"spread {spread:.1%}", ""])
    data = "digits" if options.data == "digits" else "images"
    show_and_save(
        "energy" if data == "digits" else "energy-images",
        f"python -m benchmarks.energy --data {data} --steps {options.steps} --batch {options.batch}",
        f"{options.steps} steps of {options.batch} images; medians. "
        + ("" if measured else "No energy counter on this machine: nothing here is in joules."),
        ["what", "takes", "how often", "share of a step"],
        rows,
        options.out,
    )


if __name__ == "__main__":
    main()
