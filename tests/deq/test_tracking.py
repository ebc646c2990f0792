"""Files of a run, and W&B that may fail but never ends one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf

from deq.errors import UserError
from deq.tracking import Tracker, WandbOptions, environment, state_of

OFF = WandbOptions(mode="disabled")


def tracker(folder: Path, options: WandbOptions = OFF, warnings: list[str] | None = None, **more: Any) -> Tracker:
    shown = warnings if warnings is not None else []
    return Tracker(folder, {"window": 5, "solver": {"tol": 0.01}}, warn=shown.append, options=options, **more)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_of_two_rows(folder: Path, options: WandbOptions, **more: Any) -> list[str]:
    """A whole run; returns the warnings."""
    warnings: list[str] = []
    run = tracker(folder, options, warnings, **more)
    run.log(1, 1, {"train/loss": 2.0})
    run.log(2, 1, {"train/loss": 1.0, "test/accuracy": 0.5})
    run.finish({"test/accuracy": 0.5})
    return warnings


def offline_run(folder: Path) -> bytes:
    """The one offline run in a run folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return file.read_bytes()


def test_files_are_whole_without_wandb(tmp_path: Path) -> None:
    assert run_of_two_rows(tmp_path, OFF) == []
    assert rows(tmp_path) == [
        {"step": 1, "epoch": 1, "train/loss": 2.0},
        {"step": 2, "epoch": 1, "train/loss": 1.0, "test/accuracy": 0.5},
    ]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"test/accuracy": 0.5}
    assert OmegaConf.load(tmp_path / "config.yaml") == {"window": 5, "solver": {"tol": 0.01}}
    assert "machine" in json.loads((tmp_path / "environment.json").read_text())
    assert not (tmp_path / "wandb").exists()


def test_a_name_outside_the_list_is_refused(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    with pytest.raises(ValueError, match=r"train/lost"):
        run.log(1, 1, {"train/lost": 1.0})
    with pytest.raises(ValueError, match=r"speedup"):
        run.finish({"speedup": 2.0})
    assert rows(tmp_path) == []


def test_nan_is_written_as_null_because_json_has_no_nan(tmp_path: Path) -> None:
    tracker(tmp_path).log(1, 1, {"train/loss": float("nan")})
    assert rows(tmp_path)[0]["train/loss"] is None


def test_a_resumed_run_begins_with_the_rows_of_the_first(tmp_path: Path) -> None:
    first = tracker(tmp_path / "first")
    first.log(1, 1, {"train/loss": 2.0})
    second = tracker(tmp_path / "second")
    second.restore(first.rows)
    second.log(2, 1, {"train/loss": 1.0})
    assert [row["step"] for row in rows(tmp_path / "second")] == [1, 2]


def test_a_run_that_goes_on_in_its_own_folder_keeps_its_rows_until_they_are_restored(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    first.log(1, 1, {"train/loss": 2.0})
    second = tracker(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    second.restore(first.rows)
    second.log(2, 1, {"train/loss": 1.0})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_offline_is_the_default_and_needs_no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    asked: dict[str, Any] = {}
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **kwargs: (asked.update(kwargs), init(**kwargs))[1])
    assert run_of_two_rows(tmp_path, WandbOptions(tags=("mine",)), group="sweep", tags=("digits",)) == []
    assert (asked["mode"], asked["group"], asked["tags"]) == ("offline", "sweep", ["digits", "mine"])
    assert asked["config"]["window"] == 5
    assert {"machine", "code_version"} <= set(asked["config"])
    assert b"test/accuracy" in offline_run(tmp_path)


@pytest.mark.parametrize(
    ("mode", "variable", "logged_in", "expected"),
    [
        ("auto", "", True, "online"),
        ("auto", "", False, "offline"),
        ("auto", "offline", True, "offline"),
        ("auto", "dryrun", True, "offline"),
        ("auto", "run", True, "online"),
        ("auto", " Offline", True, "offline"),
        ("auto", "of", True, "offline"),
        ("offline", "online", True, "offline"),
        ("offline", "of", True, "offline"),
        ("online", "", False, "offline"),
    ],
)
def test_mode_is_decided_without_a_prompt(
    mode: str, variable: str, logged_in: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def login(*, prompt: bool, verify: bool) -> bool:
        assert not prompt
        assert not verify
        return logged_in

    def init(**kwargs: Any) -> None:
        asked.update(kwargs)
        raise RuntimeError("far enough")

    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", variable)
    run_of_two_rows(tmp_path, WandbOptions(mode=mode))
    assert asked["mode"] == expected


@pytest.mark.parametrize("variable", ["of", ""])
def test_a_mode_that_wandb_does_not_know_is_told_once_and_wandb_still_starts(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    monkeypatch.setenv("WANDB_MODE", variable)
    warnings = run_of_two_rows(tmp_path / "first", WandbOptions()) + run_of_two_rows(tmp_path, WandbOptions())
    told = ["WANDB_MODE must be online, offline or disabled, got 'of'; this run is kept offline"]
    assert warnings == (told if variable else [])
    assert b"test/accuracy" in offline_run(tmp_path)


def test_wandb_disabled_by_the_environment_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run_of_two_rows(tmp_path, WandbOptions()) == []
    assert not (tmp_path / "wandb").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_the_offline_file_is_complete_when_finish_returns(tmp_path: Path) -> None:
    run = tracker(tmp_path, WandbOptions(mode="offline"))
    for step in range(1, 2001):
        run.log(step, 1, {"train/loss": 1.0})
    run.finish({"test/accuracy": 0.5})
    at_once = offline_run(tmp_path)
    # W&B's own process, which writes the file, has ended.
    listed = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    assert not [pid for pid in listed if "wandb" in Path(f"/proc/{pid}/comm").read_text()]
    assert b"test/accuracy" in at_once


class BrokenRun:
    """A W&B run whose named method raises or hangs."""

    def __init__(self, broken: str, misbehave: Any) -> None:
        self.settings = type("Settings", (), {"sync_dir": "there"})()
        self.summary: dict[str, float] = {}
        self.log = misbehave if broken == "log" else lambda *_, **__: None
        self.finish = misbehave if broken == "finish" else lambda *_, **__: None


def raises(*_: Any, **__: Any) -> None:
    raise ConnectionError("the network is down\nand more")


def hangs(*_: Any, **__: Any) -> None:
    time.sleep(20)


@pytest.mark.parametrize("misbehave", [raises, hangs])
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_is_one_warning_and_the_run_goes_on(
    broken: str, misbehave: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", misbehave if broken == "init" else lambda **_: BrokenRun(broken, misbehave))
    start = time.monotonic()
    warnings = run_of_two_rows(tmp_path, WandbOptions(mode="offline", timeout=1))
    assert time.monotonic() - start < 10
    assert len(warnings) == 1
    assert warnings[0].startswith("W&B failed at")
    assert "\n" not in warnings[0]
    assert len(rows(tmp_path)) == 2
    assert (tmp_path / "summary.json").exists()


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"logger.mode must be one of auto, online, offline, disabled, got 'of'"):
        WandbOptions(mode="of")
    with pytest.raises(UserError, match=r"logger.timeout must be a number of at least 1, in seconds, got 0"):
        WandbOptions(timeout=0)


def test_environment_names_the_machine_and_the_versions() -> None:
    about = environment()
    assert set(about) == {"code_version", "command", "machine"}
    assert about["machine"]["torch"]
    assert about["machine"]["cpu"]


def test_a_run_that_goes_on_leaves_one_offline_run_to_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs the rows before it again, so that both would count in a group."""
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    offline = WandbOptions(mode="offline")
    first = tracker(tmp_path, offline)
    first.log(1, 1, {"train/loss": 2.0})
    first.finish({}, state="interrupted")
    second = tracker(tmp_path, offline)
    second.restore(first.rows)
    second.finish({})
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert len(list(tmp_path.glob("wandb/superseded-offline-run-*"))) == 1
    offline_run(tmp_path)


def test_a_run_that_begins_anew_leaves_no_rows_of_one_that_was_killed(tmp_path: Path) -> None:
    tracker(tmp_path).log(1, 1, {"train/loss": 2.0})
    tracker(tmp_path, anew=True).log(1, 1, {"train/loss": 3.0})
    assert [row["train/loss"] for row in rows(tmp_path)] == [3.0]


def test_what_says_finished_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tracker(tmp_path)
    run.status("running", 1, 2)

    def full(path: Path, text: str) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("deq.tracking._write_text", full)
    with pytest.raises(UserError):
        run.finish({"test/accuracy": 0.5})
    assert state_of(tmp_path) == "running"
