"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file that replaces ``path`` only when it is complete and on the disk.

    A reader, or a process started after this one was killed at any moment, finds the previous file or the new
    one, never a half. The temporary file lies in the same folder, because a rename is atomic only within one
    file system; one that a killed process left behind is overwritten by the next write.

    Raises: whatever ``write`` raises, and OSError from the file system; ``path`` is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # half a file would only take the room that may have been missing
            temporary.unlink(missing_ok=True)
        raise
    # The rename itself lives in the folder, which has to reach the disk as well.
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def shown(path: Path) -> str:
    """The path as a person here would type it: relative to the working folder where it is below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
