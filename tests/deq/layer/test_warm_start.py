"""Starts kept from one epoch to the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deq import DEQ, WarmStart
from deq.solvers import Anderson, Solution


def solution(z: Any, residual: Tensor) -> Solution[Any]:
    """An account of a state that was not solved for."""
    found = Anderson().solve(torch.cos, torch.zeros(len(residual), 1))
    return replace(found, z=z, residual=residual)  # type: ignore[arg-type]


def test_a_sample_starts_where_it_ended_and_at_zeros_before_that() -> None:
    starts = WarmStart(10)
    assert starts.of(torch.tensor([1, 4])) is None
    z = torch.randn(3, 2, 5)
    starts.keep(torch.tensor([7, 0, 2]), solution(z, torch.zeros(3)))
    got = starts.of(torch.tensor([0, 1, 7]))
    assert got is not None
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.stack([z[1], torch.zeros(2, 5), z[0]]).bfloat16().float())
    newer = torch.randn(1, 2, 5)
    starts.keep(torch.tensor([7]), solution(newer, torch.zeros(1)))
    assert torch.equal(starts.of(torch.tensor([7])), newer.bfloat16().float())  # type: ignore[arg-type]


def test_what_was_never_finite_is_not_kept() -> None:
    starts = WarmStart(3)
    index = torch.arange(3)
    good = torch.randn(3, 4)
    starts.keep(index, solution(good, torch.zeros(3)))
    poisoned = torch.full((3, 4), torch.nan)
    poisoned[1] = 1.0
    starts.keep(index, solution(poisoned, torch.tensor([torch.nan, 0.5, torch.inf])))
    expected = good.bfloat16().float()
    expected[1] = 1.0
    assert torch.equal(starts.of(index), expected)  # type: ignore[arg-type]


def test_nested_states_are_kept_in_their_structure_and_come_back_from_a_file(tmp_path: Path) -> None:
    layer = DEQ(
        lambda z, x: {"high": torch.cos(z["high"] + x), "low": (torch.tanh(z["low"][0] + x[:, :2]),)},
        solver=Anderson(tol=1e-4),
    )
    x = torch.randn(6, 3, dtype=torch.float64)
    zeros = {"high": torch.zeros_like(x), "low": (torch.zeros_like(x[:, :2]),)}
    starts = WarmStart(6, dtype=torch.float32)
    index = torch.tensor([5, 3, 1])
    z = layer(x[index], z0=zeros_of(zeros, index))
    assert layer.last_solution is not None
    cold = layer.last_solution.evaluations
    starts.keep(index, layer.last_solution)

    torch.save(starts.state(), tmp_path / "starts.pt")
    again = WarmStart(6, dtype=torch.float32)
    again.restore(torch.load(tmp_path / "starts.pt", weights_only=True), "cpu")
    got = again.of(index)
    assert got is not None
    assert got["high"].dtype == torch.float64
    torch.testing.assert_close(got, {"high": z["high"], "low": (z["low"][0],)}, rtol=1e-6, atol=1e-6)
    layer(x[index], z0=got)
    assert layer.last_solution.evaluations == 1 < cold


def zeros_of(zeros: Any, index: Tensor) -> Any:
    return {"high": zeros["high"][index], "low": (zeros["low"][0][index],)}


def test_mistakes_are_told_with_value_and_fix() -> None:
    with pytest.raises(ValueError, match=r"samples must be a whole number .* at least 1, got 0"):
        WarmStart(0)
    with pytest.raises(ValueError, match=r"dtype must be floating point, .* got torch.int8"):
        WarmStart(3, torch.int8)
    starts = WarmStart(3)
    starts.keep(torch.tensor([0]), solution(torch.zeros(1, 4), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"states of \(1, 4\), got \(1, 5\): use a WarmStart for each layer"):
        starts.keep(torch.tensor([0]), solution(torch.zeros(1, 5), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"states of \(2, 4\), got \(1, 4\)"):
        starts.keep(torch.tensor([0, 1]), solution(torch.zeros(1, 4), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"states of \(1, 4\), got \(\(1, 4\),\)"):
        starts.keep(torch.tensor([0]), solution((torch.zeros(1, 4),), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"of 3 samples, but there are 4: start anew"):
        WarmStart(4).restore(starts.state(), "cpu")
