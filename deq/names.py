"""Whether ``import kernels`` gives this project's package: others go by that name too."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec


def refuse_other_kernels() -> None:
    """Raises ImportError with what to do unless the name ``kernels`` stands for this project's package. It is looked
    for and not imported, since that imports torch.
    """
    try:
        spec = importlib.util.find_spec("kernels")
    except ValueError:  # imported already, and made by hand
        spec = None
    if spec is not None and _is_ours(spec):
        return
    found = _place(spec)
    if found is None:
        raise ImportError(
            "deq needs the package kernels of this project, which is not there: install this project again",
            name="kernels",
        )
    raise ImportError(
        f"the name kernels is taken by {found}, which is not this project's package: rename it if it is your own, "
        "else run pip uninstall kernels and install this project again, or use a fresh virtual environment",
        name="kernels",
        path=found,
    )


def _is_ours(spec: ModuleSpec) -> bool:
    """By a name that its ``__init__`` imports: pip may have put two packages into one folder."""
    read = getattr(spec.loader, "get_code", None)
    try:
        code = read("kernels") if read is not None and spec.submodule_search_locations is not None else None
    except (OSError, SyntaxError, ValueError):  # of someone else, and broken
        return False
    return code is not None and "AndersonWindow" in code.co_names


def _place(spec: ModuleSpec | None) -> str | None:
    """A file, or a folder that has no ``__init__.py``; None where there is nothing of that name."""
    if spec is None:
        made_by_hand = sys.modules.get("kernels")
        return None if made_by_hand is None else repr(made_by_hand)
    return spec.origin or next(iter(spec.submodule_search_locations or []), repr(spec))
