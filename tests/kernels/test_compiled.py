"""What the Triton kernels compile to for devices that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from deq.kernels.launch import fused_dim

# One case costs up to 4 s, nearly all of it the compiler's, so that this is not every window on every target (that is
# ``python -m benchmarks.compiled``). What the kernels' shapes (kernels/launch.py) and the compilers tell apart:
# - the largest window has the most rows in registers, and is where spills begin: on NVIDIA 100, which took at most 4
#   registers fewer than 90 in any of 73 shapes, and up to 70 more, and on AMD's 942, which has its own compiler. On 80
#   ``push`` once spilled there: it takes little time and is compiled for it as well;
# - a small window has twice the elements a thread, where states and rows are of one size: on NVIDIA 80 and 90. 5 is
#   that of the measurements (benchmarks/README.md);
# - 2 and 10 lie between those: in float32 on NVIDIA 80 alone.
# ``update`` is compiled for the largest state that it handles, and in float32 for a smaller one.
SMALL, LARGE = ("cuda:80", "cuda:90"), ("cuda:100", "hip:gfx942")
CASES = {
    "fp32": {5: (*SMALL, *LARGE), 16: LARGE, 2: ("cuda:80",), 10: ("cuda:80",)},
    "bf16": {5: SMALL, 16: LARGE},
    "fp64": {5: SMALL, 16: LARGE},
    "fp32 with bf16 rows": {5: SMALL, 16: LARGE},
    # An adaptive window of 16 spills up to 32 bytes (benchmarks/README.md). Ten is the default: on every target.
    "fp32, adaptive": {5: SMALL, 10: (*SMALL, *LARGE)},
    "bf16, adaptive": {5: SMALL, 10: LARGE},
    "fp64, adaptive": {5: SMALL, 10: LARGE},
}
"""Kind -> window -> targets."""
ITEMSIZE = {"fp32": (4, 4), "bf16": (2, 2), "fp64": (8, 8), "fp32 with bf16 rows": (4, 2)}
"""Bytes of an element of the state, and of a residual row."""

COMPILE = """
import json, sys, torch
from dataclasses import asdict
from benchmarks.compiled import compile_kernel
state, rows, adaptive, cases = json.loads(sys.argv[1])
dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
for kernel, window, target, dim in cases:
    row = compile_kernel(kernel, window, target, dtypes[state], dim, dtypes[rows], adaptive)
    print(json.dumps(asdict(row)))
"""

Row = dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def rows(request: pytest.FixtureRequest) -> list[Row]:
    kind, adaptive = request.param.removesuffix(", adaptive"), request.param.endswith(", adaptive")
    state, of_row = kind.split()[0], "bf16" if "bf16 rows" in kind else kind
    cases = []
    for window, targets in CASES[request.param].items():
        largest = fused_dim(window, ITEMSIZE[kind], adaptive)
        updates = {largest, min(1024, largest)} if request.param == "fp32" else {largest}
        shapes = [("push", 49_152), ("mix", 49_152), *(("update", dim) for dim in sorted(updates))]
        cases += [(kernel, window, target, dim) for target in targets for kernel, dim in shapes]
        cases += [("push", window, "cuda:80", 49_152)] * (targets == LARGE)
    # In a process of its own: here the kernels may be the interpreter's.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    described = json.dumps([state, of_row, adaptive, cases])
    command = [sys.executable, "-c", COMPILE, described]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(row["kernel"], row["window"], row["target"], row["dim"]) for row in found] == cases
    return [row | {"bytes": ITEMSIZE[kind], "adaptive": adaptive} for row in found]


def test_no_kernel_spills(rows: list[Row]) -> None:
    assert [row for row in rows if row["spilled_bytes"] != 0] == []


def test_registers_leave_room_for_several_programs(rows: list[Row]) -> None:
    # NVIDIA has 65,536 registers a multiprocessor: at 168 a thread, three programs of 128 threads still fit, and 192
    # leaves room for one of 256, which is what float64 takes. AMD's 942 has 512 a lane: 256 leave room for two waves.
    def bound(row: Row) -> int:
        if row["target"].startswith("hip"):
            return 256
        return 192 if row["dtype"] == "fp64" else 168

    assert [row for row in rows if row["registers"] > bound(row)] == []


def test_every_access_to_the_state_is_16_bytes_wide(rows: list[Row]) -> None:
    for row in rows:
        of_state, of_row = (row["elements_per_thread"] * size // 16 for size in row["bytes"])
        # push reads x, f and the rows of G (its own under a branch), and writes one of G and of Y;
        # mix reads the rows of Y and writes x_next; update does both.
        m = row["window"]
        reads, writes = {
            "push": (2 * of_state + m * of_row, of_state + of_row),
            "mix": (m * of_state, of_state),
            "update": ((m + 2) * of_state + m * of_row, 2 * of_state + of_row),
        }[row["kernel"]]
        if row["adaptive"]:
            # push also reads the row that the new one takes the place of, mix all rows of G, and update both but for
            # the newest row, which its program holds.
            reads += {"push": 1, "mix": m, "update": m + 1}[row["kernel"]] * of_row
        assert of_row >= 1, row
        if row["target"].startswith("hip"):
            # AMD's compiler also joins neighbours among the float64 books of a sample, two at a time.
            assert reads <= row["wide_loads"] <= reads + 2, row
            assert writes <= row["wide_stores"] <= writes + 2, row
            continue
        assert row["wide_loads"] == reads, row
        assert row["wide_stores"] == writes, row
        assert row["narrow_vector_loads"] == 0, row


def test_offsets_into_the_state_are_64_bit(rows: list[Row]) -> None:
    assert [row for row in rows if row["wide_offsets"] == 0] == []
    assert [row for row in rows if row["narrow_offsets"] != 0] == []
