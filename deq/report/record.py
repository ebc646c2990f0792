"""The report's numbers as one JSON object."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deq.records.curves import Crossing
from deq.report.compare import Against, ArmNumbers, Comparison, Spread
from deq.report.runs import Run, now
from deq.report.tables import Text, command_of

Json = dict[str, Any]


def record(comparison: Comparison, text: Text, out: Path) -> Json:
    """Every number of the tables. Accuracies and shares from 0 to 1, times in seconds, folders relative to ``out``."""
    content = {
        "made": now(),
        "folder": os.path.relpath(comparison.sweep.folder.resolve(), out.resolve()),
        "headline": text.headline,
        "conditions": dict(text.conditions),
        "warnings": text.warnings,
        "missing": [asdict(gap) for gap in text.gaps],
        "baselines": [arm.label for arm in comparison.baselines],
        "choice_of_baseline": text.baselines,
        "target": comparison.target,
        "arms": [_arm(one) for one in comparison.arms],
        "paper": [[cell.text for cell in row] for row in text.paper.rows] if text.paper is not None else None,
        "trades": [
            {
                "arm": trade.arm.label,
                "seed": trade.run.seed,
                "run": trade.run.folder.name,
                "solver": trade.solver,
                "mixing_penalty_s": trade.penalty.seconds if trade.penalty is not None else None,
                "mixing_penalty": trade.penalty.share if trade.penalty is not None else None,
                "crossover_by_evaluations": _crossover(trade.by_evaluations),
                "crossover_by_seconds": _crossover(trade.by_seconds),
            }
            for trade in comparison.trades
        ],
        "runs": [_run(run, out) for run in comparison.sweep.runs],
    }
    cleaned: Json = _clean(content)
    return cleaned


def _arm(one: ArmNumbers) -> Json:
    return {
        "label": one.arm.label,
        "solver": one.arm.solver,
        "knobs": one.arm.knobs,
        "seeds": one.arm.seeds,
        "runs": len(one.arm.runs),
        "counted_runs": len(one.arm.counted),
        "unfinished": one.arm.unfinished,
        "numbers": {name: _spread(spread) for name, spread in one.own.items()},
        "against": {kind: _against(against) for kind, against in one.against.items()},
    }


def _against(against: Against) -> Json:
    return {
        "baseline": against.baseline.label,
        "differs": against.differs,
        "seconds": _spread(against.seconds),
        "baseline_seconds": _spread(against.baseline_seconds),
        "speedup": _spread(against.speedup),
        "time_saved": _spread(against.time_saved),
        "compute_saved": _spread(against.compute_saved),
        "energy_saved": _spread(against.energy_saved),
        "energy_counter": against.counter,
        "never": against.never,
        "pairs": [
            {
                "seed": pair.seed,
                "target": pair.target,
                "seconds": pair.seconds,
                "baseline_seconds": pair.baseline_s,
                "speedup": pair.speedup,
                "time_saved": pair.time_saved,
                "compute_saved": pair.compute_saved,
                "energy_saved": pair.energy_saved,
            }
            for pair in against.pairs
        ],
    }


def _run(run: Run, out: Path) -> Json:
    return {
        "folder": os.path.relpath(run.folder.resolve(), out.resolve()),
        "seed": run.seed,
        "state": run.state,
        "error": run.error,
        "step": run.step,
        "total_steps": run.total_steps,
        "best_test_accuracy": run.best("test/accuracy"),
        "train_s": run.last("time/train_s"),
        "command": command_of(run),
    }


def _spread(spread: Spread | None) -> Json | None:
    return asdict(spread) if spread is not None else None


def _crossover(found: Crossing | None) -> Json | None:
    return {"at": found.x, "residual": found.residual} if found is not None else None


def _clean(value: Any) -> Any:
    """As JSON proper has it: what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
