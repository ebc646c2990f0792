"""Powers of two that bring a sample to norm about 1: dividing by them is exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deq.kernels.state import accumulator_dtype


def power_of_two_norm(v: Tensor) -> Tensor:
    """The power of two next above each sample's norm, as far as its dtype has it, (B, 1, ...): dividing is exact.

    1 for a zero sample.

    Example:
        >>> power_of_two_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, 4e-30]]))
        tensor([[8.0000e+00],
                [1.0000e+00],
                [6.3109e-30]])
    """
    lowest, highest = _exponents(v.dtype)
    exponent = _exponent_of_norms(v).clamp(lowest, highest)
    scale = torch.ldexp(torch.ones(len(v), dtype=accumulator_dtype(v.dtype), device=v.device), exponent)
    return scale.to(v.dtype).view(-1, *(1,) * (v.ndim - 1))


def power_of_two_of_batch(v: Tensor) -> Tensor:
    """One power of two for all samples, (): about the largest norm of those that are finite; dividing is exact.

    Where samples differ so much that the smallest would be lost in the dtype, it is smaller, for both to have room. 1
    where all are zero or not finite.

    Example:
        >>> power_of_two_of_batch(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-3, 4e-3]]))
        tensor(8.)
    """
    lowest, highest = _exponents(v.dtype)
    exponents = _exponent_of_norms(v)
    rows = v.reshape(len(v), -1)
    counts = torch.isfinite(rows).all(dim=1) & (rows != 0).any(dim=1)
    limits = torch.iinfo(exponents.dtype)
    largest = torch.where(counts, exponents, limits.min).max()
    smallest = torch.where(counts, exponents, limits.max).min()
    # After division the smallest keeps all its digits above the underflow, and the largest is clear of the overflow.
    digits = math.ceil(-math.log2(torch.finfo(v.dtype).eps))
    exponent = torch.minimum(largest, smallest - lowest - digits)
    exponent = torch.maximum(exponent, largest - highest + _ROOM).clamp(lowest, highest)
    exponent = torch.where(counts.any(), exponent, 0)
    return torch.ldexp(torch.ones((), dtype=accumulator_dtype(v.dtype), device=v.device), exponent).to(v.dtype)


_ROOM = 5
"""Binary digits that a solution may be above its right side, where there is no more room than that."""


def _exponents(dtype: torch.dtype) -> tuple[int, int]:
    """The exponents of the smallest and the largest power of two that a dtype has."""
    limits = torch.finfo(dtype)
    return math.ceil(math.log2(limits.tiny)), math.floor(math.log2(limits.max) - 1e-3)


def _exponent_of_norms(v: Tensor) -> Tensor:
    """Of the power of two next above each sample's norm, (B,) int32; what it is for what is not finite is no matter."""
    rows = v.reshape(len(v), -1)
    largest = rows.abs().amax(dim=1).to(accumulator_dtype(v.dtype))
    # The largest element first: the squares of small numbers would underflow.
    exponent = torch.frexp(largest).exponent.clamp(*_exponents(largest.dtype))
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    norm = torch.linalg.vector_norm(rows / unit[:, None], dim=1, dtype=unit.dtype)
    return exponent + torch.frexp(norm).exponent
