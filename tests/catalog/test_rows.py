"""Bulk insert: all rows are stored as given, and errors are those of any statement."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, delete, select

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.bulk_insert import insert_rows
from dcpstore.catalog.db.database import Database
from dcpstore.catalog.schema import tables as schema
from dcpstore.errors import ConflictError
from tests.servers import new_database

from .conftest import Save

HARD = ["", "\\N", "a\tb\nc\r\\.", "'\"; --", "größe ✓ 𝄞", "\x01\x7f", "{1,2}", "null"]
NAMES = ("digest", "dtype", "shape", "codec", "nbytes")


@pytest.fixture
def database(catalog: Catalog, database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


def tensors(digests: list[str]) -> Iterator[tuple[Any, ...]]:
    return ((d, "int8", (i, 2**40), "none", 2**62) for i, d in enumerate(digests))


def test_hard_values_come_back(database: Database, save: Save) -> None:
    save()

    def work(connection: Connection) -> None:
        version = connection.scalar(select(schema.version.c.id))
        (kept,) = connection.execute(select(schema.entry).where(schema.entry.c.fqn == "w"))
        connection.execute(delete(schema.entry))
        entries = [(version, f"{t}.", (t, 7), "tensor", kept.tensor, None) for t in HARD]
        entries += [(version, text, (), "value", None, text) for text in HARD]
        names = ("version", "fqn", "path", "kind", "tensor", "value")
        insert_rows(connection, schema.entry, names, iter(entries))
        found = connection.execute(select(*(schema.entry.c[name] for name in names)))
        assert sorted(map(repr, map(tuple, found))) == sorted(map(repr, entries))
        insert_rows(connection, schema.tensor, NAMES, tensors(HARD))
        columns = [schema.tensor.c[name] for name in NAMES]
        assert {*tensors(HARD)} <= {*map(tuple, connection.execute(select(*columns)))}
        digests = [bytes(range(256)), b"", b"\\x00\n"]
        connection.execute(delete(schema.chunk))
        pack = connection.scalar(select(schema.pack.c.id))
        insert_rows(
            connection,
            schema.chunk,
            ("ordinal", "digest", "tensor", "part", "pack", "offset", "length"),
            [(2**40 + i, d, kept.tensor, 0, pack, 0, 1) for i, d in enumerate(digests)],
        )
        chunk = schema.chunk.c
        assert [*connection.scalars(select(chunk.digest).order_by(chunk.ordinal))] == digests

    database.transact(work, writes=True)


def test_inserting_no_rows_is_allowed(database: Database) -> None:
    database.transact(
        lambda connection: insert_rows(connection, schema.tensor, NAMES, []), writes=True
    )


def test_an_existing_row_is_a_conflict_and_nothing_changes(database: Database) -> None:
    with pytest.raises(ConflictError, match="refused a row"):
        database.transact(
            lambda connection: insert_rows(
                connection, schema.tensor, NAMES, [*tensors(["a", "b", "a"])]
            ),
            writes=True,
        )
    with database.write() as connection:
        assert connection.execute(select(schema.tensor)).all() == []


def test_a_connection_that_is_lost_in_between_is_made_again(postgres_server: Any) -> None:
    with (
        new_database(postgres_server) as url,
        Catalog.make(url, data_url="file:///data"),
        psycopg.connect(url, autocommit=True) as other,
    ):
        database = Database(url)
        digests = [f"{i:08}" for i in range(100_000)]
        tries = 0

        def work(connection: Connection) -> None:
            nonlocal tries
            tries += 1
            process = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()

            def rows() -> Iterator[tuple[Any, ...]]:
                for i, row in enumerate(tensors(digests)):
                    if i == 50_000 and tries == 1:
                        other.execute("SELECT pg_terminate_backend(%s, 10000)", [process])
                    yield row

            insert_rows(connection, schema.tensor, NAMES, rows())

        database.transact(work, writes=True)
        assert tries == 2
        with database.write() as connection:
            found = connection.scalars(select(schema.tensor.c.digest)).all()
        assert sorted(found) == digests
        database.close()
