"""Printing never raises: whatever the terminal, the pipe or the disk behind standard output does."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from deq import terminal
from deq.terminal import Streams
from deq.training.display import Display

FULL = Path("/dev/full")
Opened = Callable[..., TextIO]


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Puts a stream to a descriptor in the place of standard output, and a text in memory in that of error."""

    def opened(descriptor: int, encoding: str = "utf-8", *, unbuffered: bool = False) -> TextIO:
        raw = io.FileIO(descriptor, "w")
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[arg-type]
            encoding=encoding,
            write_through=unbuffered,
        )
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        return stream

    return opened


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "1 % · 2× → β “é” 東"),
        ("latin-1", '1 % · 2× -> beta "é" \\u6771'),
        ("ascii", '1 % - 2x -> beta "\\xe9" \\u6771'),
        ("cp437", '1 % · 2x -> beta "é" \\u6771'),
    ],
)
def test_what_an_encoding_lacks_is_shown_in_ascii_and_can_still_be_told_apart(
    encoding: str, shown: str, output: Opened
) -> None:
    reader, writer = os.pipe()
    given = output(writer, encoding)
    Streams()
    print("1 % · 2× → β “é” 東", flush=True)
    given.close()
    with open(reader, encoding=encoding) as file:  # noqa: PTH123
        assert file.read().strip() == shown


def test_a_name_of_a_file_that_is_no_text_is_shown_too(output: Opened) -> None:
    reader, writer = os.pipe()
    given = output(writer)
    Streams()
    print(os.fsdecode(b"a\xff"), flush=True)
    given.close()
    assert os.read(reader, 100) == b"a\\udcff\n"
    os.close(reader)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_program_whose_reader_goes_prints_on_and_ends_as_a_shell_expects(unbuffered: bool, output: Opened) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    given = output(writer, unbuffered=unbuffered)
    told: list[OSError] = []
    streams = Streams(told.append)
    for _ in range(10_000):
        print("a line that nobody reads")
    with pytest.raises(SystemExit) as ended:
        streams.end()
    assert ended.value.code == 141  # 128 + SIGPIPE
    assert [type(error) for error in told] == [BrokenPipeError]  # once
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
    os.write(writer, b"whoever else writes there is not stopped either")
    given.close()


@pytest.mark.skipif(not FULL.exists(), reason="needs a disk that is always full, /dev/full")
def test_a_page_that_found_no_room_is_told_of(output: Opened) -> None:
    given = output(os.open(FULL, os.O_WRONLY))
    streams = Streams()
    print("a page")
    with pytest.raises(SystemExit) as ended:
        streams.end()
    assert ended.value.code == 2
    assert sys.stderr.getvalue() == (  # type: ignore[attr-defined]
        "error: standard output cannot be written (No space left on device); make room or write to another file\n"
    )
    given.close()


def test_the_status_of_a_mistake_goes_before_that_of_a_lost_reader(output: Opened) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    given = output(writer)
    streams = Streams()
    print("a line that nobody reads")
    with pytest.raises(SystemExit) as ended:
        streams.end(2)
    assert ended.value.code == 2
    given.close()


def test_streams_that_were_closed_from_the_start_take_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    streams = Streams()
    print("é", flush=True)
    print(os.fsdecode(b"\xff"), file=sys.stderr, flush=True)
    terminal.console().print("shown nowhere")
    with pytest.raises(SystemExit) as ended:
        streams.end()
    assert ended.value.code == 0
    for stream in (sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("1", 1), ("20", 20), ("200", 200)])
def test_a_console_is_as_wide_as_the_terminal_says_and_never_of_no_width(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal.console().width == width
    assert terminal.console(narrowest=60).width == max(width, 60)


def test_the_closing_table_leaves_nothing_out_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = {"test/accuracy": 0.9875, "train/accuracy": 0.5, "time/train_s": 12.5, "time/elapsed_s": 20.0}
    told = []
    for columns in ("80", "20", "1", "0"):
        monkeypatch.setenv("COLUMNS", columns)
        display = Display()
        display.epoch(1, 2, {"train/loss": 0.1234})
        display.table(summary, None, {"files": "runs/a"})
        told.append(capsys.readouterr().out.split())
    assert "98.75" in told[0]
    assert "0.1234" in told[0]
    assert all(one == told[0] for one in told)


def test_a_parser_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    parser = terminal.Parser(prog="python -m deq.report")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--nothere"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --nothere; `python -m deq.report --help` lists the options\n"
    )
