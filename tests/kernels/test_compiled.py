"""What the Triton kernels compile to for devices that are not here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
ITEMSIZE = {"fp32": (4, 4), "bf16": (2, 2), "fp64": (8, 8), "fp32 with bf16 rows": (4, 2)}
"""Bytes of an element of the state, and of a residual row."""
ADAPTIVE = ", adaptive"

Row = dict[str, Any]


@pytest.fixture(scope="module", params=[*ITEMSIZE, *(dtype + ADAPTIVE for dtype in ("fp32", "bf16", "fp64"))])
def rows(request: pytest.FixtureRequest) -> list[Row]:
    # In a process of its own: here the kernels may be the interpreter's.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kind, adaptive = request.param.removesuffix(ADAPTIVE), request.param.endswith(ADAPTIVE)
    mixed = kind == "fp32 with bf16 rows"
    # An adaptive window of 16 spills up to 32 bytes (benchmarks/README.md): ten is the default.
    windows = ("5", "10") if adaptive else ("5", "16") if mixed else ("2", "5", "10", "16")
    command = [sys.executable, "-m", "benchmarks.compiled", "--json", "--dtype", kind.split()[0]]
    command += ["--windows", *windows, "--targets", *TARGETS]
    command += ["--history-bf16"] * mixed + ["--adaptive"] * adaptive
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: list[Row] = json.loads(run.stdout)
    assert {(row["kernel"], row["window"], row["target"]) for row in found} == set(
        itertools.product(("push", "mix", "update"), map(int, windows), TARGETS)
    )
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
