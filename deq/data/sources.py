"""The data sets, one function each: ``conf/data/<name>.yaml`` names it and carries its arguments."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, ImageFolder

from deq.data import picture
from deq.data.images import ImageData, Split
from deq.data.picture import Pixels
from deq.errors import UserError, first_line, in_yaml
from deq.files import write_atomically

_DOWNLOAD_TIMEOUT_S = 30
_CACHE_FORMAT = 2


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
    folder = Path(root).expanduser()
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

    Decoded once to RGB uint8 and cached in ``cache_dir``; the cache is keyed by every file's path, size and time
    of change, so that a changed folder is decoded anew.

    Args:
        image_size: scale each image's shorter side to this many pixels and cut out the centre square; None
            takes the images as they are, which then have to be square and of one size.

    Raises:
        UserError: a missing folder, or images that do not fit, with the value and the fix.
    """
    if root is None:
        raise UserError("data.root is not set; give data.root=DIR, a folder with train/ and test/ inside")
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise UserError(f"data.image_size must be an integer of at least 1, or null, got {in_yaml(image_size)}")
    folder = Path(root).expanduser()
    for needed in (folder, folder / "train", folder / "test"):
        if not needed.is_dir():
            raise UserError(
                f"data.root={root}: there is no folder {needed}; data.root must hold train/ and test/, each with "
                f"one folder of images a class"
            )
    sets = [_listed(folder / part) for part in ("train", "test")]
    if sets[0].classes != sets[1].classes:
        odd = sorted(set(sets[0].classes) ^ set(sets[1].classes))
        raise UserError(f"data.root={root}: train/ and test/ must hold the same classes; only one has {', '.join(odd)}")
    train, test = (_decoded(found, Path(cache_dir).expanduser(), image_size) for found in sets)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"data.root={root}: train/ holds images of {_pixels(train)} and test/ of {_pixels(test)}; "
            f"give data.image_size=N to scale them"
        )
    return ImageData.of(
        train, test, tuple(sets[0].classes), augmentation=augment, train_size=train_size, test_size=test_size
    )


def _listed(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class folder, or one with no image in it
        raise UserError(f"data.root={folder.parent}: {first_line(error)}") from error


def _decoded(found: ImageFolder, cache: Path, image_size: int | None) -> Split:
    """The images of a listed folder, from the cache where they are in it unchanged."""
    paths = [Path(path) for path, _ in found.samples]
    key = hashlib.sha256(f"{_CACHE_FORMAT} {image_size} {Path(found.root).resolve()}\n".encode())
    for path, label in found.samples:
        status = Path(path).stat()
        key.update(f"{path} {label} {status.st_size} {status.st_mtime_ns}\n".encode())
    file = cache / f"{Path(found.root).resolve().parent.name}-{Path(found.root).name}-{key.hexdigest()[:20]}.pt"
    if file.is_file():
        content = torch.load(file, weights_only=True)
        return Split(content["images"], content["labels"])
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        results = list(pool.map(lambda path: _read(path, image_size), paths))
    images = [one for one in results if not isinstance(one, UserError)]
    refused = [one for one in results if isinstance(one, UserError)]
    if refused:
        more = f" (and {len(refused) - 1} more files of {found.root} cannot be used)" if refused[1:] else ""
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
    split = Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets))
    content = {"images": split.images, "labels": split.labels}
    try:
        write_atomically(file, lambda opened: torch.save(content, opened))
    except OSError as error:
        raise UserError(f"data.cache_dir={cache} cannot be written ({error.strerror}); name another folder") from error
    return split


def _read(path: Path, image_size: int | None) -> Pixels | UserError:
    try:
        return picture.read(path, image_size)
    except UserError as error:
        return error


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
