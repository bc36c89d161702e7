"""The documentation site: what its pages must have, and what its build must find out.

'make docs-site' builds it. The build fails on a warning of the builder, on a link that leads
nowhere, and on anything that a browser would fetch from another host.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dcpstore import errors
from tests.ranks import ROOT

# Every module whose `__all__` is public.
PUBLIC = ["dcpstore", "dcpstore.convert", "dcpstore.state_dict", "dcpstore.testing"]
API_PAGES = ["save-and-load", "repository", "records", "errors", "dcp", "convert", "testing"]
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
TORCHS_OWN = re.compile(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """What docs/site/build.py defines."""
    return runpy.run_path(str(ROOT / "docs" / "site" / "build.py"))


def nav() -> list[str]:
    """Return the pages of the navigation, in order."""

    def pages(item: Any) -> list[str]:
        if isinstance(item, str):
            return [item]
        values = item.values() if isinstance(item, dict) else item
        return [page for value in values for page in pages(value)]

    return pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def thing_named(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_page_is_in_the_navigation(build: dict[str, Any]) -> None:
    docs = ROOT / "docs"
    decisions = set(docs.glob("decisions/*.md"))
    written = {str(path.relative_to(docs)) for path in set(docs.rglob("*.md")) - decisions}
    ours = {page for name, page in build["PROJECT_PAGES"].items() if name != "README.md"}
    assert sorted(nav()) == sorted(written | ours | {"decisions/index.md"})
    listed = build["list_of_decisions"]()
    assert len(decisions) > 20
    assert all(f"({path.name})" in listed for path in decisions)


def test_every_public_name_is_in_the_reference_once() -> None:
    shown: list[str] = []
    torchs: dict[str, str] = {}
    for name in API_PAGES:
        text = (ROOT / "docs" / "api" / f"{name}.md").read_text()
        shown += DIRECTIVE.findall(text)
        torchs |= dict(TORCHS_OWN.findall(text))
    public = {
        f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__
    }
    public.remove("dcpstore.state_dict")  # a module, whose names are there
    assert sorted([*shown, *torchs]) == sorted(public)
    for name, home in torchs.items():
        assert thing_named(name) is thing_named(home)


def overview() -> str:
    """Return docs/api.md: each public name in one line, by page."""
    text = "# Python reference\n\nEvery public name, by what it is for. All else is private.\n"
    for name in API_PAGES:
        page = (ROOT / "docs" / "api" / f"{name}.md").read_text()
        title = page.splitlines()[0].removeprefix("# ")
        text += f"\n## [{title}](api/{name}.md)\n\n| name | what it is |\n|---|---|\n"
        for dotted in DIRECTIVE.findall(page):
            thing = thing_named(dotted)
            assert not isinstance(thing, ModuleType)
            first = " ".join(inspect.cleandoc(thing.__doc__).split("\n\n")[0].split())
            short = dotted.removeprefix("dcpstore.")
            text += f"| [`{short}`](api/{name}.md#{dotted}) | {first} |\n"
        for dotted, home in TORCHS_OWN.findall(page):
            short = dotted.removeprefix("dcpstore.")
            text += f"| [`{short}`](api/{name}.md#torchs-own) | torch's `{home}` |\n"
    return text


def test_the_overview_of_public_names_is_documented_as_it_is() -> None:
    file = ROOT / "docs" / "api.md"
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        file.write_text(overview())
    assert file.read_text() == overview(), "run 'make docs' and look at the difference"


def warnings_of(path: Path) -> list[str]:
    """Return the first fixed words of the text of each warning in a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of, name = ast.unparse(node.func.value), node.func.attr
            if (of, name) in {("_log", "warning"), ("warnings", "warn")}:
                texts = [n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)]
                pieces = re.split(r"%[\w.]+|\0|; |, |\. |: ", "\0".join(map(str, texts)))
                long = [piece for piece in pieces if len(piece.split()) > 2]
                found.append((long or [max(pieces, key=len)])[0].strip())
    return found


def test_troubleshooting_has_every_error_and_every_warning() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    by_title = {text.splitlines()[0]: text for text in sections[1:]}
    assert by_title.keys() == {*errors.__all__, "Warnings"}
    for name in errors.__all__:
        assert "| cause | cure |" in by_title[name], name
        assert f"(#{name.lower()})" in sections[0] or name == "DcpstoreError"
    modules = sorted((ROOT / "dcpstore").rglob("*.py"))
    texts = [text for path in modules for text in warnings_of(path)]
    assert len(texts) > 8
    assert [text for text in texts if text not in by_title["Warnings"]] == []


def test_a_fetch_from_another_host_is_found(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build["outside_resources"]
    monkeypatch.setitem(found.__globals__, "SITE", tmp_path)
    monkeypatch.setitem(found.__globals__, "ROOT", tmp_path)
    (tmp_path / "a.html").write_text(
        '<a href="https://a.example/page">a link is not a fetch</a><script src="own.js"></script>'
    )
    (tmp_path / "a.css").write_text("a { background: url(own.png) }")
    assert list(found()) == []
    (tmp_path / "b.html").write_text(
        '<script src="https://b.example/x.js"></script><img src="//c.example/x.png">'
        '<link rel="stylesheet" href="https://d.example/x.css">'
    )
    (tmp_path / "b.css").write_text(
        "@import 'https://e.example/x.css'; a { src: url(//f.example/x) }"
    )
    hosts = [re.search(r"//(\w)\.example", line)[1] for line in found()]  # type: ignore[index]
    assert sorted(hosts) == ["b", "c", "d", "e", "f"]


def test_a_link_that_leads_nowhere_is_found(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build["broken_links"]
    monkeypatch.setitem(found.__globals__, "SITE", tmp_path)
    monkeypatch.setitem(found.__globals__, "ROOT", tmp_path)
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="b.html#end"></a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="end"></h1><a href="https://a.example/c.html#d"></a>')
    assert list(found()) == []
    (tmp_path / "b.html").write_text('<h1 id="other"></h1><a href="c.html"></a>')
    assert list(found()) == [
        "a.html: b.html#end leads to no anchor",
        "b.html: c.html leads to no page",
    ]


def test_links_to_other_files_become_links_to_their_pages(build: dict[str, Any]) -> None:
    relinked = build["_relinked"]
    page = ROOT / "docs" / "guarantees.md"
    waiting = {page: "guarantees.md", ROOT / "CHANGELOG.md": "changelog.md"}
    fenced = "```text\n[c](nowhere.md)\n```\n"
    text = f"[a](../CHANGELOG.md#fixed) [b](../tests/test_site.py)\n\n{fenced}"
    assert relinked(text, page, waiting) == (
        f"[a](changelog.md#fixed) [b](source/tests/test_site.py.md)\n\n{fenced}"
    )
    assert waiting[ROOT / "tests" / "test_site.py"] == "source/tests/test_site.py.md"
    with pytest.raises(SystemExit, match=r"links to \.\./nothing\.md, which is not there"):
        relinked("[a](../nothing.md)", page, waiting)


def test_a_chart_is_drawn_with_every_arrow_pointing_down(build: dict[str, Any]) -> None:
    html = build["draw"]("flowchart TD\n  a --> b\n  b --> c\n  a --> c\n")
    height = {name: float(y) for y, name in re.findall(r'y="([\d.]+)">(\w)</text>', html)}
    assert height["a"] < height["b"] < height["c"]
    assert html.count('class="line"') == 3
    with pytest.raises(ValueError, match="can only draw"):
        build["draw"]("sequenceDiagram\n  a ->> b: hello\n")
