"""What the Triton kernels compile to, with no device: registers, spills, width of global accesses, barriers.

    python -m benchmarks.compiled --windows 2 5 10 16 --targets cuda:80 cuda:90 cuda:100 hip:gfx942

Counts are of instructions in the compiled code of one program (a block of one sample), from the PTX and the
assembler's resource report for CUDA and from the AMD assembly for HIP. Nothing runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deq.kernels import triton_backend
from deq.kernels.launch import Bytes, fused_dim, fused_options, fused_shape, mix_options, split_shape

WINDOWS = (2, 5, 10, 16)
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
KERNELS = ("push", "mix", "update")
"""``push`` and ``mix`` as for d = 49,152, ``update`` as for d = 1,024 and for the largest d that it handles."""


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target."""

    kernel: str
    dim: int
    window: int
    dtype: str
    target: str
    warps: int
    registers: int
    spilled_bytes: int
    elements_per_thread: int
    wide_loads: int
    """Global loads of 16 bytes a thread."""
    narrow_vector_loads: int
    """Global loads of less than 16 bytes a thread under a vector's mask: elements of the state, not scalars."""
    wide_stores: int
    barriers: int
    wide_offsets: int
    """Pointer additions into the state whose offsets are 64-bit."""
    narrow_offsets: int
    """... and those whose offsets are not."""


def compile_kernel(
    kernel: str,
    window: int,
    target: str,
    dtype: torch.dtype = torch.float32,
    dim: int = 1024,
    history_dtype: torch.dtype | None = None,
    adaptive: bool = False,
) -> Compiled:
    """Compiles one of KERNELS for ``cuda:CAPABILITY`` or ``hip:ARCH`` as the launcher would for this dim."""
    rows = _TYPE_NAMES[dtype if history_dtype is None else history_dtype]
    state, accumulator = _TYPE_NAMES[dtype], "fp64" if dtype == torch.float64 else "fp32"
    platform, arch = target.split(":")
    warp_size = 32 if platform == "cuda" else 64
    itemsize = (dtype.itemsize, (dtype if history_dtype is None else history_dtype).itemsize)
    if kernel == "update":
        block, warps = fused_shape(dim, window, warp_size, itemsize=itemsize, adaptive=adaptive)
    else:
        block, _, warps = split_shape(dim, window, warp_size, itemsize=itemsize, adaptive=adaptive)
    constants: dict[str, Any] = {
        "WINDOW": window,
        "ACCUMULATOR": tl.float64 if dtype == torch.float64 else tl.float32,
        "ADAPTIVE": adaptive,
        "INDEXED": False,
        "BLOCK": block,
    }
    function = {"push": triton_backend._push, "mix": triton_backend._mix, "update": triton_backend._update}[kernel]
    if kernel != "mix":
        constants |= {"UNDAMPED": True}
    if kernel == "mix":
        constants |= {"FINISH_BLOCKS": triton_backend._FINISH_BLOCKS}
    if kernel != "push":
        constants |= {
            "ROWS": triton.next_power_of_2(window),
            "SCALED": True,
            "IN_PLACE": True,
            "LARGEST": torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max,
        }
    of_state = {"x_ptr", "f_ptr", "out_ptr", "Y_ptr"}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = {
                "outcome_ptr": "u8",
                "tally_ptr": "i32",
                "iterations_ptr": "i32",
                "pushed_ptr": "i32",
                "index_ptr": "i64",
                "partial_ptr": "fp64",
                "carried_ptr": "fp64",
                "H_ptr": "fp64",
            }.get(name, accumulator)
            signature[name] = "*" + (state if name in of_state else rows if name == "G_ptr" else kind)
        else:
            signature[name] = "fp64" if name in ("beta", "tol", "floor", "ridge") else "i32"
        # What the launcher finds at run time: allocations are aligned, rows of the history padded, and the dim may be
        # a multiple of 16.
        if name.endswith("_ptr") or name == "stride" or (name == "dim" and dim % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    names = [parameter.name for parameter in function.params]
    source = ASTSource(
        function, signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=attributes
    )
    gpu = GPUTarget(platform, int(arch) if platform == "cuda" else arch, warp_size)
    more = {"update": fused_options(warps, itemsize, adaptive), "mix": mix_options(adaptive, itemsize), "push": {}}[
        kernel
    ]
    more = more if platform == "cuda" else {}
    compiled = triton.compile(source, target=gpu, options={"num_warps": warps, **more})

    pointers = rf"tt\.addptr .* : tensor<{block}x!tt\.ptr<\w+>>, tensor<{block}x(i\d+)>"
    offsets = re.findall(pointers, compiled.asm["ttir"])
    common: dict[str, Any] = {
        "kernel": kernel,
        "dim": dim,
        "window": window,
        "dtype": state,
        "target": target,
        "warps": warps,
        "elements_per_thread": block // (warps * warp_size),
        "wide_offsets": offsets.count("i64"),
        "narrow_offsets": len(offsets) - offsets.count("i64"),
    }
    counts = _read_ptx(compiled.asm["ptx"]) if platform == "cuda" else _read_amdgcn(compiled.asm["amdgcn"])
    return Compiled(**common, **counts)


def dims_of(kernel: str, window: int, itemsize: Bytes, adaptive: bool = False) -> list[int]:
    """The states that a kernel is compiled for."""
    largest = fused_dim(window, itemsize, adaptive)
    return sorted({min(1024, largest), largest}) if kernel == "update" else [49_152]


_TYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _read_ptx(ptx: str) -> dict[str, Any]:
    match = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if match is None:
        raise RuntimeError("the compiler returned PTX without a target")
    # The two assemblers that come with Triton: newer architectures have one of their own.
    nvidia = triton.knobs.nvidia
    assembler = nvidia.ptxas_blackwell if match[1].startswith("sm_1") else nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [assembler.path, "-v", f"--gpu-name={match[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    loads = re.findall(r"ld\.global\S*", ptx)
    wide = [load for load in loads if re.search(r"v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]16", load)]
    vector = [load for load in loads if re.search(r"\.v\d", load)]
    stores = re.findall(r"st\.global\S*", ptx)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "wide_loads": len(wide),
        "narrow_vector_loads": len(vector) - len(wide),
        "wide_stores": sum(1 for store in stores if re.search(r"v4\.[bfu]32|v2\.[bfu]64", store)),
        "barriers": len(re.findall(r"bar\.sync", ptx)),
    }


def _read_amdgcn(assembly: str) -> dict[str, Any]:
    def entry(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    loads = re.findall(r"(?:global|buffer)_load_(?:dwordx(\d)|\w+)", assembly)
    stores = re.findall(r"(?:global|buffer)_store_(?:dwordx(\d)|\w+)", assembly)
    return {
        "registers": entry("vgpr_count"),
        # Scratch memory of a lane. Scalar registers that spill into lanes of a vector register touch no memory.
        "spilled_bytes": entry("private_segment_fixed_size"),
        "wide_loads": loads.count("4"),
        "narrow_vector_loads": loads.count("2") + loads.count("3"),
        "wide_stores": stores.count("4"),
        "barriers": len(re.findall(r"s_barrier", assembly)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--dtype", choices=sorted(_TYPE_NAMES.values()), default="fp32")
    parser.add_argument("--history-bf16", action="store_true", help="residual rows in bfloat16")
    parser.add_argument("--adaptive", action="store_true", help="adaptive windows")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    options = parser.parse_args()
    dtype = next(dtype for dtype, name in _TYPE_NAMES.items() if name == options.dtype)
    history_dtype = torch.bfloat16 if options.history_bf16 else dtype
    rows = [
        compile_kernel(kernel, window, target, dtype, dim, history_dtype, options.adaptive)
        for target in options.targets
        for window in options.windows
        for kernel in KERNELS
        for dim in dims_of(kernel, window, (dtype.itemsize, history_dtype.itemsize), options.adaptive)
    ]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"Triton {triton.__version__}, {options.dtype} state, d a multiple of 16; instructions of one program")
    head = (
        "target",
        "window",
        "kernel",
        "d",
        "warps",
        "registers",
        "spilled B",
        "16 B loads",
        "narrower",
        "16 B stores",
    )
    print("  ".join(f"{name:>10}" for name in (*head, "barriers")))
    for row in rows:
        resources = (row.warps, row.registers, row.spilled_bytes)
        accesses = (row.wide_loads, row.narrow_vector_loads, row.wide_stores, row.barriers)
        print(
            "  ".join(f"{cell!s:>10}" for cell in (row.target, row.window, row.kernel, row.dim, *resources, *accesses))
        )


if __name__ == "__main__":
    main()
