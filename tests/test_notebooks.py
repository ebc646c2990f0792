"""The notebooks run from top to bottom, and are committed as they ran: with their outputs and pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = (
    "1_anderson_from_scratch",
    "2_crossover",
    "3_window_and_beta",
    "4_training_a_deq",
    "5_triton_kernel",
)
LARGEST = 400_000
"""Bytes of a notebook with its pictures."""
SECONDS = 240
"""For one cell at its small size, on a machine that does other things as well."""

ABSOLUTE = re.compile(
    r"(?<![\w.:/~])/(?:home|root|tmp|work|usr|var|opt|mnt|private|Users|workspace|content)/|\b[A-Z]:\\\\"
)

Cell = dict[str, Any]


def read(name: str) -> list[Cell]:
    """The cells of a committed notebook."""
    cells: list[Cell] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return cells


def code(name: str) -> list[Cell]:
    return [cell for cell in read(name) if cell["cell_type"] == "code"]


def small(temporary: Path) -> dict[str, str]:
    """The environment of a quick run whose temporary files have a folder of their own, and PyTorch's caches one."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(temporary.with_name(f"{temporary.name}-caches"))}
    return {**os.environ, **caches, "NOTEBOOK_SMALL": "1", "TMPDIR": str(temporary)}


CACHES = {"__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache", ".import_linter_cache"}
"""Of other tests, which may run at the same time."""


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - CACHES


def test_these_are_all_notebooks() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    path = FOLDER / f"{name}.ipynb"
    before, at_root, beside = path.read_bytes(), contents(ROOT), contents(FOLDER)
    # In a process of its own, without this one's options: nbmake collects a notebook as one test.
    options = ["--nbmake", f"--nbmake-timeout={SECONDS}", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(path)],
        cwd=ROOT,
        env=small(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout, run.stdout
    assert path.read_bytes() == before
    assert (contents(ROOT), contents(FOLDER), contents(tmp_path)) == (at_root, beside, set())


def test_a_notebook_runs_from_the_root_of_the_checkout_as_well(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(FOLDER / f"{NOTEBOOKS[0]}.ipynb", as_version=4)
    # Whoever starts it there has installed nothing: what it imports is found by itself.
    client = nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env={**small(tmp_path), "PYTHONPATH": ""})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_has_run_once_from_top_to_bottom(name: str) -> None:
    counts = [cell["execution_count"] for cell in code(name)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output["output_type"] for cell in code(name) for output in cell["outputs"]}
    assert "error" not in kinds
    streams = {output.get("name") for cell in code(name) for output in cell["outputs"]}
    assert "stderr" not in streams


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_has_pictures_and_is_small(name: str) -> None:
    pictures = [output for cell in code(name) for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert pictures
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_names_no_place_on_the_machine_it_ran_on(name: str) -> None:
    for cell in read(name):
        texts = ["".join(cell["source"])]
        for output in cell.get("outputs", []):
            texts.append("".join(output.get("text", "")))
            texts += ["".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
        assert [text for text in texts if ABSOLUTE.search(text)] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_reads_its_size_in_its_first_code_cell(name: str) -> None:
    assert 'SMALL = os.environ.get("NOTEBOOK_SMALL") == "1"' in "".join(code(name)[0]["source"])
