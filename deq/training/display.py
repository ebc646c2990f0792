"""What a person sees of a run: a live bar on a terminal, one plain line an epoch, a short table at the end."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import fields

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deq.measure.probe import Comparison, Reading
from deq.models.tutorial import TutorialSolver
from deq.solvers import Solver
from deq.terminal import console

# Heading, width, metric, how it is shown. All in all under 80 columns.
_COLUMNS = (
    ("loss", 8, "train/loss", "{:.4f}"),
    ("train %", 8, "train/accuracy", "{:.2%}"),
    ("test %", 8, "test/accuracy", "{:.2%}"),
    ("f fwd", 7, "solver/forward_evaluations", "{:.1f}"),
    ("f bwd", 7, "solver/backward_evaluations", "{:.1f}"),
    ("unconv %", 9, "solver/unconverged_fraction", "{:.2%}"),
    ("speedup", 9, "speedup/solver", "{:.2f}x"),
    ("seconds", 9, "time/elapsed_s", "{:.1f}"),
)


_TABLE = 60  # columns that the closing table needs


class Display:
    """Everything a run prints. Lines go to standard output, warnings to standard error."""

    def __init__(self) -> None:
        self._out = console()
        self._err = console(stderr=True)
        self._progress: Progress | None = None

    def warn(self, sentence: str) -> None:
        """One sentence, on a line of its own."""
        where = self._progress.console if self._progress is not None else self._err
        where.print(f"warning: {sentence}", markup=False, style="yellow", soft_wrap=True)

    def say(self, sentence: str) -> None:
        self._out.print(sentence, markup=False, soft_wrap=True)

    def start(self, total_steps: int, done: int) -> None:
        """Print the heading of the epoch lines, and on a terminal begin the bar."""
        self._epochs_heading()
        if self._out.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._out,
                transient=True,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=done)
            self._progress.start()

    def doing(self, what: str) -> None:
        """Name what runs now, beside the bar."""
        if self._progress is not None:
            self._progress.update(self._task, description=what)

    def step(self, done: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def epoch(self, number: float, of: int, values: Mapping[str, float]) -> None:
        """One line: means over the epoch's steps, and what its evaluation and probe gave.

        number: epochs done, not whole for an evaluation within one.
        """
        cells = [f"{f'{number:.3g}/{of}':>7}"]
        for _, width, name, form in _COLUMNS:
            value = values.get(name)
            cells.append(f"{'-' if value is None else form.format(value).rstrip('%'):>{width}}")
        self.say("".join(cells))

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _epochs_heading(self) -> None:
        heading = f"{'epoch':>7}" + "".join(f"{name:>{width}}" for name, width, *_ in _COLUMNS)
        self._out.print(heading, markup=False, style="bold", soft_wrap=True)

    def table(self, summary: Mapping[str, float], comparison: Comparison | None, notes: Mapping[str, str]) -> None:
        """The closing table. ``notes``: lines below it, name → text."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")

        def percent(name: str, digits: int = 2) -> str:
            return f"{summary[name]:.{digits}%}".replace("%", " %") if name in summary else "none"

        def number(name: str) -> str:
            return f"{summary[name]:.1f}" if name in summary else "none"

        table.add_row("accuracy", f"test {percent('test/accuracy')} · train {percent('train/accuracy')}")
        more = "evaluation and probe" if comparison is not None else "evaluation"
        seconds = f"{number('time/train_s')} s training · {number('time/elapsed_s')} s with {more}"
        table.add_row("time", seconds)
        table.add_row(
            "evaluations of f",
            f"forward {number('solver/forward_evaluations')} · backward {number('solver/backward_evaluations')} "
            f"a solve, mean",
        )
        sides = ("forward", "backward")
        # A last batch that is smaller than the others moves the mean over samples a little.
        if any(
            summary.get(f"solver/{s}_sample_evaluations", 0) < 0.95 * summary.get(f"solver/{s}_evaluations", 0)
            for s in sides
        ):
            each = " · ".join(f"{side} {number(f'solver/{side}_sample_evaluations')}" for side in sides)
            table.add_row("  of each sample", f"{each} a solve, mean")
        table.add_row(
            "unconverged",
            f"forward {percent('solver/forward_unconverged_fraction')} · "
            f"backward {percent('solver/backward_unconverged_fraction')} of samples",
        )
        table.add_row(
            "solves that met tol",
            f"forward {percent('solver/forward_converged_steps', 1)} · "
            f"backward {percent('solver/backward_converged_steps', 1)} of steps",
        )
        for counter in ("gpu", "cpu"):
            if f"energy/{counter}_joules" in summary:
                train, test = (summary[f"energy/{phase}_{counter}_joules"] for phase in ("train", "test"))
                table.add_row(
                    f"{counter.upper()} energy", f"{train:,.0f} J training · {test:,.0f} J evaluation, measured"
                )
        if "energy/co2_grams" in summary:
            table.add_row("CO2", f"{summary['energy/co2_grams']:.3g} g at the grid intensity given")
        if "energy/train_tflop" in summary:
            train, test = summary["energy/train_tflop"], summary["energy/test_tflop"]
            table.add_row("TFLOP of the cell", f"{train:.3g} training · {test:.3g} evaluation, computed")
        if comparison is not None:
            table.add_row("speedup probe", _verdict(comparison))
            table.add_row("  forward iteration", _reading(comparison.forward))
            table.add_row("  this run's solver", _reading(comparison.solver))
        if "crossover/mixing_penalty" in summary:
            table.add_row("crossover", _crossover(summary))
        self._out.print()
        console(narrowest=_TABLE).print(table)
        for name, text in notes.items():
            # Not in the table, which would break a path to its width: these are there to be copied.
            self.say(f"{name:<20} {text}")


def _crossover(summary: Mapping[str, float]) -> str:
    penalty = f"mixing penalty {summary['crossover/mixing_penalty_s'] * 1e3:+.2g} ms an iteration"
    share = f"({summary['crossover/mixing_penalty']:+.0%})"
    at = summary.get("crossover/residual")
    return f"{penalty} {share}" + ("" if at is None else f" · ahead below {at:.1e}")


def _verdict(comparison: Comparison) -> str:
    metrics = comparison.metrics()
    if "speedup/solver" not in metrics:
        return "no ratio: not both solves reached tol"
    return f"{metrics['speedup/solver']:.2f}x in time · {metrics['speedup/evaluations']:.2f}x in evaluations of f"


def _reading(reading: Reading) -> str:
    if reading.seconds is None:
        return f"not converged (residual {reading.residual:.1e} after {reading.evaluations} evaluations)"
    spread = "" if reading.spread is None else " ({:.1f} to {:.1f})".format(*(edge * 1e3 for edge in reading.spread))
    return f"{reading.evaluations} evaluations · {reading.seconds * 1e3:.1f} ms{spread}"


def described(solver: Solver) -> str:
    """The solver in at most 80 columns a line: what is usually set, and what else is not at its default."""
    knobs = [
        f"{field.name}={getattr(solver, field.name)}"
        for field in fields(solver)
        if not (isinstance(solver, TutorialSolver) and field.name == "stop")  # it has no meaning there
        and (field.name in _USUAL_KNOBS or getattr(solver, field.name) != field.default)
    ]
    return textwrap.fill(f"{type(solver).__name__}: {' '.join(knobs)}", 80, subsequent_indent="  ")


_USUAL_KNOBS = ("window", "beta", "tol", "max_iter", "stop")
