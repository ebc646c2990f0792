"""Decoded images on the disk: whole, of the very files asked for, and read without trusting them; or made again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from deq.data.picture import Pixels
from deq.records.errors import UserError, first_line


def cached(file: Path, key: str, count: int, make: Callable[[], Pixels]) -> Pixels:
    """What ``make`` makes, from ``file`` if that holds it: ``count`` square images, (N, 3, S, S) uint8.

    A file that is broken or holds something else is made again, with a warning. Any number of processes may do this at
    once: each writes a file of its own, and the last one to be whole stays.

    Args:
        key: names the images and how they are decoded; a file with another key is not used.

    Raises:
        UserError: the folder cannot be written, which is seen before ``make`` is called.
    """
    try:
        return _load(file, key, count)
    except (FileNotFoundError, NotADirectoryError):
        pass  # the first time
    except Exception:  # of numpy, zip or the file system: whatever is not a whole cache file
        warnings.warn(f"the cache file {file} is broken or not of these images, and is made again", stacklevel=2)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{file.stem}-", dir=file.parent) as own:
            images = make()
            whole = Path(own) / file.name
            np.savez(whole, key=np.array(key), images=images)
            whole.replace(file)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"data.cache_dir={file.parent} cannot be written ({reason}); make room there or give another "
            f"data.cache_dir=DIR"
        ) from error
    return images


def _load(file: Path, key: str, count: int) -> Pixels:
    """Raises: whatever is wrong with the file. Its checksums, which zip compares, tell of any byte that changed."""
    with np.load(file, allow_pickle=False) as content:  # without pickle nothing in the file is executed
        if str(content["key"]) != key:
            raise ValueError("the images of other files")
        images: Pixels = content["images"]
    square = images.ndim == 4 and images.shape[:2] == (count, 3) and images.shape[2] == images.shape[3]
    if images.dtype != np.uint8 or not square:
        raise ValueError("not square RGB images")
    return images
