"""Fixtures shared by all tests."""

from __future__ import annotations

import os

# Tests and the processes that they start take one thread each: the networks are small, and there are several workers.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # Without a device Triton's interpreter runs the kernels; it is chosen when a kernel is defined, hence this early.
    os.environ["TRITON_INTERPRET"] = "1"

from deq.kernels import BackendName

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton kernels run in the tests: a device if there is one, else the CPU, interpreted."""

BACKENDS: tuple[BackendName, ...] = ("torch", "native", "triton")


MOST_WORKERS = 8
"""Of pytest-xdist; each takes about 1 GB of memory."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("xdist"):  # not installed, or left out: pyproject.toml's options then mean nothing
        for name in ("--numprocesses", "--dist"):
            parser.addoption(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A device is shared by all that run on it; one worker is slower than none.
    return 0 if torch.cuda.is_available() or cores == 1 else min(cores, MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "long" not in item.keywords)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch finds none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
