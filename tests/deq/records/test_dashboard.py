"""The W&B workspace: what is on it, that a real run fills it, and a command line that needs W&B to do anything."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
import wandb_workspaces.workspaces as ws
from omegaconf import OmegaConf
from wandb_workspaces.workspaces import internal

from deq.records import dashboard, metrics
from deq.records.tracker import Tracker
from deq.records.wandb_run import WandbOptions
from tests import offline_run
from tests.offline_run import OfflineRun
from tests.test_train import TINY, python, train

TABLES = {f"{key}_table" for key in dashboard.TRACES}
EVERYTHING = set(metrics.NAMES) | TABLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that was trained with W&B offline."""
    above = tmp_path_factory.mktemp("trained")
    options = ["logger=wandb", "logger.mode=offline", "logger.group=mine", "logger.tags=[first]"]
    run = train(*TINY, *options, "hydra.run.dir=run", folder=above)
    assert run.returncode == 0, run.stderr
    return above / "run"


@pytest.fixture(scope="module")
def run(folder: Path) -> OfflineRun:
    return offline_run.read(folder)


def specification(built: ws.Workspace) -> dict[str, Any]:
    """What W&B is sent."""
    content: dict[str, Any] = json.loads(built._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return content


def panels_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for section in spec["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def drawn(panel: dict[str, Any]) -> set[str]:
    """The metric names of a panel, its x axis among them, as W&B is sent them."""
    config = panel["config"]
    if panel["viewType"] == "Vega2":
        return set(re.findall(r'"tableKey", "value": "([^"]+)"', json.dumps(config)))
    axes = {config.get("xAxis", "_step"), config.get("yAxis", "_step")} - {"_step"}
    return set(config.get("metrics", [])) | {axis.removeprefix("summary:") for axis in axes}


def names_of(spec: dict[str, Any]) -> set[str]:
    return set().union(*map(drawn, panels_of(spec)))


def titles(logged: set[str]) -> set[str]:
    return {panel.title for section in dashboard.sections(logged) for panel in section.panels}


def test_every_metric_is_on_a_panel_and_no_panel_draws_another() -> None:
    assert names_of(specification(dashboard.workspace("entity", "project", EVERYTHING))) == EVERYTHING


def test_every_metric_that_the_list_of_runs_shows_exists() -> None:
    assert set(dashboard.COLUMNS) <= set(metrics.NAMES)


def test_a_real_run_fills_every_panel(run: OfflineRun) -> None:
    spec = specification(dashboard.workspace("entity", "project", run.logged))
    shown = panels_of(spec)
    assert len(shown) > 20
    for panel in shown:
        names = drawn(panel)
        assert names, panel
        if panel["viewType"] == "Run History Line Plot":  # a point needs both its coordinates in one row
            x = {panel["config"]["xAxis"]} - {"_step"}
            for name in names - x:
                assert any({name} | x <= row.keys() for row in run.history), (panel["config"]["chartTitle"], name)
        else:
            assert names <= run.summary.keys(), panel
    for key in dashboard.GROUPED_BY:
        assert OmegaConf.select(OmegaConf.create(run.config), key) is not None
    columns = spec["section"]["runSets"][0]["runFeed"]["columnOrder"]
    assert columns[0] == "run:displayName"
    assert {column.removeprefix("summary:") for column in columns[1:]} <= run.summary.keys()


def test_a_run_with_the_defaults_logs_what_the_dashboard_takes_it_to_log(run: OfflineRun) -> None:
    own = {name for name in run.logged if not name.startswith("_")} - {"step", "epoch"}
    # A machine with a counter logs these, too.
    assert own - dashboard.OPTIONAL == dashboard.default_names()
    assert dashboard.default_names() <= run.summary.keys()


def test_the_offline_file_holds_all_that_the_run_folder_holds(folder: Path, run: OfflineRun) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) > 1
    assert [{name: row[name] for name in own} for row, own in zip(run.rows, rows, strict=True)] == rows
    assert [row["_step"] for row in run.rows] == [row["step"] for row in rows]
    summary = json.loads((folder / "summary.json").read_text())
    assert {name: run.summary[name] for name in summary} == summary
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    about = json.loads((folder / "environment.json").read_text())
    assert {"code_version", "machine"} <= about.keys()
    expected = {**config, **about}  # type: ignore[dict-item]
    assert {key: run.config[key] for key in expected} == expected
    assert (run.project, run.name, run.group, run.exit_code) == ("anderson-deq", "run", "mine", 0)
    assert run.tags == ["anderson", "digits", "first", "small"]


@pytest.mark.parametrize("name", sorted(dashboard.OPTIONAL))
def test_a_panel_of_what_not_every_run_logs_is_there_if_and_only_if_some_run_logged_it(name: str) -> None:
    usual = dashboard.default_names()
    before = names_of(specification(dashboard.workspace("entity", "project", usual)))
    assert before == usual
    after = names_of(specification(dashboard.workspace("entity", "project", usual | {name})))
    assert after == usual | {name}


def test_nothing_named_joules_is_shown_where_no_counter_exists(run: OfflineRun) -> None:
    def says_joules(logged: set[str] | None) -> bool:
        return "joules" in json.dumps(specification(dashboard.workspace("entity", "project", logged)))

    assert not says_joules(None)
    assert not says_joules(run.logged - dashboard.MEASURED)
    assert says_joules(run.logged | {"energy/cpu_joules"})


def test_panels_are_left_out_where_their_x_axis_is_missing() -> None:
    assert titles({"test/accuracy"}) == {"Test accuracy against steps"}
    assert titles({"test/accuracy", "time/train_s"}) >= {"Test accuracy against time", "Test accuracy against steps"}
    assert dashboard.sections({"something/else"}) == ()


def test_the_workspace_is_the_same_when_it_is_read_back() -> None:
    built = dashboard.workspace("entity", "project", EVERYTHING)
    spec = specification(built)
    view = internal.View(
        entity="entity",
        project="project",
        display_name=dashboard.NAME,
        name="",
        id="",
        spec=internal.WorkspaceViewspec.model_validate_json(json.dumps(spec)),
    )
    assert specification(ws.Workspace._from_model(view)) == spec


def test_runs_are_grouped_by_solver_and_arm_and_nothing_is_smoothed() -> None:
    section = specification(dashboard.workspace("entity", "project"))["section"]
    assert [key["name"] for key in section["runSets"][0]["grouping"]] == ["solver.value._target_", "arm.value"]
    for settings in (
        section["settings"],
        *(each["localPanelSettings"] for each in section["panelBankConfig"]["sections"]),
    ):
        assert not settings["smoothingActive"]
        assert settings["useRunsTableGroupingInPanels"]


def test_sections_of_a_usual_run_have_one_page_without_a_hole() -> None:
    usual = dashboard.default_names() | {"crossover/residual"}
    spec = specification(dashboard.workspace("entity", "project", usual))
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Accuracy against time", "Convergence", "Speedup", "Energy", "Memory",
    ]  # fmt: skip
    for section in sections:
        assert section["isOpen"]
        layout = section["flowConfig"]
        assert layout["columnsPerPage"] * layout["rowsPerPage"] == len(section["panels"]), section["name"]


def test_panels_and_axes_have_titles_of_their_own() -> None:
    shown = panels_of(specification(dashboard.workspace("entity", "project", EVERYTHING)))
    for panel in shown:
        if panel["viewType"] == "Run History Line Plot":
            assert panel["config"]["xAxisTitle"], panel
            assert panel["config"]["yAxisTitle"], panel
    told = [panel["config"].get("chartTitle") or panel["config"]["stringSettings"]["title"] for panel in shown]
    assert len(set(told)) == len(told)


def test_the_panel_of_a_trace_is_the_chart_that_the_run_has_drawn(run: OfflineRun) -> None:
    charts = run.config["_wandb"]["visualize"]
    assert charts.keys() == metrics.CHARTS.keys()

    def fields(config: dict[str, Any]) -> dict[str, Any]:
        return {field["name"]: field for field in config["userQuery"]["queryFields"][0]["fields"]}

    for key, chart in charts.items():
        panels = panels_of(specification(dashboard.workspace("entity", "project", {f"{key}_table"})))
        assert len(panels) == 1
        theirs, ours = chart["panel_config"], panels[0]["config"]
        for part in ("panelDefId", "fieldSettings", "transform"):
            assert ours[part] == theirs[part]
        assert ours["stringSettings"]["xname"] == theirs["stringSettings"]["xname"]
        # W&B's own query also asks for a run's colour, for which this chart has no field.
        assert {name: fields(theirs)[name] for name in fields(ours)} == fields(ours)


def test_a_record_of_several_blocks_is_read(tmp_path: Path) -> None:
    text = "x" * 100_000
    tracker = Tracker(tmp_path, {"text": text}, warn=pytest.fail, options=WandbOptions(mode="offline"))
    tracker.log(1, 1, {"train/loss": 2.0})
    tracker.finish({"train/loss": 1.0})
    run = offline_run.read(tmp_path)
    assert run.config["text"] == text
    assert (run.history[0]["train/loss"], run.summary["train/loss"]) == (2.0, 1.0)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert list(offline_run.records(content))
    for damaged in (b"", content[:-3], content[:200] + b"?" + content[201:]):
        with pytest.raises(ValueError, match=r"not a .wandb file|cut off|damaged"):
            list(offline_run.records(damaged))


WITHOUT_WANDB = """
import sys
sys.modules.update(wandb=None, wandb_workspaces=None)  # as if they were not installed
from deq.records import dashboard
dashboard.main()
"""


def test_the_panels_can_be_looked_at_without_wandb(tmp_path: Path) -> None:
    told = python("-c", WITHOUT_WANDB, "--project", "mine", "--dry-run", folder=tmp_path)
    assert (told.returncode, told.stderr) == (0, "")
    listed, left_out = told.stdout.split("Left out unless some run has logged them")
    for section in dashboard.SECTIONS:
        assert f"\n{section.name} (" in listed
    for shown, names in ((listed, dashboard.default_names() - TABLES), (left_out, dashboard.OPTIONAL)):
        assert names <= set(re.split(r"[\s,]+", shown))
    assert "joules" not in listed


def test_without_wandb_workspaces_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stopped:
        dashboard.main(["--project", "mine"])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: the dashboard needs wandb-workspaces")
    assert told.err.endswith("install it: pip install -e '.[dashboard]'\n")
    assert told.err.count("\n") == 1


@contextmanager
def wandb_server(projects: dict[str, list[set[str]]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A W&B on this machine, with the names in the histories of each project's runs, and the views that it is sent."""
    views: list[dict[str, Any]] = []

    def run(number: int, names: set[str]) -> dict[str, Any]:
        keys = {"keys": {name: {} for name in names}, "lastStep": 4} if names else None
        summary = json.dumps({"crossover/mixing_penalty": 0.1})
        user = {"name": "someone", "username": "someone"}
        about = {"id": str(number), "name": str(number), "displayName": "run", "state": "finished", "tags": []}
        return {**about, "user": user, "config": "{}", "summaryMetrics": summary, "historyKeys": keys}

    def answer(query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            views.append(variables)
            return {"upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}}
        if "runs(" in query:
            if variables["project"] not in projects:
                return {"project": None}
            runs = projects[variables["project"]]
            edges = [{"node": run(number, names), "cursor": str(number)} for number, names in enumerate(runs)]
            page = {"endCursor": None, "hasNextPage": False}
            return {"project": {"internalId": "1", "runCount": len(runs), "runs": {"edges": edges, "pageInfo": page}}}
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "someone", "username": "someone", "flags": "{}"}}
        return {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/graphql" or not body.startswith(b"{"):
                self.send_error(404)
                return
            asked = json.loads(body)
            data = json.dumps({"data": answer(asked["query"], asked.get("variables") or {})}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", views
    finally:
        server.shutdown()
        server.server_close()


def logged_in_at(url: str, folder: Path) -> dict[str, str]:
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4, "HOME": str(folder)}


COMMANDS = """
import json, sys
from deq.records import dashboard
for arguments in json.loads(sys.argv[1]):
    try:
        dashboard.main(arguments)
    except SystemExit as stopped:
        print("status", stopped.code)
"""


def test_the_saved_workspace_has_the_panels_of_what_any_run_logged_and_no_project_is_told(tmp_path: Path) -> None:
    projects = {"mine": [{"train/loss", "step"}, set[str](), {"test/accuracy", "energy/gpu_joules"}], "empty": []}
    commands = [["--project", "mine"], *(["--project", name, "--entity", "team"] for name in ("empty", "missing"))]
    with wandb_server(projects) as (url, views):  # one process, or this takes a minute
        told = python("-c", COMMANDS, json.dumps(commands), folder=tmp_path, **logged_in_at(url, tmp_path))
    assert re.fullmatch(rf"{re.escape(url)}/someone/mine\?nw=\w+\nstatus 2\nstatus 2\n", told.stdout), told
    (view,) = views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("someone", "mine", dashboard.NAME)
    in_histories = {"train/loss", "test/accuracy", "energy/gpu_joules"}
    assert names_of(json.loads(view["spec"])) == in_histories | {"crossover/mixing_penalty"}
    empty, missing = told.stderr.splitlines()
    assert empty == (
        "error: no run of team/empty has logged anything that is on a panel; train with logger.project=empty"
    )
    assert missing.startswith("error: W&B has no project team/missing (Could not find project missing); upload a run")


def test_a_wandb_out_of_reach_is_told_in_one_sentence_and_in_time(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        variables = logged_in_at(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
        told = python(
            "-m", "deq.records.dashboard", "--project", "mine", "--timeout", "1", folder=tmp_path, **variables
        )
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == (
        "error: W&B failed (no answer in 1 s); look at the network and WANDB_BASE_URL, log in with `wandb login`, "
        "and try again\n"
    )


def test_without_a_login_it_says_how_to_log_in_and_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def login(*, prompt: bool, verify: bool) -> bool:
        assert not prompt
        assert not verify
        return False

    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(SystemExit) as stopped:
        dashboard.main(["--project", "mine"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told == "error: not logged in to W&B; run `wandb login` once, or look at the panels with --dry-run\n"


def test_a_mistake_on_the_command_line_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["--project", "mine", "--timeout", "0"], "--timeout must be from 1 to 86400, in seconds, got 0"),
        (["--project", "mine", "--timeout", "inf"], "--timeout must be from 1 to 86400, in seconds, got inf"),
        (["--project", "mine", "--timeout", "soon"], "argument --timeout: invalid float value: 'soon'"),
        (["mine"], "the following arguments are required: --project"),
        (["--dry-run"], "the following arguments are required: --project"),
    ):
        with pytest.raises(SystemExit) as stopped:
            dashboard.main(arguments)
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert sentence in told
        assert told.startswith("error: ")
        assert told.count("\n") == 1
