"""The picture of a solve: relative residual against evaluations of f."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BAND = (0.1, 0.9)
"""Percentiles between which the band lies: one sample in five is outside."""


def plot_residuals(trace: Tensor | None, tol: float | None, ax: Any | None = None, label: str | None = None) -> Any:
    """Draws one solve; see :meth:`deq.solvers.Solution.plot`.

    Args:
        trace: (K, B) relative residual of each sample at each of the K evaluations.
        tol: where the tolerance line is drawn, once an axis; None draws none.
        ax: a matplotlib axis; default: that of a new figure.
        label: for the legend.

    Raises:
        ValueError: without a trace.
        ImportError: without matplotlib, if ``ax`` is None.
    """
    if trace is None:
        raise ValueError("this solve kept no trace to draw: ask for one with solver.solve(f, z0, trace=True)")
    if ax is None:
        try:
            from matplotlib import pyplot as plt
        except ImportError as error:
            raise ImportError(
                "a solution is drawn with matplotlib, which is not installed: pip install matplotlib"
            ) from error
        _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    residuals = trace.double().cpu()
    # A sample that was given up has no residual any more, and no place in a percentile.
    low, median, high = torch.nanquantile(
        residuals, torch.tensor([BAND[0], 0.5, BAND[1]], dtype=torch.float64), dim=1
    ).tolist()
    evaluations = range(1, len(residuals) + 1)
    (line,) = ax.plot(evaluations, median, label=label, linewidth=1.8)
    color = line.get_color()
    ax.plot(evaluations[-1:], median[-1:], marker="o", markersize=4, color=color)
    if residuals.shape[1] > 1:
        ax.fill_between(evaluations, low, high, color=color, alpha=0.12, linewidth=0)
        # Where bands lie over each other their edges tell them apart.
        for edge in (low, high):
            ax.plot(evaluations, edge, color=color, alpha=0.45, linewidth=0.6)
    if tol and not any(line.get_gid() == _tolerance(tol) for line in ax.lines):
        ax.axhline(tol, color="0.4", linewidth=0.8, linestyle="--", zorder=0.5, gid=_tolerance(tol))
        ax.annotate(
            f"tol {tol:g}",
            (0.0, tol),  # on the left, where no residual is at it yet
            xycoords=("axes fraction", "data"),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize="small",
            color="0.4",
        )
    # Residuals of exactly 0 lie below the picture.
    ax.set_yscale("log", nonpositive="clip")
    ax.set(xlabel="evaluations of f", ylabel="relative residual")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(left=0)
    if label is not None:
        ax.legend(frameon=False)
    return ax


def _tolerance(tol: float) -> str:
    return f"tolerance {tol}"
