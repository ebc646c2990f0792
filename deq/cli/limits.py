"""What each knob takes, looked at before any work."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from deq.cli.mistakes import SweepError
from deq.kernels import BackendName, Regularization
from deq.records import metrics
from deq.records.errors import UserError, in_yaml
from deq.solvers.solver import Stop
from deq.training.trainer import PRECISIONS, SCHEDULES


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
        raise SweepError(
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
