"""Builds the site, strictly: ``python docs/build.py [SITE]``; then open SITE/index.html (default: site/).

The site mirrors the repository, and README.md is its first page: a relative link is the same on both. What a page links
to comes along: pictures as they are, Markdown as a page, a notebook as a page with its outputs, code as a page with a
heading for each function. A link to something that is not there ends the build.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
MARK = ".built-by-docs-build"
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?: \"([^\"]*)\")?\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".cff": "yaml",
    ".cpp": "cpp",
    ".json": "json",
}


def main() -> None:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").resolve()
    if site.exists() and not (site / MARK).is_file() and (not site.is_dir() or any(site.iterdir())):
        sys.exit(f"{site} holds something else than an earlier site, which would be deleted: give another folder")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        gather(folder / "pages")
        for name in ("zensical.toml", "docs/docstrings.py"):
            shutil.copy(ROOT / name, folder)
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        build = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=False)
        if build.returncode:
            sys.exit(build.returncode)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(folder / "site", site)
        (site / MARK).touch()
    print(f"open {site / 'index.html'}")


def gather(pages: Path) -> None:
    """Writes README.md, docs/ and all that they link to below ``pages``, at the places that they have here."""
    waiting = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    written = set(waiting)
    shutil.copytree(ROOT / "docs" / "assets", pages / "docs" / "assets")
    while waiting:
        source = waiting.pop()
        target = pages / page_of(source).relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        page, linked = as_page(source, target.parent)
        if isinstance(page, bytes):
            target.write_bytes(page)
        else:
            target.write_text(page, encoding="utf-8")
        waiting += linked - written
        written |= linked


def page_of(source: Path) -> Path:
    """The file of the site's sources that shows this one."""
    if source == ROOT / "README.md":
        return ROOT / "index.md"
    becomes_a_page = source.suffix in (".ipynb", *LANGUAGES)
    return source.with_name(f"{source.name}.md") if becomes_a_page else source


def as_page(source: Path, folder: Path) -> tuple[str | bytes, set[Path]]:
    """A file as the site shows it, and the files that it links to. Pictures of a notebook are written to ``folder``."""
    if source.suffix == ".md":
        text = source.read_text(encoding="utf-8")
        titled = text if re.search(r"^# ", text, re.MULTILINE) else f"# {source.stem}\n\n{text}"
        return with_links(titled, source)
    if source.suffix == ".ipynb":
        return notebook(source, folder)
    if source.suffix == ".py":
        return python(source), set()
    if source.suffix in LANGUAGES:
        shown = fenced(source.read_text(encoding="utf-8"), LANGUAGES[source.suffix])
        return f"# {source.relative_to(ROOT)}\n\n{shown}", set()
    return source.read_bytes(), set()


def with_links(text: str, source: Path) -> tuple[str, set[Path]]:
    """Links to the pages that the site has for these files; and the files."""
    linked: set[Path] = set()

    def link(match: re.Match[str]) -> str:
        path, anchor, title = match.groups(default="")
        target = Path(os.path.normpath(source.parent / path))
        if not target.is_file() or ROOT not in target.parents:
            sys.exit(f"{source.relative_to(ROOT)} links to {path}, which is no file of the repository: mend the link")
        linked.add(target)
        if target.suffix == ".py" and title:
            anchor = f"#{title}"
        shown = os.path.relpath(page_of(target), page_of(source).parent)
        return f"]({shown}{anchor}" + (f' "{title}")' if title else ")")

    parts = CODE.split(text)  # code is at the odd places, and has no links
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts), linked


def python(source: Path) -> str:
    """A Python file with a heading above each function and class, which links can lead to."""
    text = source.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    starts = [
        (min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1, node.name)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    ends = [*(start for start, _ in starts), len(lines)]
    page = [f"# {source.relative_to(ROOT)}", fenced("".join(lines[: ends[0]]), "python")]
    for (start, name), end in zip(starts, ends[1:], strict=True):
        page += [f"## `{name}` {{ #{name} }}", fenced("".join(lines[start:end]), "python")]
    return "\n\n".join(page)


def notebook(source: Path, folder: Path) -> tuple[str, set[Path]]:
    """An executed notebook as Markdown: text with its formulas, code, and outputs with their pictures."""
    page: list[str] = []
    linked: set[Path] = set()
    for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text, links = with_links(with_formulas(text), source)
            page.append(text)
            linked |= links
            continue
        page.append(fenced(text, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = folder / f"{source.stem}-{len(page)}.png"
                picture.write_bytes(base64.b64decode("".join(data["image/png"])))
                page.append(f"![What the cell above draws]({picture.name})")
            else:
                page.append(fenced("".join(output.get("text", data.get("text/plain", ""))), "text"))
    return "\n\n".join(page), linked


def with_formulas(text: str) -> str:
    """LaTeX as MathML, which browsers draw without a script."""

    def formula(match: re.Match[str]) -> str:
        block, inline = match.groups()
        latex = (  # without what latex2mathml does not know
            (block or inline)
            .replace(r"\lVert", r"\|")
            .replace(r"\rVert", r"\|")
            .replace(r"\arg", r"\operatorname{arg}")
        )
        drawn = convert(latex, display="block" if block else "inline").replace(r"\|", "‖")
        # In a span: a line that begins with <math> would be a block to Markdown.
        return drawn if block else f"<span>{drawn}</span>"

    parts = CODE.split(text)
    parts[::2] = [FORMULA.sub(formula, part) for part in parts[::2]]
    return "".join(parts)


def fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


if __name__ == "__main__":
    main()
