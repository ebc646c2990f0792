"""Compares the runs of a sweep: ``python -m deq.report SWEEP_DIR``.

Writes report.html, its figures as PNG files and report.json, and prints the main table. SWEEP_DIR is a sweep's folder,
a run's, or any above them; it is only read. A sweep that still runs is told of as far as it has come.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table as RichTable

from deq import terminal
from deq.records.errors import UserError
from deq.records.files import shown, write_atomically
from deq.report.compare import Comparison, compare
from deq.report.figures.order import figures_of
from deq.report.figures.style import SCHEMA, Figure
from deq.report.page import page
from deq.report.record import record
from deq.report.runs import read
from deq.report.script import in_the_making
from deq.report.tables import Table, Text, main_columns, text_of
from deq.terminal import MISTAKE, Parser, tell

_NARROWEST, _WIDEST = 80, 100  # columns; a narrower terminal breaks the lines itself
_MOST_TRADES = 8  # rows; the page has any number


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, compare, write, print. Returns the exit status."""
    parser = Parser(
        prog="python -m deq.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=_folder, metavar="SWEEP_DIR", help="a folder with runs at any depth below it")
    parser.add_argument("--out", type=_folder, default=None, help="folder for the report (default: SWEEP_DIR/report)")
    parser.add_argument(
        "--target",
        type=float,
        default=None,
        metavar="ACC",
        help="test accuracy, 0 to 1, that times are taken to (default: each seed's best of the baseline)",
    )
    options = parser.parse_args(arguments)
    try:
        return _report(options.folder, options.out or options.folder / "report", options.target)
    except UserError as error:
        tell(str(error))
        return MISTAKE
    except KeyboardInterrupt:
        return 130


def _folder(text: str) -> Path:
    if not text:  # a variable of the shell that is not set: Path would take it for the working folder
        raise argparse.ArgumentTypeError("must be a folder, got ''")
    return Path(text)


def _report(folder: Path, out: Path, target: float | None) -> int:
    if target is not None and not 0 < target <= 1:
        raise UserError(f"--target must be an accuracy above 0 and at most 1, got {target:g}; 95 % is 0.95")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a sweep's, such as runs/DATE/TIME_sweep")
    sweep = read(folder)
    if not sweep.runs:
        more = ""
        if sweep.unreadable:
            place, reason = sweep.unreadable[0]
            more = f" ({place}: {reason})"
        raise UserError(f"{folder} holds no run that can be read{more}; give a folder that train.py wrote under runs/")
    with in_the_making(SCHEMA) as script:
        comparison = compare(sweep, target)
        text, figures = text_of(comparison), figures_of(comparison)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for figure in figures:
                picture = out / f"{figure.key}.png"
                if isinstance(figure, Figure):
                    figure.save(picture)
                else:
                    picture.unlink(missing_ok=True)  # of an earlier report, which this one has no data for
            _write(out / "report.json", json.dumps(record(comparison, text, out), indent=2, allow_nan=False) + "\n")
            _write(out / "report.html", page(text, figures, out, script()))
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error.strerror}); give another folder with --out") from error
    _print(comparison, text, out)
    return 0


def _write(path: Path, content: str) -> None:
    write_atomically(path, lambda file: file.write(content.encode()))


def _print(comparison: Comparison, text: Text, out: Path) -> None:
    console = terminal.console(narrowest=_NARROWEST)
    if console.width > _WIDEST:
        console.width = _WIDEST
    console.print(text.headline, markup=False, style="bold")
    console.print()
    _print_table(console, main_columns(comparison))
    if text.paper is not None:
        console.print()
        _print_table(console, text.paper)
    if text.trades is not None and len(text.trades.rows) <= _MOST_TRADES:
        console.print()
        _print_table(console, replace(text.trades, note=""))
    console.print()
    for sentence in [*text.baselines, *(f"warning: {one}" for one in text.warnings)]:
        console.print(sentence, markup=False, style="yellow" if sentence.startswith("warning") else None)
    if text.gaps:
        console.print(f"missing ({len(text.gaps)}):", markup=False)
        for gap in text.gaps[:8]:
            console.print(f"  {gap.what}", markup=False)
        if len(text.gaps) > 8:
            console.print(f"  and {len(text.gaps) - 8} more, named in the report", markup=False)
    # A path is there to be copied: it is not broken to the width.
    console.print(f"report: {shown((out / 'report.html').resolve())}", markup=False, soft_wrap=True)


def _print_table(console: Console, content: Table) -> None:
    table = RichTable(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for number, column in enumerate(content.columns):
        words = number == 0 or content.title != ""
        # A number is shown whole: cut to the room that there is, it would be another number.
        figures = [line for row in content.rows for line in (row[number].text, row[number].detail or "")]
        width = None if words else max(map(len, figures), default=None)
        justify: JustifyMethod = "left" if words else "right"
        table.add_column(column, justify=justify, no_wrap=not words, overflow="fold", min_width=width)
    for row in content.rows:
        table.add_row(
            *(
                f"{escape(cell.text)}\n[dim]{escape(cell.detail)}[/dim]" if cell.detail else escape(cell.text)
                for cell in row
            )
        )
    if content.title:
        console.print(content.title, markup=False, style="bold")
    console.print(table, crop=False)
    if content.note:
        console.print(content.note, markup=False, style="dim")


if __name__ == "__main__":
    terminal.run(main)
