"""The data sets, one function each: ``conf/data/<name>.yaml`` names it and carries its arguments."""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10

from deq.data import picture
from deq.data.cache import cached
from deq.data.images import ImageData, Split
from deq.data.listing import Listing, listed, readable
from deq.data.picture import Pixels
from deq.records.errors import UserError, first_line, in_yaml

_DOWNLOAD_TIMEOUT_S = 30
_CACHE_FORMAT = 2
_TWELVE_BITS = 4095


def digits(augment: str = "none", train_size: int | None = None, test_size: int | None = None) -> ImageData:
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8 pixels, 1,437 to train on and 360 to test.

    They ship with scikit-learn. The split is class-stratified and the same in every run, whatever the seed.
    """
    source = load_digits()
    # The values 0 … 16 become 0, 15, … 240: a multiple, so that nothing is rounded.
    images = torch.from_numpy((source.images * 15).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(source.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=source.target, random_state=0, shuffle=True
    )
    return ImageData.of(
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        tuple(str(name) for name in source.target_names),
        augmentation=augment,
        train_size=train_size,
        test_size=test_size,
    )


def cifar10(root: str, augment: str = "none", train_size: int | None = None, test_size: int | None = None) -> ImageData:
    """CIFAR-10: 50,000 and 10,000 colour images of 32×32 pixels, downloaded to ``root`` where they are missing.

    Raises:
        UserError: not there and not to be had, with what to put where.
    """
    folder = _folder("data.root", root, "where CIFAR-10 is or shall be downloaded to")
    try:
        with _socket_timeout(_DOWNLOAD_TIMEOUT_S):
            parts = [CIFAR10(str(folder), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # no network, a proxy's refusal, a broken archive
        raise UserError(
            f"CIFAR-10 is not in {folder} and could not be downloaded ({first_line(error)}); put "
            f"cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html there, or name another folder with "
            f"data.root=DIR, or train on image files with data=image_folder data.root=DIR"
        ) from error
    train, test = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return ImageData.of(
        train, test, tuple(parts[0].classes), augmentation=augment, train_size=train_size, test_size=test_size
    )


def image_folder(
    root: str | None,
    cache_dir: str,
    image_size: int | None = None,
    augment: str = "none",
    train_size: int | None = None,
    test_size: int | None = None,
) -> ImageData:
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``, the layout of torchvision's ImageFolder.

    Decoded once to RGB uint8 and cached in ``cache_dir``; the cache is keyed by every file's path, size and times of
    change, so that a changed folder is decoded anew, as is a cache file that is not whole.

    An image of any of Pillow's modes is read with its own black and white, and turned as its camera was held; one of
    which RGB pixels would be a guess is refused: floating-point numbers, 32-bit or signed integers, more channels than
    a colour has, several frames, pixels that are transparent. Warns of what is left out: hidden files and folders,
    files of other kinds or beside the class folders, links that go in a circle.

    Args:
        image_size: scale each image's shorter side to this many pixels and cut out the centre square; None
            takes the images as they are, which then have to be square and of one size.

    Raises:
        UserError: a missing or unreadable folder, a class without an image, images that do not fit or would be a
            guess, a cache that cannot be written; with the value and the fix.
    """
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise UserError(f"data.image_size must be an integer of at least 1, or null, got {in_yaml(image_size)}")
    folder = _folder("data.root", root, "a folder with train/ and test/ inside")
    cache = _folder("data.cache_dir", cache_dir, "where decoded images are kept")
    for needed in (folder, folder / "train", folder / "test"):
        with readable(needed):
            there = needed.is_dir()
        if not there:
            raise UserError(
                f"data.root={root}: there is no folder {needed}; data.root must hold train/ and test/, each with "
                f"one folder of images a class"
            )
    parts = [listed(folder / part) for part in ("train", "test")]
    if parts[0].classes != parts[1].classes:
        odd = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise UserError(f"data.root={root}: train/ and test/ must hold the same classes; only one has {', '.join(odd)}")
    for part in parts:
        account = part.account()
        if account is not None:
            warnings.warn(account, stacklevel=2)
    train, test = (_decoded(part, cache, image_size) for part in parts)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"data.root={root}: train/ holds images of {_pixels(train)} and test/ of {_pixels(test)}; "
            f"give data.image_size=N to scale them"
        )
    return ImageData.of(train, test, parts[0].classes, augmentation=augment, train_size=train_size, test_size=test_size)


def _folder(knob: str, value: object, meaning: str) -> Path:
    if value is None:
        raise UserError(f"{knob} is not set; give {knob}=DIR, {meaning}")
    try:
        return Path(str(value)).expanduser()  # str, because the command line reads 2024 as a number
    except RuntimeError as error:
        raise UserError(f"{knob}={value}: there is no such home folder; give {knob}=DIR without ~") from error


def _decoded(listing: Listing, cache: Path, image_size: int | None) -> Split:
    """The images of a listed folder, from the cache where they are in it unchanged."""
    key = listing.fingerprint(_CACHE_FORMAT, PIL.__version__, image_size)
    file = cache / f"{listing.folder.resolve().parent.name[:40]}-{listing.folder.name}-{key[:20]}.npz"
    images = cached(file, key, len(listing.samples), lambda: _decode(listing, image_size))
    return Split(torch.from_numpy(images), torch.tensor(listing.labels))


def _decode(listing: Listing, image_size: int | None) -> Pixels:
    """The images of a listed folder, (N, 3, S, S).

    Raises:
        UserError: an image that cannot be used, with how many more there are; or images of several sizes.
    """
    paths = [sample.path for sample in listing.samples]
    greatest: list[int] = []  # values of the images of 16 bits
    needed, memory = 2 * len(paths) * 3 * (image_size or 0) ** 2, _memory()  # each image, and all of them in one piece
    if needed > memory:
        raise UserError(
            f"data.image_size={image_size} needs {needed / 1e9:,.0f} GB for the {len(paths)} images of "
            f"{listing.folder}, and this machine has {memory / 1e9:,.0f} GB of memory; give a smaller one"
        )
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        found = list(pool.map(lambda path: _read(path, image_size, greatest), paths))
    if greatest and max(greatest) <= _TWELVE_BITS:
        warnings.warn(
            f"no 16-bit image of {listing.folder} has a value above {max(greatest)} of 65535, so they are read as "
            f"nearly black; where they hold fewer bits, such as 12, multiply their values up to 65535",
            stacklevel=2,
        )
    images = [one for one in found if not isinstance(one, UserError)]
    refused = [one for one in found if isinstance(one, UserError)]
    if refused:
        more = f" (and {len(refused) - 1} more files of {listing.folder} cannot be used)" if refused[1:] else ""
        raise UserError(f"{refused[0]}{more}") from refused[0]
    if any(image.shape != images[0].shape or image.shape[0] != image.shape[1] for image in images):
        odd = next(
            (path, image)
            for path, image in zip(paths, images, strict=True)
            if image.shape != images[0].shape or image.shape[0] != image.shape[1]
        )
        raise UserError(
            f"images must be square and of one size; {odd[0]} has {odd[1].shape[1]}×{odd[1].shape[0]} pixels and the "
            f"first image has {images[0].shape[1]}×{images[0].shape[0]}; give data.image_size=N to scale them"
        )
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def _read(path: Path, image_size: int | None, greatest: list[int]) -> Pixels | UserError:
    try:
        return picture.read(path, image_size, greatest)
    except UserError as error:
        return error


def _memory() -> float:
    """Bytes of the machine's memory; infinite where that is not told."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows, among others
        return math.inf


def _pixels(split: Split) -> str:
    return f"{split.images.shape[3]}×{split.images.shape[2]} pixels"


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A dead network ends in an error after this long, not in a wait."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
