"""Single solves, evaluation by evaluation: what ``traces.json`` in a run's folder holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deq.records import curves
from deq.records.files import write_atomically

FILE = "traces.json"


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
