"""Powers of two that bring a sample to norm about 1: dividing by them is exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.state import accumulator_dtype


def power_of_two_norm(v: Tensor) -> Tensor:
    """The power of two next above each sample's norm, as far as its dtype has it, (B, 1, ...): dividing is exact.

    1 for a zero sample.

    Example:
        >>> power_of_two_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, 4e-30]]))
        tensor([[8.0000e+00],
                [1.0000e+00],
                [6.3109e-30]])
    """
    rows = v.reshape(len(v), -1)
    largest = rows.abs().amax(dim=1).to(accumulator_dtype(v.dtype))
    # The largest element first: the squares of small numbers would underflow.
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    norm = torch.linalg.vector_norm(rows / unit[:, None], dim=1, dtype=unit.dtype)
    limits = torch.finfo(v.dtype)
    lowest, highest = math.ceil(math.log2(limits.tiny)), math.floor(math.log2(limits.max) - 1e-3)
    exponent = (exponent + torch.frexp(norm).exponent).clamp(lowest, highest)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return scale.to(v.dtype).view(-1, *(1,) * (v.ndim - 1))
