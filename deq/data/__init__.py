"""What is trained on: images that live as uint8 on the training device, and the batches made of them there."""

from deq.data.augment import AUGMENTATIONS
from deq.data.images import Batches, ImageData, Split
from deq.data.sources import cifar10, digits, image_folder

__all__ = ["AUGMENTATIONS", "Batches", "ImageData", "Split", "cifar10", "digits", "image_folder"]
