"""A labelled image set on the training device, and the batches that training draws from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from deq.data.augment import AUGMENTATIONS, augment
from deq.records.errors import UserError, in_yaml


@dataclass(frozen=True)
class Split:
    """images: (N, C, H, W) uint8; labels: (N,) int64; both on the same device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def share(self, size: int | None, name: str) -> Split:
        """A fixed, class-stratified choice of ``size`` images (all where None), the same in every run.

        Raises:
            UserError: fewer than one image a class, or more than there are.
        """
        if size is None or size == len(self):
            return self
        classes = int(self.labels.max()) + 1
        if isinstance(size, bool) or not isinstance(size, int) or not classes <= size <= len(self):
            raise UserError(
                f"{name} must be an integer from {classes} to {len(self)}, or null for all, got {in_yaml(size)}"
            )
        if size > len(self) - classes:  # the splitter wants an image a class on the other side as well
            raise UserError(f"{name}={size} leaves out fewer than one image a class; give null for all {len(self)}")
        indices = torch.arange(len(self))
        chosen, _ = train_test_split(
            indices.numpy(), train_size=size, stratify=self.labels.cpu().numpy(), random_state=0
        )
        order = torch.from_numpy(chosen).sort().values
        return Split(self.images[order], self.labels[order])


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of square images of one size, with the training set's statistics.

    mean, std: (C,) float32, per channel, of the training images scaled to [0, 1].
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    augmentation: str = "none"

    @staticmethod
    def of(
        train: Split,
        test: Split,
        classes: tuple[str, ...],
        *,
        augmentation: str = "none",
        train_size: int | None = None,
        test_size: int | None = None,
    ) -> ImageData:
        """Take the stated shares of both sets and measure the mean and standard deviation of what is trained on.

        Raises:
            UserError: an unknown augmentation or an impossible share.
        """
        if augmentation not in AUGMENTATIONS:
            raise UserError(f"data.augment must be one of {', '.join(AUGMENTATIONS)}, got {in_yaml(augmentation)}")
        train = train.share(train_size, "data.train_size")
        test = test.share(test_size, "data.test_size")
        # Counted from the histogram of each channel's 256 values: exact, and no float copy of the images.
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in train.images.unbind(dim=1)]
        ).double()
        share = counts / counts.sum(dim=1, keepdim=True)
        mean = share @ values
        std = ((share @ values.square()) - mean.square()).clamp(min=0).sqrt()
        std[std == 0] = 1  # a channel that never changes is left as it is
        return ImageData(train, test, classes, mean.float(), std.float(), augmentation)

    def to(self, device: torch.device) -> ImageData:
        """The same data, everything on ``device``."""
        return ImageData(
            self.train.to(device),
            self.test.to(device),
            self.classes,
            self.mean.to(device),
            self.std.to(device),
            self.augmentation,
        )

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train.images.shape[2]


class Batches:
    """Batches of :class:`ImageData`, assembled, augmented and normalised on the device that holds it."""

    def __init__(self, data: ImageData, batch_size: int, seed: int) -> None:
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self._transform = AUGMENTATIONS[data.augmentation](data.size)
        self._mean = data.mean.view(1, -1, 1, 1)
        self._std = data.std.view(1, -1, 1, 1)

    @property
    def per_epoch(self) -> int:
        """Training batches an epoch. The last, smaller one counts."""
        return -(-len(self.data.train) // self.batch_size)

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches number ``start``, ``start`` + 1, … of an epoch: images (B, C, H, W) float32, labels (B,) int64.

        The order depends on (seed, epoch) alone, so that a resumed run sees what the uninterrupted one saw.
        """
        split = self.data.train
        for chosen in self.chosen(epoch, start):
            yield self._normalised(augment(split.images[chosen], self._transform)), split.labels[chosen]

    def chosen(self, epoch: int, start: int = 0) -> tuple[Tensor, ...]:
        """Which samples of the training set the batches of :meth:`train` hold: (B,) int64 each."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data.train), generator=generator).to(self.data.train.labels.device)
        return torch.split(order, self.batch_size)[start:]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in its own order, not augmented; shapes as in :meth:`train`."""
        split = self.data.test
        for images, labels in zip(
            torch.split(split.images, self.batch_size), torch.split(split.labels, self.batch_size), strict=True
        ):
            yield self._normalised(images), labels

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std
