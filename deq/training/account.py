"""A run's account: where it stands, what its steps and solves sum up to, and the rows and the summary made of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deq.layer import DEQ
from deq.measure.energy import EnergyMeter
from deq.measure.flops import CellFlops
from deq.records.machine import peak_resident_bytes, reset_peak_resident_bytes
from deq.records.tracker import Tracker
from deq.solvers.state import mapped
from deq.training.statistics import Sums


@dataclass
class Position:
    """Where a run stands. ``epoch`` counts finished epochs, ``batch`` the batches taken of the next one."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    evaluated_step: int = -1
    elapsed_s: float = 0.0
    train_s: float = 0.0
    test_s: float = 0.0
    test_sample_evaluations: float = 0.0


class Account:
    """Rows about the steps since the row before, and a summary of the whole run.

    Args:
        layer: the layer that the model solves; its gradient tells what a step costs. device: where it is.
        energy: reads what counters there are. tracker: where rows go.
    """

    def __init__(self, layer: DEQ, device: torch.device, energy: EnergyMeter, tracker: Tracker) -> None:
        self._layer, self._device, self._energy, self._tracker = layer, device, energy, tracker
        self.position = Position()
        self.since_row, self.in_epoch, self.in_run = Sums(), Sums(), Sums()
        self.last_evaluation: dict[str, float] = {}
        self.traced: dict[str, float] = {}  # what the traces at the end say
        self._row_train_s = 0.0  # position.train_s at the latest row
        self._flops: CellFlops | None = None  # once the first solve has told the state's shape

    def begin(self) -> None:
        """Peak memory is that of this run alone: jobs of a sweep share a process."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_peak_resident_bytes()

    def row(self, measured: dict[str, float], learning_rate: float) -> None:
        """A row about the steps since the previous one.

        Args:
            measured: metric name -> value, of an evaluation that ended now.
        """
        position = self.position
        steps = self.since_row.steps
        values: dict[str, float] = self.since_row.means() | self._energy.metrics() | measured
        self.in_epoch.merge(self.since_row)
        self.in_run.merge(self.since_row)
        values |= self._tflop(self.in_run)
        values |= {
            "optim/learning_rate": learning_rate,
            "time/elapsed_s": position.elapsed_s,
            "time/train_s": position.train_s,
            "time/test_s": position.test_s,
            "memory/peak_bytes": self._peak_memory(),
        }
        if steps:
            values["time/step_s"] = (position.train_s - self._row_train_s) / steps
        self._tracker.log(position.step, position.epoch + 1, values)
        self._row_train_s = position.train_s
        self.since_row = Sums()

    def summary(self) -> dict[str, float]:
        """The run so far: accuracies of the last evaluation, means over the whole run for the solver's."""
        run = Sums(self.in_run.values())
        run.merge(Sums(self.since_row.values()))
        summary = run.means() | self.last_evaluation
        summary["time/elapsed_s"] = self.position.elapsed_s
        summary["time/train_s"] = self.position.train_s
        if run.steps:
            summary["time/step_s"] = self.position.train_s / run.steps
        summary["time/test_s"] = self.position.test_s
        summary["memory/peak_bytes"] = self._peak_memory()
        return summary | self._tflop(run) | self._energy.metrics() | self.traced

    def _tflop(self, sums: Sums) -> dict[str, float]:
        """The proxies for energy of the run so far, whose training steps ``sums`` counts."""
        solution = self._layer.last_solution
        if self._flops is None and solution is not None:
            cell = self._layer.cell
            assert isinstance(cell, nn.Module)
            self._flops = CellFlops.of(cell, mapped(solution.z, lambda leaf: leaf[:1]))
        if self._flops is None:
            return {}
        train = self._flops.train_tflop(sums.values(), self._layer, self._layer.gradient)
        test = self._flops.test_tflop(self.position.test_sample_evaluations)
        return {"energy/tflop": train + test, "energy/train_tflop": train, "energy/test_tflop": test}

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_resident_bytes()

    def state(self) -> dict[str, Any]:
        """For a checkpoint; :meth:`restore` takes it back."""
        return {
            "position": dict(vars(self.position)),
            "row_train_s": self._row_train_s,
            "sums": [sums.state() for sums in (self.since_row, self.in_epoch, self.in_run)],
            "last_evaluation": dict(self.last_evaluation),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.position = Position(**state["position"])
        self._row_train_s = state["row_train_s"]
        self.since_row, self.in_epoch, self.in_run = (Sums(values) for values in state["sums"])
        self.last_evaluation = dict(state["last_evaluation"])
