"""Deep equilibrium models with Anderson acceleration."""

from typing import TYPE_CHECKING, Any

from deq.names import refuse_other_kernels

if TYPE_CHECKING:
    from deq.layer import DEQ, Equilibrium
    from deq.warm_start import WarmStart

refuse_other_kernels()

__all__ = ["DEQ", "Equilibrium", "WarmStart"]

_HOMES = {"DEQ": "deq.layer", "Equilibrium": "deq.layer", "WarmStart": "deq.warm_start"}


def __getattr__(name: str) -> Any:
    # At its first use: torch takes seconds to import, and the report needs none of it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
