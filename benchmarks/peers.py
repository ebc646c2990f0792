"""The solvers that other packages offer, behind one function each, so that all are measured the same way.

Each solves z = f(z), z: (B, d) float32 on the CPU (on a GPU: the PyTorch ones), with its own defaults but for the
window, the tolerance on the relative residual, and the cap. A peer that is not installed is left out, and said so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deq.kernels import residual_norm

FixedPointMap = Callable[[Tensor], Tensor]
Solve = Callable[[FixedPointMap, Tensor, float, int, int], Tensor]
"""(f, z0, tol, max_iter, window) -> z"""


def torchdeq_anderson(f: FixedPointMap, z0: Tensor, tol: float, max_iter: int, window: int) -> Tensor:
    """TorchDEQ's Anderson (batched, per-sample weights, absolute regularisation 1e-4)."""
    from torchdeq.solver import anderson_solver

    z: Tensor = anderson_solver(f, z0, max_iter=max_iter, tol=tol, stop_mode="rel", m=window)[0]
    return z


def torchdeq_broyden(f: FixedPointMap, z0: Tensor, tol: float, max_iter: int, window: int) -> Tensor:
    """TorchDEQ's Broyden, its memory as long as the solve (its default)."""
    from torchdeq.solver import broyden_solver

    z: Tensor = broyden_solver(f, z0, max_iter=max_iter, tol=tol, stop_mode="rel")[0]
    return z


class _Solved(Exception):  # noqa: N818 - it ends a solve, it is no error
    """Raised from inside f, for peers whose own test is another than the relative residual of every sample."""


def _stopping(f: FixedPointMap, tol: float) -> tuple[FixedPointMap, list[Tensor]]:
    """f that raises _Solved where every sample is at tol; the list holds the z that it was last called with."""
    last: list[Tensor] = []

    def stopping(z: Tensor) -> Tensor:
        fz = f(z)
        last[:] = [z.clone()]
        if bool((residual_norm(z, fz) <= tol).all()):
            raise _Solved
        return fz

    return stopping, last


@functools.cache
def _jaxopt_steps(window: int) -> tuple[Any, Any, Any]:
    """jaxopt's start, its next iterate, and its update given f there, each jitted, one problem a sample by vmap."""
    import jax
    from jaxopt import AndersonAcceleration

    solver = AndersonAcceleration(lambda z, fz: fz, history_size=window)

    def next_iterate(z: Any, state: Any, position: Any) -> Any:
        # Where f is asked next: the last entry that an update, whatever f is, would make in the history.
        return solver.update(z, state, z).state.params_history[position]

    start = jax.jit(jax.vmap(lambda z: solver.init_state(z, z)))
    return start, jax.jit(jax.vmap(next_iterate, (0, 0, None))), jax.jit(jax.vmap(solver.update))


def jaxopt_anderson(f: FixedPointMap, z0: Tensor, tol: float, max_iter: int, window: int) -> Tensor:
    """jaxopt's Anderson, one problem a sample; its own test, on the absolute residual, is replaced by ours.

    f is PyTorch's, so that each iteration is two calls of jitted code: what to ask f about, and what to do with that.
    """
    import jax.numpy as jnp

    start, next_iterate, update = _jaxopt_steps(window)
    params = jnp.asarray(z0.numpy())
    state = start(params)
    for k in range(max_iter):
        z = torch.from_numpy(np.array(next_iterate(params, state, k % window)))
        fz = f(z)
        if bool((residual_norm(z, fz) <= tol).all()):
            break
        params, state = update(params, state, jnp.asarray(fz.numpy()))
    return z


def scs_aa(f: FixedPointMap, z0: Tensor, tol: float, max_iter: int, window: int) -> Tensor:
    """SCS's aa (type II, float64, its safeguard on): one workspace a sample."""
    import aa

    batch, dim = z0.shape
    accelerators = [aa.AndersonAccelerator(dim, window, type1=False) for _ in range(batch)]
    x = z0.numpy().astype(np.float64)
    previous = x.copy()
    for k in range(max_iter):
        for sample, accelerator in enumerate(accelerators):
            if k > 0:
                accelerator.apply(x[sample], previous[sample])
        previous = x.copy()
        x = f(torch.from_numpy(previous).float()).numpy().astype(np.float64)
        residual = np.linalg.norm(x - previous, axis=1) / np.linalg.norm(x, axis=1)
        if residual.max() <= tol:
            break
        for sample, accelerator in enumerate(accelerators):
            accelerator.safeguard(x[sample], previous[sample])
    return torch.from_numpy(previous).float()


def scipy_anderson(f: FixedPointMap, z0: Tensor, tol: float, max_iter: int, window: int) -> Tensor:
    """SciPy's Anderson, one least-squares problem for the whole batch.

    Its own test, on the largest absolute element, is replaced by ours.
    """
    from scipy.optimize import NoConvergence, anderson

    stopping, last = _stopping(f, tol)

    def residual(z: Any) -> Any:
        return stopping(torch.from_numpy(np.ascontiguousarray(z, dtype=np.float32))).numpy() - z

    # Its line search may end in NaN, which it answers with a ValueError.
    with contextlib.suppress(_Solved, NoConvergence, ValueError):
        anderson(residual, z0.numpy(), M=window, alpha=1.0, maxiter=max_iter, f_tol=1e-30)
    return last[0].view(z0.shape)


ON_A_GPU = ("TorchDEQ anderson_solver", "TorchDEQ broyden_solver")
"""The peers that take tensors of any device; the others work through NumPy."""

PEERS: dict[str, tuple[str, Solve]] = {
    "TorchDEQ anderson_solver": ("torchdeq", torchdeq_anderson),
    "TorchDEQ broyden_solver": ("torchdeq", torchdeq_broyden),
    "jaxopt AndersonAcceleration": ("jaxopt", jaxopt_anderson),
    "SCS aa (type II)": ("aa", scs_aa),
    "SciPy anderson": ("scipy", scipy_anderson),
}
"""Name -> (module that it needs, how to call it)."""


def installed(names: tuple[str, ...] = tuple(PEERS)) -> dict[str, Solve]:
    """The peers that can run here; the others are named on standard error."""
    found = {}
    for name in names:
        module, solve = PEERS[name]
        if importlib.util.find_spec(module) is None:
            print(f"{name} is left out: {module} is not installed (pip install -e '.[bench]')", file=sys.stderr)
        else:
            found[name] = solve
    return found
