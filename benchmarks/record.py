"""What every benchmark says about itself: machine, versions, one table, one JSON."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deq.records.machine import code_version, cores, processor_name

RESULTS = Path(__file__).parent / "results"


def benchmarked_code() -> str:
    """The commit that was measured, marked ``-dirty`` where files differ from it, results apart: one run writes into
    them while the next measures the same code.
    """
    version = code_version()
    if version is None or not version.endswith("-dirty"):
        return version or "unknown"
    root = Path(__file__).parent.parent
    others = ["--", ".", f":(exclude){RESULTS.relative_to(root).as_posix()}"]
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", *others],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return version if changed.returncode != 0 or changed.stdout else version.removesuffix("-dirty")


def machine() -> dict[str, str]:
    """The machine and the versions that a measurement belongs to."""
    facts = {"machine": device_name(), "code": benchmarked_code(), "python": platform.python_version()}
    for package in ("torch", "triton", "torchdeq", "jaxopt", "jax", "anderson-acceleration", "scipy"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def folder_of(out: Path) -> Path:
    """Where this machine's results go."""
    return out / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def device_name() -> str:
    """The GPU if there is one, else the CPU with the cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {cores()} cores"


def default_device() -> torch.device:
    """The CUDA (or ROCm) device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """One timed run, everything that it asked of the device included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def show_and_save(
    name: str, command: str, conditions: str, head: Sequence[str], rows: Sequence[Sequence[object]], out: Path | None
) -> None:
    """Prints machine, conditions and table; writes them to ``out``/<machine>/<name>.{md,json} unless out is None."""
    facts = machine()
    text = table(head, rows)
    about = ", ".join(f"{key} {value}" if key != "machine" else value for key, value in facts.items())
    print(f"{about}\n{conditions}\n\n{text}")
    if out is None:
        return
    folder = folder_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"name": name, "command": command, "conditions": conditions, **facts}
    record["rows"] = [dict(zip(head, row, strict=True)) for row in rows]
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(f"    {command}\n\n{about}. {conditions}\n\n{text}\n")
    print(f"\nwritten to {folder / name}.md and .json")
