"""Which jobs a sweep has, and that one that was killed finishes only what is missing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from deq.cli.sweep import GridSweeper, jobs_of, resumed_arguments
from deq.records.errors import UserError
from tests.test_train import ROOT, TINY, python, python_anew, train

PARSER = OverridesParser.create()
GRIDS = [{"seed": "0,1", "solver": "anderson", "window": "2,5"}, {"seed": "0,1", "solver": "forward"}]


def jobs(*arguments: str, grids: Any = GRIDS, params: Any = None) -> list[str]:
    return [" ".join(job) for job in jobs_of(grids, params or {}, arguments, PARSER)]


def test_without_grids_a_sweep_is_the_product_in_the_order_that_was_typed() -> None:
    assert jobs("solver=anderson,forward", "window=2,5", "epochs=1", grids=[]) == [
        "solver=anderson window=2 epochs=1",
        "solver=anderson window=5 epochs=1",
        "solver=forward window=2 epochs=1",
        "solver=forward window=5 epochs=1",
    ]


def test_arms_that_share_no_knobs_have_grids_of_their_own_and_one_seed_runs_in_one_go() -> None:
    assert jobs("epochs=1") == [
        "seed=0 solver=anderson window=2 epochs=1",
        "seed=0 solver=anderson window=5 epochs=1",
        "seed=0 solver=forward epochs=1",
        "seed=1 solver=anderson window=2 epochs=1",
        "seed=1 solver=anderson window=5 epochs=1",
        "seed=1 solver=forward epochs=1",
    ]


def test_the_command_line_goes_before_the_grids() -> None:
    assert jobs("seed=7", "window=3,4") == [
        "seed=7 solver=anderson window=3",
        "seed=7 solver=anderson window=4",
        "seed=7 solver=forward",
    ]
    assert jobs("solver=forward", "seed=0") == ["seed=0 solver=forward"]
    # One value is for all grids, also for those that leave the knob at its default.
    assert jobs("seed=7", "window=3") == ["seed=7 solver=anderson window=3", "seed=7 solver=forward window=3"]
    ablation = [{"solver": "anderson"}, {"solver": "anderson", "compact": "true"}]
    assert jobs("compact=true", grids=ablation) == ["solver=anderson compact=True"]
    # A solver that no grid has takes the place of theirs.
    assert jobs("solver=broyden", "seed=0", "window=2") == ["seed=0 solver=broyden window=2"]
    assert jobs("tol=1e-2,1e-3", "seed=0", "solver=forward") == [
        "seed=0 solver=forward tol=0.01",
        "seed=0 solver=forward tol=0.001",
    ]
    assert jobs("seed=3", grids=[], params={"seed": "0,1", "beta": "0.5,1"}) == ["beta=0.5 seed=3", "beta=1 seed=3"]


def test_values_of_a_config_file_are_those_of_the_command_line() -> None:
    sweeper = GridSweeper(params={"max_steps": None, "compact": True}, grids=[{"a": [None, 2], "b": "1,2", "c": False}])
    assert jobs_of(sweeper.grids, sweeper.params, [], PARSER) == [
        ["max_steps=null", "compact=True", "a=[null,2]", f"b={b}", "c=False"] for b in (1, 2)
    ]
    made = GridSweeper(grids=OmegaConf.create([{"max_steps": None, "tol": 1e-3}]))  # type: ignore[arg-type]
    assert made.grids == [{"max_steps": "null", "tol": "0.001"}]


@pytest.mark.parametrize(("size", "words"), [(-1, "-1"), (0, "0"), ("abc", "'abc'"), (True, "true"), (1.5, "1.5")])
def test_a_batch_of_no_jobs_is_refused(size: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"max_batch_size must be an integer of at least 1 or null, got {words}"):
        GridSweeper(max_batch_size=size)


def test_a_value_without_a_grid_where_others_have_one_is_refused() -> None:
    with pytest.raises(HydraException, match="solver=broyden has no grid in this experiment"):
        jobs("solver=forward,broyden")


@pytest.mark.parametrize("override", ["window=range(3,3)", "window=glob(*)", "solver=glob(x*)"])
def test_a_sweep_over_no_values_is_refused_and_not_a_sweep_without_jobs(override: str) -> None:
    parser = OverridesParser.create(config_loader=mock.Mock(get_group_options=lambda *names, **filters: []))
    with pytest.raises(HydraException, match="stands for no value, so there is no job; give one at least"):
        jobs_of([], {}, ["seed=0", override], parser)


def test_an_interval_is_for_a_tuner() -> None:
    with pytest.raises(HydraException, match="beta=interval"):
        jobs("beta=interval(0.5,1)")


EXPERIMENTS = {"window_beta": 24, "paper": 12, "paper_cpu": 9, "ablation": 24}
TUTORIAL = {"tol": 1e-2, "max_iter": 25, "batch_size": 100, "epochs": 50}  # chapter 4's, beside m = 5 of its Anderson


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_in_all_its_jobs(experiment: str) -> None:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("config", [f"experiment={experiment}"], return_hydra_config=True)
        grids: Any = OmegaConf.to_container(config.hydra.sweeper.grids)
        assert config.hydra.mode.name == "MULTIRUN"
        found = jobs_of(grids, {}, [f"experiment={experiment}"], PARSER)
        assert len(found) == EXPERIMENTS[experiment]
        solvers = set()
        for job in found:
            composed = hydra.compose("config", job)
            solvers.add(composed.solver._target_)
        assert "deq.solvers.Forward" in solvers  # never without the baseline
        assert "deq.solvers.Anderson" in solvers


def test_the_papers_experiment_has_the_tutorials_settings() -> None:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("config", ["experiment=paper"], return_hydra_config=True)
        grids: Any = OmegaConf.to_container(config.hydra.sweeper.grids)
        for job in jobs_of(grids, {}, ["experiment=paper"], PARSER):
            composed = hydra.compose("config", job)
            assert {name: composed[name] for name in TUTORIAL} == TUTORIAL
            if composed.solver._target_.endswith("TutorialAnderson"):
                assert (composed.solver.window, composed.solver.beta, composed.solver.ridge) == (5, 1.0, 1e-4)


def test_a_refused_sweep_leaves_no_folder_and_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    run = train("-m", "solver=anderson,foo", *TINY, "hydra.sweep.dir=sweep", folder=tmp_path)
    assert run.returncode == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    run = train(*TINY, "hydra.run.dir=sweep", folder=tmp_path)
    assert run.returncode == 2
    assert "sweep holds a sweep; give another hydra.run.dir" in run.stderr


def test_a_folder_that_another_process_is_at_is_refused(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    held = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    run = train(*TINY, "hydra.run.dir=run", folder=tmp_path)
    os.close(held)
    assert run.returncode == 2
    assert "run is the folder of a run that another process is at" in run.stderr


def test_resume_of_a_sweep_is_its_own_command_line_again(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    overrides = {"hydra": ["hydra.sweep.dir=elsewhere", "hydra.mode=MULTIRUN"], "task": ["window=2,5", "epochs=1"]}
    OmegaConf.save({"hydra": {"overrides": overrides}}, tmp_path / "multirun.yaml")
    assert resumed_arguments(["-m", f"resume={tmp_path}"]) == [
        "--multirun", "window=2,5", "epochs=1", f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"as it was begun; leave epochs=3 out"):
        resumed_arguments([f"resume={tmp_path}", "epochs=3"])
    strange = tmp_path / "a,b [1]"
    strange.mkdir()
    for name in ("sweep.json", "multirun.yaml"):
        (strange / name).write_bytes((tmp_path / name).read_bytes())
    (quoted,) = PARSER.parse_overrides(resumed_arguments([f"resume={strange}"])[-1:])
    assert quoted.value() == str(strange)
    assert resumed_arguments(["resume=runs/one", "epochs=2"]) == ["resume=runs/one", "epochs=2"]


@pytest.mark.parametrize("place", [".", "checkpoint.pt"])
def test_a_resumed_run_has_the_knobs_that_it_had_and_those_given_anew(place: str, tmp_path: Path) -> None:
    before = ["solver=forward", "epochs=2", "+optim.optimizer.eps=1e-7", "resume=runs/zero", "hydra.run.dir=here"]
    (tmp_path / "status.json").write_text(json.dumps({"state": "interrupted", "overrides": before}))
    (tmp_path / "checkpoint.pt").touch()
    resume = f"resume={tmp_path / place}"
    kept = ["solver=forward", "+optim.optimizer.eps=1e-7"]
    assert resumed_arguments([resume, "epochs=3"]) == [*kept, resume, "epochs=3"]
    assert resumed_arguments([resume, "++epochs=3", "solver=anderson"])[:-3] == ["+optim.optimizer.eps=1e-7"]
    for content in ("", "[]", '{"overrides": 3}', '{"overrides": [3]}'):
        (tmp_path / "status.json").write_text(content)
        assert resumed_arguments([resume]) == [resume]


def states(folder: Path) -> dict[str, str]:
    return {file.parent.name: json.loads(file.read_text())["state"] for file in sorted(folder.glob("*/status.json"))}


KILLED_IN_THE_SECOND_JOB = """
import os, signal
from pathlib import Path
import train
from deq.cli.command import launch
from deq.training import checkpoint

save = checkpoint.save

def save_and_die(file, *content):
    save(file, *content)
    if file.parent.name.startswith("1_"):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save = save_and_die
launch(train.main, conf=Path(train.__file__).parent / "conf")
"""


def test_a_killed_sweep_finishes_only_what_is_missing(tmp_path: Path) -> None:
    swept = ["-m", "solver=anderson,forward", "seed=0,1", *TINY, "epochs=4", "max_steps=null", "hydra.sweep.dir=sweep"]
    killed = python("-c", KILLED_IN_THE_SECOND_JOB, *swept, folder=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    sweep = tmp_path / "sweep"
    second = sweep / "1_seed-1_solver-anderson"
    planned = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert len(planned) == 4
    assert states(sweep) == {"0_seed-0_solver-anderson": "finished", "1_seed-1_solver-anderson": "running"}
    left = {file: file.stat().st_mtime_ns for file in (sweep / "0_seed-0_solver-anderson").rglob("*") if file.is_file()}

    again = train("resume=sweep", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "job 0 is done already: sweep/0_seed-0_solver-anderson" in again.stdout
    assert set(states(sweep).values()) == {"finished"}
    assert len(states(sweep)) == 4
    assert left == {file: file.stat().st_mtime_ns for file in left}
    # The second went on from its checkpoint, and its rows are whole.
    steps = [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 16
    whole = train(
        "solver=anderson", "seed=1", *TINY, "epochs=4", "max_steps=null", "hydra.run.dir=whole", folder=tmp_path
    )
    assert whole.returncode == 0
    results = [json.loads((folder / "summary.json").read_text()) for folder in (second, tmp_path / "whole")]
    assert results[0]["test/accuracy"] == results[1]["test/accuracy"]
    assert results[0]["train/loss"] == results[1]["train/loss"]

    # A summary that is not there, or not the last word, is no end.
    (second / "summary.json").unlink()
    repaired = train("resume=sweep", folder=tmp_path)
    assert repaired.returncode == 0, repaired.stderr
    assert repaired.stdout.count("is done already") == 3
    assert (second / "summary.json").is_file()

    other = train("-m", "solver=anderson", "seed=5,6", *TINY, "hydra.sweep.dir=sweep", folder=tmp_path)
    assert other.returncode == 2
    assert "sweep holds a sweep of other jobs" in other.stderr


def test_optuna_tunes_window_beta_and_tol_for_accuracy_and_time(tmp_path: Path) -> None:
    run = train(
        "experiment=tune", *TINY[1:], "epochs=1", "max_steps=2", "probe=null", "crossover=null", "logger=none",
        "hydra.sweeper.n_trials=2", "hydra.sweep.dir=tuned", folder=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    configs: list[Any] = [OmegaConf.load(file) for file in sorted((tmp_path / "tuned").glob("*/config.yaml"))]
    assert len(configs) == 2
    assert configs[0].beta != configs[1].beta
    assert all(1 <= config.window <= 12 and 1e-3 <= config.tol <= 5e-2 for config in configs)
    best: Any = OmegaConf.load(tmp_path / "tuned" / "optimization_results.yaml")
    assert best.name == "optuna"
    for solution in best.solutions:
        accuracy, seconds = solution["values"]
        assert 0 <= accuracy <= 1
        assert seconds > 0


def test_tuning_without_optuna_says_how_to_install_it(tmp_path: Path) -> None:
    # A package that hides the plugins that are installed.
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").touch()
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    run = python_anew(str(ROOT / "train.py"), "experiment=tune", folder=tmp_path, PYTHONPATH=path)
    assert run.returncode == 2
    assert "pip install -e '.[tune]'" in run.stderr
    assert run.stderr.count("\n") == 1


def test_an_objective_that_no_run_measures_is_refused_before_any_work(tmp_path: Path) -> None:
    run = train("objective=speedup/solver", *TINY, "probe=null", folder=tmp_path)
    assert run.returncode == 2
    assert "objective=speedup/solver is measured by probe, which is null" in run.stderr
    run = train("experiment=tune", "objective=test/accuracy", *TINY[1:], folder=tmp_path)
    assert run.returncode == 2
    assert "objective has 1 metrics and hydra.sweeper.direction 2" in run.stderr
    run = train("objective=[test/accuracy,test/acuracy]", *TINY, folder=tmp_path)
    assert run.returncode == 2
    assert "objective must be a metric or a list of such, got 'test/acuracy'; did you mean test/accuracy?" in run.stderr
