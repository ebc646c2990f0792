"""``python ARGUMENTS`` without the seconds that torch and Hydra take to import.

Each command is a process of its own, forked from one that has them imported and has done nothing else: a test of what
is imported must start anew. What Python
reads before its first line is the same for all: PYTHONIOENCODING has no effect here.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = ("train", "deq.report")


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.forked"]
    server = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(server.communicate)  # the end of its input is its end
    return server


def run(*arguments: str, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, *arguments])`` in ``folder``, with its streams captured."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as streams:
        output, errors = Path(streams, "output"), Path(streams, "errors")
        wanted = {"arguments": arguments, "folder": str(folder), "environment": dict(environment)}
        print(json.dumps(wanted | {"output": str(output), "errors": str(errors)}), file=server.stdin, flush=True)
        try:
            status = int(server.stdout.readline())
        except BaseException:  # a test that was stopped: its command too
            _server.cache_clear()
            os.killpg(server.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, status, output.read_text(), errors.read_text())


def serve() -> None:
    """One command after the other, of lines on standard input; the answers are how they ended, as subprocess has it."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a child that collects what is here would copy it
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = status_of(**json.loads(line))
            # All that Python does at its end but for taking its modules apart, which costs a second.
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def status_of(arguments: list[str], folder: str, environment: dict[str, str], output: str, errors: str) -> int:
    """Runs what ``python ARGUMENTS`` runs, in its folder and with its streams; returns its exit status."""
    for stream, path in enumerate((os.devnull, output, errors)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    what, *rest = arguments
    try:
        if what == "-c":
            sys.argv = [what, *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        elif what == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(what, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve()
