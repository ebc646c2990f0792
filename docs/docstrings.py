"""How docstrings are read for the site: an extension of griffe, which finds them for mkdocstrings.

They are written for ``help()``: with roles such as ``:class:`~deq.DEQ```, one entry for several arguments, and
``Example:`` above what a doctest runs. griffe and Markdown have other forms for these three.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SHOWN = {
    "DEQ": "deq.DEQ",
    "equilibrium": "deq.DEQ.equilibrium",
    "correction_loss": "deq.layer.correction_loss",
    "jacobian_penalty": "deq.layer.jacobian_penalty",
    "Solution": "deq.solvers.Solution",
    "Solver": "deq.solvers.Solver",
    "solve": "deq.solvers.Solver.solve",
    "AndersonWindow": "deq.kernels.AndersonWindow",
    "Outcome": "deq.kernels.Outcome",
}
"""Names that docstrings refer to, and where the site has them. Others are shown as code."""

ROLE = re.compile(r":\w+:`~?([\w.]+)`")
SEVERAL = re.compile(r"^( {4})(\w+(?:, \w+)+): (.*(?:\n {8}.*)*)", re.MULTILINE)
LITERAL = re.compile(r":? ?::(?=\n)")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def markdown(docstring: str) -> str:
    """The same docstring in the forms that griffe and Markdown know."""
    text = ROLE.sub(_link, docstring)
    text = SEVERAL.sub(_one_entry_each, text)
    text = LITERAL.sub(":", text)
    return EXAMPLE.sub("Examples:", text)


def _link(role: re.Match[str]) -> str:
    name = role[1].rpartition(".")[2]
    return f"[`{name}`][{SHOWN[name]}]" if name in SHOWN else f"`{name}`"


def _one_entry_each(entry: re.Match[str]) -> str:
    indent, names, text = entry.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
