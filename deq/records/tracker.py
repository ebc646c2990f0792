"""Where results go: files in the run folder, always; Weights & Biases beside them, as long as it works."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from deq.records import metrics
from deq.records import traces as single_solves
from deq.records.errors import room_for
from deq.records.files import write_atomically
from deq.records.machine import code_version, processor_name
from deq.records.traces import Trace
from deq.records.wandb_run import WandbOptions, WandbRun, set_aside, wanted_mode

Row = dict[str, float]
STATUS = "status.json"
_NOT_OF_THE_ARM = ("seed=", "logger", "hydra.", "resume=", "experiment=", "device=")
"""Overrides that do not tell an arm of an experiment from another."""


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
        set_aside(folder / "wandb")
        mode = wanted_mode(options, warn)
        self._wandb = None
        if mode != "disabled":
            arm = " ".join(one for one in overrides if not one.startswith(_NOT_OF_THE_ARM))
            self._wandb = WandbRun(
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
            ValueError: for a name that is not in :mod:`deq.records.metrics`.
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
        with room_for(self.folder / single_solves.FILE):
            single_solves.save(self.folder, traces, about)
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
            ValueError: for a name that is not in :mod:`deq.records.metrics`.
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
