"""Faces that only read cannot write: SQL by people, and a version as a Zarr group.

What a read-only transaction allows is not promised against: a query may take time and memory, and
on Postgres may call whatever the role may call that changes no table (`pg_terminate_backend`,
`pg_read_file` of a superuser). The role decides; give readers one of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

import dcpstore
from dcpstore.errors import DcpstoreError, InvalidInputError
from dcpstore.repository import Repository

SQLITE = [
    "SELECT 1; DROP TABLE version",
    "WITH x AS (SELECT 1) INSERT INTO plan (digest, ranks) SELECT 'x', 1 FROM x",
    "WITH x AS (SELECT 1) UPDATE version SET message = 'x'",
    "WITH x AS (SELECT 1) DELETE FROM version",
    "EXPLAIN QUERY PLAN DELETE FROM version",
    "SELECT load_extension('evil')",
    "SELECT writefile('{folder}/stolen', 'x')",
    "SELECT readfile('/etc/passwd')",
    "SELECT edit('x', 'touch {folder}/stolen')",
    "SELECT fts3_tokenizer('simple', x'00')",
    "SELECT * FROM pragma_journal_mode('delete')",
    "SELECT * FROM pragma_query_only(0)",
    "SELECT * FROM pragma_writable_schema(1)",
    "SELECT 1 UNION SELECT * FROM pragma_wal_checkpoint",
    "VALUES (1); ATTACH '{folder}/stolen' AS x",
    "/* */ ATTACH '{folder}/stolen' AS x",
    "VACUUM INTO '{folder}/stolen'",
    "REINDEX",
    "ANALYZE",
    "SAVEPOINT x",
    "CREATE TEMP TABLE x (a)",
    "SELECT sqlite_rename_table('main', 'version', 'x')",
]
POSTGRES = [
    "SELECT 1; DROP TABLE version",
    "WITH x AS (DELETE FROM version RETURNING *) SELECT * FROM x",
    "WITH x AS (INSERT INTO plan (digest, ranks) VALUES ('x', 1) RETURNING *) TABLE x",
    "WITH x AS (UPDATE version SET message = 'x' RETURNING *) TABLE x",
    "SELECT * INTO stolen FROM version",
    "SELECT * FROM version FOR UPDATE",
    "EXPLAIN ANALYZE DELETE FROM version",
    "SELECT nextval(pg_get_serial_sequence('version', 'id'))",
    "SELECT setval(pg_get_serial_sequence('version', 'id'), 1)",
    "SELECT lo_creat(-1)",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SELECT query_to_xml('DELETE FROM version', true, true, '')",
    "SELECT query_to_xml('CREATE TABLE stolen (a int)', true, true, '')",
    "COPY (SELECT 1) TO PROGRAM 'touch {folder}/stolen'",
    "COPY (SELECT 1) TO '{folder}/stolen'",
    "WITH x AS (COPY version TO PROGRAM 'touch {folder}/stolen') TABLE x",
    "SELECT 1; COPY (SELECT 1) TO PROGRAM 'touch {folder}/stolen'",
    "SELECT 1 \\; DELETE FROM version",
    "DO $$ BEGIN DELETE FROM version; END $$",
    "CALL x()",
    "MERGE INTO version USING plan ON true WHEN MATCHED THEN DELETE",
    "SELECT $a$; DELETE FROM version; $a$; DELETE FROM version",
    "SELECT dblink_exec('', 'DELETE FROM version')",
    "LOAD 'evil'",
    "CREATE EXTENSION adminpack",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "COMMIT",
]
HARMLESS_ON_POSTGRES = [  # they run, and leave nothing behind
    "EXPLAIN (ANALYZE) CREATE TABLE stolen AS SELECT 1",  # Postgres lets it; it is rolled back
    "SELECT set_config('default_transaction_read_only', 'off', false)",
    "SELECT set_config('search_path', 'pg_temp', false)",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_notify('x', 'y')",
]


def state_of(repo: Repository) -> list[Any]:
    """Return all that an attack might have changed."""
    catalog = [
        repo.sql(f"SELECT * FROM {name}") for name in ("version", "plan", "ref", "operation")
    ]
    tables = "sqlite_schema" if repo.catalog.database.is_sqlite else "pg_tables"
    names = repo.sql(f"SELECT * FROM {tables} ORDER BY 1, 2")
    return [*catalog, names, repo.log()]


def test_no_query_changes_anything(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(2)}, repo)
    before = state_of(repo)
    is_sqlite = repo.catalog.database.is_sqlite
    for text in SQLITE if is_sqlite else POSTGRES:
        with pytest.raises(InvalidInputError):
            print(text, repo.sql(text.replace("{folder}", str(tmp_path))))
        assert state_of(repo) == before, text
    for text in () if is_sqlite else HARMLESS_ON_POSTGRES:
        repo.sql(text)
        with pytest.raises(InvalidInputError):
            repo.sql("WITH x AS (DELETE FROM version RETURNING *) TABLE x")
        assert state_of(repo) == before, text
    assert not (tmp_path / "stolen").exists()
    dcpstore.save({"w": torch.ones(3)}, repo)  # and the repository still takes changes


TEXTS = (
    "'; DROP TABLE version; --",
    '"; DROP TABLE version; --',
    "%(x)s %s :x $1 ? {x}",
    "a' OR '1'='1",
    "\\'; SELECT 1; --",
    "$.a[0]",
    'a"b.c',
)


def test_names_are_never_sql(repo: Repository) -> None:
    for text in TEXTS:
        state = {text: torch.ones(2), f"v{text}": text}
        saved = dcpstore.save(
            state, repo, message=text, author=text, labels={text: text}, metrics={text: 1.0}
        )
        assert repo.show().labels == {text: text}
        assert repo.show().metrics == {text: 1.0}
        assert set(repo.read()) == set(state)
        assert repo.entries(None, [text])[0].fqn == text
        assert [v.number for v in repo.log(labels={text: text})] == [saved.number]
        assert [
            r.version for r in repo.sql("SELECT version FROM history WHERE message = :t", t=text)
        ]
        for call in (repo.tag, repo.branch, repo.show):
            with pytest.raises(DcpstoreError):
                call(text)
        with pytest.raises(DcpstoreError):
            dcpstore.save(state, repo, branch=text)
        with pytest.raises(DcpstoreError):
            repo.log(where=[f"{text}<1; DROP TABLE version"])
        with pytest.raises(DcpstoreError):
            repo.log(tag=text)
    assert len(repo.log()) == len(TEXTS)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_version_as_a_zarr_group_cannot_be_written(repo: Repository) -> None:
    dcpstore.save({"w": torch.ones(2)}, repo)
    for mode in ("a", "r+", "w"):
        with pytest.raises(ValueError, match=r"read-only|never changes"):
            zarr.open_group(repo.zarr(), mode=mode)["w"][:] = 0
    group = zarr.open_group(repo.zarr(), mode="r")
    with pytest.raises(ValueError, match=r"read-only|never changes"):
        group["w"][:] = 0
    with pytest.raises(ValueError, match=r"read-only|never changes"):
        group.create_array("x", shape=(1,), dtype="f4")
    assert repo.read()["w"].tolist() == [1, 1]
