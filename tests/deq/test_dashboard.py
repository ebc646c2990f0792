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

from deq import dashboard, metrics
from deq.tracking import Tracker, WandbOptions
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
    of_wandb = {name for name in run.logged if name.startswith("_")}
    measured_here = run.logged & dashboard.MEASURED  # a machine with a counter logs these, too
    assert run.logged - of_wandb - measured_here == dashboard.default_names() | {"step", "epoch"}
    assert dashboard.default_names() <= run.summary.keys()


def test_the_offline_file_holds_all_that_the_run_folder_holds(folder: Path, run: OfflineRun) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) > 1
    assert [{name: row[name] for name in own} for row, own in zip(run.history, rows, strict=True)] == rows
    assert [row["_step"] for row in run.history] == [row["step"] for row in rows]
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


def test_runs_are_grouped_by_solver_and_window_and_nothing_is_smoothed() -> None:
    section = specification(dashboard.workspace("entity", "project"))["section"]
    assert [key["name"] for key in section["runSets"][0]["grouping"]] == ["solver.value._target_", "window.value"]
    for settings in (
        section["settings"],
        *(each["localPanelSettings"] for each in section["panelBankConfig"]["sections"]),
    ):
        assert not settings["smoothingActive"]
        assert settings["useRunsTableGroupingInPanels"]


def test_sections_of_a_usual_run_have_one_page_without_a_hole() -> None:
    sections = specification(dashboard.workspace("entity", "project"))["section"]["panelBankConfig"]["sections"]
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


def test_the_panel_of_a_trace_is_the_chart_that_wandb_draws_of_it() -> None:
    (key, axis), *_ = dashboard.TRACES.items()
    chart = wandb.plot.line_series([1, 2], [[0.1, 0.01]], keys=["Anderson"], title=key.capitalize(), xname=axis)
    chart.set_key(key)
    panels = panels_of(specification(dashboard.workspace("entity", "project", {chart.spec.table_key})))
    assert len(panels) == 1
    theirs, ours = chart.spec.config_value["panel_config"], panels[0]["config"]

    def fields(config: dict[str, Any]) -> dict[str, Any]:
        return {field["name"]: field for field in config["userQuery"]["queryFields"][0]["fields"]}

    for part in ("panelDefId", "fieldSettings", "stringSettings", "transform"):
        assert ours[part] == theirs[part]
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


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))  # as if they were not installed
from deq import dashboard
dashboard.main()
"""


def test_the_panels_can_be_looked_at_without_wandb(tmp_path: Path) -> None:
    told = python("-c", WITHOUT, "wandb,wandb_workspaces", "--project", "mine", "--dry-run", folder=tmp_path)
    assert (told.returncode, told.stderr) == (0, "")
    listed, left_out = told.stdout.split("Left out unless some run has logged them")
    for section in dashboard.SECTIONS:
        assert f"\n{section.name} (" in listed
    for shown, names in ((listed, dashboard.default_names() - TABLES), (left_out, dashboard.OPTIONAL)):
        assert names <= set(re.split(r"[\s,]+", shown))
    assert "joules" not in listed


def test_without_wandb_workspaces_it_says_what_to_install(tmp_path: Path) -> None:
    told = python("-c", WITHOUT, "wandb_workspaces", "--project", "mine", folder=tmp_path)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("error: the dashboard needs wandb-workspaces")
    assert told.stderr.endswith("install it: pip install -e '.[dashboard]'\n")
    assert told.stderr.count("\n") == 1


@contextmanager
def wandb_server(runs: list[set[str]] | None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A W&B on this machine whose project has these runs (None: there is no project), and the views it was sent."""
    views: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/graphql" or not body.startswith(b"{"):
                self.send_error(404)
                return
            asked = json.loads(body)
            data = json.dumps({"data": self.answer(asked["query"], asked.get("variables") or {})}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
            if "upsertView" in query:
                views.append(variables)
                return {"upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}}
            if "runs(" in query:
                if runs is None:
                    return {"project": None}
                edges = [
                    {
                        "node": {
                            "id": str(number), "name": str(number), "displayName": "run", "state": "finished",
                            "config": "{}", "summaryMetrics": "{}", "systemMetrics": "{}", "tags": [],
                            "user": {"name": "someone", "username": "someone"},
                            "historyKeys": {"keys": {name: {} for name in names}, "lastStep": 4} if names else None,
                        },
                        "cursor": str(number),
                    }
                    for number, names in enumerate(runs)
                ]  # fmt: skip
                page = {"endCursor": None, "hasNextPage": False}
                return {
                    "project": {"internalId": "1", "runCount": len(edges), "runs": {"edges": edges, "pageInfo": page}}
                }
            if "viewer" in query:
                return {"viewer": {"id": "1", "entity": "someone", "username": "someone", "flags": "{}"}}
            return {}

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", views
    finally:
        server.shutdown()
        server.server_close()


def publish(url: str, folder: Path, *options: str, key: str = "0123456789" * 4) -> tuple[int, str, str]:
    told = python(
        "-m", "deq.dashboard", "--project", "mine", *options,
        folder=folder, WANDB_BASE_URL=url, WANDB_API_KEY=key, HOME=str(folder),
    )  # fmt: skip
    return told.returncode, told.stdout, told.stderr


def test_the_saved_workspace_has_the_panels_of_what_any_run_logged(tmp_path: Path) -> None:
    runs = [{"train/loss", "step"}, set[str](), {"test/accuracy", "energy/gpu_joules"}]
    with wandb_server(runs) as (url, views):
        status, shown, errors = publish(url, tmp_path)
    assert (status, errors) == (0, "")
    assert re.fullmatch(rf"{re.escape(url)}/someone/mine\?nw=\w+\n", shown)
    (view,) = views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("someone", "mine", dashboard.NAME)
    assert names_of(json.loads(view["spec"])) == {"train/loss", "test/accuracy", "energy/gpu_joules"}


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (None, "W&B has no project team/mine (Could not find project mine); upload a run first"),
        ([], "no run of team/mine has logged anything that is on a panel; train with logger.project=mine"),
    ],
)
def test_a_project_without_runs_is_told_in_one_sentence(
    runs: list[set[str]] | None, sentence: str, tmp_path: Path
) -> None:
    with wandb_server(runs) as (url, views):
        status, shown, errors = publish(url, tmp_path, "--entity", "team")
    assert (status, shown, views) == (2, "", [])
    assert errors.startswith(f"error: {sentence}")
    assert errors.count("\n") == 1


def test_a_wandb_out_of_reach_is_told_in_one_sentence_and_in_time(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        status, shown, errors = publish(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path, "--timeout", "1")
    assert (status, shown) == (2, "")
    assert errors == (
        "error: W&B failed (no answer in 1 s); look at the network and WANDB_BASE_URL, log in with `wandb login`, "
        "and try again\n"
    )


def test_without_a_login_it_says_how_to_log_in(tmp_path: Path) -> None:
    status, shown, errors = publish("http://127.0.0.1:1", tmp_path, key="")
    assert (status, shown) == (2, "")
    assert errors == "error: not logged in to W&B; run `wandb login` once, or look at the panels with --dry-run\n"


def test_a_mistake_on_the_command_line_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["--project", "mine", "--timeout", "0"], "--timeout must be at least 1, in seconds, got 0"),
        (["--dry-run"], "the following arguments are required: --project"),
    ):
        with pytest.raises(SystemExit) as stopped:
            dashboard.main(arguments)
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


def test_importing_the_dashboard_does_not_import_wandb(tmp_path: Path) -> None:
    code = "import sys, deq.dashboard; print(sorted({'wandb', 'wandb_workspaces'} & set(sys.modules)))"
    assert python("-c", code, folder=tmp_path).stdout == "[]\n"
    assert "wandb_workspaces" in sys.modules  # here it was needed
