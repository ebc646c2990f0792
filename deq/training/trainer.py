"""The training loop: steps, evaluations and probes, and a state from which it goes on bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from deq.data import Batches
from deq.layer import Equilibrium, Implicit, StabilityLosses, WarmStart, correction_loss, jacobian_penalty
from deq.measure import crossover
from deq.measure.crossover import Crossover
from deq.measure.energy import EnergyMeter, EnergyOptions
from deq.measure.flops import CellFlops
from deq.measure.probe import Comparison, SpeedupProbe
from deq.models import EquilibriumClassifier
from deq.models.tutorial import TutorialDEQ
from deq.records.errors import UserError, first_line
from deq.records.machine import peak_resident_bytes, reset_peak_resident_bytes
from deq.records.traces import PICTURE
from deq.records.tracker import Tracker
from deq.solvers import Solver
from deq.training.display import Display
from deq.training.interrupt import Interrupted, SignalWatch
from deq.training.statistics import Sums

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
"""Name → factor on the learning rate, as a function of the share of steps done, 0 to 1."""


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


class Trainer:
    """Trains a model, keeps the account, and can hand out and take back its whole state.

    Args:
        model: on its device. batches: on the same device. optimizer: of the model's parameters.
        epochs: at most this many passes over the training set; max_steps: at most this many steps (None: no limit).
        schedule: name in :data:`SCHEDULES`. precision: name in :data:`PRECISIONS`.
        compile: compile the cell with ``torch.compile``.
        warm_start: start each training sample's solve at its equilibrium of the epoch before (2 bytes an element of
            the state for every training image, on the device and in every checkpoint). Tests start from zeros. It
            pays where images are not augmented.
        log_every: steps of an epoch between rows; an epoch's end always writes one.
        evaluate_every: steps between evaluations on the test set, beside those at every epoch's end (None: only those).
        probe: compares the run's solver with forward iteration at every epoch's end; None leaves that out.
        crossover: keeps residuals and times of single solves, when training has ended; None leaves that out.
        energy: reads what counters there are.
        stability: losses that are added to the cross-entropy; None adds none.
        tracker, display: where results go. save: called with the state at every epoch's end and at a signal.
    """

    def __init__(
        self,
        model: EquilibriumClassifier,
        batches: Batches,
        optimizer: Optimizer,
        *,
        epochs: int,
        max_steps: int | None,
        schedule: str,
        precision: str,
        compile: bool,
        warm_start: bool = False,
        log_every: int,
        evaluate_every: int | None = None,
        probe: SpeedupProbe | None,
        crossover: Crossover | None = None,
        energy: EnergyMeter | None = None,
        tracker: Tracker,
        display: Display,
        save: Callable[[dict[str, Any]], None],
        stability: StabilityLosses | None = None,
    ) -> None:
        self.model, self.batches, self.optimizer = model, batches, optimizer
        self.epochs, self.log_every, self.evaluate_every = epochs, log_every, evaluate_every
        self.stability = stability or StabilityLosses()
        self.total_steps = min(epochs * batches.per_epoch, max_steps or sys.maxsize)
        self.probe, self.tracker, self.display, self._save = probe, tracker, display, save
        self.device = next(model.parameters()).device
        self.crossover = crossover
        self.energy = energy or EnergyMeter(EnergyOptions(measure=False), self.device, warn=display.warn)
        self._flops: CellFlops | None = None  # once the first solve has told the state's shape
        self._traced: dict[str, float] = {}  # what the traces at the end say
        self.position = Position()
        self._row_train_s = 0.0  # position.train_s at the latest row
        self.since_row, self.in_epoch, self.in_run = Sums(), Sums(), Sums()
        self.last_evaluation: dict[str, float] = {}
        self.comparison: Comparison | None = None
        self._starts = WarmStart(len(batches.data.train)) if warm_start else None
        factor = SCHEDULES[schedule]
        self._schedule = LambdaLR(optimizer, lambda step: factor(min(step / self.total_steps, 1.0)))
        self._autocast_dtype = PRECISIONS[precision]
        # float16 has too few exponent bits for small gradients; the scaler does nothing for the others.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        if compile:
            cell = model.deq.cell
            assert isinstance(cell, nn.Module)
            cell.compile()

    @property
    def _adjoint_solver(self) -> Solver | None:
        gradient = self.model.deq.gradient
        return (gradient.solver or self.model.deq.solver) if isinstance(gradient, Implicit) else None

    def run(self) -> dict[str, float]:
        """Train to the end. Returns the summary, metric name → value.

        Raises:
            Interrupted: a signal came; the state is saved.
            UserError: the loss is no longer finite.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak_resident_bytes()
        self._began = time.perf_counter() - self.position.elapsed_s
        self._tell_status("running")
        with SignalWatch() as signals:
            self.display.start(self.total_steps, self.position.step)
            try:
                while self.position.evaluated_step < self.total_steps:
                    self._train_epoch(signals)
                    self._close_epoch(signals)
                    self._save(self.state())
                    signals.raise_if_noted()
                with self._warned("traces.json"):
                    self._trace(signals)
                signals.raise_if_noted()
            except Interrupted:
                self._save(self.state())
                raise
            finally:
                self.display.stop()
        return self.summary()

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
        return summary | self._tflop(run) | self.energy.metrics() | self._traced

    def _tell_status(self, state: str) -> None:
        self.tracker.status(state, self.position.step, self.total_steps)

    def _train_epoch(self, signals: SignalWatch) -> None:
        """The rest of the current epoch, or of the steps that are left."""
        position = self.position
        self.model.train()
        self.display.doing(f"epoch {position.epoch + 1}/{self.epochs}")
        if position.step >= self.total_steps:  # resumed between the last step and its evaluation
            return
        self._evaluate_on_the_way(signals)  # resumed before an evaluation within the epoch
        measuring = contextlib.ExitStack()
        started = self._now()
        measuring.enter_context(self.energy.measure("train"))

        def pause() -> None:
            now = self._now()
            measuring.close()
            position.train_s += now - started
            position.elapsed_s = self._elapsed()
            self._check_loss()

        chosen = itertools.repeat(None) if self._starts is None else self.batches.chosen(position.epoch, position.batch)
        batches = self.batches.train(position.epoch, start=position.batch)
        for (images, labels), index in zip(batches, chosen, strict=False):
            self._train_step(images, labels, index)
            position.step += 1
            position.batch += 1
            self.display.step(position.step)
            # The epoch's last row is written with its evaluation.
            ended = position.batch == self.batches.per_epoch or position.step >= self.total_steps
            row_due = position.batch % self.log_every == 0 and not ended
            evaluation_due = self._evaluation_due() and not ended
            if row_due or evaluation_due or signals.signum is not None:
                pause()
                if row_due and not evaluation_due:
                    self._log({})
                signals.raise_if_noted()
                self._evaluate_on_the_way(signals)
                started = self._now()
                measuring.enter_context(self.energy.measure("train"))
            if ended:  # before the next batch is drawn, which would move the generator of the augmentation
                break
        pause()

    def _train_step(self, images: Tensor, labels: Tensor, index: Tensor | None) -> None:
        z0 = self._starts.of(index) if self._starts is not None and index is not None else None
        penalised, corrections = self.stability.takes_penalty(), self.stability.corrections
        with self._autocast():
            equilibrium = self.model.equilibrium(images, corrections, z0) if penalised or corrections else None
            logits = self.model(images, z0) if equilibrium is None else self.model.head(equilibrium.z)
            loss = functional.cross_entropy(logits.float(), labels)
            objective = loss if equilibrium is None else loss + self._stability_loss(equilibrium, labels, penalised)
        self.optimizer.zero_grad(set_to_none=True)
        if self._starts is not None and index is not None and self.model.deq.last_solution is not None:
            self._starts.keep(index, self.model.deq.last_solution)
        self._scaler.scale(objective).backward()
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._scaler.get_scale() >= scale:  # it falls where gradients overflowed and the optimizer did not step
            self._schedule.step()
        self.since_row.add(loss, logits, labels, self.model.deq, self._adjoint_solver)

    def _stability_loss(self, equilibrium: Equilibrium, labels: Tensor, penalised: bool) -> Tensor:
        """What the run's :class:`StabilityLosses` add to the loss of one step."""
        total: Tensor = equilibrium.z.new_zeros(())
        if penalised:
            penalty = jacobian_penalty(equilibrium.f, equilibrium.z)
            self.since_row.add_term("jacobian_penalty", penalty)
            total = total + self.stability.jacobian_weight * penalty
        if self.stability.corrections:

            def loss_at(z: Tensor) -> Tensor:
                return functional.cross_entropy(self.model.classify(z).float(), labels)

            correction = correction_loss(loss_at, equilibrium.states, self.stability.gamma)
            self.since_row.add_term("correction_loss", correction)
            total = total + correction
        return total

    def _close_epoch(self, signals: SignalWatch) -> None:
        """Evaluate, probe, write the epoch's row and line, and go to the next epoch."""
        position = self.position
        self.display.doing("evaluation")
        measured: dict[str, float] = self._evaluate(signals)
        if self.probe is not None:
            self.display.doing("probe")
            images, _ = next(self.batches.test())
            with self._autocast():
                self.comparison = self.probe.compare(self.model, images)
            measured |= self.comparison.metrics()
            signals.raise_if_noted()
        self._conclude(measured, position.epoch + 1)
        if position.batch == self.batches.per_epoch:
            position.epoch, position.batch = position.epoch + 1, 0
            self.in_epoch = Sums()

    def _evaluation_due(self) -> bool:
        """Whether an evaluation within an epoch is, and has not been made."""
        step, every = self.position.step, self.evaluate_every
        return every is not None and step > 0 and step % every == 0 and self.position.evaluated_step < step

    def _evaluate_on_the_way(self, signals: SignalWatch) -> None:
        """The evaluation within an epoch, if it is due."""
        if self._evaluation_due() and 0 < self.position.batch < self.batches.per_epoch:
            position = self.position
            self.display.doing("evaluation")
            self._conclude(self._evaluate(signals), position.epoch + position.batch / self.batches.per_epoch)
            self._save(self.state())
            self.display.doing(f"epoch {position.epoch + 1}/{self.epochs}")
            self.model.train()

    def _conclude(self, measured: dict[str, float], epochs: float) -> None:
        """Write the row and the line of an evaluation, after ``epochs`` epochs."""
        position = self.position
        position.elapsed_s = self._elapsed()
        position.evaluated_step = position.step
        self._log(measured | self.energy.metrics(evaluated=True))
        means = self.in_epoch.means()
        self.last_evaluation = measured | {"train/accuracy": means["train/accuracy"], "train/loss": means["train/loss"]}
        self.display.epoch(epochs, self.epochs, means | measured | {"time/elapsed_s": position.elapsed_s})
        self._tell_status("running")

    @torch.no_grad()
    def _trace(self, signals: SignalWatch) -> None:
        """Keep the residuals of single solves with the model as it is now."""
        if self.crossover is None:
            return
        self.display.doing("traces")
        self.model.eval()
        images, _ = next(self.batches.test())
        cell, solver = self.model.deq.cell, self.model.deq.solver
        with self._autocast():
            injection = self.model.inject(images).float()

            def evaluated(z: Tensor, x: Tensor) -> Tensor:
                signals.raise_if_noted()
                fz: Tensor = cell(z, x).to(z.dtype)
                return fz

            traces, about = self.crossover.measure(evaluated, injection, solver)
        self._traced = crossover.metrics_of(traces, solver)
        self.tracker.traces(traces, about)
        if self.crossover.picture:
            with self._warned(PICTURE):
                from deq.report.figures.crossover import draw  # a run that draws nothing does without what draws

                words = f" Samples: {about['batch']}, with the model that was trained. Seconds: on {about['device']}."
                figure = draw(traces, solver.tol, highlight=crossover.named(solver), about=words)
                figure.save(self.tracker.folder / PICTURE)

    @contextlib.contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        """An extra that fails costs a warning, not the run."""
        try:
            yield
        except (ImportError, OSError, RuntimeError, UserError) as error:  # of torch: memory, a singular system
            self.display.warn(f"there is no {what}: {first_line(error)}")

    def _tflop(self, sums: Sums) -> dict[str, float]:
        """The proxies for energy of the run so far, whose training steps ``sums`` counts."""
        solution = self.model.deq.last_solution
        if self._flops is None and solution is not None:
            cell = self.model.deq.cell
            assert isinstance(cell, nn.Module)
            self._flops = CellFlops.of(cell, solution.z.shape[1:])
        if self._flops is None:
            return {}
        train = self._flops.train_tflop(sums.values(), self.model.deq, self.model.deq.gradient)
        test = self._flops.test_tflop(self.position.test_sample_evaluations)
        return {"energy/tflop": train + test, "energy/train_tflop": train, "energy/test_tflop": test}

    @torch.no_grad()
    def _evaluate(self, signals: SignalWatch) -> dict[str, float]:
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        started = self._now()
        sample_evaluations = 0
        # Counted where it ends: one that is interrupted is made again.
        with self.energy.measure("test"):
            for images, labels in self.batches.test():
                signals.raise_if_noted()
                with self._autocast():
                    logits = self.model(images).float()
                loss = functional.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([loss.double(), (logits.argmax(dim=1) == labels).sum().double()])
                sample_evaluations += self._sample_evaluations(len(labels))
            loss_sum, correct = sums.tolist()
            self.position.test_s += self._now() - started
        self.position.test_sample_evaluations += sample_evaluations
        count = len(self.batches.data.test)
        return {"test/loss": loss_sum / count, "test/accuracy": correct / count}

    def _sample_evaluations(self, samples: int) -> int:
        """Of the solve of the batch of the test set that was evaluated last."""
        layer = self.model.deq
        assert layer.last_solution is not None
        again = samples if isinstance(layer, TutorialDEQ) else 0  # its layer evaluates f once more
        return layer.last_solution.sample_evaluations + again

    def _log(self, measured: dict[str, float]) -> None:
        """A row about the steps since the previous one."""
        position = self.position
        steps = self.since_row.steps
        values: dict[str, float] = self.since_row.means() | self.energy.metrics() | measured
        self.in_epoch.merge(self.since_row)
        self.in_run.merge(self.since_row)
        values |= self._tflop(self.in_run)
        values |= {
            "optim/learning_rate": float(self._schedule.get_last_lr()[0]),
            "time/elapsed_s": position.elapsed_s,
            "time/train_s": position.train_s,
            "time/test_s": position.test_s,
            "memory/peak_bytes": self._peak_memory(),
        }
        if steps:
            values["time/step_s"] = (position.train_s - self._row_train_s) / steps
        self.tracker.log(position.step, position.epoch + 1, values)
        self._row_train_s = position.train_s
        self.since_row = Sums()

    def _check_loss(self) -> None:
        """A loss that is not finite ends the run, unless the gradient scaler may yet find a scale that fits."""
        lost = self.since_row.nonfinite_steps()
        if lost and (not self._scaler.is_enabled() or lost == self.since_row.steps):
            raise UserError(
                f"the loss is NaN or infinite since a step between {self.position.step - self.since_row.steps + 1} "
                f"and {self.position.step}; lower optim.lr, now {self.optimizer.defaults['lr']}, or use precision=fp32"
            )

    def state(self) -> dict[str, Any]:
        """Everything the rest of the run depends on: tensors, numbers, strings, lists and dicts only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "position": dict(vars(self.position)),
            "row_train_s": self._row_train_s,
            "sums": [sums.state() for sums in (self.since_row, self.in_epoch, self.in_run)],
            "last_evaluation": dict(self.last_evaluation),
            "rows": self.tracker.rows,
            "energy": self.energy.state(),
            "warm_start": self._starts.state() if self._starts is not None else None,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            UserError: it is of a step that this run would never come to, or something is missing in it.
        """
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint does not fit this version's train.py ({type(error).__name__}: {first_line(error)}); "
                f"leave resume out to start anew"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        if state["position"]["step"] > self.total_steps:
            raise UserError(
                f"the checkpoint is at step {state['position']['step']}, but epochs and max_steps allow only "
                f"{self.total_steps}; give larger ones"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        self._row_train_s = state["row_train_s"]
        self.since_row, self.in_epoch, self.in_run = (Sums(values) for values in state["sums"])
        self.last_evaluation = dict(state["last_evaluation"])
        self.tracker.restore(state["rows"])
        self.energy.restore(state["energy"])
        if self._starts is not None:
            self._starts.restore(state["warm_start"], self.device)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _autocast(self) -> torch.autocast:
        dtype = self._autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began

    def _now(self) -> float:
        """Seconds, after everything asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
