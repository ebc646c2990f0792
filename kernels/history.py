"""Where a window's history comes from, and where it goes when the window is gone.

On a GPU PyTorch's allocator keeps freed memory. On a CPU a freed history goes back to the system, which clears every
page of the next one: at the paper's size that costs more than an update, in every solve. So the history last freed is
kept, one at most, and the next window of that size takes it. It asks for large pages, too: an update passes through a
dozen rows at once, and small pages cost a translation every 4 kB of each.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import weakref

import torch
from torch import Tensor

_lock = threading.RLock()  # a finalizer may run inside the locked part
_kept: Tensor | None = None


def allocate(owner: object, size: int, device: torch.device) -> Tensor:
    """``size`` uninitialised bytes, given back when ``owner`` is collected; nothing else may hold on to them then."""
    global _kept
    if device.type != "cpu":
        return torch.empty(size, device=device, dtype=torch.uint8)
    with _lock:
        kept, _kept = _kept, None
    if kept is not None and len(kept) == size:
        history = kept
    else:
        history = torch.empty(size, device=device, dtype=torch.uint8)
        ask_for_large_pages(history)
    # Inference tensors cannot be written to outside inference mode, so that they are not passed on.
    if not history.is_inference():
        weakref.finalize(owner, _keep, history)
    return history


def _keep(history: Tensor) -> None:
    global _kept
    with _lock:
        _kept = history


_MADV_HUGEPAGE = 14
_LARGE_PAGE = 2 << 20


def ask_for_large_pages(history: Tensor) -> None:
    """Linux's madvise, on the large pages that lie wholly within a fresh tensor of the CPU; what it answers does not
    matter.
    """
    first = -(-history.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    end = (history.data_ptr() + history.nbytes) // _LARGE_PAGE * _LARGE_PAGE
    if sys.platform != "linux" or end <= first:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(_MADV_HUGEPAGE))
