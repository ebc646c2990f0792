"""The command line as it was typed: what Hydra would ignore, or take for something else, is refused by name.

Looked at before Hydra composes anything, so that it holds for a run, a sweep and ``--cfg`` alike. What needs the
composed config, such as the limits of values, is looked at in ``deq/command.py``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra.conf
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from deq.errors import UserError, first_line, in_yaml

_PATHS = ("resume", "data.root", "data.cache_dir", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_GIVEN = {"model": {"image_channels", "image_size", "classes", "solver", "gradient"}, "optim.optimizer": {"params"}}
"""Node -> parameters that train.py gives itself: those of the config would be ignored."""
_PLUGINS = ("hydra.sweeper", "hydra.launcher")
_HELP = "`python train.py --help` lists them"
_FLAGS = "`python train.py --hydra-help` lists the options"
_HYDRAS = "`python train.py --cfg hydra` shows what Hydra has"


def arranged(arguments: Sequence[str], conf: Path) -> tuple[list[str], bool]:
    """Options and overrides in the order that Hydra takes, and whether they only ask to be shown something.

    Hydra's own parser wants all overrides in one place; here ``seed=0 -m window=2,3`` is as good as any other order.

    Args:
        arguments: the command line without the program. conf: the folder of the config files.

    Raises:
        UserError: an option or a name that nothing reads, a deletion, a text that Hydra's grammar has no place for.
    """
    for one in arguments:
        try:
            one.encode()
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            raise UserError(
                f"cannot read {one!a}: it is no text in {encoding}; set PYTHONUTF8=1, or give another name"
            ) from error
    names = Names(conf)
    options = _options(arguments, names)
    if options.config_path or options.config_dir:
        names = Names(_folder_of(options, conf), *([Path(options.config_dir)] if options.config_dir else []))
    if not options.shell_completion:
        _refuse_what_nothing_reads(options.overrides, names)
    left = list(options.overrides)
    flags = [one for one in arguments if one != "--" and not (left and one == left[0] and left.pop(0))]
    shows = bool(options.help or options.hydra_help or options.cfg or options.info or options.shell_completion)
    return [*options.overrides, *flags], shows


def _options(arguments: Sequence[str], names: Names) -> Namespace:
    for one in arguments:
        knob = re.match(r"-+([^=]+)=", one)
        if knob and (knob.group(1) in names.all or knob.group(1) in names.groups):
            raise UserError(f"there is no option {one}; a knob has no dashes: {one.lstrip('-')}")
    parser = get_args_parser()
    parser.error = _refuse_option  # type: ignore[method-assign]  # argparse would print its usage, and ten lines
    options = parser.parse_intermixed_args(list(arguments))
    asked = [flag for flag in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(options, flag)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(map(_flag, asked))} exclude each other; leave one out")
    if options.experimental_rerun is not None:
        raise UserError("--experimental-rerun is not for these runs; go on with one: resume=RUN_FOLDER")
    if options.resolve and not (options.cfg or options.help):
        raise UserError("--resolve goes with --cfg alone; add --cfg job, or leave it out")
    if options.package and not options.cfg:
        raise UserError(f"--package {options.package} goes with --cfg alone; add --cfg job, or leave it out")
    if options.package and not names.shown(options.package, options.cfg):
        other = names.hydras(options.package) and "it is a part of Hydra's config; write --cfg hydra"
        raise UserError(f"--package {options.package}: {other or names.missing(options.package)}")
    return options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_option(message: str) -> NoReturn:
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    raise UserError(f"there is no option {unknown.group(1)}; {_FLAGS}" if unknown else f"{message}; {_FLAGS}")


def _folder_of(options: Namespace, conf: Path) -> Path:
    """The folder of the config files, which ``--config-path`` gives relative to train.py."""
    if options.config_dir and not Path(options.config_dir).is_dir():
        raise UserError(f"--config-dir {options.config_dir}: there is no such folder; give one, or leave it out")
    if not options.config_path or options.config_path.startswith("pkg://"):
        return conf
    folder: Path = conf.parent / options.config_path
    if not folder.is_dir():
        raise UserError(f"--config-path {options.config_path}: there is no such folder; leave it out for the default")
    return folder


def _refuse_what_nothing_reads(overrides: Sequence[str], names: Names) -> None:
    parsed = [_parsed(one) for one in overrides]
    for override in parsed:
        if override.key_or_group == "hydra.searchpath" and isinstance(override.value(), list):
            for place in override.value():  # type: ignore[union-attr]  # the line above
                names.add(Path(str(place).removeprefix("file://")))
    targets = {one.key_or_group.removesuffix("._target_") for one in parsed if one.key_or_group.endswith("._target_")}
    for override in parsed:
        name, value = override.package or override.key_or_group, override.value()
        if override.is_delete():
            _refuse_deletion(override, names)
        if name in _PATHS:
            _refuse_what_is_no_path(override)
        group = override.key_or_group
        if group in names.groups and isinstance(value, list | bool | int | float):
            raise UserError(f"{group} must be one of {', '.join(names.groups[group])}, got {in_yaml(value)}")
        if name in _PLUGINS and not isinstance(value, dict):
            raise UserError(f"{name} cannot be {in_yaml(value)}; write {name.replace('.', '/')}=OPTION to choose one")
        added = override.is_add() or override.is_force_add()
        if "/" in group and added and not names.has_group(group):  # Hydra would take it for a knob of that name
            raise UserError(names.missing(group))
        if "/" in group and not override.package:
            continue
        given = [name] if added or override.package else []  # any other name Hydra looks up itself
        for one in value.list if isinstance(value, ChoiceSweep) else [value]:
            given += _leaves(name, one) if isinstance(one, dict) else ()
        for leaf in given:
            if leaf not in names.all and not names.read(leaf, retargeted=targets):
                raise UserError(names.missing(leaf))


def _parsed(override: str) -> Override:
    try:
        parsed = _PARSER.parse_override(override)
        if not parsed.key_or_group:
            raise HydraException("a value without a knob")
        return parsed
    except HydraException as error:
        sentence = f"cannot read {override!r}; write KNOB=VALUE or GROUP=OPTION"
        key, equals, value = override.partition("=")
        if key and equals and _reads(f"{key}={quoted(value)}", value):
            sentence += f", and a text with such characters in quotes of two kinds: {typed(key, value)}"
        raise UserError(sentence) from error


def _reads(override: str, value: str) -> bool:
    """Whether Hydra's grammar finds that very text in it."""
    try:
        return bool(_PARSER.parse_override(override).value() == value)
    except HydraException:
        return False


def _refuse_deletion(override: Override, names: Names) -> NoReturn:
    name = (override.package or override.key_or_group).replace("/", ".")
    if name not in names.all and not names.read(name):
        raise UserError(names.missing(name))
    instead = f", or write {name}=null" if name in names.optional else ""
    raise UserError(f"{override.input_line} deletes what the program reads; leave it out for the default{instead}")


def _refuse_what_is_no_path(override: Override) -> None:
    """A number, or nothing: ``2026_01_31`` is 20260131 to Hydra's grammar, and an empty path the working folder."""
    name, value, text = override.key_or_group, override.value(), override.get_value_string().strip()
    if value == "" or (value is None and name != "resume"):
        raise UserError(f"{name} must be a path, got {in_yaml(value)}; leave it out for the default")
    if isinstance(value, bool | int | float) and str(value) != text:
        raise UserError(f"{name}={text} is read as the value {in_yaml(value)}; for that path write {typed(name, text)}")


def quoted(text: str) -> str:
    """A text as Hydra's grammar reads it back: as it is where that will do, else between quotes."""
    return text if _reads(f"text={text}", text) else QuotedString(text, Quote.single).with_quotes()


def typed(knob: str, text: str) -> str:
    """KNOB=TEXT as a person types it: the grammar's quotes inside the shell's, where there have to be any."""
    override = f"{knob}={quoted(text)}"
    if "'" in override and not re.search(r'["$`\\!]', override):
        return f'"{override}"'
    return shlex.quote(override)


_PARSER = OverridesParser.create()


class Names:
    """The names that something reads: knobs and groups of the config files, and of Hydra's own config.

    Args:
        folders: of config files.
    """

    def __init__(self, *folders: Path) -> None:
        self.knobs: dict[str, set[str]] = {}
        """Every knob and group, with the options that have it: GROUP=OPTION. None for those of config.yaml."""
        self.groups: dict[str, list[str]] = {}
        """Group -> its options."""
        self.optional: set[str] = {"adjoint"}
        """What may be null as a whole."""
        self._targets: dict[str, set[str]] = {}
        """Node -> the classes or functions that it is handed to, which know what they take."""
        self._folders = [Path(hydra.conf.__file__).parent]
        for folder in folders:
            self.add(folder)

    @property
    def all(self) -> set[str]:
        """Knobs, groups, and parts of the config that have some."""
        return self.knobs.keys() | self._targets.keys()

    def add(self, folder: Path) -> None:
        """Read what else a folder of config files brings."""
        self._folders.append(folder)
        main = folder / "config.yaml"
        if main.is_file():
            content = _content(main)
            self.knobs |= {name: set() for name in _knobs(content)}
            self._add_nodes("", content)
            self.optional |= {name for name, value in content.items() if isinstance(value, dict) and name != "hydra"}
        for file in sorted(folder.glob("*/*.yaml")):
            group, content = file.parent.name, _content(file)
            self.groups.setdefault(group, []).append(file.stem)
            if group == "hydra":
                continue
            own = content.get(group, content)  # data's files are written from the top level
            for node in (group, "adjoint") if group == "solver" else (group,):
                # An experiment has no knobs of its own: it sets those of the others.
                for name in ("", *(f".{knob}" for knob in (_knobs(own) if group != "experiment" else ()))):
                    self.knobs.setdefault(node + name, set()).add(f"{group}={file.stem}")
                self._add_nodes(node, own)

    def _add_nodes(self, name: str, content: dict[str, Any]) -> None:
        if "_target_" in content:
            self._targets.setdefault(name, set()).add(content["_target_"])
        for key, value in content.items():
            if isinstance(value, dict) and key != "hydra":
                self._add_nodes(f"{name}.{key}".lstrip("."), value)

    def has_group(self, name: str) -> bool:
        """Whether it is a group of the config files or of Hydra."""
        return name.replace("/", ".") in _PLUGINS or any((folder / name).is_dir() for folder in self._folders)

    def read(self, name: str, retargeted: Collection[str] = ()) -> bool:
        """Whether anything reads ``name``. retargeted: nodes whose target the command line gives."""
        if name in self.knobs or self.hydras(name):
            return True
        node, inside = self._node_of(name)
        if node is None or node in retargeted or re.fullmatch("_[a-z]+_", inside):  # _partial_ and such are Hydra's
            return node is not None
        parameters = self._parameters(node)
        return parameters is None or inside in parameters

    def _parameters(self, node: str) -> set[str] | None:
        """What the targets of a node take from a config; None where one takes any name, or does not tell."""
        found: set[str] = set()
        for target in self._targets[node]:
            try:
                parameters = inspect.signature(get_object(target)).parameters
            except Exception:  # it cannot be imported, and will be told of when it is built
                return None
            if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
                return None
            found |= parameters.keys()
        return found - _GIVEN.get(node, set())

    def hydras(self, name: str) -> bool:
        """Whether it is a name in Hydra's own config."""
        root, _, inside = name.partition(".")
        if root != "hydra":
            return False
        try:
            if inside:
                OmegaConf.update(OmegaConf.structured(HydraConf), inside, None)
        except (ConfigAttributeError, ConfigKeyError):
            return False
        except OmegaConfBaseException:  # the name is there, and takes no null
            return True
        return True

    def shown(self, package: str, config: str) -> bool:
        """Whether ``--cfg CONFIG --package PACKAGE`` may have something to show."""
        own = config != "hydra" and (package in self.all or self._node_of(package)[0] is not None)
        return own or package == "_global_" or (config != "job" and self.hydras(package))

    def missing(self, name: str) -> str:
        """One sentence about a name that the config chosen does not have."""
        if name in self.knobs and not self.knobs[name] and "." not in name:  # config.yaml has it
            return f"the config chosen has no {name}; leave --config-name and --config-path out for the default"
        if name in self.knobs and not self.knobs[name]:
            return f"{name} is a knob of {name.partition('.')[0]}, which is null here"
        if name in self.knobs:  # a knob of another option than the one chosen
            return f"{name} is a knob of {' and '.join(sorted(self.knobs[name]))} alone"
        if self.hydras(name):  # a place for what Hydra does not know beforehand, such as hydra.job.env_set.NAME
            return f"there is no {name} yet; write +{name}=VALUE to add it"
        if name.startswith("hydra."):
            return _nearest(name, "hydra", set(_fields(_HYDRA)), _HYDRAS)
        node, _ = self._node_of(name)
        parameters = self._parameters(node) if node is not None else None
        if node is not None and parameters is not None:
            return _nearest(name, node, parameters, f"{node} has {', '.join(sorted(parameters))}")
        inside = [knob for knob in sorted(self.knobs) if knob.endswith(f".{name}")]
        if inside:
            return f"there is no knob {name}; did you mean {inside[0]}?"
        return _nearest(name, "", self.all, _HELP)

    def _node_of(self, name: str) -> tuple[str | None, str]:
        """The innermost node that ``name`` is in, and what is left of the name there."""
        for node in sorted(self._targets, key=len, reverse=True):
            if name.startswith(f"{node}."):
                return node, name.removeprefix(f"{node}.")
        return None, ""


def _nearest(name: str, node: str, names: Collection[str], else_: str) -> str:
    """That there is no ``name``, and which of those in ``node`` may be meant."""
    close = difflib.get_close_matches(name.removeprefix(f"{node}."), names, n=1)
    meant = f"did you mean {f'{node}.{close[0]}'.lstrip('.')}?" if close else else_
    return f"there is no knob {name}; {meant}"


def _leaves(name: str, content: dict[Any, Any]) -> Iterator[str]:
    for key, value in content.items():
        inside = f"{name}.{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(inside, value)
        else:
            yield inside


def _knobs(content: dict[str, Any]) -> Iterator[str]:
    """The dotted names of what a user may set in a config file."""
    for name, value in content.items():
        if name not in ("defaults", "hydra") and not name.startswith("_"):
            if not isinstance(value, dict):
                yield name
            elif name != "optimizer":  # wired to the group's own knobs
                yield from (f"{name}.{leaf}" for leaf in _knobs(value))


@functools.cache
def _content(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # of YAML, OmegaConf or the file system
        raise UserError(f"{file} cannot be read ({first_line(error)}); mend that config file") from error
    return content if isinstance(content, dict) else {}  # type: ignore[return-value]  # names are texts


_HYDRA: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(HydraConf))  # type: ignore[assignment]


def _fields(content: dict[str, Any]) -> Iterator[str]:
    for name, value in content.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{one}" for one in _fields(value))
