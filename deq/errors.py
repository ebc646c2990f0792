"""One exception for what the user can mend: its text is the whole message, and no stack trace is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A wrong value, a missing file, an impossible combination: one sentence with value, limit and fix."""


@contextmanager
def values_of_the_user() -> Iterator[None]:
    """Turns a ValueError of the library, which refuses its arguments so, into a :class:`UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def first_line(error: BaseException) -> str:
    """What an exception says, cut to a part of a sentence; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
