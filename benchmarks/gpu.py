"""Everything worth measuring on a GPU, in one command of a few minutes: tests, updates, solves, training.

    python -m benchmarks.gpu --out results --cell CELL.npz ... --images DIR

Needs neither Hydra nor W&B. Each part runs in a process of its own under a time limit, so that one that fails or hangs
costs no other; what each printed is kept in ``<part>.log`` beside the tables and pictures. ``--dry-run`` runs every
part at a tiny size, on a CPU too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.record import device_name, folder_of
from kernels import launch


def parts(options: argparse.Namespace) -> dict[str, tuple[list[str], int]]:
    """Name -> (arguments of python, seconds allowed)."""
    dry, out = options.dry_run, ["--out", str(options.out)]
    cells = [str(path) for path in options.cell]
    update = ["-m", "benchmarks.update", *out]
    small = ["--iterations", "4", "--rounds", "1", "--no-compile"]
    # Without the options of pyproject.toml, whose plugins may not be installed where a GPU is.
    pytest = ["-m", "pytest", "-q", "-rs", "-o", "addopts=", "-p", "no:cacheprovider", "tests/kernels/test_gpu.py"]
    found: dict[str, tuple[list[str], int]] = {"tests": (pytest, 180)}
    found["tune"] = (["-m", "benchmarks.tune", *out, *(["--dry-run"] if dry else [])], 120)
    if dry:
        found["update"] = ([*update, "--batch", "4", "--dim", "96", *small], 60)
        roofline = ["--batch", "4", "--dim", "96", "--windows", "2", "5", "--iterations", "4", "--rounds", "1"]
        found["roofline"] = (["-m", "benchmarks.roofline", *out, *roofline], 60)
        found["solve"] = (["-m", "benchmarks.solve", "--cap", "5", "--rounds", "1", "--cell", *cells, *out], 60)
        found["train"] = (["-m", "benchmarks.train", "--steps", "2", "--batch", "8", *out], 60)
        return found
    for batch, dim, window in (
        (100, 49_152, 5),
        (128, 1024, 5),
        (100, 49_152, 2),
        (100, 49_152, 10),
        (100, 49_152, 16),
    ):
        sizes = ["--batch", str(batch), "--dim", str(dim), "--window", str(window)]
        compiled = [] if window == 5 else ["--no-compile"]
        found[f"update-b{batch}-d{dim}-m{window}"] = ([*update, *sizes, *compiled, "--rounds", "15"], 60)
    found["roofline"] = (["-m", "benchmarks.roofline", *out], 60)
    found["solve"] = (["-m", "benchmarks.solve", "--rounds", "9", "--cell", *cells, *out], 90)
    found["solve-1e-3"] = (["-m", "benchmarks.solve", "--tol", "1e-3", "--cap", "100", "--cell", *cells, *out], 90)
    images = ["--data", options.images] if options.images else []
    found["train"] = (["-m", "benchmarks.train", "--steps", "300", *images, *out], 180)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, pictures and logs")
    parser.add_argument(
        "--cell", type=Path, nargs="*", default=[], help="trained cells, as benchmarks.cell writes them"
    )
    parser.add_argument("--images", help="a folder with train/ and test/ in it (default: the digits)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too")
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("torch finds no CUDA or ROCm device; --dry-run runs tiny sizes on a CPU")
    logs = folder_of(options.out)
    logs.mkdir(parents=True, exist_ok=True)
    print(f"{device_name()}, torch {torch.__version__}", flush=True)
    failed = []
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # for what asks for the Triton kernels by name
    for name, (arguments, limit) in parts(options).items():
        start = time.perf_counter()
        with (logs / f"{name}.log").open("w") as log:
            try:
                command = [sys.executable, *arguments]
                status: int | str = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=environment
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit} s"
        fine = status == 0
        if fine and name == "tune":
            environment[launch.OVERRIDE] = str((logs / launch.TABLE.name).resolve())  # for all that follows
        print(
            f"{name:<24} {'done' if fine else f'FAILED ({status})':<24} {time.perf_counter() - start:6.1f} s",
            flush=True,
        )
        if not fine:
            failed.append(name)
            print("    " + "\n    ".join((logs / f"{name}.log").read_text().splitlines()[-15:]), flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
