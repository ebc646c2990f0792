"""Joules where a counter measures them, nothing by that name where none does, and the proxy that is always there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deq.layer import Implicit, JacobianFree, Phantom
from deq.measure.energy import EnergyMeter, EnergyOptions, Monitor, counters_of
from deq.measure.flops import CellFlops
from deq.models.classifier import ResidualCell
from deq.records.errors import UserError
from deq.records.metrics import NAMES
from deq.solvers import Anderson
from deq.training.display import Display
from tests.deq.training.test_training import StopsAt, digits, saved_through_a_file, signal, trainer

CPU = torch.device("cpu")


class Counter:
    """Counters that stand at a number of joules for each device; every reading moves them on."""

    def __init__(self, gpus: int = 1, cpus: int = 1, fails_at: int | None = None) -> None:
        self.gpu_indices, self.cpu_indices = list(range(gpus)), list(range(cpus))
        self._windows: dict[str, int] = {}
        self._readings, self._fails_at = 0, fails_at

    def _read(self) -> int:
        self._readings += 1
        if self._readings == self._fails_at:
            raise OSError("the driver is gone\nfor good")
        return self._readings

    def begin_window(self, key: str, sync_execution: bool = True) -> None:
        assert key not in self._windows
        self._windows[key] = self._read()

    def end_window(self, key: str, sync_execution: bool = True) -> Any:
        passed = self._read() - self._windows.pop(key)
        return SimpleNamespace(
            gpu_energy=dict.fromkeys(self.gpu_indices, 10.0 * passed),
            cpu_energy=dict.fromkeys(self.cpu_indices, 2.0 * passed),
            dram_energy=dict.fromkeys(self.cpu_indices, 1.0 * passed),
        )


def meter(
    counter: Monitor | None, options: EnergyOptions | None = None, warnings: list[str] | None = None
) -> EnergyMeter:
    shown = warnings if warnings is not None else []
    return EnergyMeter(options or EnergyOptions(), CPU, warn=shown.append, monitor=lambda device: counter)


def test_training_and_evaluation_are_counted_apart_and_an_epoch_is_what_came_since_the_last() -> None:
    energy = meter(Counter())
    for _ in range(2):
        with energy.measure("train"):
            pass
    with energy.measure("test"):
        pass
    first = energy.metrics(evaluated=True)
    assert first["energy/train_gpu_joules"] == 20
    assert first["energy/test_gpu_joules"] == 10
    assert first["energy/gpu_joules"] == first["energy/epoch_gpu_joules"] == 30
    assert first["energy/cpu_joules"] == 9  # packages and their memory
    with energy.measure("train"):
        pass
    second = energy.metrics(evaluated=True)
    assert (second["energy/gpu_joules"], second["energy/epoch_gpu_joules"]) == (40, 10)
    assert set(second) <= set(NAMES)


def test_without_a_counter_nothing_is_named_joules(tmp_path: Path) -> None:
    run = trainer(tmp_path, energy=meter(None))
    summary = run.run()
    names = {name for row in (summary, *run.tracker.rows) for name in row}
    assert not [name for name in names if "joules" in name or "co2" in name]
    assert {"energy/tflop", "energy/train_tflop", "energy/test_tflop"} <= names


def test_only_the_counters_that_there_are_are_named() -> None:
    energy = meter(Counter(gpus=0))
    with energy.measure("train"):
        pass
    assert {name for name in energy.metrics() if "joules" in name} == {
        "energy/cpu_joules",
        "energy/train_cpu_joules",
        "energy/test_cpu_joules",
    }


def test_grams_of_co2_come_from_a_given_intensity_and_measured_joules_alone() -> None:
    measured = meter(Counter(cpus=0), EnergyOptions(grid_intensity=360.0))
    with measured.measure("train"):
        pass
    assert measured.metrics()["energy/co2_grams"] == pytest.approx(10 / 3.6e6 * 360)
    assert "energy/co2_grams" not in meter(Counter()).metrics()
    assert meter(None, EnergyOptions(grid_intensity=360.0)).metrics() == {}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_counter_that_fails_is_told_once_and_its_part_of_the_joules_is_not_reported(fails_at: int) -> None:
    warnings: list[str] = []
    energy = meter(Counter(fails_at=fails_at), warnings=warnings)
    for _ in range(3):
        with energy.measure("train"):
            pass
    assert warnings == ["the energy counters cannot be read (the driver is gone); this run reports no joules"]
    assert energy.metrics(evaluated=True) == {}
    assert energy.counters == ()


def test_measuring_can_be_left_out_and_bad_options_are_refused() -> None:
    assert meter(Counter(), EnergyOptions(measure=False)).counters == ()
    for options, words in (({"measure": 1}, "true or false, got 1"), ({"grid_intensity": -1}, "at least 0, or null")):
        with pytest.raises(UserError, match=words):
            EnergyOptions(**options)


def test_a_run_logs_its_joules_and_a_resumed_one_goes_on_counting(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", energy=meter(Counter()))
    expected = whole.run()
    assert expected["energy/gpu_joules"] == pytest.approx(
        expected["energy/train_gpu_joules"] + expected["energy/test_gpu_joules"]
    )
    evaluated = [row for row in whole.tracker.rows if "test/accuracy" in row]
    assert sum(row["energy/epoch_gpu_joules"] for row in evaluated) == pytest.approx(expected["energy/gpu_joules"])

    saved: list[dict[str, Any]] = []
    stopped = StopsAt(digits(augment="crop", train_size=160, test_size=64), signal.SIGINT, 6)
    first = trainer(tmp_path / "first", batches=stopped, saved=saved, energy=meter(Counter()))
    with pytest.raises(BaseException, match="SIGINT"):
        first.run()
    state = saved_through_a_file(saved[-1], tmp_path)
    before = first.energy.metrics()["energy/gpu_joules"]
    second = trainer(tmp_path / "second", energy=meter(Counter()))
    second.restore(state)
    assert second.run()["energy/gpu_joules"] > before > 0
    # Where the rest runs without that counter, the part measured before is not passed off as the whole.
    elsewhere = trainer(tmp_path / "elsewhere", energy=meter(Counter(gpus=0)))
    elsewhere.restore(state)
    summary = elsewhere.run()
    assert "energy/gpu_joules" not in summary
    assert "energy/cpu_joules" in summary
    unmeasured = trainer(tmp_path / "unmeasured", energy=meter(None))
    late = trainer(tmp_path / "late", energy=meter(Counter()))
    late.restore(unmeasured.state())
    assert not [name for name in late.run() if "joules" in name]


@pytest.fixture
def rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A CPU package with a RAPL counter, as Linux shows it, which stands at 1 J."""
    import zeus.device.cpu as cpu
    from zeus.device.cpu import rapl as module

    zone = tmp_path / "intel-rapl" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    counter = zone / "energy_uj"
    counter.write_text("1000000\n")
    monkeypatch.setattr(module, "RAPL_DIR", str(zone.parent))
    monkeypatch.setattr(cpu, "_cpus", None)
    # Its helper process would read the machine's own folder.
    monkeypatch.setattr(module.RAPLFile, "wraparound_tracker", SimpleNamespace(get_num_wraparounds=lambda: 0))
    module.rapl_is_available.cache_clear()
    yield counter
    module.rapl_is_available.cache_clear()


def test_a_real_counter_is_read_through_zeus(rapl: Path) -> None:
    energy = EnergyMeter(EnergyOptions(), CPU, warn=pytest.fail)
    assert energy.counters == ("cpu",)
    with energy.measure("train"):
        rapl.write_text("26000000\n")  # in millionths of a joule
    assert energy.metrics()["energy/train_cpu_joules"] == pytest.approx(25)


def test_what_an_interrupted_evaluation_used_is_not_counted() -> None:
    energy = meter(Counter())
    with contextlib.suppress(RuntimeError), energy.measure("test"):
        raise RuntimeError
    assert energy.metrics()["energy/test_gpu_joules"] == 0
    with energy.measure("test"):
        pass
    assert energy.metrics()["energy/test_gpu_joules"] == 10


def test_a_counter_that_this_user_may_not_read_is_none(rapl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zeus.device.cpu import common
    from zeus.device.cpu import rapl as module

    def refuse(*_: Any) -> None:
        raise common.ZeusCPUNoPermissionError("root alone")

    monkeypatch.setattr(module.RAPLFile, "__init__", refuse)
    assert counters_of(CPU) is None


CELL = ResidualCell(channels=8, inner=4, groups=4)
CONVOLUTIONS = 2 * (2 * 8 * 4 * 9) * 6 * 6
"""Both convolutions at 6 x 6 pixels: a multiplication and an addition for each weight and pixel."""


def test_flops_of_the_cell_are_those_of_its_convolutions() -> None:
    flops = CellFlops.of(CELL, torch.ones(1, 8, 6, 6))
    assert flops.evaluation == CONVOLUTIONS
    assert flops.product == CONVOLUTIONS  # with respect to the state, through both
    assert CONVOLUTIONS < flops.gradient < 2 * CONVOLUTIONS  # both weights, and the way back to the first
    assert flops.gradient < flops.both == 2 * CONVOLUTIONS  # the way back is shared
    assert all(parameter.grad is None for parameter in CELL.parameters())


def test_counting_flops_neither_draws_random_numbers_nor_runs_a_compiled_cell() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.linear(z) + x * torch.rand_like(x)

    cell = Noisy()
    cell._compiled_call_impl = lambda *_: pytest.fail("the compiled cell was called")  # as Module.compile sets it
    before = torch.get_rng_state()
    assert CellFlops.of(cell, torch.ones(1, 3)).evaluation == 2 * 9
    assert torch.equal(torch.get_rng_state(), before)


class Untracked:
    """In the place of the flop counter's account by module: all is one."""

    parents: ClassVar = {"Global"}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("compact", [False, True], ids=["whole batches", "compacted"])
@pytest.mark.parametrize(
    "gradient", ["implicit", JacobianFree(), Phantom(steps=3)], ids=["implicit", "jacobian-free", "phantom"]
)
def test_tflops_of_training_are_those_that_a_counter_around_whole_steps_sees(
    gradient: Any, compact: bool, tmp_path: Path
) -> None:
    solver = Anderson(window=3, tol=1e-2, max_iter=20, compact=compact)
    gradient = Implicit(solver=solver) if gradient == "implicit" else gradient
    run = trainer(tmp_path, solver=solver, gradient=gradient, epochs=1)
    run.probe = None
    step = run._train_step
    seen = 0

    def counted(*arguments: Any) -> None:
        nonlocal seen
        counter = FlopCounterMode(display=False)
        # What it keeps by module hooks into backward passes, which an adjoint solve has within one of its own.
        counter.mod_tracker = Untracked()
        with counter:
            step(*arguments)
        seen += counter.get_total_flops()

    run._train_step = counted
    # What a counter sees of the stem and of the head, forward and back, is not the cell's.
    summary = run.run()
    images = torch.zeros(160, 1, 8, 8)
    with FlopCounterMode(display=False) as outside:
        z = run.model.stem(images)
        run.model.head(z).sum().backward()
    # The way back through the stem, whose images ask for no gradient, and through the head with one for z.
    seen -= outside.get_total_flops()
    assert summary["energy/train_tflop"] == pytest.approx(seen / 1e12, rel=0.02 if compact else 1e-9)
    assert run.position.test_sample_evaluations >= 64


def test_the_terminal_shows_joules_only_where_they_were_measured(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"energy/train_tflop": 1.0, "energy/test_tflop": 0.5, "test/accuracy": 0.5}
    Display().table(summary, None, {})
    assert "energy" not in capsys.readouterr().out
    measured = {"energy/gpu_joules": 3.0, "energy/train_gpu_joules": 2.0, "energy/test_gpu_joules": 1.0}
    Display().table(summary | measured, None, {})
    out = capsys.readouterr().out
    assert "2 J training · 1 J evaluation, measured" in out
    assert "1 training · 0.5 evaluation, computed" in out


def test_status_tells_from_outside_how_far_a_run_is(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    seen: list[dict[str, Any]] = []
    run._save = lambda state: seen.append(json.loads((tmp_path / "status.json").read_text()))
    summary = run.run()
    assert [(status["state"], status["step"]) for status in seen] == [("running", step) for step in (5, 10, 15)]
    run.tracker.finish(summary, state="failed", error="out of luck")
    last = json.loads((tmp_path / "status.json").read_text())
    assert (last["state"], last["error"], last["total_steps"]) == ("failed", "out of luck", 15)
    assert last["ended"] >= last["began"]
