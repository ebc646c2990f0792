"""Runs that differ in nothing but the seed are one arm; what differs between arms names them, and all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deq.records.errors import in_yaml
from deq.report.runs import Run

FORWARD, TUTORIAL_FORWARD = "Forward", "TutorialForward"
BASELINES = (FORWARD, TUTORIAL_FORWARD)
"""Solvers that others are held against, the main one first."""

SOLVERS = {
    "Anderson": "Anderson",
    FORWARD: "forward iteration",
    "Broyden": "Broyden",
    TUTORIAL_FORWARD: "forward iteration, as the tutorial writes it",
    "TutorialAnderson": "Anderson, as the tutorial writes it",
}
"""Class name → what people call it."""

_SHARED = frozenset({"window", "beta", "tol", "max_iter", "stop", "compact", "regularization"})
"""Knobs of the top level that are there for solvers to copy: the solver's own node says which it has."""

_NOT_OF_THE_ARM = (
    "seed",
    "resume",
    "logger",
    "log_every",
    "probe",
    "crossover",
    "energy",
    "objective",
    "device",
    "data.cache_dir",
)
"""What does not change what is trained. The device is told by the machine, since ``auto`` may be any."""

_SYMBOLS = {"solver.beta": "β", "adjoint.beta": "adjoint β"}

Knobs = dict[str, Any]


@dataclass
class Arm:
    """The runs of one configuration.

    Attributes:
        knobs: dotted name → value of all that makes this configuration.
        solver: class name of its solver.
        label: for people; what differs from other arms is in it.
        runs: all of them. counted: those that its numbers are of: the finished ones, and while there are none, those
            that have been evaluated at least once.
    """

    knobs: Knobs
    solver: str
    label: str = ""
    runs: list[Run] = field(default_factory=list)

    @property
    def is_baseline(self) -> bool:
        return self.solver in BASELINES

    @property
    def counted(self) -> list[Run]:
        return [run for run in self.runs if run.finished and run.evaluations] or [
            run for run in self.runs if run.evaluations
        ]

    @property
    def unfinished(self) -> bool:
        """Whether its numbers are of runs that did not come to their end."""
        return bool(self.counted) and not self.counted[0].finished

    @property
    def seeds(self) -> list[Any]:
        """Of the counted runs, each once."""
        return sorted({run.seed for run in self.counted}, key=lambda seed: (str(type(seed)), seed))

    def with_seed(self, seed: Any) -> list[Run]:
        """The counted runs of a seed: more than one where a knob was swept that this arm's solver does not have."""
        return [run for run in self.counted if run.seed == seed]


@dataclass(frozen=True)
class Baseline:
    """The arm that another is held against, and the knobs beside the solver's own in which the two differ."""

    arm: Arm
    differs: list[str]


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """The arms, baselines first, each with its label."""
    shared = _SHARED.union(*(run.config[node] for run in runs for node in ("solver", "adjoint") if _has(run, node)))
    arms: list[Arm] = []
    for run in runs:
        knobs = knobs_of(run, shared)
        arm = next((arm for arm in arms if arm.knobs == knobs), None)
        if arm is None:
            arm = Arm(knobs, _class(run.config.get("solver")))
            arms.append(arm)
        arm.runs.append(run)
    names = differing(arms)
    kinds = list(SOLVERS)
    arms.sort(
        key=lambda arm: (
            0 if arm.solver == FORWARD else 1 if arm.is_baseline else 2,
            kinds.index(arm.solver) if arm.solver in kinds else len(kinds),
            arm.solver,
            [_order(arm.knobs.get(name)) for name in names],
        )
    )
    _label(arms, names)
    return arms


def knobs_of(run: Run, shared: frozenset[str] = _SHARED) -> Knobs:
    """All that makes a run's arm, dotted name → value.

    Not in it: the seed, what has no effect on the result, and copies, which the config holds of one value under
    several names. The adjoint's knobs are in it where they are not the solver's.
    """
    config = {key: value for key, value in run.config.items() if key not in shared or isinstance(value, Mapping)}
    gradient = _class(config.get("gradient"))
    flat = _flat(config)
    knobs = {
        name: value
        for name, value in flat.items()
        if not any(name == one or name.startswith(f"{one}.") for one in _NOT_OF_THE_ARM)
        and not name.startswith(("gradient.solver", "optim.optimizer", "adjoint"))
        and not name.endswith("._partial_")
    }
    # Only implicit differentiation solves an adjoint equation.
    if gradient == "Implicit":
        knobs |= {
            name: value
            for name, value in flat.items()
            if name.startswith("adjoint") and flat.get(f"solver{name.removeprefix('adjoint')}", _ABSENT) != value
        }
    if "model.cuda_graph" in knobs and knobs["model.cuda_graph"] == knobs.get("cuda_graph"):
        del knobs["model.cuda_graph"]
    # CIFAR-10 is the same wherever it lies; a folder of images is known by nothing else.
    if "data.root" in knobs:
        root = knobs.pop("data.root")
        if knobs.get("data") == "image_folder" and root is not None:
            knobs["data.root"] = str(root)
    return knobs | {"device": run.device}


def differing(arms: Sequence[Arm]) -> list[str]:
    """The knobs that do not have one value in all arms that have them, the solver's own first."""
    names = sorted({name for arm in arms for name in arm.knobs}, key=_rank)
    return [name for name in names if len({_key(value) for value in _values(arms, name)}) > 1]


def common(arms: Sequence[Arm]) -> Knobs:
    """The knobs that have one value in all arms that have them."""
    differ = set(differing(arms))
    found: Knobs = {}
    for arm in arms:
        found |= {name: value for name, value in arm.knobs.items() if name not in differ}
    return dict(sorted(found.items(), key=lambda item: _rank(item[0])))


def shown_knob(name: str, value: Any) -> str:
    """``window 5``, ``β 0.5``, ``optim.lr 0.003``."""
    text = value if isinstance(value, str) else in_yaml(value)
    if name in ("data", "device"):
        return str(text)
    if name == "adjoint":
        return f"adjoint {SOLVERS.get(str(text), text)}"
    if name in _SYMBOLS:
        return f"{_SYMBOLS[name]} {text}"
    if name.startswith("adjoint."):
        return f"adjoint {name.removeprefix('adjoint.')} {text}"
    return f"{name.removeprefix('solver.')} {text}"


def baselines_for(arm: Arm, arms: Sequence[Arm], best: Mapping[int, tuple[float, float]]) -> dict[str, Baseline]:
    """What an arm is held against: solver's class name → the forward arm nearest to it.

    Nearest: with the fewest other knobs different, none of them the data or the device. The mixing parameter is the
    solver's own, so where forward iteration ran with several, the one that did best is taken.

    Args:
        best: ``id`` of an arm → its median best test accuracy and median seconds of training; arms without an
            evaluation are not in it and are no baselines.
    """
    found = {}
    for kind in BASELINES:
        candidates: list[tuple[int, float, float, int, Baseline]] = []
        for other in arms:
            if other.solver == kind and id(other) in best:
                differs = _apart(arm, other)
                if not any(name.split(".")[0] in ("data", "device") for name in differs):
                    accuracy, seconds = best[id(other)]
                    candidates.append((len(differs), -accuracy, seconds, len(candidates), Baseline(other, differs)))
        if candidates:
            found[kind] = min(candidates)[-1]
    return found


def _apart(arm: Arm, baseline: Arm) -> list[str]:
    """The knobs in which two arms differ, beside the choice of a solver and what only one of the solvers has."""
    if arm is baseline:
        return []
    own = {"solver", "adjoint", "solver.beta", "adjoint.beta"}
    names = sorted((arm.knobs.keys() | baseline.knobs.keys()) - own, key=_rank)
    found = []
    for name in names:
        ours, theirs = arm.knobs.get(name, _ABSENT), baseline.knobs.get(name, _ABSENT)
        if name.startswith("solver.") and _ABSENT in (ours, theirs):
            continue
        if name.startswith("adjoint."):
            # Absent means the solver's; a knob that one of the two solvers does not have is that solver's own.
            plain = f"solver.{name.removeprefix('adjoint.')}"
            ours = arm.knobs.get(plain, _ABSENT) if ours is _ABSENT else ours
            theirs = baseline.knobs.get(plain, _ABSENT) if theirs is _ABSENT else theirs
            if _ABSENT in (ours, theirs):
                continue
        if ours != theirs:
            found.append(name)
    return found


class _Absent:
    """Stands for the value of a knob that an arm does not have."""


_ABSENT = _Absent()


def _label(arms: Sequence[Arm], names: Sequence[str]) -> None:
    # Another data set brings its own model, epochs and learning rate: its name says them all, as long as it does.
    with_data = set() if "data" not in names else {name for name in names if _follows_data(name, arms)}
    told = [name for name in names if name != "solver" and name not in with_data]
    for arm in arms:
        kind = SOLVERS.get(arm.solver, arm.solver)
        arm.label = " · ".join([kind, *(shown_knob(name, arm.knobs[name]) for name in told if name in arm.knobs)])
    for label in {arm.label for arm in arms}:
        same = [arm for arm in arms if arm.label == label]
        if len(same) > 1:  # a knob that one version of the code has and another has not
            every = sorted({name for arm in same for name in arm.knobs}, key=_rank)
            apart = [name for name in every if len({_key(arm.knobs.get(name, _ABSENT)) for arm in same}) > 1]
            for arm in same:
                arm.label = " · ".join([label, *(shown_knob(name, arm.knobs.get(name)) for name in apart)])


def _follows_data(name: str, arms: Sequence[Arm]) -> bool:
    if name.startswith(("solver", "adjoint", "gradient", "device")) or name in ("data", "data.root"):
        return False
    by_data: dict[Any, set[str]] = {}
    for arm in arms:
        key = (arm.knobs.get("data"), arm.knobs.get("data.root"))
        by_data.setdefault(key, set()).add(_key(arm.knobs.get(name, _ABSENT)))
    return all(len(values) == 1 for values in by_data.values())


def _values(arms: Sequence[Arm], name: str) -> list[Any]:
    """A knob's values, one an arm. Where the adjoint has no value of its own, that is one, too."""
    values = [arm.knobs.get(name, _ABSENT) for arm in arms]
    if name.startswith("adjoint"):
        return values
    return [value for value in values if value is not _ABSENT]


def _key(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value))


_ORDER = ("solver", "data", "data.root", "device", "model", "gradient", "solver.window", "solver.beta")


def _rank(name: str) -> tuple[int, int, str]:
    if name in _ORDER:
        return (0, _ORDER.index(name), name)
    return (1 if name.startswith("solver.") else 2 if name.startswith("adjoint") else 3, 0, name)


def _has(run: Run, node: str) -> bool:
    return isinstance(run.config.get(node), Mapping)


def _flat(config: Mapping[str, Any], path: str = "") -> Knobs:
    """Dotted name → leaf. A node's ``_target_`` is the node's own value: ``solver`` → ``Anderson``."""
    found: Knobs = {}
    for key, value in config.items():
        name = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            found[path] = _last(str(value))
        elif isinstance(value, Mapping):
            found |= _flat(value, name)
        else:
            found[name] = value
    return found


def _class(node: Any) -> str:
    return _last(str(node.get("_target_", ""))) if isinstance(node, Mapping) else ""


def _last(target: str) -> str:
    return target.rpartition(".")[2]
