"""What keeps the map of a DEQ layer well-behaved in training: penalties, and a look at its spectrum."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deq.kernels.state import accumulator_dtype
from deq.layer.gradients import adjoint_map, recorded
from deq.layer.held import VariationalDropout
from deq.solvers.map import FixedPointMap
from deq.solvers.solution import State
from deq.solvers.state import Coordinates

__all__ = [
    "SpectralRadius",
    "StabilityLosses",
    "VariationalDropout",
    "correction_loss",
    "jacobian_penalty",
    "spectral_radius",
]


def jacobian_penalty(
    f: Callable[[State], State], z: State, probes: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of ``||J||_F^2 / d``, the mean over the batch, with J = df/dz at z: () float.

    With v of independent signs ±1 (Rademacher), ``E ||J^T v||^2 = ||J||_F^2``; the estimate is the mean over the
    probes v and the samples, divided by the d elements of a sample, as in the paper. Unbiased with any number of
    probes; exact, with one, where J J^T is diagonal. Signs have less variance than the paper's Gaussian probes.

    Differentiable in what f closes over (a second derivative of f), not in z: the penalty shapes the map where its
    fixed point is, and does not move it. Squares are summed in float32 at least, under autocast too. A cell that is
    compiled runs as it was written, since a compiled backward has no derivative.

    Cost: an evaluation of f and ``probes`` products J^T v; in ``backward`` about as much again.

    Args:
        f: (B, ...) -> (B, ...); see ``DEQ.equilibrium`` for that of a layer. Nests likewise.
        z: (B, ...) floating point, where J is taken: the fixed point.
        probes: vectors v, at least 1.
        generator: draws the signs; default: the global one of z's device.

    Raises:
        ValueError: if ``probes`` is below 1.

    Source: Bai, Koltun & Kolter 2021, *Stabilizing equilibrium models by Jacobian regularization*;
    Hutchinson 1990, *A stochastic estimator of the trace of the influence matrix*.

    Example:
        >>> import torch
        >>> slope = torch.tensor([0.5, 1.0, 2.0, 0.0], requires_grad=True)
        >>> penalty = jacobian_penalty(lambda z: slope * z, torch.zeros(3, 4))
        >>> penalty.backward()
        >>> penalty.detach(), slope.grad  # (0.25 + 1 + 4 + 0) / 4 and slope / 2
        (tensor(1.3125), tensor([0.2500, 0.5000, 1.0000, 0.0000]))
    """
    _check_count("probes", probes)
    with torch.enable_grad(), _uncompiled():
        f_flat, flat, _ = _of_tensors(f, z)
        flat = flat.detach().requires_grad_()
        f_z = f_flat(flat)
        total = torch.zeros((), dtype=accumulator_dtype(flat.dtype), device=flat.device)
        for _ in range(probes if f_z.requires_grad else 0):  # else f is a constant
            signs = torch.empty_like(f_z).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            (product,) = torch.autograd.grad(f_z, flat, signs, create_graph=True, materialize_grads=True)
            total = total + product.to(total.dtype).square().sum()
    return total / (probes * flat.numel())


class SpectralRadius(NamedTuple):
    """What :func:`spectral_radius` found.

    Example:
        >>> import torch
        >>> radius, converged, steps = spectral_radius(lambda z: 0.5 * z, torch.zeros(3, 2))
        >>> radius, converged
        (tensor([0.5000, 0.5000, 0.5000]), tensor([True, True, True]))
    """

    radius: Tensor
    """(B,) float32, or float64 where z is: the largest modulus of an eigenvalue of J; NaN where J is not finite. Of a
    sample that has not converged, the growth of a vector per step, geometric mean over the later half of the steps."""
    converged: Tensor
    """(B,) bool: the eigenpair that the radius comes from leaves a residual of at most ``tol`` times it."""
    steps: int
    """Steps made, of two products J^T v each."""


def spectral_radius(
    f: Callable[[State], State],
    z: State,
    steps: int = 100,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
    coupled: bool = False,
) -> SpectralRadius:
    """The spectral radius of J = df/dz at z, per sample, by power iteration on a block of two vectors.

    The Rayleigh quotient of a single vector goes on for ever where the dominant eigenvalues are a complex pair, or λ
    and -λ: a real vector turns in their plane. Two vectors, made orthonormal in every step (Q), span that plane, and
    the 2 x 2 matrix ``Q^T A Q`` has their moduli. A = J^T, which has the eigenvalues of J: products with it need one
    recorded evaluation of f in all, those with J one in every step, and a forward-mode formula of every operation.

    A pair (θ, Q y) counts as converged with ``||A Q y - θ Q y|| <= tol |θ|``: θ is then an eigenvalue of a matrix
    that near to A. In a matrix far from normal, eigenvalues move by more than that. The error falls by the ratio of
    the next largest modulus to the largest in every step. Where more than two eigenvalues are about as large, a block
    of two finds none of them, but how fast vectors grow tells their modulus: such a sample gets that, within the
    inverse of the number of steps, and is marked as not converged.

    Cost: an evaluation of f, two products with J^T, and two a step. Nothing is differentiable. For a look now and then:
    the stopping test waits for the device in every step.

    Args:
        f: (B, ...) -> (B, ...); see ``DEQ.equilibrium`` for that of a layer. Nests likewise.
        z: (B, ...) floating point, where J is taken.
        steps: at most this many, at least 1.
        tol: relative, see above; ends the iteration when every sample is there.
        generator: draws the first block; default: the global one of z's device.
        coupled: samples see each other: the radius is that of the Jacobian of the whole batch, the same for each.

    Raises:
        ValueError: if ``steps`` is below 1 or ``tol`` negative; if samples see each other without ``coupled``.

    Source: Stewart 1976, *Simultaneous iteration for computing invariant subspaces of non-Hermitian matrices*; the
    radius as a measure of a DEQ's stability: Bai, Koltun & Kolter 2021.

    Example:
        >>> import torch
        >>> turn = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])  # eigenvalues 0.9 (0.6 ± 0.8i)
        >>> spectral_radius(lambda z: z @ turn, torch.zeros(3, 2)).radius
        tensor([0.9000, 0.9000, 0.9000])
    """
    _check_count("steps", steps)
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol} (relative: 1e-3 is usual)")
    with _uncompiled():
        f_flat, flat, samples = _of_tensors(f, z, coupled)
        flat = flat.detach().requires_grad_()
        f_z = recorded(f_flat, flat)
    dtype = accumulator_dtype(flat.dtype)
    batch_size, d = len(flat), flat[0].numel()
    if not f_z.requires_grad:  # f is a constant
        zeros = torch.zeros(samples, dtype=dtype, device=flat.device)
        return SpectralRadius(zeros, zeros == 0, 0)
    transposed = adjoint_map(f_z, flat, torch.zeros_like(flat))
    _refuse_coupled_samples(transposed, flat)
    growth: list[Tensor] = []
    with torch.no_grad():
        AQ = torch.randn(batch_size, d, min(2, d), dtype=dtype, device=flat.device, generator=generator)
        for _ in range(steps):
            Q = torch.linalg.qr(AQ).Q
            AQ = torch.stack([transposed(q.reshape(flat.shape).to(flat.dtype)).flatten(1) for q in Q.unbind(2)], 2).to(
                dtype
            )
            growth.append(torch.linalg.vector_norm(AQ[:, :, 0], dim=1))  # of the plain power iteration
            H = Q.mT @ AQ
            # On the host: a tiny problem, and not every build of PyTorch has eigenvalues on its device.
            finite = torch.isfinite(H).all(dim=2).all(dim=1)
            values, vectors = (
                tensor.to(flat.device) for tensor in torch.linalg.eig(torch.where(finite[:, None, None], H, 0.0).cpu())
            )
            radius, largest = values.abs().max(dim=1)
            y = vectors.gather(2, largest[:, None, None].expand(-1, vectors.shape[1], 1))
            residual = torch.linalg.vector_norm((AQ - Q @ H).to(y.dtype) @ y, dim=(1, 2))
            converged = residual <= tol * radius
            if bool((converged | ~finite).all()):
                break
        grown = torch.stack(growth[len(growth) // 2 :]).log().mean(dim=0).exp()
    radius = torch.where(converged, radius, torch.where(finite, grown, torch.nan))
    return SpectralRadius(radius.expand(samples), converged.expand(samples), len(growth))


def _refuse_coupled_samples(transposed: FixedPointMap, flat: Tensor) -> None:
    """Raises ValueError where the product with a row depends on other rows: multiplied by powers of two of their own,
    independent rows of it are multiplied by these, to the bit.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(flat.shape, generator=generator, dtype=torch.float64).to(flat)
    exponents = torch.randperm(len(flat), generator=generator) % 16
    powers = (2.0**exponents).to(flat).view(-1, *(1,) * (flat.ndim - 1))
    with torch.no_grad():
        apart, together = transposed(rows) * powers, transposed(rows * powers)
    differ = (apart != together) & apart.isfinite() & together.isfinite()
    if bool((differ & ((apart - together).abs() > 1e-6 * apart.abs().amax(dim=-1, keepdim=True))).any()):
        raise ValueError("the samples of z see each other, so that none has a radius of its own: use coupled=True")


def correction_loss(loss: Callable[[Tensor], Tensor], states: Sequence[Tensor], gamma: float = 0.8) -> Tensor:
    """Fixed-point correction: ``sum_k gamma^(n + 1 - k) loss(z_k)`` over the n iterates z_1 ... z_n on the way: ().

    To be added to the loss at the fixed point itself, the term k = n + 1, of weight 1. Teaches a solve to be near the
    answer early, so that one that is cut short loses little.

    Args:
        loss: (B, ...) -> () of one iterate, whatever lies between it and the answer included.
        states: those of ``DEQ.equilibrium(x, corrections=...)``, the earliest first; with none the sum is 0.
        gamma: weight of the last of them, and ratio of each to the next, in (0, 1].

    Raises:
        ValueError: if ``gamma`` is outside its limits.

    Source: Bai, Geng, Savani & Kolter 2022, *Deep equilibrium optical flow estimation* (sparse fixed-point correction).

    Example:
        >>> import torch
        >>> from deq import DEQ
        >>> equilibrium = DEQ(lambda z, x: 0.5 * z + x).equilibrium(torch.ones(1, 1), corrections=(1,))
        >>> loss = lambda z: (z - 2).square().mean()
        >>> loss(equilibrium.z) + correction_loss(loss, equilibrium.states, gamma=0.5)  # z_1 = 1, z* = 2
        tensor(0.5000)
    """
    _check_gamma("gamma", gamma)
    weights = [gamma ** (len(states) - k) for k in range(len(states))]
    terms = [weight * loss(state) for weight, state in zip(weights, states, strict=True)]
    return torch.stack(terms).sum() if terms else torch.zeros(())


@dataclass(frozen=True)
class StabilityLosses:
    """Which losses of this module a training run adds to its own. All are off by default, and cost nothing then.

    Args:
        jacobian_weight: of :func:`jacobian_penalty` at the fixed point, at least 0.
        jacobian_probability: of a step to take the penalty, above 0 and at most 1; the paper takes it in some steps
            alone, since each costs about two evaluations of f and their backward pass.
        corrections: evaluations of f after which the iterate gets a loss of its own, see :func:`correction_loss`.
        gamma: weight of the last correction, and ratio of each to the next.

    Raises:
        ValueError: for an option outside its limits.

    Example:
        >>> StabilityLosses(corrections=[3, 6]).corrections
        (3, 6)
    """

    jacobian_weight: float = 0.0
    jacobian_probability: float = 1.0
    corrections: Sequence[int] = ()
    gamma: float = 0.8

    def __post_init__(self) -> None:
        if not _is_number(self.jacobian_weight) or not 0 <= self.jacobian_weight < math.inf:
            raise ValueError(f"stability.jacobian_weight must be a number of at least 0, got {self.jacobian_weight!r}")
        if not _is_number(self.jacobian_probability) or not 0 < self.jacobian_probability <= 1:
            raise ValueError(
                f"stability.jacobian_probability must be a number above 0 and at most 1, got "
                f"{self.jacobian_probability!r}; jacobian_weight=0 leaves the penalty out"
            )
        if not isinstance(self.corrections, Sequence):
            raise ValueError(
                f"stability.corrections must be a list of evaluations such as [3,6], got {self.corrections!r}"
            )
        for number in self.corrections:
            _check_count("each of stability.corrections", number)
        _check_gamma("stability.gamma", self.gamma)
        object.__setattr__(self, "corrections", tuple(self.corrections))

    def takes_penalty(self) -> bool:
        """Whether this step takes the penalty; draws a number only where that is open."""
        if not self.jacobian_weight:
            return False
        return self.jacobian_probability == 1 or float(torch.rand(())) < self.jacobian_probability


def _of_tensors(f: Callable[[State], State], z: State, coupled: bool = False) -> tuple[FixedPointMap, Tensor, int]:
    """f and z of one tensor, with a row for each system, and the number of samples."""
    coordinates = Coordinates(z, coupled=coupled, name="z")
    return coordinates.flat_map(f), coordinates.pack(z), coordinates.batch_size


def _check_gamma(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled in this process
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
