"""Augmentations by name, built from torchvision's transforms v2, applied to each image on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

# A crop moves an image by at most this share of its side: 4 pixels of CIFAR-10's 32, 1 of the digits' 8.
_CROP_SHARE = 8


def _crop(size: int) -> v2.Transform:
    return v2.RandomCrop(size, padding=max(1, size // _CROP_SHARE))


AUGMENTATIONS: dict[str, Callable[[int], v2.Transform | None]] = {
    "none": lambda size: None,
    "crop": _crop,
    "crop_flip": lambda size: v2.Compose([_crop(size), v2.RandomHorizontalFlip()]),
}
"""Name → maker of the transform for square images of that side, in pixels."""


def augment(images: Tensor, transform: v2.Transform | None) -> Tensor:
    """images: (B, C, H, W) uint8 → the same shape. Draws from torch's global generator.

    v2 draws one set of parameters a call, so a whole batch would move as one; hence the loop.
    """
    if transform is None:
        return images
    return torch.stack([transform(image) for image in images])
