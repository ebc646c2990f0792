"""Folders of runs: named, claimed by one process, and taken away where a run never began."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deq.cli import sweep
from deq.cli.arguments import typed
from deq.records import tracker
from deq.records.errors import UserError
from deq.records.files import shown
from deq.training import checkpoint


def claim(folder: Path, resume: Any, config: dict[str, Any], *, in_sweep: bool) -> tuple[Any, bool]:
    """See that no earlier run is written over: ``folder`` holds none, or the very one that ``resume`` goes on with.

    A job of a sweep also goes on with what an earlier start of that sweep left in its folder, if that was the same job.

    Returns: what to resume from, and whether the job is done already.

    Raises:
        UserError: the folder holds another run.
    """
    _hold(folder)
    if not in_sweep and (folder / sweep.FILE).is_file():
        raise UserError(f"{shown(folder)} holds a sweep; give another hydra.run.dir")
    results = [folder / name for name in (checkpoint.FILE, "metrics.jsonl", "summary.json")]
    if not any(file.is_file() and file.stat().st_size for file in results):
        return resume, False
    if resume is not None and checkpoint.locate(str(resume)).resolve() == results[0].resolve():
        return resume, False
    if in_sweep and resume is None and _same_job(folder, config):
        if tracker.state_of(folder) == "finished" and results[2].is_file():
            return None, True
        return (folder if results[0].is_file() else None), False
    raise UserError(
        f"{shown(folder)} holds an earlier run; give another hydra.run.dir, delete that folder, or go on with "
        f"its run: {typed('resume', shown(folder))}"
    )


def _hold(folder: Path) -> None:
    """Keep other processes out of ``folder`` until this job ends.

    Raises:
        UserError: one is in it.
    """
    global _held
    if sys.platform == "win32":
        return
    import fcntl

    if _held is not None:
        os.close(_held)  # the folder of the job before
        _held = None
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise UserError(
            f"{shown(folder)} is the folder of a run that another process is at; wait for its end"
        ) from error
    except OSError:  # a file system without locks
        os.close(held)
        return
    _held = held


_held: int | None = None


def _same_job(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the run in ``folder`` was given this config."""
    try:
        before: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except Exception:  # it is missing, or not whole
        return False
    return not checkpoint.differences(before, config)


def folder_name(overrides: str) -> str:
    """``_`` and the overrides as part of a folder's name.

    No separators, not longer than file systems allow, and nothing that has to be quoted when the folder is given back
    as resume=FOLDER: Hydra's grammar takes ``=`` and ``,`` for its own, and letters of ASCII alone. In a sweep only
    what tells its jobs apart.
    """
    telling = overrides
    for one in sweep.GridSweeper.shared:
        telling = re.sub(rf"(^|,){re.escape(one)}(?=,|$)", "", telling)
    name = re.sub(r"[^\w.+-]+", "-", telling.strip(",").replace(",", "_"), flags=re.ASCII)
    return f"_{name[:120]}" if name else ""


def remove_if_empty(folder: Path, beside: Collection[str] = (), *, alone: bool = False) -> None:
    """Take away a folder that Hydra made for a run that never began, and those above it that hold nothing else.

    Files named in ``beside`` count as nothing. ``alone`` leaves those above it.
    """
    with contextlib.suppress(OSError):  # the folder holds something
        if beside and {file.name for file in folder.iterdir()} <= set(beside):
            for name in beside:
                (folder / name).unlink(missing_ok=True)
        folder.rmdir()
        for parent in () if alone else folder.parents:
            if parent == Path.cwd() or not parent.is_relative_to(Path.cwd()):
                break
            parent.rmdir()


def remove_hydras(folder: Path, about: Any) -> None:
    """Take away Hydra's own notes in the folder of a run, where there is nothing else: that run never began."""
    notes, log = folder / str(about.output_subdir), folder / f"{about.job.name}.log"
    with contextlib.suppress(OSError):
        if {*folder.iterdir()} <= {notes, log}:
            log.unlink(missing_ok=True)
            for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
                (notes / name).unlink(missing_ok=True)
            notes.rmdir()


def remove_made(config: DictConfig) -> None:
    """Take away the folder that Hydra made for a run, or for a sweep, before it could not begin it."""
    about: Any = config.hydra
    swept = about.mode == RunMode.MULTIRUN
    with contextlib.suppress(OmegaConfBaseException):  # it has no name, and was not made
        if not OmegaConf.is_missing(about.runtime, "output_dir"):
            remove_hydras(Path(about.runtime.output_dir), about)
            remove_if_empty(Path(about.runtime.output_dir), alone=swept)
        if swept:
            remove_if_empty(Path(about.sweep.dir).absolute(), beside=(sweep.HYDRAS_OWN, sweep.FILE))
