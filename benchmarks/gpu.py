"""Everything worth measuring on a GPU, in one command of a few minutes: tests, updates, solves, training.

    python -m benchmarks.gpu --out results --cell CELL.npz ... --images DIR

Needs neither Hydra nor W&B, but for the paper's comparison (experiment=paper, ``--paper-epochs`` of it, and its
report), which is left out where Hydra or the images are missing, as the part about energy is without zeus. Each part
runs in a process of its own under a time limit, so that one that fails or hangs costs no other; what each printed is
kept in ``<part>.log`` beside the tables and pictures. ``--dry-run`` runs every part at a tiny size, on a CPU too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.record import device_name, folder_of
from deq.kernels import launch


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
        if importlib.util.find_spec("zeus") is not None:
            found["energy"] = (["-m", "benchmarks.energy", "--steps", "2", "--batch", "8", "--runs", "2", *out], 60)
        return found | paper(options)
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
    if importlib.util.find_spec("zeus") is not None:
        found["energy"] = (["-m", "benchmarks.energy", "--steps", "300", "--batch", "100", *images, *out], 120)
    return found | paper(options)


def paper(options: argparse.Namespace) -> dict[str, tuple[list[str], int]]:
    """The paper's comparison through train.py and its report; nothing where Hydra or the images are not there."""
    if importlib.util.find_spec("hydra") is None or not (options.images or options.dry_run):
        return {}
    sweep = options.out / "paper"
    chosen = ["experiment=paper", f"hydra.sweep.dir={sweep}", "logger=none"]
    if options.images:
        chosen += ["data=image_folder", f"data.root={options.images}", f"data.cache_dir={options.out / 'cache'}"]
    if options.dry_run:
        tiny = ["max_steps=1", "data.train_size=20", "data.test_size=10", "batch_size=10", "probe=null"]
        chosen += ["data=digits", *tiny, "crossover.max_iter=3", "crossover.repeats=1", "max_iter=3"]
    chosen += [f"seed={options.paper_seeds}", f"epochs={options.paper_epochs}"]
    return {
        "paper": (["train.py", *chosen], 570),
        "report": (["-m", "deq.report", str(sweep), "--out", str(folder_of(options.out) / "paper")], 60),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, pictures and logs")
    parser.add_argument(
        "--cell", type=Path, nargs="*", default=[], help="trained cells, as benchmarks.cell writes them"
    )
    parser.add_argument("--images", help="a folder with train/ and test/ in it (default: the digits)")
    parser.add_argument("--paper-epochs", type=int, default=5, help="epochs of experiment=paper (the paper's: 50)")
    parser.add_argument("--paper-seeds", default="0", help="its seeds: 0,1,2")
    parser.add_argument("--only", nargs="*", help="parts to run, of those that are listed as they run")
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
        if options.only and name not in options.only:
            continue
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
