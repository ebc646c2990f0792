"""``import deq`` with something else under the name ``kernels``, in a process that has the standard library only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THEIRS = "from os import path as get_kernel\n"


def python(*arguments: str, path: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    # -S: this environment's own packages, this project's among them, are not there.
    command = [sys.executable, "-S", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def refusal(found: object) -> str:
    return (
        f"ImportError: the name kernels is taken by {found}, which is not this project's package: rename it if it is "
        "your own, else run pip uninstall kernels and install this project again, or use a fresh virtual environment"
    )


def package(folder: Path, init: str | None) -> Path:
    """What pip makes of two packages in one folder, with this project's ``__init__.py``, another's or none: where it
    is imported from."""
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "kernels/hf_hub.py").touch()
    file = folder / "kernels/__init__.py"
    if init is None:
        file.unlink()
        return file.parent
    file.write_text(init)
    return file


def single(folder: Path, name: str, content: str = "") -> Path:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    return file


# What pip does by itself: their package before ours on the path; both in one folder, installed in that order; the same
# after theirs was uninstalled, which takes the __init__.py of both away. And what people call kernels: a script that
# uses ours, a module compiled from CUDA, a package that does not parse and could not be imported at all.
OTHERS: dict[str, Callable[[Path], Path]] = {
    "their package": lambda folder: single(folder, "kernels/__init__.py", THEIRS),
    "theirs over ours": lambda folder: package(folder, THEIRS),
    "theirs uninstalled over ours": lambda folder: package(folder, None),
    "a script": lambda folder: single(folder, "kernels.py", "from kernels import AndersonWindow\n"),
    "a compiled module": lambda folder: single(folder, "kernels" + EXTENSION_SUFFIXES[0]),
    "a package that does not parse": lambda folder: single(folder, "kernels/__init__.py", "from AndersonWindow import"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_package_named_kernels_is_refused_by_its_file(other: str, tmp_path: Path) -> None:
    found = OTHERS[other](tmp_path)
    path = [tmp_path, ROOT]
    if found.is_dir():  # without an __init__.py any package that has one goes first
        path[1] = tmp_path / "only deq"
        path[1].mkdir()
        (path[1] / "deq").symlink_to(ROOT / "deq")
    run = python("-c", "import deq", path=path, folder=tmp_path)
    assert run.stderr.splitlines()[-1] == refusal(found)


def test_another_package_that_is_imported_already_is_refused(tmp_path: Path) -> None:
    theirs = single(tmp_path, "kernels/__init__.py", THEIRS)
    code = "import sys, kernels; sys.path = sys.path[2:]; import deq"  # found no more, imported it is
    run = python("-c", code, path=[tmp_path, ROOT], folder=tmp_path)
    assert run.stderr.splitlines()[-1] == refusal(theirs)

    by_hand = "import sys, types; sys.modules['kernels'] = types.ModuleType('kernels'); import deq"
    run = python("-c", by_hand, path=[ROOT], folder=tmp_path)
    assert run.stderr.splitlines()[-1] == refusal("<module 'kernels'>")


def test_no_package_named_kernels_is_an_installation_to_be_mended(tmp_path: Path) -> None:
    (tmp_path / "deq").symlink_to(ROOT / "deq")
    run = python("-c", "import deq", path=[tmp_path], folder=tmp_path)
    assert run.stderr.splitlines()[-1] == (
        "ImportError: deq needs the package kernels of this project, which is not there: install this project again"
    )


def test_the_report_refuses_it_too(tmp_path: Path) -> None:
    theirs = single(tmp_path, "kernels/__init__.py", THEIRS)
    run = python("-m", "deq.report", "runs", path=[tmp_path, ROOT], folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == refusal(theirs)


OURS: dict[str, Callable[[Path], list[Path]]] = {
    "a checkout": lambda folder: [ROOT],
    "ours over theirs": lambda folder: [package(folder, (ROOT / "kernels/__init__.py").read_text()).parents[1], ROOT],
    "an archive": lambda folder: [Path(shutil.make_archive(str(folder / "all"), "zip", ROOT, "kernels")), ROOT],
    "a folder of data in front": lambda folder: [single(folder, "kernels/conv.cu").parents[1], ROOT],
}


@pytest.mark.parametrize("where", OURS)
def test_this_projects_package_is_taken_wherever_it_lies_and_not_imported(where: str, tmp_path: Path) -> None:
    code = "import sys, deq; sys.exit('kernels' in sys.modules)"
    run = python("-c", code, path=OURS[where](tmp_path), folder=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
