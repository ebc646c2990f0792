"""The network of the Deep Implicit Layers tutorial and of arXiv 2410.19460, with its sizes as arguments."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from deq.layer import DEQ, Gradient, Implicit
from deq.models.model import EquilibriumModel
from deq.models.tutorial import TutorialDEQ, TutorialSolver
from deq.solvers import Solver


class ResidualCell(nn.Module):
    """The map whose fixed point is the hidden state: z ↦ GN₃(relu(z + GN₂(x + conv₂(GN₁(relu(conv₁ z)))))).

    Args:
        channels: channels of the state z and of the injection x.
        inner: channels between the two convolutions.
        groups: groups of each group norm; divides ``channels`` and ``inner``.
        init_std: standard deviation of the convolutions' initial weights. Small weights make the untrained
            map a contraction, so that the first solves converge (the tutorial's 0.01).

    Source: Kolter, Duvenaud & Johnson, Deep Implicit Layers tutorial, chapter 4 (``ResNetLayer``).

    Example:
        >>> import torch
        >>> cell = ResidualCell(channels=16, inner=8)
        >>> cell(torch.zeros(4, 16, 6, 6), torch.randn(4, 16, 6, 6)).shape
        torch.Size([4, 16, 6, 6])
    """

    def __init__(self, channels: int, inner: int, groups: int = 8, init_std: float = 0.01) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, kernel_size=3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, inner)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)
        for convolution in (self.conv1, self.conv2):
            nn.init.normal_(convolution.weight, std=init_std)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map. z, x: (B, channels, H, W) float. Returns: the shape of z."""
        inner = self.norm1(functional.relu(self.conv1(z)))
        result: Tensor = self.norm3(functional.relu(z + self.norm2(x + self.conv2(inner))))
        return result


class EquilibriumClassifier(EquilibriumModel):
    """Stem (3×3 convolution, batch norm) → DEQ over a :class:`ResidualCell` → batch norm → pool → linear.

    With the defaults on CIFAR-10 this is the paper's network: 64,842 parameters.

    Args:
        image_channels: channels of the input images.
        image_size: height and width of the input images, in pixels.
        classes: number of classes.
        solver: finds the equilibrium; ``gradient``: differentiates through it (see :class:`deq.DEQ`). A solver of
            :mod:`deq.models.tutorial` brings the tutorial's layer along.
        cuda_graph: replay recorded CUDA graphs in both solves (see :class:`deq.DEQ`).
        channels, inner, groups, init_std: sizes of the cell.
        pool: side of the average-pooling window, in pixels; divides ``image_size``.

    Raises:
        ValueError: a size that does not fit, with its value, its limit and what to change.

    Example:
        >>> import torch
        >>> from deq.solvers import Anderson
        >>> sizes = {"image_channels": 1, "image_size": 8, "classes": 10, "channels": 16, "inner": 16}
        >>> model = EquilibriumClassifier(**sizes, solver=Anderson(tol=1e-2), gradient=Implicit())
        >>> model(torch.randn(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        classes: int,
        *,
        solver: Solver,
        gradient: Gradient,
        cuda_graph: bool = False,
        channels: int = 48,
        inner: int = 64,
        groups: int = 8,
        pool: int = 8,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "inner": inner, "groups": groups, "pool": pool}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"model.{name} must be an integer of at least 1, got {size!r}")
        for name in ("channels", "inner"):
            if sizes[name] % groups:
                raise ValueError(
                    f"model.{name} must be a multiple of model.groups={groups}, got {sizes[name]}; "
                    f"change one of the two"
                )
        if image_size % pool:
            raise ValueError(
                f"model.pool must divide the image size, {image_size} pixels, got {pool}; "
                f"give model.pool one of its divisors"
            )
        if isinstance(init_std, bool) or not isinstance(init_std, int | float) or not 0 < init_std < math.inf:
            raise ValueError(f"model.init_std must be a number above 0, such as 0.01, got {init_std!r}")
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, channels, kernel_size=3, padding=1), nn.BatchNorm2d(channels)
        )
        cell = ResidualCell(channels, inner, groups, init_std)
        if isinstance(solver, TutorialSolver):
            if cuda_graph or not isinstance(gradient, Implicit):
                raise ValueError(
                    f"the tutorial's layer, which {type(solver).__name__} brings, knows neither cuda_graph=true nor "
                    "gradients other than implicit: leave them out, or use solver=forward or anderson"
                )
            self.deq = TutorialDEQ(cell, solver, gradient)
        else:
            self.deq = DEQ(cell, solver=solver, gradient=gradient, cuda_graph=cuda_graph)
        side = image_size // pool
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.AvgPool2d(pool),
            nn.Flatten(),
            nn.Linear(channels * side * side, classes),
        )

    def inject(self, images: Tensor) -> Tensor:
        """The cell's second argument. images: (B, image_channels, H, W) float → x: (B, channels, H, W) float."""
        injection: Tensor = self.stem(images)
        return injection
