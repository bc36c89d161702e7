"""Bulk insert: all rows are stored as given, and errors are those of any statement."""

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, delete, select

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.bulk_insert import insert_rows, insert_unknown
from dcpstore.catalog.db.database import Database
from dcpstore.catalog.schema import tables as schema
from dcpstore.catalog.write.row_ids import RowIds, find_ids
from dcpstore.errors import ConflictError
from dcpstore.geometry.grids import Grid
from tests.servers import new_database

from .conftest import Save

HARD = ["", "\\N", "a\tb\nc\r\\.", "'\"; --", "größe ✓ 𝄞", "\x01\x7f", "{1,2}", "null"]
DIGESTS = [bytes(range(256)), b"", b"\\x00\n", b"'"]
NAMES = ("digest", "algorithm", "dtype", "shape", "codec", "nbytes", "parts")
GRIDS = (Grid((0, 1), (2, 3), (1, 2**40)), Grid((), (), ()))


@pytest.fixture
def database(catalog: Catalog, database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


def layouts(names: list[str]) -> Iterator[tuple[Any, ...]]:
    return (
        (name.encode(), "blake3", name, (i, 2**40), "none", 2**62, GRIDS)
        for i, name in enumerate(names)
    )


def test_hard_values_come_back(database: Database, save: Save) -> None:
    save()

    def work(connection: Connection) -> None:
        held = connection.scalar(select(schema.tensor.c.id))
        fqns = [(f"{text} {i}".encode(), text, (text, 7)) for i, text in enumerate(HARD)]
        names = ("digest", "name", "path")
        insert_rows(connection, schema.fqn, names, iter(fqns))
        found = connection.execute(
            select(*(schema.fqn.c[name] for name in names)).where(schema.fqn.c.name.in_(HARD))
        )
        assert sorted(map(repr, map(tuple, found))) == sorted(map(repr, fqns))
        node = connection.scalar(select(schema.node.c.id).where(schema.node.c.level == 0))
        ids = connection.scalars(select(schema.fqn.c.id).where(schema.fqn.c.name.in_(HARD))).all()
        connection.execute(delete(schema.entry))
        entries = [(node, i, "value", None, text) for i, text in zip(ids, HARD, strict=True)]
        entries[0] = (node, ids[0], "tensor", held, None)
        names = ("node", "fqn", "kind", "tensor", "value")
        insert_rows(connection, schema.entry, names, iter(entries))
        found = connection.execute(select(*(schema.entry.c[name] for name in names)))
        assert sorted(map(repr, map(tuple, found))) == sorted(map(repr, entries))
        insert_rows(connection, schema.layout, NAMES, layouts(HARD))
        columns = [schema.layout.c[name] for name in NAMES]
        assert {*layouts(HARD)} <= {*map(tuple, connection.execute(select(*columns)))}
        connection.execute(delete(schema.chunk))
        pack = connection.scalar(select(schema.pack.c.id))
        insert_rows(
            connection,
            schema.chunk,
            ("ordinal", "digest", "tensor", "pack", "offset", "length", "checksum"),
            [(2**40 + i, d, held, pack, 0, 1, d or None) for i, d in enumerate(DIGESTS)],
        )
        chunk = schema.chunk.c
        stored = connection.execute(select(chunk.digest, chunk.checksum).order_by(chunk.ordinal))
        assert [*stored] == [(digest, digest or None) for digest in DIGESTS]

    database.transact(work, writes=True)


def test_only_rows_that_are_new_are_inserted(database: Database) -> None:
    def work(connection: Connection) -> None:
        insert_unknown(connection, schema.layout, NAMES, layouts(HARD[:3]))
        insert_unknown(connection, schema.layout, NAMES, layouts(HARD))
        columns = [schema.layout.c[name] for name in NAMES]
        stored = [tuple(row) for row in connection.execute(select(*columns))]
        assert sorted(map(repr, stored)) == sorted(map(repr, layouts(HARD)))
        insert_unknown(connection, schema.layout, NAMES, [])

    database.transact(work, writes=True)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_row_that_another_transaction_inserts_is_awaited(database: Database) -> None:
    def insert() -> None:
        database.transact(
            lambda connection: insert_unknown(
                connection, schema.layout, NAMES, layouts(["a", "b", "c"])
            ),
            writes=True,
        )

    with database.write() as connection:
        insert_unknown(connection, schema.layout, NAMES, layouts(["b"]))
        thread = threading.Thread(target=insert)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join()
    with database.write() as connection:
        assert {*connection.scalars(select(schema.layout.c.digest))} == {b"a", b"b", b"c"}


def test_each_row_has_one_id_and_each_new_one_another(database: Database, save: Save) -> None:
    save()

    def work(connection: Connection) -> None:
        columns = schema.layout.c.digest, schema.layout.c.id
        stored = dict(connection.execute(select(*columns)).all())
        assert stored
        digests = [*stored, *DIGESTS]
        layout, fqn, pack, nothing = find_ids(
            connection,
            [
                (schema.layout, digests),
                (schema.fqn, DIGESTS),
                (schema.pack, HARD),
                (schema.tensor, []),
            ],
        )
        assert layout.known == stored
        assert {*layout.new} == {*fqn.new} == {*DIGESTS}
        assert len({*stored.values(), *layout.new.values()}) == len(digests)
        assert not fqn.known
        assert nothing == RowIds()
        assert {*pack.new} == {*HARD}
        rows = [(layout.new[held], held, "blake3", "x", (), "none", 1, ()) for held in DIGESTS]
        insert_rows(connection, schema.layout, ("id", *NAMES), rows)
        again, more = (
            find_ids(connection, [(schema.layout, keys)])[0] for keys in (digests, [b"more"])
        )
        assert (again.known, again.new) == ({**stored, **layout.new}, {})
        assert more.new[b"more"] not in again.known.values()

    database.transact(work, writes=True)


def test_the_id_of_a_deleted_tensor_is_not_used_again(database: Database) -> None:
    tensor = schema.tensor
    used = []
    for _ in range(3):
        with database.write() as connection:
            (found,) = find_ids(connection, [(tensor, [b"digest"])])
            insert_rows(connection, tensor, ("id", "digest"), [(found[b"digest"], b"digest")])
            connection.execute(delete(tensor))
        used.append(found[b"digest"])
    assert sorted({*used}) == used


def test_inserting_no_rows_is_allowed(database: Database) -> None:
    database.transact(
        lambda connection: insert_rows(connection, schema.layout, NAMES, []), writes=True
    )


def test_an_existing_row_is_a_conflict_and_nothing_changes(database: Database) -> None:
    with pytest.raises(ConflictError, match="refused a row"):
        database.transact(
            lambda connection: insert_rows(
                connection, schema.layout, NAMES, [*layouts(["a", "b", "a"])]
            ),
            writes=True,
        )
    with database.write() as connection:
        assert connection.execute(select(schema.layout)).all() == []


def test_a_connection_that_is_lost_in_between_is_made_again(postgres_server: Any) -> None:
    with (
        new_database(postgres_server) as url,
        Catalog.make(url, data_url="file:///data"),
        psycopg.connect(url, autocommit=True) as other,
    ):
        database = Database(url)
        names = [f"{i:08}" for i in range(100_000)]
        tries = 0

        def work(connection: Connection) -> None:
            nonlocal tries
            tries += 1
            process = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()

            def rows() -> Iterator[tuple[Any, ...]]:
                for i, row in enumerate(layouts(names)):
                    if i == 50_000 and tries == 1:
                        other.execute("SELECT pg_terminate_backend(%s, 10000)", [process])
                    yield row

            insert_rows(connection, schema.layout, NAMES, rows())

        database.transact(work, writes=True)
        assert tries == 2
        with database.write() as connection:
            found = connection.scalars(select(schema.layout.c.dtype)).all()
        assert sorted(found) == names
        database.close()
