"""How many elements a Triton program handles and with how many warps: measured for a device, or by rule.

Block sizes decide the order in which partial sums are added, and so the last bits. They are therefore not tuned while a
program runs: ``launch_shapes.json`` beside this file, or the file that ``ANDERSON_LAUNCH_SHAPES`` names, is read once,
and ``python -m benchmarks.tune`` writes it. What is found depends on the device, the window and the dtype, and for
states that one program holds on their size; never on the batch.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
import triton

TABLE = Path(__file__).with_name("launch_shapes.json")
OVERRIDE = "ANDERSON_LAUNCH_SHAPES"
"""Environment variable: a file to read instead of TABLE."""


Bytes = tuple[int, int]
"""Of an element of the state, and of a residual row."""

FP32: Bytes = (4, 4)


_LARGEST_FUSED = 4096
_FUSED_THREADS = 512
_ROW_REGISTERS = 60
"""Of a thread's 128, where there are _FUSED_THREADS of them: for the rows of the history that are on their way."""


def fused_dim(window: int, itemsize: Bytes = FP32, adaptive: bool = False) -> int:
    """Elements of a state up to which one program handles a whole sample in one launch, a power of two.

    Such a program has x, f, g, y and all rows of the window in its registers, or on their way there: beyond this, the
    compiler spills (tests/kernels/test_compiled.py). An adaptive window has its residual rows on their way twice.
    """
    fitting = _FUSED_THREADS * _ROW_REGISTERS * 4 // (window * max(itemsize)) // (2 if adaptive else 1)
    return min(_LARGEST_FUSED, 1 << (fitting.bit_length() - 1))


def split_shape(
    dim: int,
    window: int = 1,
    warp_size: int = 32,
    *,
    itemsize: Bytes = FP32,
    device: str = "",
    adaptive: bool = False,
) -> tuple[int, int, int]:
    """(BLOCK elements of a program, blocks of a sample, warps of a program) for a state of ``dim`` elements.

    By rule a thread handles 16 elements for up to 8 rows and 8 beyond, half of that in float64: all rows of a block are
    in flight at once in ``_mix``, and this keeps it clear of 255 registers and of spills, at 16 bytes an access for
    every dtype. 8 also where the residual rows are narrower than the state: with 16, ``_push`` spills on NVIDIA 80; and
    for adaptive windows, whose ``_mix`` has twice as many rows in flight and for which no shapes are measured yet.
    """
    found = None if adaptive else _look_up(device, split_key(window, itemsize))
    if found is not None and dim > fused_dim(window, itemsize):
        block, warps = found
    else:
        block = min(1024, max(16, triton.next_power_of_2(dim)))
        elements = 16 if window <= 8 and itemsize[0] == itemsize[1] and not adaptive else 8
        elements = elements // 2 if itemsize[0] == 8 else elements
        warps = max(1, block // elements // warp_size)
    return block, triton.cdiv(dim, block), warps


def fused_shape(
    dim: int,
    window: int = 1,
    warp_size: int = 32,
    *,
    itemsize: Bytes = FP32,
    device: str = "",
    adaptive: bool = False,
) -> tuple[int, int]:
    """(BLOCK elements of a program, warps of it) for ``_update`` on a state of ``dim`` elements.

    By rule a sample, which has one program only, is spread over as many threads as 16-byte accesses allow, up to
    _FUSED_THREADS. No shapes are measured for adaptive windows yet.
    """
    block = max(16, triton.next_power_of_2(dim))
    found = None if adaptive else _look_up(device, fused_key(block, window, itemsize))
    if found is not None:
        return block, found[1]
    threads = min(_FUSED_THREADS, block * min(itemsize) // 16)
    return block, max(1, threads // warp_size)


def mix_options(adaptive: bool, itemsize: Bytes = FP32) -> dict[str, int]:
    """What else to tell an NVIDIA compiler of ``_mix``: that two histories may be on their way at once. By itself its
    assembler spills a few of the registers so that more programs fit on a multiprocessor; in float64 it does not.
    """
    return {"maxnreg": 255 if _OLD_ASSEMBLER else 168} if adaptive and itemsize[0] < 8 else {}


def fused_options(warps: int, itemsize: Bytes = FP32, adaptive: bool = False) -> dict[str, int]:
    """What else to tell an NVIDIA compiler of ``_update``.

    Its assembler spills some of the registers of a program in order to have more of them on a multiprocessor at once,
    unless it is told that one is enough: for adaptive windows and states that are not float32 on any target, and
    before Triton 3.8 wherever a program has _FUSED_THREADS.
    """
    spills = adaptive or itemsize[0] != 4 or (_OLD_ASSEMBLER and warps * 32 == _FUSED_THREADS)
    return {"maxnreg": min(255, _REGISTERS // (warps * 32))} if spills else {}


_REGISTERS = 65_536
"""Of an NVIDIA multiprocessor."""


_OLD_ASSEMBLER = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)


def split_key(window: int, itemsize: Bytes) -> str:
    """The entry for the two-launch update."""
    return f"split, {triton.next_power_of_2(window)} rows, {_bytes(itemsize)}"


def fused_key(block: int, window: int, itemsize: Bytes) -> str:
    """The entry for the one-launch update of states of up to ``block`` elements, a power of two."""
    return f"fused, {block} elements, {triton.next_power_of_2(window)} rows, {_bytes(itemsize)}"


def _bytes(itemsize: Bytes) -> str:
    return f"{itemsize[0]} bytes" + (f", {itemsize[1]} of a residual row" if itemsize[0] != itemsize[1] else "")


def _look_up(device: str, key: str) -> tuple[int, int] | None:
    shape = _table().get(device, {}).get(key)
    return None if shape is None else (shape[0], shape[1])


@functools.cache
def _table() -> dict[str, dict[str, list[int]]]:
    path = Path(os.environ.get(OVERRIDE) or TABLE)
    try:
        table = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table of launch shapes ({error}): unset {OVERRIDE}") from error
    check_table(table, str(path))
    result: dict[str, dict[str, list[int]]] = table
    return result


def check_table(table: Any, where: str) -> None:
    """Raises ValueError unless table is {device: {key: [BLOCK, warps]}}, both powers of two, BLOCK at least 16."""
    advice = "write it with python -m benchmarks.tune"
    if not isinstance(table, dict) or not all(isinstance(shapes, dict) for shapes in table.values()):
        raise ValueError(f"{where} must hold {{device: {{key: [BLOCK, warps]}}}}: {advice}")
    for device, shapes in table.items():
        for key, shape in shapes.items():
            fits = isinstance(shape, list) and [type(n) for n in shape] == [int, int]
            if not fits or any(n < 1 or n & (n - 1) for n in shape) or shape[0] < 16 or shape[1] > 32:
                raise ValueError(
                    f"{where}: {device!r}, {key!r} must be [BLOCK, warps], powers of two, BLOCK at least 16 and at "
                    f"most 32 warps, got {shape!r}: {advice}"
                )


def device_key(device: torch.device) -> str:
    """The name under which a device's shapes are kept; of a CPU, which has none, the empty string."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32, or 64 on AMD's data center devices."""
    if device.type != "cuda":
        return 32  # the interpreter, to which it makes no difference
    size: int = torch.cuda.get_device_properties(device).warp_size
    return size
