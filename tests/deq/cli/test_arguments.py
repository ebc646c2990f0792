"""The command line before Hydra composes it: nothing in it is ignored, or taken for something else, without a word.

In one process, since only the sentence matters here; that ``train.py`` ends with it is in ``tests/test_train.py``.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import hydra
import pytest
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from deq.cli.arguments import arranged, quoted, typed
from deq.cli.composed import Loader
from deq.cli.sweep import GridSweeper, jobs_of
from deq.records.errors import UserError

CONF = Path(__file__).parents[3] / "conf"
PARSER = OverridesParser.create()


def compose(*arguments: str) -> list[DictConfig]:
    """What Hydra composes of a command line: the config of a run; of a sweep its own, and that of each job."""
    line, _, part = arranged(arguments, CONF)
    options = get_args_parser().parse_args(line)
    folders = create_config_search_path(str(CONF))
    if options.config_dir:
        folders.prepend("command-line", f"file://{options.config_dir}", SearchPathQuery(provider="schema"))
    Loader.part = part
    loader = Loader(folders)
    if not options.multirun:
        return [loader.load_configuration("config", options.overrides, RunMode.RUN)]
    config = loader.load_configuration("config", [*options.overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    given = config.hydra.sweeper
    if "grids" not in given:  # a tuner, which makes its jobs one by one
        return [config]
    sweeper = GridSweeper(params=given.get("params"), grids=given.get("grids"))
    jobs = jobs_of(sweeper.grids, sweeper.params, list(config.hydra.overrides.task), PARSER)
    return [config, *(loader.load_sweep_config(config, job) for job in jobs)]


def sentence(*arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        compose(*arguments)
    return str(refused.value)


# Names.

DELETES = "deletes what the program reads; leave it out for the default"
UNREAD = {
    # What is not there cannot be deleted, and what is there is read.
    "~nothere": "there is no knob nothere; `python train.py --help` lists them",
    "~prob": "there is no knob prob; did you mean probe?",
    "~solver.windw": "there is no knob solver.windw; did you mean solver.window?",
    "~hydra.run.dri": "there is no knob hydra.run.dri; did you mean hydra.run.dir?",
    "~probe": f"~probe {DELETES}, or write probe=null",
    "~adjoint": f"~adjoint {DELETES}, or write adjoint=null",
    "~solver@adjoint": f"~solver@adjoint {DELETES}, or write adjoint=null",
    "~solver": f"~solver {DELETES}",
    "~solver=anderson": f"~solver=anderson {DELETES}",
    "~experiment": f"~experiment {DELETES}",
    "~window": f"~window {DELETES}",
    "~window=3": f"~window=3 {DELETES}",
    "~solver.window": f"~solver.window {DELETES}",
    "~model.channels": f"~model.channels {DELETES}",
    "~data.root": f"~data.root {DELETES}",
    "~probe._target_": f"~probe._target_ {DELETES}",
    "~hydra": f"~hydra {DELETES}",
    "~hydra.run.dir": f"~hydra.run.dir {DELETES}",
    "~hydra/launcher": f"~hydra/launcher {DELETES}",
    # A name with + or ++ that nothing reads, at any depth.
    "+windw=3": "there is no knob windw; did you mean window?",
    "++windw=3": "there is no knob windw; did you mean window?",
    "+nothere=1": "there is no knob nothere; `python train.py --help` lists them",
    "++nothere.x=1": "there is no knob nothere.x; `python train.py --help` lists them",
    "+seed.x=3": "there is no knob seed.x; did you mean seed?",
    "+solver.windw=3": "there is no knob solver.windw; did you mean solver.window?",
    "+solver.windw.x=3": "there is no knob solver.windw.x; did you mean solver.window?",
    "+optim.lrr=1": "there is no knob optim.lrr; did you mean optim.lr?",
    "+optim.optimizer.amsgrd=true": "there is no knob optim.optimizer.amsgrd; did you mean optim.optimizer.amsgrad?",
    "+data.shuffle=1": "there is no knob data.shuffle; data has augment, test_size, train_size",
    "data=image_folder +data.shuffle=1": "there is no knob data.shuffle; data has augment, cache_dir, image_size,",
    "++optim.optimizer={_target_:torch.optim.SGD,amsgrd:1}": "there is no knob optim.optimizer.amsgrd; optim.opti",
    "+optim.optimizer.foo={_target_:torch.optim.SGD,lr:1}": "there is no knob optim.optimizer.foo._target_; optim",
    "+seed2=1 window=${seed}": "there is no knob seed2; did you mean seed?",
    "optim.optimizer.amsgrad=true": "there is no optim.optimizer.amsgrad yet; write +optim.optimizer.amsgrad=true to",
    "optim.optimizer={_target_:torch.optim.SGD,momentum:0.9}": "there is no optim.optimizer.momentum yet; write "
    "'+optim.optimizer={_target_:torch.optim.SGD,momentum:0.9}' to add it",
    "hydra.callbacks={a:{_target_:b.C}}": "there is no hydra.callbacks.a._target_ yet; write '+hydra.callbacks={a:",
    "~hydra.job.env_set.NAME": "there is no hydra.job.env_set.NAME here to delete; leave ~hydra.job.env_set.NAME out",
    "experiment=tune ~hydra.sweeper.n_trials": f"~hydra.sweeper.n_trials {DELETES}",
    # In what is swept over.
    "-m hydra.sweeper.params={+foo:'1,2'}": "there is no knob foo",
    "-m hydra.sweeper.params={windw:'1,2'}": "there is no knob windw; did you mean window?",
    "-m hydra.sweeper.grids=[{solver:broyden,+solver.memry:'1,2'}]": "there is no knob solver.memry; did you mean",
    "experiment=tune +hydra.sweeper.params.windw=1": "there is no knob windw; did you mean window?",
    "-m experiment=tune +windw=range(1,3)": "there is no knob windw; did you mean window?",
    "-m experiment=tune windw=range(1,3)": "there is no knob windw; did you mean window?",
    # For another mode of running.
    "-m hydra.run.dir=a": "hydra.run.dir=a is the folder of one run, and this is a sweep; give hydra.sweep.dir=a",
    "hydra.mode=MULTIRUN hydra.run.dir=a": "hydra.run.dir=a is the folder of one run, and this is a sweep; give",
    "hydra.mode=RUN hydra.sweep.dir=a": "hydra.sweep.dir=a is the folder of a sweep, and this is one run; give "
    "hydra.run.dir=a, or add -m",
    "hydra.mode=RUN hydra.sweeper.params={window:'1,2'}": "hydra.sweeper.params={window:'1,2'} is for a sweep, and",
    # A tuner's own.
    "experiment=tune hydra.sweeper.n_jobs=0": "hydra.sweeper.n_jobs must be an integer of at least 1, got 0",
    "experiment=tune hydra.sweeper.n_trials=0": "hydra.sweeper.n_trials must be an integer of at least 1, got 0",
    "experiment=tune hydra.sweeper.max_failure_rate=2": "hydra.sweeper.max_failure_rate must be a number from 0 to 1",
    "experiment=tune hydra.sweeper.direction=foo": "hydra.sweeper.direction must be maximize or minimize, or a list of "
    "such, got 'foo'",
    "experiment=tune hydra.sweeper.storage=foo": "hydra.sweeper.storage must be the URL of a database, such as "
    "sqlite:///tune.db, or null, got 'foo'",
    "hydra.job.env_copy=[UNSET]": "hydra.job.env_copy has UNSET, which this environment does not set; set it, or",
    "+hydra.foo=1": "there is no knob hydra.foo; `python train.py --cfg hydra` shows what Hydra has",
    "+hydra.run.dri=a": "there is no knob hydra.run.dri; did you mean hydra.run.dir?",
    # What the class takes, but train.py gives it already.
    "+model.classes=3": "there is no knob model.classes; model has channels, cuda_graph, groups, init_std, inner, pool",
    "+optim.optimizer.params=1": "there is no knob optim.optimizer.params",
    # Groups, and packages of groups.
    "+foo/bar=baz": "there is no knob foo/bar",
    "+hydra/callbacks=foo": "there is no knob hydra/callbacks",
    "+solver@foo=broyden": "there is no knob foo",
    "solver@foo=broyden": "there is no knob foo",
    # Inside a value, with + or without.
    "++optim={lrr:1}": "there is no knob optim.lrr; did you mean optim.lr?",
    "optim={lr:1,lrr:1}": "there is no knob optim.lrr; did you mean optim.lr?",
    "+nothere={a:{b:1}}": "there is no knob nothere",
    "-m ++optim={lrr:1},{lrr:2}": "there is no knob optim.lrr; did you mean optim.lr?",
    "-m +windw=1,2": "there is no knob windw; did you mean window?",
    "--cfg job +windw=1": "there is no knob windw; did you mean window?",
    # Values that no group and no path has.
    "solver=[anderson]": "solver must be one of anderson, broyden, forward, tutorial_anderson, tutorial_forward, got",
    "data=3": "data must be one of cifar10, digits, image_folder, got 3",
    "hydra.launcher=basic": "hydra.launcher cannot be 'basic'; write hydra/launcher=OPTION to choose one",
    "hydra.run.dir=": "hydra.run.dir must be a path, got ''; leave it out for the default",
    "data.root=": "data.root must be a path, got ''; give data.root=DIR",
    "hydra.run.dir=null": "hydra.run.dir must be a path, got null; leave it out for the default",
    "resume=": "resume must be a path, got ''; leave it out for the default",
    "hydra.run.dir=2026_01_31": "hydra.run.dir=2026_01_31 is read as the value 20260131; for that path write "
    "\"hydra.run.dir='2026_01_31'\"",
    "resume=1e3": "resume=1e3 is read as the value 1000.0; for that path write \"resume='1e3'\"",
}


@pytest.mark.parametrize("line", UNREAD)
def test_what_nothing_reads_is_refused_by_name_with_the_nearest(line: str) -> None:
    assert sentence(*line.split()).startswith(UNREAD[line])


READ = [
    "window=3",
    "++window=3",
    "+experiment=smoke",  # Hydra says itself that the + is one too many
    "+optim.optimizer.amsgrad=true",
    "+optim.optimizer.betas=[0.9,0.99]",
    "++probe._convert_=all",
    "optim.optimizer._target_=torch.optim.SGD +optim.optimizer.momentum=0.9",  # another class takes other names
    "solver={window:3}",
    "++solver={window:3,ridge:null}",
    "solver@adjoint=forward",
    "adjoint=null",
    "+hydra.job.env_set.NAME=1",
    "++hydra.run.dir=runs/a",
    "hydra/launcher=basic",
    "hydra.run.dir=${now:%Y}/a",
    "resume=3",
    "data.root=a data.cache_dir=b hydra.sweep.dir=c",
    "-m data.root=a,b",
    "-m window=range(2,4)",
]


@pytest.mark.parametrize("line", READ)
def test_what_something_reads_is_let_through(line: str) -> None:
    assert sorted(arranged(line.split(), CONF)[0]) == sorted(line.split())


COMPOSED = {
    "++optim.optimizer={_target_:torch.optim.SGD,momentum:0.9}": ("optim.optimizer.momentum", 0.9),
    "+optim.optimizer={_target_:torch.optim.SGD,momentum:0.9}": ("optim.optimizer.momentum", 0.9),
    "optim.optimizer._target_=torch.optim.SGD +optim.optimizer.nesterov=true": ("optim.optimizer.nesterov", True),
    "+optim.optimizer.betas=[0.9,0.99]": ("optim.optimizer.betas", [0.9, 0.99]),
    "+mine=2 window=${mine}": ("window", 2),  # another knob reads it
    "+solver@other=broyden gradient.solver=${other}": ("gradient.solver.memory", 10),
    "-m hydra.sweeper.params={+optim.optimizer.eps:'1,2'}": ("optim.optimizer.eps", 2),
    "-m solver=broyden,anderson tol=0.5": ("solver.window", 10),
    "-m +optim.optimizer={_target_:torch.optim.SGD,momentum:0.1},{amsgrad:true}": ("optim.optimizer.amsgrad", True),
    "experiment=tune ~hydra.sweeper.params.beta": ("hydra.sweeper.params.window", "range(1, 13)"),
    "-m experiment=tune +hydra.sweeper.params.max_iter='range(1,9)'": ("hydra.sweeper.params.max_iter", "range(1,9)"),
    "experiment=tune hydra.sweeper.storage=sqlite:///a.db": ("hydra.sweeper.storage", "sqlite:///a.db"),
    "+hydra.job.env_set.NAME=1": ("hydra.job.env_set.NAME", "1"),
    "+hydra.callbacks={a:{_target_:b.C}}": ("hydra.callbacks.a._target_", "b.C"),
    "--cfg job --package optim.optimizer": ("optim.optimizer._partial_", True),
    "--cfg hydra --package hydra.run": ("hydra.mode", None),
    "--cfg all --package _global_": ("window", 10),
}


@pytest.mark.parametrize("line", COMPOSED)
def test_what_something_reads_is_composed(line: str) -> None:
    name, value = COMPOSED[line]
    assert OmegaConf.select(compose(*line.split())[-1], name) == value


def test_config_folders_of_the_users_bring_their_own_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "first.yaml").write_text("knob: 1\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "sgd.yaml").write_text(
        "# @package _global_\noptim:\n  optimizer: {_target_: torch.optim.SGD, momentum: 0.9}\n"
        "hydra: {job: {env_set: {NAME: '1'}}}\n"
    )
    for line in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"]):
        assert compose(*line, "+mine=first", "++mine.knob=2", "+mine.other=5")[0].mine == {"knob": 2, "other": 5}
        assert compose(*line, "+mine=first", "~mine.knob")[0].mine == {}
        (config,) = compose(*line, "experiment=sgd", "+optim.optimizer.nesterov=true", "~hydra.job.env_set.NAME")
        assert (config.optim.optimizer.nesterov, config.hydra.job.env_set) == (True, {})
        assert "momentum" not in compose(*line, "experiment=sgd", "~optim.optimizer.momentum")[0].optim.optimizer
        told = sentence(*line, "experiment=sgd", "+optim.optimizer.nestrov=true")
        assert told == "there is no knob optim.optimizer.nestrov; did you mean optim.optimizer.nesterov?"
        assert compose(*line, "+mine=first", "--cfg", "job", "--package", "mine.knob")[0].mine.knob == 1
    assert "there is no knob mine" in sentence("+mine=first")
    (tmp_path / "mine" / "second.yaml").write_text("a: [\n")
    assert "second.yaml cannot be read (while parsing" in sentence("--config-dir", str(tmp_path), "window=3")


# Options.

ORDERS = [
    "-m seed=0 window=2,3",
    "seed=0 -m window=2,3",
    "seed=0 window=2,3 -m",
    "seed=0 --multirun window=2,3",
    "seed=0 --multi window=2,3",
    "seed=0 --cfg job window=2",
    "seed=0 -c job window=2",
    "seed=0 --cfg=job window=2",
    "--cfg job seed=0 window=2 --resolve",
    "seed=0 -cn config window=2",
    "seed=0 --help window=2",
    "seed=0 --info defaults window=2",
    "--cfg job -- seed=0 window=2",
    "seed=0 -p solver --cfg job window=2",
]


@pytest.mark.parametrize("line", ORDERS)
def test_options_may_stand_anywhere_among_the_overrides(line: str) -> None:
    ordered, shows, _ = arranged(line.split(), CONF)
    assert ordered[0] == "seed=0"
    assert ordered[1].startswith("window=2")
    assert sorted(ordered) == sorted(one for one in line.split() if one != "--")
    assert shows == any(one in line for one in ("-c ", "--cfg", "--help", "--info"))


LISTED = "`python train.py --hydra-help` lists the options"
OPTIONS = {
    "--nothere": f"there is no option --nothere; {LISTED}",
    "window=3 -x seed=0": f"there is no option -x; {LISTED}",
    "--window=3": "there is no option --window=3; a knob has no dashes: window=3",
    "-window=3": "there is no option -window=3; a knob has no dashes: window=3",
    "-probe=null": "there is no option -probe=null; a knob has no dashes: probe=null",  # else --package robe=null
    "--solver=forward": "there is no option --solver=forward; a knob has no dashes: solver=forward",
    "--cfg": f"argument --cfg/-c: expected one argument; {LISTED}",
    "--cfg jobs": f"argument --cfg/-c: invalid choice: 'jobs' (choose from 'job', 'hydra', 'all'); {LISTED}",
    "window=3 -cn": f"argument --config-name/-cn: expected one argument; {LISTED}",
    "-m --cfg job": "--multirun and --cfg exclude each other; leave one out",
    "-m seed=0 --run": "--run and --multirun exclude each other; leave one out",
    "--resolve": "--resolve goes with --cfg alone; add --cfg job, or leave it out",
    "--package solver": "--package solver goes with --cfg alone; add --cfg job, or leave it out",
    "--package solvr --cfg job": "--package solvr: there is no knob solvr; did you mean solver?",
    "--package solver --cfg hydra": "--package solver: it is no part of Hydra's config; write --cfg job",
    "--package hydra.run --cfg job": "--package hydra.run: it is a part of Hydra's config; write --cfg hydra",
    "--package resume --cfg job": "--package resume: it is null here, and there is nothing to show; leave it out",
    "--experimental-rerun a": "--experimental-rerun is not for these runs; go on with one: resume=RUN_FOLDER",
    "--config-path nowhere": "--config-path nowhere: there is no such folder; leave it out for the default",
    "--config-dir nowhere": "--config-dir nowhere: there is no such folder; give one, or leave it out",
}


@pytest.mark.parametrize("line", OPTIONS)
def test_an_option_that_is_none_or_lacks_something_is_refused_in_one_sentence(line: str) -> None:
    assert sentence(*line.split()) == OPTIONS[line]


def test_of_a_knob_given_twice_the_last_value_counts() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        ordered, _, _ = arranged(["window=2", "solver=forward", "-r", "window=3", "solver=broyden"], CONF)
        config = hydra.compose("config", ordered[:-1])
    assert (config.window, config.solver._target_) == (3, "deq.solvers.Broyden")


# Texts.

TEXTS = ["a=b", "a(b)", "a#b", "a'b", 'a"b', "é", "東京", "~/x", "a&b", "a;b", "a!b", "a[b", "a{b", "a\\'b", "=a"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_the_grammar_cannot_read_is_told_as_it_has_to_be_typed(text: str, tmp_path: Path) -> None:
    told = sentence(f"resume={text}")
    start = f"cannot read {f'resume={text}'!r}; write KNOB=VALUE or GROUP=OPTION, and a text with such characters in "
    assert told.startswith(f"{start}quotes of two kinds: ")
    # The shell gives what is told to Hydra, which reads the text: what the sentence says works.
    command = told.removeprefix(f"{start}quotes of two kinds: ")
    run = subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True, check=True, cwd=tmp_path)
    assert PARSER.parse_override(run.stdout.decode()).value() == text


@pytest.mark.parametrize("text", [*TEXTS, "a,b", "a b", "a:b", "runs/a", "2026_01", "1e3", "true", "a\\b", "a\\", ""])
def test_every_text_can_be_quoted_for_hydra_and_for_a_shell(text: str) -> None:
    assert PARSER.parse_override(f"resume={quoted(text)}").value() == text
    (typed_,) = shlex.split(typed("resume", text))
    assert PARSER.parse_override(typed_).value() == text


def test_a_path_without_such_characters_is_left_as_it_is() -> None:
    assert typed("resume", "runs/2026-01-31/12-00-00_window-5") == "resume=runs/2026-01-31/12-00-00_window-5"


@pytest.mark.parametrize("line", ["window", "=3", "a b=3", "window:3", "3", "=", ""])
def test_what_is_no_override_at_all_is_refused_without_a_guess(line: str) -> None:
    assert sentence(line) == f"cannot read {line!r}; write KNOB=VALUE or GROUP=OPTION"


def test_an_argument_that_is_no_text_is_refused() -> None:
    assert sentence(os.fsdecode(b"hydra.run.dir=a\xff")) == (
        r"cannot read 'hydra.run.dir=a\udcff': it is no text in utf-8; set PYTHONUTF8=1, or give another name"
    )
