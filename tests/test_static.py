"""What is checked without running anything: lint, format, types, import contracts, and the workflow's command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CHECKS = {
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "mypy": ["-m", "mypy"],
    "import-linter": ["-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_static_check_is_clean(check: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, *CHECKS[check]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_workflow_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"<!-- test command -->\n```bash\n(.+)\n```", (ROOT / "README.md").read_text())
    assert f"- run: {command}\n" in (ROOT / ".github/workflows/ci.yml").read_text()
