"""What reads a program instead of running it: ``torch.compile``, ``torch.export``, ``torch.jit``, ``torch.fx``,
``torch.func`` and dual numbers.

A solve ends when its residuals say so, and its updates are kernels that read and write memory. No trace can hold
either; the tensors of a transform have no memory of their own, and a dual number's tangent lies elsewhere: it would be
lost without a word. So what compiles goes around these functions, and all else is refused in a sentence.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

_WHY = (
    "a fixed-point solve runs until its residuals are small, so that it cannot be part of one graph: leave "
    "fullgraph=True out, and compile the cell of a DEQ layer by itself, cell.compile()"
)


def runs_as_it_is(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps ``torch.compile`` out of a function and of all that it calls, but for what is compiled by itself."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled in this process, and the import takes a second
            return function(*args, **kwargs)
        return cast("R", _run(function, args, kwargs))

    _mark(outside)
    return outside


def _mark(function: Any) -> None:
    """What torch.compiler.disable() would set: a caller that is traced stops here, or says why it cannot."""
    function._torchdynamo_disable, function._torchdynamo_disable_recursive = True, True
    function._torchdynamo_disable_msg = _WHY


def _run(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return _disabled(function)(*args, **kwargs)


_mark(_run)


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    if function not in _made:  # a dict, since a compiler warns of functools.cache
        _made[function] = torch.compiler.disable(function, reason=_WHY)
    return _made[function]


_made: dict[Callable[..., Any], Callable[..., Any]] = {}


def refuse_tracing(what: str, *tensors: Any) -> None:
    """Raises NotImplementedError, in a sentence that begins with ``what``, where a call on these is traced.

    Example:
        >>> import torch
        >>> refuse_tracing("a solve", torch.ones(2))
        >>> torch.func.vmap(lambda x: refuse_tracing("a solve", x))(torch.ones(2, 3))
        Traceback (most recent call last):
        NotImplementedError: a solve does not work inside torch.func.vmap: call it on one batch of all samples
    """
    if any(isinstance(tensor, torch.fx.Proxy) for tensor in tensors):
        raise NotImplementedError(
            f"{what} cannot be traced by torch.fx, since its number of evaluations depends on the data: make it a leaf "
            "(a Tracer whose is_leaf_module is true for deq.DEQ), or trace the cell"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise NotImplementedError(
            f"{what} cannot be traced by torch.jit.trace, which would keep one solve of one length and none of its "
            "kernels: keep it eager, and trace the cell"
        )
    if torch.compiler.is_exporting():
        raise NotImplementedError(
            f"{what} cannot be exported, since its number of evaluations depends on the data: export the cell, and "
            "iterate z = cell(z, x) where the export is used"
        )
    if any(type(tensor).__name__ in _WITHOUT_DATA for tensor in tensors) or (
        tensors and all(tensor.is_meta for tensor in tensors)
    ):
        raise NotImplementedError(
            f"{what} needs data, since it ends when residuals are small, but it was called on a tensor without any "
            "(FakeTensor, or device meta): call it on a real one"
        )
    refuse_transforms(what, *tensors)


_WITHOUT_DATA = ("FakeTensor", "FunctionalTensor")


def refuse_transforms(what: str, *tensors: Tensor) -> None:
    """The same for ``torch.func`` transforms and dual numbers alone: little work, for every evaluation."""
    inside = _functorch.peek_interpreter_stack()
    if inside is not None:
        name, instead = _INSTEAD.get(inside.key().name, _INSTEAD["Grad"])
        raise NotImplementedError(f"{what} does not work inside {name}: {instead}")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{what} does not carry the tangents of forward mode (dual numbers): {_BACKWARDS}")


def refuse_batched_gradients(what: str, gradient: Tensor) -> None:
    """The same for a gradient that is one of a batch of them."""
    refuse_transforms(what, gradient)
    if _functorch.is_legacy_batchedtensor(gradient):
        raise NotImplementedError(
            f"{what} takes no gradients by the batch (vectorize=True, is_grads_batched=True): leave that out, and ask "
            "for one gradient after the other"
        )


_functorch: Any = torch._C._functorch
_BACKWARDS = "take a vector-Jacobian product with torch.autograd.grad, or finite differences"
_INSTEAD = {
    "Grad": ("torch.func.grad, vjp, jacrev or hessian", "use torch.autograd.grad or backward() on its output"),
    "Jvp": ("torch.func.jvp or jacfwd", _BACKWARDS),
    "Vmap": ("torch.func.vmap", "call it on one batch of all samples"),
    "Functionalize": ("torch.func.functionalize", "call it outside"),
}
