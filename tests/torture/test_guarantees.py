"""Every test that docs/guarantees.md names is there."""

import ast
import re

import pytest

from tests.ranks import ROOT

NAMED = sorted(set(re.findall(r"`(tests/[^`]+)`", (ROOT / "docs/guarantees.md").read_text())))


def test_the_page_names_tests() -> None:
    assert len(NAMED) > 30


@pytest.mark.parametrize("named", NAMED)
def test_what_is_named_is_there(named: str) -> None:
    path, _, test = named.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not test or test in found


def test_every_promise_is_proved() -> None:
    page = (ROOT / "docs/guarantees.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | proved by |"]
    assert promises
    assert [row for row in promises if "`tests/" not in row.split("|")[2]] == []
