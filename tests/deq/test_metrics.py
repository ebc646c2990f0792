"""The list of metric names."""

from __future__ import annotations

import pytest

from deq import metrics

PROMISED = [
    "train/loss",
    "train/accuracy",
    "test/accuracy",
    "time/elapsed_s",
    "time/step_s",
    "solver/forward_evaluations",
    "solver/backward_evaluations",
    "solver/forward_sample_evaluations",
    "solver/backward_sample_evaluations",
    "solver/forward_residual",
    "solver/backward_residual",
    "solver/unconverged_fraction",
    "speedup/solver",
    "energy/gpu_joules",
    "energy/cpu_joules",
    "energy/tflop",
    "memory/peak_bytes",
    "time/train_s",
]


def test_every_promised_name_is_in_the_list() -> None:
    assert set(PROMISED) <= set(metrics.NAMES)


def test_a_name_outside_the_list_is_refused_by_name() -> None:
    metrics.check(metrics.NAMES)
    with pytest.raises(ValueError, match=r"train/acuracy"):
        metrics.check(["train/loss", "train/acuracy"])
