"""The benchmarks run at tiny sizes, with or without the peers, and write what they print."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record, roofline, solve
from benchmarks.cell import load_cell
from benchmarks.record import folder_of
from benchmarks.update import IncrementalUpdate
from deq.kernels.naive import anderson_update


def run(module: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    importlib.import_module(module).main()


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    record = json.loads((folder_of(out) / f"{name}.json").read_text())
    assert record["torch"] == torch.__version__.split("+")[0] or record["torch"] == torch.__version__
    assert (folder_of(out) / f"{name}.md").read_text().count("\n|") == len(record["rows"]) + 2
    rows: list[dict[str, Any]] = record["rows"]
    return rows


def test_scale_shows_that_only_the_scaled_regularisation_does_not_care(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("benchmarks.scale", "--out", str(tmp_path), monkeypatch=monkeypatch)
    rows = {row.pop("solver"): row for row in rows_of(tmp_path, "scale")}
    for scaled in ("Anderson, scaled (ours, default)", "Anderson, scaled, plain (ours)"):
        ours = [int(cell) for cell in rows[scaled].values()]
        assert max(ours) - min(ours) <= 1
    assert rows["Anderson, absolute (ours)"]["x 1e-06"] == ">300"
    assert rows["Anderson, absolute (ours)"]["x 1e+06"] == str(ours[-1])


def test_memory_of_an_equilibrium_layer_does_not_grow_with_the_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("benchmarks.memory", "--batch", "1", "--size", "16", "--out", str(tmp_path), monkeypatch=monkeypatch)
    first, *_, last = rows_of(tmp_path, "memory")
    assert float(last["unrolled"]) == pytest.approx(8 * float(first["unrolled"]), rel=0.05)
    assert first["Implicit"] == last["Implicit"]
    assert first["unrolled"] == first["Phantom(5)"] == last["Phantom(5)"]


def test_update_measures_every_row_against_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--batch", "4", "--dim", "96", "--iterations", "4", "--rounds", "1", "--no-compile", "--device", "cpu")
    run("benchmarks.update", *arguments, "--out", str(tmp_path), monkeypatch=monkeypatch)
    rows = rows_of(tmp_path, "update-b4-d96-m5")
    assert float(rows[0]["over floor"]) == 1.0
    assert any(row["what"] == "AndersonWindow.step" and float(row["ms, median"]) > 0 for row in rows)


def test_a_cell_is_trained_written_and_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.npz"
    sizes = ("--channels", "8", "--inner", "8", "--images", "4", "--batch", "16")
    run("benchmarks.cell", "--steps", "3", *sizes, "--out", str(file), monkeypatch=monkeypatch)
    cell, injection = load_cell(file)
    assert injection.shape == (4, 8, 8, 8)
    assert cell(torch.zeros_like(injection), injection).shape == injection.shape
    run("benchmarks.solve", "--cell", str(file), "--rounds", "1", "--cap", "12", monkeypatch=monkeypatch)


def test_the_pictures_are_those_of_the_numbers_and_leave_out_what_has_no_place_on_their_axes(tmp_path: Path) -> None:
    curve = [(0.1, 1.0), (0.2, 0.1), (0.3, 0.0), (0.4, float("nan"))]
    curves = {"forward iteration": curve, "Anderson m = 5": curve, "TorchDEQ anderson_solver, m = 5": [(9.0, 1e-9)]}
    solve.draw({"one problem": curves, "another": curves}, 1e-2, tmp_path / "solve.png")
    times = {"copy floor": 1e-3, roofline.OURS: 1.1e-3, "formula in eager PyTorch": 5e-3}
    roofline.draw({2: times, 5: times}, 10**6, 1e11, tmp_path / "roofline.png")
    for name in ("solve.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_robustness_counts_what_gmres_cannot_be_beaten_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--only", "Anderson", "--linear-tols", "1e-3", "--linear-cap", "60", "--device", "cpu")
    run("benchmarks.robustness", *arguments, "--out", str(tmp_path), monkeypatch=monkeypatch)
    means = {(row["problem"], row["solver"]): float(row["mean"]) for row in rows_of(tmp_path, "robustness")}
    best = means["affine, rho 0.9", "GMRES, all rows"]
    assert best <= means["affine, rho 0.9", "Anderson, plain, m = 10"] < means["affine, rho 0.9", "forward iteration"]
    assert best <= means["affine, rho 0.9", "Anderson, adaptive, m = 10"] < 20
    assert means["two rotations, radius 1", "forward iteration"] == 60


def test_the_gpu_run_is_complete_in_a_dry_run_without_hydra_or_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Modules of these names that refuse to be imported stand before the installed ones.
    for name in ("hydra", "omegaconf", "wandb"):
        (tmp_path / "blocked").mkdir(exist_ok=True)
        (tmp_path / "blocked" / f"{name}.py").write_text(f"raise ImportError('{name} must not be needed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # Hydra comes with a plugin for pytest
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        run("benchmarks.gpu", "--dry-run", "--out", str(tmp_path / "out"), monkeypatch=monkeypatch)
    assert ended.value.code == 0
    written = {file.name for file in folder_of(tmp_path / "out").iterdir()}
    assert {
        "tune.json",
        "launch_shapes.json",
        "update-b4-d96-m5.json",
        "solve-tol0.01.json",
        "train-digits.json",
    } <= written


def test_the_gpu_run_has_the_papers_comparison_its_report_and_energy_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    arguments = ("--dry-run", "--only", "energy", "paper", "report", "--out", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as ended:
        run("benchmarks.gpu", *arguments, monkeypatch=monkeypatch)
    assert ended.value.code == 0
    folder = folder_of(tmp_path / "out")
    report = json.loads((folder / "paper" / "report.json").read_text())
    assert report["missing"] == []
    assert len(list((tmp_path / "out" / "paper").glob("*/summary.json"))) == 4
    shares = {row["what"]: row["share of a step"] for row in rows_of(tmp_path / "out", "energy")}
    assert any("counters" in what for what in shares)
    if not torch.cuda.is_available():
        assert not any("joules" in what for what in shares)


def test_rounding_the_residual_rows_costs_nothing_and_rounding_the_mixed_rows_stalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("benchmarks.history", "--windows", "5", "--device", "cpu", "--out", str(tmp_path), monkeypatch=monkeypatch)
    rows = {(row["problem"], row["bfloat16"]): row for row in rows_of(tmp_path, "history")}
    for tol in ("tol 0.01", "tol 0.001", "tol 1e-06"):
        full = float(rows["affine, rho 0.9", "float32"][tol])
        for form in ("residual rows", "differences"):
            assert abs(float(rows["affine, rho 0.9", form][tol]) - full) <= 0.05 * full
    assert rows["affine, rho 0.9", "both rows"]["tol 1e-06"] == "300.0 (100% never)"


def test_the_incremental_update_that_ours_is_measured_against_is_the_anderson_update() -> None:
    generator = torch.Generator().manual_seed(0)
    X, F = torch.randn(2, 4, 2, 40, generator=generator)
    G, Y = torch.zeros(2, 3, 40), torch.zeros(2, 3, 40)
    for i in range(3):
        G[:, i], Y[:, i] = F[i] - X[i], F[i]
    update = IncrementalUpdate(G, Y)
    expected = anderson_update(X[1:].transpose(0, 1), F[1:].transpose(0, 1))
    torch.testing.assert_close(update(X[3], F[3]).double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_results_of_the_run_before_do_not_make_the_code_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    code, result = tmp_path / "benchmarks" / "record.py", tmp_path / "benchmarks" / "results" / "table.md"
    code.write_text("1")
    result.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    monkeypatch.setattr(record, "__file__", str(code))
    monkeypatch.setattr(record, "RESULTS", result.parent)
    monkeypatch.setattr(record, "code_version", lambda: git("describe", "--always", "--dirty", "--abbrev=12"))
    assert record.benchmarked_code() == commit
    result.write_text("2")
    assert record.benchmarked_code() == commit
    code.write_text("2")
    assert record.benchmarked_code() == f"{commit}-dirty"
