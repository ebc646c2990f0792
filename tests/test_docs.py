"""README and docs/: the site is built strictly, what they show runs, and what they link to is there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDED = ("zensical", "mkdocstrings", "latex2mathml")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_the_extra = pytest.mark.skipif(
    bool(MISSING), reason=f"needs the extra docs: {', '.join(MISSING)} is not installed"
)


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, root / "docs" / "build.py", site], capture_output=True, text=True, check=False, timeout=200
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, site)
    assert done.returncode == 0, done.stdout + done.stderr
    # griffe tells of a docstring that it cannot read, and the build goes on.
    assert "griffe" not in done.stdout + done.stderr, done.stdout + done.stderr
    return site


class Page(HTMLParser):
    """What a page loads, where its links lead, and the text of its paragraphs without code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.paragraphs: list[str] = []
        self._within: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given.get("href", ""))
        elif "src" in given:
            self.loaded.append(given["src"])
        if tag == "p":
            self.paragraphs.append("")
        if tag in ("p", "code"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._within:
            self._within.remove(tag)

    def handle_data(self, data: str) -> None:
        if self._within == ["p"]:
            self.paragraphs[-1] += data


@needs_the_extra
def test_the_site_is_built_strictly_with_a_page_for_every_document_and_notebook(site: Path) -> None:
    documents = [page.relative_to(ROOT) for page in PAGES if page.name != "README.md"]
    expected = [*(page.with_suffix(".html") for page in documents), Path("index.html"), Path("docs/results/index.html")]
    notebooks = [path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb")]
    expected += [path.with_name(f"{path.name}.html") for path in notebooks]
    assert [page for page in expected if not (site / page).is_file()] == []
    for path in notebooks:
        assert "<img" in (site / path.with_name(f"{path.name}.html")).read_text(), f"{path} shows no picture"


@needs_the_extra
def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        elsewhere = [url for url in Page(page.read_text()).loaded if re.match(r"(https?:)?//", url)]
        assert elsewhere == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text()), sheet


@needs_the_extra
def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {page: Page(page.read_text()) for page in site.rglob("*.html") if page.name != "404.html"}
    broken = []
    for page, content in pages.items():
        for link in content.links:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append((str(page.relative_to(site)), link))
    assert broken == []


@needs_the_extra
def test_no_page_shows_raw_markup(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text()
        unknown = [formula for formula in re.findall(r"<math.*?</math>", html, re.DOTALL) if "\\" in formula]
        assert unknown == [], (page, unknown)
        for text in Page(html).paragraphs:
            assert not re.search(r"^\s*\||:(class|func|meth):|\]\(|^>>> |::\s*$|\\[a-z]+\{", text), (page, text)


@needs_the_extra
@pytest.mark.parametrize("broken", ["[a](guides/no_such_page.md)", "[a](faq.md#no-such-heading)", "[`a`][deq.NoSuch]"])
def test_a_broken_link_ends_the_build(broken: str, tmp_path: Path) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    (root / "README.md").write_text("# Home\n")
    (root / "docs" / "assets").mkdir(parents=True)
    (root / "docs" / "faq.md").write_text(f"# Page\n\n{broken}\n")
    for name in ("docs/build.py", "docs/docstrings.py", "docs/assets/site.css"):
        (root / name).write_text((ROOT / name).read_text())
    config = (ROOT / "zensical.toml").read_text()
    (root / "zensical.toml").write_text(re.sub(r"nav = \[.*?\n\]\n", "", config, flags=re.DOTALL))
    done = build(root, tmp_path / "site")
    assert done.returncode != 0, done.stdout + done.stderr
    assert not (tmp_path / "site").exists()


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_yes_of_the_features_table_links_to_a_test_that_exists() -> None:
    table = ROOT / "docs" / "features.md"
    links = re.findall(r"\[(?:yes|refused)\]\((\S+) \"(\w+)\"\)", table.read_text())
    assert len(links) > 30
    missing = [(path, name) for path, name in links if f"def {name}(" not in (table.parent / path).read_text()]
    assert missing == []


PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLES = {str(page.relative_to(ROOT)): "\n".join(PYTHON.findall(page.read_text())) for page in PAGES}


@pytest.mark.parametrize("page", [page for page, code in EXAMPLES.items() if code])
def test_the_python_examples_of_a_page_run_one_after_another(page: str) -> None:
    exec(compile(EXAMPLES[page], page, "exec"), {})


def test_the_examples_of_readme_guides_and_error_messages_are_among_those_that_run() -> None:
    with_code = {page for page, code in EXAMPLES.items() if code}
    assert {"README.md", "docs/faq.md", "docs/guides/bring_your_own_cell.md", "docs/guides/gradients.md"} <= with_code


def test_every_command_of_readme_and_docs_names_a_file_or_module_that_exists() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    modules = set(re.findall(r"python -m ((?:deq|benchmarks)[\w.]*\w)", text))
    assert {"deq.report", "deq.records.dashboard", "benchmarks.solve"} <= modules
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []
    scripts = set(re.findall(r"python ([\w/]+\.py)", text))
    assert "train.py" in scripts
    assert [name for name in sorted(scripts) if not (ROOT / name).is_file()] == []
