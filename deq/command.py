"""The command line's manners: values checked before any work, and a user's mistake told in one sentence."""

from __future__ import annotations

import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError

from deq.errors import UserError, first_line, values_of_the_user
from deq.files import shown
from deq.interrupt import Interrupted
from deq.solvers import Anderson
from deq.training import PRECISIONS, SCHEDULES

_MISTAKE = 2  # exit status, the shell's convention for a wrong command line

Task = Callable[[DictConfig], Any]


def launch(task: Task, conf: Path) -> None:
    """Let Hydra compose ``conf``/config.yaml with the command line and run ``task`` on it, once or as a sweep.

    A user's mistake ends in one sentence on standard error and exit status 2, a signal in 128 + its number; a
    defect keeps its stack trace, as does everything with HYDRA_FULL_ERROR=1. In a sweep a failed job does not
    keep the others from running.
    """
    OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes exceptions on to this function as they are

    @functools.wraps(task)
    def job(config: DictConfig) -> Any:
        try:
            return task(config)
        except Interrupted as interruption:
            sys.exit(128 + interruption.signum)
        except Exception as error:
            sentence = None if full_error else _explain(error, conf)
            if sentence is None:
                raise
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise UserError(sentence) from error  # Hydra goes on with the other jobs and raises it at the end
            _end(sentence)

    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(job)()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = None if full_error else _explain(error, conf)
        if sentence is None:
            raise
        _end(sentence)


def validate(config: DictConfig) -> None:
    """Check the knobs at the top level; groups check their own when they are instantiated.

    Raises:
        UserError: one sentence with value, limit and fix.
    """

    def check(name: str, kind: type, fits: Callable[[Any], bool], limit: str) -> None:
        value = OmegaConf.select(config, name)
        good_type = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not good_type or (isinstance(value, bool) and kind is not bool) or not fits(value):
            raise UserError(f"{name} must be {limit}, got {'null' if value is None else repr(value)}")

    def anything(_: Any) -> bool:
        return True

    for name in ("window", "max_iter", "epochs", "batch_size", "log_every"):
        check(name, int, lambda value: value >= 1, "an integer of at least 1")
    check("seed", int, lambda value: 0 <= value < 2**31, "an integer from 0 to 2147483647")
    if config.max_steps is not None:
        check("max_steps", int, lambda value: value >= 1, "an integer of at least 1, or null for no limit")
    check("beta", float, anything, "a number above 0 and at most 1")
    check("tol", float, lambda value: value > 0, "a number above 0, such as 1e-2")
    check("compile", bool, anything, "true or false")
    check("compact", bool, anything, "true or false")
    check("cuda_graph", bool, anything, "true or false")
    if config.cuda_graph and config.compact:
        raise UserError("cuda_graph=true cannot replay evaluations that shrink: choose it or compact=true")
    check("precision", str, lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    check("optim.schedule", str, lambda value: value in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    check("optim.lr", float, lambda value: value > 0, "a number above 0, such as 1e-3")
    check("optim.weight_decay", float, lambda value: value >= 0, "a number of at least 0")
    # The solver's own rules, checked for every solver: a window that forward iteration does not read is still no
    # window, and a sweep over both solvers should not fail halfway.
    with values_of_the_user():
        Anderson(
            window=config.window,
            beta=config.beta,
            tol=config.tol,
            max_iter=config.max_iter,
            stop=config.stop,
            regularization=config.regularization,
        )


def pick_device(name: str) -> torch.device:
    """``auto``: the first CUDA (or ROCm) device, else the CPU; anything else as torch writes devices.

    Raises:
        UserError: no such device here.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if cuda else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(name))
    if not match:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name}")
    if name == "cpu":
        return torch.device("cpu")
    number = int(match.group(1) or 0)
    if number >= cuda:
        has = f"{cuda} CUDA device{'s' if cuda != 1 else ''}" if cuda else "no CUDA device"
        raise UserError(f"device={name}: torch sees {has} here; use device=auto or device=cpu")
    return torch.device("cuda", number)


def refuse_graphs_without_device(cuda_graph: bool, device: torch.device) -> None:
    """Raises UserError for cuda_graph=true on a CPU."""
    if cuda_graph and device.type != "cuda":
        raise UserError(f"cuda_graph=true needs a CUDA or ROCm device, this run is on {device}: use cuda_graph=false")


def resume_hint(folder: Path) -> str:
    """The command that goes on with the run in ``folder``."""
    overrides = [one for one in HydraConfig.get().overrides.task if not one.startswith("resume=")]
    return shlex.join(["python", Path(sys.argv[0]).name, *overrides, f"resume={shown(folder)}"])


def _folder_name(overrides: str) -> str:
    """``_`` and the overrides as part of a folder's name.

    No separators, not longer than file systems allow, and nothing that has to be quoted when the folder is given back
    as resume=FOLDER: Hydra's grammar takes ``=`` and ``,`` for its own.
    """
    name = re.sub(r"[^\w.+-]+", "-", overrides.replace(",", "_"))
    return f"_{name[:120]}" if name else ""


def _end(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(_MISTAKE)


def _explain(error: BaseException, conf: Path) -> str | None:
    """One sentence about a user's mistake, or None if the error is none."""
    if isinstance(error, InstantiationException):
        cause = error.__cause__
        if not isinstance(cause, UserError | ValueError | TypeError):
            return None
        # The adjoint's solver is built inside the gradient, where no user set it.
        inside = re.search(r"full_key: (gradient\.)?solver$", str(error))
        return f"adjoint: {cause}" if inside and inside.group(1) else str(cause)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group} must be one of {', '.join(sorted(error.options))}, got {option}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}; write KNOB=VALUE or GROUP=OPTION, quoted where the shell needs it"
    if isinstance(error, ConfigCompositionException):
        unknown = re.match(r"Could not (?:override|append|delete).*? '?([\w.@/]+)'?", str(error))
        if unknown:
            return _no_such_knob(unknown.group(1), conf)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException | InterpolationResolutionError | GrammarParseError):
        return first_line(error)
    return None


def _no_such_knob(name: str, conf: Path) -> str:
    close = difflib.get_close_matches(name, _knobs(conf), n=1)
    hint = f"did you mean {close[0]}?" if close else "`python train.py --help` lists them"
    return f"there is no knob {name}; {hint}"


def _knobs(conf: Path) -> set[str]:
    """Every top-level knob, group and knob of a group that the config files name."""
    knobs = {str(key) for key in _content(conf / "config.yaml")}
    for file in conf.glob("*/*.yaml"):
        group, content = file.parent.name, _content(file)
        own = content.get(group, content)  # data's files are written from the top level
        knobs |= {group, *(f"{group}.{knob}" for knob in own)}
    return {knob for knob in knobs if not knob.rpartition(".")[2].startswith(("_", "defaults"))}


def _content(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # type: ignore[assignment]
    return content
