"""Standard output and error that no terminal, pipe or disk can break."""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from rich.console import Console
from typing_extensions import Buffer

MISTAKE = 2
"""Exit status of everything that the user can mend: the shell's convention for a wrong command line."""

_READER_GONE = 128 + 13  # exit status: what a shell gives for a program that SIGPIPE ended, such as `yes | head`

_PLAINLY = "deq.plainly"  # the name of the rule for what an encoding lacks
_PLAIN = {"·": "-", "×": "x", "→": "->", "–": "-", "−": "-", "“": '"', "”": '"', "…": "...", "β": "beta"}


class _Lasting(io.FileIO):
    """A file descriptor that takes everything: once it fails, what is written goes nowhere.

    The descriptor itself is then the null device's, so that whoever else writes to it is not stopped either.
    """

    def __init__(self, descriptor: int, failed: Callable[[OSError], object]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._failed = failed

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            self._failed(error)
            return memoryview(data).nbytes


class Streams:
    """Standard output and error of a program, made so that printing never raises.

    A character that the terminal's encoding lacks is printed in ASCII. A stream that was closed from the start takes
    everything and shows nothing. One that fails later, because its reader has gone or its disk is full, does so too
    from then on; of standard output the program is told by ``lost``.

    Args:
        failed: called once with what ended standard output.
    """

    def __init__(self, failed: Callable[[OSError], object] = lambda error: None) -> None:
        self.lost: OSError | None = None
        self._told = failed
        codecs.register_error(_PLAINLY, _plainly)
        sys.stdout = _steady(sys.stdout, self._fail)
        sys.stderr = _steady(sys.stderr, lambda error: None)

    def _fail(self, error: OSError) -> None:
        self.lost = error
        self._told(error)

    def end(self, status: int = 0) -> NoReturn:
        """End a program whose output is all that it makes, such as a help page: lost output is told in its status.

        A reader that had enough, as in ``--help | head``, is no error to be told of: the program ends quietly, with
        the status that a shell gives for any other whose reader went.
        """
        sys.stdout.flush()
        if self.lost is None or status:
            sys.exit(status)
        if self.lost.errno == errno.EPIPE:
            sys.exit(_READER_GONE)
        end(f"standard output cannot be written ({self.lost.strerror}); make room or write to another file")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a program whose output is all that it makes; its status is what ``main`` returns or leaves with."""
    streams = Streams()
    try:
        status = main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    streams.end(status or 0)


def console(*, stderr: bool = False, narrowest: int = 1) -> Console:
    """Where a program prints for people.

    Args:
        narrowest: columns that what is printed needs; a narrower terminal breaks the lines itself. Rich would leave out
            what has no room, and all of it where COLUMNS=0 says that the width is not known.
    """
    made = Console(stderr=stderr, highlight=False)
    if made.width < 1:
        made.width = 80
    if made.width < narrowest:
        made.width = narrowest
    return made


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence, as everything here does, instead of the usage and one."""

    def error(self, message: str) -> NoReturn:
        end(f"{message}; `{self.prog} --help` lists the options")


def tell(sentence: str) -> None:
    """One sentence about what went wrong, on standard error."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def end(sentence: str) -> NoReturn:
    """Tell the user's mistake and leave."""
    tell(sentence)
    sys.exit(MISTAKE)


def _steady(stream: TextIO | None, failed: Callable[[OSError], object]) -> TextIO:
    if stream is None:  # closed by whoever started this, as in `python train.py >&-`
        return Path(os.devnull).open("w", encoding="utf-8", errors=_PLAINLY)
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # a text in memory, which a test or a notebook has put there
    stream.flush()
    raw = _Lasting(stream.fileno(), failed)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # as Python itself does
        encoding=stream.encoding,
        errors=_PLAINLY,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """For :func:`codecs.register_error`: what the encoding lacks in ASCII, so that a name can still be told apart."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(one) or ascii(one)[1:-1] for one in lacking), error.end
