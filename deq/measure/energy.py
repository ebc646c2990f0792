"""Joules, where a counter measures them, and nothing by that name where none does.

The counters are the devices' own, read through `zeus <https://ml.energy/zeus>`_: NVML's or AMD SMI's of the GPU that
trains, RAPL's of the CPU packages with their memory. They count all that these devices do, whoever asked for it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from deq.records.errors import UserError, first_line, in_yaml

Phase = Literal["train", "test"]
_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class EnergyOptions:
    """What is measured; see ``conf/config.yaml``.

    Args:
        measure: read the counters that there are.
        grid_intensity: grams of CO2 a kilowatt-hour of the grid that feeds the machine; None reports no grams.

    Raises:
        UserError: for an option outside its limits.

    Example:
        >>> EnergyOptions(grid_intensity=381.0).grams({"gpu": 3.6e6})
        381.0
    """

    measure: bool = True
    grid_intensity: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.measure, bool):
            raise UserError(f"energy.measure must be true or false, got {in_yaml(self.measure)}")
        given = self.grid_intensity
        if given is not None and (
            isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf
        ):
            raise UserError(
                f"energy.grid_intensity must be grams of CO2 a kilowatt-hour, at least 0, or null, got {in_yaml(given)}"
            )

    def grams(self, joules: dict[str, float]) -> float | None:
        """Grams of CO2 for measured joules by counter; None where nothing was measured or no intensity is given."""
        if self.grid_intensity is None or not joules:
            return None
        return sum(joules.values()) / _JOULES_PER_KWH * self.grid_intensity


class Monitor(Protocol):
    """What is used of ``zeus.monitor.ZeusMonitor``."""

    gpu_indices: list[int]
    cpu_indices: list[int]

    def begin_window(self, key: str, sync_execution: bool = True) -> None: ...

    def end_window(self, key: str, sync_execution: bool = True) -> Any: ...


def counters_of(device: torch.device) -> Monitor | None:
    """A monitor of the counters for training on ``device``: the GPU, if it is one, and the CPU packages.

    None where there is none, or none that this user may read. GPUs of several kinds are measured only with
    ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
    """
    logging.getLogger("zeus").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from zeus.device import get_gpus
        from zeus.monitor import ZeusMonitor

        gpus = []
        if device.type == "cuda" and _numbered_alike():
            with contextlib.suppress(Exception):  # of whatever driver: the CPUs can still be measured
                get_gpus()
                gpus = [device.index or 0]
        monitor: Monitor = ZeusMonitor(gpu_indices=gpus)
    return monitor if monitor.gpu_indices or monitor.cpu_indices else None


def _numbered_alike() -> bool:
    """Whether CUDA numbers the GPUs as their driver does, by the bus; else another card's joules would be read."""
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return len(names) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"


class EnergyMeter:
    """The joules of a run so far, of training and of evaluation.

    Args:
        options: what is asked for.
        device: that trains.
        warn: shows one sentence to the user. A counter that fails is told of once, and nothing is reported any more:
            a part of the joules would pass for all of them.
        monitor: makes the monitor; tests give their own.

    Attributes:
        counters: ``gpu`` and ``cpu``, as far as they are measured.
    """

    def __init__(
        self,
        options: EnergyOptions,
        device: torch.device,
        warn: Callable[[str], None],
        monitor: Callable[[torch.device], Monitor | None] = counters_of,
    ) -> None:
        self._options, self._warn = options, warn
        self._monitor: Monitor | None = None
        self.counters: tuple[str, ...] = ()
        self._joules: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        if not options.measure:
            return
        try:
            found = monitor(device)
        except Exception as error:  # of whatever driver
            self._give_up(error)
            return
        if found is not None:
            self._monitor = found
            self.counters = tuple(
                name for name, indices in (("gpu", found.gpu_indices), ("cpu", found.cpu_indices)) if indices
            )
            self._joules = {f"{phase}_{name}": 0.0 for phase in ("train", "test") for name in self.counters}

    @contextlib.contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Counts what is used inside, unless that is left by an exception. The caller waits for the device before and
        after.
        """
        if self._monitor is not None:
            self._try(lambda monitor: monitor.begin_window(phase, sync_execution=False))
        done = False
        try:
            yield
            done = True
        finally:
            if self._monitor is not None:
                self._try(lambda monitor: self._end(phase, monitor, done))

    def _end(self, phase: Phase, monitor: Monitor, done: bool) -> None:
        measured = monitor.end_window(phase, sync_execution=False)
        if done:
            self._add(phase, measured)

    def _add(self, phase: Phase, measured: Any) -> None:
        if "gpu" in self.counters:
            self._joules[f"{phase}_gpu"] += sum(measured.gpu_energy.values())
        if "cpu" in self.counters:
            memory = measured.dram_energy or {}
            self._joules[f"{phase}_cpu"] += sum(measured.cpu_energy.values()) + sum(memory.values())

    def _try(self, call: Callable[[Monitor], None]) -> None:
        assert self._monitor is not None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of windows shorter than a counter's tick, which add up
                call(self._monitor)
        except Exception as error:  # of whatever driver
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._monitor, self.counters, self._joules = None, (), {}
        self._warn(f"the energy counters cannot be read ({first_line(error)}); this run reports no joules")

    def metrics(self, *, evaluated: bool = False) -> dict[str, float]:
        """Metric name -> value since training began; with ``evaluated``, also what came since it was last given."""
        metrics: dict[str, float] = {}
        totals: dict[str, float] = {}
        for name in self.counters:
            train, test = self._joules[f"train_{name}"], self._joules[f"test_{name}"]
            totals[name] = train + test
            metrics |= {
                f"energy/{name}_joules": train + test,
                f"energy/train_{name}_joules": train,
                f"energy/test_{name}_joules": test,
            }
            if evaluated:
                metrics[f"energy/epoch_{name}_joules"] = totals[name] - self._noted.get(name, 0.0)
        if evaluated:
            self._noted = totals
        grams = self._options.grams(totals)
        return metrics if grams is None else metrics | {"energy/co2_grams": grams}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"joules": dict(self._joules), "noted": dict(self._noted)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``, with the counters that have measured all of the run."""
        measured = state["joules"]
        self.counters = tuple(name for name in self.counters if f"train_{name}" in measured)
        if not self.counters:
            self._monitor = None
        self._joules = {
            f"{phase}_{name}": measured[f"{phase}_{name}"] for phase in ("train", "test") for name in self.counters
        }
        self._noted = {name: joules for name, joules in state["noted"].items() if name in self.counters}
