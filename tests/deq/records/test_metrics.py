"""The list of metric names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deq.records import metrics

ROOT = Path(__file__).parents[3]

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


GROUPS = "|".join(sorted({name.split("/")[0] for name in (*metrics.NAMES, *metrics.CHARTS)}))
PLACES = [
    "README.md",
    "docs/**/*.md",
    "train.py",
    "conf/**/*.yaml",
    "deq/**/*.py",
    "notebooks/*.ipynb",
    "benchmarks/*.py",
]


def named_in(text: str) -> set[str]:
    """What stands in quotes or backticks, or after objective=, in the form of a metric's name."""
    found = re.findall(rf"""["'`\[=, ]((?:{GROUPS})/[a-z_0-9]+)(?=["'`\],\s]|$)""", text, re.MULTILINE)
    return set(found)


def test_no_place_names_a_metric_that_is_not_in_the_list() -> None:
    assert named_in("`train/los` and objective=[test/accuracy,time/train_s]") == {
        "train/los",
        "test/accuracy",
        "time/train_s",
    }
    known = {*metrics.NAMES, *metrics.CHARTS}
    seen: set[str] = set()
    for place in PLACES:
        for file in ROOT.glob(place):
            names = named_in(file.read_text())
            assert names <= known, (file, names - known)
            seen |= names
    assert "energy/tflop" in seen
    assert len(seen) > 30


def test_a_chart_outside_the_list_is_refused_by_name() -> None:
    metrics.check_charts(metrics.CHARTS)
    with pytest.raises(ValueError, match="traces/residual"):
        metrics.check_charts(["traces/residual"])
