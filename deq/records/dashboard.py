"""The Weights & Biases workspace in code: ``python -m deq.records.dashboard --project NAME``.

One workspace for runs of every kind: what was gained and when, why, and at what cost. :data:`SECTIONS` is the whole
of it. A panel appears only if some run of the project has logged what it draws, so that none is empty; in particular
nothing measured in joules is shown where no counter has measured any. ``--dry-run`` prints it without W&B.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast

from deq import terminal
from deq.records import metrics
from deq.records.errors import UserError, first_line
from deq.records.waiting import Result, within
from deq.terminal import Parser, end

if TYPE_CHECKING:  # wandb-workspaces is an extra, and slow to import: build functions import it when they need it
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2.interface import PanelTypes

NAME = "Anderson DEQ"
"""Of the workspace, in W&B's list of views."""

GROUPED_BY = ("solver._target_", "arm")
"""Config keys by which runs are grouped, outermost first: a line is all that was set but the seed."""

COLUMNS = (
    "test/accuracy",
    "time/train_s",
    "solver/forward_evaluations",
    "solver/backward_evaluations",
    "solver/unconverged_fraction",
    "speedup/solver",
    "energy/tflop",
    "memory/peak_bytes",
)
"""Values at a run's end that stand beside its name in the list of runs."""

TRACES = {key: key.rpartition("_")[2] for key in metrics.CHARTS}
"""Custom charts that a run logs (``wandb.plot.line_series``): key → what its x axis counts."""

MEASURED = frozenset(name for name in metrics.NAMES if name.endswith("_joules") or name == "energy/co2_grams")
"""Names that exist only where the machine has a counter of energy."""

OPTIONAL = MEASURED | {"train/jacobian_penalty", "train/correction_loss", "crossover/residual"}
"""Names that a run with the default configuration may lack: no counter, one loss alone, no crossing."""

_LONGEST = 86_400  # seconds that W&B may be given, a day
_RUNS_ASKED = 500  # newest runs whose names are asked for; with more, older ones can only add what all of these lack


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: for people.
        y: metric names that it draws; of a ``chart`` the key of the custom chart.
        unit: label of the y axis (of a bar's length).
        x: metric name of the x axis, or W&B's ``Step``; bars and charts do not look at it.
        kind: ``line`` draws what was logged along the run, ``bar`` and ``scatter`` the values at a run's end, ``chart``
            a custom chart that the run has logged.
        log: logarithmic y axis.
    """

    title: str
    y: tuple[str, ...]
    unit: str
    x: str = "Step"
    kind: Literal["line", "bar", "scatter", "chart"] = "line"
    log: bool = False

    def reduced_to(self, logged: Collection[str]) -> Panel | None:
        """The panel with those of its metrics that were logged; None if it would be empty."""
        if self.x != "Step" and self.x not in logged:
            return None
        y = tuple(name for name in self.y if (_table(name) if self.kind == "chart" else name) in logged)
        return replace(self, y=y) if y else None

    def build(self) -> PanelTypes:
        """It as wandb-workspaces has it."""
        from wandb_workspaces.reports.v2 import interface as wr

        if self.kind == "chart":
            return _custom_chart(self)
        if self.kind == "bar":
            return wr.BarPlot(title=self.title, metrics=list(self.y), title_x=self.unit, groupby_aggfunc="mean")
        if self.kind == "scatter":
            (y,) = self.y
            return wr.ScatterPlot(title=self.title, x=wr.SummaryMetric(self.x), y=wr.SummaryMetric(y), log_y=self.log)
        return wr.LinePlot(
            title=self.title,
            x=self.x,
            y=list(self.y),
            title_x=_AXES[self.x],
            title_y=self.unit,
            log_y=self.log,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )


@dataclass(frozen=True)
class Section:
    """Panels in rows of ``columns``."""

    name: str
    columns: int
    panels: tuple[Panel, ...]


_SECONDS = "time/train_s"

_AXES = {
    "Step": "training steps",
    _SECONDS: "seconds of training",
    "energy/tflop": "1e12 operations, computed",
    "energy/gpu_joules": "joules, measured by the GPU",
    "energy/cpu_joules": "joules, measured by the CPUs",
}
"""x axis → its label."""


def _energy_of(chip: str, plural: str) -> tuple[Panel, ...]:
    total = f"energy/{chip}_joules"
    names = tuple(f"energy/{part}_{chip}_joules" for part in ("train", "test"))
    return (
        Panel(f"Energy of the {plural} (measured)", (total, *names), "joules since training began"),
        Panel(f"Energy of the {plural} an epoch (measured)", (f"energy/epoch_{chip}_joules",), "joules"),
        Panel(f"Test accuracy against energy of the {plural}", ("test/accuracy",), "share of test images", x=total),
    )


# Every name of deq.records.metrics.NAMES that a run can log is on one of these; the tests see to it.
SECTIONS = (
    Section(
        "Accuracy against time",
        3,
        (
            Panel("Test accuracy against time", ("test/accuracy",), "share of test images", x=_SECONDS),
            Panel("Training accuracy against time", ("train/accuracy",), "share of training images", x=_SECONDS),
            Panel("Test loss against time", ("test/loss",), "nats a sample", x=_SECONDS),
            Panel("Test accuracy against steps", ("test/accuracy",), "share of test images"),
            Panel("Training accuracy against steps", ("train/accuracy",), "share of training images"),
            Panel("Test loss against steps", ("test/loss",), "nats a sample"),
            Panel("Training loss against time", ("train/loss",), "nats a sample", x=_SECONDS),
            Panel("Training loss against steps", ("train/loss",), "nats a sample"),
            Panel("Learning rate", ("optim/learning_rate",), "learning rate"),
            Panel("Jacobian penalty", ("train/jacobian_penalty",), "squared Frobenius norm over d"),
            Panel("Loss at iterates on the way", ("train/correction_loss",), "nats a sample"),
        ),
    ),
    Section(
        "Convergence",
        2,  # forward solves on the left, backward solves on the right
        (
            *(
                Panel(f"Residual of one solve against {axis}", (key,), "log10 of the relative residual", kind="chart")
                for key, axis in TRACES.items()
            ),
            Panel("Evaluations a forward solve", ("solver/forward_evaluations",), "evaluations of f"),
            Panel("Evaluations a backward solve", ("solver/backward_evaluations",), "products with the Jacobian"),
            Panel("Evaluations a sample, forward", ("solver/forward_sample_evaluations",), "evaluations of f"),
            Panel("Evaluations a sample, backward", ("solver/backward_sample_evaluations",), "products"),
            Panel("Residual of the equilibrium", ("solver/forward_residual",), "relative residual", log=True),
            Panel("Residual of the adjoint", ("solver/backward_residual",), "relative residual", log=True),
            Panel("Unconverged, forward", ("solver/forward_unconverged_fraction",), "share of samples"),
            Panel("Unconverged, backward", ("solver/backward_unconverged_fraction",), "share of samples"),
            Panel("Forward solves that met the tolerance", ("solver/forward_converged_steps",), "share of steps"),
            Panel("Backward solves that met the tolerance", ("solver/backward_converged_steps",), "share of steps"),
            Panel("Unconverged, both solves", ("solver/unconverged_fraction",), "share of samples"),
            Panel(
                "Test accuracy over evaluations a forward solve",
                ("test/accuracy",),
                "share of test images",
                x="solver/forward_evaluations",
                kind="scatter",
            ),
        ),
    ),
    Section(
        "Speedup",
        3,
        (
            Panel("Speedup in seconds over forward iteration", ("speedup/solver",), "times", kind="bar"),
            Panel("Speedup in evaluations over forward iteration", ("speedup/evaluations",), "times", kind="bar"),
            Panel("Speedup while training goes on", ("speedup/solver", "speedup/evaluations"), "times"),
            Panel(
                "Evaluations: forward iteration, this run's solver",
                ("speedup/forward_evaluations", "speedup/solver_evaluations"),
                "evaluations of f to the same residual",
            ),
            Panel(
                "Seconds: forward iteration, this run's solver",
                ("speedup/forward_s", "speedup/solver_s"),
                "seconds to the same residual",
            ),
            Panel(
                "Residual reached: forward iteration, this run's solver",
                ("speedup/forward_residual", "speedup/solver_residual"),
                "relative residual",
                log=True,
            ),
            Panel(
                "Mixing penalty", ("crossover/mixing_penalty",), "share of a forward iteration's seconds", kind="bar"
            ),
            Panel("Mixing penalty in seconds", ("crossover/mixing_penalty_s",), "seconds an iteration", kind="bar"),
            Panel("Ahead in seconds below", ("crossover/residual",), "relative residual", kind="bar"),
        ),
    ),
    Section(
        "Energy",
        3,
        (
            Panel(
                "Operations (a proxy, computed)",
                ("energy/tflop", "energy/train_tflop", "energy/test_tflop"),
                "1e12 operations since training began",
            ),
            Panel("Test accuracy against operations", ("test/accuracy",), "share of test images", x="energy/tflop"),
            Panel("Operations of the whole run (a proxy, computed)", ("energy/tflop",), "1e12 operations", kind="bar"),
            *_energy_of("gpu", "GPU"),
            *_energy_of("cpu", "CPUs"),
            Panel("Carbon dioxide of the measured energy", ("energy/co2_grams",), "grams of CO2 since training began"),
        ),
    ),
    Section(
        "Memory",
        3,
        (
            Panel("Peak memory", ("memory/peak_bytes",), "bytes"),
            Panel("Time a training step", ("time/step_s",), "seconds"),
            Panel(
                "Where the time goes: training, evaluation, everything",
                ("time/train_s", "time/test_s", "time/elapsed_s"),
                "seconds since training began",
            ),
        ),
    ),
)


def default_names() -> frozenset[str]:
    """What a run with the default configuration logs on a machine without an energy counter."""
    return frozenset(metrics.NAMES.keys() - OPTIONAL) | {_table(key) for key in TRACES}


def sections(logged: Collection[str] | None = None) -> tuple[Section, ...]:
    """:data:`SECTIONS` without what would be empty.

    Args:
        logged: names in the history or the summary of some run of the project; None takes :func:`default_names`.
    """
    names = default_names() if logged is None else logged
    reduced = (
        replace(section, panels=tuple(filter(None, (panel.reduced_to(names) for panel in section.panels))))
        for section in SECTIONS
    )
    return tuple(section for section in reduced if section.panels)


def workspace(entity: str, project: str, logged: Collection[str] | None = None) -> ws.Workspace:
    """The workspace, not saved yet; nothing here needs the network.

    Args:
        entity: W&B user or team. project: W&B project.
        logged: names in the history or the summary of some run of the project; None takes :func:`default_names`.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            f"the dashboard needs wandb-workspaces ({first_line(error)}); install it: pip install -e '.[dashboard]'"
        ) from error
    names = default_names() if logged is None else logged
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(
                name=section.name,
                is_open=True,
                panels=[panel.build() for panel in section.panels],
                # As many rows as it takes: a section then has one page, and nothing hides on a second.
                layout_settings=ws.SectionLayoutSettings(
                    columns=section.columns, rows=-(-len(section.panels) // section.columns)
                ),
            )
            for section in sections(logged)
        ],
        # Smoothing would bend what is read here: where a curve starts, and how far solvers are apart.
        settings=ws.WorkspaceSettings(x_axis="Step", smoothing_type="none", smoothing_weight=0, max_runs=20),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(key) for key in GROUPED_BY],
            pinned_columns=["run:displayName", *(f"summary:{name}" for name in COLUMNS if name in names)],
        ),
    )


def tree(logged: Collection[str] | None = None) -> str:
    """The sections and panels as text, and what is left out of them."""
    shown = sections(logged)
    lines = [f"{NAME}: runs grouped by {', '.join(GROUPED_BY)}"]
    for section in shown:
        lines += ["", f"{section.name} ({section.columns} columns)", *map(_line, section.panels)]
    drawn = {(section.name, panel.title) for section in shown for panel in section.panels}
    left_out = [panel for section in SECTIONS for panel in section.panels if (section.name, panel.title) not in drawn]
    if left_out:
        lines += ["", "Left out unless some run has logged them", *map(_line, left_out)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake, or a W&B out of reach, ends in one sentence and exit status 2."""
    parser = Parser(prog="python -m deq.records.dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("--project", required=True, help="W&B project, as in logger.project")
    parser.add_argument("--entity", help="W&B user or team; your default one if left out")
    parser.add_argument("--dry-run", action="store_true", help="print sections and panels; no network, no login")
    parser.add_argument("--timeout", type=float, default=30, help="seconds that W&B may take in all (30)")
    options = parser.parse_args(arguments)
    try:
        if not 1 <= options.timeout <= _LONGEST:
            raise UserError(f"--timeout must be from 1 to {_LONGEST}, in seconds, got {options.timeout:g}")
        print(tree() if options.dry_run else publish(options.project, options.entity, options.timeout))
    except UserError as error:
        end(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def publish(project: str, entity: str | None, timeout: float) -> str:
    """Ask W&B what the project's runs have logged, save the workspace as a new view, and return its address.

    Args:
        project: W&B project. entity: user or team; None is the user's default one.
        timeout: seconds for everything that needs the network.

    Raises:
        UserError: not logged in, no answer, no such project, no runs, wandb-workspaces not installed.
    """
    workspace("", project)  # whether it can be built, before anything is asked
    # This program's output is one line; W&B's own lines about credentials and saved views would stand around it.
    os.environ.setdefault("WANDB_SILENT", "true")

    def ask() -> tuple[str, set[str]]:
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError("not logged in to W&B; run `wandb login` once, or look at the panels with --dry-run")
        api = wandb.Api(timeout=max(1, int(timeout)))
        owner = entity or api.default_entity
        if not owner:
            raise UserError("W&B names no default entity for this user; give --entity NAME")
        return owner, _logged(api, owner, project)

    owner, names = _within(timeout, ask)
    built = workspace(owner, project, names)
    return _within(timeout, lambda: str(built.save().url))


def _logged(api: Any, entity: str, project: str) -> set[str]:
    """Names in the histories and summaries of the project's newest runs."""
    names: set[str] = set()
    try:
        # Not lazy: a lazy run asks for its names in a request of its own.
        for run in islice(api.runs(f"{entity}/{project}", order="-created_at", lazy=False, per_page=100), _RUNS_ASKED):
            names |= ((run.history_keys or {}).get("keys") or {}).keys() | run.summary_metrics.keys()
    except ValueError as error:  # what wandb raises for a project that is not there
        raise UserError(
            f"W&B has no project {entity}/{project} ({first_line(error)}); upload a run first: wandb sync RUN_FOLDER"
        ) from error
    if not sections(names):
        raise UserError(
            f"no run of {entity}/{project} has logged anything that is on a panel; train with logger.project={project}"
        )
    return names


def _within(timeout: float, call: Callable[[], Result]) -> Result:
    """The call's result.

    Raises:
        UserError: the call's own, or one about whatever W&B raised, or that it took longer than ``timeout`` seconds.
    """
    result, error = within(timeout, call, "wandb-dashboard")
    if error is None:
        return cast("Result", result)
    if isinstance(error, UserError):
        raise error
    raise UserError(
        f"W&B failed ({first_line(error)}); look at the network and WANDB_BASE_URL, log in with `wandb login`, and try "
        "again"
    ) from error


def _custom_chart(panel: Panel) -> PanelTypes:
    """The picture that ``wandb.plot.line_series`` makes of the table which it logs beside it."""
    from wandb_workspaces.reports.v2 import interface as wr

    (key,) = panel.y
    return wr.CustomChart(
        query={"id": {}, "name": {}, "summaryTable": {"tableKey": _table(key)}},
        chart_name="wandb/lineseries/v0",
        chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        chart_strings={"title": panel.title, "xname": TRACES[key]},
    )


def _table(key: str) -> str:
    """The name under which W&B keeps the table of a custom chart."""
    return f"{key}_table"


def _line(panel: Panel) -> str:
    against = {"line": f" against {panel.x}", "scatter": f" against {panel.x}"}.get(panel.kind, "")
    return f"  {panel.kind:7} {panel.title}: {', '.join(panel.y)}{against}"


if __name__ == "__main__":
    terminal.run(main)
