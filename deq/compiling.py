"""``torch.compile`` for the cell of an equilibrium layer."""

from __future__ import annotations

from torch import nn


def compile_cell(cell: nn.Module) -> None:
    """Compile ``cell`` in place with ``torch.compile``, so that implicit gradients can pass it.

    A backward solve asks for many products with the one recorded evaluation of the cell. A compiled backward may take
    that evaluation's buffers for its own results ("donated buffers"), after which a second product is refused or
    wrong. So this switches them off, for the whole process: ``torch._functorch.config.donated_buffer = False``. Who
    compiles a cell otherwise has to do the same, before its first backward pass.

    Example:
        >>> import torch
        >>> cell = torch.nn.Bilinear(4, 4, 4)
        >>> compile_cell(cell)  # compiles when it is first called
        >>> torch._functorch.config.donated_buffer
        False
    """
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    cell.compile()
