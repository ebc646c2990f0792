"""What a training step may leave behind: tensors, hooks and handles, memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from pathlib import Path

from torch import Tensor, nn


def hooks_of(model: nn.Module) -> int:
    """Hooks and handles on the model's modules and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return modules + sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())


def live_tensors() -> int:
    """Tensors that Python holds, after a collection."""
    gc.collect()
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


def resident_bytes() -> int:
    """Memory of this process that is in RAM, less what was freed and is kept for later: a leak might hide in that."""
    with contextlib.suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
