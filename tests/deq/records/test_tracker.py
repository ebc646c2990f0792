"""Files of a run, and W&B that may fail but never ends one."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf
from wandb.sdk import wandb_setup

from deq.records import wandb_run
from deq.records.errors import UserError
from deq.records.tracker import Tracker, environment, state_of
from deq.records.wandb_run import WandbOptions
from tests.offline_run import read

OFF = WandbOptions(mode="disabled")


@pytest.fixture(autouse=True)
def _a_user_without_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No variable of W&B, no login, no settings file; and W&B reads the environment anew in every test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "nobody"))
    monkeypatch.delenv("NETRC", raising=False)
    for remembered in ("_unreachable", "_left_out"):
        monkeypatch.setattr(wandb_run, remembered, set[str]())
    yield
    wandb.teardown()


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


def put_in_place_of_init(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    """W&B's own process, which would take longer to start than the test, is then not needed."""
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_setup._WandbSetup, "ensure_service", lambda self: None)


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
        ("online", "offline", True, "online"),
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
        asked.setdefault("mode", kwargs["mode"])
        raise RuntimeError("far enough")

    monkeypatch.setattr(wandb_run, "_try_to_connect", lambda url, seconds: None)
    monkeypatch.setattr(wandb, "login", login)
    put_in_place_of_init(monkeypatch, init)
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
    time.sleep(60)


@pytest.mark.parametrize("misbehave", [raises, hangs])
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_is_one_warning_and_the_run_goes_on(
    broken: str, misbehave: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place_of_init(monkeypatch, misbehave if broken == "init" else lambda **_: BrokenRun(broken, misbehave))
    start = time.monotonic()
    warnings = run_of_two_rows(tmp_path, WandbOptions(mode="offline", timeout=1))
    assert time.monotonic() - start < 40
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
    for much in (86401, 1e10, float("inf")):
        with pytest.raises(UserError, match=rf"timeout must be at most 86400 seconds, which is a day, got {much}"):
            WandbOptions(timeout=much)
    for knob in ("project", "name", "group"):
        with pytest.raises(UserError, match=rf"logger.{knob} must be a text.*, got ' '"):
            WandbOptions(**{knob: " "})
    for tag, words in ((None, "null"), (["a"], r"\['a'\]"), (True, "true")):
        with pytest.raises(UserError, match=f"each of logger.tags must be a text, such as first, got {words}"):
            WandbOptions(tags=["first", tag])
    with pytest.raises(UserError, match=r"logger.project must have at most 128 characters, none of / .*, got 'a/b'"):
        WandbOptions(project="a/b")
    with pytest.raises(UserError, match=r"each of logger.tags must have 1 to 64 characters, got ''"):
        WandbOptions(tags=["first", ""])


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
    killed = tmp_path / "wandb" / "offline-run-1"
    killed.mkdir(parents=True)
    tracker(tmp_path, anew=True).log(1, 1, {"train/loss": 3.0})
    assert [row["train/loss"] for row in rows(tmp_path)] == [3.0]
    assert not killed.exists()


def test_what_says_finished_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tracker(tmp_path)
    run.status("running", 1, 2)

    def full(path: Path, text: str) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("deq.records.tracker._write_text", full)
    with pytest.raises(UserError):
        run.finish({"test/accuracy": 0.5})
    assert state_of(tmp_path) == "running"


THEIRS = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "name", "WANDB_RUN_GROUP": "group", "WANDB_TAGS": "one, two"}
MINE = WandbOptions(project="mine", name="my name", group="my group", tags=["my tag"])


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({}, WandbOptions(), ("anderson-deq", "folder", "sweep", ["digits"])),
        (THEIRS, WandbOptions(), ("theirs", "name", "group", ["digits", "one", "two"])),
        (THEIRS, MINE, ("mine", "my name", "my group", ["digits", "my tag"])),
        (THEIRS, WandbOptions(tags=[]), ("theirs", "name", "group", ["digits"])),
        (dict.fromkeys(THEIRS, " "), WandbOptions(), ("anderson-deq", "folder", "sweep", ["digits"])),
    ],
    ids=["default", "environment", "knobs", "no tags", "blank"],
)
def test_a_knob_goes_before_the_environment_which_goes_before_the_default(
    variables: dict[str, str], options: WandbOptions, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    put_in_place_of_init(monkeypatch, lambda **kwargs: (asked.update(kwargs), BrokenRun("nothing", raises))[1])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_of_two_rows(tmp_path / "folder", options, group="sweep", tags=("digits",)) == []
    assert (asked["project"], asked["name"], asked["group"], asked["tags"]) == expected


def test_a_project_in_the_settings_file_of_wandb_goes_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings").write_text("[default]\nproject = theirs\n")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    asked: dict[str, Any] = {}
    put_in_place_of_init(monkeypatch, lambda **kwargs: (asked.update(kwargs), BrokenRun("nothing", raises))[1])
    assert run_of_two_rows(tmp_path, WandbOptions()) == []
    assert asked["project"] == "theirs"


def test_what_no_knob_is_for_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENTITY", "NOTES", "JOB_TYPE", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", name.lower())
    for name, value in {"CONSOLE": "off", "SILENT": "true", "INIT_TIMEOUT": "30"}.items():  # as it is anyway
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert run_of_two_rows(tmp_path, WandbOptions()) == []
    run = read(tmp_path)
    assert (run.entity, run.notes, run.job_type, run.id) == ("entity", "notes", "job_type", "run_id")


def test_files_lie_where_wandb_dir_says_and_are_found_from_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, folder = tmp_path / "their place", tmp_path / "run"
    monkeypatch.setenv("WANDB_DIR", str(place))
    first = tracker(folder, WandbOptions())
    first.log(1, 1, {"train/loss": 2.0})
    first.finish({}, state="interrupted")
    (there,) = place.glob("wandb/offline-run-*")
    assert first.wandb_note == f"offline; upload with: wandb sync '{there}'"  # to be copied to a shell
    assert len(read(folder).rows) == 1

    second = tracker(folder, WandbOptions())
    second.restore(first.rows)
    second.log(2, 1, {"train/loss": 1.0})
    second.finish({})
    assert len(read(folder).rows) == 2
    assert len(list(place.glob("wandb/offline-run-*"))) == 1
    assert len(list(place.glob("wandb/superseded-offline-run-*"))) == 1


def test_a_wandb_dir_that_cannot_be_written_is_told_and_the_run_folder_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file" / "below"))
    folder = tmp_path / "run"
    assert run_of_two_rows(folder, WandbOptions()) == [
        f"WANDB_DIR={tmp_path}/file/below cannot be written; W&B's files are in {folder}/wandb; give another folder"
    ]
    assert len(read(folder).rows) == 2


@pytest.mark.parametrize(("value", "disabled"), [("true", True), ("1", True), ("false", False), ("", False)])
def test_wandb_disabled_is_heeded_though_wandb_itself_has_dropped_it(
    value: str, disabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DISABLED", value)
    put_in_place_of_init(monkeypatch, lambda **_: BrokenRun("nothing", raises))
    assert (tracker(tmp_path, WandbOptions()).wandb_note is None) == disabled


REFUSED = {
    "WANDB_API_KEY": (" secret", "API key cannot start or end with whitespace"),
    "WANDB_BASE_URL": ("wandb", "Input should be a valid URL, relative URL without a base"),
    "WANDB_RUN_ID": ("a/b", "Run ID cannot contain the characters: :;,#?/'"),
    "WANDB_SILENT": ("maybe", "Input should be a valid boolean, unable to interpret input"),
}


def test_a_variable_that_wandb_does_not_take_is_told_and_the_run_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    for name, (value, _) in REFUSED.items():
        monkeypatch.setenv(name, value)
    shown = {name: name if name == "WANDB_API_KEY" else f"{name}={value}" for name, (value, _) in REFUSED.items()}
    assert run_of_two_rows(tmp_path / "first", WandbOptions()) == [
        f"W&B does not take {shown[name]} ({why}); this run is kept offline without it, and so are those after it in a "
        "sweep; mend it or unset it"
        for name, (_, why) in REFUSED.items()
    ]
    assert len(read(tmp_path / "first").rows) == 2
    assert run_of_two_rows(tmp_path / "second", WandbOptions()) == []  # above all not to another address
    assert len(read(tmp_path / "second").rows) == 2


def test_a_variable_that_is_not_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "CONSOLE=wrap": "W&B does not record this program's terminal",
        "INIT_TIMEOUT=300": "give logger.timeout, the seconds that one call to W&B may take",
        "REINIT=return_previous": "every run is one of its own in W&B",
        "RESUME=must": "only W&B's server knows how far a run has come",
        "SILENT=false": "W&B prints nothing on this program's terminal",
        "SWEEP_ID=abc": "has a project already",
    }
    for variable in variables:
        monkeypatch.setenv(*f"WANDB_{variable}".split("="))
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    warnings = run_of_two_rows(tmp_path, WandbOptions(project="mine"), group="sweep")
    assert warnings == [
        *(f"WANDB_{one} is not used: {variables[one]}" for one in ("CONSOLE=wrap", "INIT_TIMEOUT=300")),
        f"WANDB_REINIT=return_previous is not used: {variables['REINIT=return_previous']}",
        f"WANDB_SILENT=false is not used: {variables['SILENT=false']}",
        "WANDB_RUN_ID=one is not used in a sweep: every job is a run of its own",
        "logger.project=mine is not used: WANDB_SWEEP_ID=abc has a project already",
        f"WANDB_RESUME=must is not used offline: {variables['RESUME=must']}",
    ]


def test_a_run_after_one_that_wandb_hung_on_is_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where W&B comes to itself in the meantime."""
    warnings: list[str] = []
    before = set(threading.enumerate())
    first = tracker(tmp_path / "first", WandbOptions(), warnings)
    come_to_itself = threading.Event()
    assert first._wandb is not None
    monkeypatch.setattr(first._wandb._run, "finish", lambda **_: come_to_itself.wait(60))
    monkeypatch.setattr(first._wandb, "_timeout", 0.2)
    first.finish({})
    assert warnings == [
        "W&B failed at finish (no answer in 0.2 s); the run goes on, and its files are complete without it"
    ]
    second = tracker(tmp_path / "second", WandbOptions())
    second.log(1, 1, {"train/loss": 2.0})
    come_to_itself.set()
    (hung,) = [one for one in set(threading.enumerate()) - before if one.name == "wandb-finish"]
    hung.join()
    second.log(2, 1, {"train/loss": 1.0})
    second.finish({"test/accuracy": 0.5})
    run = read(tmp_path / "second")
    assert ([row["step"] for row in run.rows], run.exit_code) == ([1, 2], 0)


@contextmanager
def server(status: int = 200) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """A W&B on this machine: its address. It takes runs, or answers ``status`` to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"]))
            answer: dict[str, Any] = {"errors": [{"message": "user is not logged in"}]}
            if status == 200:
                answer = {"data": self.data(json.loads(asked))} if self.path == "/graphql" else {}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_POST  # noqa: N815  # the names that http.server calls

        def data(self, asked: dict[str, Any]) -> dict[str, Any]:
            if "upsertBucket" in asked["query"]:
                project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "someone"}}
                run = {"id": "1", "name": asked["variables"]["name"], "project": project, "historyLineCount": 0}
                return {"upsertBucket": {"bucket": run, "inserted": True}}
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", running
    finally:
        running.shutdown()
        running.server_close()


@contextmanager
def nobody(behaviour: str) -> Iterator[str]:
    """An address where no W&B is: a ``closed`` port, one that is ``mute``, or one that lets packets ``vanish``."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = listening.getsockname()
        waiting = [socket.socket() for _ in range(3 if behaviour == "vanish" else 0)]
        if behaviour != "closed":
            listening.listen(0 if behaviour == "vanish" else 9)
        for client in waiting:  # a queue that is full: the kernel drops what comes next, as a firewall does
            client.setblocking(False)
            client.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}"
        for client in waiting:
            client.close()


def log_in(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", url)


OUT_OF_REACH = {
    "closed": (30, "cannot be reached \\(Connection refused\\)", "look at the network and WANDB_BASE_URL"),
    "vanish": (1.5, "cannot be connected to in 0.5 s", "where the network is only slow, give .* more than 1.5 s"),
    "mute": (1, "did not begin this run in 1 s \\(.*\\)", "where the network is only slow, give .* more than 1 s"),
}


@pytest.mark.parametrize("behaviour", OUT_OF_REACH)
def test_a_wandb_out_of_reach_is_told_once_and_runs_are_whole_offline(
    behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if behaviour == "vanish" and sys.platform != "linux":
        pytest.skip("other systems refuse a connection where the queue is full")
    timeout, what, mend = OUT_OF_REACH[behaviour]
    with nobody(behaviour) as url:
        log_in(monkeypatch, url)
        begin = time.monotonic()
        warnings = run_of_two_rows(tmp_path / "first", WandbOptions(timeout=timeout))
        assert time.monotonic() - begin < 25
        # The next job of a sweep neither waits nor tells it again.
        asked: list[str] = []
        monkeypatch.setattr(wandb_run, "_try_to_connect", lambda url, seconds: asked.append(url))
        warnings += run_of_two_rows(tmp_path / "second", WandbOptions(timeout=timeout))
    assert asked == []
    (told,) = warnings
    kept = "this run is kept offline, and so are those after it in a sweep"
    assert re.fullmatch(f"W&B at {re.escape(url)} {what}; {kept}; {mend}", told)
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert [row["step"] for row in read(folder).rows] == [1, 2]
        assert not list(folder.glob("wandb/run-*"))  # W&B's own record of a run that did not come to be


@pytest.mark.parametrize(("key", "status"), [("0123456789" * 4, 401), ("short", 200)], ids=["unknown", "short"])
def test_a_login_that_wandb_does_not_take_is_told_and_the_run_is_whole_offline(
    key: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(status) as (url, _):
        log_in(monkeypatch, url)
        monkeypatch.setenv("WANDB_API_KEY", key)
        (told,) = run_of_two_rows(tmp_path, WandbOptions())
    if status == 200:
        assert told == (
            "W&B cannot use this login (WANDB_API_KEY invalid: API key must have 40+ characters, has 5); this run is "
            "kept offline; mend WANDB_API_KEY, or run `wandb login --relogin`"
        )
    else:
        assert told == (
            f"W&B at {url} refused this run (user is not logged in); it is kept offline; look at WANDB_API_KEY, "
            "WANDB_ENTITY and logger.project"
        )
    assert [row["step"] for row in read(tmp_path).rows] == [1, 2]
    assert not list(tmp_path.glob("wandb/run-*"))


def test_a_run_is_online_where_wandb_answers_and_the_knob_goes_before_wandb_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server() as (url, _):
        log_in(monkeypatch, url)
        monkeypatch.setenv("WANDB_MODE", "offline")
        warnings: list[str] = []
        run = tracker(tmp_path, WandbOptions(mode="online"), warnings)
        run.finish({})
    assert warnings == []
    assert str(run.wandb_note).startswith(f"{url}/someone/")


def test_a_network_that_is_lost_on_the_way_leaves_a_whole_record_to_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    with server() as (url, running):
        log_in(monkeypatch, url)
        run = tracker(tmp_path, WandbOptions(timeout=2), warnings)
        run.log(1, 1, {"train/loss": 2.0})
        running.shutdown()
        running.server_close()
        run.log(2, 1, {"train/loss": 1.0})
        run.finish({"test/accuracy": 0.5})
    (there,) = tmp_path.glob("wandb/run-*")
    assert warnings == [f"W&B did not take all of this run in 2 s; upload with: wandb sync {there}"]
    assert run.wandb_note == f"not all of it; upload with: wandb sync {there}"
    recorded = read(tmp_path, "run")
    assert [row["step"] for row in recorded.rows] == [1, 2]
    assert (recorded.summary["test/accuracy"], recorded.exit_code) == (0.5, 0)
