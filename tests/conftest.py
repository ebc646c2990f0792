"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import importlib.util
import os

# Tests and the processes that they start take one thread each: the networks are small, and there are several workers.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Without a device Triton's interpreter runs the kernels; it is chosen when a kernel is defined, hence this early.
    os.environ["TRITON_INTERPRET"] = "1"

from deq.kernels import BackendName

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton kernels run in the tests: a device if there is one, else the CPU, interpreted."""

BACKENDS: tuple[BackendName, ...] = ("torch", "native", "triton")


def _prepare_once_a_launch() -> None:
    """Triton's interpreter puts its own functions into Triton's language when a launch begins, and again at every call
    of one function of a kernel by another, which is two fifths of its time. Once a launch for each module is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):  # another release
        return
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[frozenset[str]] = set()

    def prepare_once(function: Any) -> Any:
        language = frozenset(one.__name__ for one in function.__globals__.values() if one is tl or one is tl.core)
        if language in prepared:
            return None
        prepared.add(language)
        return prepare(function)

    def begin(executor: Any, *arguments: Any, **options: Any) -> None:
        prepared.clear()
        launch(executor, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, begin


if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    _prepare_once_a_launch()


MOST_WORKERS = 8
"""Of pytest-xdist; each takes about 1 GB of memory."""


LONGEST = (
    *("tests/kernels/test_compiled.py", "tests/test_train.py", "tests/kernels/test_window.py"),
    *("tests/test_notebooks.py", "tests/benchmarks/test_benchmarks.py", "tests/deq/layer/test_graphs.py"),
    *("tests/deq/cli/test_sweep.py", "tests/deq/layer/test_tracing.py", "tests/deq/solvers/test_coupled.py"),
    *(
        "tests/test_static.py",
        "tests/test_install.py",
        "tests/deq/layer/test_left_behind.py",
        "tests/deq/report/test_report.py",
    ),
    *("tests/deq/training/test_training.py", "tests/kernels/test_order.py", "tests/deq/layer/test_stability.py"),
)
"""Files of more than ten seconds each, the longest first: a worker takes one file after the other, in this order, and
at the end none should wait for a long one."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("xdist"):  # not installed, or left out: pyproject.toml's options then mean nothing
        for name in ("--numprocesses", "--dist"):
            parser.addoption(name)
        parser.addoption("--no-loadscope-reorder", action="store_true")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A device is shared by all that run on it; one worker is slower than none.
    return 0 if torch.cuda.is_available() or cores == 1 else min(cores, MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch finds none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    gc.freeze()  # what there is before the first test is not looked through at every collection


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
