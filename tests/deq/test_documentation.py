"""Every public name says what it is, and shows it by an example that runs (pytest's --doctest-modules)."""

from __future__ import annotations

import doctest
import importlib
import inspect
from types import FunctionType
from typing import Any

import pytest

MODULES = ("deq", "deq.solvers", "deq.layer", "deq.layer.gradients", "deq.layer.stability", "deq.models", "deq.kernels")


def public(module: str) -> dict[str, Any]:
    """Classes and functions; of a module without ``__all__``, those that it defines."""
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None) or [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module
    ]
    values = {name: getattr(found, name) for name in names}
    return {f"{module}.{name}": value for name, value in values.items() if isinstance(value, type | FunctionType)}


NAMES = {name: value for module in MODULES for name, value in public(module).items()}


def methods(kind: type) -> dict[str, Any]:
    """What a class adds for its users."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("_") and isinstance(value, FunctionType | property)
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    value = NAMES[name]
    tests = doctest.DocTestFinder(recurse=False).find(value, name)
    assert any(test.examples for test in tests), f"{name} has no example in its docstring"
    # Where it is defined is where pytest looks for doctests: in pyproject.toml's testpaths.
    assert value.__module__.partition(".")[0] == "deq"


@pytest.mark.parametrize("name", [name for name, value in NAMES.items() if isinstance(value, type)])
def test_every_public_method_has_a_docstring(name: str) -> None:
    for method, value in methods(NAMES[name]).items():
        # A method that overrides one has that one's.
        assert inspect.getdoc(getattr(NAMES[name], method, value)), f"{name}.{method} has no docstring"


def test_the_names_that_users_are_told_of_are_all_looked_at() -> None:
    told = {
        "deq.DEQ",
        "deq.WarmStart",
        "deq.solvers.Solution",
        "deq.kernels.AndersonWindow",
        "deq.layer.VariationalDropout",
    }
    told |= {f"deq.solvers.{name}" for name in ("Anderson", "Forward", "Broyden")}
    told |= {f"deq.layer.{name}" for name in ("Implicit", "JacobianFree", "Phantom", "Unrolled")}
    told |= {f"deq.layer.{name}" for name in ("jacobian_penalty", "correction_loss", "spectral_radius")}
    assert told <= NAMES.keys()
