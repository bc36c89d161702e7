"""Build the documentation site into build/site; any warning is an error.

The pages are the Markdown files of docs/, which a plain code host shows too. What those link to
outside of docs/ (a test, an example, the changelog) becomes a page of the site, so that every link
works without the network. Run `make docs-site`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent))
from drawing import draw  # a neighbour of this script

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BUILD = ROOT / "build"
PAGES = BUILD / "docs"  # what mkdocs.yml names as its docs_dir
SITE = BUILD / "site"

# Files of the project that are pages of their own in the navigation.
PROJECT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "README.md": "readme.md",
}
LANGUAGES = {".py": "python", ".yml": "yaml", ".toml": "toml", ".sh": "bash", "": "text"}
FENCED = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
MERMAID = re.compile(r"^```mermaid\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\[[^\]]*\]\()([^)\s]+)(\))")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NOT_SEARCHED = "---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n"


def main() -> int:
    """Write the pages, build the site, and check what was built."""
    shutil.rmtree(PAGES, ignore_errors=True)
    write_pages()
    builder = [str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean"]
    done = subprocess.run(
        builder, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(COLOUR.sub("", done.stdout), end="")
    if done.returncode:
        return done.returncode
    docstrings = [line for line in done.stdout.splitlines() if line.startswith("griffe:")]
    problems = [*docstrings, *missing_pages(), *outside_resources(), *broken_links()]
    for problem in problems:
        print(problem, file=sys.stderr)
    count = len(list(SITE.rglob("*.html")))
    print(f"{count} pages in {SITE.relative_to(ROOT)}, {len(problems)} problems")
    return 1 if problems else 0


def write_pages() -> None:
    """Write each page of docs/ to `PAGES`, and pages for what they link to elsewhere."""
    waiting: dict[Path, str] = {}  # a file of the project, and the page that it becomes
    for path in sorted(DOCS.rglob("*")):
        if path.is_file() and path.suffix in {".md", ".svg", ".png", ".css"}:
            waiting[path] = str(path.relative_to(DOCS))
    waiting[DOCS / "decisions"] = "decisions/index.md"
    waiting |= {ROOT / name: page for name, page in PROJECT_PAGES.items() if (ROOT / name).exists()}
    written: set[Path] = set()
    while left := waiting.keys() - written:
        for path in sorted(left):
            target = PAGES / waiting[path]
            target.parent.mkdir(parents=True, exist_ok=True)
            if path == DOCS / "decisions":
                target.write_text(list_of_decisions())
            elif path.is_dir():
                target.write_text(_page_of_folder(path))
            elif path.suffix == ".md":
                text = MERMAID.sub(lambda found: draw(found[1]), path.read_text())
                text = _relinked(text, path, waiting)
                target.write_text(_not_searched(text, path))
            elif path.suffix in {".svg", ".png", ".css"}:
                shutil.copyfile(path, target)
            else:
                target.write_text(_page_of_source(path))
            written.add(path)


def _not_searched(text: str, path: Path) -> str:
    return (
        NOT_SEARCHED + text
        if path.is_relative_to(ROOT / "tests") or path.name == "README.md"
        else text
    )


def _relinked(text: str, path: Path, waiting: dict[Path, str]) -> str:
    """Return a page with links to where each file is on the site; `waiting` gets new files."""

    def relink(found: re.Match[str]) -> str:
        url = urlsplit(found[2])
        if url.scheme or url.netloc or not url.path:
            return found[0]
        target = (path.parent / unquote(url.path)).resolve()
        if not target.exists():
            raise SystemExit(f"{path.relative_to(ROOT)} links to {found[2]}, which is not there")
        if target == DOCS:
            target = DOCS / "index.md"
        name = str(target.relative_to(ROOT)).removesuffix(".md").lstrip(".")
        name = name.replace("README", "readme")  # README.md would become index.html
        page = waiting.setdefault(target, f"source/{name}.md")
        here = Path(waiting[path]).parent
        fragment = f"#{url.fragment}" if url.fragment and page.endswith(".md") else ""
        return f"{found[1]}{os.path.relpath(page, here)}{fragment}{found[3]}"

    parts = FENCED.split(text)
    return "".join(part if n % 2 else LINK.sub(relink, part) for n, part in enumerate(parts))


def _page_of_source(path: Path) -> str:
    name = path.relative_to(ROOT)
    language = LANGUAGES.get(path.suffix, "text")
    return f"{NOT_SEARCHED}# {name}\n\n````{language}\n{path.read_text()}````\n"


def _page_of_folder(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir() if not child.name.startswith(("_", ".")))
    listed = "".join(f"- `{name}`\n" for name in names)
    return f"{NOT_SEARCHED}# {path.relative_to(ROOT)}\n\n{listed}"


def list_of_decisions() -> str:
    """Return the page that lists the decisions, the newest first."""
    text = "# Decisions\n\nWhy it is so: what was measured, and what was tried instead.\n\n"
    for path in sorted((DOCS / "decisions").glob("*.md"), reverse=True):
        title = path.read_text().splitlines()[0].removeprefix("# ")
        text += f"- [{title}]({path.name})\n"
    return text


class _Page(HTMLParser):
    """Collects what a page loads, what it links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") in {"canonical", "next", "prev"}:
            self.links.append(values.get("href", ""))
        elif tag != "a":
            names = ("src", "href", "srcset", "data", "poster", "action")
            self.loads += [values[name] for name in names if name in values]
        if "url(" in values.get("style", ""):
            self.loads += re.findall(r"url\(['\"]?([^'\")]+)", values["style"])


def missing_pages() -> Iterator[str]:
    """Yield each page of docs/ that the site lacks."""
    for path in PAGES.rglob("*.md"):
        page = SITE / path.relative_to(PAGES).with_suffix(".html")
        if not page.exists():
            yield f"{page.relative_to(ROOT)}: not built"


def outside_resources() -> Iterator[str]:
    """Yield each font, script, style or picture that a browser would fetch from another host."""
    for path in sorted(SITE.rglob("*.html")):
        for url in _Page(path.read_text()).loads:
            if urlsplit(url).netloc:
                yield f"{path.relative_to(ROOT)}: loads {url} from another host"
    for path in sorted(SITE.rglob("*.css")):
        for url in re.findall(
            r"(?:url\(|@import )['\"]?((?:https?:)?//[^'\")]+)", path.read_text()
        ):
            yield f"{path.relative_to(ROOT)}: loads {url} from another host"


def broken_links() -> Iterator[str]:
    """Yield each link inside the site whose page or anchor is not there."""
    pages = {path: _Page(path.read_text()) for path in SITE.rglob("*.html")}
    for path, page in sorted(pages.items()):
        if path.name == "404.html":  # its links begin at the root of the host
            continue
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            fragment = unquote(url.fragment)
            if not target.exists():
                yield f"{path.relative_to(ROOT)}: {link} leads to no page"
            elif (
                fragment and target in pages and fragment not in pages[target].anchors | {"__skip"}
            ):
                yield f"{path.relative_to(ROOT)}: {link} leads to no anchor"


if __name__ == "__main__":
    sys.exit(main())
