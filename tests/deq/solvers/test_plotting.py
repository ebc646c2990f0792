"""The picture of a solve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.problems import affine
from deq.solvers import Anderson, Broyden, Forward, Solution

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _figures_are_closed() -> Iterator[None]:
    yield
    from matplotlib import pyplot as plt

    plt.close("all")


def solved(solver: Anderson | Forward | Broyden, batch: int = 4) -> Solution:
    f = affine(0.9, batch=batch)
    return solver.solve(f, f.zero, trace=True)


def lines(ax: Any, width: float = 1.8) -> list[Any]:
    return [line for line in ax.lines if line.get_linewidth() == width and len(line.get_xdata()) > 1]


def test_the_line_is_the_median_and_the_band_holds_four_samples_of_five() -> None:
    solution = solved(Anderson(tol=1e-5), batch=11)
    ax = solution.plot(label="Anderson")
    assert solution.trace is not None
    (line,) = lines(ax)
    assert list(line.get_xdata()) == list(range(1, solution.evaluations + 1))
    torch.testing.assert_close(
        torch.as_tensor(line.get_ydata()), solution.trace.median(dim=1).values.double(), check_dtype=False
    )
    (band,) = ax.collections
    heights = torch.as_tensor(band.get_paths()[0].vertices[:, 1])
    second, tenth = solution.trace.sort(dim=1).values[0, [1, 9]].tolist()  # of 11: the 10th and 90th percentile
    at_the_first = heights[torch.as_tensor(band.get_paths()[0].vertices[:, 0]) == 1]
    assert at_the_first.min().item() == pytest.approx(second)
    assert at_the_first.max().item() == pytest.approx(tenth)
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "evaluations of f"
    assert ax.get_ylabel() == "relative residual"


def test_several_solutions_share_an_axis_a_legend_and_one_line_for_the_tolerance() -> None:
    ax = None
    for solver in (Anderson(tol=1e-3), Forward(tol=1e-3), Broyden(tol=1e-3)):
        ax = solved(solver).plot(ax, label=type(solver).__name__)
    assert ax is not None
    assert len(lines(ax)) == len({line.get_color() for line in lines(ax)}) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Anderson", "Forward", "Broyden"]
    assert [list(line.get_ydata()) for line in lines(ax, 0.8)] == [[1e-3, 1e-3]]
    solved(Anderson(tol=1e-6)).plot(ax)
    assert len(lines(ax, 0.8)) == 2


def test_samples_that_were_given_up_and_residuals_of_zero_do_not_spoil_the_picture() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [torch.nan, 0.0]])
    ax = Anderson(tol=1e-6).solve(lambda z: 0.5 * torch.sin(z) + x, torch.zeros(3, 2), trace=True).plot()
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    assert 1e-12 < low < high < 1e3
    one = solved(Anderson(tol=1e-3), batch=1).plot()
    assert not one.collections, "one sample has no band"


def test_a_solve_that_was_not_traced_says_how_to_trace_it() -> None:
    solution = Anderson().solve(torch.cos, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"kept no trace to draw: .* solver\.solve\(f, z0, trace=True\)"):
        solution.plot()


def test_without_matplotlib_the_error_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    solution = solved(Anderson())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="drawn with matplotlib, which is not installed: pip install"):
        solution.plot()
