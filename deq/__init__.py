"""Deep equilibrium models with Anderson acceleration."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deq.layer import DEQ, Equilibrium, Implicit, JacobianFree, Phantom, Unrolled, WarmStart

__all__ = ["DEQ", "Equilibrium", "Implicit", "JacobianFree", "Phantom", "Unrolled", "WarmStart"]


def __getattr__(name: str) -> Any:
    # At its first use: torch takes seconds to import, and the report needs none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import deq.layer

    value = getattr(deq.layer, name)
    globals()[name] = value
    return value
