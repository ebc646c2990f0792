"""Beside Hugging Face's package ``kernels``: each imports as itself, in both orders, and outlives the other.

In a fresh virtual environment of its own, from another folder than the repository's. What both packages need is taken
from the environment that runs the tests, so that only the two are installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

OURS = "import torch; from deq.kernels import AndersonWindow as A; A(2, 8).step(torch.zeros(2, 8), torch.ones(2, 8))"
THEIRS = "import kernels; kernels.get_kernel"
BOTH = f"{OURS}; {THEIRS}; import deq.kernels; assert deq.kernels is not kernels"
NEITHER = "import importlib.util as u; assert not u.find_spec('kernels')"


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def pip(*arguments: str | Path, folder: Path) -> None:
    done = run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of Hugging Face's package and those it needs."""
    folder = tmp_path_factory.mktemp("wheels")
    if run(sys.executable, "-m", "pip", "--version", folder=folder).returncode != 0:
        pytest.skip("this environment has no pip to install with")
    command = (sys.executable, "-m", "pip", "download", "--retries", "1", "--dest", folder, "kernels")
    done = run(*command, folder=folder)
    if re.search(r"Failed to establish a new connection|Connection|resolution|No matching distribution", done.stderr):
        pytest.skip(f"the package kernels cannot be had from the package index here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed: an installation leaves folders of its own beside it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("deq", "kernels"):
        leaves = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leaves)
    return folder


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_both_packages_import_as_themselves_and_outlive_each_other(
    how: str, wheels: Path, sources: Path, tmp_path: Path
) -> None:
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    asked = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=elsewhere)
    site = Path(asked.stdout.strip())
    # Behind the environment's own packages. Its .pth files, such as that of an editable install, are not read.
    (site / "what_both_need.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(what: Sequence[str | Path]) -> None:
        pip("--python", python, "install", "--no-deps", *what, folder=elsewhere)

    def uninstall(name: str) -> None:
        pip("--python", python, "uninstall", "--yes", name, folder=elsewhere)

    def works(code: str) -> None:
        done = run(python, "-c", code, folder=elsewhere)
        assert done.returncode == 0, done.stderr

    theirs = sorted(wheels.glob("*.whl"))
    ours = [sources] if how == "wheel" else ["--editable", sources]
    install(theirs)
    install(ours)
    works(BOTH)
    uninstall("kernels")
    works(f"{OURS}; {NEITHER}")
    install(theirs)
    works(BOTH)
    uninstall("anderson-deq")
    works(THEIRS)


def test_the_folder_at_the_top_does_not_pass_for_another_package() -> None:
    done = run(sys.executable, "-c", "import kernels", folder=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: the folder kernels here is the package deq.kernels, write from deq.kernels import "
        "AndersonWindow; for another package of the name kernels, start Python in another folder"
    )


def test_every_folder_of_the_library_is_installed() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    walked = os.walk(ROOT / "deq", followlinks=True)  # deq/kernels is a link
    there = {".".join(Path(folder).relative_to(ROOT).parts) for folder, _, files in walked if "__init__.py" in files}
    assert set(told) == there
