"""The training loop: steps, evaluations and probes, and a state from which it goes on bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
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
from deq.measure.probe import Comparison, SpeedupProbe
from deq.models import EquilibriumModel
from deq.models.tutorial import TutorialDEQ
from deq.records.errors import UserError, first_line
from deq.records.traces import PICTURE
from deq.records.tracker import Tracker
from deq.solvers import Solver
from deq.solvers.state import Nest, mapped
from deq.training.account import Account, Position
from deq.training.display import Display
from deq.training.interrupt import Interrupted, SignalWatch
from deq.training.statistics import Sums

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
"""Name → factor on the learning rate, as a function of the share of steps done, 0 to 1."""


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
        model: EquilibriumModel,
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
        self.account = Account(model.deq, self.device, self.energy, tracker)
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
    def position(self) -> Position:
        """Where the run stands."""
        return self.account.position

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
        self.account.begin()
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
        return self.account.summary()

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
                    self._row({})
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
            self._check_logits(logits, labels)
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
        self.account.since_row.add(loss, logits, labels, self.model.deq, self._adjoint_solver)

    def _check_logits(self, logits: Any, labels: Tensor) -> None:
        """A head with more outputs than there are classes would train, and its accuracy would be another thing."""
        wanted = (len(labels), len(self.batches.data.classes))
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"the head of {type(self.model).__name__} must return logits, {wanted} here, got {got}: give its last "
                "layer as many outputs as there are classes"
            )

    def _stability_loss(self, equilibrium: Equilibrium, labels: Tensor, penalised: bool) -> Tensor:
        """What the run's :class:`StabilityLosses` add to the loss of one step."""
        total = torch.zeros((), device=labels.device)
        if penalised:
            penalty = jacobian_penalty(equilibrium.f, equilibrium.z)
            self.account.since_row.add_term("jacobian_penalty", penalty)
            total = total + self.stability.jacobian_weight * penalty
        if self.stability.corrections:

            def loss_at(z: Tensor) -> Tensor:
                return functional.cross_entropy(self.model.classify(z).float(), labels)

            correction = correction_loss(loss_at, equilibrium.states, self.stability.gamma)
            self.account.since_row.add_term("correction_loss", correction)
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
            self.account.in_epoch = Sums()

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
        self._row(measured | self.energy.metrics(evaluated=True))
        means = self.account.in_epoch.means()
        of_training = {"train/accuracy": means["train/accuracy"], "train/loss": means["train/loss"]}
        self.account.last_evaluation = measured | of_training
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
            injection = mapped(self.model.inject(images), Tensor.float)

            def evaluated(z: Nest, x: Nest) -> Nest:
                signals.raise_if_noted()
                fz: Nest = mapped(cell(z, x), Tensor.float)
                return fz

            traces, about = self.crossover.measure(evaluated, injection, solver)
        self.account.traced = crossover.metrics_of(traces, solver)
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

    def _row(self, measured: dict[str, float]) -> None:
        self.account.row(measured, learning_rate=float(self._schedule.get_last_lr()[0]))

    def _check_loss(self) -> None:
        """A loss that is not finite ends the run, unless the gradient scaler may yet find a scale that fits."""
        lost = self.account.since_row.nonfinite_steps()
        if lost and (not self._scaler.is_enabled() or lost == self.account.since_row.steps):
            last = self.position.step
            raise UserError(
                f"the loss is NaN or infinite since a step between {last - self.account.since_row.steps + 1} "
                f"and {last}; lower optim.lr, now {self.optimizer.defaults['lr']}, or use precision=fp32"
            )

    def state(self) -> dict[str, Any]:
        """Everything the rest of the run depends on: tensors, numbers, strings, lists and dicts only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            **self.account.state(),
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
        self.account.restore(state)
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


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
