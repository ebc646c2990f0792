"""The numbers of the report: every arm's own, and its ratios against each baseline, paired by seed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deq.records.curves import Crossing
from deq.records.traces import Penalty, crossing, mixing_penalty
from deq.report.arms import BASELINES, FORWARD, SOLVERS, Arm, arms_of, baselines_for, common, shown_knob
from deq.report.runs import Evaluation, Run, Sweep

OWN: dict[str, str] = {
    "test_accuracy_best": "test/accuracy",
    "test_accuracy_last": "test/accuracy",
    "train_accuracy": "train/accuracy",
    "train_s": "time/train_s",
    "forward_evaluations": "solver/forward_evaluations",
    "backward_evaluations": "solver/backward_evaluations",
    "forward_unconverged": "solver/forward_unconverged_fraction",
    "backward_unconverged": "solver/backward_unconverged_fraction",
    "forward_converged_steps": "solver/forward_converged_steps",
    "backward_converged_steps": "solver/backward_converged_steps",
    "train_tflop": "energy/train_tflop",
    "test_tflop": "energy/test_tflop",
    "train_gpu_joules": "energy/train_gpu_joules",
    "test_gpu_joules": "energy/test_gpu_joules",
    "train_cpu_joules": "energy/train_cpu_joules",
    "test_cpu_joules": "energy/test_cpu_joules",
    "co2_grams": "energy/co2_grams",
}
"""Number of an arm → the metric it is made of."""

COUNTERS = {"GPU": "energy/train_gpu_joules", "CPU": "energy/train_cpu_joules"}
"""Whose counter measured → the joules of training steps."""


@dataclass(frozen=True)
class Spread:
    """Median and range of ``n`` values."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread | None:
        """Of the values that there are; None if there is none."""
        known = [value for value in values if value is not None]
        return Spread(statistics.median(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class Pair:
    """One seed's run of an arm beside the baseline's run of that seed.

    Attributes:
        target: test accuracy, 0 to 1. seconds, baseline_s: of training until the first evaluation at or above it; None
            for never. compute, baseline_compute: TFLOP of training until then. energy, baseline_energy: joules of
            training until then, None where no counter measured both.
    """

    seed: Any
    target: float
    seconds: float | None
    baseline_s: float | None
    compute: float | None = None
    baseline_compute: float | None = None
    energy: float | None = None
    baseline_energy: float | None = None

    @property
    def speedup(self) -> float | None:
        return _ratio(self.baseline_s, self.seconds)

    @property
    def time_saved(self) -> float | None:
        return _saved(self.seconds, self.baseline_s)

    @property
    def compute_saved(self) -> float | None:
        return _saved(self.compute, self.baseline_compute)

    @property
    def energy_saved(self) -> float | None:
        return _saved(self.energy, self.baseline_energy)


@dataclass(frozen=True)
class Against:
    """An arm held against one baseline.

    ``differs``: knobs in which the two differ beside the solver and its own. ``counter``: what measured the energy.
    """

    kind: str
    baseline: Arm
    differs: list[str]
    pairs: list[Pair]
    counter: str | None

    @property
    def target(self) -> Spread | None:
        return Spread.of(pair.target for pair in self.pairs)

    @property
    def seconds(self) -> Spread | None:
        return Spread.of(pair.seconds for pair in self.pairs)

    @property
    def baseline_seconds(self) -> Spread | None:
        return Spread.of(pair.baseline_s for pair in self.pairs)

    @property
    def speedup(self) -> Spread | None:
        return Spread.of(pair.speedup for pair in self.pairs)

    @property
    def time_saved(self) -> Spread | None:
        return Spread.of(pair.time_saved for pair in self.pairs)

    @property
    def compute_saved(self) -> Spread | None:
        return Spread.of(pair.compute_saved for pair in self.pairs)

    @property
    def energy_saved(self) -> Spread | None:
        return Spread.of(pair.energy_saved for pair in self.pairs)

    @property
    def never(self) -> int:
        """Seeds that have not reached the target."""
        return sum(pair.seconds is None for pair in self.pairs)

    @property
    def baseline_never(self) -> int:
        """Seeds whose baseline has not reached the target, which only a target of the user's allows."""
        return sum(pair.baseline_s is None for pair in self.pairs)


@dataclass(frozen=True)
class Trade:
    """What a solver's iterations cost and bring beside forward iteration's, on the traces of one run.

    Crossovers are None where the solver does not stay below.
    """

    arm: Arm
    run: Run
    solver: str
    by_evaluations: Crossing | None
    by_seconds: Crossing | None
    penalty: Penalty | None


@dataclass
class ArmNumbers:
    """An arm with all its numbers. ``own``: name in :data:`OWN` → spread over its counted runs."""

    arm: Arm
    own: dict[str, Spread | None]
    against: dict[str, Against]

    @property
    def speedup(self) -> float | None:
        """Median, against the first of its baselines."""
        first = next(iter(self.against.values()), None)
        spread = first.speedup if first is not None else None
        return spread.median if spread is not None else None


@dataclass
class Comparison:
    """All that tables and figures show."""

    sweep: Sweep
    arms: list[ArmNumbers]
    target: float | None
    trades: list[Trade] = field(default_factory=list)

    @property
    def baselines(self) -> list[Arm]:
        """Every arm that another is held against, the main kind first."""
        found: list[Arm] = []
        for kind in BASELINES:
            for one in self.arms:
                against = one.against.get(kind)
                if against is not None and not any(against.baseline is arm for arm in found):
                    found.append(against.baseline)
        return found

    @property
    def common(self) -> dict[str, Any]:
        return common([one.arm for one in self.arms])

    @property
    def measured_energy(self) -> bool:
        """Whether any run has joules that a counter measured."""
        return any(one.own[name] is not None for one in self.arms for name in ("train_gpu_joules", "train_cpu_joules"))

    @property
    def no_joules(self) -> str:
        """Why there are none, where there are none; part of a sentence."""
        counters = {str(one) for run in self.sweep.runs for one in run.environment.get("energy_counters") or []}
        return f"no reading of {', '.join(sorted(counters))} yet" if counters else "no energy counter on this machine"

    @property
    def best(self) -> ArmNumbers | None:
        """The arm that this sweep's claim is of: every seed at the target first, then speedup.

        Of Anderson's family, or, where none of it ran, of what is no baseline.
        """
        candidates = [one for one in self.arms if "Anderson" in one.arm.solver and one.arm.counted]

        def rank(one: ArmNumbers) -> tuple[float, float, float]:
            first = next(iter(one.against.values()), None)
            accuracy = one.own["test_accuracy_best"]
            never = first.never if first is not None else 0
            return (-never, one.speedup or 0.0, accuracy.median if accuracy is not None else 0.0)

        # The tutorial's own way of writing it is a baseline for this project's, so it leads only where it is alone.
        ours = [one for one in candidates if one.arm.solver == "Anderson"]
        others = [one for one in self.arms if not one.arm.is_baseline and one.arm.counted]
        return max(ours or candidates or others, key=rank, default=None)


def compare(sweep: Sweep, target: float | None = None) -> Comparison:
    """Group the runs, take every arm's numbers and hold it against each baseline.

    Args:
        target: test accuracy, 0 to 1, that time and compute are taken to; None takes, seed by seed, the baseline's
            best.
    """
    arms = arms_of(sweep.runs)
    own = {id(arm): _own(arm) for arm in arms}
    best: dict[int, tuple[float, float]] = {}
    for arm in arms:
        accuracy, seconds = own[id(arm)]["test_accuracy_best"], own[id(arm)]["train_s"]
        if accuracy is not None:
            best[id(arm)] = (accuracy.median, seconds.median if seconds is not None else math.inf)
    numbers = []
    for arm in arms:
        against = {
            kind: _against(kind, arm, baseline.arm, baseline.differs, target)
            for kind, baseline in baselines_for(arm, arms, best).items()
            if arm.counted
        }
        numbers.append(ArmNumbers(arm, own[id(arm)], {kind: one for kind, one in against.items() if one.pairs}))
    return Comparison(sweep, numbers, target, _trades(arms))


def _own(arm: Arm) -> dict[str, Spread | None]:
    def value(run: Run, name: str) -> float | None:
        metric = OWN[name]
        if name == "test_accuracy_best":
            return run.best(metric)
        return run.over_run(metric) if metric.startswith("solver/") else run.last(metric)

    return {name: Spread.of(value(run, name) for run in arm.counted) for name in OWN}


def _against(kind: str, arm: Arm, baseline: Arm, differs: list[str], target: float | None) -> Against:
    counter = next(
        (
            name
            for name, metric in COUNTERS.items()
            if all(any(run.last(metric) is not None for run in one.counted) for one in (arm, baseline))
        ),
        None,
    )
    pairs = []
    for seed in arm.seeds:
        theirs = baseline.with_seed(seed)
        bests = [best for run in theirs if (best := run.best("test/accuracy")) is not None]
        if bests:
            # Where a seed was run more than once, the accuracy that all of its runs came to.
            aim = min(bests) if target is None else target
            pairs.append(_pair(seed, aim, arm.with_seed(seed), theirs, COUNTERS[counter] if counter else None))
    return Against(kind, baseline, differs, pairs, counter)


def _pair(seed: Any, target: float, ours: Sequence[Run], theirs: Sequence[Run], joules: str | None) -> Pair:
    def at_target(runs: Sequence[Run], metric: str | None) -> float | None:
        if metric is None:
            return None
        return _median_or_never([_value_at(run.first_at(target), metric) for run in runs])

    return Pair(
        seed,
        target,
        seconds=at_target(ours, "time/train_s"),
        baseline_s=at_target(theirs, "time/train_s"),
        compute=at_target(ours, "energy/train_tflop"),
        baseline_compute=at_target(theirs, "energy/train_tflop"),
        energy=at_target(ours, joules),
        baseline_energy=at_target(theirs, joules),
    )


def _value_at(evaluation: Evaluation | None, metric: str) -> float | None:
    return evaluation.get(metric) if evaluation is not None else None


def _median_or_never(values: Sequence[float | None]) -> float | None:
    """Median where None stands for infinity: with more than half of the runs at the target, it is finite."""
    if not values:
        return None
    median = statistics.median(math.inf if value is None else value for value in values)
    return median if math.isfinite(median) else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _saved(ours: float | None, theirs: float | None) -> float | None:
    return 1 - ours / theirs if ours is not None and theirs else None


def _trades(arms: Sequence[Arm]) -> list[Trade]:
    found = []
    for arm in arms:
        for run in arm.runs:
            if run.traces is None or run.traces.baseline is None:
                continue
            forward = run.traces.baseline
            for curve in run.traces.others:
                penalty = mixing_penalty(forward, curve)
                found.append(
                    Trade(
                        arm,
                        run,
                        curve.solver,
                        crossing(forward, curve, "evaluations"),
                        crossing(forward, curve, "seconds"),
                        penalty,
                    )
                )
    return found


PAPER = {
    "speedup": "2x to 8.6x",
    "compute_saved": "50 % to 88 %",
    "train_accuracy": "64.7 % → 96.3 %",
    "test_accuracy": "64.2 % → 79.1 %",
    "train_s": "12,000 s → 1,400 s",
}
"""What arXiv 2410.19460 reports of CIFAR-10 on a V100, forward iteration → Anderson."""


def is_cifar10(comparison: Comparison) -> bool:
    """Whether every run's data are CIFAR-10, the package's own or a folder of images that is named so."""

    def of(arm: Arm) -> bool:
        data, folders = arm.knobs.get("data"), Path(str(arm.knobs.get("data.root", ""))).parts[-2:]
        # CIFAR-10-images and cifar10_jpeg, but neither cifar100 nor cifar10_vs_cats.
        names = [re.fullmatch(r"cifar[-_]?10([-_](images|jpe?g|png|batches.*))?", name.lower()) for name in folders]
        named = any(names)
        return data == "cifar10" or (
            data == "image_folder" and named and arm.knobs.get("data.image_size") in (None, 32)
        )

    return bool(comparison.arms) and all(of(one.arm) for one in comparison.arms)


def main_baseline(comparison: Comparison) -> Arm | None:
    """The baseline of the best arm, else the first there is."""
    best = comparison.best
    if best is not None and best.against:
        return next(iter(best.against.values())).baseline
    return next(iter(comparison.baselines), None)


def choice_of_baseline(comparison: Comparison) -> list[str]:
    """Which forward arms the others are held against, and why these: sentences."""
    told = []
    forward = [one for one in comparison.arms if one.arm.is_baseline]
    if not forward:
        return [
            "No arm here is forward iteration, so there is nothing to name a ratio against, and none is given. "
            "Train it beside the others: python train.py -m solver=anderson,forward"
        ]
    for kind in BASELINES:
        same = [one.arm for one in forward if one.arm.solver == kind]
        chosen = [arm for arm in comparison.baselines if arm.solver == kind]
        if not chosen:
            continue
        what = "the main baseline" if kind == FORWARD else "a second baseline"
        if kind != FORWARD and not any(arm.solver == FORWARD for arm in comparison.baselines):
            what = "the baseline"
        names = " and ".join(f"“{arm.label}”" for arm in chosen)
        sentence = f"{names} {'is' if len(chosen) == 1 else 'are'} {what}"
        if kind == FORWARD:
            sentence += ", with all of this project's engineering"
        if len(same) > len(chosen):
            sentence += f": of {len(same)} arms with {SOLVERS[kind]}, best in median test accuracy, all else equal"
        told.append(sentence + ".")
    for one in comparison.arms:
        for against in one.against.values():
            if against.differs:
                knobs = ", ".join(
                    f"{shown_knob(name, one.arm.knobs.get(name))} against "
                    f"{shown_knob(name, against.baseline.knobs.get(name))}"
                    for name in against.differs
                )
                told.append(
                    f"“{one.arm.label}” has no baseline that is equal in all else; it is held against "
                    f"“{against.baseline.label}”, which differs: {knobs}."
                )
    return told
