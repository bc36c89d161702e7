"""A catalog of schema 0002 that is filled row by row, as the dcpstore of then filled it.

The dcpstore of today cannot write one, so this is what upgrades are tried on beside the kept
repositories. `contents` reads what must be the same before and after.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from blake3 import blake3

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.schema.migrate import migrations_folder

__all__ = ["Held", "OldCatalog", "changing", "contents"]

WHEN = datetime(2026, 1, 2, tzinfo=UTC)


class Held(NamedTuple):
    """A tensor: what is in each of its chunks, the sizes of its parts in chunks, and its codec."""

    chunks: Sequence[str]
    parts: Sequence[int] = ()
    codec: str = "none"

    @property
    def digest(self) -> str:
        """The digest of its content, in hex."""
        return blake3(json.dumps([*self.chunks, "|", *self.parts]).encode()).hexdigest()


@contextmanager
def changing(url: str) -> Iterator[sa.Connection]:
    """Yield a connection in a transaction that writes."""
    database = Database(url)
    database.may_create_file = True
    with closing(database), database.write() as connection:
        yield connection


class OldCatalog:
    """A catalog of 0002 in an empty database.

    Args:
        url: of the database.
        revision: of the schema: "0002", or "0001".
    """

    def __init__(self, url: str, revision: str = "0002") -> None:
        self.url, self._numbers, self._names = url, itertools.count(1), itertools.count(1)
        self._ids: dict[str, int] = {}  # of tensors, by digest
        scripts = ScriptDirectory(migrations_folder())
        with changing(url) as connection:
            context = MigrationContext.configure(
                connection,
                opts={"fn": lambda now, _: scripts._upgrade_revs(revision, now), "script": scripts},
            )
            with Operations.context(context):
                context.run_migrations()
            self.tables = sa.MetaData()
            self.tables.reflect(connection)
            self._insert(
                connection,
                "repository",
                [
                    {
                        "id": 1,
                        "uid": "11",
                        "format_version": 1,
                        "data_url": "data",
                        "chunk_nbytes": 1,
                        "chunk_codec": "none",
                        "created_at": WHEN,
                        "last_version": 0,
                        "last_operation": 1,
                        "last_journaled": 0,
                    }
                ],
            )
            self._insert(connection, "plan", [{"digest": "p", "ranks": 1}])

    def save(
        self,
        connection: sa.Connection,
        state: Mapping[str, Held | str],
        *,
        pending: int | None = None,
        paths: Mapping[str, str] | None = None,
        reuse: bool = True,
    ) -> int:
        """Commit a version that holds tensors and values (JSON); return its id.

        Without `reuse` it does not look for chunks that are there, as two saves at once may not see
        each other's.
        """
        number = next(self._numbers)
        version = self.begin(connection) if pending is None else pending
        plan = self._find(connection, "plan", "digest", "p")
        self._update(connection, version, number=number, status="committed", plan=plan)
        tensors = {held.digest: held for held in state.values() if isinstance(held, Held)}
        new = {digest: held for digest, held in tensors.items() if digest not in self._ids}
        self._save_tensors(connection, version, new, reuse=reuse)
        ids = self._ids
        self._insert(
            connection,
            "entry",
            [
                {
                    "version": version,
                    "fqn": fqn,
                    "path": (paths or {}).get(fqn, json.dumps([fqn])),
                    "kind": "tensor" if isinstance(held, Held) else "value",
                    "tensor": ids[held.digest] if isinstance(held, Held) else None,
                    "value": None if isinstance(held, Held) else held,
                }
                for fqn, held in state.items()
            ],
        )
        return version

    def begin(self, connection: sa.Connection) -> int:
        """Insert a pending version; return its id."""
        table = self.tables.tables["version"]
        values = {
            "uid": blake3(str(next(self._names)).encode()).hexdigest(),
            "status": "pending",
            "wanted_tags": "[]",
            "ranks": 1,
            "started_at": WHEN,
            "touched_at": WHEN,
            "created_at": WHEN,
            "labels": "{}",
            **dict.fromkeys(("branch", "message", "author", "host"), "m"),
        }
        found = connection.execute(sa.insert(table).values(values).returning(table.c.id))
        return int(found.scalar_one())

    def expire(self, connection: sa.Connection, version: int, *, forget: bool = False) -> None:
        """Expire a version; one that is only forgotten keeps its entries and its plan."""
        self._update(connection, version, status="expired", expired_at=WHEN)
        if not forget:
            entry = self.tables.tables["entry"]
            connection.execute(sa.delete(entry).where(entry.c.version == version))
            self._update(connection, version, plan=None)

    def collect(self, connection: sa.Connection) -> None:
        """Delete the tensors that no entry names, and the packs that no chunk names."""
        dead = "SELECT id FROM tensor WHERE id NOT IN (SELECT tensor FROM entry WHERE tensor > 0)"
        for table, column in (("alias", "tensor"), ("chunk", "tensor"), ("part", "tensor")):
            connection.execute(sa.text(f"DELETE FROM {table} WHERE {column} IN ({dead})"))
        connection.execute(sa.text(f"DELETE FROM tensor WHERE id IN ({dead})"))
        self._load_ids(connection)
        connection.execute(sa.text("DELETE FROM pack WHERE id NOT IN (SELECT pack FROM chunk)"))

    def move(self, connection: sa.Connection, held: Held, *, codec: str) -> None:
        """Write the chunks of a tensor again, into another pack and with another codec."""
        tensor = self._ids[held.digest]
        chunk, table = self.tables.tables["chunk"], self.tables.tables["tensor"]
        connection.execute(sa.delete(chunk).where(chunk.c.tensor == tensor))
        connection.execute(sa.update(table).where(table.c.id == tensor).values(codec=codec))
        version = connection.scalar(sa.text("SELECT MAX(id) FROM version"))
        self._write_chunks(connection, version, [held._replace(codec=codec)], reuse=True)

    def _save_tensors(
        self, connection: sa.Connection, version: int, tensors: Mapping[str, Held], *, reuse: bool
    ) -> None:
        self._insert(
            connection,
            "tensor",
            [
                {
                    "digest": digest,
                    "dtype": "int8",
                    "shape": json.dumps([len(held.chunks)]),
                    "codec": held.codec,
                    "nbytes": len(held.chunks),
                }
                for digest, held in tensors.items()
            ],
        )
        self._load_ids(connection)
        parts, aliases = [], []
        for digest, held in tensors.items():
            sizes = held.parts or (len(held.chunks),)
            begins = itertools.accumulate(sizes, initial=0)
            parts += [
                {
                    "tensor": self._ids[digest],
                    "part": number,
                    "offsets": json.dumps([begin]),
                    "shape": json.dumps([size]),
                    "chunk_shape": "[1]",
                }
                for number, (begin, size) in enumerate(zip(begins, sizes, strict=False))
            ]
            alias = blake3(digest.encode()).hexdigest()
            aliases.append({"digest": alias, "tensor": self._ids[digest]})
        self._insert(connection, "part", parts)
        self._insert(connection, "alias", aliases)
        self._write_chunks(connection, version, tensors.values(), reuse=reuse)

    def _load_ids(self, connection: sa.Connection) -> None:
        rows = connection.execute(sa.text("SELECT digest, id FROM tensor")).all()
        self._ids = dict(map(tuple, rows))

    def _write_chunks(
        self, connection: sa.Connection, version: int, tensors: Iterable[Held], *, reuse: bool
    ) -> None:
        """Write the chunks of tensors into a pack, or reuse those that have the same codec."""
        key = f"packs/{next(self._names)}"
        values = {"key": key, "nbytes": 1, "version": version, "status": "live"}
        self._insert(connection, "pack", [values])
        pack = self._find(connection, "pack", "key", key)
        query = (
            'SELECT t.codec, c.digest, c.pack, c."offset" FROM chunk c JOIN tensor t'
            " ON t.id = c.tensor"
        )
        known = {
            (codec, bytes(digest)): (found, offset)
            for codec, digest, found, offset in connection.execute(sa.text(query))
            if reuse
        }
        rows = []
        for held in tensors:
            sizes = held.parts or (len(held.chunks),)
            places = [(part, i) for part, size in enumerate(sizes) for i in range(size)]
            for (part, ordinal), text in zip(places, held.chunks, strict=True):
                digest = blake3(text.encode()).digest()
                place = known.setdefault((held.codec, digest), (pack, len(rows)))
                rows.append(
                    {
                        "tensor": self._ids[held.digest],
                        "part": part,
                        "ordinal": ordinal,
                        "digest": digest,
                        "pack": place[0],
                        "offset": place[1],
                        "length": 1,
                    }
                )
        self._insert(connection, "chunk", rows)

    def _insert(self, connection: sa.Connection, table: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            connection.execute(sa.insert(self.tables.tables[table]), rows)

    def _update(self, connection: sa.Connection, version: int, **values: Any) -> None:
        table = self.tables.tables["version"]
        connection.execute(sa.update(table).where(table.c.id == version).values(values))

    def _find(self, connection: sa.Connection, name: str, column: str, value: str) -> Any:
        table = self.tables.tables[name]
        return connection.scalar(sa.select(table.c.id).where(table.c[column] == value))


# By version: each FQN with its path, kind and value, and the digest and chunks of its tensor.
_ENTRIES = {
    True: """
        SELECT v.number, e.fqn, e.path, e.kind, e.value, e.tensor
        FROM entry e JOIN version v ON v.id = e.version ORDER BY v.number, e.fqn""",
    False: """
        SELECT v.number, f.name, f.path, e.kind, e.value, e.tensor
        FROM version v JOIN child g ON g.node = v.root JOIN child s ON s.node = g.child
             JOIN entry e ON e.node = s.child JOIN fqn f ON f.id = e.fqn
        ORDER BY v.number, f.name""",
}
_TENSORS = {
    True: "SELECT id, digest, dtype, shape, codec, nbytes FROM tensor",
    False: """
        SELECT t.id, t.digest, l.dtype, l.shape, l.codec, l.nbytes
        FROM tensor t JOIN layout l ON l.id = t.layout""",
}
_PARTS = {
    True: "SELECT tensor, offsets, shape, chunk_shape FROM part ORDER BY tensor, part",
    False: "SELECT t.id, l.parts FROM tensor t JOIN layout l ON l.id = t.layout",
}
_CHUNKS = {
    True: """
        SELECT c.tensor, c.digest, c.length FROM chunk c ORDER BY c.tensor, c.part, c.ordinal""",
    False: """
        SELECT c.tensor, c.digest, c.length FROM (
            SELECT tensor, ordinal AS at, digest, length FROM chunk
            WHERE tensor IN (SELECT id FROM tensor WHERE layout IS NOT NULL)
            UNION ALL
            SELECT r.tensor, 16 * r.ordinal + k.ordinal, k.digest, k.length
            FROM run r JOIN chunk k ON k.tensor = r.run
        ) c ORDER BY c.tensor, c.at""",
}
_ALIASES = "SELECT digest, tensor FROM alias"


def contents(url: str) -> dict[str, Any]:
    """Return what an upgrade must not change, of a catalog of either schema; read by plain SQL."""
    with changing(url) as connection:
        is_old = sa.inspect(connection).has_table("part")

        def rows(query: str) -> list[Any]:
            return [tuple(row) for row in connection.execute(sa.text(query))]

        tensors: dict[int, Any] = {}
        for tensor, digest, *facts in rows(_TENSORS[is_old]):
            tensors[tensor] = [_hex(digest), *facts, [], []]
        for tensor, *grids in rows(_PARTS[is_old]):
            found = [list(map(json.loads, grids))] if is_old else json.loads(grids[0])
            tensors[tensor][-2].extend(found)
        for tensor, digest, length in rows(_CHUNKS[is_old]):
            tensors[tensor][-1].append((_hex(digest), length))
        entries = [
            (number, fqn, json.loads(path), kind, value, tensor and tensors[tensor])
            for number, fqn, path, kind, value, tensor in rows(_ENTRIES[is_old])
        ]
        named = {tensors[row[-1]][0] for row in rows(_ENTRIES[is_old]) if row[-1] is not None}
        aliases = sorted((_hex(digest), tensors[t][0]) for digest, t in rows(_ALIASES))
        assert all(
            len(chunks) == sum(math.prod(shape) for _, shape, _ in parts)
            for *_, parts, chunks in tensors.values()
        )
        return {
            "entries": entries,
            "aliases": [(digest, held) for digest, held in aliases if held in named],
            "versions": rows(
                "SELECT number, status, plan FROM version WHERE number > 0 ORDER BY number"
            ),
        }


def _hex(digest: Any) -> str:
    return digest if isinstance(digest, str) else bytes(digest).hex()
