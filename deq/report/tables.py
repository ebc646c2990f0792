"""The report's sentences and tables, as text that neither knows the page nor the terminal."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deq.records.errors import in_yaml
from deq.records.files import shown
from deq.report.arms import FORWARD, Arm, differing, shown_knob
from deq.report.compare import (
    PAPER,
    Against,
    ArmNumbers,
    Comparison,
    Spread,
    choice_of_baseline,
    is_cifar10,
    main_baseline,
)
from deq.report.runs import Run

_IMAGES = {"cifar10": {"train": "50,000", "test": "10,000"}, "digits": {"train": "1,437", "test": "360"}}
"""Data set → its images to train on and to test on."""


@dataclass(frozen=True)
class Cell:
    """A text with a smaller one below it. ``link``: a folder."""

    text: str
    detail: str = ""
    link: Path | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under one title; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Gap:
    """Something that is missing, and the command that would provide it."""

    what: str
    command: str | None = None


@dataclass(frozen=True)
class Text:
    """Everything of the report that is written in words and numbers."""

    title: str
    headline: str
    conditions: list[tuple[str, str]]
    warnings: list[str]
    gaps: list[Gap]
    complete: str
    """What to say where nothing is missing."""
    baselines: list[str]
    main: list[Table]
    paper: Table | None
    trades: Table | None
    knobs: Table | None
    runs: Table
    common: list[str] = field(default_factory=list)


def text_of(comparison: Comparison) -> Text:
    """All sentences and tables."""
    sweep = comparison.sweep
    return Text(
        title=sweep.folder.resolve().name,
        headline=headline(comparison),
        conditions=conditions(comparison),
        warnings=warnings(comparison),
        gaps=gaps(comparison),
        complete=(
            "Nothing: every run here has finished. What else was planned, no file here tells."
            if sweep.planned is None
            else f"Nothing: all {sweep.planned} jobs that were planned have finished."
        ),
        baselines=choice_of_baseline(comparison),
        main=[*against_tables(comparison), *arm_tables(comparison)],
        paper=paper_table(comparison) if is_cifar10(comparison) else None,
        trades=trade_table(comparison),
        knobs=knob_table(comparison),
        runs=run_table(comparison),
        common=[shown_knob(name, value) for name, value in comparison.common.items() if not isinstance(value, list)],
    )


def headline(comparison: Comparison) -> str:
    """The answer in one sentence, with the baseline's name in it."""
    best = comparison.best
    if best is None:
        return "No run but those of baselines has been evaluated here, so there is no speedup to tell."
    if not best.against:
        accuracy = best.own["test_accuracy_best"]
        reached = f" reaches {percent(accuracy.median)} of the test set" if accuracy is not None else " was trained"
        return f"{best.arm.label}{reached}. There is no baseline here that it can be held against."
    against = next(iter(best.against.values()))
    aim = (
        f"the target of {percent(comparison.target)} test accuracy"
        if comparison.target is not None
        else f"the best test accuracy of “{against.baseline.label}”"
    )
    pairs = len(against.pairs)
    speedup = against.speedup
    unfinished = " so far" if best.arm.unfinished or against.baseline.unfinished else ""
    if speedup is None:
        if against.baseline_never == pairs:
            return f"“{against.baseline.label}” never reaches {aim}{unfinished}, so there is no ratio to give."
        return f"{best.arm.label} never reaches {aim}{unfinished} ({_seeds(pairs)})."
    how = f"{speedup.median:.2f}x sooner" if speedup.median >= 1 else f"later, at {speedup.median:.2f}x its speed"
    spread = f"{speedup.low:.2f}x to {speedup.high:.2f}x over {_seeds(speedup.n)}" if speedup.n > 1 else "one seed"
    rivals = sum(one.arm.solver == best.arm.solver and bool(one.arm.counted) for one in comparison.arms)
    chosen = f", fastest of {rivals} such arms," if rivals > 1 else ""
    sentence = f"{best.arm.label}{chosen} reaches {aim} {how}{unfinished} ({spread})"
    if against.compute_saved is not None:
        sentence += f", with {saved(against.compute_saved.median)}"
    if against.never:
        sentence += f"; {against.never} of {_seeds(pairs)} never reach it"
    return sentence + "."


def saved(share: float) -> str:
    return f"{percent(share, 0)} of the compute saved" if share >= 0 else f"{percent(-share, 0)} more compute"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def percent(share: float, digits: int = 2) -> str:
    """``98.89 %``."""
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Three digits or more, without an exponent where a person would not write one."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{min(digits, 4)}f}"
    return f"{value:.2e}"


def cell(spread: Spread | None, show: Callable[[float], str], none: str = "–") -> Cell:
    """Median above its range."""
    if spread is None:
        return Cell(none)
    if spread.n == 1:
        return Cell(show(spread.median))
    unit = next((unit for unit in (" %", "x") if show(spread.low).endswith(unit)), "")
    return Cell(show(spread.median), f"{show(spread.low).removesuffix(unit)} to {show(spread.high).removesuffix(unit)}")


def name_of(arm: Arm, comparison: Comparison) -> str:
    """An arm's label; baselines and arms whose runs go on are marked."""
    marks = []
    if any(arm is one for one in comparison.baselines):
        marks.append("baseline")
    if arm.unfinished:
        marks.append("unfinished")
    return f"{arm.label} ({', '.join(marks)})" if marks else arm.label


def runs_of(arm: Arm) -> Cell:
    """How many seeds the numbers are of, and of how many runs."""
    seeds, counted, every = len(arm.seeds), len(arm.counted), len(arm.runs)
    if counted == every:
        return Cell(str(seeds), f"{every} runs" if every > seeds else "")
    return Cell(str(seeds), f"{counted} of {every} runs")


def arm_tables(comparison: Comparison) -> list[Table]:
    """Every arm's own numbers: what came out and what it took, and the solves of its training steps."""

    def one_digit(value: float) -> str:
        return f"{value:.1f}"

    outcome: list[_Column] = [
        ("best test accuracy", "test_accuracy_best", percent),
        ("last test accuracy", "test_accuracy_last", percent),
        ("train accuracy, last", "train_accuracy", percent),
        ("seconds of training", "train_s", number),
    ]
    energy: list[_Column] = [
        ("TFLOP of training", "train_tflop", number),
        ("TFLOP of evaluation", "test_tflop", number),
        ("joules of training, GPU", "train_gpu_joules", number),
        ("joules of evaluation, GPU", "test_gpu_joules", number),
        ("joules of training, CPU", "train_cpu_joules", number),
        ("joules of evaluation, CPU", "test_cpu_joules", number),
        ("grams of CO2", "co2_grams", number),
    ]
    energy = [entry for entry in energy if any(one.own[entry[1]] is not None for one in comparison.arms)]
    solves: list[_Column] = [
        ("evaluations of f, forward", "forward_evaluations", one_digit),
        ("evaluations, backward", "backward_evaluations", one_digit),
        ("samples unconverged, forward", "forward_unconverged", percent),
        ("samples unconverged, backward", "backward_unconverged", percent),
        ("steps that met tol, forward", "forward_converged_steps", lambda v: percent(v, 1)),
        ("steps that met tol, backward", "backward_converged_steps", lambda v: percent(v, 1)),
    ]
    note = "Median of the runs, their range below it."
    if any(one.arm.unfinished for one in comparison.arms):
        note += " Of an unfinished arm no run has come to its end: its numbers are those so far."
    return [
        _own_table("Accuracy and time", outcome, comparison, f"{note} Accuracies are those at evaluations."),
        _own_table("Solves of training", solves, comparison, f"{note} Means over a run's training steps."),
        *([_own_table("Energy and compute of whole runs", energy, comparison, note)] if energy else []),
    ]


_Column = tuple[str, str, Callable[[float], str]]
"""Heading, name of the number, how it is shown."""


def _own_table(title: str, columns: Sequence[_Column], comparison: Comparison, note: str) -> Table:
    rows = [
        [
            Cell(name_of(one.arm, comparison)),
            runs_of(one.arm),
            *(cell(one.own[name], show) for _, name, show in columns),
        ]
        for one in comparison.arms
    ]
    return Table(title, ["arm", "seeds", *(heading for heading, *_ in columns)], rows, note)


def against_tables(comparison: Comparison) -> list[Table]:
    """One table a kind of baseline."""
    tables = []
    for kind in dict.fromkeys(kind for one in comparison.arms for kind in one.against):
        held = [(one, one.against[kind]) for one in comparison.arms if kind in one.against]
        several = len({id(against.baseline) for _, against in held}) > 1
        energy = any(against.energy_saved is not None for _, against in held)
        columns = [
            "arm",
            *(["against"] if several else []),
            "target, test accuracy",
            "baseline's seconds to it",
            "seconds to it",
            "speedup",
            "time saved",
            "compute saved",
            *(["energy saved"] if energy else []),
            "seeds that reach it",
        ]
        rows = []
        for one, against in held:
            itself = one.arm is against.baseline
            rows.append(
                [
                    Cell(name_of(one.arm, comparison)),
                    *([Cell(against.baseline.label)] if several else []),
                    cell(against.target, percent),
                    cell(against.baseline_seconds, number, "never"),
                    cell(against.seconds, number, _never(against)),
                    *(
                        Cell("1 (itself)") if itself and share is against.speedup else cell(share, show)
                        for share, show in _shares(against, energy, itself)
                    ),
                    Cell(f"{len(against.pairs) - against.never} of {len(against.pairs)}"),
                ]
            )
        names = "its baseline" if several else f"“{held[0][1].baseline.label}”"
        aim = (
            f"the target is {percent(comparison.target)}, as it was given"
            if comparison.target is not None
            else f"the target is the best test accuracy of {names} with the same seed"
        )
        note = (
            f"Paired by seed: {aim}. Seconds of training until the first evaluation at or above it; speedup: the "
            f"baseline's seconds over the arm's; compute saved: 1 − arm's TFLOP of training until then over the "
            f"baseline's. Medians and ranges are of the seeds that reach it."
        )
        counters = sorted({against.counter for _, against in held if against.counter})
        if energy:
            note += f" Energy saved: the same of the joules that the {' and '.join(counters)}'s counter measured."
        elif not comparison.measured_energy:
            note += f" Energy saved is not given: {comparison.no_joules}."
        title = f"Against {names}" if not several else f"Against {_kind(kind)}, all else equal"
        tables.append(Table(title, columns, rows, note))
    return tables


def _kind(kind: str) -> str:
    return "forward iteration" if kind == FORWARD else "forward iteration as the tutorial writes it"


def _never(against: Against) -> str:
    return "not yet" if any(not run.finished for run in against.baseline.counted) else "never"


def _shares(against: Against, energy: bool, itself: bool) -> Iterable[tuple[Spread | None, Callable[[float], str]]]:
    yield against.speedup, lambda value: f"{value:.2f}x"
    for share in (against.time_saved, against.compute_saved, *([against.energy_saved] if energy else [])):
        yield (None if itself else share), lambda value: percent(value, 0)


def paper_table(comparison: Comparison) -> Table | None:
    """The paper's figures beside those of this sweep's foremost arm."""
    best = comparison.best
    baseline = main_baseline(comparison)
    if best is None or baseline is None or "Anderson" not in best.arm.solver:
        return None
    theirs = next(one for one in comparison.arms if one.arm is baseline)
    against = next(iter(best.against.values()), None)

    def both(name: str, show: Callable[[float], str]) -> Cell:
        ours, forward = best.own[name], theirs.own[name]
        parts = [show(spread.median) if spread is not None else "–" for spread in (forward, ours)]
        return Cell(" → ".join(parts))

    def over_arms(value: Callable[[Against], Spread | None], show: Callable[[float], str]) -> Cell:
        own = value(against) if against is not None else None
        medians = [
            spread.median
            for one in comparison.arms
            if one.arm.solver == best.arm.solver
            for first in list(one.against.values())[:1]
            if (spread := value(first)) is not None
        ]
        detail = f"all arms: {show(min(medians))} to {show(max(medians))}" if len(medians) > 1 else ""
        return Cell(show(own.median) if own is not None else "no ratio", detail)

    speedup = over_arms(lambda one: one.speedup, lambda v: f"{v:.2f}x")
    compute = over_arms(lambda one: one.compute_saved, lambda v: percent(v, 0))
    rows = [
        [Cell("speedup to the baseline's accuracy"), Cell(PAPER["speedup"]), speedup],
        [Cell("compute saved"), Cell(PAPER["compute_saved"]), compute],
        [Cell("training accuracy, forward → Anderson"), Cell(PAPER["train_accuracy"]), both("train_accuracy", percent)],
        [
            Cell("test accuracy, forward → Anderson"),
            Cell(PAPER["test_accuracy"]),
            both("test_accuracy_best", percent),
        ],
        [
            Cell("training time, forward → Anderson"),
            Cell(PAPER["train_s"]),
            both("train_s", lambda v: f"{number(v)} s"),
        ],
    ]
    ours = f"this sweep: {best.arm.label}, against “{baseline.label}”"
    images = ", ".join(sorted({_images(one.arm, "train") for one in comparison.arms}))
    runs = [run for one in comparison.arms for run in one.arm.counted]
    steps = sorted({run.step for run in runs})
    epochs = sorted({run.evaluations[-1].epoch for run in runs if run.evaluations})
    note = (
        f"The paper: CIFAR-10, all 50,000 training images, one V100 (arXiv 2410.19460). This sweep: "
        f"{', '.join(sorted({run.device_name for run in runs}))}; {images} training images; {_span(steps)} steps; "
        f"{_span(epochs)} epochs. Where these differ, the figures are not of the same experiment."
    )
    return Table("The paper's table", ["claim", "paper", ours], rows, note)


def _images(arm: Arm, split: Literal["train", "test"]) -> str:
    """How many images of that split an arm took."""
    size = arm.knobs.get(f"data.{split}_size")
    if size is not None:
        return f"{size:,}" if isinstance(size, int) else str(size)
    known = _IMAGES.get(str(arm.knobs.get("data")))
    return f"all {known[split]}" if known else "all of the folder's"


def _span(values: Sequence[int]) -> str:
    if not values:
        return "no"
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def trade_table(comparison: Comparison) -> Table | None:
    """Crossover and mixing penalty of every run that has traces."""
    if not comparison.trades:
        return None
    rows = []
    for trade in comparison.trades:
        evaluations, seconds = trade.by_evaluations, trade.by_seconds
        penalty = "–"
        if trade.penalty is not None:
            penalty = f"{1e3 * trade.penalty.seconds:+.3g} ms ({100 * trade.penalty.share:+.0f} %)"
        rows.append(
            [
                Cell(trade.solver, trade.arm.label if len(comparison.arms) > 1 else ""),
                Cell(str(trade.run.seed)),
                Cell(penalty),
                Cell(f"{evaluations.residual:.1e}", f"at {evaluations.x:.3g} evaluations")
                if evaluations
                else Cell("none"),
                Cell(f"{seconds.residual:.1e}", f"at {1e3 * seconds.x:.3g} ms") if seconds else Cell("none"),
            ]
        )
    columns = ["solver", "seed", "mixing penalty an iteration", "crossover by evaluations", "crossover by time"]
    note = (
        "Against forward iteration on the same batch with the same model. Mixing penalty: median seconds of an "
        "iteration beside forward iteration's. Crossover: the mean relative residual from which on the solver stays "
        "below, and where; none: it does not, or has been below from the first on, as far as both curves go."
    )
    return Table("Crossover and mixing penalty", columns, rows, note)


def knob_table(comparison: Comparison) -> Table | None:
    """Everything that differs between the arms, a knob a column: what the labels leave out, too."""
    arms = [one.arm for one in comparison.arms]
    names = [name for name in differing(arms) if name != "solver"]
    if not names:
        return None
    rows = [
        [
            Cell(arm.label),
            *(
                Cell(in_yaml(arm.knobs[name]).strip("'"))
                if name in arm.knobs
                else Cell("as solver" if name.startswith("adjoint") else "–")
                for name in names
            ),
        ]
        for arm in arms
    ]
    return Table("What differs between the arms", ["arm", *names], rows, "–: the arm has no such knob.")


def run_table(comparison: Comparison) -> Table:
    rows = []
    arms = {id(run): one.arm for one in comparison.arms for run in one.arm.runs}
    for run in comparison.sweep.runs:
        best, train_s = run.best("test/accuracy"), run.last("time/train_s")
        steps = f"{run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
        rows.append(
            [
                Cell(run.folder.name, link=run.folder),
                Cell(arms[id(run)].label),
                Cell(str(run.seed)),
                Cell("killed?" if run.state == "running" and run.quiet_s is not None else run.state),
                Cell(steps),
                Cell(percent(best) if best is not None else "–"),
                Cell(number(train_s) if train_s is not None else "–"),
                Cell(command_of(run) or "–"),
            ]
        )
    columns = ["folder", "arm", "seed", "state", "steps", "best test accuracy", "seconds of training", "command"]
    return Table("Runs", columns, rows)


def command_of(run: Run) -> str | None:
    """The command of this job alone, where its overrides are known; else the one that was typed."""
    if run.overrides is not None:
        # An experiment that sweeps would begin its sweep.
        alone = ["hydra.mode=RUN"] if any(one.startswith("experiment=") for one in run.overrides) else []
        return shlex.join(["python", "train.py", *run.overrides, *alone])
    command = run.environment.get("command")
    return f"python {command}" if command else None


def conditions(comparison: Comparison) -> list[tuple[str, str]]:
    """What was run and where, name → text."""
    runs = comparison.sweep.runs
    arms = [one.arm for one in comparison.arms]

    def distinct(values: Iterable[Any]) -> str:
        return "; ".join(sorted({str(value) for value in values})) or "not recorded"

    def config(name: str) -> str:
        return distinct(in_yaml(run.config.get(name)).strip("'") for run in runs)

    data = sorted(
        {
            f"{arm.knobs.get('data', 'not recorded')}"
            + (f" ({arm.knobs['data.root']})" if "data.root" in arm.knobs else "")
            + f", {_images(arm, 'train')} training images, {_images(arm, 'test')} test images"
            for arm in arms
        }
    )
    sizes = ("channels", "inner")
    models = {
        f"{arm.knobs.get('model', 'not recorded')}"
        + "".join(f", {name} {arm.knobs[f'model.{name}']}" for name in sizes if f"model.{name}" in arm.knobs)
        for arm in arms
    }
    seeds = sorted({run.seed for run in runs}, key=lambda seed: (str(type(seed)), seed))
    last = [run.step for run in runs if run.finished]
    steps = f"{_span(sorted(set(last)))} a run" if last else "no run finished"
    versions = distinct(run.environment.get("code_version") or "not recorded" for run in runs)
    return [
        ("device", distinct(run.device_name for run in runs)),
        ("threads", distinct(run.machine.get("cpu_threads", "not recorded") for run in runs)),
        ("system", distinct(run.machine.get("system", "not recorded") for run in runs)),
        (
            "versions",
            f"code {versions} · torch {distinct(run.machine.get('torch', 'not recorded') for run in runs)} · "
            f"Python {distinct(run.machine.get('python', 'not recorded') for run in runs)}",
        ),
        ("data", "; ".join(data)),
        ("model", distinct(models)),
        ("steps", f"{steps}; {config('batch_size')} images a step, {config('epochs')} epochs at most"),
        ("solves", _solves(arms)),
        ("seeds", ", ".join(map(str, seeds))),
        ("precision", config("precision")),
        ("energy", _counters(comparison)),
    ]


def _solves(arms: Sequence[Arm]) -> str:
    texts = []
    for name in ("tol", "max_iter", "stop"):
        values = sorted({str(arm.knobs[f"solver.{name}"]) for arm in arms if f"solver.{name}" in arm.knobs})
        if values:
            texts.append(f"{name} {', '.join(values)}")
    return " · ".join(texts) or "not recorded"


def _counters(comparison: Comparison) -> str:
    if not comparison.measured_energy:
        return f"{comparison.no_joules}: operations of the cell (TFLOP) stand for it"
    names = {
        str(counter)
        for run in comparison.sweep.runs
        for counter in (run.environment.get("energy_counters") or ["a counter that was not recorded"])
    }
    return f"measured by {', '.join(sorted(names))}"


def warnings(comparison: Comparison) -> list[str]:
    """What makes the numbers less comparable than they look."""
    runs = comparison.sweep.runs
    told = []
    versions = {run.environment.get("code_version") for run in runs if run.environment.get("code_version")}
    if len(versions) > 1:
        told.append(f"The runs were made with different versions of the code: {', '.join(sorted(map(str, versions)))}.")
    changed = sorted(version for version in map(str, versions) if version.endswith("-dirty"))
    if changed:
        told.append(f"The code had changes that are in no commit: {', '.join(changed)}.")
    machines = {(run.device_name, run.machine.get("cpu_threads")) for run in runs if run.machine}
    if len(machines) > 1:
        names = "; ".join(sorted(f"{device}, {threads} threads" for device, threads in machines))
        told.append(f"The runs were made on different machines, so seconds are not comparable: {names}.")
    torches = {str(run.machine["torch"]) for run in runs if run.machine.get("torch")}
    if len(torches) > 1:
        told.append(f"The runs were made with different versions of torch: {', '.join(sorted(torches))}.")
    for one in comparison.arms:
        for against in one.against.values():
            unpaired = [seed for seed in one.arm.seeds if seed not in {pair.seed for pair in against.pairs}]
            if unpaired:
                told.append(
                    f"“{one.arm.label}” has no baseline run with seed {', '.join(map(str, unpaired))} "
                    f"(“{against.baseline.label}”); ratios are of the other seeds."
                )
    if len(comparison.arms) > 1 and all(len(one.arm.seeds) <= 1 for one in comparison.arms):
        told.append("Every arm has one seed, so no difference here can be told from chance.")
    for run in runs:
        told += [f"{run.folder.name}: {note}." for note in run.notes]
    return list(dict.fromkeys(told))


def gaps(comparison: Comparison) -> list[Gap]:
    """Jobs that did not begin, and runs that did not come to their end."""
    found = []
    sweep = comparison.sweep
    resumed = sweep.resumed
    for run in sweep.runs:
        if run.finished and not run.evaluations:
            found.append(Gap(f"{run.folder.name}: finished, but its metrics.jsonl holds no evaluation"))
        if run.finished or run.folder in resumed:
            continue
        steps = f"step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
        name = run.folder.name
        resume = None
        if (run.folder.parent / "sweep.json").is_file():
            resume = shlex.join(["python", "train.py", f"resume={shown(run.folder.parent.resolve())}"])
        elif (run.folder / "checkpoint.pt").is_file():
            overrides = [one for one in run.overrides or [] if not one.startswith("resume=")]
            resume = shlex.join(["python", "train.py", *overrides, f"resume={shown(run.folder.resolve())}"])
        if run.state == "running" and run.quiet_s is None:
            found.append(Gap(f"{name}: running, {steps}"))
        elif run.state == "running":
            minutes = (run.quiet_s or 0) / 60
            found.append(
                Gap(f"{name}: at {steps}, but wrote nothing for {minutes:,.0f} minutes: probably killed", resume)
            )
        elif run.state == "failed":
            found.append(
                Gap(f"{name}: failed at {steps}: {run.error or 'its error was not recorded'}", command_of(run))
            )
        else:
            found.append(Gap(f"{name}: {run.state} at {steps}", resume))
    for place in dict.fromkeys(job.sweep for job in sweep.not_begun):
        jobs = [job for job in sweep.not_begun if job.sweep == place]
        goes_on = any(
            run.state == "running" and run.quiet_s is None for run in sweep.runs if run.folder.parent == place
        )
        # What all jobs share says nothing here.
        shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
        names = [f"{job.number} ({' '.join(one for one in job.overrides if one not in shared)})" for job in jobs]
        what = f"{len(jobs)} jobs" if len(jobs) > 1 else "job"
        command = None if goes_on else shlex.join(["python", "train.py", f"resume={shown(place.resolve())}"])
        found.append(Gap(f"{what} planned, not begun{' yet' if goes_on else ''}: {', '.join(names)}", command))
    for folder, reason in sweep.unreadable:
        found.append(Gap(f"{folder.name}: {reason}; its run is in no number"))
    return found


def main_columns(comparison: Comparison) -> Table:
    """The most important numbers of every arm against its first baseline, for a terminal."""
    rows = []
    for one in comparison.arms:
        rows.append([Cell(name_of(one.arm, comparison)), *_main_cells(one)])
    columns = [
        "arm",
        "n",
        "best\ntest %",
        "train\ns",
        "f a solve\nfwd/bwd",
        "s to\ntarget",
        "speedup",
        "compute\nsaved",
    ]
    return Table("", columns, rows)


def _main_cells(one: ArmNumbers) -> list[Cell]:
    against = next(iter(one.against.values()), None)
    itself = against is not None and against.baseline is one.arm
    forward, backward = one.own["forward_evaluations"], one.own["backward_evaluations"]
    sides = [f"{spread.median:.1f}" if spread is not None else "–" for spread in (forward, backward)]
    never = f"{against.never} never" if against is not None and against.never else ""
    seconds = Cell("–")
    if against is not None:
        seconds = Cell(number(against.seconds.median), never) if against.seconds is not None else Cell(_never(against))
    shares: list[Cell] = []
    if against is None:
        shares = [Cell("–"), Cell("–")]
    elif itself:
        shares = [Cell("1"), Cell("–")]
    else:
        shares = [
            cell(against.speedup, lambda v: f"{v:.2f}x"),
            cell(against.compute_saved, lambda v: percent(v, 0)),
        ]
    return [
        Cell(str(len(one.arm.seeds))),
        cell(one.own["test_accuracy_best"], lambda v: f"{100 * v:.2f}"),
        Cell(number(one.own["train_s"].median) if one.own["train_s"] is not None else "–"),
        Cell("/".join(sides)),
        seconds,
        *shares,
    ]
