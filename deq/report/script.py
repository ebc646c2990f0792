"""What draws the page's figures in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import vl_convert


@contextmanager
def in_the_making(schema: str) -> Iterator[Future[str]]:
    """:func:`bundle`, made beside the rest of the report: it takes about a third of the report's CPU seconds.

    In a process of its own, since vl-convert holds Python's lock while it works.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool.submit(bundle, schema)


def bundle(schema: str) -> str:
    """Vega, Vega-Lite of version ``schema`` and Vega-Embed as one script, for the inside of a ``<script>``."""
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=schema)
    return script.replace("</script", "<\\/script")
