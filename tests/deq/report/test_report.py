"""The report: its numbers against ones worked out by hand, its page in a real browser, and folders in any state."""

from __future__ import annotations

import contextlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from omegaconf import OmegaConf

from deq.records import metrics
from deq.records.traces import Trace, crossing, mixing_penalty
from deq.report import runs, tables
from deq.report.__main__ import main
from deq.report.arms import arms_of
from deq.report.compare import compare
from deq.report.figures.looks import MOST_COLOURED, looks_of
from deq.report.figures.order import figures_of
from deq.report.figures.style import DARK, Figure, Missing, log_ticks
from deq.report.runs import read

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "deq" / "report"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

Point = tuple[float, float, float]
"""Seconds of training, test accuracy and TFLOP of training at one evaluation."""


def solver_node(kind: str, window: int, beta: float, **knobs: Any) -> dict[str, Any]:
    package = "deq.models.tutorial" if kind.startswith("Tutorial") else "deq.solvers"
    node: dict[str, Any] = {"_target_": f"{package}.{kind}", "tol": 0.01, "max_iter": 30, "stop": "max"}
    if "Anderson" in kind:
        node["window"] = window
    if kind != "Broyden":
        node["beta"] = beta
    return node | knobs


def config_of(kind: str, seed: int, window: int = 5, beta: float = 1.0, **top: Any) -> dict[str, Any]:
    node = solver_node(kind, window, beta, **top.pop("solver", {}))
    adjoint = node | top.pop("adjoint", {})
    return {
        "window": window,
        "beta": beta,
        "tol": 0.01,
        "max_iter": 30,
        "stop": "max",
        "seed": seed,
        "epochs": 3,
        "max_steps": None,
        "batch_size": 50,
        "device": "auto",
        "precision": "fp32",
        "resume": None,
        "log_every": 50,
        "logger": {"mode": f"any-{seed}"},
        "probe": {"repeats": 3 + seed},
        "solver": node,
        "adjoint": adjoint,
        "gradient": {"_target_": "deq.layer.Implicit", "solver": adjoint},
        "optim": {"lr": 0.003, "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.003}},
        "model": {"_target_": "deq.models.EquilibriumClassifier", "_partial_": True, "channels": 32, "inner": 32},
        "data": {"_target_": "deq.data.digits", "augment": "none", "train_size": None, "test_size": None},
        **top,
    }


def write_run(
    folder: Path,
    config: dict[str, Any],
    points: Sequence[Point],
    *,
    state: str | None = "finished",
    error: str | None = None,
    extra: dict[str, Sequence[float | None]] | None = None,
    environment: dict[str, Any] | None = None,
    traces: list[dict[str, Any]] | None = None,
    summary: bool = True,
    total_steps: int = 30,
) -> Path:
    """A run folder with an evaluation every ten steps. ``extra``: more metrics, a value for each evaluation."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    machine = {"system": "Linux", "cpu": "AMD EPYC", "cpu_threads": 2, "gpu": None, "python": "3.11", "torch": "2.14"}
    about = {"code_version": "abc123", "command": "train.py -m", "machine": machine, "energy_counters": []}
    (folder / "environment.json").write_text(json.dumps(about | (environment or {})))
    rows = []
    for number, (seconds, accuracy, tflop) in enumerate(points):
        row: dict[str, Any] = {
            "step": 10 * (number + 1),
            "epoch": number + 1,
            "train/accuracy": accuracy,
            "test/accuracy": accuracy,
            "time/train_s": seconds,
            "time/elapsed_s": 2 * seconds,
            "solver/forward_evaluations": 10.0 + number,
            "solver/backward_evaluations": 8.0 + number,
            "solver/forward_unconverged_fraction": 0.1,
            "solver/backward_unconverged_fraction": 0.2,
            "energy/train_tflop": tflop,
            "energy/test_tflop": tflop / 10,
        }
        rows.append(row | {name: values[number] for name, values in (extra or {}).items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary and rows:
        (folder / "summary.json").write_text(json.dumps({k: v for k, v in rows[-1].items() if "/" in k}))
    if state is not None:
        status = {
            "state": state,
            "began": "2026-01-01T00:00:00+00:00",
            "ended": None,
            "error": error,
            "step": 10 * len(points),
            "total_steps": total_steps,
            "overrides": [
                f"solver={config['solver']['_target_'].rpartition('.')[2].lower()}",
                f"seed={config['seed']}",
            ],
        }
        (folder / "status.json").write_text(json.dumps(status))
    if traces is not None:
        content = {"batch": "64 test images", "stop": "mean", "tol": 0.01, "device": "CPU", "traces": traces}
        (folder / "traces.json").write_text(json.dumps(content))
    return folder


def trace(solver: str, baseline: bool, seconds: Sequence[float], residual: Sequence[float]) -> dict[str, Any]:
    return {
        "solver": solver,
        "kind": "forward" if baseline else "anderson",
        "baseline": baseline,
        "evaluations": list(range(1, len(seconds) + 1)),
        "seconds": list(seconds),
        "residual_mean": list(residual),
        "residual_p10": [r / 2 for r in residual],
        "residual_median": list(residual),
        "residual_p90": [2 * r for r in residual],
    }


TRACES = [
    trace("forward iteration", True, [0.010, 0.020, 0.030, 0.040, 0.050, 0.060], [1, 0.5, 0.25, 0.125, 0.0625, 0.03]),
    trace("Anderson m = 5", False, [0.012, 0.026, 0.040, 0.054], [1, 0.6, 0.1, 0.01]),
]

# The baseline's best is 0.80 after 20 s for seed 0, and 0.90 after 30 s for seed 1.
FORWARD: dict[int, list[Point]] = {
    0: [(10, 0.50, 2), (20, 0.80, 4), (30, 0.70, 6)],
    1: [(10, 0.60, 2), (20, 0.70, 4), (30, 0.90, 6)],
}
# Reached after 8 s (0.80 itself counts) with 1 TFLOP, and after 10 s with 3.
ANDERSON: dict[int, list[Point]] = {
    0: [(4, 0.60, 0.5), (8, 0.80, 1), (12, 0.75, 1.5)],
    1: [(5, 0.85, 2), (10, 0.92, 3), (15, 0.91, 4)],
}


def two_arms(folder: Path, **keywords: Any) -> Path:
    for seed in (0, 1):
        write_run(folder / f"{seed}_solver-forward", config_of("Forward", seed), FORWARD[seed], **keywords)
        write_run(folder / f"{2 + seed}_solver-anderson", config_of("Anderson", seed), ANDERSON[seed], **keywords)
    return folder


def report_of(folder: Path, *arguments: str, draw: bool = False) -> dict[str, Any]:
    """What report.json holds. Pictures and the script, which take most of the time, are empty unless ``draw``."""
    with contextlib.ExitStack() as stack:
        if not draw:
            stack.enter_context(mock.patch.object(Figure, "save", lambda figure, path: path.touch()))
            making = contextlib.nullcontext(lambda: "")
            stack.enter_context(mock.patch("deq.report.__main__.in_the_making", return_value=making))
        assert main([str(folder), *arguments]) == 0
    content: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return content


def arm(report: dict[str, Any], label: str) -> dict[str, Any]:
    (found,) = [one for one in report["arms"] if one["label"] == label]
    assert isinstance(found, dict)
    return found


def figure_of(folder: Path, key: str) -> Figure:
    (figure,) = [one for one in figures_of(compare(read(folder))) if one.key == key]
    assert isinstance(figure, Figure), figure
    return figure


def drawn(figure: Figure, number: int = 0, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows that a panel draws: all, or those of one kind of mark."""
    spec = figure.specs()[number]
    layers = [layer for layer in spec["layer"] if kind in (None, layer["mark"]["type"])]
    return [row for name in dict.fromkeys(one["data"]["name"] for one in layers) for row in spec["datasets"][name]]


def said(figure: Figure, number: int = 0) -> list[str]:
    """The words within a panel."""
    return list(dict.fromkeys("\n".join(row["text"]) for row in drawn(figure, number, "text")))


def words(folder: Path) -> str:
    """The page's text, without scripts, styles and tags."""
    page = (folder / "report" / "report.html").read_text()
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


def test_ratios_are_paired_by_seed_and_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    report = report_of(two_arms(tmp_path))
    against = arm(report, "Anderson")["against"]["Forward"]
    assert against["baseline"] == "forward iteration"
    assert [pair["target"] for pair in against["pairs"]] == [0.80, 0.90]
    assert [pair["seconds"] for pair in against["pairs"]] == [8, 10]
    assert [pair["baseline_seconds"] for pair in against["pairs"]] == [20, 30]
    assert against["speedup"] == {"median": 2.75, "low": 2.5, "high": 3.0, "n": 2}
    assert against["time_saved"]["median"] == pytest.approx((0.6 + 2 / 3) / 2)
    assert [pair["compute_saved"] for pair in against["pairs"]] == [0.75, 0.5]  # 1 − 1/4 and 1 − 3/6
    assert against["energy_saved"] is None
    assert against["never"] == 0
    own = arm(report, "Anderson")["numbers"]
    assert own["test_accuracy_best"] == {"median": pytest.approx(0.86), "low": 0.80, "high": 0.92, "n": 2}
    assert own["test_accuracy_last"]["low"] == 0.75
    assert own["train_s"]["median"] == 13.5
    assert "2.75x sooner (2.50x to 3.00x over 2 seeds)" in report["headline"]
    assert "“forward iteration”" in report["headline"]


def test_seeds_that_never_reach_the_target_are_counted(tmp_path: Path) -> None:
    two_arms(tmp_path)
    for seed, accuracy in ((0, 0.81), (1, 0.5)):
        config = config_of("Anderson", seed, window=2)
        write_run(tmp_path / f"{4 + seed}_window-2", config, [(4, 0.1, 1), (10, accuracy, 2)])
    against = arm(report_of(tmp_path), "Anderson · window 2")["against"]["Forward"]
    assert against["never"] == 1
    assert against["speedup"] == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 1}
    assert "1 of 2" in words(tmp_path)
    assert "Anderson · window 5, fastest of 2 such arms, reaches" in words(tmp_path)


def test_a_target_of_the_users_takes_the_place_of_the_baselines_best(tmp_path: Path) -> None:
    against = arm(report_of(two_arms(tmp_path), "--target", "0.7"), "Anderson")["against"]["Forward"]
    assert [pair["baseline_seconds"] for pair in against["pairs"]] == [20, 20]
    assert [pair["seconds"] for pair in against["pairs"]] == [8, 5]
    # A target that the baseline never reaches gives no ratio at all.
    report = report_of(tmp_path, "--target", "0.91")
    against = arm(report, "Anderson")["against"]["Forward"]
    assert against["speedup"] is None
    assert against["never"] == 1
    assert "never reaches the target of 91.00 %" in report["headline"]


def test_a_target_outside_0_to_1_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(two_arms(tmp_path)), "--target", "95"]) == 2
    assert "--target must be an accuracy above 0 and at most 1, got 95; 95 % is 0.95" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: SWEEP_DIR"),
        (["a", "b"], "unrecognized arguments: b"),
        (["a", "--target", "high"], "argument --target: invalid float value: 'high'"),
        (
            [""],
            "argument SWEEP_DIR: must be a folder, got ''",
        ),  # not the working folder, for a variable that is not set
        (["a", "--out", ""], "argument --out: must be a folder, got ''"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}; `python -m deq.report --help` lists the options\n"


def test_knobs_that_a_solver_does_not_have_make_no_arms(tmp_path: Path) -> None:
    for number, window in enumerate((2, 5)):
        write_run(tmp_path / f"{number}_f", config_of("Forward", 0, window=window), FORWARD[0])
        write_run(tmp_path / f"{number + 2}_a", config_of("Anderson", 0, window=window), ANDERSON[0])
    report = report_of(tmp_path)
    assert [one["label"] for one in report["arms"]] == [
        "forward iteration",
        "Anderson · window 2",
        "Anderson · window 5",
    ]
    assert arm(report, "forward iteration")["runs"] == 2
    # Two runs of one seed are one observation.
    assert len(arm(report, "Anderson · window 5")["against"]["Forward"]["pairs"]) == 1


def test_every_knob_that_differs_is_in_the_label(tmp_path: Path) -> None:
    configs = [
        config_of("Anderson", 0, beta=0.5),
        config_of("Anderson", 0, optim={"lr": 0.1}),
        config_of("Anderson", 0, adjoint={"tol": 0.001}),
        config_of("Anderson", 0, solver={"adaptive": False}),
        config_of("Anderson", 0, gradient={"_target_": "deq.layer.Phantom", "steps": 5}),
    ]
    for number, config in enumerate(configs):
        write_run(tmp_path / f"{number}_a", config, ANDERSON[0])
    labels = [one.label for one in arms_of(read(tmp_path).runs)]
    assert len(set(labels)) == 5
    for text in ("β 0.5", "optim.lr 0.1", "adjoint tol 0.001", "gradient Phantom"):
        assert sum(text in label for label in labels) == 1, (text, labels)


def test_a_cpu_and_a_gpu_are_never_one_arm(tmp_path: Path) -> None:
    machine = {"cpu": "AMD EPYC", "cpu_threads": 2, "gpu": "NVIDIA H100"}
    write_run(tmp_path / "0_a", config_of("Anderson", 0), ANDERSON[0])
    write_run(tmp_path / "1_a", config_of("Anderson", 1), ANDERSON[1], environment={"machine": machine})
    assert [one.label for one in arms_of(read(tmp_path).runs)] == ["Anderson · CPU", "Anderson · NVIDIA H100"]


def test_images_of_two_places_are_two_data_sets_but_cifar10_is_one(tmp_path: Path) -> None:
    for number, root in enumerate(("/data/first/images", "/data/second/images")):
        for name in ("image_folder", "cifar10"):
            data = {"_target_": f"deq.data.{name}", "augment": "none", "root": root, "train_size": None}
            write_run(tmp_path / name / f"{number}_a", config_of("Anderson", number, data=data), ANDERSON[0])
    assert len(arms_of(read(tmp_path / "image_folder").runs)) == 2
    assert len(arms_of(read(tmp_path / "cifar10").runs)) == 1


def test_the_main_baseline_is_the_best_of_the_forward_arms_and_is_named(tmp_path: Path) -> None:
    two_arms(tmp_path)
    for seed in (0, 1):
        damped = [(t, accuracy + 0.01, c) for t, accuracy, c in FORWARD[seed]]
        write_run(tmp_path / f"{4 + seed}_f", config_of("Forward", seed, beta=0.5), damped)
        write_run(tmp_path / f"{6 + seed}_t", config_of("TutorialForward", seed), FORWARD[seed])
    report = report_of(tmp_path)
    assert report["baselines"] == [
        "forward iteration · β 0.5",
        "forward iteration, as the tutorial writes it · β 1.0",
    ]
    assert any("of 2 arms with forward iteration, best in median test" in one for one in report["choice_of_baseline"])
    ours = arm(report, "Anderson · β 1.0")["against"]
    assert ours["Forward"]["baseline"] == "forward iteration · β 0.5"
    assert ours["TutorialForward"]["speedup"]["median"] == 2.75
    page = words(tmp_path)
    for baseline in report["baselines"]:
        assert f"{baseline} (baseline)" in page


def test_an_arm_is_held_against_the_forward_arm_that_is_equal_in_all_else(tmp_path: Path) -> None:
    for number, tol in enumerate((0.1, 0.01)):
        for kind, points in (("Forward", FORWARD[0]), ("Anderson", ANDERSON[0])):
            config = config_of(kind, 0, solver={"tol": tol}) | {"tol": tol}
            write_run(tmp_path / f"{number}_{kind}", config, points)
    report = report_of(tmp_path)
    for tol in (0.1, 0.01):
        against = arm(report, f"Anderson · tol {tol}")["against"]["Forward"]
        assert (against["baseline"], against["differs"]) == (f"forward iteration · tol {tol}", [])
    shutil.rmtree(tmp_path / "0_Forward")
    report = report_of(tmp_path)
    against = arm(report, "Anderson · tol 0.1")["against"]["Forward"]
    assert against["differs"] == ["solver.tol"]
    assert any("tol 0.1 against tol 0.01" in one for one in report["choice_of_baseline"])


def test_without_a_forward_arm_there_is_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "0_a", config_of("Anderson", 0), ANDERSON[0])
    report = report_of(tmp_path)
    assert report["arms"][0]["against"] == {}
    assert "No arm here is forward iteration" in report["choice_of_baseline"][0]
    assert not re.search(r"\d+\.\d+x", words(tmp_path) + capsys.readouterr().out)


def test_another_solver_than_anderson_leads_where_no_anderson_ran(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}_forward", config_of("Forward", seed), FORWARD[seed])
        write_run(tmp_path / f"{2 + seed}_broyden", config_of("Broyden", seed), ANDERSON[seed])
    assert "Broyden" in report_of(tmp_path)["headline"]


def test_measured_joules_give_the_energy_saved_and_the_figure(tmp_path: Path) -> None:
    for kind, points, joules in (("Forward", FORWARD, [100, 200, 300]), ("Anderson", ANDERSON, [25, 50, 75])):
        extra = {"energy/train_cpu_joules": joules, "energy/test_cpu_joules": [1, 2, 3]}
        write_run(tmp_path / f"0_{kind}", config_of(kind, 0), points[0], extra=extra)
    report = report_of(tmp_path)
    against = arm(report, "Anderson")["against"]["Forward"]
    assert against["energy_saved"]["median"] == 0.75  # 1 − 50/200
    assert against["energy_counter"] == "CPU"
    bars = {(row["name"], row["entry"]): row["x"] for row in drawn(figure_of(tmp_path, "energy"), kind="bar")}
    assert bars == {
        ("forward iteration (baseline)", "training, CPU"): 300,
        ("forward iteration (baseline)", "evaluation, CPU"): 3,
        ("Anderson", "training, CPU"): 75,
        ("Anderson", "evaluation, CPU"): 3,
    }


def test_without_a_counter_nothing_is_called_joules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_of(two_arms(tmp_path, traces=TRACES))
    page = (tmp_path / "report" / "report.html").read_text()
    plots = re.findall(r'<script id="plots".*?</script>', page, re.DOTALL)[0]
    assert "joule" not in (words(tmp_path) + plots + capsys.readouterr().out).lower()
    assert "o energy counter on this machine" in words(tmp_path)
    assert "TFLOP" in plots


def test_a_counter_that_was_not_read_yet_is_not_said_to_be_missing(tmp_path: Path) -> None:
    write_run(
        tmp_path / "0_a", config_of("Anderson", 0), [], state="running", environment={"energy_counters": ["NVML"]}
    )
    report_of(tmp_path)
    assert "no reading of NVML yet" in words(tmp_path)
    assert "no energy counter" not in words(tmp_path).lower()


def test_crossover_and_mixing_penalty_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    two_arms(tmp_path, traces=TRACES)
    traces = read(tmp_path).runs[0].traces
    assert traces is not None
    forward, curve = traces.curves
    # After three evaluations 0.1 is below 0.25 and stays below; after two, 0.6 is above 0.5. Straight in the logarithm
    # between: log 1.2 of log 1.2 + log 2.5.
    assert crossing(forward, curve, "evaluations") == pytest.approx((2.16596, 0.44567), rel=1e-4)
    # At 40 ms 0.1 is below 0.125; at 30 ms it is at 0.6 / 6^(4/14) = 0.3596, above 0.25.
    assert crossing(forward, curve, "seconds") == pytest.approx((0.0361965, 0.162707), rel=1e-4)
    assert mixing_penalty(forward, curve) == pytest.approx((0.004, 0.4))  # 14 ms against 10
    figure = figure_of(tmp_path, "residual")
    bracket = [row for row in drawn(figure, 1, "rule") if "x2" in row and "y2" not in row]
    assert (40, 54) in [(row["x"], row["x2"]) for row in bracket]  # ms after four evaluations, as far as both go
    assert any("+4 ms\nan iteration (+40 %)" in text for text in said(figure, 1))
    assert "crossover: ahead below residual 0.16,\nafter 36.2 ms" in said(figure, 1)
    assert "crossover: ahead below residual 0.45,\nafter 2.17 evaluations" in said(figure, 0)


def test_two_baselines_in_one_trace_are_both_named_and_neither_is_compared(tmp_path: Path) -> None:
    second = trace("forward iteration, as the tutorial writes it", True, [0.02, 0.04], [1, 0.5])
    write_run(tmp_path / "0_a", config_of("Anderson", 0), ANDERSON[0], traces=[*TRACES, second])
    comparison = compare(read(tmp_path))
    assert [one.solver for one in comparison.trades] == ["Anderson m = 5"]
    figure = figure_of(tmp_path, "residual")
    assert len({look.entry for look in figure.looks if look.entry.endswith("(baseline)")}) == 2
    assert all(look.dash != (1, 0) for look in figure.looks if look.entry.endswith("(baseline)"))
    assert len({row["name"] for row in drawn(figure, kind="line")}) == 3


def test_a_solver_that_does_not_stay_below_has_no_crossover() -> None:
    forward = Trace(**trace("f", True, [1, 2, 3], [1, 0.5, 0.1]))
    curve = Trace(**trace("a", False, [1, 2, 3], [1, 0.4, 0.2]))
    assert crossing(forward, curve, "evaluations") is None
    assert crossing(forward, curve, "seconds") is None


def test_runs_that_did_not_finish_are_named_and_count_in_no_number(tmp_path: Path) -> None:
    two_arms(tmp_path)
    failed = write_run(
        tmp_path / "4_a", config_of("Anderson", 2), [(1, 0.99, 1)], state="failed", error="the loss is NaN"
    )
    going = write_run(tmp_path / "5_a", config_of("Anderson", 3), [(1, 0.99, 1)], state="running", summary=False)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "test/accu')  # just being written
    stopped = write_run(tmp_path / "6_a", config_of("Anderson", 4), [(1, 0.99, 1)], state="interrupted")
    (stopped / "checkpoint.pt").touch()
    killed = write_run(tmp_path / "7_a", config_of("Anderson", 5), [(1, 0.99, 1)], state="running", summary=False)
    for file in killed.iterdir():
        os.utime(file, (time.time() - 7200,) * 2)
    (tmp_path / "8_a").mkdir()
    (tmp_path / "8_a" / "config.yaml").write_text("solver: {_target_: [")
    (tmp_path / "8_a" / "metrics.jsonl").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.yaml").write_text("no: run")
    jobs = [{"number": number, "overrides": [f"seed={number}"]} for number in range(10)]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    report = report_of(tmp_path)
    assert arm(report, "Anderson")["numbers"]["test_accuracy_best"]["high"] == 0.92
    assert (arm(report, "Anderson")["runs"], arm(report, "Anderson")["counted_runs"]) == (6, 2)
    told = {gap["what"].split(" ")[0].rstrip(":"): gap for gap in report["missing"]}
    assert told.keys() == {"4_a", "5_a", "6_a", "7_a", "8_a", "job"}
    assert told["4_a"]["what"] == f"{failed.name}: failed at step 10 of 30: the loss is NaN"
    assert told["5_a"]["what"] == "5_a: running, step 10 of 30"
    assert told["6_a"]["command"] == f"python train.py resume={tmp_path}"  # that of its sweep
    assert "wrote nothing for 120 minutes: probably killed" in told["7_a"]["what"]
    assert "config.yaml cannot be read" in told["8_a"]["what"]
    assert told["job"]["what"] == "job planned, not begun yet: 9 (seed=9)"  # the sweep goes on
    assert told["job"]["command"] is None
    for gap in report["missing"]:
        assert gap["what"] in words(tmp_path)


def test_jobs_that_a_stopped_sweep_did_not_begin_have_the_command_that_goes_on_with_it(tmp_path: Path) -> None:
    two_arms(tmp_path)
    jobs = [{"number": number, "overrides": ["epochs=3", f"seed={number}"]} for number in range(6)]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    (gap,) = report_of(tmp_path)["missing"]
    assert gap["what"] == "2 jobs planned, not begun: 4 (seed=4), 5 (seed=5)"
    assert gap["command"] == f"python train.py resume={tmp_path}"


def test_an_arm_without_a_finished_run_is_shown_as_unfinished(tmp_path: Path) -> None:
    write_run(tmp_path / "0_f", config_of("Forward", 0), FORWARD[0])
    write_run(tmp_path / "1_a", config_of("Anderson", 0), ANDERSON[0][:2], state="running", summary=False)
    report = report_of(tmp_path)
    assert arm(report, "Anderson")["unfinished"]
    assert "Anderson (unfinished)" in words(tmp_path)
    assert "so far" in report["headline"]


def test_a_run_that_was_resumed_elsewhere_is_not_missing(tmp_path: Path) -> None:
    first = write_run(tmp_path / "0_a", config_of("Anderson", 0), ANDERSON[0][:1], state="interrupted")
    write_run(tmp_path / "1_a", config_of("Anderson", 0, resume=str(first)), ANDERSON[0])
    report = report_of(tmp_path)
    assert report["missing"] == []
    assert (report["arms"][0]["runs"], report["arms"][0]["counted_runs"]) == (2, 1)


def test_folders_of_earlier_versions_are_told_by_their_files(tmp_path: Path) -> None:
    write_run(tmp_path / "0_done", config_of("Anderson", 0), ANDERSON[0], state=None)
    write_run(tmp_path / "1_killed", config_of("Anderson", 1), ANDERSON[1][:1], state=None, summary=False)
    write_run(tmp_path / "2_stopped", config_of("Anderson", 2), ANDERSON[1][:2], state=None)
    assert [run.state for run in read(tmp_path).runs] == ["finished", "unfinished", "unfinished"]


def test_rows_within_an_epoch_are_weighted_by_their_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0_a", config_of("Anderson", 0), [], state="running")
    rows: list[dict[str, Any]] = [
        {"step": 50, "epoch": 1, "solver/forward_evaluations": 10.0, "solver/backward_evaluations": 4.0},
        {"step": 60, "epoch": 1, "solver/forward_evaluations": 16.0, "solver/backward_evaluations": None},
    ]
    rows[1] |= {"test/accuracy": 0.5, "time/train_s": 3.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (evaluation,) = read(tmp_path).runs[0].evaluations
    assert evaluation.get("solver/forward_evaluations") == 11.0  # (50·10 + 10·16) / 60
    assert evaluation.get("solver/backward_evaluations") is None  # one part was not finite
    with pytest.raises(ValueError, match="solver/evaluations"):
        evaluation.get("solver/evaluations")


def test_rows_that_are_not_finite_or_not_rows_do_no_harm(tmp_path: Path) -> None:
    extra = {"solver/forward_evaluations": [None, 12.0, 13.0], "energy/train_tflop": [None, None, None]}
    folder = write_run(tmp_path / "0_a", config_of("Anderson", 0), ANDERSON[0], extra=extra, state=None)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(f"[1, 2]\n\x00{text}")
    (folder / "environment.json").write_text("{")
    (folder / "traces.json").write_text("{")
    report = report_of(tmp_path)
    assert report["arms"][0]["numbers"]["test_accuracy_best"]["median"] == 0.80
    assert sum("cannot be read" in one for one in report["warnings"]) == 2


@pytest.mark.parametrize("content", [[], ["config.yaml"]])
def test_a_folder_without_runs_ends_in_one_sentence(
    tmp_path: Path, content: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in content:
        (tmp_path / name).touch()
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {tmp_path} holds no run that can be read")
    assert not (tmp_path / "report").exists()
    assert main([str(tmp_path / "nowhere")]) == 2


def test_a_report_can_be_made_of_one_run_and_of_runs_at_any_depth(tmp_path: Path) -> None:
    sweep = two_arms(tmp_path / "2026-01-31" / "12-00-00_sweep")
    wandb = sweep / "2_solver-anderson" / "wandb" / "offline-run-1" / "files"
    wandb.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(sweep / "2_solver-anderson" / name, wandb)
    assert len(report_of(tmp_path)["runs"]) == 4
    assert len(report_of(tmp_path)["runs"]) == 4  # the report's own folder is none of them
    assert len(report_of(sweep / "2_solver-anderson")["runs"]) == 1


def test_different_versions_and_machines_are_warned_of(tmp_path: Path) -> None:
    two_arms(tmp_path)
    other = {"code_version": "def456-dirty", "machine": {"cpu": "Arm", "cpu_threads": 8, "gpu": None, "torch": "2.11"}}
    write_run(tmp_path / "4_a", config_of("Anderson", 2), ANDERSON[0], environment=other)
    told = "\n".join(report_of(tmp_path)["warnings"])
    for text in ("abc123, def456-dirty", "Arm, 8 threads", "2.11, 2.14", "no baseline run with seed 2"):
        assert text in told
    assert "changes that are in no commit" in told


def test_window_against_beta_is_a_map_of_seconds_to_the_target(tmp_path: Path) -> None:
    write_run(tmp_path / "0_f", config_of("Forward", 0), FORWARD[0])
    number = 1
    for window in (2, 10):
        for beta in (0.5, 1.0):
            if (window, beta) != (10, 0.5):
                points = [(window + beta, 0.9 if window == 2 or beta == 1 else 0.1, 1.0)]
                write_run(tmp_path / f"{number}_a", config_of("Anderson", 0, window=window, beta=beta), points)
                number += 1
    write_run(tmp_path / "9_a", config_of("Anderson", 0, window=10, beta=0.5), [(9, 0.1, 1)])
    cells = {(row["window"], row["beta"]): row for row in drawn(figure_of(tmp_path, "window-beta"), kind="text")}
    assert {place: cell["value"] for place, cell in cells.items()} == {
        (2, 0.5): 2.5, (10, 0.5): None, (2, 1.0): 3.0, (10, 1.0): 11.0
    }  # fmt: skip
    assert cells[10, 0.5]["text"] == ["1 of 1 never"]
    # Where the target is never reached, there still are evaluations: those that write_run gives a first row.
    cells = {(row["window"], row["beta"]): row for row in drawn(figure_of(tmp_path, "window-beta-evaluations"))}
    assert {cell["value"] for cell in cells.values()} == {18.0}
    assert cells[10, 0.5]["text"] == ["10.0 + 8.0"]
    shutil.rmtree(tmp_path / "9_a")
    cells = {(row["window"], row["beta"]): row for row in drawn(figure_of(tmp_path, "window-beta"), kind="text")}
    assert (cells[10, 0.5]["value"], cells[10, 0.5]["text"]) == (None, ["not run"])


def test_the_papers_table_is_for_cifar10_alone_and_states_the_conditions(tmp_path: Path) -> None:
    data = {"_target_": "deq.data.cifar10", "augment": "none", "root": "/any", "train_size": 5000, "test_size": None}
    for kind, points in (("Forward", FORWARD[0]), ("Anderson", ANDERSON[0])):
        write_run(tmp_path / "c" / f"0_{kind}", config_of(kind, 0, data=data), points)
        write_run(tmp_path / "d" / f"0_{kind}", config_of(kind, 0), points)
        folder = data | {"_target_": "deq.data.image_folder", "root": "/data/CIFAR-10-images", "image_size": None}
        write_run(tmp_path / "i" / f"0_{kind}", config_of(kind, 0, data=folder), points)
    paper = report_of(tmp_path / "c")["paper"]
    assert [row[1:] for row in paper] == [
        ["2x to 8.6x", "2.50x"],
        ["50 % to 88 %", "75 %"],
        ["64.7 % → 96.3 %", "70.00 % → 75.00 %"],
        ["64.2 % → 79.1 %", "80.00 % → 80.00 %"],
        ["12,000 s → 1,400 s", "30.0 s → 12.0 s"],
    ]
    assert "AMD EPYC; 5,000 training images; 30 steps; 3 epochs" in words(tmp_path / "c")
    assert report_of(tmp_path / "d")["paper"] is None
    assert report_of(tmp_path / "i")["paper"] is not None


def test_of_many_arms_the_fastest_have_colours_and_none_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "0_f", config_of("Forward", 0), FORWARD[0])
    for number in range(36):
        points = [(1.0 + number, 0.9, 1.0)]
        write_run(tmp_path / f"{1 + number}_a", config_of("Anderson", 0, window=1 + number), points)
    comparison = compare(read(tmp_path))
    looks = looks_of(comparison)
    others = [looks[id(one.arm)] for one in comparison.arms if not one.arm.is_baseline]
    assert sum(not look.faint for look in others) == MOST_COLOURED - 1
    assert not any(look.faint for look in others[: MOST_COLOURED - 1])  # sorted by window, and so by speed
    assert len({look.colour for look in others if not look.faint}) == MOST_COLOURED - 1
    accuracy = figure_of(tmp_path, "accuracy")
    assert len({row["name"] for row in drawn(accuracy, kind="line")}) == 37
    assert [look.entry for look in accuracy.looks if look.faint] == ["30 other arms"]
    assert len({row["place"] for row in drawn(figure_of(tmp_path, "energy"), kind="bar")}) == 37
    for table in tables.text_of(comparison).main:
        assert len(table.rows) == 37


def test_a_figure_without_data_is_a_sentence_and_a_command(tmp_path: Path) -> None:
    two_arms(tmp_path, traces=TRACES)
    report_of(tmp_path)
    assert (tmp_path / "report" / "residual.png").exists()
    for file in tmp_path.glob("*/traces.json"):
        file.unlink()
    report_of(tmp_path)
    assert not (tmp_path / "report" / "residual.png").exists()  # nothing of an earlier report stays
    missing = {one.key: one for one in figures_of(compare(read(tmp_path))) if isinstance(one, Missing)}
    assert missing.keys() == {"residual", "window-beta"}
    for one in missing.values():
        assert one.command is not None
        assert one.sentence in words(tmp_path)
        assert one.command in words(tmp_path)


def test_names_of_folders_and_errors_are_text_and_not_html(tmp_path: Path) -> None:
    write_run(tmp_path / "0_f", config_of("Forward", 0), FORWARD[0], state="failed", error="<script>alert(1)</script>")
    report_of(tmp_path)
    assert "<script>alert(1)" not in (tmp_path / "report" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("width", [0, 1, 20, 40, 80, 200])
def test_the_terminal_shows_the_main_table_in_few_columns_and_every_number_whole(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    report_of(two_arms(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {tmp_path / 'report' / 'report.html'}"
    assert max(len(line) for line in lines[:-1]) <= max(80, min(width, 100))  # a narrower terminal breaks them itself
    (row,) = [line for line in lines if line.startswith("Anderson  ")]
    assert row.split() == ["Anderson", "2", "86.00", "13.5", "12.0/10.0", "9.00", "2.75x", "62", "%"]


def test_only_names_of_the_one_list_are_read() -> None:
    groups = "|".join(sorted({name.partition("/")[0] for name in metrics.NAMES}))
    found = set()
    for file in PACKAGE.rglob("*.py"):
        found |= set(re.findall(rf'"((?:{groups})/[^"]+)"', file.read_text()))
        # A name put together from parts could not be checked so.
        assert not re.search(rf'f"(?:{groups})/', file.read_text()), file
    assert {"test/accuracy", "time/train_s", "energy/train_tflop"} <= found
    assert found <= metrics.NAMES.keys()


def test_the_report_is_quick_since_it_imports_no_torch() -> None:
    code = "import sys, deq.report.__main__ as m; sys.exit('torch' in sys.modules or not callable(m.main))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class Elements(html.parser.HTMLParser):
    """What a browser made of each plot: id of its element → curves, bars, points and cells in it."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, int] = {}
        self.fetched: list[str] = []
        self._plot = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "div" and "plot" in values.get("class", "").split():
            self._plot = values["id"]
            self.marks[self._plot] = 0
        if values.get("role") == "graphics-symbol" and self._plot:
            self.marks[self._plot] += 1
        for name in ("src", "href", "xlink:href"):
            if re.match(r"(https?:)?//", values.get(name, "")):
                self.fetched.append(values[name])


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's elements once it has settled, and what it wrote on the console."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", *flags]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=90)
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


def elements_of(content: str) -> Elements:
    found = Elements()
    found.feed(content[content.index("<body") :])
    return found


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome to open the page")
def test_the_page_opens_in_a_browser_draws_every_figure_and_fetches_nothing(tmp_path: Path) -> None:
    sweep = two_arms(tmp_path / "sweep", traces=TRACES)
    for seed in (0, 1):
        for number, (window, beta) in enumerate(((5, 0.5), (2, 0.5), (2, 1.0))):
            config = config_of("Anderson", seed, window=window, beta=beta)
            write_run(sweep / f"{10 * (seed + 1) + number}_a", config, ANDERSON[seed])
    report_of(sweep, draw=True)
    page = (sweep / "report" / "report.html").read_text()
    assert len(page) < 1_500_000
    assert page.count("vegaEmbed = vegaEmbed") <= 1  # one script for all figures
    figures = figures_of(compare(read(sweep)))
    assert all(isinstance(one, Figure) for one in figures)
    content, console = browse(sweep / "report" / "report.html", tmp_path / "profile")
    assert console == []
    found = elements_of(content)
    panels = {f"{one.key}-panel-{n}" for one in figures if isinstance(one, Figure) for n in range(len(one.panels))}
    assert found.marks.keys() == panels
    assert min(found.marks.values()) > 0, found.marks
    assert found.fetched == []
    outside = re.sub(r"<script\b.*?</script>", "<script></script>", content, flags=re.DOTALL)
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="(?!data:)', outside)
    # A click on the legend takes the baseline's curve, band and points away.
    clicked = sweep / "report" / "clicked.html"
    click = '<script>setTimeout(() => document.querySelector("#accuracy .legend button").click(), 500)</script>'
    before, _, after = page.rpartition("</body>")
    clicked.write_text(f"{before}{click}</body>{after}")
    content, console = browse(clicked, tmp_path / "profile")
    assert console == []
    without = elements_of(content)
    assert 0 < without.marks["accuracy-panel-0"] < found.marks["accuracy-panel-0"]
    assert without.marks["evaluations-panel-0"] == found.marks["evaluations-panel-0"]
    # On a dark screen nothing of a figure is black.
    content, console = browse(
        sweep / "report" / "report.html", tmp_path / "dark", "--blink-settings=preferredColorScheme=0"
    )
    assert console == []
    plots = content[content.index('<figure class="card figure"') : content.index('<script id="plots"')]
    plots = re.sub(r'<div class="legend">.*?</div>', "", plots)  # the page's own styles colour these lines
    assert DARK["#222222"] in plots
    assert not any(f'"{light}"' in plots for light in DARK)
    # A page that fails is seen to fail.
    broken = tmp_path / "broken.html"
    broken.write_text('<body><div class="plot" id="a"></div><script>vegaEmbed("#a", {})</script></body>')
    content, console = browse(broken, tmp_path / "profile")
    assert (elements_of(content).marks["a"], len(console)) == (0, 1)


AWKWARD = ["<b>\"Bär\" & 'x'</b></script><script>alert(1)</script>", "日本 語 \\ back", "a" * 90, "$[0].b {c} `t` ${d}"]
"""Names that mean something to HTML, JavaScript, Vega or a file system."""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome to open the page")
def test_names_of_any_letters_are_drawn_as_they_are(tmp_path: Path) -> None:
    for number, name in enumerate(AWKWARD):
        data = {"_target_": "deq.data.digits", "augment": name, "train_size": None, "test_size": None}
        curves = [TRACES[0], TRACES[1] | {"solver": name}]
        write_run(tmp_path / "sweep" / f"{number}_a", config_of("Anderson", 0, data=data), ANDERSON[0], traces=curves)
    report_of(tmp_path / "sweep", draw=True)
    content, console = browse(tmp_path / "sweep" / "report" / "report.html", tmp_path / "profile")
    assert console == []
    assert min(elements_of(content).marks.values()) > 0
    text = html.unescape(content)
    for name in AWKWARD:
        assert f'data-entry="Anderson · data.augment {name}"' in text


def test_what_a_logarithmic_axis_has_no_place_for_is_left_out_and_the_rest_is_drawn(tmp_path: Path) -> None:
    nothing = trace("Anderson m = 5", False, [0.01, 0.02, 0.03, 0.04], [1, 0.1, 0, 0])
    nothing["residual_mean"][1] = None
    nothing["residual_p10"] = [0, 0, 0, None]
    write_run(tmp_path / "0_a", config_of("Anderson", 0), ANDERSON[0], traces=[TRACES[0], nothing])
    figure = figure_of(tmp_path, "residual")
    curve = [row for row in drawn(figure, kind="line") if row["name"] == "Anderson m = 5"]
    assert [(row["x"], row["y"], "low" in row) for row in curve] == [(1, 1, False)]
    assert len([row for row in drawn(figure, kind="line") if row["name"] == "forward iteration"]) == 6
    assert figure.png().startswith(b"\x89PNG")
    zeros = [trace(one, one == "f", [0.01, 0.02], [0, 0]) for one in ("f", "a")]
    write_run(tmp_path / "1_a", config_of("Anderson", 0, window=2), ANDERSON[0], traces=zeros)
    assert figure_of(tmp_path, "residual-2").png().startswith(b"\x89PNG")


def test_a_single_evaluation_is_a_point_and_not_an_empty_figure(tmp_path: Path) -> None:
    once = [trace("forward iteration", True, [0.01], [0.5]), trace("Anderson m = 5", False, [0.01], [0.2])]
    write_run(tmp_path / "0_a", config_of("Anderson", 0), ANDERSON[0][:1], traces=once)
    for key in ("accuracy", "evaluations", "residual"):
        spec = figure_of(tmp_path, key).specs()[0]
        seen = [layer["mark"] for layer in spec["layer"] if layer["mark"]["type"] == "point"]
        assert any(mark.get("fillOpacity") != 0 and mark.get("size") == 26 for mark in seen), key


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1e-3, 1.0, [1e-3, 1e-2, 1e-1, 1.0]),
        (0.15, 0.9, [0.2, 0.5]),
        (0.011, 0.013, [0.0112, 0.012, 0.0128]),
        (3.0, 150.0, [5.0, 10.0, 20.0, 50.0, 100.0]),
        (1e-16, 1.0, [1e-16, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0]),
    ],
)
def test_a_logarithmic_axis_has_few_round_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == ticks


def test_every_figure_is_vega_lite_with_named_axes_and_a_png(tmp_path: Path) -> None:
    sweep = two_arms(tmp_path, traces=TRACES)
    for number, (window, beta) in enumerate(((5, 0.5), (2, 0.5), (2, 1.0))):
        write_run(sweep / f"{10 + number}_a", config_of("Anderson", 0, window=window, beta=beta), ANDERSON[0])
    report_of(sweep, draw=True)
    for figure in figures_of(compare(read(sweep))):
        assert isinstance(figure, Figure)
        for panel in figure.panels:
            spec = panel.to_dict(validate=True)  # raises for a name or a value that Vega-Lite does not have
            axes = [layer["encoding"][axis].get("axis") for layer in spec["layer"] for axis in ("x", "y")
                    if axis in layer["encoding"]]  # fmt: skip
            titles = {axis["title"] for axis in axes if axis}
            assert len(titles) == (1 if figure.key == "energy" else 2), figure.key
            assert all(titles)
        assert figure.title
        assert figure.caption
        assert (sweep / "report" / f"{figure.key}.png").read_bytes().startswith(b"\x89PNG")


def test_a_real_sweep_is_reported_on(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HYDRA_"))}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    knobs = ["experiment=smoke", "data.train_size=100", "data.test_size=20", "batch_size=25", "probe=null"]
    train = [sys.executable, str(ROOT / "train.py"), "-m", "solver=anderson,forward", "window=2", *knobs]
    run = subprocess.run(
        [*train, "hydra.sweep.dir=sweep"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    report = subprocess.run(
        [sys.executable, "-m", "deq.report", "sweep", "--out", "here"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (report.returncode, report.stderr) == (0, "")
    assert "report: here/report.html" in report.stdout
    content = json.loads((tmp_path / "here" / "report.json").read_text())
    assert [one["label"] for one in content["arms"]] == ["forward iteration", "Anderson"]
    assert {one["state"] for one in content["runs"]} == {"finished"}
    page = (tmp_path / "here" / "report.html").read_text()
    (link,) = re.findall(r'href="(\.\./sweep/0_[^"]+)"', page)
    assert (tmp_path / "here" / link / "config.yaml").is_file()


def test_now_is_a_moment_in_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", runs.now())
