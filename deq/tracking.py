"""Where results go: files in the run folder, always; Weights & Biases beside them, as long as it works."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf

from deq import crossover, metrics
from deq.crossover import Trace
from deq.errors import UserError, first_line, in_yaml, room_for
from deq.files import shown, write_atomically
from deq.machine import code_version, processor_name

Result = TypeVar("Result")
Row = dict[str, float]
STATUS = "status.json"
_NOT_OF_THE_ARM = ("seed=", "logger", "hydra.", "resume=", "experiment=", "device=")
"""Overrides that do not tell an arm of an experiment from another."""

_MODES = ("auto", "online", "offline", "disabled")
_WANDB_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What W&B takes in WANDB_MODE → what that is here."""


@dataclass(frozen=True)
class WandbOptions:
    """How a run appears in W&B; see ``conf/logger/wandb.yaml``.

    Args:
        project: W&B project.
        mode: auto (online for a user who is logged in, else offline), online, offline or disabled; the environment
            variable WANDB_MODE goes before ``auto``.
        group: W&B group; None takes the sweep's folder in a multirun.
        name: W&B's display name; None takes the run folder's name.
        tags: W&B tags, beside those of the run.
        timeout: seconds that any one call to W&B may take, at least 1.
    """

    project: str = "anderson-deq"
    mode: str = "auto"
    group: str | None = None
    name: str | None = None
    tags: Sequence[str] = ()
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise UserError(f"logger.mode must be one of {', '.join(_MODES)}, got {in_yaml(self.mode)}")
        timeout = self.timeout
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 1:
            raise UserError(f"logger.timeout must be a number of at least 1, in seconds, got {in_yaml(timeout)}")
        if not isinstance(self.project, str) or not self.project:
            raise UserError(f"logger.project must be a text, such as anderson-deq, got {in_yaml(self.project)}")
        for knob in ("group", "name"):
            value = getattr(self, knob)
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"logger.{knob} must be a text or null, got {in_yaml(value)}; quote it: logger.{knob}='\"{value}\"'"
                )
        if isinstance(self.tags, str) or not isinstance(self.tags, Sequence):
            raise UserError(f"logger.tags must be a list, such as [first,second], got {in_yaml(self.tags)}")


class Tracker:
    """Writes the files of a run's folder, and feeds W&B if asked to.

    They are ``config.yaml``, ``environment.json``, ``status.json``, ``metrics.jsonl``, ``traces.json`` and
    ``summary.json``.

    Args:
        folder: the run folder; made if it is missing.
        config: the resolved configuration.
        warn: shows one sentence to the user.
        options: W&B's; mode ``disabled`` leaves the files alone.
        group, tags: of this run, for W&B.
        anew: whether the folder's rows, if there are any, are of a run that nothing is left of.
        overrides: what the user set, KNOB=VALUE, for ``status.json``.
        counters: the energy counters that are read, for ``environment.json``.

    Only files that cannot be written reach the caller, as UserError; anything that W&B does wrong becomes one warning,
    and the run goes on.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        *,
        warn: Callable[[str], None],
        options: WandbOptions,
        group: str | None = None,
        tags: tuple[str, ...] = (),
        overrides: Sequence[str] = (),
        counters: Sequence[str] = (),
        anew: bool = False,
    ) -> None:
        self.folder = folder
        self._status: dict[str, Any] = {"state": "running", "began": _now(), "ended": None, "error": None}
        self._overrides = list(overrides)
        self.rows: list[Row] = []
        about = environment() | {"energy_counters": list(counters)}
        _write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        _write_text(folder / "environment.json", json.dumps(about, indent=2))
        with room_for(folder):
            # Rows that are there stay until restore() has theirs: a run may go on in its own folder, or be refused.
            (folder / "metrics.jsonl").touch()
            if anew:
                (folder / "metrics.jsonl").write_text("")  # of a run that was killed before its first checkpoint
        if not anew:
            _set_aside(folder / "wandb")
        mode = _wanted_mode(options, warn)
        self._wandb = None
        if mode != "disabled":
            arm = " ".join(one for one in overrides if not one.startswith(_NOT_OF_THE_ARM))
            self._wandb = _Wandb(
                options, mode, folder, {**config, **about, "arm": arm}, group=group, tags=tags, warn=warn
            )

    def restore(self, rows: list[Row]) -> None:
        """Begin with the rows of the run that is resumed, so that file and charts are whole."""
        self.rows = [dict(row) for row in rows]
        self._write_rows()
        if self._wandb is not None:
            for row in self.rows:
                self._wandb.log(row)

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Add a row. ``epoch`` counts from 1, ``step`` from 1 over the whole run.

        Raises:
            ValueError: for a name that is not in :mod:`deq.metrics`.
        """
        metrics.check(values)
        row: Row = {"step": step, "epoch": epoch, **values}
        self.rows.append(row)
        path = self.folder / "metrics.jsonl"
        with room_for(path), path.open("a", encoding="utf-8") as file:
            file.write(_json(row) + "\n")
        if self._wandb is not None:
            self._wandb.log(row)

    def status(self, state: str, step: int, total_steps: int) -> None:
        """Write ``status.json``: whether the run goes on and how far it has come, for whoever looks from outside."""
        self._status |= {"state": state, "step": step, "total_steps": total_steps}
        content = self._status | {"overrides": self._overrides}
        _write_text(self.folder / STATUS, json.dumps(content, indent=2) + "\n")

    def traces(self, traces: Sequence[Trace], about: Mapping[str, Any]) -> None:
        """Write ``traces.json``, and draw the residuals as W&B charts."""
        with room_for(self.folder / crossover.FILE):
            crossover.save(self.folder, traces, about)
        if self._wandb is not None:
            for against in ("evaluations", "seconds"):
                name = f"traces/residual_against_{against}"
                metrics.check_charts([name])
                self._wandb.chart(name, traces, against)

    def finish(self, summary: Mapping[str, float], *, state: str = "finished", error: str | None = None) -> None:
        """Write ``summary.json``, one flat object, and close the W&B run.

        Args:
            summary: metric name -> value.
            state: finished, failed or interrupted. error: why it failed, in a sentence.

        Raises:
            ValueError: for a name that is not in :mod:`deq.metrics`.
        """
        metrics.check(summary)
        failed = state != "finished"
        try:
            _write_text(self.folder / "summary.json", _json(summary, indent=2) + "\n")
            if "total_steps" in self._status:  # last: what says finished is so
                self._status |= {"ended": _now(), "error": error}
                self.status(state, self._status["step"], self._status["total_steps"])
        finally:
            if self._wandb is not None:
                self._wandb.finish(summary, failed)

    @property
    def wandb_note(self) -> str | None:
        """For the closing table: where W&B has the run; None if it has not."""
        return self._wandb.note if self._wandb is not None else None

    def _write_rows(self) -> None:
        _write_text(self.folder / "metrics.jsonl", "".join(_json(row) + "\n" for row in self.rows))


def _wanted_mode(options: WandbOptions, warn: Callable[[str], None]) -> str:
    """One of :data:`_MODES`: the knob's, and where that is auto, WANDB_MODE's."""
    variable = os.environ.get("WANDB_MODE")
    if variable is None or not variable.strip():
        os.environ.pop("WANDB_MODE", None)
        return options.mode
    known = _WANDB_MODES.get(variable.strip().lower())
    if known is None and options.mode == "auto":
        warn(f"WANDB_MODE must be online, offline or disabled, got {variable!r}; this run is kept offline")
    if variable not in _WANDB_MODES:
        # W&B does not start where the variable holds what it does not know, even if it is told the mode.
        os.environ["WANDB_MODE"] = known or "offline"
    return (known or "offline") if options.mode == "auto" else options.mode


class _Wandb:
    """A W&B run that gives up, with one warning, at the first thing that goes wrong."""

    def __init__(
        self,
        options: WandbOptions,
        wanted: str,
        folder: Path,
        config: dict[str, Any],
        *,
        group: str | None,
        tags: tuple[str, ...],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._timeout = options.timeout
        self._run: Any = None
        self.note: str | None = None

        def start() -> tuple[Any, str]:
            import wandb  # here, since it is slow to import and need not be installed

            mode = "offline"
            if wanted != "offline" and wandb.login(prompt=False, verify=False):
                mode = "online"
            elif wanted == "online":
                warn("W&B: online needs a login (run `wandb login` once); this run is kept offline")
            run = wandb.init(
                project=options.project,
                name=options.name or folder.name,
                group=options.group or group,
                tags=sorted({*map(str, options.tags), *tags}),
                config=config,
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type]  # one of W&B's own words, checked in WandbOptions
                # The terminal is this program's: W&B neither prints on it nor reads from it.
                settings=wandb.Settings(silent=True, console="off", init_timeout=options.timeout),
            )
            return run, mode

        started = self._try("start", start)
        if started is not None:
            self._run, mode = started
            if mode == "offline":
                self.note = f"offline; upload with: wandb sync {shown(Path(self._run.settings.sync_dir))}"
            elif mode == "online":
                self.note = str(self._run.url)

    def chart(self, name: str, traces: Sequence[Trace], against: str) -> None:
        def draw() -> None:
            import wandb

            chart = wandb.plot.line_series(
                xs=[getattr(trace, against) for trace in traces],
                ys=[[math.log10(r) if r > 0 else None for r in trace.residual_mean] for trace in traces],
                keys=[trace.solver for trace in traces],
                title=f"log10 of the mean relative residual against {against}",
                xname=against,
            )
            self._run.log({name: chart})

        self._try("chart", draw)

    def log(self, row: Row) -> None:
        # Committed at once: a row that is kept back until the next one comes is missing in the charts of a run that
        # goes on, and at the end of one its values would be written over the summary's.
        self._try("log", lambda: self._run.log(row, step=int(row["step"]), commit=True))

    def finish(self, summary: Mapping[str, float], failed: bool) -> None:
        def close() -> None:
            import wandb

            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=int(failed))
            # finish() only tells W&B's own process to close the offline file; the end of that process is waited for.
            wandb.teardown(exit_code=int(failed))

        self._try("finish", close)

    def _try(self, what: str, call: Callable[[], Result]) -> Result | None:
        """The call's result, or None after one warning if it raised or took too long. Silent once given up."""
        if what != "start" and self._run is None:
            return None
        outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                outcome["result"] = call()
            except BaseException as error:  # a SystemExit, too, would end this thread without a word
                outcome["error"] = error

        # In a thread, because a call that hangs can be left alone but not be ended.
        thread = threading.Thread(target=work, name=f"wandb-{what}", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if "result" in outcome:
            result: Result = outcome["result"]
            return result
        error = outcome.get("error")
        reason = first_line(error) if error else f"no answer in {self._timeout:g} s"
        self._run, self.note = None, None
        self._warn(f"W&B failed at {what} ({reason}); the run goes on, and its files are complete without it")
        return None


def _set_aside(folder: Path) -> None:
    """Rename W&B's offline runs in ``folder``: the run that goes on logs their rows again, and is the one to upload."""
    with contextlib.suppress(OSError):
        for before in folder.glob("offline-run-*"):
            before.rename(before.with_name(f"superseded-{before.name}"))


def state_of(folder: Path) -> str | None:
    """What ``status.json`` says of the run in ``folder``: running (or killed), finished, failed or interrupted.

    None where it says nothing.
    """
    try:
        content = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return None
    state = content.get("state") if isinstance(content, dict) else None
    return state if isinstance(state, str) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """The code's version and the machine: what a result depends on beside its config."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "code_version": code_version(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": {
            "system": platform.platform(),
            "cpu": processor_name(),
            "cpu_threads": torch.get_num_threads(),
            "gpu": gpu,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def _json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON proper: NaN and infinities, which it does not know, become null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    return json.dumps(clean, indent=indent, allow_nan=False)


def _write_text(path: Path, text: str) -> None:
    with room_for(path):
        write_atomically(path, lambda file: file.write(text.encode()))
