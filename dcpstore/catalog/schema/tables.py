"""The tables of the catalog, as the newest migration leaves them, and the types of their columns.

A test compares tables and migrations. Every foreign key has an index that begins with it, so that
deletes stay cheap. Tables with very many rows (entries, chunks, shards) are clustered by their key
on SQLite. Of a long digest an index has the first bytes only, which halves it; a query compares
the whole digest too.

Column types make both databases store and return the same values. Text compares byte by byte on
both (collation "C"), so names are sorted in one way. Times are returned aware and in UTC. A NaN is
stored as NULL, for SQLite has no NaN. A damaged value raises an error that says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeVar, get_type_hints

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import TypeDecorator

from dcpstore.core.digests import FIRST_ALGORITHM, hasher
from dcpstore.errors import CorruptionError
from dcpstore.formats import json_fields
from dcpstore.geometry.grids import Grid
from dcpstore.records import ObjectPath, StatePath, VersionInfo, VersionStats

__all__ = [
    "Bytes",
    "IntTuple",
    "JsonText",
    "Key",
    "Metric",
    "Name",
    "Number",
    "PathText",
    "UtcTime",
    "Words",
    "alias",
    "as_hex",
    "child",
    "chunk",
    "columns_of",
    "digest_start",
    "entry",
    "fqn",
    "fqn_digest",
    "hex_start",
    "layout",
    "layout_digest",
    "loose",
    "metric",
    "node",
    "operation",
    "pack",
    "page",
    "plan",
    "progress",
    "ref",
    "repository",
    "run",
    "shard",
    "tables",
    "tensor",
    "unjudged",
    "version",
]

T = TypeVar("T")

Words = Text().with_variant(Text(collation="C"), "postgresql")
Number = BigInteger()
Key = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only in an INTEGER column
Bytes = LargeBinary()


class _Checked(TypeDecorator[T]):
    """A type whose damaged values raise CorruptionError instead of being returned."""

    impl: Any = Words  # replaced by the types that are not text
    cache_ok = True
    expected = ""  # what a value is, for messages

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], T | None]:
        """Return a function that turns a value of the database into one of Python."""
        process = super().result_processor(dialect, coltype)
        assert process is not None, "each of these types converts its values"

        def checked(value: Any) -> T | None:
            try:
                found: T | None = process(value)
                return found
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise CorruptionError(
                    f"a row of the catalog is damaged: it has {str(value)[:80]!r} instead of "
                    f"{self.expected} ({error}). Restore the catalog from a backup, or make a new "
                    "one from the data with 'dcpstore rebuild'."
                ) from error

        return checked


class IntTuple(_Checked[tuple[int, ...]]):
    """A tuple of integers as JSON text: offsets, sizes, shapes."""

    cache_ok = True
    expected = "a list of integers"

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> str | None:
        """Return `[1,2]`."""
        return None if value is None else json_fields.integers(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[int, ...] | None:
        """Return the tuple."""
        return None if value is None else _integers(value)


class JsonText(_Checked[Any]):
    """A mapping or sequence as JSON text; ASCII with escapes, for text of Postgres refuses NUL."""

    cache_ok = True
    expected = "JSON"

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the JSON text."""
        return None if value is None else json.dumps(_plain(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Return plain Python values."""
        if value == "{}":  # labels of most versions; saves the parser
            return {}
        return None if value is None else json.loads(value)


class PathText(_Checked[ObjectPath]):
    """The keys and indices that lead to an object in a state, as JSON text."""

    cache_ok = True
    expected = "a path of names and numbers"

    def process_bind_param(self, value: ObjectPath | None, dialect: Dialect) -> str | None:
        """Return the JSON text; pure ASCII, as `JsonText`."""
        return None if value is None else json_fields.path(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> ObjectPath | None:
        """Return the path."""
        if value is None:
            return None
        return StatePath.parsed(json.loads(value))


class GridsText(_Checked[tuple[Grid, ...]]):
    """The chunk grids of a tensor's parts as JSON text: offsets, shape and chunk shape of each."""

    cache_ok = True
    expected = "chunk grids"

    def process_bind_param(self, value: tuple[Grid, ...] | None, dialect: Dialect) -> str | None:
        """Return `[[[0],[8],[4]]]`."""
        return None if value is None else json_fields.grids(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[Grid, ...] | None:
        """Return the grids."""
        return None if value is None else _grids(value)


class UtcTime(_Checked[datetime]):
    """An aware datetime: timestamptz on Postgres, naive UTC text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True
    expected = "a time"

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time in UTC, naive for SQLite, whose text has no zone."""
        if value is None:
            return None
        assert value.tzinfo is not None, "times are aware"
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return the time, aware and in UTC."""
        if value is None:
            return None
        aware: datetime = value if value.tzinfo else value.replace(tzinfo=UTC)
        return aware.astimezone(UTC)


class Name(_Checked[str]):
    """A name given by a user; checked when read, for a damaged SQLite file may return bytes."""

    cache_ok = True
    expected = "a name"

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """Return the text."""
        if value is not None and not isinstance(value, str):
            raise TypeError("not text")
        return value


class Metric(_Checked[float]):
    """A float whose NaN is NULL in the database."""

    impl = Float(53)
    cache_ok = True
    expected = "a number"

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """Return None for a NaN."""
        return None if value is None or math.isnan(value) else value

    def process_result_value(self, value: Any, dialect: Dialect) -> float:
        """Return NaN for NULL."""
        return math.nan if value is None else float(value)


@lru_cache(4096)
def _integers(text: str) -> tuple[int, ...]:
    """Return the tuple of a text; cached, for thousands of rows hold the same few."""
    numbers = json.loads(text)
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("not a list of integers from 0 on")
    return tuple(numbers)


@lru_cache(4096)
def _grids(text: str) -> tuple[Grid, ...]:
    """Return the grids of a text; cached, as `_integers`."""
    parts = json.loads(text)
    if not isinstance(parts, list):
        raise ValueError("not a list of grids")
    return tuple(
        Grid(*(_integers(json.dumps(one)) for one in (offsets, shape, chunk_shape)))
        for offsets, shape, chunk_shape in parts
    )


class _Hex(GenericFunction[str]):
    """The lower-case hex digits of bytes, on both databases."""

    name = "dcpstore_hex"
    type = Words
    inherit_cache = True


@compiles(_Hex, "sqlite")
def _hex_on_sqlite(element: _Hex, compiler: SQLCompiler, **options: Any) -> str:
    # SQLite adds the collation to the column of a view, and then looks for an index with it.
    return f"lower(hex({compiler.process(element.clauses, **options)})) COLLATE BINARY"


@compiles(_Hex, "postgresql")
def _hex_on_postgres(element: _Hex, compiler: SQLCompiler, **options: Any) -> str:
    return f"encode({compiler.process(element.clauses, **options)}, 'hex')"


def as_hex(data: ColumnElement[bytes]) -> ColumnElement[str]:
    """Return bytes as lower-case hex digits."""
    return _Hex(data)


def hex_start(digest: ColumnElement[bytes]) -> ColumnElement[str]:
    """Return the first 20 hex digits of a digest, by which tensors are indexed.

    In hex, for so a query of a view can use the index too.
    """
    return func.substr(_Hex(digest), text("1"), text("20"))


def digest_start(digest: ColumnElement[bytes]) -> ColumnElement[bytes]:
    """Return the first 8 bytes of a digest, by which chunks are indexed."""
    return func.substr(digest, text("1"), text("8"))


def text_start(text_: ColumnElement[str] | str) -> ColumnElement[str]:
    """Return the first 40 characters of a text, by which labels are indexed.

    Postgres indexes no long text.
    """
    return func.substr(text_, text("1"), text("40"))


def fqn_digest(name: str, path: ObjectPath) -> bytes:
    """Return the 16 bytes by which a row of `fqn` is unique."""
    return _key_of(f"[{json_fields.quoted(name)},{json_fields.path(path)}]")


def layout_digest(
    algorithm: str, dtype: str, shape: tuple[int, ...], codec: str, parts: tuple[Grid, ...]
) -> bytes:
    """Return the 16 bytes by which a row of `layout` is unique."""
    names = (json_fields.quoted(name) for name in (algorithm, dtype, codec))
    cut = f"{json_fields.integers(shape)},{json_fields.grids(parts)}"
    return _key_of(f"[{','.join(names)},{cut}]")


def _key_of(text: str) -> bytes:
    # Always by one algorithm, for a row is looked up by it.
    return hasher(text.encode(), algorithm=FIRST_ALGORITHM).digest()[:16]


def _plain(value: Any) -> Any:
    """Return `value` with any mapping as a dict, which `json` needs."""
    return dict(value) if isinstance(value, Mapping) else value


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


_TYPES: dict[Any, Any] = {  # the column type of each type of a fact
    int: Number,
    int | None: Number,
    str: Words,
    datetime: UtcTime,
    Mapping[str, str]: JsonText,
    Mapping[str, float]: JsonText,
}


def _facts(kind: type[VersionInfo | VersionStats], *, null: bool = False) -> list[Column[Any]]:
    """Return a column for each fact of a version, under its name, unless it has its own table."""
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
    """Return the facts of a version that are columns; tags and metrics have their own tables."""
    return tuple(fact.name for fact in fields(kind) if fact.name not in {"tags", "metrics"})


def _algorithm() -> Column[Any]:
    """Return the column for the algorithm of the digest beside it."""
    return Column("algorithm", Words, nullable=False, server_default=FIRST_ALGORITHM)


def _number(name: str, *, null: bool = False) -> Column[Any]:
    return Column(name, Number, nullable=null)


def _part_index(
    name: str, column: Column[Any] | list[Column[Any]], condition: ColumnElement[bool]
) -> None:
    """Add an index of the rows for which a condition holds."""
    columns = column if isinstance(column, list) else [column]
    Index(name, *columns, sqlite_where=condition, postgresql_where=condition)


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
    # Counters: a transaction that raises one locks the row until it ends, so every mutation
    # waits for the one before it, and numbers have no gaps.
    _number("last_version"),
    _number("last_operation"),
    _number("last_journaled"),  # operations up to this one are durable in the data folder too
    Column("verify_began_at", UtcTime),  # of a deep verify that has not finished
    # Up to which version and operation the last verify found the catalog's rules kept.
    _number("verified_version", null=True),
    _number("verified_operation", null=True),
    CheckConstraint("id = 1", name="one_row"),
)

plan = Table(
    "plan",
    tables,
    Column("id", Key, primary_key=True),
    _words("digest", unique=True),
    _algorithm(),
    _number("ranks"),
    Column("page", Key, ForeignKey("page.id"), index=True),  # the stored object that holds it
)

version = Table(
    "version",
    tables,
    Column("id", Key, primary_key=True),
    *_facts(VersionInfo),
    *_facts(VersionStats, null=True),  # NULL until it is committed
    Column("number", Number, unique=True),  # NULL until it is committed
    _words("status"),
    # While pending, the parent that the save asked for; afterwards the parent at its commit.
    Column("parent", Key, ForeignKey("version.id"), index=True),
    # The number of ancestors, and one of them further up (see `read.versions`); NULL until it is
    # committed.
    _number("depth", null=True),
    Column("jump", Key, ForeignKey("version.id"), index=True),
    # An expired version with a plan was forgotten, and keeps its entries until gc (see `expire`).
    Column("plan", Key, ForeignKey("plan.id"), index=True),
    Column("root", Key, ForeignKey("node.id"), index=True),  # the tree of its entries
    _words("planner_data", null=True),
    Column("wanted_tags", JsonText, nullable=False),
    _number("expect_tip", null=True),
    Column("started_at", UtcTime, nullable=False),
    Column("touched_at", UtcTime, nullable=False),
    Column("expired_at", UtcTime),
    # A new random mark each time that chunks of the version move: its manifest must be rewritten.
    _words("stale", null=True),
    _words("error", null=True),
    CheckConstraint("status IN ('pending', 'committed', 'aborted', 'expired')", name="status"),
    CheckConstraint("(status IN ('committed', 'expired')) = (number IS NOT NULL)", name="numbered"),
    Index(None, "status", "touched_at"),
)
# The rows of expired versions stay for ever, so these indexes leave them out (decision 028).
_IS_LIVE = version.c.number.is_not(None) & version.c.expired_at.is_(None)
_part_index("ix_version_number", version.c.number, _IS_LIVE)
_part_index("ix_version_step", [version.c.step, version.c.number], _IS_LIVE)
_part_index("ix_version_created_at", [version.c.created_at, version.c.number], _IS_LIVE)
# With the step and the time, rules of retention read no row of a version that they keep. SQLite
# would read the row for `expired_at`, although it is NULL here.
_part_index(
    "ix_version_branch",
    [version.c[name] for name in ("branch", "number", "step", "created_at", "expired_at")],
    _IS_LIVE,
)
_part_index("ix_version_stale", version.c.id, version.c.stale.is_not(None))
_part_index(
    "ix_version_forgotten",
    version.c.id,
    (version.c.status == text("'expired'")) & version.c.plan.is_not(None),
)

progress = Table(  # of a running save, as its ranks reported it; deleted when the save ends
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

label = Table(  # the labels in `version.labels`, by which the log finds versions
    "label",
    tables,
    Column("version", Key, ForeignKey("version.id"), primary_key=True),
    Column("name", Name, primary_key=True),
    _words("value"),
    sqlite_with_rowid=False,
)
Index("ix_label_name", label.c.name, text_start(label.c.value), label.c.version)

ref = Table(
    "ref",
    tables,
    Column("name", Name, primary_key=True),
    _words("kind"),
    Column("version", Key, ForeignKey("version.id"), nullable=False),
    CheckConstraint("kind IN ('tag', 'branch')", name="kind"),
    Index(None, "kind", "name"),
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
    Column("detail", JsonText),  # what else a rebuild needs to know
)

fqn = Table(  # the dictionary of FQNs, each with the path of its object
    "fqn",
    tables,
    Column("id", Key, primary_key=True),
    # Of the name and the path, which together may be longer than what Postgres can index.
    Column("digest", Bytes, nullable=False, unique=True),
    Column("name", Words, nullable=False, index=True),
    Column("path", PathText, nullable=False),
)

layout = Table(  # what thousands of tensors have in common
    "layout",
    tables,
    Column("id", Key, primary_key=True),
    Column("digest", Bytes, nullable=False, unique=True),  # of all that follows
    _algorithm(),  # of the digests of its tensors, and of their chunks and aliases
    _words("dtype"),
    Column("shape", IntTuple, nullable=False),
    _words("codec"),
    _number("nbytes"),
    Column("parts", GridsText, nullable=False),
)

tensor = Table(
    "tensor",
    tables,
    Column("id", Key, primary_key=True),
    Column("digest", Bytes, nullable=False),
    # Without a layout it is a run: chunks that large tensors have in common. Layouts are few, and
    # never deleted, so this needs no index.
    Column("layout", Key, ForeignKey("layout.id")),
    Column("page", Key, ForeignKey("page.id")),  # that holds it, if it is a run
    # gc deletes rows. If an id were used again, a running load could read another tensor's chunks.
    sqlite_autoincrement=True,
)
Index("uq_tensor_digest", hex_start(tensor.c.digest), unique=True)
_part_index("ix_tensor_page", tensor.c.page, tensor.c.page.is_not(None))

run = Table(  # a tensor with more than 16 chunks has runs: of 16 chunks, the last one of the rest
    "run",
    tables,
    Column("tensor", Key, ForeignKey("tensor.id"), primary_key=True),
    Column("ordinal", Key, primary_key=True, autoincrement=False),
    Column("run", Key, ForeignKey("tensor.id"), nullable=False, index=True),
    sqlite_with_rowid=False,
)

alias = Table(  # another digest of a tensor's content: the one that it has with another grid
    "alias",
    tables,
    Column("digest", Bytes, primary_key=True),
    Column("tensor", Key, ForeignKey("tensor.id"), nullable=False, index=True),
    sqlite_with_rowid=False,
)

page = Table(  # a stored object with the contents of nodes and runs, or with a plan
    "page",
    tables,
    Column("id", Key, primary_key=True),
    _words("key", unique=True),
    _number("nbytes"),
    # Of the version whose save wrote it. Without a foreign key, which would close a circle of
    # tables: versions name their roots, and roots their pages.
    _number("version"),
    _words("status"),
    Column("condemned_at", UtcTime),
    _words("stale", null=True),  # a mark, as that of a version
    CheckConstraint("status IN ('live', 'condemned')", name="status"),
    Index(None, "status"),
)
_part_index("ix_page_stale", page.c.id, page.c.stale.is_not(None))

node = Table(  # of the trees of entries: a set (level 0), a group (1) or a root (2)
    "node",
    tables,
    Column("id", Key, primary_key=True),
    Column("digest", Bytes, nullable=False, unique=True),
    Column("level", Number, nullable=False),
    Column("page", Key, ForeignKey("page.id"), index=True),  # that holds it
    CheckConstraint("level IN (0, 1, 2)", name="level"),
)

child = Table(
    "child",
    tables,
    Column("node", Key, ForeignKey("node.id"), primary_key=True),
    Column("first", Words, primary_key=True),  # the first FQN below the child
    Column("child", Key, ForeignKey("node.id"), nullable=False, index=True),
    sqlite_with_rowid=False,
)

loose = Table(  # nodes that lost a version or a parent, until gc has looked for others
    "loose",
    tables,
    Column("node", Key, ForeignKey("node.id"), primary_key=True, autoincrement=False),
)

entry = Table(
    "entry",
    tables,
    Column("node", Key, ForeignKey("node.id"), primary_key=True),
    Column("fqn", Key, ForeignKey("fqn.id"), primary_key=True, index=True),
    _words("kind"),
    Column("tensor", Key, ForeignKey("tensor.id"), index=True),
    _words("value", null=True),
    CheckConstraint("kind IN ('tensor', 'value', 'blob')", name="kind"),
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
    Column("verified_at", UtcTime),  # when every digest was last found right
    _words("damage", null=True),  # what verify found; saves do not reuse chunks of this pack
    CheckConstraint("status IN ('planned', 'live', 'condemned')", name="status"),
    Index(None, "status"),
)
_part_index("ix_pack_damage", pack.c.id, pack.c.damage.is_not(None))

unjudged = Table(  # packs that are new or lost chunks since gc judged how much of them is used
    "unjudged",
    tables,
    Column("pack", Key, ForeignKey("pack.id"), primary_key=True, autoincrement=False),
)

chunk = Table(  # of a tensor with at most 16 chunks, or of a run
    "chunk",
    tables,
    Column("tensor", Key, ForeignKey("tensor.id"), primary_key=True),
    # Counted through all parts of the tensor, in their order; within a run from 0.
    Column("ordinal", Number, primary_key=True, autoincrement=False),
    Column("digest", Bytes, nullable=False),
    Column("pack", Key, ForeignKey("pack.id"), nullable=False, index=True),
    _number("offset"),
    _number("length"),
    Column("checksum", Bytes),  # of the stored bytes
    sqlite_with_rowid=False,
)
Index("ix_chunk_digest", digest_start(chunk.c.digest), chunk.c.tensor)

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
