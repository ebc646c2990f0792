"""Native backend (the CPU's, where there is a C++ compiler): the whole iteration in one call, ``native.cpp``.

The file is compiled on first use, in about two seconds, and kept in the user's cache folder under a name that changes
with source, compiler and processor. Where that cannot be done, or the state is half precision, PyTorch's backend does
the same work in more passes. ``ANDERSON_NATIVE=0`` turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .state import WindowState

MAX_WINDOW = 64
"""Rows that the solve on the stack is built for."""

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Sums may be reordered, which vectorises them; what is not finite must stay so (no -ffinite-math-only).
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)
_SUFFIX = {torch.float32: "float", torch.float64: "double"}


_TENSORS = ("G", "Y", "H", "row_residual", "weights", "residual", "frozen", "iterations")


class _Window(ctypes.Structure):
    """Mirrors ``struct Window`` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "window", "dim", "scaled", "row_bytes")),
        *((name, ctypes.c_double) for name in ("beta", "tol", "ridge")),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    )


class NativeBackend:
    """See :class:`kernels.state.Backend`."""

    def __init__(self) -> None:
        library = load_library()
        if library is None:
            raise RuntimeError("the native library is not available: ask native_backend.available first")
        self._library = library
        self._window: _Window | None = None

    def supports(self, window: int) -> bool:
        return 1 <= window <= MAX_WINDOW

    def step(self, state: WindowState, x: Tensor, fx: Tensor, out: Tensor, index: Tensor | None) -> None:
        if self._window is None:
            # The tensors of a state never move, so that their addresses are taken once.
            batch_size, window, dim = state.G.shape
            self._window = _Window(
                *(batch_size, window, dim, int(state.scaled), state.G.element_size()),
                *(state.beta, state.tol, state.ridge),
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

    def residual_norm(self, x: Tensor, fx: Tensor) -> Tensor:
        residual = x.new_empty(x.shape[0])
        function = getattr(self._library, f"residual_norm_{_SUFFIX[x.dtype]}")
        function(
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int64(x.shape[1]),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(fx.data_ptr()),
            ctypes.c_void_p(residual.data_ptr()),
            ctypes.c_int32(torch.get_num_threads()),
        )
        return residual


def available(dtype: torch.dtype) -> bool:
    """Whether the native backend can run states of this dtype here. Compiles the library on the first call."""
    return dtype in _SUFFIX and load_library() is not None


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled library, or None where it is turned off, there is no compiler, or compiling fails."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("ANDERSON_NATIVE") == "0" or compiler is None:
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
        key = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor())))
        folder = _cache_folder()
        path = folder / f"native-{key.hexdigest()[:16]}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / path.name
                command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
                subprocess.run(command, capture_output=True, check=True, timeout=120)
                built.replace(path)  # another process may be doing the same: either file is right
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


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
