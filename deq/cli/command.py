"""From the command line to a run or a sweep, and from its end to an exit status."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from deq.cli import composed, sweep
from deq.cli.arguments import arranged, quoted
from deq.cli.folders import folder_name, remove_hydras, remove_if_empty, remove_made
from deq.cli.mistakes import SweepError, explain
from deq.records.errors import UserError, first_line
from deq.records.files import shown
from deq.terminal import MISTAKE, Streams, end, tell
from deq.training.interrupt import Interrupted

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
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
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
        except SweepError as error:
            end(str(error))
        except Exception as error:
            sentence = None if full_error else explain(error, conf)
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
            remove_hydras(folder, about)
            remove_if_empty(folder, alone=about.mode == RunMode.MULTIRUN and bool(failed))

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
        remove_if_empty(jobs[0].parent, beside=(sweep.HYDRAS_OWN, sweep.FILE))
        tell(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")
        sys.exit(error.status)
    except Exception as error:
        sentence = None if full_error else explain(error, conf)
        config = composed.Loader.latest
        if isinstance(error, OSError) and error.filename and not jobs and not full_error:  # Hydra makes that folder
            kind = "sweep" if config.hydra.mode == RunMode.MULTIRUN else "run"
            sentence = (
                f"the {kind} folder {error.filename} cannot be made ({error.strerror}); give another hydra.{kind}.dir"
            )
        if config is not None:
            remove_made(config)
        if "--shell-completion" in sys.argv or "-sc" in sys.argv:  # which raises anything, and has no words
            sentence = f"--shell-completion: {first_line(error)}; `python train.py --hydra-help` says how"
        if sentence is None:
            raise
        end(sentence)
    if shows:
        streams.end()


class _ToldError(Exception):
    """A job of a sweep failed and that has been told; ``status`` is the exit status it asks for."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


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
