"""Warm starts across epochs: each training sample's solve begins where its last one ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deq.solvers import Solution
from deq.solvers.state import flatten, unflatten


class WarmStart:
    """The last equilibrium of every sample of a training set, kept from one epoch to the next.

    What is found does not change beyond the solver's tolerance; how soon does, where an epoch's training moves a
    sample's equilibrium less than it is away from zeros. Augmentation that shows another image in every epoch usually
    moves it more: a start from zeros is then the better one. A sample that has no equilibrium yet
    starts from zeros, as a layer does without ``z0``.

    Takes N times a sample's state of memory on the state's device, in half precision unless told otherwise: rounding
    moves an element by at most 0.4 %, which is worth a few evaluations only where tol is far below that.

    Args:
        samples: N; each is known by its number, 0 to N - 1.
        dtype: floating point, that the equilibria are kept in.

    Raises:
        ValueError: for fewer than one sample, or a dtype that is not floating point.

    Source: Bai, Geng, Savani & Kolter 2022, *Deep equilibrium optical flow estimation* (a start from the frame before).

    Example:
        >>> import torch
        >>> from deq import DEQ
        >>> layer, starts = DEQ(lambda z, x: torch.tanh(0.5 * z + x)), WarmStart(samples=100)
        >>> data = torch.randn(100, 8)
        >>> evaluations = []
        >>> for epoch in range(2):
        ...     for index in torch.arange(100).split(50):
        ...         z_star = layer(data[index], z0=starts.of(index))
        ...         starts.keep(index, layer.last_solution)
        ...         evaluations.append(layer.last_solution.evaluations)
        >>> max(evaluations[2:]) < min(evaluations[:2])
        True
    """

    def __init__(self, samples: int, dtype: torch.dtype = torch.bfloat16) -> None:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be a whole number of training samples, at least 1, got {samples!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, such as torch.bfloat16, got {dtype}")
        self.samples, self.dtype = samples, dtype
        self._rows: list[Tensor] = []  # (N, ...) each: made when the first equilibrium tells the shapes
        self._skeleton: Any = None
        self._state_dtype = dtype

    def of(self, index: Tensor) -> Any | None:
        """Starts for these samples, (n,) int64, in the structure, shapes and dtype of what was kept; None before that.

        To be given to a layer as ``z0``, which takes None for zeros.
        """
        if not self._rows:
            return None
        return unflatten(self._skeleton, [rows[index].to(self._state_dtype) for rows in self._rows])

    @torch.no_grad()
    def keep(self, index: Tensor, solution: Solution[Any]) -> None:
        """Takes the equilibria of these samples, (n,) int64, each at most once, where their residuals are finite.

        Raises:
            ValueError: if the states are of other shapes than those kept, or not as many as ``index`` names.
        """
        leaves, skeleton = flatten(solution.z, "z")
        if not self._rows:
            self._rows = [leaf.new_zeros((self.samples, *leaf.shape[1:]), dtype=self.dtype) for leaf in leaves]
            self._skeleton, self._state_dtype = skeleton, leaves[0].dtype
        expected = [(len(index), *rows.shape[1:]) for rows in self._rows]
        if skeleton != self._skeleton or [tuple(leaf.shape) for leaf in leaves] != expected:
            raise ValueError(
                f"starts are kept for states of {unflatten(self._skeleton, expected)}, got "
                f"{unflatten(skeleton, [tuple(leaf.shape) for leaf in leaves])}: use a WarmStart for each layer"
            )
        usable = torch.isfinite(solution.residual)
        for rows, leaf in zip(self._rows, leaves, strict=True):
            here = usable.view(-1, *(1,) * (leaf.ndim - 1))
            rows[index] = torch.where(here, leaf.to(self.dtype), rows[index])

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors, strings, numbers, lists and dicts (and tuples, where the states have them)."""
        return {"rows": list(self._rows), "skeleton": self._skeleton, "dtype": self._state_dtype}

    def restore(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Goes on from what :meth:`state` gave, on ``device``.

        Raises:
            ValueError: if it is of another number of samples.
        """
        rows = [kept.to(device, self.dtype) for kept in state["rows"]]
        if any(len(kept) != self.samples for kept in rows):
            raise ValueError(f"the starts kept are of {len(rows[0])} samples, but there are {self.samples}: start anew")
        self._rows, self._skeleton, self._state_dtype = rows, state["skeleton"], state["dtype"]
