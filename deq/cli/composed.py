"""The config that Hydra composed, held against the command line: a name that nothing reads is refused.

Every config comes from :class:`Loader`: that of a run, those of all jobs of a sweep before there is a folder, and what
``--cfg`` shows. Only in the composed config is it known which class a part of it is handed to.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal import hydra as hydras
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deq.cli import sweep
from deq.cli.arguments import Names, leaves, parsed
from deq.records.errors import UserError

_GIVEN = {"model": {"image_channels", "image_size", "classes", "solver", "gradient"}, "optim.optimizer": {"params"}}
"""Node -> parameters that train.py gives itself: those of the config would be ignored."""


class Loader(ConfigLoaderImpl):
    """Hydra's own loader of configs, which also refuses what it would let through."""

    part: ClassVar[tuple[str, str] | None] = None
    """The part of the config that is to be shown, as ``deq.cli.arguments.Arranged`` has it."""
    latest: ClassVar[Any] = None
    """What was composed last: where Hydra has made a folder, if it has."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """
        Raises:
            UserError: nothing reads a name, or it is for another mode of running.
        """
        if not validate_sweep_overrides:  # Hydra asks for the mode alone, and would take any refusal for none
            return super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        given = [parsed(one) for one in overrides]
        self._files = self._config = OmegaConf.create()
        try:
            config = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        except ConfigCompositionException as error:
            composed = _Composed(self._files, self._config, self._main(), [self._main()])
            _explain_what_is_not_there(error, given, composed)
            raise
        except KeyError as error:  # the one that Hydra has no words for
            raise UserError(
                f"hydra.job.env_copy has {error.args[0]}, which this environment does not set; set it, or leave it out"
            ) from error
        Loader.latest = config
        folders = [Path(one.path) for one in config.hydra.runtime.config_sources if one.schema == "file"]
        composed = _Composed(self._files, config, self._main(), folders)
        for override in given:
            _refuse_what_nothing_reads(override, composed)
        _refuse_tuned_names(given, composed)
        for override in given:
            _refuse_the_other_modes(override, config.hydra.mode)
        sweep.refuse_bad_tuner(config.hydra.sweeper)
        if self.part is not None:
            _refuse_what_is_not_shown(*self.part, composed)
        return config

    def _compose_config_from_defaults_list(self, *how: Any, **more: Any) -> DictConfig:
        self._config = super()._compose_config_from_defaults_list(*how, **more)
        self._files = copy.deepcopy(self._config)  # what follows are the command line's values
        return self._config

    def _main(self) -> Path:
        """The folder of the config files."""
        (main,) = [one.path for one in self.get_sources() if one.provider == "main"] or ["."]
        return Path(main)


def install(part: tuple[str, str] | None) -> None:
    """Let Hydra compose with :class:`Loader`. part: see there."""
    Loader.part, Loader.latest = part, None
    hydras.ConfigLoaderImpl = Loader  # type: ignore[attr-defined]  # imported there for itself


class _Composed:
    """A config, and who reads what in it.

    Args:
        files: as the config files chosen have it. config: with the values of the command line.
        main: the folder of this project's config files. folders: all that there are.
    """

    def __init__(self, files: DictConfig, config: DictConfig, main: Path, folders: list[Path]) -> None:
        self.files, self.config = files, config
        self._main, self._folders = main, folders

    @functools.cached_property
    def names(self) -> Names:
        """Those of all config files."""
        return Names(*self._folders)

    def reads(self, name: str, *, placed: bool = False) -> bool:
        """Whether anything reads ``name``. placed: the command line has put it among the files' names itself."""
        name = re.sub(r"\[(\w+)\]", r".\1", name)
        if not placed and _has(self.files, name):
            return True
        node, inside = self.node_of(name)
        root, _, below = name.partition(".")
        if node:
            parameters = self.parameters(node)
            known = parameters is None or inside.partition(".")[0] in parameters or re.fullmatch("_[a-z]+_", inside)
            found = bool(known) and self.reads(node)
        elif root == "hydra":
            found = self.names.hydras(name)
        else:  # a part of the config that no class is handed, in config files of the user's own
            found = bool(below) and root in self.files and root not in Names(self._main).all
        return found or self._refers_to(name)

    def node_of(self, name: str) -> tuple[str, str]:
        """The innermost node around ``name`` that a class is handed, and what is left of the name there."""
        for node in _around(name):
            if isinstance(_value(self.config, f"{node}._target_"), str):
                return node, name.removeprefix(f"{node}.")
        return "", name

    def parameters(self, node: str) -> set[str] | None:
        """What a node's class or function takes from a config; None where it takes any name, or does not tell."""
        try:
            parameters = inspect.signature(get_object(_value(self.config, f"{node}._target_"))).parameters
        except Exception:  # it cannot be imported, and will be told of when it is built
            return None
        if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            return None
        return set(parameters) - _GIVEN.get(node, set())

    def _refers_to(self, name: str) -> bool:
        """Whether another knob takes its value from ``name``."""
        text = OmegaConf.to_yaml(self.config)
        return re.search(rf"\$\{{[^}}]*(?<![\w.]){re.escape(name)}\b", text) is not None

    def missing(self, name: str) -> str:
        """One sentence about a name that nothing reads."""
        node, _ = self.node_of(name)
        return self.names.missing(name, node, (self.parameters(node) if node else None) or ())


def _around(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _value(config: DictConfig, name: str) -> Any:
    try:
        return OmegaConf.select(config, name)
    except OmegaConfBaseException:  # it refers to what is not there
        return None


def _has(config: DictConfig, name: str) -> bool:
    above, _, key = name.rpartition(".")
    node = _value(config, above) if above else config
    return isinstance(node, DictConfig) and key in node.keys()  # noqa: SIM118  # what is missing as yet counts


def _refuse_what_nothing_reads(override: Override, composed: _Composed) -> None:
    name, package, value = override.key_or_group, override.package, override.value()
    if override.is_delete() or override.is_sweep_override():  # whose values are looked at in each job
        return
    added = override.is_add() or override.is_force_add()
    choice = f"{name}@{package}" if package else name
    choices = composed.config.hydra.runtime.choices
    if choice in choices and str(choices[choice]) == str(value):  # an option of a group
        if added and package and not composed.reads(package, placed=True):
            raise UserError(composed.missing(package))
        return
    inside = list(leaves(name, value)) if isinstance(value, dict) else []
    for leaf in inside or ([name] if added else []):
        if not composed.reads(leaf):
            raise UserError(composed.missing(leaf))


def _explain_what_is_not_there(
    error: ConfigCompositionException, overrides: list[Override], composed: _Composed
) -> None:
    """Raises: UserError, where Hydra has no place for a name."""
    text = str(error)
    found = re.match(r"Could not (override|delete)(?: from config\.)? '?([\w.@/\[\]]+)", text)
    if not found or not ("delete" not in text or "does not exist" in text or "No match" in text):
        return
    how, name = found.groups()
    name = name.rpartition("@")[2]
    given = next((one for one in overrides if one.key_or_group == name), None)
    value = given.value() if given is not None else None
    absent = [name]
    if how == "override" and isinstance(value, dict) and _has(composed.files, name):
        absent = [one for one in leaves(name, value) if not _has(composed.files, one)] or [name]
    for one in absent:
        if not composed.reads(one):
            raise UserError(composed.missing(one)) from error
    if how == "delete":
        raise UserError(f"there is no {name} here to delete; leave ~{name} out") from error
    line = given.input_line if given is not None else f"{name}=VALUE"
    raise UserError(f"there is no {absent[0]} yet; write {shlex.quote(f'+{line}')} to add it") from error


def _refuse_tuned_names(overrides: list[Override], composed: _Composed) -> None:
    """Of a tuner, which makes its jobs one after another, when there is a folder; a sweep's jobs are looked at."""
    sweeper = composed.config.hydra.sweeper
    if not isinstance(sweeper, DictConfig) or str(sweeper.get("_target_")).endswith(f".{sweep.GridSweeper.__name__}"):
        return
    params = sweeper.get("params")
    tuned = [str(one) for one in params] if isinstance(params, DictConfig) else []
    for key in [*tuned, *(one.get_key_element() for one in overrides if one.is_sweep_override())]:
        name = key.lstrip("+").rpartition("@")[2]
        known = _has(composed.config, name) or name in composed.names.all
        if not known and not (key.startswith("+") and composed.reads(name)):
            raise UserError(composed.missing(name))


def _refuse_the_other_modes(override: Override, mode: RunMode | None) -> None:
    """Refuse a knob of one run in a sweep, and the other way round: it would do nothing."""
    name, line = override.key_or_group.replace("/", "."), override.input_line
    _, _, value = str(line).partition("=")
    if mode == RunMode.MULTIRUN and name == "hydra.run.dir":
        raise UserError(f"{line} is the folder of one run, and this is a sweep; give hydra.sweep.dir={value}")
    if mode == RunMode.RUN and name == "hydra.sweep.dir":
        raise UserError(f"{line} is the folder of a sweep, and this is one run; give hydra.run.dir={value}, or add -m")
    if mode == RunMode.RUN and f"{name}.".startswith(("hydra.sweep.", "hydra.sweeper.")):
        raise UserError(f"{line} is for a sweep, and this is one run; add -m, or leave it out")


def _refuse_what_is_not_shown(config: str, part: str, composed: _Composed) -> None:
    if part == "_global_":
        return
    of_hydra = part.partition(".")[0] == "hydra"
    if not _has(composed.config, part):
        raise UserError(f"--package {part}: {composed.missing(part)}")
    if of_hydra and config == "job":
        raise UserError(f"--package {part}: it is a part of Hydra's config; write --cfg hydra")
    if not of_hydra and config == "hydra":
        raise UserError(f"--package {part}: it is no part of Hydra's config; write --cfg job")
    if _value(composed.config, part) is None:
        raise UserError(f"--package {part}: it is null here, and there is nothing to show; leave it out")
