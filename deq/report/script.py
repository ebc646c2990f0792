"""What draws the page's figures in a browser: ``python -m deq.report.script VERSION`` prints it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import vl_convert


@contextmanager
def in_the_making(schema: str) -> Iterator[Callable[[], str]]:
    """What waits for :func:`bundle`, which is made beside the rest of the report: a third of its CPU seconds.

    In a process of its own, since vl-convert holds Python's lock while it works; out of the reach of a terminal's
    Ctrl-C, and ended with the report.
    """
    command = [sys.executable, "-m", "deq.report.script", schema]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True) as maker:

        def script() -> str:
            made, _ = maker.communicate()
            return made if maker.returncode == 0 else bundle(schema)  # which then says what is wrong

        try:
            yield script
        finally:
            maker.kill()


def bundle(schema: str) -> str:
    """Vega, Vega-Lite of version ``schema`` and Vega-Embed as one script, for the inside of a ``<script>``."""
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=schema)
    return script.replace("</script", "<\\/script")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(bundle(sys.argv[1]))
