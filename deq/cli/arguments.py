"""The command line as it was typed: what Hydra would ignore, or take for something else, is refused by name.

Looked at before Hydra composes anything: options, the grammar of overrides, paths and deletions. Whether anything reads
a name is known when Hydra has composed, and is looked at in ``deq/cli/composed.py``; the limits of values are those of
``deq/cli/limits.py``.
"""

from __future__ import annotations

import difflib
import functools
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from deq.records.errors import UserError, first_line, in_yaml

_PATHS = ("resume", "data.root", "data.cache_dir", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_PLUGINS = ("hydra.sweeper", "hydra.launcher")
_HELP = "`python train.py --help` lists them"
_FLAGS = "`python train.py --hydra-help` lists the options"
_HYDRAS = "`python train.py --cfg hydra` shows what Hydra has"


class Arranged(NamedTuple):
    """A command line in the order that Hydra takes."""

    arguments: list[str]
    shows: bool
    """Whether it only asks to be shown something."""
    part: tuple[str, str] | None
    """Of which config only which part is asked for: ``--cfg CONFIG --package PART``."""


def arranged(arguments: Sequence[str], conf: Path) -> Arranged:
    """Options and overrides in the order that Hydra takes.

    Hydra's own parser wants all overrides in one place; here ``seed=0 -m window=2,3`` is as good as any other order.

    Args:
        arguments: the command line without the program. conf: the folder of the config files.

    Raises:
        UserError: an option that is none, a deletion, no path, a text that Hydra's grammar has no place for.
    """
    for one in arguments:
        try:
            one.encode()
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            raise UserError(
                f"cannot read {one!a}: it is no text in {encoding}; set PYTHONUTF8=1, or give another name"
            ) from error
    own = Names(conf)
    options = _options(arguments, own, conf)
    if options.config_dir:
        Names(Path(options.config_dir))  # files there that cannot be read are told of
    if not options.shell_completion:
        for override in map(parsed, options.overrides):
            _refuse_at_sight(override, own)
    left = list(options.overrides)
    flags = [one for one in arguments if one != "--" and not (left and one == left[0] and left.pop(0))]
    shows = bool(options.help or options.hydra_help or options.cfg or options.info or options.shell_completion)
    return Arranged([*options.overrides, *flags], shows, (options.cfg, options.package) if options.package else None)


def _options(arguments: Sequence[str], names: Names, conf: Path) -> Namespace:
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
    if options.config_dir and not Path(options.config_dir).is_dir():
        raise UserError(f"--config-dir {options.config_dir}: there is no such folder; give one, or leave it out")
    path = options.config_path
    if path and not path.startswith("pkg://") and not (conf.parent / path).is_dir():  # relative to train.py
        raise UserError(f"--config-path {path}: there is no such folder; leave it out for the default")
    return options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_option(message: str) -> NoReturn:
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    raise UserError(f"there is no option {unknown.group(1)}; {_FLAGS}" if unknown else f"{message}; {_FLAGS}")


def _refuse_at_sight(override: Override, names: Names) -> None:
    """What is wrong whatever the config will hold."""
    name, value = override.key_or_group, override.value()
    if override.is_delete():
        _refuse_deletion(override, names)
    elif name in _PATHS:
        _refuse_what_is_no_path(override)
    elif name in names.groups and isinstance(value, list | bool | int | float):
        raise UserError(f"{name} must be one of {', '.join(names.groups[name])}, got {in_yaml(value)}")
    elif name in _PLUGINS and not isinstance(value, dict):
        raise UserError(f"{name} cannot be {in_yaml(value)}; write {name.replace('.', '/')}=OPTION to choose one")


def parsed(override: str) -> Override:
    """
    Raises:
        UserError: Hydra's grammar has no place for it.
    """
    try:
        found = _PARSER.parse_override(override)
        if not found.key_or_group:
            raise HydraException("a value without a knob")
        return found
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


def _refuse_deletion(override: Override, names: Names) -> None:
    """Refuse it where the program reads the name; what a user's own config files bring may go, and Hydra's dicts."""
    name = (override.package or override.key_or_group).replace("/", ".")
    if name in names.all or name in _HYDRAS_OWN or name.rpartition(".")[0] in _PLUGINS:
        instead = f", or write {name}=null" if name in names.optional else ""
        raise UserError(f"{override.input_line} deletes what the program reads; leave it out for the default{instead}")


def _refuse_what_is_no_path(override: Override) -> None:
    """A number, or nothing: ``2026_01_31`` is 20260131 to Hydra's grammar, and an empty path the working folder."""
    name, value, text = override.key_or_group, override.value(), override.get_value_string().strip()
    if value == "" or (value is None and name.startswith("hydra.")):
        instead = "leave it out for the default" if name != "data.root" else "give data.root=DIR"
        raise UserError(f"{name} must be a path, got {in_yaml(value)}; {instead}")
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
        self._nodes: set[str] = set()
        """Parts of the config that have knobs, and what Hydra or the program itself gives them."""
        for folder in folders:
            self.add(folder)

    @property
    def all(self) -> set[str]:
        """Every name in the config files."""
        return self.knobs.keys() | self._nodes

    def add(self, folder: Path) -> None:
        """Read what else a folder of config files brings."""
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
        self._nodes |= {name} if name else set()
        for key, value in content.items():
            inside = f"{name}.{key}".lstrip(".")
            if isinstance(value, dict) and key != "hydra":
                self._add_nodes(inside, value)
            elif key != "defaults":
                self._nodes.add(inside)

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

    def missing(self, name: str, node: str = "", parameters: Collection[str] = ()) -> str:
        """One sentence about a name that the config chosen does not have.

        Args:
            node: the part of the config that it is in. parameters: what the class takes that this part is handed to.
        """
        if name in self.knobs and not self.knobs[name] and "." not in name:  # config.yaml has it
            return f"the config chosen has no {name}; leave --config-name and --config-path out for the default"
        if name in self.knobs and not self.knobs[name]:
            return f"{name} is a knob of {name.partition('.')[0]}, which is null here"
        if name in self.knobs:  # a knob of another option than the one chosen
            return f"{name} is a knob of {' and '.join(sorted(self.knobs[name]))} alone"
        if node and parameters:
            return _nearest(name, node, parameters, f"{node} has {', '.join(sorted(parameters))}")
        if name.startswith("hydra."):
            return _nearest(name, "hydra", {one.removeprefix("hydra.") for one in _HYDRAS_OWN}, _HYDRAS)
        inside = [knob for knob in sorted(self.knobs) if knob.endswith(f".{name}")]
        if inside:
            return f"there is no knob {name}; did you mean {inside[0]}?"
        return _nearest(name, "", self.all, _HELP)


def _nearest(name: str, node: str, names: Collection[str], else_: str) -> str:
    """That there is no ``name``, and which of those in ``node`` may be meant."""
    close = difflib.get_close_matches(name.removeprefix(f"{node}."), names, n=1)
    meant = f"did you mean {f'{node}.{close[0]}'.lstrip('.')}?" if close else else_
    return f"there is no knob {name}; {meant}"


def leaves(name: str, content: dict[Any, Any]) -> Iterator[str]:
    """The dotted names of all values of a dict that stands at ``name``."""
    for key, value in content.items():
        inside = f"{name}.{key}"
        if isinstance(value, dict) and value:
            yield from leaves(inside, value)
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


def _fields(name: str, content: dict[str, Any]) -> Iterator[str]:
    yield name
    for key, value in content.items():
        yield from _fields(f"{name}.{key}", value if isinstance(value, dict) else {})


_HYDRAS_OWN = set(_fields("hydra", _HYDRA))
"""Every name that Hydra has of its own."""
