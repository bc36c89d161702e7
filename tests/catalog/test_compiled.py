"""Statements are compiled once for all catalogs of a process, and stay few."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, literal, select

from dcpstore.catalog import Catalog, sqlite_url
from dcpstore.catalog.db import compiled as compiled_module
from dcpstore.catalog.db.compiled import compiled_statements
from dcpstore.catalog.db.database import Database

from .conftest import make_content, make_draft


def test_a_catalog_that_is_opened_again_compiles_nothing(
    catalog: Catalog, database_url: str
) -> None:
    def use(opened: Catalog, uid: str) -> None:
        opened.begin(make_draft(uid))
        opened.commit(uid, make_content(uid, {"w": uid}))
        opened.entries(opened.log()[0].number)

    compiled_statements.clear()
    with Catalog.open(database_url) as opened:
        use(opened, "a")
        use(opened, "b")
    known = set(compiled_statements)
    assert len(known) > 10
    with Catalog.open(database_url) as opened:
        use(opened, "c")
        assert [version.uid for version in opened.log()] == ["c", "b", "a"]
    assert set(compiled_statements) == known


def test_what_users_ask_is_not_kept(catalog: Catalog) -> None:
    catalog.query("SELECT 1 AS one", {})
    known = set(compiled_statements)
    assert [row["two"] for row in catalog.query("SELECT 2 AS two", {})] == [2]
    assert set(compiled_statements) == known


def test_compiled_statements_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(connection: Connection, width: int) -> Any:
        return connection.scalar(select(*(literal(7).label(f"c{i}") for i in range(width))))

    monkeypatch.setattr(compiled_module, "_MOST", 3)
    url = sqlite_url(tmp_path / "catalog.db")
    with Catalog.make(url, data_url="d"):
        database = Database(url)
        for width in range(1, 9):
            assert database.ask(ask, width) == 7
            assert len(compiled_statements) <= 3
        database.close()
