"""What the trainer, the probe and the crossover ask of a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from deq.layer import DEQ, Equilibrium
from deq.solvers.state import Nest


class EquilibriumModel(nn.Module):
    """Images → injection x → equilibrium z* = cell(z*, x) → logits.

    A model inherits this, makes two parts in its ``__init__``, and writes :meth:`inject`:

    - ``deq``: a :class:`deq.DEQ` around its cell, which is a module;
    - ``head``: a module from z* to logits, (B, classes).

    ``train.py`` gives ``__init__`` the keywords ``image_channels``, ``image_size`` (pixels), ``classes``, ``solver``
    and ``gradient``, beside the knobs of its YAML.

    Example:
        >>> import torch
        >>> class Model(EquilibriumModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.deq = DEQ(ResidualCell(channels=8, inner=8))
        ...         self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        ...
        ...     def inject(self, images):
        ...         return images.expand(-1, 8, -1, -1)
        >>> from deq.models import ResidualCell
        >>> Model()(torch.randn(4, 1, 6, 6)).shape
        torch.Size([4, 10])
    """

    deq: DEQ
    head: nn.Module

    def inject(self, images: Tensor) -> Nest:
        """The cell's second argument x, in the structure and the shapes of the state z: the solve starts at zeros
        like it. images: (B, image_channels, H, W) float.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it injects: write inject(images)")

    def equilibrium(self, images: Tensor, corrections: Collection[int] = (), z0: Nest | None = None) -> Equilibrium:
        """The hidden state, with what losses on it need (see :meth:`deq.DEQ.equilibrium`); ``head`` makes it logits."""
        return self.deq.equilibrium(self.inject(images), z0, corrections=corrections)

    def classify(self, z: Nest) -> Tensor:
        """Logits, (B, classes), of an iterate on the way; batch statistics are not updated."""
        # Evaluation uses the statistics, and will see fixed points alone.
        buffers = {name: buffer.clone() for name, buffer in self.head.named_buffers()}
        logits: Tensor = functional_call(self.head, buffers, (z,))
        return logits

    def forward(self, images: Tensor, z0: Any = None) -> Tensor:
        """Logits. images: (B, image_channels, H, W) float → (B, classes) float.

        z0: where the solve starts, in the structure of the state; zeros unless given.
        """
        logits: Tensor = self.head(self.deq(self.inject(images), z0))
        return logits
