"""The map whose fixed point is looked for: what it must be given, and what it must return."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deq.kernels.tracing import refuse_transforms

FixedPointMap = Callable[[Tensor], Tensor]
"""f: (B, ...) -> (B, ...), the same shape, dtype and device."""

Restrict = Callable[[Tensor], FixedPointMap]
"""Index of samples, (n,) int64 -> the map for these alone."""


def validate_start(z0: Tensor) -> None:
    """Raises ValueError, naming value, limit and fix, for what no solve can start from."""
    if z0.ndim < 1 or z0.numel() == 0 or not z0.is_floating_point():
        raise ValueError(
            f"z0 must be (B, ...) floating point with at least one element, got {tuple(z0.shape)} {z0.dtype}: "
            "leave empty batches out, give each sample a row, and turn whole numbers into floats"
        )
    if z0.layout != torch.strided:
        raise ValueError(f"z0 must be a dense tensor, got one of {z0.layout}: give z0.to_dense()")
    if z0.dtype.itemsize < 2:
        raise ValueError(
            f"z0 must be float64, float32, bfloat16 or float16, got {z0.dtype}: let f convert, and give z0.half()"
        )


def validate_value(fz: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """What a map returned, if it is of this shape and of the dtype and device of ``like``, what it was given.

    Raises:
        ValueError: else, naming both.
    """
    got, hint = type(fz).__name__, ""
    if isinstance(fz, Tensor) and fz.layout != torch.strided:
        got = f"a tensor of layout {fz.layout}: return a dense one, .to_dense()"
    elif isinstance(fz, Tensor):
        if (fz.shape, fz.dtype, fz.device) == (shape, like.dtype, like.device):
            return fz
        got = f"{tuple(fz.shape)} {fz.dtype} on {fz.device}"
        if fz.shape[1:] == shape[1:] and len(fz) > shape[0]:
            hint = f": give z0 a row for each of the {len(fz)} samples of x, z0.expand({len(fz)}, ...)"
    elif isinstance(fz, tuple | list) and fz and isinstance(fz[0], Tensor) and fz[0].shape == shape:
        hint = f" of {len(fz)}: a DEQ layer whose cell returns (z, aux) is made with aux=True"
    raise ValueError(
        f"f must return what it is given, {tuple(shape)} {like.dtype} on {like.device}, but it returned {got}{hint}"
    )


def random_state(device: torch.device) -> Tensor:
    """Of the generator that f draws from on this device, unless it has one of its own."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def evaluate(f: FixedPointMap, x: Tensor, shape: tuple[int, ...], *, first: bool = False) -> Tensor:
    """f at the flat iterate x, flat again and checked; ``first``: of a solve."""
    # Inference tensors count no versions: there a copy tells, once.
    version = None if x.is_inference() else x._version
    before = x.clone() if version is None and first else x
    fz = validate_value(f(x.view(shape)), shape, x)
    if before is not x and not bool(((before == x) | (before.isnan() & x.isnan())).all()):
        raise ValueError(_WROTE)
    refuse_transforms("a fixed-point solve", fz)  # a tangent may come from what f closes over
    if version is not None and x._version != version:
        raise ValueError(_WROTE)
    return fz.reshape(x.shape)


_WROTE = "f wrote into its argument, which is the solver's iterate: let f work on z.clone()"
