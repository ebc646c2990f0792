"""Calls that may hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def within(seconds: float, call: Callable[[], Result], name: str) -> tuple[Result | None, BaseException | None]:
    """The call's result and None, or None and what it raised: a TimeoutError where it took longer than ``seconds``.

    It is made in a thread of that ``name``, because a call that hangs can be left alone but not be ended. What it
    raised is handed over and not raised here, so that Ctrl-C while waiting is told from it.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # a SystemExit, too, would end this thread without a word
            errors.append(error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0], None
    return None, errors[0] if errors else TimeoutError(f"no answer in {seconds:g} s")
