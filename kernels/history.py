"""Where a window's history comes from, and where it goes when the window is gone.

On a GPU PyTorch's allocator keeps freed memory. On a CPU a freed history goes back to the system, which clears every
page of the next one: at the paper's size that costs more than an update, in every solve. So the history last freed is
kept, one at most, and the next window of that size takes it.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

_lock = threading.RLock()  # a finalizer may run inside the locked part
_kept: Tensor | None = None


def allocate(owner: object, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor that is given back when ``owner`` is collected; nothing else may hold on to it then."""
    global _kept
    if device.type != "cpu":
        return torch.empty(shape, device=device, dtype=dtype)
    with _lock:
        kept, _kept = _kept, None
    fits = kept is not None and kept.dtype == dtype and kept.numel() == torch.Size(shape).numel()
    history = kept.view(shape) if kept is not None and fits else torch.empty(shape, dtype=dtype)
    # Inference tensors cannot be written to outside inference mode, so that they are not passed on.
    if not history.is_inference():
        weakref.finalize(owner, _keep, history)
    return history


def _keep(history: Tensor) -> None:
    global _kept
    with _lock:
        _kept = history
