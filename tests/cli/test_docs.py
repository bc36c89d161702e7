"""docs/cli.md names every command and option, and prints what they print."""

import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from dcpstore import repository
from dcpstore.cli.app import commands
from dcpstore.convert.safetensors_header import encode_header
from tests.cli.history import save_example
from tests.cli.test_failures import CODES

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
CONTEXT = click.Context(commands)
NAMES = commands.list_commands(CONTEXT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, in Greenwich."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("LOGNAME", "ada")  # who does what the examples do
    time.tzset()
    yield tmp_path
    monkeypatch.undo()
    time.tzset()


def rerun(page: str) -> str:
    """Return the page with what each of its commands prints now, in the current folder."""
    return re.sub(
        r"(?<=```console\n).*?(?=```)", lambda m: _rerun_block(m[0]), page, flags=re.DOTALL
    )


def _rerun_block(block: str) -> str:
    shown = []
    for line in block.splitlines():
        if line.startswith("$ "):
            shown.append(f"{line}\n{_rerun_line(line[2:])}")
    return "".join(shown)


def _rerun_line(line: str) -> str:
    program, *args = shlex.split(line)
    assert program == "dcpstore"
    result = CliRunner(env={"DCPSTORE_REPO": "ckpts"}).invoke(commands, args)
    if args[0] == "init":
        with repository.open(args[1], create=False) as repo:
            save_example(repo.catalog)
        _write_tiny(Path("tiny.safetensors"))
    return result.output


def _write_tiny(path: Path) -> None:
    """Write the foreign checkpoint of the examples: two tensors of 8 KiB."""
    tensors = {"embed.weight": (torch.float32, (64, 32)), "head.weight": (torch.float32, (64, 32))}
    data = bytes(range(256)) * 32
    path.write_bytes(encode_header(tensors, {}) + data + data[::-1])


def _settled(page: str) -> str:
    """Return the page without what differs at each run: a new repository's uid, this folder."""
    page = re.sub(r"made repository [0-9a-f]{32}", "made repository UID", page)
    page = re.sub(r"data in \S+/(\w+);", r"data in FOLDER/\1;", page)
    doctor = r"^(?:ok|warning) +(\w+)  .*(?:\n {12,}.*)*$"
    page = re.sub(doctor, r"ok \1", page, flags=re.MULTILINE)
    # Operations: when, and by whom, which decides how wide the table is.
    page = re.sub(r"^ *OP  WHEN .*$", lambda m: " ".join(m[0].split()), page, flags=re.MULTILINE)
    return re.sub(
        r"^ *(\d+)  \d{4}-\d\d-\d\d \d\d:\d\d  \S+ +(.*)$",
        lambda m: " ".join([m[1], "WHEN", "WHO", *m[2].split()]),
        page,
        flags=re.MULTILINE,
    )


def test_the_page_prints_what_the_commands_print(folder: Path) -> None:
    page = PAGE.read_text()
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        PAGE.write_text(_renewed(page))
    else:
        assert _settled(rerun(page)) == _settled(page), "run 'make docs', and look at what changed"


def _renewed(page: str) -> str:
    """Return the page with each block of examples that has changed replaced by that of now."""
    text, block = r"(?<=```console\n)", r".*?(?=```)"
    now = iter(re.findall(text + block, rerun(page), flags=re.DOTALL))

    def renew(match: re.Match[str]) -> str:
        new = next(now)
        if _settled(new) == _settled(match[0]):
            return match[0]
        new = re.sub(r"/[^/\s]\S*/(ckpts|other)(?=[;/\s])", r"/home/ada/\1", new)
        return re.sub(r"\(/\S+/python[0-9.]*\)", "(/home/ada/.venv/bin/python)", new)

    return re.sub(text + block, renew, page, flags=re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_is_documented_with_an_example_and_all_options(name: str) -> None:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (section,) = (s for s in sections if re.match(rf"`dcpstore {name}\b", s))
    assert f"$ dcpstore {name}" in section
    command = commands.get_command(CONTEXT, name)
    assert command is not None
    for option in command.params:
        if isinstance(option, click.Option) and option.name not in ("repo", "json", "color"):
            assert all(f"`{text}`" in section for text in option.opts), option.opts


def test_the_page_documents_nothing_else() -> None:
    documented = re.findall(r"^## `dcpstore ([a-z-]+)", PAGE.read_text(), flags=re.MULTILINE)
    assert documented == NAMES
    everywhere = PAGE.read_text().split("\n## ")[0]
    assert all(
        text in everywhere for text in ("`--repo`", "`--json`", "`--color always`", "`--help`")
    )
    assert all(text in everywhere for text in ("`DCPSTORE_REPO`", "`-h`", "`--version`"))


def test_the_exit_codes_are_documented() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", PAGE.read_text(), flags=re.MULTILINE)
    documented = {
        name: int(code) for code, text in rows for name in re.findall(r"`(\w+Error)`", text)
    }
    special = {name: code for name, code in CODES.items() if code != 1}
    assert documented == special | {"NoRepositoryError": 10}
