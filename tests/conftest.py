"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Without a device Triton's interpreter runs the kernels; it is chosen when a kernel is defined, hence this early.
    os.environ["TRITON_INTERPRET"] = "1"

from deq.kernels import BackendName

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton kernels run in the tests: a device if there is one, else the CPU, interpreted."""

BACKENDS: tuple[BackendName, ...] = ("torch", "native", "triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch finds none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
