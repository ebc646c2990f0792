"""Sweeps: which jobs there are, which of them are done, and how one that was stopped goes on.

A sweep's folder holds ``sweep.json``, the list of all its jobs, beside Hydra's ``multirun.yaml`` and a folder for each
job. Started again there, ``python train.py resume=FOLDER``, it runs what is missing: finished jobs are left alone,
interrupted ones go on from their checkpoint, the others begin.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf

from deq.cli.arguments import quoted
from deq.records.errors import UserError, in_yaml
from deq.records.files import shown, write_atomically

FILE = "sweep.json"
HYDRAS_OWN = "multirun.yaml"
_PLUGIN = "deq_sweep"
Grid = Mapping[str, str]
"""Knob -> values, as they would be typed: ``window: 2,5,10``."""


class GridSweeper(Sweeper):
    """Runs the product of what is swept, as Hydra's basic sweeper does, over one grid or several.

    Several grids are for arms that do not share their knobs: forward iteration has no window to sweep over. Jobs of one
    seed come one after another, so that what is compared is measured in the same hour.

    What the command line says goes before a grid: where the grids differ in a knob (``solver``), the values given
    choose among them. Any other knob takes the value given in all grids; several values of it are swept over in the
    grids that have it, or in all where none has.

    Args:
        max_batch_size: jobs handed to the launcher at a time; None hands it all.
        params: swept over in every grid. grids: none is one without knobs.
    """

    shared: ClassVar[set[str]] = set()
    """Overrides that all jobs of the sweep under way have, which tell nobody anything in the name of a folder."""

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: Mapping[str, str] | None = None,
        grids: Sequence[Grid] | None = None,
    ) -> None:
        for name, given, each in (("params", params, [params or {}]), ("grids", grids, grids or [])):
            if not isinstance(each, Sequence) or not all(isinstance(one, Mapping) for one in each):
                example = "{window: '2,5'}" if name == "params" else "[{window: '2,5'}]"
                raise ValueError(
                    f"hydra.sweeper.{name} must be knobs with their values, such as {example}, got {given}"
                )
        size = max_batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(
                f"hydra.sweeper.max_batch_size must be an integer of at least 1 or null, got {in_yaml(size)}"
            )
        self.max_batch_size = size
        self.params = _as_typed(params or {})
        self.grids = [_as_typed(grid) for grid in grids or ()]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before :meth:`sweep`."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch all jobs. arguments: the command line's overrides."""
        assert self.config is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs = jobs_of(self.grids, self.params, arguments, parser)
        GridSweeper.shared = {one for one in jobs[0] if all(one in job for job in jobs)} if len(jobs) > 1 else set()
        self.validate_batch_is_legal(jobs)  # before there is a folder
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, jobs, OmegaConf.to_yaml(self.config))
        size = self.max_batch_size or max(len(jobs), 1)
        returns = []
        for first in range(0, len(jobs), size):
            results = self.launcher.launch(jobs[first : first + size], initial_job_idx=first)
            for result in results:
                _ = result.return_value  # raises what the job raised
            returns.append(results)
        return returns


def register() -> None:
    """Make :class:`GridSweeper` known to Hydra, which takes plugins from packages named ``hydra_plugins`` alone."""
    try:
        plugins = importlib.import_module("hydra_plugins")
    except ImportError:  # no plugin is installed
        plugins = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        plugins.__path__ = []
    name = f"hydra_plugins.{_PLUGIN}"
    GridSweeper.__module__ = name
    sys.modules[name] = sys.modules[__name__]
    setattr(plugins, _PLUGIN, sys.modules[__name__])
    Plugins.instance().register(GridSweeper)


def jobs_of(grids: Sequence[Grid], params: Grid, arguments: Sequence[str], parser: OverridesParser) -> list[list[str]]:
    """The overrides of every job; see :class:`GridSweeper`.

    Raises:
        HydraException: for a sweep over an interval, which only a tuner can make; for a value that has no grid where
            others have one.
    """
    given = _values(parser.parse_overrides(list(arguments)))
    shared = {key: values for key, values in _parsed(params, parser).items() if key not in given}
    parsed = [_parsed(grid, parser) for grid in grids] or [{}]
    telling = {key for grid in parsed for key in grid if len({tuple(other.get(key, ())) for other in parsed}) > 1}
    chosen = {
        key
        for key in telling & set(given)
        if all(key in grid for grid in parsed) and any(set(grid[key]) & set(given[key]) for grid in parsed)
    }
    for key in chosen:
        unknown = [one for one in given[key] if not any(one in grid[key] for grid in parsed)]
        if unknown:
            raise HydraException(
                f"{', '.join(unknown)} has no grid in this experiment; leave it out, or sweep without an experiment"
            )
    jobs: list[list[str]] = []
    for grid in parsed:
        knobs = {
            key: [one for one in values if one in given[key]] if key in chosen else given.get(key, values)
            for key, values in grid.items()
        }
        elsewhere = {key for other in parsed for key in other}
        rest = {
            key: values
            for key, values in given.items()
            if key not in grid and (key not in elsewhere or len(values) == 1) and key not in chosen
        }
        for values in itertools.product(*(shared | knobs | rest).values()):
            if list(values) not in jobs:
                jobs.append(list(values))
    if grids:
        seeds = list(dict.fromkeys(one for job in jobs for one in job if one.startswith("seed=")))
        order = {seed: number for number, seed in enumerate(seeds)}
        jobs.sort(key=lambda job: max((order[one] for one in job if one in order), default=0))
    return jobs


def refuse_bad_tuner(sweeper: Any) -> None:
    """
    Raises:
        UserError: Optuna would fail at a value, with a folder or without words.
    """
    if not isinstance(sweeper, DictConfig) or not str(sweeper.get("_target_")).endswith(".OptunaSweeper"):
        return
    for knob in ("n_trials", "n_jobs"):
        if not sweeper[knob] >= 1:
            raise UserError(f"hydra.sweeper.{knob} must be an integer of at least 1, got {sweeper[knob]}")
    rate = sweeper.max_failure_rate
    if not 0 <= rate <= 1:
        raise UserError(f"hydra.sweeper.max_failure_rate must be a number from 0 to 1, got {rate}")
    directions = sweeper.direction if isinstance(sweeper.direction, ListConfig) else [sweeper.direction]
    for one in directions or [None]:
        if getattr(one, "name", one) not in ("maximize", "minimize"):
            raise UserError(
                f"hydra.sweeper.direction must be maximize or minimize, or a list of such, got {in_yaml(one)}"
            )
    storage = sweeper.storage
    if storage is not None and not re.match(r"[a-z][\w+]*://", str(storage)):
        raise UserError(
            f"hydra.sweeper.storage must be the URL of a database, such as sqlite:///tune.db, or null, got "
            f"{in_yaml(storage)}"
        )


def _as_typed(grid: Mapping[str, Any]) -> Grid:
    """The values of a config file as Hydra writes them: a null there is no text ``None``."""
    plain = OmegaConf.to_container(grid) if isinstance(grid, DictConfig) else dict(grid)
    assert isinstance(plain, dict)
    # A text may stand for several values, and is left as it is. YAML's spelling of the rest is Hydra's, too.
    return {str(key): value if isinstance(value, str) else _IN_HYDRA(value) for key, value in plain.items()}


_IN_HYDRA = Override._get_value_element_as_str


def _parsed(grid: Grid, parser: OverridesParser) -> dict[str, list[str]]:
    return _values(parser.parse_overrides([f"{key}={value}" for key, value in grid.items()]))


def _values(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """Knob -> KNOB=VALUE for each of its values; the last override of a knob counts."""
    found: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            found[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            found[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise HydraException(
                f"{override.input_line}: an interval is for a tuner, experiment=tune; list values here"
            )
        if not found[key]:  # a glob that fits nothing, a range that ends where it begins
            raise HydraException(f"{override.input_line} stands for no value, so there is no job; give one at least")
    return found


def _claim(folder: Path, jobs: list[list[str]], multirun: str) -> None:
    """Note the command in ``multirun.yaml`` and the jobs in ``sweep.json``, unless another sweep has been there.

    Raises:
        UserError: it has.
    """
    content = {"jobs": [{"number": number, "overrides": job} for number, job in enumerate(jobs)]}
    file = folder / FILE
    if (folder / "metrics.jsonl").is_file():
        raise UserError(f"{shown(folder)} holds a run; give another hydra.sweep.dir")
    if file.is_file():
        if _read(file) == content:
            return
        raise UserError(
            f"{shown(folder)} holds a sweep of other jobs; give another hydra.sweep.dir, or go on with that sweep: "
            f"python train.py resume={shown(folder)}"
        )
    write_atomically(folder / HYDRAS_OWN, lambda stream: stream.write(multirun.encode()))
    write_atomically(file, lambda stream: stream.write((json.dumps(content, indent=1) + "\n").encode()))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{shown(file)} is not a list of jobs; delete it, or give another hydra.sweep.dir") from error


def resumed_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line that ``resume=`` stands for.

    Of a sweep: its own, in its folder. Of a run: its own knobs, and what is given beside ``resume=`` in the place of
    those. Any other command line is returned as it is.

    Raises:
        UserError: the folder's own notes cannot be read, or something else is asked for.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        folder = Path(value.strip("'\"")).expanduser()
        if key == "resume" and not (folder / FILE).is_file() and (folder / "optimization_results.yaml").is_file():
            raise UserError(
                f"resume={value}: that sweep was tuning; repeat its command with hydra.sweep.dir={value}: trials "
                "that it makes again are taken as they are"
            )
        if key == "resume" and (folder / FILE).is_file():
            try:
                overrides = OmegaConf.load(folder / HYDRAS_OWN).hydra.overrides
                before = [*overrides.hydra, *overrides.task]
            except Exception as error:  # of YAML, OmegaConf or the file system
                raise UserError(
                    f"resume={value}: {HYDRAS_OWN} there cannot be read; start that sweep's command again with "
                    f"hydra.sweep.dir={value}"
                ) from error
            before = [one for one in before if not one.startswith(("hydra.sweep.dir=", "hydra.mode="))]
            others = [one for one in arguments if one not in (argument, "-m", "--multirun")]
            if others:
                raise UserError(
                    f"resume={value} goes on with that sweep as it was begun; leave {' '.join(others)} out, or begin "
                    "another sweep"
                )
            return ["--multirun", *before, f"hydra.sweep.dir={quoted(str(folder))}"]
        if key == "resume":
            return [*_knobs_before(folder, arguments), *arguments]
    return list(arguments)


def _knobs_before(resumed: Path, arguments: Sequence[str]) -> list[str]:
    """What the run in the folder ``resumed``, or of a checkpoint there, was given and is not given anew."""
    folder = resumed if resumed.is_dir() else resumed.parent
    try:
        before = json.loads((folder / "status.json").read_text())["overrides"]
        given = {_knob(one) for one in arguments}
        return [one for one in before if _knob(one) not in given and not one.startswith(("resume=", "hydra."))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a checkpoint that was moved, another's file
        return []


def _knob(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
