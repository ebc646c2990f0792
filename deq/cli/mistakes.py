"""A user's mistake, told in one sentence."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, UnsupportedInterpolationType

from deq.cli.arguments import Names, typed
from deq.records.errors import UserError, first_line, in_yaml, in_yaml_too


class SweepError(UserError):
    """A mistake in how a sweep was asked for, which no job of it can do without."""


def explain(error: BaseException, conf: Path) -> str | None:
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
        return cannot_take(node, cause)
    return in_yaml_too(f"adjoint: {cause}" if node == "adjoint" else str(cause))


def _no_null_option(groups: Mapping[str, list[str]]) -> str:
    """Hydra refuses a null where it wants a group's option, but does not say which."""
    for override in sys.argv[1:]:
        group, _, value = override.partition("=")
        if value in ("null", "") and groups.get(group):
            return f"{group} must be one of {', '.join(groups[group])}, got null; leave it out for the default"
    return "a group must be one of its options, not null; `python train.py --help` lists them"


def cannot_take(node: str, error: TypeError) -> str:
    return (
        f"{node}._target_ cannot take the knobs of {node} ({first_line(error)}); mend the value of a knob, or leave "
        f"{node}._target_ out for the default"
    )
