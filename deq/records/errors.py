"""One exception for what the user can mend: its text is the whole message, and no stack trace is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A wrong value, a missing file, an impossible combination: one sentence with value, limit and fix."""


@contextmanager
def values_of_the_user() -> Iterator[None]:
    """Turns a ValueError of the library, which refuses its arguments so, into a :class:`UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(in_yaml_too(str(error))) from error


def first_line(error: BaseException) -> str:
    """What an exception says, cut to a part of a sentence; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turns an OSError while ``path`` is written into a :class:`UserError`: a full disk, a folder of someone else."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{path} cannot be written ({reason}); make room or give another hydra.run.dir") from error


def in_yaml(value: Any) -> str:
    """A value as the command line writes it."""
    return _YAML.get(repr(value), repr(value))


_YAML = {"None": "null", "True": "true", "False": "false"}


def in_yaml_too(sentence: str) -> str:
    """What the library says of an argument in Python's words, in the command line's."""
    return re.sub(r"(?<=got )(None|True|False)\b", lambda match: _YAML[match.group()], sentence)
