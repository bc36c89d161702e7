"""The tables of the catalog, as the newest migration leaves them; a test holds the two together.

Every foreign key has an index that begins with it, so that deletes stay cheap. Rows that a version
has very many of (entries, parts, chunks, shards) are clustered by their key on SQLite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any, get_type_hints

from sqlalchemy import (
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    Table,
)

from dcpstore.catalog.schema.types import (
    Bytes,
    IntTuple,
    JsonText,
    Key,
    Metric,
    Name,
    Number,
    PathText,
    UtcTime,
    Words,
)
from dcpstore.core.digests import FIRST_ALGORITHM
from dcpstore.records import VersionInfo, VersionStats

__all__ = [
    "alias",
    "chunk",
    "columns_of",
    "entry",
    "metric",
    "operation",
    "pack",
    "part",
    "plan",
    "progress",
    "ref",
    "repository",
    "shard",
    "tables",
    "tensor",
    "version",
]

tables = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


def _words(name: str, *, unique: bool = False, null: bool = False) -> Column[Any]:
    return Column(name, Words, nullable=null, unique=unique or None)


_TYPES: dict[Any, Any] = {  # of a column, by the type of a fact
    int: Number,
    int | None: Number,
    str: Words,
    datetime: UtcTime,
    Mapping[str, str]: JsonText,
    Mapping[str, float]: JsonText,
}


def _facts(kind: type[VersionInfo | VersionStats], *, null: bool = False) -> list[Column[Any]]:
    """Return a column for each fact of a version, but for those that have a table: of its name."""
    hints = get_type_hints(kind)
    return [
        Column(
            name,
            _TYPES[hints[name]],
            nullable=null or hints[name] == (int | None),
            unique=True if name == "uid" else None,
        )
        for name in columns_of(kind)
    ]


def columns_of(kind: type[VersionInfo | VersionStats]) -> tuple[str, ...]:
    """Return the facts of a version that are columns; tags and metrics are rows of their own."""
    return tuple(fact.name for fact in fields(kind) if fact.name not in {"tags", "metrics"})


def _algorithm() -> Column[Any]:
    """What the digest beside it is made by."""
    return Column("algorithm", Words, nullable=False, server_default=FIRST_ALGORITHM)


def _number(name: str, *, null: bool = False) -> Column[Any]:
    return Column(name, Number, nullable=null)


repository = Table(
    "repository",
    tables,
    Column("id", Key, primary_key=True),
    _words("uid"),
    _number("format_version"),
    _words("data_url"),
    _number("chunk_nbytes"),
    _words("chunk_codec"),
    Column("created_at", UtcTime, nullable=False),
    # Counters: a transaction that raises one holds the row until it ends, so that every
    # mutation waits for the one before it and numbers have no gaps.
    _number("last_version"),
    _number("last_operation"),
    _number("last_journaled"),  # operations up to here are durable in the data folder too
    Column("verify_began_at", UtcTime),  # of a deep verify that is not finished
    CheckConstraint("id = 1", name="one_row"),
)

plan = Table(
    "plan",
    tables,
    Column("id", Key, primary_key=True),
    _words("digest", unique=True),
    _algorithm(),
    _number("ranks"),
)

version = Table(
    "version",
    tables,
    Column("id", Key, primary_key=True),
    *_facts(VersionInfo),
    *_facts(VersionStats, null=True),  # NULL until it is committed
    Column("number", Number, unique=True),  # NULL until it is committed
    _words("status"),
    # While pending, the parent that the save asked for; afterwards the true one.
    Column("parent", Key, ForeignKey("version.id"), index=True),
    # How many ancestors it has, and one of them further up (`lineage`); NULL until it is committed.
    _number("depth", null=True),
    Column("jump", Key, ForeignKey("version.id"), index=True),
    # An expired version that has one was forgotten, and has its entries too until gc (`retention`).
    Column("plan", Key, ForeignKey("plan.id"), index=True),
    _words("planner_data", null=True),
    Column("wanted_tags", JsonText, nullable=False),
    _number("expect_tip", null=True),
    Column("started_at", UtcTime, nullable=False),
    Column("touched_at", UtcTime, nullable=False),
    Column("expired_at", UtcTime),
    # Set, to another text each time, when chunks of the version moved: its manifest must follow.
    _words("stale", null=True),
    _words("error", null=True),
    CheckConstraint("status IN ('pending', 'committed', 'aborted', 'expired')", name="status"),
    CheckConstraint("(status IN ('committed', 'expired')) = (number IS NOT NULL)", name="numbered"),
    Index(None, "branch", "number"),
    Index(None, "step", "number"),
    Index(None, "status", "touched_at"),
)

progress = Table(  # of a save that runs, as its coordinator heard last; gone when it ends
    "progress",
    tables,
    Column("version", Key, ForeignKey("version.id"), primary_key=True),
    Column("rank", Key, primary_key=True, autoincrement=False),
    _words("phase"),
    _number("nbytes"),
    _number("total"),
    Column("since", UtcTime, nullable=False),
    sqlite_with_rowid=False,
)

metric = Table(
    "metric",
    tables,
    Column("version", Key, ForeignKey("version.id"), primary_key=True),
    Column("name", Name, primary_key=True),
    Column("value", Metric),
    Index(None, "name", "value"),
    sqlite_with_rowid=False,
)

ref = Table(
    "ref",
    tables,
    Column("name", Name, primary_key=True),
    _words("kind"),
    Column("version", Key, ForeignKey("version.id"), nullable=False),
    CheckConstraint("kind IN ('tag', 'branch')", name="kind"),
    Index(None, "version", "kind", "name"),
)

operation = Table(
    "operation",
    tables,
    Column("number", Key, primary_key=True, autoincrement=False),
    _words("kind"),
    _words("target"),
    Column("old", Key, ForeignKey("version.id"), index=True),
    Column("new", Key, ForeignKey("version.id"), index=True),
    _words("author"),
    Column("created_at", UtcTime, nullable=False),
    Column("detail", JsonText),  # what else a rebuild must know of it
)

tensor = Table(
    "tensor",
    tables,
    Column("id", Key, primary_key=True),
    _words("digest", unique=True),
    _algorithm(),  # of the digests of its chunks and aliases too
    _words("dtype"),
    Column("shape", IntTuple, nullable=False),
    _words("codec"),
    _number("nbytes"),
    # gc removes rows, and an id that came back would give a running load another tensor's chunks.
    sqlite_autoincrement=True,
)

alias = Table(  # the same content as a tensor's, by its digest when it was cut otherwise
    "alias",
    tables,
    Column("digest", Words, primary_key=True),
    Column("tensor", Key, ForeignKey("tensor.id"), nullable=False, index=True),
    sqlite_with_rowid=False,
)

entry = Table(
    "entry",
    tables,
    Column("version", Key, ForeignKey("version.id"), primary_key=True),
    Column("fqn", Words, primary_key=True),
    Column("path", PathText, nullable=False),
    _words("kind"),
    Column("tensor", Key, ForeignKey("tensor.id"), index=True),
    _words("value", null=True),
    CheckConstraint("kind IN ('tensor', 'value', 'blob')", name="kind"),
    Index(None, "fqn", "version"),
    sqlite_with_rowid=False,
)

part = Table(
    "part",
    tables,
    Column("tensor", Key, ForeignKey("tensor.id"), primary_key=True),
    Column("part", Key, primary_key=True, autoincrement=False),
    Column("offsets", IntTuple, nullable=False),
    Column("shape", IntTuple, nullable=False),
    Column("chunk_shape", IntTuple, nullable=False),
    sqlite_with_rowid=False,
)

pack = Table(
    "pack",
    tables,
    Column("id", Key, primary_key=True),
    _words("key", unique=True),
    _number("nbytes"),
    Column("version", Key, ForeignKey("version.id"), nullable=False, index=True),
    _words("status"),
    Column("planned_at", UtcTime),
    Column("condemned_at", UtcTime),
    Column("verified_at", UtcTime),  # every digest was right then
    _words("damage", null=True),  # what verify found; no save reuses what lies here
    CheckConstraint("status IN ('planned', 'live', 'condemned')", name="status"),
    Index(None, "status"),
)

chunk = Table(
    "chunk",
    tables,
    Column("tensor", Key, primary_key=True),
    Column("part", Key, primary_key=True, autoincrement=False),
    Column("ordinal", Number, primary_key=True, autoincrement=False),
    Column("digest", Bytes, nullable=False),
    Column("pack", Key, ForeignKey("pack.id"), nullable=False, index=True),
    _number("offset"),
    _number("length"),
    ForeignKeyConstraint(["tensor", "part"], ["part.tensor", "part.part"]),
    Index(None, "digest", "tensor"),
    sqlite_with_rowid=False,
)

shard = Table(
    "shard",
    tables,
    Column("plan", Key, ForeignKey("plan.id"), primary_key=True),
    Column("fqn", Words, primary_key=True),
    Column("rank", Key, primary_key=True, autoincrement=False),
    # A rank may hold several boxes of one tensor (strided shards); their order is kept.
    Column("ordinal", Key, primary_key=True, autoincrement=False),
    Column("offsets", IntTuple, nullable=False),
    Column("sizes", IntTuple, nullable=False),
    sqlite_with_rowid=False,
)
