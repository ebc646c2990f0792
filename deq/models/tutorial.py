"""The paper's baselines: a DEQ layer and its two solvers, written the way the *Deep Implicit Layers* tutorial does.

Where they differ from it: ``max_iter`` counts all evaluations of f, of which the tutorial's forward iteration makes one
more; Anderson's first two evaluations are tested, too; and the samples' own residuals, which the tutorial does not
know, are computed once at the end, for the account. What is peculiar to them is kept, since it is what they are here
to measure: one residual for the whole batch, read by
the host after every evaluation; Anderson's history as two dense tensors whose Gram matrix is computed anew each time,
an absolute ridge, and a batched LU; two more evaluations of f at the fixed point that was found; a hook for the
gradient. Everything else of a run is the same as for the solvers of :mod:`deq.solvers`, to which these are compared.

Source: Kolter, Duvenaud & Johnson, *Deep Implicit Layers* tutorial, chapter 4; arXiv 2410.19460 trains with it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deq.kernels import residual_norm
from deq.layer import DEQ, Equilibrium, Implicit
from deq.layer.gradients import adjoint_map, recorded
from deq.solvers import Outcome, Solution, Solver
from deq.solvers.iteration import Iteration
from deq.solvers.map import FixedPointMap, Restrict
from deq.solvers.state import Nest

_EPSILON = 1e-5  # the tutorial's, beside ||f||


@dataclass(frozen=True, repr=False)
class TutorialSolution(Solution):
    """A solution whose stopping test read one residual of the whole batch."""

    pooled_residual: float = torch.nan
    """``||f(z) - z|| / (||f(z)|| + 1e-5)``, norms over all samples together, where the solve ended."""


@dataclass(frozen=True, kw_only=True)
class TutorialSolver(Solver):
    """A solver whose loop is the tutorial's. ``stop``, ``compact``, ``check_every`` and ``patience`` have no meaning;
    ``atol`` is refused.

    In its solutions the residuals are those of the iterate that was evaluated last; forward iteration returns f of it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.atol:
            raise ValueError(f"{type(self).__name__} knows no absolute tolerance, got atol={self.atol}: leave it out")

    def start(self, x: Tensor, *, in_place: bool = False) -> Iteration:
        raise ValueError(f"{type(self).__name__} has no iteration that could be recorded: use cuda_graph=False")

    def stopping_residual(self, solution: Solution) -> Tensor:
        assert isinstance(solution, TutorialSolution)
        return torch.tensor(solution.pooled_residual, dtype=torch.float64, device=solution.residual.device)

    def _solve(
        self,
        f: FixedPointMap,
        z0: Tensor,
        trace: bool,
        restrict: Restrict | None,
        states_at: Collection[int],
        check: bool,
    ) -> Solution:
        if states_at:
            raise ValueError(f"{type(self).__name__} keeps no iterates on the way: leave states_at out")
        return self._loop(f, z0, _Account(z0, self.tol, trace))

    @abstractmethod
    def _loop(self, f: FixedPointMap, z0: Tensor, account: _Account) -> Solution:
        """The tutorial's loop; every evaluation goes through ``account``."""


class _Account:
    """The batch's residual after each evaluation, and at the end the solution in this project's terms."""

    def __init__(self, z0: Tensor, tol: float, trace: bool) -> None:
        self._batch_size, self._tol = len(z0), tol
        self._trace: list[Tensor] | None = [] if trace else None
        self._evaluations = 0

    def met(self, x: Tensor, fx: Tensor) -> bool:
        """Whether the batch is at tol, x and f(x) being (B, ...). Waits for the device, as the tutorial does."""
        self._evaluations += 1
        self._x, self._fx = x, fx
        self._pooled = (fx - x).norm().item() / (_EPSILON + fx.norm().item())
        if self._trace is not None:
            self._trace.append(self._of_samples())
        return bool(self._pooled < self._tol)

    def _of_samples(self) -> Tensor:
        return residual_norm(self._x.flatten(1), self._fx.flatten(1))

    def solution(self, z: Tensor) -> TutorialSolution:
        """z: (B, ...), what is returned; the residuals are those of the iterate that was evaluated last."""
        residual = self._of_samples()
        converged = residual <= self._tol
        ended = Outcome.MEAN_MET if self._pooled < self._tol else Outcome.MAX_ITER
        outcome = torch.full((self._batch_size,), ended, dtype=torch.uint8, device=z.device)
        outcome.masked_fill_(converged, Outcome.CONVERGED)
        zeros = torch.zeros(self._batch_size, dtype=torch.int32, device=z.device)
        return TutorialSolution(
            z=z,
            residual=residual,
            iterations=zeros + self._evaluations,
            evaluations=self._evaluations,
            sample_evaluations=self._evaluations * self._batch_size,
            converged=converged,
            outcome=outcome,
            restarts=zeros,
            fallbacks=zeros.clone(),
            trace=torch.stack(self._trace) if self._trace is not None else None,
            tol=self._tol,
            pooled_residual=self._pooled,
        )


@dataclass(frozen=True, kw_only=True)
class TutorialForward(TutorialSolver):
    """Forward iteration as the tutorial writes it: the paper's baseline.

    Args:
        tol: of the batch's residual. max_iter: evaluations of f at most, at least 1.

    Example:
        >>> import torch
        >>> solution = TutorialForward(tol=1e-3).solve(torch.cos, torch.zeros(2, 4))
        >>> solution.evaluations, solution.outcomes
        (19, {'converged': 2})
    """

    def _loop(self, f: FixedPointMap, z0: Tensor, account: _Account) -> Solution:
        x, fx = z0, f(z0)
        while not account.met(x, fx) and account._evaluations < self.max_iter:
            x = fx
            fx = f(x)
        return account.solution(fx)


@dataclass(frozen=True, kw_only=True)
class TutorialAnderson(TutorialSolver):
    """Anderson extrapolation as the tutorial writes it: the paper's method.

    Minimises ``||G^T alpha||^2 + ridge ||alpha||^2`` subject to ``sum(alpha) = 1`` over the last ``window`` iterates,
    by the bordered system, and steps to ``beta F^T alpha + (1 - beta) X^T alpha``.

    Args:
        window: iterates that are mixed, at least 2.
        beta: mixing parameter in (0, 1].
        ridge: absolute, added to the Gram matrix (the tutorial's lambda).
        tol: of the batch's residual. max_iter: evaluations of f at most, at least 1.

    Raises:
        ValueError: for an option outside its limits.
        torch.linalg.LinAlgError: from a solve, where the system of any sample is singular.

    Example:
        >>> import torch
        >>> TutorialAnderson(tol=1e-3).solve(torch.cos, torch.zeros(2, 4)).evaluations
        8
    """

    window: int = 5
    beta: float = 1.0
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"window must be at least 2, got {self.window!r}: it begins with two iterates")
        if not 0.0 < self.beta <= 1.0:
            raise ValueError(f"beta must be above 0 and at most 1, got {self.beta} (1 is no damping)")
        if not self.ridge >= 0.0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge}")

    def _loop(self, f: FixedPointMap, z0: Tensor, account: _Account) -> Solution:
        batch, m = len(z0), self.window
        X = z0.new_zeros(batch, m, z0[0].numel())
        F = torch.zeros_like(X)

        def evaluate(slot: int, x: Tensor) -> bool:
            X[:, slot] = x
            F[:, slot] = f(x.view_as(z0)).reshape(batch, -1)
            return account.met(X[:, slot], F[:, slot]) or account._evaluations >= self.max_iter

        if not evaluate(0, z0.reshape(batch, -1)) and not evaluate(1, F[:, 0]):
            # The border of the system: sum(alpha) = 1 with its multiplier.
            H = X.new_zeros(batch, m + 1, m + 1)
            H[:, 0, 1:] = H[:, 1:, 0] = 1
            right_side = X.new_zeros(batch, m + 1, 1)
            right_side[:, 0] = 1
            for k in range(2, self.max_iter + 1):
                n = min(k, m)
                G = F[:, :n] - X[:, :n]
                identity = torch.eye(n, dtype=X.dtype, device=X.device)
                H[:, 1 : n + 1, 1 : n + 1] = torch.bmm(G, G.transpose(1, 2)) + self.ridge * identity
                alpha = torch.linalg.solve(H[:, : n + 1, : n + 1], right_side[:, : n + 1])[:, 1:, 0]
                mixed_f, mixed_x = alpha[:, None] @ F[:, :n], alpha[:, None] @ X[:, :n]
                if evaluate(k % m, (self.beta * mixed_f + (1 - self.beta) * mixed_x)[:, 0]):
                    break
        return account.solution(account._x.reshape(z0.shape).clone())


class TutorialDEQ(DEQ):
    """The tutorial's layer around a cell: solve, evaluate once more with a gradient, hook the adjoint solve to it.

    Args:
        cell: (z, x) -> z, tensors of one shape.
        solver: finds the fixed point.
        gradient: ``Implicit``; its solver, or ``solver`` where it has none, solves the adjoint equation.

    Raises:
        ValueError: for another gradient.

    Example:
        >>> import torch
        >>> layer = TutorialDEQ(lambda z, x: 0.5 * z + x, TutorialForward(tol=1e-5))
        >>> x = torch.ones(1, 1, requires_grad=True)
        >>> layer(x).backward()
        >>> round(x.grad.item(), 3), layer.last_adjoint.evaluations  # 1 / (1 - 0.5)
        (2.0, 16)
    """

    def __init__(
        self, cell: Callable[[Any, Any], Any], solver: TutorialSolver, gradient: Implicit | None = None
    ) -> None:
        super().__init__(cell, solver, gradient)
        if not isinstance(self.gradient, Implicit):
            raise ValueError(
                f"the tutorial's layer knows the implicit gradient alone, got {type(self.gradient).__name__}: use "
                "gradient=implicit, or solver=forward or anderson"
            )
        self._adjoint_solver = self.gradient.solver or solver

    def forward(self, x: Nest, z0: Nest | None = None) -> Any:
        """The fixed point, (B, ...), with f once more applied to it. x: (B, ...)."""
        if not isinstance(x, Tensor) or z0 is not None:
            raise ValueError("the tutorial's layer starts at zeros in the shape of one tensor x: leave z0 out")
        with torch.no_grad():
            solution = self.solver.solve(lambda z: self.cell(z, x), torch.zeros_like(x))
        self.last_solution, self.last_adjoint = solution, None
        z: Tensor = self.cell(solution.z, x)
        if not z.requires_grad:
            return z
        z_star = z.detach().clone().requires_grad_()
        f_star = recorded(lambda z: self.cell(z, x), z_star)

        def adjoint(grad: Tensor) -> Tensor:
            found = self._adjoint_solver.solve(adjoint_map(f_star, z_star, grad), grad)
            if self.last_solution is solution:
                self.last_adjoint = found
            return found.z

        z.register_hook(adjoint)
        return z

    def equilibrium(self, x: Nest, z0: Nest | None = None, *, corrections: Collection[int] = ()) -> Equilibrium:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError("the tutorial's layer knows no losses on the way to the fixed point: leave stability out")
