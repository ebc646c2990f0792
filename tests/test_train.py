"""The entry point, run as a user runs it: in a process of its own, with overrides.

Most of these processes are forked (tests/forked.py). Started anew are the main job, and what shows only there: signals,
closed pipes, limits that would hold for the files that a forked process writes its streams to.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from tests import forked

ROOT = Path(__file__).parent.parent
TINY = ["experiment=smoke", "data.train_size=100", "data.test_size=20", "batch_size=25"]

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HYDRA_"))} | {
    "NETRC": os.devnull,
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "80",
    "OMP_NUM_THREADS": "1",  # as fast for networks this small, and much faster on a machine that is busy
}


def python(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return forked.run(*arguments, folder=folder, environment=ENVIRONMENT | variables)


def python_anew(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def train(*overrides: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return python(str(ROOT / "train.py"), *overrides, folder=folder, **variables)


def summary(folder: Path) -> dict[str, float]:
    content: dict[str, float] = json.loads((folder / "summary.json").read_text())
    return content


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    clocks = ("time/", "memory/", "speedup/")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(clocks)} for line in lines]


def offline_run(folder: Path) -> bytes:
    """The one offline run in a run folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return file.read_bytes()


def test_main_job_trains_tracks_and_tells(tmp_path: Path) -> None:
    knobs = ["solver=anderson", "window=5", "epochs=2", "hydra.run.dir=run"]
    run = python_anew(str(ROOT / "train.py"), *knobs, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert max(len(line) for line in lines if "wandb sync" not in line) <= 80  # a line to copy is not broken
    assert lines[1] == "Anderson: tol=0.01 max_iter=30 stop=max window=5 beta=1.0"
    for side in ("forward iteration", "this run's solver"):  # median, fastest and slowest
        assert re.search(rf"^  {side} .* [\d.]+ ms \([\d.]+ to [\d.]+\)", run.stdout, re.MULTILINE), run.stdout
    assert [line.split()[0] for line in lines if re.match(r" *\d/2 ", line)] == ["1/2", "2/2"]
    for row in ("accuracy", "time", "evaluations of f", "unconverged", "speedup probe"):
        assert any(line.startswith(row) for line in lines), run.stdout
    assert summary(tmp_path / "run")["test/accuracy"] > 0.5
    assert len(rows(tmp_path / "run")) == 2
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").solver.window == 5
    content = offline_run(tmp_path / "run")
    for name in summary(tmp_path / "run"):
        assert name.encode() in content


def test_sweep_of_eight_jobs_has_eight_folders_and_one_group(tmp_path: Path) -> None:
    swept = ["solver=anderson,forward", "window=2,5", "beta=0.7,1.0"]
    run = train(*swept, "-m", *TINY, "logger=wandb", "hydra.sweep.dir=runs/mine", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    jobs = sorted(file.parent for file in (tmp_path / "runs" / "mine").glob("*/summary.json"))
    assert len(jobs) == 8
    configs = [OmegaConf.load(job / "config.yaml") for job in jobs]
    assert len({(c.solver._target_, c.window, c.beta) for c in configs}) == 8
    for job in jobs:
        assert b"mine" in offline_run(job)


def leaves_of_every_composition() -> dict[str, Any]:
    """Knob → default, over what the groups' options bring; what only points to another knob is none of its own."""
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        for key in node:
            name = f"{path}.{key}" if path else str(key)
            value = node._get_node(key)
            points = re.fullmatch(r"\$\{[a-z_.]+\}", str(value._value()))
            # adjoint.KNOB is a line for all of the solver's.
            if OmegaConf.is_dict(value):
                walk(value, name)
            elif value._value() is None and any(knob.startswith(f"{name}.") for knob in found):
                continue  # a node that an experiment leaves out
            elif not (str(key).startswith("_") or points or name.startswith("adjoint.")):
                found.setdefault(name, value._value())

    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        walk(hydra.compose("config"), "")
        for group in (ROOT / "conf").iterdir():
            for option in sorted(group.glob("*.yaml")) if group.name != "hydra" else ():
                walk(hydra.compose("config", [f"{group.name}={option.stem}"]), "")
    return found


def test_help_is_a_page_with_every_knob_group_and_default(tmp_path: Path) -> None:
    run = train("--help", folder=tmp_path)
    assert run.returncode == 0
    assert max(map(len, run.stdout.splitlines())) <= 80
    page = re.sub(r" +", " ", run.stdout)
    config: Any = OmegaConf.load(ROOT / "conf" / "config.yaml")
    for name, value in config.items():
        if name != "defaults" and not OmegaConf.is_dict(value):
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            assert f"\n {name} {shown} " in page, name
    for knob, value in leaves_of_every_composition().items():
        shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
        assert re.search(rf"^ {re.escape(knob)} ", page, re.MULTILINE), f"{knob} is not on the help page"
        if not isinstance(value, str) or "$" not in value:  # a default that depends on the machine
            line = re.findall(rf"^ {re.escape(knob)} (.*)", page, re.MULTILINE)[0]
            assert re.search(rf"(^|[ (,]){re.escape(shown)}\b", line) or shown == "[]", (knob, shown, line)
    for folder in (ROOT / "conf").iterdir():
        if folder.is_dir() and folder.name != "hydra":
            # A line, and those below it that are indented further.
            block = rf"^ +{folder.name} .*(?:\n {{20,}}.*)*"
            (line,) = re.findall(block, run.stdout.split("Groups")[1], re.MULTILINE)
            for option in folder.glob("*.yaml"):
                assert re.search(rf"\b{option.stem}\b", line), option


MISTAKES = {
    "window=0": "window must be an integer of at least 1, got 0",
    "window=two": "window must be an integer of at least 1, got 'two'",
    "beta=0": "beta must be a number above 0 and at most 1, got 0",
    "beta=1.5": "beta must be a number above 0 and at most 1, got 1.5",
    "tol=-1": "tol must be a number above 0, such as 1e-2, got -1",
    "adjoint.tol=-1": "adjoint.tol must be a number above 0, such as 1e-2, got -1",
    "adjoint.beta=a": "adjoint.beta must be a number above 0 and at most 1, got 'a'",
    "tol=inf": "tol must be a number above 0, such as 1e-2, got inf",
    "solver.ridge=a": "solver.ridge must be a number of at least 0 or null, got 'a'",
    "solver.check_every=0": "solver.check_every must be an integer of at least 1, got 0",
    "solver=null": "tutorial_anderson, tutorial_forward, got null; leave it out for the default",
    "optim.optimizer=null": "optim.optimizer cannot be null",
    "warm_start=0.5": "warm_start must be true or false, got 0.5",
    "stop=median": "stop must be one of max, mean, got 'median'",
    "max_iter=0": "max_iter must be an integer of at least 1, got 0",
    "regularization=none": "regularization must be one of scaled, absolute, got 'none'",
    "solver=newton": "solver must be one of anderson, broyden, forward, tutorial_anderson, tutorial_forward, got "
    "newton",
    "solver.history_dtype=fp8": "solver.history_dtype must be one of bfloat16 or null, got 'fp8'",
    "solver=broyden solver.memory=0": "solver.memory must be an integer of at least 1, got 0",
    "model=large": "model must be one of paper, small, got large",
    "windw=3": "there is no knob windw; did you mean window?",
    "solver.beat=1": "there is no knob solver.beat; did you mean solver.beta?",
    "data.root=DIR": "data.root is a knob of data=cifar10 and data=image_folder alone",
    "lr=0.1": "there is no knob lr; did you mean optim.lr?",
    "prob.repeats=5": "there is no knob prob.repeats; did you mean probe.repeats?",
    "adjoint.windw=5": "there is no knob adjoint.windw; did you mean adjoint.window?",
    "window": "cannot read 'window'; write KNOB=VALUE",
    "precision=fp8": "precision must be one of fp32, bf16, fp16, got 'fp8'",
    "device=tpu": "device must be auto, cpu, cuda or cuda:N, got 'tpu'",
    "device=null": "device must be auto, cpu, cuda or cuda:N, got null",
    "device=cuda:99": "device=cuda:99: torch sees",
    "cuda_graph=true device=cpu": "cuda_graph=true needs a CUDA or ROCm device, this run is on cpu: use",
    "cuda_graph=true compact=true": "cuda_graph=true cannot replay evaluations that shrink",
    "resume=nowhere": "there is no file or folder nowhere",
    "resume=3": "there is no file or folder 3",
    "hydra.run.dir=/dev/null/run": "the run folder /dev/null/run cannot be made (Not a directory)",
    "data=image_folder": "data.root is not set; give data.root=DIR",
    "model.groups=7": "model.channels must be a multiple of model.groups=7",
    "model.init_std=a": "model.init_std must be a number above 0, such as 0.01, got 'a'",
    "model.init_std=nan": "model.init_std must be a number above 0, such as 0.01, got nan",
    "model.channels=null": "model.channels must be an integer of at least 1, got null",
    "data.augment=null": "data.augment must be one of none, crop, crop_flip, got null",
    "gradient=phantom gradient.damping=2": "damping must be above 0 and at most 1, got 2",
    "gradient=unrolled gradient.steps=0": "steps must be a whole number of evaluations of f, at least 1, got 0",
    "logger.mode=of": "logger.mode must be one of auto, online, offline, disabled, got 'of'",
    "logger.timeout=a": "logger.timeout must be a number of at least 1, in seconds, got 'a'",
    "logger.tags=a": "logger.tags must be a list, such as [first,second], got 'a'",
    "logger.name=3": "logger.name must be a text or null, got 3",
    "++solver.windw=1": "there is no knob solver.windw; did you mean solver.window?",
    # Every name and option that is refused before Hydra looks is in tests/deq/cli/test_arguments.py.
    "~probe": "~probe deletes what the program reads; leave it out for the default, or write probe=null",
    "~nothere": "there is no knob nothere; `python train.py --help` lists them",
    "+windw=3": "there is no knob windw; did you mean window?",
    "+window=3": "window is there already: write window=VALUE, without +",
    "+solver=broyden": "solver is there already: write solver=VALUE, without +",
    "++experiment=smoke": "experiment is there already: write experiment=VALUE, without +",
    "+hydra/launcher=basic": "hydra/launcher is there already: write hydra/launcher=VALUE, without +",
    "+solver.memory=3": "solver.memory is a knob of solver=broyden alone",
    "+optim.optimizer.betas=[0.9,2]": "optim.optimizer cannot be made (Invalid beta parameter at index 1: 2); mend ",
    "+optim.optimizer.eps=small": "optim.optimizer cannot be made ('<=' not supported between",
    "optim.optimizer._target_=torch.optim.SGD +optim.optimizer.amsgrad=true": "there is no knob optim.optimizer.am",
    "optim.optimizer._target_=torch.nothere": "optim.optimizer._target_: there is no torch.nothere to import; leave it",
    "solver._target_=builtins.dict": "solver._target_ must make a Solver, got a dict; leave it out for the default",
    "model._target_=torch.nn.Linear": "model._target_ cannot take the knobs of model (Linear.__init__() got an unexpec",
    "model._target_=builtins.dict": "model._target_ must make an EquilibriumModel, got a dict; leave it out for the de",
    "data._target_=builtins.dict": "data._target_ must make an ImageData, got a dict; leave it out for the default",
    "data._target_=os.getcwd": "data._target_ cannot take the knobs of data (posix.getcwd() takes no keyword arguments",
    "data=image_folder data.root=null": "data.root is not set; give data.root=DIR",
    "hydra.job_logging.root.level=FOO": "hydra.job_logging or hydra.hydra_logging cannot be used (Unknown level: 'FOO'",
    "-m hydra.job_logging.root.level=FOO": "hydra.job_logging or hydra.hydra_logging cannot be used (Unknown level",
    "-m hydra.launcher._target_=a.B": "a.B is no plugin of Hydra's; write hydra/launcher=OPTION or hydra/sweeper=OPTIO",
    "hydra.output_subdir=.hydra window=-1": "window must be an integer of at least 1, got -1",
    "hydra.output_subdir=.hydra hydra/job_logging=default window=-1": "window must be an integer of at least 1, got -1",
    "-m 'hydra.sweep.subdir=${nothere}'": "there is no knob nothere",
    "-m hydra.sweep.dir=/dev/null/x": "the sweep folder /dev/null/x cannot be made (Not a directory); give another "
    "hydra.sweep.dir",
    "-m hydra.sweeper.max_batch_size=abc": "hydra.sweeper.max_batch_size must be an integer of at least 1 or null, got",
    "-m 'hydra.sweeper.params={+foo:\"1,2\"}'": "there is no knob foo",
    "-m hydra.run.dir=a": "hydra.run.dir=a is the folder of one run, and this is a sweep; give hydra.sweep.dir=a",
    "hydra.mode=MULTIRUN hydra.run.dir=a": "hydra.run.dir=a is the folder of one run, and this is a sweep; give hydra.",
    "hydra.sweep.dir=a": "hydra.sweep.dir=a is the folder of a sweep, and this is one run; give hydra.run.dir=a, or ad",
    "--cfg hydra --package solver": "--package solver: it is no part of Hydra's config; write --cfg job",
    "probe._target_=os.system": "probe: Target 'os.system' is blocklisted",
    "gradient.solver=3": "gradient.solver cannot be 3; leave it out, and give adjoint.KNOB=VALUE",
    "probe=3": "probe cannot be 3; leave it out for the default, or write probe=null",
    "energy=true": "energy cannot be true; leave it out for the default, or write energy=null",
    "probe=[1]": "probe=[1]: Cannot merge DictConfig with ListConfig",
    "probe=null ++probe.repeats=3": "probe is null here and cannot have repeats; leave probe=null out",
    "adjoint=null ++adjoint.tol=1e-3": "adjoint is null here and cannot have tol; leave adjoint=null out",
    "hydra=null": "hydra must be one of default, got null; leave it out for the default",
    "solver=": "tutorial_anderson, tutorial_forward, got ''",
    "window=2,3": "window=2,3 has several values: add -m for a sweep over them, or write window=[2,3] for a list or "
    "\"window='2,3'\" for a text",
    "window=range(2,4)": "window=range(2,4) has several values: add -m for a sweep over them",
    "-m hydra.sweep.dir=a,b": "hydra.sweep.dir=a,b has several values, which it cannot; for one text write "
    "\"hydra.sweep.dir='a,b'\"",
    "-m hydra.sweeper.params=3": "hydra.sweeper.params must be knobs with their values, such as {window: '2,5'}, got 3",
    "-m hydra.sweeper.grids=[3]": "hydra.sweeper.grids must be knobs with their values, such as [{window:",
    "-m window=range(3,3)": "window=range(3,3) stands for no value, so there is no job; give one at least",
    "hydra.mode=both": "hydra.mode=both: Invalid value 'both', expected one of [RUN, MULTIRUN]",
    "hydra.job.env_set.NAME=1": "there is no hydra.job.env_set.NAME yet; write +hydra.job.env_set.NAME=1 to add it",
    "+hydra.callbacks.mine._target_=nothere": "hydra.callbacks.mine._target_: there is no nothere to import; leave it",
    "window=${nothere}": "there is no knob nothere; `python train.py --help` lists them",
    "window=${nothere:3}": "Unsupported interpolation type nothere",
    "hydra.run.dir=${oc.env:NOTHERE}": "Environment variable 'NOTHERE' not found",
    "resume=a=b": "and a text with such characters in quotes of two kinds: \"resume='a=b'\"",
    "\"resume='a=b, (c) é'\"": "resume=a=b, (c) é: there is no file or folder a=b, (c) é; give the run folder of an",
    "--nothere": "there is no option --nothere; `python train.py --hydra-help` lists the options",
    "--config-name nothere": "there is no config nothere; `python train.py --info searchpath` lists the folders",
    "--cfg job --package nothere": "--package nothere: there is no knob nothere",
    "--shell-completion": "--shell-completion: Expecting one subcommand from ['install', 'uninstall', 'query'] to be",
}

if importlib.util.find_spec("optuna"):  # its sweeper has a place that OmegaConf cannot put anything into
    MISTAKES["hydra/sweeper=optuna +hydra.sweeper.params.window=3"] = "window=3 does not fit into the config ("
    MISTAKES["experiment=tune hydra.sweeper.n_jobs=0"] = "hydra.sweeper.n_jobs must be an integer of at least 1, got 0"
    MISTAKES["experiment=tune hydra.sweeper.storage=foo://x"] = "hydra.sweeper cannot be used (Can't load plugin"

DRIVER = """
import contextlib, io, json, shlex, sys
from pathlib import Path
import train
from deq.cli.command import launch
told = {}
for override in json.loads(sys.argv[1]):
    sys.argv = ["train.py", "logger=none", "max_steps=1", *shlex.split(override)]
    import os; os.environ.pop("HYDRA_FULL_ERROR", None)
    with contextlib.redirect_stderr(io.StringIO()) as shown, contextlib.redirect_stdout(shown):
        try:
            launch(train.main, conf=Path(train.__file__).parent / "conf"); status = 0
        except SystemExit as stop:
            status = stop.code
    told[override] = [status, shown.getvalue()]
print(json.dumps(told))
"""


def test_a_mistake_is_told_in_one_sentence_before_any_work_and_leaves_no_folder(tmp_path: Path) -> None:
    run = python("-c", DRIVER, json.dumps(list(MISTAKES)), folder=tmp_path)  # one process, or this takes minutes
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    for override, sentence in MISTAKES.items():
        status, shown = told[override]
        shown = "".join(line for line in shown.splitlines(True) if "[HYDRA]" not in line)  # a sweep tells its jobs
        assert status == 2, (override, shown)
        assert shown.startswith("error: "), (override, shown)
        assert shown.count("\n") == 1, (override, shown)
        assert sentence in shown, (override, shown)
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    assert train(*TINY, "-m", "window=0,-1", folder=tmp_path).returncode == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_refused_unless_that_run_goes_on_as_it_is_told(tmp_path: Path) -> None:
    name = "run, (1) é"  # has to be quoted for Hydra and for the shell
    knobs = [*TINY, "probe=null", "optim.schedule=constant", f"hydra.run.dir='{name}'"]
    first = train(*knobs, "max_steps=1", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    before = {file: file.read_bytes() for file in (tmp_path / name).iterdir()}
    refused = train(*knobs, "max_steps=2", folder=tmp_path)
    assert refused.returncode == 2
    told = (
        f"error: {name} holds an earlier run; give another hydra.run.dir, delete that folder, or go on with its run: "
    )
    assert refused.stderr.startswith(told)
    assert {file: file.read_bytes() for file in (tmp_path / name).iterdir()} == before
    (resume,) = shlex.split(refused.stderr.removeprefix(told))
    resumed = train(*knobs, "max_steps=2", resume, folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in rows(tmp_path / name)] == [1, 2]


def test_a_failed_job_of_a_sweep_is_told_as_it_fails_and_the_others_run(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *TINY, "probe=null", "window=0,2", "hydra.sweep.dir=sweep"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stdout
    failure, success = run.stdout.index("window must be an integer of at least 1, got 0"), run.stdout.index("accuracy")
    assert failure < success
    assert re.search(r"^error: job 0 \(.*window=0\): window must be", run.stdout, re.MULTILINE)
    assert run.stdout.splitlines()[-1] == "error: 1 of 2 jobs failed: 0"
    assert "Traceback" not in run.stdout
    assert [file.parent.name[0] for file in (tmp_path / "sweep").glob("*/summary.json")] == ["1"]
    assert len(list((tmp_path / "sweep").iterdir())) == 3  # the job's folder, multirun.yaml and sweep.json


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run on the device")
@pytest.mark.parametrize("node", ["solver", "adjoint"])
def test_a_backend_that_the_device_lacks_is_told_before_any_work(node: str, tmp_path: Path) -> None:
    run = train(*TINY, f"{node}.backend=triton", folder=tmp_path, TRITON_INTERPRET="0")
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {node}.backend='triton' runs on a CUDA or ROCm device, got device 'cpu'")
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""


def test_a_run_without_the_probe_has_everything_but_the_speedup(tmp_path: Path) -> None:
    run = train(*TINY, "probe=null", "hydra.run.dir=run", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "speedup probe" not in run.stdout
    assert summary(tmp_path / "run")["test/accuracy"] > 0
    assert not [name for name in summary(tmp_path / "run") if name.startswith("speedup/")]


FULL_DISK = """
import resource, sys
from pathlib import Path
import train
from deq.cli.command import launch
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)  # no file may be larger: a disk that is full
launch(train.main, conf=Path(train.__file__).parent / "conf")
"""


@pytest.mark.parametrize(("size", "file"), [(100_000, "checkpoint.pt"), (100, "config.yaml")])
def test_a_full_disk_is_told_in_one_sentence_and_leaves_no_half_file(size: int, file: str, tmp_path: Path) -> None:
    run = python_anew("-c", FULL_DISK, str(size), *TINY, "hydra.run.dir=run", folder=tmp_path)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: ")
    assert f"run/{file} cannot be written (File too large); make room or give another hydra.run.dir" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list((tmp_path / "run").glob(".*.part"))


def test_data_brings_its_default_model_and_an_explicit_one_wins(tmp_path: Path) -> None:
    code = """
import hydra, sys
with hydra.initialize_config_dir(sys.argv[1], version_base="1.3"):
    for overrides in ([], ["data=cifar10"], ["data=cifar10", "model=small"], ["model=paper", "window=7", "tol=0.3"]):
        c = hydra.compose("config", overrides)
        print(c.model.channels, c.epochs, c.gradient.solver.window, c.adjoint.tol)
"""
    run = python("-c", code, str(ROOT / "conf"), folder=tmp_path)
    small, paper = (OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").channels for name in ("small", "paper"))
    channels = [int(line.split()[0]) for line in run.stdout.splitlines()]
    assert channels == [small, paper, small, paper], run.stderr
    assert run.stdout.splitlines()[3].split()[2:] == ["7", "0.3"]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
import train
from deq.cli.command import launch

save, saves = torch.save, 0

def half_of_the_second(content, file):
    global saves
    saves += 1
    if saves == 2:
        import io
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file)

torch.save = half_of_the_second
launch(train.main, conf=Path(train.__file__).parent / "conf")
"""


def test_a_run_killed_while_writing_a_checkpoint_resumes_from_the_previous_one(tmp_path: Path) -> None:
    knobs = ["logger=none", "epochs=3", "data.train_size=100", "data.test_size=20", "data.augment=crop"]
    killed = python("-c", KILLED_WHILE_SAVING, *knobs, "hydra.run.dir=killed", folder=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / ".checkpoint.pt.part").stat().st_size > 0
    resumed = train(*knobs, "resume=killed", "hydra.run.dir=resumed", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [line.split()[0] for line in resumed.stdout.splitlines() if re.match(r" *\d/3 ", line)] == ["2/3", "3/3"]
    whole = train(*knobs, "hydra.run.dir=whole", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "whole")) == 3


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_and_says_how_to_go_on(signum: int, status: int, tmp_path: Path) -> None:
    knobs = ["logger=none", "epochs=2000", "data.train_size=100", "data.test_size=20", "log_every=1"]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *knobs, "hydra.run.dir=run"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    run.send_signal(signum)
    stdout, stderr = run.communicate(timeout=200)
    assert run.returncode == status, stderr
    assert stderr == ""
    assert f"stopped by {signal.Signals(signum).name} at step" in stdout
    assert "epochs=2000" in stdout.splitlines()[-1]
    assert "resume=run" in stdout.splitlines()[-1]
    assert summary(tmp_path / "run")["train/loss"] > 0
    assert (tmp_path / "run" / "checkpoint.pt").is_file()


def test_a_run_whose_reader_goes_trains_on_and_says_so_on_a_terminal_of_ascii(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TINY, "probe=null", "hydra.run.dir=run"],
        cwd=tmp_path, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert "parameters - digits, 100 + 20 images - " in run.stdout.readline()
    run.stdout.close()  # as `| head -1` does
    _, stderr = run.communicate()
    assert run.returncode == 0
    assert stderr == (
        "warning: standard output is lost (nobody reads it any more); the run goes on, its files are complete without "
        "it\n"
    )
    assert summary(tmp_path / "run")["test/accuracy"] > 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    "program",
    [
        [str(ROOT / "train.py"), "--help"],
        [str(ROOT / "train.py"), "--cfg", "job"],
        ["-m", "deq.report", "--help"],
        ["-m", "deq.records.dashboard", "--project", "mine", "--dry-run"],
    ],
    ids=lambda program: program[-1],
)
def test_a_page_that_nobody_reads_ends_quietly_as_a_shell_expects(program: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, *program], cwd=tmp_path, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")  # 128 + SIGPIPE
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_torch_is_imported_ends_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py")],
        cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "importing\n"
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=200)
    assert run.returncode == -signal.SIGINT  # 130 in a shell
    assert stderr == ""


WITHOUT_WANDB = """
import sys
from pathlib import Path
sys.modules["wandb"] = None  # as if it were not installed
import train
from deq.cli.command import launch
launch(train.main, conf=Path(train.__file__).parent / "conf")
"""


def test_wandb_is_needed_only_where_it_is_asked_for(tmp_path: Path) -> None:
    without = python_anew("-c", WITHOUT_WANDB, *TINY, "logger=none", "hydra.run.dir=none", folder=tmp_path)
    assert (without.returncode, without.stderr) == (0, "")
    asked = python_anew("-c", WITHOUT_WANDB, *TINY, "logger=wandb", "hydra.run.dir=asked", folder=tmp_path)
    assert asked.returncode == 0
    assert asked.stderr.startswith("warning: W&B failed at start (")
    assert asked.stderr.count("\n") == 1
    assert summary(tmp_path / "asked")["test/accuracy"] > 0


def test_the_folder_that_a_run_names_can_be_given_back_as_it_stands(tmp_path: Path) -> None:
    knobs = [*TINY, "optim.schedule=constant", "logger.name='é=1, (a)'"]  # of which the folder is named
    first = train(*knobs, "max_steps=2", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "runs").glob("*/*")
    again = train(*knobs, "max_steps=4", f"resume={folder.relative_to(tmp_path)}", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "runs").glob("*/*"))) == 2
