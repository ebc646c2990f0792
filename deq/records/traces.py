"""Single solves, evaluation by evaluation: what ``traces.json`` in a run's folder holds, and what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from deq.records import curves
from deq.records.curves import Crossing
from deq.records.files import write_atomically

FILE, PICTURE = "traces.json", "crossover.png"


@dataclass(frozen=True)
class Trace:
    """One solve of one batch: what the residual was after each of K evaluations, and when."""

    solver: str
    """For people: ``Anderson m = 5``."""
    kind: str
    """The solver's class, in lower case: ``anderson``, ``forward``, ``tutorialforward`` …"""
    baseline: bool
    """Whether it is forward iteration."""
    evaluations: list[int]
    """1 to K."""
    seconds: list[float]
    """From the start of the solve until the next iterate is there; median of the repeats."""
    residual_mean: list[float]
    """Of the samples' relative residuals."""
    residual_p10: list[float]
    residual_median: list[float]
    residual_p90: list[float]

    @property
    def seconds_an_iteration(self) -> float:
        """Median over the iterations after the first, which sets the solve up."""
        return curves.seconds_an_iteration(self.seconds) or self.seconds[0]

    def points(self, against: str) -> list[tuple[float, float]]:
        """(x, mean residual), x being ``seconds`` or ``evaluations``."""
        return list(zip(getattr(self, against), self.residual_mean, strict=True))


@dataclass(frozen=True)
class Traces:
    """The content of a run's ``traces.json``."""

    batch: str
    stop: str
    tol: float | None
    device: str
    curves: list[Trace]

    @property
    def baseline(self) -> Trace | None:
        """The one that others are held against."""
        return next((curve for curve in self.curves if curve.baseline), None)

    @property
    def others(self) -> list[Trace]:
        return [curve for curve in self.curves if not curve.baseline]


class Penalty(NamedTuple):
    """What an iteration takes longer than forward iteration's, median against median."""

    seconds: float
    share: float
    """Of forward iteration's seconds; 0.1 is 10 % more."""


def mixing_penalty(forward: Trace, other: Trace) -> Penalty | None:
    """None for a trace of fewer than two evaluations."""
    ours, theirs = curves.seconds_an_iteration(other.seconds), curves.seconds_an_iteration(forward.seconds)
    return Penalty(ours - theirs, (ours - theirs) / theirs) if ours is not None and theirs else None


def crossing(forward: Trace, other: Trace, against: str = "seconds") -> Crossing | None:
    """Where the mean residual of ``other`` goes below that of ``forward`` for good.

    See :func:`deq.records.curves.crossing`.

    Args:
        against: ``seconds`` or ``evaluations``.
    """
    return curves.crossing(other.points(against), forward.points(against))


def save(folder: Path, traces: Sequence[Trace], about: Mapping[str, Any]) -> None:
    """Writes ``traces.json`` into a run's folder."""

    def clean(value: Any) -> Any:
        """JSON knows no NaN."""
        if isinstance(value, list):
            return [clean(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    content = {**about, "traces": [{k: clean(v) for k, v in asdict(trace).items()} for trace in traces]}
    text = json.dumps(content, allow_nan=False)
    write_atomically(folder / FILE, lambda file: file.write(text.encode()))


def read(path: Path) -> Traces | None:
    """What a ``traces.json`` holds, without the points that have no time or residual; None if it is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("traces"), list):
        return None
    tol = content.get("tol")
    return Traces(
        batch=str(content.get("batch", "one batch")),
        stop=str(content.get("stop", "max")),
        tol=tol if _is_number(tol) else None,
        device=str(content.get("device", "")),
        curves=[trace for one in content["traces"] if (trace := _read_one(one)) is not None],
    )


_COLUMNS = ("evaluations", "seconds", "residual_mean")
_PERCENTILES = ("residual_p10", "residual_median", "residual_p90")


def _read_one(content: Any) -> Trace | None:
    """None if no point is left. A percentile that is not there is NaN, as it was before it was written."""
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in _COLUMNS):
        return None
    count = min(len(content[name]) for name in _COLUMNS)
    rows = [row for row in range(count) if all(_is_number(content[name][row]) for name in _COLUMNS)]
    if not rows:
        return None

    def percentile(name: str) -> list[float]:
        values = content.get(name)
        known = values if isinstance(values, list) else []
        return [float(known[row]) if row < len(known) and _is_number(known[row]) else math.nan for row in rows]

    kind = str(content.get("kind", ""))
    return Trace(
        solver=str(content.get("solver", kind)),
        kind=kind,
        baseline=bool(content.get("baseline", kind == "forward")),
        evaluations=[int(content["evaluations"][row]) for row in rows],
        seconds=[float(content["seconds"][row]) for row in rows],
        residual_mean=[float(content["residual_mean"][row]) for row in rows],
        **{name: percentile(name) for name in _PERCENTILES},
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
