"""What the folders of a sweep hold: runs, whatever state they are in, and the jobs that have none."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deq.records import metrics, traces
from deq.records.errors import first_line
from deq.records.traces import Traces

STATES = ("finished", "running", "interrupted", "failed", "unfinished")
"""``unfinished``: a folder without ``status.json`` whose files end before the run does."""

_MEANS = ("train/", "solver/", "time/step_s")
"""What a row tells of the steps since the row before it. All else is counted since the run began, or of one moment."""

_QUIET_GAPS, _QUIET_SECONDS = 5, 600
"""A run that is said to run, but wrote nothing for so many of its usual gaps and so long, was probably killed."""


@dataclass(frozen=True)
class Evaluation:
    """The rows of a run from one evaluation to the next, as one: means over the steps between, counts at its end."""

    step: int
    epoch: int
    values: Mapping[str, float]

    def get(self, name: str) -> float | None:
        """The value of a metric, None where it was not logged or not finite.

        Raises:
            ValueError: for a name that is not in :mod:`deq.records.metrics`.
        """
        metrics.check([name])
        return self.values.get(name)


@dataclass
class Run:
    """One run folder, read as far as it can be."""

    folder: Path
    config: dict[str, Any]
    state: str
    error: str | None = None
    step: int = 0
    total_steps: int | None = None
    overrides: list[str] | None = None
    quiet_s: float | None = None
    """Seconds since a run that is said to run wrote last, where that is so long that it was probably killed."""
    environment: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    traces: Traces | None = None
    notes: list[str] = field(default_factory=list)
    """What of the folder could not be read, a sentence each."""

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def number(self) -> int | None:
        """The job's number in its sweep, None where the folder's name has none."""
        found = re.match(r"(\d+)(?:_|$)", self.folder.name)
        return int(found.group(1)) if found else None

    @property
    def machine(self) -> dict[str, Any]:
        machine = self.environment.get("machine")
        return machine if isinstance(machine, dict) else {}

    @property
    def device(self) -> str:
        """The name of the GPU, or ``CPU``."""
        gpu = self.machine.get("gpu")
        return str(gpu) if gpu and self.config.get("device") != "cpu" else "CPU"

    @property
    def device_name(self) -> str:
        """The model of the GPU or CPU that it ran on."""
        return str(self.machine.get("cpu", "CPU")) if self.device == "CPU" else self.device

    def last(self, name: str) -> float | None:
        """The metric's latest value at an evaluation."""
        values = [one.get(name) for one in self.evaluations]
        return next((value for value in reversed(values) if value is not None), None)

    def best(self, name: str) -> float | None:
        """The metric's highest value at an evaluation."""
        return max((value for one in self.evaluations if (value := one.get(name)) is not None), default=None)

    def over_run(self, name: str) -> float | None:
        """A mean over the whole run: the summary's where the run is finished, else from the rows that there are."""
        metrics.check([name])
        if self.finished and name in self.summary:
            return self.summary[name]
        return _mean_by_steps([(one.step, one.get(name)) for one in self.evaluations])

    def first_at(self, accuracy: float) -> Evaluation | None:
        """The first evaluation whose test accuracy, 0 to 1, is at least this; None if there is none."""
        for one in self.evaluations:
            reached = one.get("test/accuracy")
            if reached is not None and reached >= accuracy:
                return one
        return None


@dataclass(frozen=True)
class Job:
    """A job of a sweep that left no run."""

    sweep: Path
    number: int
    overrides: list[str]


@dataclass
class Sweep:
    """All that was found below one folder."""

    folder: Path
    runs: list[Run] = field(default_factory=list)
    not_begun: list[Job] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    """Run folders whose config cannot be read, with the reason."""
    planned: int | None = None
    """Jobs of the sweeps that were found; None where no file tells."""

    @property
    def resumed(self) -> dict[Path, Run]:
        """Folder of a run that stopped → the run here that went on from it."""
        found = {}
        for run in self.runs:
            source = run.config.get("resume")
            if source is not None:
                parts = Path(str(source)).parts  # a run folder, or a file in it
                for other in self.runs:
                    own = other.folder.resolve().parts[-2:]
                    same = own in (parts[-2:], parts[-3:-1]) or (len(parts) == 1 and own[-1:] == parts)
                    if other is not run and same:
                        found[other.folder] = run
        return found


def read(folder: Path) -> Sweep:
    """Every run at any depth below ``folder``, or in it, and what sweeps planned but did not begin.

    Files may be missing, half-written or of a run that still goes on; what cannot be read is told in the result.
    """
    sweep = Sweep(folder)
    planned: list[tuple[Path, list[Job]]] = []
    for place in _folders(folder):
        if (place / "sweep.json").is_file():
            planned.append((place, _jobs(place)))
        if _is_run(place):
            run = _run(place)
            if isinstance(run, Run):
                sweep.runs.append(run)
            else:
                sweep.unreadable.append((place, run))
    sweep.planned = sum(len(jobs) for _, jobs in planned) if planned else None
    for place, jobs in planned:
        begun = {run.number for run in sweep.runs if run.folder.parent == place}
        begun |= {int(name) for other, _ in sweep.unreadable if (name := other.name.partition("_")[0]).isdigit()}
        # Folders may have other names: what a run was given tells its job, too.
        given = [sorted(run.overrides) for run in sweep.runs if run.folder.is_relative_to(place) and run.overrides]
        sweep.not_begun += [
            job for job in jobs if job.number not in begun and not (job.overrides and sorted(job.overrides) in given)
        ]
    return sweep


def _is_run(folder: Path) -> bool:
    # W&B keeps a config.yaml of its own in the run folder: one file alone does not make a run.
    files = [(folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "status.json", "environment.json")]
    return sum(files) >= 2


def _folders(top: Path) -> Iterator[Path]:
    """``top`` and the folders below it in order of their numbers, but none inside a run."""
    for place, names, _ in os.walk(top, followlinks=False):
        here = Path(place)
        if _is_run(here):
            names.clear()
        names[:] = sorted((name for name in names if not name.startswith(".") and name != "wandb"), key=_natural)
        yield here


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts ``10_`` after ``9_``."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _jobs(folder: Path) -> list[Job]:
    content = _json_object(folder / "sweep.json")
    jobs = content.get("jobs") if content else None
    found = []
    for job in jobs if isinstance(jobs, list) else []:
        if isinstance(job, dict) and isinstance(job.get("number"), int):
            found.append(Job(folder, job["number"], _texts(job.get("overrides")) or []))
    return found


def _run(folder: Path) -> Run | str:
    """The run in a folder, or why it cannot be told what run it is."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        return f"config.yaml cannot be read ({reason})"
    if not isinstance(config, dict) or not config:
        return "config.yaml is empty"
    run = Run(folder, {str(key): value for key, value in config.items()}, "unfinished")
    run.environment = _json_object(folder / "environment.json") or {}
    rows, spoilt = _rows(folder / "metrics.jsonl")
    if spoilt:
        run.notes.append(f"{spoilt} lines of metrics.jsonl cannot be read and are left out")
    run.evaluations = _evaluations(rows)
    run.step = int(rows[-1]["step"]) if rows else 0
    summary = _json_object(folder / "summary.json")
    run.summary = {
        name: float(value) for name, value in (summary or {}).items() if name in metrics.NAMES and _is_finite(value)
    }
    _read_state(run, has_summary=summary is not None)
    if (folder / traces.FILE).is_file():
        run.traces = traces.read(folder / traces.FILE)
        if run.traces is None:
            run.notes.append("traces.json cannot be read and is left out")
    return run


def _read_state(run: Run, *, has_summary: bool) -> None:
    status = _json_object(run.folder / "status.json")
    if status is not None and status.get("state") in STATES:
        run.state = status["state"]
        run.error = str(status["error"]) if status.get("error") is not None else None
        run.overrides = _texts(status.get("overrides"))
        if isinstance(status.get("step"), int):
            run.step = max(run.step, status["step"])
        if isinstance(status.get("total_steps"), int):
            run.total_steps = status["total_steps"]
        if run.state == "running":
            run.quiet_s = _quiet(run)
        return
    # Folders of earlier versions: a run that came to its end has a summary, and its last row is the last evaluation.
    max_steps, epochs = run.config.get("max_steps"), run.config.get("epochs")
    last = run.evaluations[-1] if run.evaluations else None
    at_end = last is not None and last.step >= run.step
    if last is not None and at_end and has_summary:
        by_steps = isinstance(max_steps, int) and last.step >= max_steps
        if by_steps or (isinstance(epochs, int) and last.epoch >= epochs):
            run.state = "finished"
    if isinstance(max_steps, int):
        run.total_steps = max_steps


def _quiet(run: Run) -> float | None:
    try:
        written = max((run.folder / name).stat().st_mtime for name in ("metrics.jsonl", "status.json"))
    except OSError:
        return None
    elapsed = [value for one in run.evaluations if (value := one.get("time/elapsed_s")) is not None]
    gap = max((b - a for a, b in zip([0.0, *elapsed], elapsed, strict=False)), default=0.0)
    quiet = time.time() - written
    return quiet if quiet > max(_QUIET_GAPS * gap, _QUIET_SECONDS) else None


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl in the order of their steps, and how many lines before the last are no rows.

    The last line may be half-written: by a run that is just writing it, or one that was killed while it did.
    """
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        return [], 0
    rows: list[dict[str, Any]] = []
    spoilt = 0
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            while rows and rows[-1]["step"] >= row["step"]:  # written again by a run that went on from before it
                rows.pop()
            rows.append(row)
        elif line.strip() and index < len(lines) - 1:
            spoilt += 1
    return rows, spoilt


def _evaluations(rows: list[dict[str, Any]]) -> list[Evaluation]:
    found: list[Evaluation] = []
    since: list[dict[str, Any]] = []
    for row in rows:
        since.append(row)
        if "test/accuracy" not in row:
            continue
        values = {}
        begin = found[-1].step if found else 0
        for name in row:
            if name not in metrics.NAMES:
                continue
            if name.startswith(_MEANS):
                steps = [begin, *(one["step"] for one in since)]
                parts = [(one["step"] - before, one.get(name)) for one, before in zip(since, steps, strict=False)]
                value = _weighted(parts)
            else:
                value = row[name]
            if _is_finite(value):
                values[name] = float(value)
        found.append(Evaluation(row["step"], int(row.get("epoch") or 0), values))
        since = []
    return found


def _mean_by_steps(values: list[tuple[int, float | None]]) -> float | None:
    """Mean of what was measured over the steps up to each given one."""
    steps = [0, *(step for step, _ in values)]
    return _weighted([(step - before, value) for (step, value), before in zip(values, steps, strict=False)])


def _weighted(parts: list[tuple[int, Any]]) -> float | None:
    """None if a part is not finite: the mean over the others would be a better one than what happened."""
    total = sum(weight for weight, _ in parts)
    known = [(weight, value) for weight, value in parts if _is_finite(value)]
    if len(known) < len(parts) or not total:
        return None
    return sum(weight * value for weight, value in known) / total


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _texts(content: Any) -> list[str] | None:
    return [str(one) for one in content] if isinstance(content, list) else None


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def now() -> str:
    """This moment, UTC, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
