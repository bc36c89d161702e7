"""A glance at the log says what the catalog says, or nothing."""

import math
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

import dcpstore
from dcpstore.catalog.glance import glance_at_log
from dcpstore.catalog.schema import revisions
from dcpstore.testing.soundness import as_line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a repository whose versions fork, and of which one is expired."""
    path = tmp_path / "ckpts"
    with dcpstore.open(path) as repo:
        facts = {"message": "one\n; é", "tags": ["first", "a.1"]}
        dcpstore.save({"a": 1}, repo, metrics={"val": 0.5, "loss": 1e300, "n": 3}, **facts)
        dcpstore.save({"a": 1}, repo, step=0, metrics={"loss": 7})
        dcpstore.save({"a": [1.5, None]}, repo, step=10**15)
        repo.branch("try/lr", at="first")
        dcpstore.save({"a": 2}, repo, branch="try/lr", metrics={"loss": math.inf})
        repo.tag("b", "try/lr")
        assert repo.expire(keep_tagged=True).expired == (2,)
    return path


def change(folder: Path, sql: str) -> None:
    with closing(sqlite3.connect(folder / "catalog.db")) as database, database:
        database.execute(sql)


def test_shows_what_the_catalog_shows(folder: Path) -> None:
    with dcpstore.open(folder) as repo:
        lines = list(map(as_line, repo.log()))
    assert [f"{line} {line.parent} {line.tags}" for line in lines] == [
        "v4 1 ('b',)",
        "v3 2 ()",
        "v1 None ('a.1', 'first')",
    ]
    assert [line.metrics for line in lines] == [
        {"loss": math.inf},
        {},
        {"loss": 1e300, "n": 3.0, "val": 0.5},
    ]
    assert glance_at_log(str(folder), limit=None) == lines
    for limit in (1, 2, 3, 1_000_000_000):
        assert glance_at_log(str(folder), limit=limit) == lines[:limit]


def test_a_repository_is_named_as_for_open(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = glance_at_log(str(folder), limit=None)
    assert lines
    for target in ("ckpts", "ckpts/", "./ckpts", f"sqlite:///{folder}/catalog.db"):
        assert glance_at_log(target, limit=None) == lines
    assert glance_at_log("sqlite:///ckpts/catalog.db", limit=None) == lines
    odd = folder.rename(tmp_path / "50% größer?#1; 'x'")
    assert glance_at_log(str(odd), limit=None) == lines
    monkeypatch.chdir(odd)
    assert glance_at_log(".", limit=None) == lines


def test_an_empty_repository_has_no_lines(tmp_path: Path) -> None:
    dcpstore.open(tmp_path / "new").close()
    assert glance_at_log(str(tmp_path / "new"), limit=None) == []


@pytest.mark.parametrize(
    "target",
    ["", "\0", "missing", "ckpts/catalog.db", "postgresql://u@h/d", "sqlite://", "file:///ckpts"]
    + [f"sqlite:///{name}" for name in ("", "ckpts", ":memory:", "ckpts/catalog%2Edb", "x?y=z")],
)
def test_unusual_targets_are_left_to_the_catalog(
    folder: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(folder.parent)
    before = sorted(folder.parent.rglob("*"))
    assert glance_at_log(target, limit=None) is None
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE alembic_version SET version_num = '0000'",
        "DELETE FROM alembic_version",
        "DELETE FROM repository",
        "UPDATE repository SET data_url = 'elsewhere'",
        "UPDATE repository SET data_url = 's3://bucket/elsewhere'",
        "UPDATE repository SET data_url = x'00'",
        "UPDATE repository SET data_url = ''",
        "ALTER TABLE ref RENAME TO refs",
        *(
            f"UPDATE version SET {column} = x'ff' WHERE number = 4"
            for column in ("branch", "step", "message", "created_at", "nbytes")
        ),
        "UPDATE version SET created_at = 'soon' WHERE number = 1",
        "UPDATE metric SET value = 'low'",
        "UPDATE metric SET name = x'ff' WHERE name = 'val'",
        "UPDATE version SET created_at = created_at || '+02:00' WHERE number = 1",
    ],
)
def test_unexpected_contents_are_left_to_the_catalog(folder: Path, sql: str) -> None:
    change(folder, sql)
    assert glance_at_log(str(folder), limit=None) is None


def test_a_view_in_the_place_of_a_table_is_not_asked(folder: Path) -> None:
    change(folder, "ALTER TABLE version RENAME TO versions")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    change(folder, f"CREATE VIEW version AS {endless}")
    assert glance_at_log(str(folder), limit=None) is None


def test_a_file_that_is_not_a_database_is_left_to_the_catalog(folder: Path) -> None:
    (folder / "catalog.db").write_bytes(b"notes" * 1000)
    assert glance_at_log(str(folder), limit=None) is None


def test_another_schema_is_left_to_the_catalog(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisions, "HEAD", "9999")
    assert glance_at_log(str(folder), limit=None) is None


def test_a_glance_sees_what_a_save_left_in_the_write_ahead_log(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "catalog.db", isolation_level=None)) as other:
        other.execute("PRAGMA wal_autocheckpoint = 0")
        other.execute("UPDATE version SET message = 'new' WHERE number = 4")
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE version SET message = 'not yet' WHERE number = 4")
        lines = glance_at_log(str(folder), limit=1)
    assert lines is not None
    assert lines[0].message == "new"
