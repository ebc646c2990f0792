"""What a training run knows about its steps and solves: sums on the device, read only when someone asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deq.layer import DEQ
from deq.solvers import Solution, Solver


class Sums:
    """Sums over training steps; :meth:`means` turns them into metrics.

    Adding a step launches a few tiny kernels and never waits for the device. Merging adds one object to another.
    """

    def __init__(self, values: dict[str, float] | None = None) -> None:
        self._host: dict[str, float] = dict(values or {})
        self._device: dict[str, Tensor] = {}

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, layer: DEQ, adjoint_solver: Solver | None) -> None:
        """Count one training step, its backward pass included.

        Args:
            loss: () float, the batch's mean cross-entropy. logits: (B, classes). labels: (B,) int64.
            layer: gives the accounts of the step's solves. adjoint_solver: what solved the adjoint, if anything did.
        """
        finite = torch.isfinite(loss)
        self._count("samples", len(labels))
        self._count("steps", 1)
        self._sum("loss", torch.where(finite, loss.detach().double() * len(labels), 0.0))
        self._sum("finite_samples", finite * len(labels))
        self._sum("finite_steps", finite)
        self._sum("correct", (logits.detach().argmax(dim=1) == labels).sum())
        if layer.last_solution is not None:
            self._add_solve("forward", layer.last_solution, layer.solver)
        if layer.last_adjoint is not None and adjoint_solver is not None:
            self._add_solve("backward", layer.last_adjoint, adjoint_solver)

    def add_term(self, name: str, value: Tensor) -> None:
        """Count one step's value, () float, of a loss that is added to the cross-entropy."""
        self._count(f"{name}.steps", 1)
        self._sum(name, value)

    def _add_solve(self, name: str, solution: Solution, solver: Solver) -> None:
        finite = torch.isfinite(solution.residual)
        self._count(f"{name}.solves", 1)
        self._count(f"{name}.evaluations", solution.evaluations)
        self._count(f"{name}.sample_evaluations", solution.sample_evaluations)
        self._count(f"{name}.samples", len(solution.residual))
        self._sum(f"{name}.residual", torch.where(finite, solution.residual, 0.0).double().sum())
        self._sum(f"{name}.finite_samples", finite.sum())
        self._sum(f"{name}.unconverged", (~(solution.residual <= solver.tol)).sum())  # NaN is unconverged
        self._sum(f"{name}.converged_steps", solver.stopping_residual(solution) <= solver.tol)

    def _count(self, key: str, value: float) -> None:
        self._host[key] = self._host.get(key, 0.0) + value

    def _sum(self, key: str, value: Tensor) -> None:
        value = value.detach().double()
        self._device[key] = self._device[key] + value if key in self._device else value

    def values(self) -> dict[str, float]:
        """The sums as plain numbers. Waits for the device, once."""
        if self._device:
            keys, tensors = zip(*self._device.items(), strict=True)
            for key, value in zip(keys, torch.stack(tensors).tolist(), strict=True):
                self._host[key] = self._host.get(key, 0.0) + value
            self._device = {}
        return dict(self._host)

    def merge(self, other: Sums) -> None:
        """Add another object's sums to these."""
        for key, value in other.values().items():
            self._count(key, value)

    def means(self) -> dict[str, float]:
        """Metric name → mean; a name is absent where there was nothing to average."""
        sums = self.values()

        def ratio(name: str, above: str, below: str) -> dict[str, float]:
            return {name: sums[above] / sums[below]} if sums.get(below) else {}

        metrics = {
            **ratio("train/loss", "loss", "finite_samples"),
            **ratio("train/accuracy", "correct", "samples"),
            **ratio("train/jacobian_penalty", "jacobian_penalty", "jacobian_penalty.steps"),
            **ratio("train/correction_loss", "correction_loss", "correction_loss.steps"),
        }
        for side in ("forward", "backward"):
            metrics |= {
                **ratio(f"solver/{side}_evaluations", f"{side}.evaluations", f"{side}.solves"),
                **ratio(f"solver/{side}_sample_evaluations", f"{side}.sample_evaluations", f"{side}.samples"),
                **ratio(f"solver/{side}_residual", f"{side}.residual", f"{side}.finite_samples"),
                **ratio(f"solver/{side}_unconverged_fraction", f"{side}.unconverged", f"{side}.samples"),
                **ratio(f"solver/{side}_converged_steps", f"{side}.converged_steps", f"{side}.solves"),
            }
        solved = sums.get("forward.samples", 0.0) + sums.get("backward.samples", 0.0)
        if solved:
            open_ = sums.get("forward.unconverged", 0.0) + sums.get("backward.unconverged", 0.0)
            metrics["solver/unconverged_fraction"] = open_ / solved
        return metrics

    @property
    def steps(self) -> int:
        return int(self._host.get("steps", 0))

    def nonfinite_steps(self) -> int:
        """Steps whose loss was NaN or infinite. Waits for the device."""
        sums = self.values()
        return int(sums.get("steps", 0) - sums.get("finite_steps", 0))

    def state(self) -> dict[str, Any]:
        """For a checkpoint; ``Sums(state)`` goes on from it exactly."""
        return self.values()
