"""The command line's manners: values checked before any work, and a user's mistake told in one sentence."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from deq.cli import composed, sweep
from deq.cli.arguments import Names, arranged, quoted, typed
from deq.kernels import BackendName, Regularization
from deq.layer import StabilityLosses
from deq.models.tutorial import TutorialSolver
from deq.records import metrics
from deq.records import tracker as tracking
from deq.records.errors import UserError, first_line, in_yaml, in_yaml_too, values_of_the_user
from deq.records.files import shown
from deq.solvers import Solver
from deq.solvers.solver import Stop
from deq.terminal import MISTAKE, Streams, end, tell
from deq.training import checkpoint
from deq.training.interrupt import Interrupted
from deq.training.trainer import PRECISIONS, SCHEDULES

Task = Callable[[DictConfig], Any]


def launch(task: Task, conf: Path) -> None:
    """Let Hydra compose ``conf``/config.yaml with the command line and run ``task`` on it, once or as a sweep.

    A user's mistake ends in one sentence on standard error and exit status 2, a signal in 128 + its number; a
    defect keeps its stack trace, as does everything with HYDRA_FULL_ERROR=1. A command line that is refused leaves no
    folder. In a sweep a failed job is told as it fails and does not keep the others from running; the exit status is
    not 0 then.

    A run whose standard output is lost, as in ``python train.py | head``, goes on: hours of training are not for a
    pager to end, and its results are the files in its folder. What only shows something ends, as any program does.
    """
    shows = False  # whether only a page is asked for, such as --help

    def lost(error: OSError) -> None:
        reason = "nobody reads it any more" if isinstance(error, BrokenPipeError) else error.strerror
        if not shows:
            sentence = f"standard output is lost ({reason}); the run goes on, its files are complete without it"
            print(f"warning: {sentence}", file=sys.stderr)

    streams = Streams(lost)
    OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as train.py had it for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes exceptions on to this function as they are

    try:
        sys.argv[1:], shows, part = arranged(sweep.resumed_arguments(sys.argv[1:]), conf)
    except UserError as error:
        if full_error:
            raise
        end(str(error))
    sweep.register()
    composed.install(part)
    jobs: list[Path] = []  # folders of the jobs begun
    failed: list[str] = []  # numbers of the jobs of a sweep that failed

    @functools.wraps(task)
    def job(config: DictConfig) -> Any:
        about = HydraConfig.get()
        folder = Path(about.runtime.output_dir)
        jobs.append(folder)
        try:
            return task(config)
        except Interrupted as interruption:
            sys.exit(128 + interruption.signum)
        except _SweepError as error:
            end(str(error))
        except Exception as error:
            sentence = None if full_error else _explain(error, conf)
            if about.mode == RunMode.MULTIRUN:
                # Told now: Hydra goes on with the other jobs, and raises the first failure when all are done.
                failed.append(str(about.job.num))
                which = f"job {about.job.num} ({' '.join(about.overrides.task)})"
                if sentence is None:
                    traceback.print_exception(error)
                tell(f"{which}: {sentence or first_line(error)}")
                raise _ToldError(MISTAKE if sentence else 1) from error
            if sentence is None:
                raise
            end(sentence)
        finally:
            _remove_hydras(folder, about)
            _remove_if_empty(folder, alone=about.mode == RunMode.MULTIRUN and bool(failed))

    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(job)()
        if failed:  # a tuner goes on without them
            tell(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")
            sys.exit(1)
    except SystemExit as ended:
        if shows:
            streams.end(MISTAKE if ended.code else 0)  # of Hydra, which has told of a --package that is not there
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except _ToldError as error:
        _remove_if_empty(jobs[0].parent, beside=(sweep.HYDRAS_OWN, sweep.FILE))
        tell(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")
        sys.exit(error.status)
    except Exception as error:
        sentence = None if full_error else _explain(error, conf)
        config = composed.Loader.latest
        if isinstance(error, OSError) and error.filename and not jobs and not full_error:  # Hydra makes that folder
            kind = "sweep" if config.hydra.mode == RunMode.MULTIRUN else "run"
            sentence = (
                f"the {kind} folder {error.filename} cannot be made ({error.strerror}); give another hydra.{kind}.dir"
            )
        if config is not None:
            _remove_made(config)
        if "--shell-completion" in sys.argv or "-sc" in sys.argv:  # which raises anything, and has no words
            sentence = f"--shell-completion: {first_line(error)}; `python train.py --hydra-help` says how"
        if sentence is None:
            raise
        end(sentence)
    if shows:
        streams.end()


class _SweepError(UserError):
    """A mistake in how a sweep was asked for, which no job of it can do without."""


class _ToldError(Exception):
    """A job of a sweep failed and that has been told; ``status`` is the exit status it asks for."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


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
        if tracking.state_of(folder) == "finished" and results[2].is_file():
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


def validate(config: DictConfig) -> None:
    """Check the knobs at the top level and those of both solvers; the other groups check their own when they are built.

    Raises:
        UserError: one sentence with value, limit and fix.
    """
    for name in _TOP_LEVEL:
        _check(config, name, name)
    _check_objectives(config)
    if config.cuda_graph and config.compact:
        raise UserError("cuda_graph=true cannot replay evaluations that shrink: choose it or compact=true")
    for node in _PARTS:
        group = OmegaConf.select(config, node)
        if group is None and node in _OPTIONAL:
            continue  # without adjoint, the backward solve takes the forward one's solver
        if not isinstance(group, DictConfig):
            null = f", or write {node}=null" if node in _OPTIONAL else ""
            raise UserError(f"{node} cannot be {in_yaml(group)}; leave it out for the default{null}")
        if node != "optim" and group.get("_target_") is None:
            raise UserError(f"{node} is null here and cannot have {', '.join(map(str, group))}; leave {node}=null out")
        for knob in group if node in ("solver", "adjoint") else ():
            if knob in _LIMITS:
                _check(config, f"{node}.{knob}", str(knob))


def _check_objectives(config: DictConfig) -> None:
    """Raise UserError for an objective that no run measures, or that this one will not."""
    objectives = [config.objective] if isinstance(config.objective, str) else config.objective
    if not isinstance(objectives, list | ListConfig) or not objectives:
        objectives = [objectives]
    for name in objectives:
        if name not in metrics.NAMES:
            close = difflib.get_close_matches(str(name), metrics.NAMES, n=1)
            hint = f"did you mean {close[0]}?" if close else "deq/records/metrics.py lists them"
            raise UserError(f"objective must be a metric or a list of such, got {in_yaml(name)}; {hint}")
        node = {"speedup": "probe", "crossover": "crossover"}.get(str(name).partition("/")[0])
        if node is not None and config[node] is None:
            raise UserError(f"objective={name} is measured by {node}, which is null; leave {node}=null out")
    sweeper = HydraConfig.get().sweeper if HydraConfig.initialized() else None
    wanted = sweeper.get("direction") if isinstance(sweeper, DictConfig) else None
    if isinstance(wanted, list | ListConfig) and len(wanted) != len(objectives):
        raise _SweepError(
            f"objective has {len(objectives)} metrics and hydra.sweeper.direction {len(wanted)}; give one direction, "
            "maximize or minimize, for each"
        )


class _Limit(NamedTuple):
    """What a knob takes."""

    kinds: tuple[type, ...]
    fits: Callable[[Any], bool]
    words: str
    null: bool = False


def _one_of(*options: str) -> _Limit:
    return _Limit((str,), options.__contains__, f"one of {', '.join(options)}")


_OPTIONAL = ("adjoint", "probe", "crossover", "energy", "stability")
_PARTS = ("solver", *_OPTIONAL, "gradient", "data", "model", "optim", "optim.optimizer", "logger")
_INT, _NUMBER = (int,), (int, float)
_COUNT = _Limit(_INT, lambda value: value >= 1, "an integer of at least 1")
_FLAG = _Limit((bool,), lambda _: True, "true or false")

# The library has the same rules for its arguments and speaks Python; these speak of knobs, before any work.
_LIMITS = {
    "window": _COUNT,
    "beta": _Limit(_NUMBER, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "tol": _Limit(_NUMBER, lambda value: 0 < value < math.inf, "a number above 0, such as 1e-2"),
    "max_iter": _COUNT,
    "stop": _one_of(*get_args(Stop)),
    "compact": _FLAG,
    "atol": _Limit(_NUMBER, lambda value: 0 <= value < math.inf, "a number of at least 0"),
    "check_every": _COUNT,
    "cuda_graph": _FLAG,
    "memory": _COUNT,
    "adaptive": _FLAG._replace(null=True),
    "patience": _Limit(_INT, lambda value: value >= 0, "an integer of at least 0"),
    "history_dtype": _one_of("bfloat16")._replace(null=True),
    "regularization": _one_of(*get_args(Regularization)),
    "ridge": _Limit(_NUMBER, lambda value: 0 <= value < math.inf, "a number of at least 0", null=True),
    "backend": _one_of(*get_args(BackendName)),
    "seed": _Limit(_INT, lambda value: 0 <= value < 2**31, "an integer from 0 to 2147483647"),
    "epochs": _COUNT,
    "max_steps": _COUNT._replace(null=True),
    "batch_size": _COUNT,
    "precision": _one_of(*PRECISIONS),
    "compile": _FLAG,
    "warm_start": _FLAG,
    "log_every": _COUNT,
    "evaluate_every": _COUNT._replace(null=True),
    "optim.lr": _Limit(_NUMBER, lambda value: 0 < value < math.inf, "a number above 0, such as 1e-3"),
    "optim.weight_decay": _Limit(_NUMBER, lambda value: 0 <= value < math.inf, "a number of at least 0"),
    "optim.schedule": _one_of(*SCHEDULES),
}
_SOLVER_ALONE = ("atol", "check_every", "patience", "memory", "adaptive", "history_dtype", "ridge", "backend")
_TOP_LEVEL = [name for name in _LIMITS if name not in _SOLVER_ALONE]


def _check(config: DictConfig, name: str, limit: str) -> None:
    """Raise UserError unless the knob ``name`` keeps to the limit of that name."""
    kinds, fits, words, null = _LIMITS[limit]
    value = OmegaConf.select(config, name)
    if value is None and null:
        return
    # bool is a kind of int to Python, not to a user.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or not fits(value):
        raise UserError(f"{name} must be {words}{' or null' if null else ''}, got {in_yaml(value)}")


def try_solvers(solvers: Mapping[str, Any], device: torch.device) -> None:
    """Start every solver, by its node's name, on one number on ``device``.

    Raises:
        UserError: its backend does not run there.
    """
    for node, solver in solvers.items():
        if not isinstance(solver, Solver):
            raise UserError(f"gradient.solver cannot be {in_yaml(solver)}; leave it out, and give adjoint.KNOB=VALUE")
        if isinstance(solver, TutorialSolver):
            continue  # plain PyTorch, on any device
        try:
            solver.start(torch.zeros(1, 1, device=device))
        except ValueError as error:  # it begins with the option's name
            raise UserError(f"{node}.{error}") from error


def try_optimizer(make: Callable[..., Any]) -> None:
    """Make the optimizer for one number.

    Raises:
        UserError: it takes no such knob, or not that value.
    """
    try:
        make([torch.zeros(1, requires_grad=True)])
    except (TypeError, ValueError, RuntimeError) as error:  # of torch, which has no words for a knob
        raise UserError(
            f"optim.optimizer cannot be made ({first_line(error)}); mend optim.lr, optim.weight_decay or what the "
            "command line gives it with +"
        ) from error


def build(config: DictConfig, node: str, kind: type[Any]) -> Any:
    """What a node of the config describes.

    Raises:
        UserError: a ``_target_`` of the user's makes something else.
    """
    made = instantiate(config[node])
    if not isinstance(made, kind):
        raise UserError(
            f"{node}._target_ must make {_article(kind)}, got {_article(type(made))}; leave it out for the default"
        )
    return made


def _article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def build_model(config: DictConfig, **given: Any) -> torch.nn.Module:
    """What ``model`` describes. given: what train.py itself gives it.

    Raises:
        UserError: a value that it does not take, or a ``_target_`` of the user's that makes something else.
    """
    try:
        with values_of_the_user():
            made = instantiate(config.model)(**given)
    except TypeError as error:
        raise UserError(_cannot_take("model", error)) from error
    if not isinstance(made, torch.nn.Module):
        raise UserError(
            f"model._target_ must make a torch.nn.Module, got {_article(type(made))}; leave it out for the default"
        )
    return made


def _cannot_take(node: str, error: TypeError) -> str:
    return f"{node}._target_ cannot take the knobs of {node} ({first_line(error)}); leave it out for the default"


def pick_device(name: Any) -> torch.device:
    """``auto``: the first CUDA (or ROCm) device, else the CPU; anything else as torch writes devices.

    Raises:
        UserError: no such device here.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if cuda else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(name))
    if not match:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {in_yaml(name)}")
    if name == "cpu":
        return torch.device("cpu")
    number = int(match.group(1) or 0)
    if number >= cuda:
        has = f"{cuda} CUDA device{'s' if cuda != 1 else ''}" if cuda else "no CUDA device"
        raise UserError(f"device={name}: torch sees {has} here; use device=auto or device=cpu")
    return torch.device("cuda", number)


def refuse_corrections_out_of_reach(stability: StabilityLosses | None, solver: Solver, cuda_graph: bool) -> None:
    """
    Raises:
        UserError: a solve never has the iterates that are to be corrected.
    """
    corrections = stability.corrections if stability is not None else ()
    if corrections and cuda_graph:
        raise UserError("cuda_graph=true keeps no iterates on the way: choose it or stability.corrections")
    if max(corrections, default=0) > solver.max_iter:
        raise UserError(
            f"stability.corrections must be at most max_iter={solver.max_iter}, got {max(corrections)}; name earlier "
            "evaluations or raise max_iter"
        )


def refuse_graphs_without_device(cuda_graph: bool, device: torch.device) -> None:
    """Raises UserError for cuda_graph=true on a CPU."""
    if cuda_graph and device.type != "cuda":
        raise UserError(f"cuda_graph=true needs a CUDA or ROCm device, this run is on {device}: use cuda_graph=false")


def refuse_what_the_tutorial_lacks(config: DictConfig, solvers: Collection[Solver]) -> None:
    """
    Raises:
        UserError: a solver written the way the tutorial writes it, with what only this project's layer can do.
    """
    if any(isinstance(solver, TutorialSolver) for solver in solvers):
        for knob, asked in (
            ("cuda_graph", config.cuda_graph),
            ("warm_start", config.warm_start),
            ("stability.jacobian_weight", config.stability is not None and config.stability.jacobian_weight),
            ("stability.corrections", config.stability is not None and config.stability.corrections),
            (f"precision={config.precision}", config.precision != "fp32"),
            # Its own solvers know no compaction; another one for the adjoint would.
            ("compact", any(solver.compact for solver in solvers)),
        ):
            if asked:
                raise UserError(
                    f"the tutorial's layer knows no {knob}; leave it out, or use solver=forward or anderson"
                )


def objective(summary: Mapping[str, float], names: str | Sequence[str]) -> float | tuple[float, ...]:
    """The values in a run's summary that a tuner is told.

    Raises:
        UserError: the run did not measure one.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if summary.get(name) is None:
            raise UserError(f"objective={name}: this run did not measure it; choose another metric")
    values = tuple(summary[name] for name in wanted)
    return values[0] if isinstance(names, str) else values


def resume_hint(folder: Path) -> str:
    """The command that goes on with the run in ``folder``."""
    about = HydraConfig.get()
    if about.mode == RunMode.MULTIRUN and (folder.parent / sweep.FILE).is_file():
        return shlex.join(["python", Path(sys.argv[0]).name, f"resume={quoted(shown(folder.parent))}"])
    overrides = [one for one in about.overrides.task if not one.startswith("resume=")]
    return shlex.join(["python", Path(sys.argv[0]).name, *overrides, f"resume={quoted(shown(folder))}"])


def _folder_name(overrides: str) -> str:
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


def _remove_if_empty(folder: Path, beside: Collection[str] = (), *, alone: bool = False) -> None:
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


def _remove_hydras(folder: Path, about: Any) -> None:
    """Take away Hydra's own notes in the folder of a run, where there is nothing else: that run never began."""
    notes, log = folder / str(about.output_subdir), folder / f"{about.job.name}.log"
    with contextlib.suppress(OSError):
        if {*folder.iterdir()} <= {notes, log}:
            log.unlink(missing_ok=True)
            for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
                (notes / name).unlink(missing_ok=True)
            notes.rmdir()


def _remove_made(config: DictConfig) -> None:
    """Take away the folder that Hydra made for a run, or for a sweep, before it could not begin it."""
    about: Any = config.hydra
    swept = about.mode == RunMode.MULTIRUN
    with contextlib.suppress(OmegaConfBaseException):  # it has no name, and was not made
        if not OmegaConf.is_missing(about.runtime, "output_dir"):
            _remove_hydras(Path(about.runtime.output_dir), about)
            _remove_if_empty(Path(about.runtime.output_dir), alone=swept)
        if swept:
            _remove_if_empty(Path(about.sweep.dir).absolute(), beside=(sweep.HYDRAS_OWN, sweep.FILE))


def _explain(error: BaseException, conf: Path) -> str | None:
    """One sentence about a user's mistake, or None if the error is none."""
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error, conf)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if (group, option) == ("hydra/sweeper", "optuna"):
            return "tuning needs Optuna's sweeper, which is not installed: pip install -e '.[tune]'"
        return f"{group} must be one of {', '.join(sorted(error.options))}, got {option or in_yaml(option)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return (
            f"there is no config {error.missing_cfg_file}; `python train.py --info searchpath` lists the folders that "
            "are looked into"
        )
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return _no_null_option(Names(conf).groups)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ConfigCompositionException):
        return _explain_composition(error)
    unknown = re.match(r"Interpolation key '([^']+)' not found", str(error))
    if unknown:
        return Names(conf).missing(unknown.group(1))
    if isinstance(
        error, HydraException | InterpolationResolutionError | UnsupportedInterpolationType | GrammarParseError
    ):
        return first_line(error)
    plugin = re.match(r"(?:Invalid plugin|Unknown plugin class :) '([^']+)'", str(error))
    if plugin:
        return f"{plugin[1]} is no plugin of Hydra's; write hydra/launcher=OPTION or hydra/sweeper=OPTION to choose one"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "configure_log":
            reason = first_line(error.__cause__ or error)
            return f"hydra.job_logging or hydra.hydra_logging cannot be used ({reason}); leave it out for the default"
        if str(frame.f_globals.get("__name__")).startswith("optuna."):
            return f"hydra.sweeper cannot be used ({first_line(error)}); mend it, such as hydra.sweeper.storage"
        if frame.f_code.co_name == "_apply_overrides_to_config":  # OmegaConf fails, of whatever kind, at one of them
            line = frame.f_locals["override"].input_line
            return (
                f"{line} does not fit into the config ({first_line(error)}); leave it out, or set it in a config file"
            )
    return None


def _explain_composition(error: ConfigCompositionException) -> str:
    """One sentence about overrides that do not go together with the config files."""
    text = str(error) or first_line(error.__cause__ or error)
    several = re.match(r"(Ambiguous value for argument|Sweep parameters) '([^=]+)=(.*)'", text)
    if several:
        how, knob, values = several.groups()
        listed = f", or write {knob}=[{values}] for a list or {typed(knob, values)} for a text"
        return f"{knob}={values} has several values: add -m for a sweep over them{listed if how[0] == 'A' else ''}"
    there = re.match(
        r"Could not append to config. An item is already at '(?P<item>[^']+)'"
        r"|Multiple values for (?P<group>[\w/@]+)\."
        r"|(?P<twice>[\w/@]+) appears more than once in the final defaults list"
        r"|force-add of config groups is not supported: '\++(?P<forced>[^=]+)=",
        text,
    )
    if there:
        name = next(filter(None, there.groups()))
        return f"{name} is there already: write {name}=VALUE, without +"
    refused = re.match(r"Error merging override (.*)", text)
    if refused and error.__cause__ is not None:
        return f"{refused.group(1)}: {first_line(error.__cause__)}"
    swept = re.match(r"Sweeping over Hydra's configuration is not supported : '([^=]+)=(.*)'", text)
    if swept:
        return f"{swept[1]}={swept[2]} has several values, which it cannot; for one text write {typed(*swept.groups())}"
    return text.splitlines()[0].rstrip(".")


def _explain_instantiation(error: InstantiationException, conf: Path) -> str | None:
    """One sentence about what a part of the config could not be built from, or None if that is a defect."""
    cause = error.__cause__
    place = re.search(r"full_key: ([\w.]+)$", str(error))
    # The adjoint's solver is built inside the gradient, where no user set it.
    node = place.group(1).replace("gradient.solver", "adjoint") if place else ""
    target = re.match(r"Error locating target '(.+?)'", str(error))
    if target:
        return f"{node}._target_: there is no {target.group(1)} to import; leave it out for the default"
    if node.startswith("hydra") and isinstance(cause, ValueError):
        return str(cause)
    if cause is None or node.startswith("hydra"):  # refused by Hydra itself, or within its own part of the config
        return f"{node or 'the config'}: {' '.join(str(error).partition('full_key:')[0].split()).rstrip('.')}"
    if not isinstance(cause, UserError | ValueError | TypeError):
        return None
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
    if unknown and node:
        return Names(conf).missing(f"{node}.{unknown.group(1)}")
    if isinstance(cause, TypeError) and node:
        return _cannot_take(node, cause)
    return in_yaml_too(f"adjoint: {cause}" if node == "adjoint" else str(cause))


def _no_null_option(groups: Mapping[str, list[str]]) -> str:
    """Hydra refuses a null where it wants a group's option, but does not say which."""
    for override in sys.argv[1:]:
        group, _, value = override.partition("=")
        if value in ("null", "") and groups.get(group):
            return f"{group} must be one of {', '.join(groups[group])}, got null; leave it out for the default"
    return "a group must be one of its options, not null; `python train.py --help` lists them"
