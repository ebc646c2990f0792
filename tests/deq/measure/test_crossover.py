"""Residual against evaluations and seconds: what is measured, where curves cross, and the picture."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from deq.measure.crossover import FORWARD, Crossover, measure_traces, metrics_of, named
from deq.models.tutorial import TutorialAnderson, TutorialForward
from deq.records import traces
from deq.records.errors import UserError
from deq.records.traces import PICTURE, Trace, crossing
from deq.report.figures.crossover import draw
from deq.report.figures.style import Figure
from deq.solvers import Anderson, Broyden, Forward
from tests.deq.training.test_training import trainer


def cell(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(0.9 * z + x)


def curve(seconds: list[float], residuals: list[float], solver: str = "", baseline: bool = False) -> Trace:
    counts = list(range(1, len(seconds) + 1))
    return Trace(solver, "", baseline, counts, seconds, residuals, residuals, residuals, residuals)


X = torch.linspace(-0.2, 0.3, 24).view(4, 6)


def test_residuals_are_those_of_a_traced_solve_and_times_go_up() -> None:
    solvers = {FORWARD: Forward(tol=0.5, max_iter=3), "Anderson m = 3": Anderson(window=3, tol=0.5)}
    forward, anderson = measure_traces(cell, X, solvers, max_iter=12, repeats=2)
    expected = Forward(tol=0.0, max_iter=12, patience=0).solve(lambda z: cell(z, X), torch.zeros_like(X), trace=True)
    assert expected.trace is not None
    torch.testing.assert_close(torch.tensor(forward.residual_mean), expected.trace.mean(dim=1))
    assert forward.evaluations == list(range(1, 13))  # past the tolerance and the cap that the solver has
    assert forward.baseline
    assert not anderson.baseline
    for trace in (forward, anderson):
        assert len(trace.seconds) == len(trace.residual_mean) == 12
        assert all(before < after for before, after in zip(trace.seconds, trace.seconds[1:], strict=False))
        assert all(
            low <= middle <= high
            for low, middle, high in zip(trace.residual_p10, trace.residual_median, trace.residual_p90, strict=True)
        )
    assert anderson.residual_mean[-1] < forward.residual_mean[-1]


def test_the_time_of_an_evaluation_includes_the_update_that_follows_it() -> None:
    """f takes no time to speak of; the update takes 10 ms."""

    class Slow(Forward):
        def stop_at_mean(self, residual: Tensor, outcome: Tensor) -> None:
            time.sleep(0.01)

    (trace,) = measure_traces(cell, X, {FORWARD: Slow(stop="mean")}, max_iter=5, repeats=1)
    assert trace.seconds[-1] >= 0.05
    assert 0.01 <= trace.seconds_an_iteration < 0.03


def test_what_is_read_from_the_file_is_what_was_written(tmp_path: Path) -> None:
    forward = curve([1, 2, 3], [1e-1, 1e-2, 1e-3], FORWARD, baseline=True)
    other = curve([1.5, 2, 2.5, 3], [1e-2, 1e-1, 1e-5, 0.0], "Anderson m = 3")
    about = {"batch": "4 test images", "stop": "mean", "tol": 1e-2, "device": "cpu"}
    traces.save(tmp_path, [forward, other], about)
    read = traces.read(tmp_path / traces.FILE)
    assert read == traces.Traces(**about, curves=[forward, other])  # type: ignore[arg-type]
    # A solve that broke down was written without what is not a number.
    traces.save(tmp_path, [curve([1, 2, 3], [1e-1, math.inf, math.nan], "broken")], {})
    read = traces.read(tmp_path / traces.FILE)
    assert read is not None
    assert (read.curves[0].residual_mean, read.tol) == ([1e-1], None)
    (tmp_path / traces.FILE).write_text("[]")
    assert traces.read(tmp_path / traces.FILE) is None


def test_curves_cross_where_the_other_goes_below_for_good() -> None:
    forward = curve([1, 2, 3, 4], [1e-1, 1e-2, 1e-3, 1e-4])
    # Below between 1.5 and 2, above again, and below for good from between 2.5 and 3.
    other = curve([1.5, 2, 2.5, 3, 4], [1e-2, 1e-1, 1e-1, 1e-5, 1e-6])
    cross = crossing(forward, other)
    assert cross is not None
    assert 2.5 < cross.x < 3
    log_forward = -math.log(10) * cross.x  # a straight line through the points above
    assert math.log(cross.residual) == pytest.approx(log_forward)
    by_count = crossing(forward, other, "evaluations")
    assert by_count is not None
    assert 3 < by_count.x < 4


@pytest.mark.parametrize(
    ("residuals", "why"),
    [([1e-1, 1e-1, 1e-1], "never ahead"), ([1e-2, 1e-3, 1e-5], "never behind"), ([math.nan] * 3, "never finite")],
)
def test_no_crossing_where_a_curve_stays_on_one_side(residuals: list[float], why: str) -> None:
    assert crossing(curve([1, 2, 3], [5e-2, 1e-2, 1e-3]), curve([1, 2, 3], residuals)) is None


def test_the_penalty_is_the_extra_time_of_an_iteration() -> None:
    forward = curve([1, 2, 3, 4], [1e-1, 5e-2, 3e-2, 1e-2], FORWARD, baseline=True)
    own = curve([2, 3.5, 5, 6.5], [1e-1, 1e-2, 1e-3, 1e-4], named(Anderson(window=4)))
    metrics = metrics_of([forward, own], Anderson(window=4))
    assert metrics["crossover/mixing_penalty_s"] == pytest.approx(0.5)
    assert metrics["crossover/mixing_penalty"] == pytest.approx(0.5)
    assert 1e-2 < metrics["crossover/residual"] < 1e-1
    assert metrics_of([forward, own], Forward()) == {}


def test_every_solver_has_a_name_that_tells_it_from_the_others() -> None:
    solvers = [
        Forward(), Forward(beta=0.5), TutorialForward(), TutorialAnderson(), Broyden(), Anderson(window=5),
        Anderson(window=5, adaptive=False), Anderson(window=5, regularization="absolute"), Anderson(window=5, beta=0.5),
    ]  # fmt: skip
    assert len({named(solver) for solver in solvers}) == len(solvers)


def test_the_runs_own_solver_is_followed_beside_the_windows_asked_for() -> None:
    options = Crossover(windows=[2, 5])
    assert list(options.solvers(Anderson(window=3))) == [FORWARD, "Anderson m = 2", "Anderson m = 3", "Anderson m = 5"]
    assert list(options.solvers(Broyden())) == [FORWARD, "Broyden"]
    assert list(options.solvers(Forward())) == [FORWARD]


def test_a_run_leaves_its_traces_and_its_picture(tmp_path: Path) -> None:
    run = trainer(tmp_path, epochs=1, crossover=Crossover(windows=[2], max_iter=6, repeats=1))
    summary = run.run()
    content = json.loads((tmp_path / traces.FILE).read_text())
    assert [trace["solver"] for trace in content["traces"]] == [FORWARD, "Anderson m = 2", "Anderson m = 3"]
    assert content["batch"] == "32 test images"
    assert content["tol"] == 1e-2
    assert "crossover/mixing_penalty" in summary
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("where", "error"), [("vl_convert.vegalite_to_png", ValueError), ("altair.concat", ImportError)]
)
def test_a_picture_that_cannot_be_drawn_costs_a_warning_and_not_the_run(
    where: str, error: type[Exception], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch(where, side_effect=error("out of order")):
        trainer(tmp_path, epochs=1, crossover=Crossover(max_iter=4, repeats=1)).run()
    out, err = capsys.readouterr()
    assert "warning: there is no crossover.png: " in out + err
    assert (tmp_path / traces.FILE).is_file()
    assert not (tmp_path / PICTURE).exists()


def words(figure: Figure) -> str:
    """All that is written into the panels."""
    specs = figure.specs()
    rows = [row for spec in specs for data in spec["datasets"].values() for row in data if "text" in row]
    return "\n".join(" ".join(row["text"]) for row in rows)


def test_the_picture_marks_crossover_penalty_and_gain_on_both_axes() -> None:
    forward = curve([1, 2, 3, 4, 5], [1e-1, 5e-2, 2e-2, 1e-2, 5e-3], FORWARD, baseline=True)
    own = curve([1.5, 3, 4.5, 6, 7.5], [2e-1, 1e-2, 1e-3, 1e-4, 1e-5], "Anderson m = 4")
    figure = draw([forward, own], tol=1e-2)
    said = words(figure)
    assert said.count("crossover: ahead below residual") == 2
    assert "mixing penalty: +5e+02 ms" in said
    assert "(+50 %)" in said
    assert "2.0× fewer evaluations" in said
    assert "1.3× sooner" in said
    for spec, title in zip(figure.specs(), ("evaluations of f", "time since the solve began, s"), strict=True):
        assert f'"title": "{title}"' in json.dumps(spec)
    assert [look.entry for look in figure.looks] == [f"{FORWARD} (baseline)", "Anderson m = 4", "tol 0.01"]
    assert figure.looks[0].dash != (1, 0)


def test_the_picture_says_so_where_curves_do_not_cross() -> None:
    forward = curve([1, 2, 3], [1e-1, 1e-2, 1e-3], FORWARD, baseline=True)
    assert "no crossover so far" in words(draw([forward, curve([2, 4, 6], [0.5, 0.5, 0.5], "slow")], tol=1e-2))
    assert "ahead" in words(draw([forward, curve([0.5, 1, 1.5], [1e-2, 1e-3, 1e-5], "fast")], tol=1e-2))
    assert words(draw([forward])) == ""


def test_forward_iteration_that_never_reaches_the_tolerance_is_said_to_take_more_than_it_was_followed() -> None:
    forward = curve([1, 2, 3, 4], [1e-1, 9e-2, 8e-2, 7e-2], FORWARD, baseline=True)
    own = curve([1.5, 3], [2e-1, 1e-3], "Anderson m = 4")
    assert "more than 2.0× fewer evaluations" in words(draw([forward, own], tol=1e-2))


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"max_iter": 1}, "crossover.max_iter must be an integer of at least 2, got 1"),
        ({"repeats": 0}, "crossover.repeats must be an integer of at least 1, got 0"),
        ({"windows": "5"}, r"crossover.windows must be a list, such as \[2,5,10\], got '5'"),
        ({"windows": [0]}, "crossover.windows must be integers of at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            Crossover(**options)  # type: ignore[arg-type]
