"""Checkpoints: whole or not there, readable without trusting them, and refused where they do not fit the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import torch

from deq.records.errors import UserError, room_for
from deq.records.files import write_atomically

FILE = "checkpoint.pt"
_FORMAT = 5

# What may differ between a checkpoint and the run that goes on from it without a word …
_FREE = (
    "resume",
    "logger",
    "device",
    "probe",
    "crossover",
    "energy",
    "data.root",
    "data.cache_dir",
    "solver.backend",
    "adjoint.backend",
)
# … and what may differ with a warning, because the learning-rate schedule stretches to the new length.
_WARNED = ("epochs", "max_steps")


def save(path: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, dicts) and the run's resolved config, atomically.

    Raises:
        UserError: the file cannot be written; the previous one is then whole.
    """
    content = {"format": _FORMAT, "config": config, "state": state}

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # A full disk, which torch covers with a complaint about its own archive.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    with room_for(path):
        write_atomically(path, write)


def locate(resume: str | Path) -> Path:
    """The checkpoint file that ``resume`` means: the file itself, or the one in a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(resume).expanduser()
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        what = f"the folder {path} holds no {FILE}" if path.is_dir() else f"there is no file or folder {path}"
        raise UserError(f"resume={resume}: {what}; give the run folder of an earlier run, runs/<date>/<time>…")
    return file


def load(resume: str | Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state saved for a run with this config, and warnings about differences that may be meant.

    Nothing in the file is executed (``weights_only=True``). Tensors come back on the CPU.

    Raises:
        UserError: no such file, not a checkpoint, or one of a run that differs in what matters.
    """
    file = locate(resume)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, pickle, zip or the file system: whatever is not a checkpoint
        raise UserError(f"resume={resume}: {file} is not a readable checkpoint of train.py") from error
    whole = (
        isinstance(content, dict) and isinstance(content.get("config"), dict) and isinstance(content.get("state"), dict)
    )
    if not whole or content.get("format") != _FORMAT:
        raise UserError(f"resume={resume}: {file} was not written by this version's train.py")
    warnings = []
    found = differences(content["config"], config)
    # Another solver has other knobs: that it is another one is what a user did.
    for key, then, now in sorted(found, key=lambda difference: not difference[0].endswith("_target_")):
        if key.endswith("_target_"):
            part = key.removesuffix("._target_")
            raise UserError(
                f"resume={resume}: {part} was {then} in the checkpoint and is {now} now; choose the same {part} to go "
                "on with that run, or leave resume out to start anew"
            )
        sentence = f"resume={resume}: {key} was {then} in the checkpoint and is {now} now"
        if key not in _WARNED:
            raise UserError(f"{sentence}; give {key}={then} to go on with that run, or leave resume out to start anew")
        warnings.append(f"{sentence}: the learning-rate schedule follows the new value")
    return content["state"], warnings


def differences(then: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves in which two configs differ, shared top-level knobs first (they are what a user gave)."""
    if key in _FREE:
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for name in sorted({*then, *now}, key=lambda name: isinstance(then.get(name, now.get(name)), dict)):
            found += differences(then.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if then == now else [(key, _shown(then), _shown(now))]


def _shown(value: Any) -> Any:
    return "null" if value is None else value
