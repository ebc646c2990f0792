"""Finds the launch shapes of the Triton kernels on this device and writes them as a table.

    python -m benchmarks.tune --write            into the package, for every later run on such a device
    ANDERSON_LAUNCH_SHAPES=FILE python ...       with --out: read the written file for one run alone

For every window and dtype, block sizes and warps are tried on the two-launch update at a large state, and warps on the
one-launch update at each size of state that it handles; each candidate is the median of rounds taken in turns. The
rule that holds without a table is among the candidates, and a candidate replaces it only if it is at least 3 % faster.
The batch is chosen so that the device is full: what is found is used for every batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.record import default_device, device_name, folder_of, seconds, show_and_save
from deq.kernels import AndersonWindow, launch

GAIN = 0.97
"""A candidate must take at most this share of the rule's time to replace it: what is less is noise."""

SPLIT_BLOCKS = (512, 1024, 2048, 4096)
ELEMENTS_OF_A_THREAD = (4, 8, 16)
FUSED_DIMS = (256, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def step_time(batch: int, dim: int, window: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one update at the shape that the table now holds."""
    # A window of its own: its scratch memory has the size that its first shape asks for.
    ring = AndersonWindow(batch, dim, window=window, dtype=dtype, device=device, backend="triton")
    x, f = (torch.randn(batch, dim, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    repeats = 20 if device.type == "cuda" else 1

    def work() -> None:
        for _ in range(repeats):
            ring.step(x, f, out=out)

    for _ in range(window):
        ring.step(x, f, out=out)  # compiled, and the window full
    return seconds(work, device) / repeats


def best(
    key: str, rule: tuple[int, int], candidates: list[tuple[int, int]], measure: Callable[[], float], rounds: int
) -> tuple[tuple[int, int], dict[tuple[int, int], float]]:
    """The shape to take, and every candidate's median seconds."""
    device = launch.device_key(default_device())
    shapes = launch._table().setdefault(device, {})
    taken: dict[tuple[int, int], list[float]] = {shape: [] for shape in dict.fromkeys([rule, *candidates])}
    for turn in range(rounds + 1):
        for shape in taken:
            shapes[key] = list(shape)
            time = measure()
            if turn > 0:  # the first compiles
                taken[shape].append(time)
    medians = {shape: statistics.median(times) for shape, times in taken.items()}
    fastest = min(medians, key=medians.__getitem__)
    chosen = fastest if medians[fastest] <= GAIN * medians[rule] else rule
    shapes[key] = list(chosen)
    return chosen, medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8, 16], help="powers of two: rows of a key")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["fp32"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=49_152, help="of the two-launch update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into the package's own table")
    parser.add_argument("--out", type=Path, default=None, help="folder for the table of times and launch_shapes.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted: tries the command, measures nothing")
    options = parser.parse_args()
    device = default_device()
    if device.type != "cuda" and not options.dry_run:
        parser.error("torch finds no CUDA or ROCm device to tune for; --dry-run tries the command on a CPU")
    name, lanes = launch.device_key(device), launch.warp_size(device)
    table = launch._table()
    table[name] = {}
    batch: int = options.batch
    dims: tuple[int, ...] = FUSED_DIMS
    if options.dry_run:
        batch, dims, options.rounds = 2, (256,), 1
        options.windows = options.windows[:1]
        options.dim = launch.fused_dim(options.windows[0]) + 512
    rows: list[list[object]] = []
    for dtype_name in options.dtypes:
        dtype = DTYPES[dtype_name]
        itemsize = (dtype.itemsize, dtype.itemsize)
        for window in options.windows:
            problems = [("split", options.dim, launch.split_key(window, itemsize))]
            problems += [
                ("fused", dim, launch.fused_key(dim, window, itemsize))
                for dim in dims
                if dim <= launch.fused_dim(window, itemsize)
            ]
            for kind, dim, key in problems:
                if kind == "split":
                    block, _, warps = launch.split_shape(dim, window, lanes, itemsize=itemsize)
                    candidates = [
                        (b, b // (lanes * e))
                        for b in SPLIT_BLOCKS
                        for e in ELEMENTS_OF_A_THREAD
                        if 1 <= b // (lanes * e) <= 16
                    ]
                else:
                    block, warps = launch.fused_shape(dim, window, lanes, itemsize=itemsize)
                    candidates = [(block, w) for w in (1, 2, 4, 8, 16) if block // (lanes * w) >= 1]
                if options.dry_run:
                    candidates = candidates[:2]
                measure = partial(step_time, batch, dim, window, dtype, device)
                chosen, medians = best(key, (block, warps), candidates, measure, options.rounds)
                for shape, time in sorted(medians.items(), key=lambda item: item[1]):
                    mark = "chosen" if shape == chosen else "rule" if shape == (block, warps) else ""
                    rows.append([key, f"{shape[0]} / {shape[1]}", f"{time * 1e3:.4f}", mark])
                if chosen == (block, warps):
                    del table[name][key]  # the rule needs no entry
    show_and_save(
        "tune",
        f"python -m benchmarks.tune --windows {' '.join(map(str, options.windows))} --batch {batch}",
        f"{device_name()}, B = {batch}, d = {options.dim} where split, {options.rounds} rounds, median.",
        ["what", "BLOCK / warps", "ms", ""],
        rows,
        options.out,
    )
    launch.check_table(table, "what was found")
    if options.out is not None:
        (folder_of(options.out) / launch.TABLE.name).write_text(json.dumps(table, indent=1) + "\n")
    if options.write:
        launch.TABLE.write_text(json.dumps(table, indent=1) + "\n")
        print(f"written to {launch.TABLE}")


if __name__ == "__main__":
    main()
