"""Floating-point operations of a cell: the proxy for energy where no counter measures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deq.layer import Gradient, Implicit
from deq.models.tutorial import TutorialDEQ
from deq.solvers.state import Nest, flatten, unflatten


def _cuda_devices(tensor: Tensor) -> list[torch.device]:
    """Whose random numbers are to be kept, beside the CPU's."""
    return [tensor.device] if tensor.device.type == "cuda" else []


@dataclass(frozen=True)
class CellFlops:
    """Floating-point operations for one sample, as ``torch.utils.flop_counter`` counts them: convolutions and matrix
    products, a multiplication and an addition being two."""

    evaluation: float
    """Of f(z)."""
    product: float
    """Of J^T u, with f(z) recorded."""
    gradient: float
    """Of the gradients with respect to x and all parameters."""
    both: float
    """Of these and J^T u together, which share a part of the way back."""

    @staticmethod
    def of(cell: nn.Module, state: Nest) -> CellFlops:
        """Counts one evaluation and both ways back through it, at zeros; no parameter or buffer is touched.

        Args:
            cell: (z, x) -> z, with x in the shapes of z. state: z of one sample, (1, ...), or a nest of such.
        """
        parameter = next(cell.parameters())
        leaves, skeleton = flatten(state, "state")
        z, x = ([torch.zeros_like(leaf).requires_grad_() for leaf in leaves] for _ in range(2))
        weights = [weight for weight in cell.parameters() if weight.requires_grad]
        with (
            torch.random.fork_rng(_cuda_devices(parameter)),
            torch.enable_grad(),
            torch.autocast(parameter.device.type, enabled=False),
        ):
            with FlopCounterMode(display=False) as evaluation:
                # Not cell(...), which might be compiled.
                f, _ = flatten(cell.forward(unflatten(skeleton, z), unflatten(skeleton, x)), "f")
            u = [torch.zeros_like(part) for part in f]
            with FlopCounterMode(display=False) as product:
                torch.autograd.grad(f, z, u, allow_unused=True, retain_graph=True)
            with FlopCounterMode(display=False) as gradient:
                torch.autograd.grad(f, [*x, *weights], u, allow_unused=True, retain_graph=True)
            with FlopCounterMode(display=False) as both:
                torch.autograd.grad(f, [*z, *x, *weights], u, allow_unused=True)
        return CellFlops(*(float(mode.get_total_flops()) for mode in (evaluation, product, gradient, both)))

    def train_tflop(self, counted: Mapping[str, float], layer: nn.Module, gradient: Gradient) -> float:
        """1e12 operations of the cell in training steps. Stability losses are left out.

        Args:
            counted: of those steps, as a run's statistics name them: ``samples``, ``forward.sample_evaluations``,
                ``backward.sample_evaluations``; what is missing is 0.
        """
        samples = counted.get("samples", 0.0)
        implicit = isinstance(gradient, Implicit)
        recorded = 1 if implicit else getattr(gradient, "steps", 1)
        solves = counted.get("forward.sample_evaluations", 0.0) * self.evaluation
        solves += counted.get("backward.sample_evaluations", 0.0) * self.product
        # The way back through what is recorded: to z* (of the first step), which alone is held constant, in no case
        # but the implicit one, whose z asks for a gradient that nobody reads; to the iterate before, in all others.
        back = self.both if implicit else self.gradient + (recorded - 1) * self.both
        attached = recorded * self.evaluation + back
        if isinstance(layer, TutorialDEQ):
            # Recorded once for the adjoint and once, without a gradient for z, for the parameters.
            attached = 2 * self.evaluation + self.gradient
        return (solves + samples * attached) / 1e12

    def test_tflop(self, sample_evaluations: float) -> float:
        """1e12 operations of the cell in ``sample_evaluations`` without a gradient."""
        return sample_evaluations * self.evaluation / 1e12
