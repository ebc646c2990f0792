"""Native backend (the CPU's, where there is a C++ compiler): the whole iteration in one call, ``native.cpp``.

The file is compiled on first use, in about two seconds, by what ``CXX`` names (a command, with its words), else by
``g++`` or ``clang++``, and kept in the user's cache folder under a name that changes with source, compiler, processor
and content. Where that cannot be done, or the state is half precision, PyTorch's backend does the same work in more
passes, and a warning says so once. ``ANDERSON_NATIVE=0`` turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from . import state as rules
from .state import BackendName, WindowState

MAX_WINDOW = 64
"""Rows that the solve on the stack is built for."""

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Sums may be reordered, which vectorises them; what is not finite must stay so (no -ffinite-math-only).
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)
_SUFFIX = {torch.float32: "float", torch.float64: "double"}


_TENSORS = (
    *("G", "Y", "H", "row_residual", "weights", "residual", "outcome", "iterations"),
    *("tally", "carried"),
)
_RULES = (
    *("PROGRESS", "FAR", "RELAXATION_FAR", "RELAXATION_NEAR", "NEAR", "SMALLEST_RELAXATION", "LARGEST_RELAXATION"),
    *("UNPREDICTED", "DROP_FAR", "DROP_NEAR", "PROMISE", "STALL", "BLOW"),
)
"""Constants of state.py, in the order of native.cpp."""


class _Window(ctypes.Structure):
    """Mirrors ``struct Window`` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "window", "dim", "stride")),
        *((name, ctypes.c_int64) for name in ("scaled", "adaptive", "patience", "row_bytes")),
        *((name, ctypes.c_double) for name in ("beta", "tol", "floor", "ridge")),
        ("rules", ctypes.c_double * len(_RULES)),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    )


class NativeBackend:
    """See :class:`deq.kernels.state.Backend`."""

    name: ClassVar[BackendName] = "native"

    def __init__(self) -> None:
        library, obstacle = load_library()
        if library is None:
            raise RuntimeError(f"the native backend {obstacle}")
        self._library = library
        self._window: _Window | None = None

    def supports(self, window: int) -> bool:
        return 1 <= window <= MAX_WINDOW

    def step(self, state: WindowState, x: Tensor, fx: Tensor, out: Tensor, index: Tensor | None) -> None:
        if self._window is None:
            # The tensors of a state never move, so that their addresses are taken once.
            batch_size, window, dim = state.G.shape
            self._window = _Window(
                *(batch_size, window, dim, state.stride),
                *(int(state.scaled), int(state.adaptive), state.patience, state.G.element_size()),
                *(state.beta, state.tol, state.floor, state.ridge),
                (ctypes.c_double * len(_RULES))(*(getattr(rules, name) for name in _RULES)),
                *(getattr(state, name).data_ptr() for name in _TENSORS),
            )
        function = getattr(self._library, f"anderson_step_{_SUFFIX[x.dtype]}")
        function(
            ctypes.byref(self._window),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(fx.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(None if index is None else index.data_ptr()),
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int32(torch.get_num_threads()),
        )

    def residual_norm(self, x: Tensor, fx: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        residual, size = x.new_empty(x.shape[0]), x.new_empty(x.shape[0], dtype=torch.float64)
        function = getattr(self._library, f"residual_norm_{_SUFFIX[x.dtype]}")
        function(
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int64(x.shape[1]),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(fx.data_ptr()),
            ctypes.c_double(floor),
            ctypes.c_void_p(residual.data_ptr()),
            ctypes.c_void_p(size.data_ptr()),
            ctypes.c_int32(torch.get_num_threads()),
        )
        return residual, size


def obstacle(dtype: torch.dtype) -> str:
    """Why states of this dtype cannot be run here; empty where they can. Compiles the library on the first call."""
    if dtype not in _SUFFIX:
        return f"needs a float32 or float64 state, got {dtype}"
    return load_library()[1]


@functools.cache
def warn_if_broken(dtype: torch.dtype) -> None:
    """Says once that a library which was wanted is not there: what stands in for it is several times slower."""
    obstacle = load_library()[1] if dtype in _SUFFIX and not _turned_off() else ""
    if obstacle:
        warnings.warn(
            f"Anderson updates on this CPU run in PyTorch, several times slower than in C++: the native backend "
            f"{obstacle} (ANDERSON_NATIVE=0 turns it off without a warning)",
            RuntimeWarning,
            stacklevel=2,
        )


def _turned_off() -> bool:
    return os.environ.get("ANDERSON_NATIVE") == "0"


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or None and why there is none."""
    if _turned_off():
        return None, "is turned off by ANDERSON_NATIVE=0"
    found = (os.environ.get("CXX"), shutil.which("g++"), shutil.which("clang++"))
    failures = []
    for command in dict.fromkeys(command for command in found if command):
        try:
            return _compiled_by(shlex.split(command)), ""
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip().splitlines()
            failures.append(f"{command}: {said[0] if said else error}")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            failures.append(f"{command}: {error}")
    return None, f"cannot be compiled ({'; '.join(failures)})" if failures else "needs a C++ compiler: install g++"


def _compiled_by(compiler: list[str]) -> ctypes.CDLL:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    sources = (_SOURCE.read_bytes(), version, " ".join((*compiler[1:], *_FLAGS)).encode(), _processor())
    stem = f"native-{hashlib.sha256(bytes(1).join(sources)).hexdigest()[:16]}"
    folder = _cache_folder()
    for path in folder.glob(f"{stem}-*.so"):
        # A file that was cut short would kill the process when it is first touched.
        if path.name == _named_after_content(stem, path):
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "native.so"
        command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
        subprocess.run(command, capture_output=True, check=True, timeout=120)
        # Another process may be doing the same: either file is right.
        return ctypes.CDLL(str(built.replace(folder / _named_after_content(stem, built))))


def _named_after_content(stem: str, library: Path) -> str:
    return f"{stem}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _processor() -> bytes:
    """What ``-march=native`` depends on: a cache folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()


def _cache_folder() -> Path:
    """A folder for compiled code that only this user can write to."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "anderson-deq" / "native"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a user without a home
        pass
    return Path(tempfile.mkdtemp(prefix="anderson-deq-"))
