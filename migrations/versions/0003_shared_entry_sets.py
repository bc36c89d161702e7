"""Entries in sets that versions share, chunks in runs that tensors share (decision 026).

A large catalog takes long, so most of the work is done before `upgrade`, by `Preparation`: in
batches, each a transaction of its own. It collects new rows in tables beside the old ones, which
stay as they are: until the last step the older dcpstore can still read, save and collect garbage.
A batch finds what is left from the rows that are there, so an upgrade that was interrupted goes on
where it was, and two at once share the work.

`upgrade` is the last step, in one transaction that keeps all others out. It converts what was saved
meanwhile and drops what was deleted meanwhile, fills the chunks, whose places may have changed
until then, and puts the new tables in the place of the old ones.

Invariant: the cutting into sets and every digest equal those of `dcpstore/formats/entry_tree.py`,
`dcpstore/catalog/schema/tables.py` and `dcpstore/core/digests.py`, of which parts are copied here:
a migration never changes. A test compares them.
"""

import json
import math
import time
import uuid
from functools import lru_cache
from itertools import groupby, pairwise
from json.encoder import encode_basestring_ascii
from operator import itemgetter
from typing import NamedTuple

import sqlalchemy as sa
from alembic import op
from blake3 import blake3

revision = "0003"
down_revision = "0002"

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
WORDS = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
TIME = sa.DateTime(timezone=True)

BATCH = 50_000  # entries of one transaction, but for a version with more
KEYS = 5_000  # of one query; SQLite takes 32,766 parameters, Postgres 65,535
SAMPLE = 20_000  # entries that an estimate converts, and two versions at least
NEAR = 32  # neighbours on each side that a boundary of entry sets depends on
RUN = 16  # chunks

# ---------------------------------------------------------------------------------------------
# The tables as they were
# ---------------------------------------------------------------------------------------------


def _was(name, *columns):
    return sa.table(name, *map(sa.column, columns))


OLD_ENTRY = _was("entry", "version", "fqn", "path", "kind", "tensor", "value")
OLD_TENSOR = _was("tensor", "id", "digest", "algorithm", "dtype", "shape", "codec", "nbytes")
OLD_PART = _was("part", "tensor", "part", "offsets", "shape", "chunk_shape")
OLD_CHUNK = _was("chunk", "tensor", "part", "ordinal", "digest")
VERSION = _was("version", "id", "plan", "labels")

# ---------------------------------------------------------------------------------------------
# The tables as they will be. Those whose names are taken are `upgrade_...` until the last step.
# ---------------------------------------------------------------------------------------------


class Tables:
    """The new tables, and those that are there during the upgrade only.

    Args:
        dialect: of the database.
        is_trial: whether they are temporary, for an estimate; then they have no foreign keys, for
            these cannot lead to tables that are not temporary.
    """

    def __init__(self, dialect, *, is_trial):
        self.all = sa.MetaData()
        self._dialect, self._is_trial = dialect, is_trial
        node, page, tensor = self._key_to("node"), self._key_to("page"), self._key_to("tensor")
        self.page = self._table(
            "page",
            sa.Column("id", KEY, nullable=False),
            sa.Column("key", WORDS, nullable=False),
            sa.Column("nbytes", sa.BigInteger(), nullable=False),
            sa.Column("version", sa.BigInteger(), nullable=False),
            sa.Column("status", WORDS, nullable=False),
            sa.Column("condemned_at", TIME, nullable=True),
            sa.Column("stale", WORDS, nullable=True),
            sa.CheckConstraint("status IN ('live', 'condemned')", name="ck_page_status"),
            sa.UniqueConstraint("key", name="uq_page_key"),
            sa.Index("ix_page_status", "status"),
            key=("id",),
        )
        self.node = self._table(
            "node",
            sa.Column("id", KEY, nullable=False),
            sa.Column("digest", sa.LargeBinary(), nullable=False),
            sa.Column("level", sa.BigInteger(), nullable=False),
            sa.Column("page", KEY, nullable=True),
            sa.CheckConstraint("level IN (0, 1, 2)", name="ck_node_level"),
            sa.UniqueConstraint("digest", name="uq_node_digest"),
            sa.Index("ix_node_page", "page"),
            *page("fk_node_page", "page"),
            key=("id",),
        )
        self.child = self._table(
            "child",
            sa.Column("node", KEY, nullable=False),
            sa.Column("first", WORDS, nullable=False),
            sa.Column("child", KEY, nullable=False),
            sa.Index("ix_child_child", "child"),
            *node("fk_child_node", "node"),
            *node("fk_child_child", "child"),
            key=("node", "first"),
        )
        self.fqn = self._table(
            "fqn",
            sa.Column("id", KEY, nullable=False),
            sa.Column("digest", sa.LargeBinary(), nullable=False),
            sa.Column("name", WORDS, nullable=False),
            sa.Column("path", WORDS, nullable=False),
            sa.UniqueConstraint("digest", name="uq_fqn_digest"),
            sa.Index("ix_fqn_name", "name"),
            key=("id",),
        )
        self.layout = self._table(
            "layout",
            sa.Column("id", KEY, nullable=False),
            sa.Column("digest", sa.LargeBinary(), nullable=False),
            sa.Column("algorithm", WORDS, nullable=False, server_default="blake3"),
            sa.Column("dtype", WORDS, nullable=False),
            sa.Column("shape", WORDS, nullable=False),
            sa.Column("codec", WORDS, nullable=False),
            sa.Column("nbytes", sa.BigInteger(), nullable=False),
            sa.Column("parts", WORDS, nullable=False),
            sa.UniqueConstraint("digest", name="uq_layout_digest"),
            key=("id",),
        )
        self.tensor = self._table(  # with the ids that the tensors have
            "tensor",
            sa.Column("id", KEY, nullable=False),
            sa.Column("digest", sa.LargeBinary(), nullable=False),
            sa.Column("layout", KEY, nullable=True),
            sa.Column("page", KEY, nullable=True),
            *self._key_to("layout")("fk_tensor_layout", "layout"),
            *page("fk_tensor_page", "page"),
            key=("id",),
            sqlite_autoincrement=True,
        )
        self.entry = self._table(
            "entry",
            sa.Column("node", KEY, nullable=False),
            sa.Column("fqn", KEY, autoincrement=False, nullable=False),
            sa.Column("kind", WORDS, nullable=False),
            sa.Column("tensor", KEY, nullable=True),
            sa.Column("value", WORDS, nullable=True),
            sa.CheckConstraint("kind IN ('tensor', 'value', 'blob')", name="ck_entry_kind"),
            *node("fk_entry_node", "node"),
            *self._key_to("fqn")("fk_entry_fqn", "fqn"),
            *tensor("fk_entry_tensor", "tensor"),
            key=("node", "fqn"),
        )
        # What is there during the upgrade only: the versions whose entries are converted, where the
        # parts of a tensor begin in the count of its chunks (but the first), and runs.
        self.done = self._table(
            "upgrade_version",
            sa.Column("version", KEY, autoincrement=False, nullable=False),
            sa.Column("root", KEY, nullable=False),
            key=("version",),
        )
        self.part = self._table(
            "upgrade_part",
            sa.Column("tensor", KEY, autoincrement=False, nullable=False),
            sa.Column("part", KEY, autoincrement=False, nullable=False),
            sa.Column("first", sa.BigInteger(), nullable=False),
            key=("tensor", "part"),
        )
        self.run_digest = self._table(
            "upgrade_run",
            sa.Column("tensor", KEY, autoincrement=False, nullable=False),
            sa.Column("ordinal", KEY, autoincrement=False, nullable=False),
            sa.Column("digest", sa.LargeBinary(), nullable=False),
            key=("tensor", "ordinal"),
        )
        self.early = list(self.all.sorted_tables)
        # What the last step creates.
        self.run = self._table(
            "run",
            sa.Column("tensor", KEY, nullable=False),
            sa.Column("ordinal", KEY, autoincrement=False, nullable=False),
            sa.Column("run", KEY, nullable=False),
            *tensor("fk_run_tensor", "tensor"),
            *tensor("fk_run_run", "run"),
            key=("tensor", "ordinal"),
        )
        self.chunk = self._table(
            "chunk",
            sa.Column("tensor", KEY, nullable=False),
            sa.Column("ordinal", sa.BigInteger(), autoincrement=False, nullable=False),
            sa.Column("digest", sa.LargeBinary(), nullable=False),
            sa.Column("pack", KEY, nullable=False),
            sa.Column("offset", sa.BigInteger(), nullable=False),
            sa.Column("length", sa.BigInteger(), nullable=False),
            sa.Column("checksum", sa.LargeBinary(), nullable=True),
            *tensor("fk_chunk_tensor", "tensor"),
            *self._key_to("pack")("fk_chunk_pack", "pack"),
            key=("tensor", "ordinal"),
        )
        self.alias = self._table(
            "alias",
            sa.Column("digest", sa.LargeBinary(), nullable=False),
            sa.Column("tensor", KEY, nullable=False),
            *tensor("fk_alias_tensor", "tensor"),
            key=("digest",),
        )
        self.loose = self._table(
            "loose",
            sa.Column("node", KEY, autoincrement=False, nullable=False),
            *node("fk_loose_node", "node"),
            key=("node",),
        )
        self.label = self._table(
            "label",
            sa.Column("version", KEY, nullable=False),
            sa.Column("name", WORDS, nullable=False),
            sa.Column("value", WORDS, nullable=False),
            *self._key_to("version")("fk_label_version", "version"),
            key=("version", "name"),
        )
        self.unjudged = self._table(
            "unjudged",
            sa.Column("pack", KEY, autoincrement=False, nullable=False),
            *self._key_to("pack")("fk_unjudged_pack", "pack"),
            key=("pack",),
        )

    def _table(self, name, *columns, key, **options):
        taken = name in TAKEN
        # On Postgres a primary key is an index, and its name may be taken too.
        renames = taken and self._dialect == "postgresql"
        if len(key) > 1 or name == "alias":
            options["sqlite_with_rowid"] = False  # clustered by the key
        return sa.Table(
            f"upgrade_{name}" if taken else name,
            self.all,
            *columns,
            sa.PrimaryKeyConstraint(*key, name=f"pk_upgrade_{name}" if renames else f"pk_{name}"),
            prefixes=["TEMPORARY"] if self._is_trial else [],
            **options,
        )

    def _key_to(self, table):
        """Return what makes a foreign key, or none in a trial, of its name and its column."""
        if self._is_trial:
            return lambda name, column: []
        target = f"upgrade_{table}" if table in TAKEN else table
        if table in ("pack", "version"):  # they stay, so they are not among the tables here
            sa.Table(table, self.all, sa.Column("id", KEY, primary_key=True), keep_existing=True)
        return lambda name, column: [sa.ForeignKeyConstraint([column], [f"{target}.id"], name=name)]


TAKEN = ("entry", "tensor", "chunk", "alias")

# Indexes that are made when their tables are filled, which is faster.
HEX = {"sqlite": "lower(hex(digest)) COLLATE BINARY", "postgresql": "encode(digest, 'hex')"}
INDEXES = (
    "CREATE UNIQUE INDEX uq_tensor_digest ON {tensor} (substr({hex}, 1, 20))",
    "CREATE INDEX ix_tensor_page ON {tensor} (page) WHERE page IS NOT NULL",
    "CREATE INDEX ix_entry_fqn ON {entry} (fqn)",
    "CREATE INDEX ix_entry_tensor ON {entry} (tensor)",
    "CREATE INDEX ix_chunk_pack ON {chunk} (pack)",
    "CREATE INDEX ix_chunk_digest ON {chunk} (substr(digest, 1, 8), tensor)",
    "CREATE INDEX ix_alias_tensor ON {alias} (tensor)",
    "CREATE INDEX ix_run_run ON run (run)",
    "CREATE INDEX ix_page_stale ON page (id) WHERE stale IS NOT NULL",
)
LIVE = "number IS NOT NULL AND expired_at IS NULL"
COLUMNS = (
    "ALTER TABLE version ADD COLUMN root {key} CONSTRAINT fk_version_root REFERENCES node (id)",
    "ALTER TABLE plan ADD COLUMN page {key} CONSTRAINT fk_plan_page REFERENCES page (id)",
    "UPDATE version SET root = (SELECT d.root FROM upgrade_version d WHERE d.version = version.id)"
    " WHERE plan IS NOT NULL",
    "CREATE INDEX ix_version_root ON version (root)",
    "DROP INDEX ix_version_branch_number",
    "DROP INDEX ix_version_step_number",
    f"CREATE INDEX ix_version_number ON version (number) WHERE {LIVE}",
    f"CREATE INDEX ix_version_step ON version (step, number) WHERE {LIVE}",
    f"CREATE INDEX ix_version_created_at ON version (created_at, number) WHERE {LIVE}",
    "CREATE INDEX ix_version_branch ON version (branch, number, step, created_at, expired_at)"
    f" WHERE {LIVE}",
    "CREATE INDEX ix_ref_kind_name ON ref (kind, name)",
    "CREATE INDEX ix_version_stale ON version (id) WHERE stale IS NOT NULL",
    "CREATE INDEX ix_version_forgotten ON version (id)"
    " WHERE status = 'expired' AND \"plan\" IS NOT NULL",
    "CREATE INDEX ix_label_name ON label (name, substr(value, 1, 40), version)",
    'CREATE INDEX ix_plan_page ON "plan" (page)',
    "CREATE INDEX ix_pack_damage ON pack (id) WHERE damage IS NOT NULL",
    "ALTER TABLE repository ADD COLUMN verified_version BIGINT",
    "ALTER TABLE repository ADD COLUMN verified_operation BIGINT",
    # The next gc looks at every pack.
    "INSERT INTO unjudged (pack) SELECT id FROM pack WHERE status = 'live'",
)

# Every chunk of the tensors that a query names, with its number in the count through the parts.
CHUNKS = """
    SELECT c.tensor AS tensor, c.digest AS digest, c.pack AS pack, c."offset" AS "offset",
           c.length AS length, c.ordinal + CASE WHEN c.part = 0 THEN 0 ELSE COALESCE(
               (SELECT p.first FROM upgrade_part p WHERE p.tensor = c.tensor AND p.part = c.part), 0
           ) END AS at
    FROM chunk c WHERE c.tensor IN ({tensors})"""
RUNS = (
    "INSERT INTO upgrade_tensor (digest) SELECT DISTINCT digest FROM upgrade_run",
    """INSERT INTO run (tensor, ordinal, run)
    SELECT d.tensor, d.ordinal, t.id
    FROM upgrade_run d JOIN upgrade_tensor t ON t.digest = d.digest AND t.layout IS NULL""",
)
PLACES = (
    'INSERT INTO upgrade_chunk (tensor, ordinal, digest, pack, "offset", length)'
    ' SELECT tensor, at, digest, pack, "offset", length FROM ('
    + CHUNKS.format(
        tensors="SELECT t.id FROM upgrade_tensor t WHERE t.layout IS NOT NULL"
        " AND NOT EXISTS (SELECT 1 FROM run r WHERE r.tensor = t.id)"
    )
    + ") c",
    # Tensors that share a run may have its chunks in different places. Those in good packs win.
    'INSERT INTO upgrade_chunk (tensor, ordinal, digest, pack, "offset", length)'
    ' SELECT run, ordinal, digest, pack, "offset", length FROM ('
    f" SELECT r.run AS run, c.at % {RUN} AS ordinal, c.digest AS digest, c.pack AS pack,"
    ' c."offset" AS "offset", c.length AS length,'
    f" ROW_NUMBER() OVER (PARTITION BY r.run, c.at % {RUN} ORDER BY"
    " CASE WHEN k.status = 'live' AND k.damage IS NULL THEN 0 ELSE 1 END, c.tensor, c.at) AS nth"
    " FROM (" + CHUNKS.format(tensors="SELECT tensor FROM run") + ") c"
    f" JOIN run r ON r.tensor = c.tensor AND r.ordinal = c.at / {RUN}"
    " JOIN pack k ON k.id = c.pack) chosen WHERE nth = 1",
)
# Their manifests hold whole versions, and are to be written again as manifests of pages. Until then
# no pack is deleted, so they stay right even where a chunk of a run lies elsewhere now.
OLD_MANIFESTS = "UPDATE version SET stale = :mark WHERE plan IS NOT NULL"
ALIASES = (
    "INSERT INTO upgrade_alias (digest, tensor) SELECT {unhex}, a.tensor FROM alias a"
    " WHERE a.tensor IN (SELECT id FROM upgrade_tensor)"
)
UNHEX = {"sqlite": "upgrade_unhex(a.digest)", "postgresql": "decode(a.digest, 'hex')"}

# What was deleted meanwhile: versions that have no entries any more, and nodes of these alone.
DROPPED = "DELETE FROM upgrade_version WHERE version IN (SELECT id FROM version WHERE plan IS NULL)"
LONELY = tuple(
    f"DELETE FROM {table} WHERE {column} IN (SELECT n.id FROM node n WHERE n.level = {level}"
    f" AND n.id NOT IN (SELECT {above}))"
    for level, above in (
        (2, "root FROM upgrade_version"),
        (1, "child FROM child"),
        (0, "child FROM child"),
    )
    for table, column in (("child", "node"), ("upgrade_entry", "node"), ("node", "id"))
)
UNUSED = (
    "DELETE FROM fqn WHERE NOT EXISTS (SELECT 1 FROM entry e WHERE e.fqn = fqn.id)",
    "DELETE FROM layout WHERE id NOT IN (SELECT layout FROM tensor WHERE layout IS NOT NULL)",
)


# ---------------------------------------------------------------------------------------------
# The work
# ---------------------------------------------------------------------------------------------


class Piece:
    """Neighbouring entries of a version, which become one entry set; `digest` is None at first."""

    __slots__ = ("digest", "rows")

    def __init__(self, rows):
        self.rows, self.digest = rows, None

    @property
    def first(self):
        return self.rows[0][0] if self.rows else ""


class Estimate(NamedTuple):
    """What is to be converted, and about how many new rows, bytes and seconds that makes."""

    versions: int
    entries: int
    tensors: int
    chunks: int
    rows: int
    nbytes: int
    seconds: float


class Cost(NamedTuple):
    """What a trial has made until now: rows, bytes, and the time in seconds of a clock."""

    rows: int
    nbytes: int
    seconds: float


class Preparation:
    """Converts the entries of versions, batch by batch; it may be ended between two batches."""

    def __init__(self):
        self._tables = None
        self._last = {}  # the pieces of the version before, by their first FQN
        self._fqns, self._cuts = [], [0]  # of the version before

    def left(self, connection):
        """Return how many entries are not converted yet."""
        is_left = OLD_ENTRY.c.version > _converted(connection)
        return connection.scalar(sa.select(sa.func.count()).select_from(OLD_ENTRY).where(is_left))

    def step(self, connection):
        """Convert some versions in the transaction of the caller, and the tensors that they name.

        Returns the number of their entries, 0 when there are no more.
        """
        self._begin(connection)
        found = _read_some(connection, _converted(connection))
        self._plant(
            connection,
            [(v, [row[1:] for row in rows]) for v, rows in groupby(found, itemgetter(0))],
        )
        return len(found)

    def finish(self, connection):
        """Convert the rest, and replace the old tables; nobody else may use the database."""
        while self.step(connection):
            pass
        for version in _missed(connection):
            self._plant(connection, [(version, _read_version(connection, version))])
        tables, dialect = self._tables, connection.dialect.name
        if connection.execute(sa.text(DROPPED)).rowcount:
            _run(connection, LONELY)
        gone = self._follow(connection)
        _create(connection, tables.run, tables.chunk, tables.alias)
        _fill(connection)
        connection.execute(sa.text(OLD_MANIFESTS), {"mark": uuid.uuid4().hex})
        if dialect == "sqlite":
            driver = connection.connection.driver_connection
            driver.create_function("upgrade_unhex", 1, bytes.fromhex, deterministic=True)
        _run(connection, [ALIASES.format(unhex=UNHEX[dialect])])
        _run(connection, [f"DROP TABLE {n}" for n in ("entry", "alias", "chunk", "part", "tensor")])
        for name in TAKEN:
            _rename(connection, name)
        _create(connection, tables.label)
        _copy_labels(connection, tables.label)
        _index(connection, {name: name for name in TAKEN})
        for some in _portions(gone):
            connection.execute(sa.delete(OLD_TENSOR).where(OLD_TENSOR.c.id.in_(some)))
        _run(connection, UNUSED)
        _create(connection, tables.loose, tables.unjudged)
        key = KEY.compile(connection.dialect)
        _run(connection, [statement.format(key=key) for statement in COLUMNS])
        _run(connection, [f"DROP TABLE upgrade_{name}" for name in ("version", "part", "run")])
        if dialect == "postgresql":
            _run(connection, [f"ANALYZE {n}" for n in ("node", "child", "fqn", "run", *TAKEN)])

    def estimate(self, connection):
        """Return an `Estimate`, from a sample that is converted into temporary tables.

        The sample is of the newest versions. What the first of them adds is counted once, what the
        others add is counted for each version, and what tensors and chunks add for each of these.
        """
        versions, entries = len(_missed(connection)), self.left(connection)
        tensors, chunks = (
            connection.scalar(sa.select(sa.func.count()).select_from(table))
            for table in (OLD_TENSOR, OLD_CHUNK)
        )
        sample = _sample(connection)
        self._tables = tables = Tables(connection.dialect.name, is_trial=True)
        _create(connection, *tables.early, tables.run, tables.chunk, tables.alias)
        held = {row[3] for _, rows in sample for row in rows if row[3] is not None}
        costs = [self._cost(connection)]
        for part_of_it in (
            lambda: self._stage(connection, held),
            lambda: self._plant(connection, sample[:1]),
            lambda: self._plant(connection, sample[1:]),
            lambda: (_fill(connection), _index(connection, {n: f"upgrade_{n}" for n in TAKEN})),
        ):
            part_of_it()
            costs.append(self._cost(connection))
        count = connection.scalar(sa.select(sa.func.count()).select_from(tables.chunk))
        schema = "temp" if connection.dialect.name == "sqlite" else "pg_temp"
        _run(connection, [f"DROP TABLE {schema}.{table.name}" for table in self._made()])
        times = (
            tensors / max(1, len(held)),
            min(1, len(sample)),
            max(0, versions - 1) / max(1, len(sample) - 1),
            chunks / max(1, count),
        )
        total = [
            sum(time * (b[i] - a[i]) for time, (a, b) in zip(times, pairwise(costs), strict=True))
            for i in range(len(Cost._fields))
        ]
        return Estimate(
            versions, entries, tensors, chunks, round(total[0]), round(total[1]), total[2]
        )

    def _made(self):
        """Return the tables of a trial, those first that name others."""
        tables = self._tables
        return [tables.alias, tables.chunk, tables.run, *reversed(tables.early)]

    def _cost(self, connection):
        counts = [f"(SELECT count(*) FROM {table.name})" for table in self._made()]
        rows = connection.scalar(sa.text(f"SELECT {' + '.join(counts)}"))
        if connection.dialect.name == "sqlite":
            pages, size = (
                connection.exec_driver_sql(f"PRAGMA temp.{name}").scalar()
                for name in ("page_count", "page_size")
            )
            nbytes = pages * size
        else:
            nbytes = connection.scalar(
                sa.text(
                    "SELECT CAST(sum(pg_total_relation_size(oid)) AS BIGINT) FROM pg_class"
                    " WHERE relkind = 'r' AND relnamespace = pg_my_temp_schema()"
                )
            )
        return Cost(rows, nbytes, time.perf_counter())

    def _begin(self, connection):
        """Create the tables that the batches fill, unless they are there."""
        if self._tables is None:
            self._tables = Tables(connection.dialect.name, is_trial=False)
        if not sa.inspect(connection).has_table(self._tables.done.name):
            _create(connection, *self._tables.early)

    def _plant(self, connection, versions):
        """Write the trees of versions, each given by its id and its entries, sorted by FQN."""
        tables = self._tables
        # What was computed in a transaction that failed is still right, but it may be incomplete.
        self._last = {first: p for first, p in self._last.items() if p.digest is not None}
        grown = [(version, self._pieces(rows)) for version, rows in versions]
        distinct = {id(piece): piece for _, pieces in grown for piece in pieces}.values()
        new = [piece for piece in distinct if piece.digest is None]
        digests = _digests(connection, {r[3] for p in new for r in p.rows if r[3] is not None})
        for piece in new:
            piece.digest = set_digest(piece.rows, digests)
        sets = {piece.digest: piece for piece in distinct}
        above = {}  # groups and roots: the level, and what is below
        roots = []
        for version, pieces in grown:
            groups = _groups([(piece.first, piece.digest) for piece in pieces])
            above |= {digest: (1, children) for digest, children in groups}
            below = [(children[0][0], digest) for digest, children in groups]
            root = group_digest(below)
            above[root] = (2, below)
            roots.append((version, root))
        levels = dict.fromkeys(sets, 0) | {digest: level for digest, (level, _) in above.items()}
        ids, missing = _identified(
            connection, tables.node, ("digest", "level"), {d: (d, n) for d, n in levels.items()}
        )
        self._write_entries(connection, [(ids[d], sets[d].rows) for d in missing if d in sets])
        _insert(
            connection,
            tables.child,
            ("node", "first", "child"),
            [
                (ids[digest], first, ids[child])
                for digest in missing
                if digest in above
                for first, child in above[digest][1]
            ],
        )
        done = [(version, ids[root]) for version, root in roots]
        _insert(connection, tables.done, ("version", "root"), done)

    def _pieces(self, rows):
        """Return the pieces of a version; those that the version before has too are the same."""
        fqns = [row[0] for row in rows]
        if fqns != self._fqns:
            self._fqns, self._cuts = fqns, cut(fqns)
        pieces = []
        for begin, end in pairwise([*self._cuts, len(rows)]):
            piece = Piece(rows[begin:end])
            last = self._last.get(piece.first)
            pieces.append(piece if last is None or last.rows != piece.rows else last)
        self._last = {piece.first: piece for piece in pieces}
        return pieces

    def _write_entries(self, connection, sets):
        """Write the entries of new sets, each given by the id of its node and its rows."""
        named = {(row[0], path_text(row[1])) for _, rows in sets for row in rows}
        keys = {fqn_digest(*pair): pair for pair in named}
        fqns, _ = _identified(
            connection,
            self._tables.fqn,
            ("digest", "name", "path"),
            {digest: (digest, *pair) for digest, pair in keys.items()},
        )
        ids = {pair: fqns[digest] for digest, pair in keys.items()}
        self._stage(connection, {row[3] for _, rows in sets for row in rows if row[3] is not None})
        _insert(
            connection,
            self._tables.entry,
            ("node", "fqn", "kind", "tensor", "value"),
            [
                (node, ids[fqn, path_text(path)], kind, tensor, value)
                for node, rows in sets
                for fqn, path, kind, tensor, value in rows
            ],
        )

    def _stage(self, connection, wanted):
        """Write the tensors of these ids that are not there yet, under the same ids."""
        table = self._tables.tensor
        for ids in _portions(wanted):
            known = set(connection.scalars(sa.select(table.c.id).where(table.c.id.in_(ids))))
            new = [tensor for tensor in ids if tensor not in known]
            layouts = self._lay_out(connection, new)
            digests = _digests(connection, new)
            _insert(
                connection,
                table,
                ("id", "digest", "layout"),
                [(tensor, bytes.fromhex(digests[tensor]), layouts[tensor]) for tensor in new],
            )

    def _lay_out(self, connection, ids):
        """Write the layouts of tensors, and their parts and runs; return the layouts by tensor."""
        if not ids:
            return {}
        tensor, part = OLD_TENSOR.c, OLD_PART.c
        # A catalog of 0001 has no column for the algorithm, which then is BLAKE3.
        columns = {column["name"] for column in sa.inspect(connection).get_columns("tensor")}
        algorithm = tensor.algorithm if "algorithm" in columns else sa.literal("blake3")
        rows = connection.execute(
            sa.select(
                tensor.id, algorithm, tensor.dtype, tensor.shape, tensor.codec, tensor.nbytes
            ).where(tensor.id.in_(ids))
        ).all()
        grids = {held: [] for held in ids}
        for held, *grid in connection.execute(
            sa.select(part.tensor, part.offsets, part.shape, part.chunk_shape)
            .where(part.tensor.in_(ids))
            .order_by(part.tensor, part.part)
        ):
            grids[held].append(tuple(map(integers, grid)))
        wanted, named = {}, {}
        for held, made_by, dtype, shape, codec, nbytes in rows:
            facts = (made_by, dtype, integers(shape), codec)
            parts = grids_text(tuple(grids[held]))
            named[held] = layout_digest(*facts, parts)
            wanted[named[held]] = (named[held], *facts, nbytes, parts)
        layouts, _ = _identified(
            connection,
            self._tables.layout,
            ("digest", "algorithm", "dtype", "shape", "codec", "nbytes", "parts"),
            wanted,
        )
        self._count_chunks(connection, {row.id: (row.codec, grids[row.id]) for row in rows})
        return {held: layouts[digest] for held, digest in named.items()}

    def _count_chunks(self, connection, cuts):
        """Write where parts begin in the count of chunks, and the digests of runs.

        `cuts` are the codec and the grids of tensors, by id.
        """
        firsts, large = {}, {}
        for held, (codec, grids) in cuts.items():
            count = 0
            for number, (_, shape, chunk_shape) in enumerate(grids):
                firsts[held, number] = count
                count += math.prod(
                    map(chunks_along, read_integers(shape), read_integers(chunk_shape))
                )
            if count > RUN:
                large[held] = (codec, count)
        _insert(
            connection,
            self._tables.part,
            ("tensor", "part", "first"),
            [(*key, first) for key, first in firsts.items() if key[1]],
        )
        if not large:
            return
        chunk = OLD_CHUNK.c
        rows = connection.execute(
            sa.select(chunk.tensor, chunk.part, chunk.ordinal, chunk.digest)
            .where(chunk.tensor.in_(large))
            .order_by(chunk.tensor, chunk.part, chunk.ordinal),
            execution_options={"stream_results": True},
        )
        runs = groupby(rows, lambda row: (row[0], (firsts[row[0], row[1]] + row[2]) // RUN))
        found = []
        for (held, ordinal), some in runs:
            codec, count = large[held]
            digests = [row[3] for row in some]
            whole = len(digests) == min(RUN, count - RUN * ordinal)
            # A run that lacks chunks is damaged, and shared with nobody.
            found.append(
                (held, ordinal, run_digest(codec if whole else f"{codec} {held}", digests))
            )
        _insert(connection, self._tables.run_digest, ("tensor", "ordinal", "digest"), found)

    def _follow(self, connection):
        """Convert tensors again whose codec a save has changed; return the ids of those deleted."""
        codecs = (
            "SELECT u.id FROM upgrade_tensor u JOIN tensor t ON t.id = u.id"
            " JOIN layout l ON l.id = u.layout WHERE l.codec <> t.codec"
        )
        deleted = "SELECT id FROM upgrade_tensor WHERE id NOT IN (SELECT id FROM tensor)"
        changed, gone = (connection.scalars(sa.text(query)).all() for query in (codecs, deleted))
        tables = self._tables
        for table in (tables.part, tables.run_digest):
            for some in _portions([*changed, *gone]):
                connection.execute(sa.delete(table).where(table.c.tensor.in_(some)))
        for some in _portions(changed):
            new = [{"held": h, "new": n} for h, n in self._lay_out(connection, some).items()]
            connection.execute(
                sa.update(tables.tensor)
                .where(tables.tensor.c.id == sa.bindparam("held"))
                .values(layout=sa.bindparam("new")),
                new,
            )
        return gone


def _converted(connection):
    """Return the last version of those that were converted in order, 0 if there is none."""
    if not sa.inspect(connection).has_table("upgrade_version"):
        return 0
    return connection.scalar(sa.text("SELECT COALESCE(MAX(version), 0) FROM upgrade_version"))


def _missed(connection):
    """Return the versions that have entries, or may have, and are not converted; the oldest first.

    Those that were committed after a later one, and those without an entry.
    """
    query = sa.select(VERSION.c.id).where(VERSION.c.plan.is_not(None)).order_by(VERSION.c.id)
    if sa.inspect(connection).has_table("upgrade_version"):
        query = query.where(
            sa.text("NOT EXISTS (SELECT 1 FROM upgrade_version d WHERE d.version = version.id)")
        )
    return connection.scalars(query).all()


def _read(connection, *conditions, limit=None):
    """Return rows of entries as plain tuples, by version and FQN."""
    entry = OLD_ENTRY.c
    query = sa.select(OLD_ENTRY).where(*conditions).order_by(entry.version, entry.fqn).limit(limit)
    return connection.execute(query).cursor.fetchall()  # rows of SQLAlchemy compare slowly


def _read_some(connection, after):
    """Return the entries of the versions after one, about BATCH of them, and of whole versions."""
    entry = OLD_ENTRY.c
    found = rows = _read(connection, entry.version > after, limit=BATCH)
    while len(rows) == BATCH:
        last, fqn = found[-1][:2]
        if found[0][0] != last:  # that version may have more; it is left to the next batch
            return [row for row in found if row[0] != last]
        key = sa.tuple_(entry.version, entry.fqn)
        rows = _read(connection, key > sa.tuple_(last, fqn), limit=BATCH)
        found = found + rows
    return found


def _read_version(connection, version):
    return [row[1:] for row in _read(connection, OLD_ENTRY.c.version == version)]


def _sample(connection):
    """Return the newest versions with their entries: about SAMPLE entries, and two versions."""
    newest = sa.select(VERSION.c.id).where(VERSION.c.plan.is_not(None))
    sample, count = [], 0
    for version in connection.scalars(newest.order_by(VERSION.c.id.desc()).limit(50)).all():
        if len(sample) >= 2 and count >= SAMPLE:
            break
        sample.insert(0, (version, _read_version(connection, version)))
        count += len(sample[0][1])
    return sample


def _digests(connection, tensors):
    """Return the digests of tensors in hex, by id."""
    table = OLD_TENSOR.c
    found = {}
    for ids in _portions(tensors):
        query = sa.select(table.id, table.digest).where(table.id.in_(ids))
        found.update(connection.execute(query).cursor.fetchall())
    return found


def _identified(connection, table, names, wanted):
    """Write rows, given by their digests, that are not there; return all ids, and what was new."""
    digests = table.c.digest

    def find(some):
        ids = {}
        for portion in _portions(some):
            query = sa.select(digests, table.c.id).where(digests.in_(portion))
            ids.update(connection.execute(query).cursor.fetchall())
        return ids

    known = find(wanted)
    new = [digest for digest in wanted if digest not in known]
    _insert(connection, table, names, [wanted[digest] for digest in new])
    return known | find(new), new


def _insert(connection, table, names, rows):
    """Insert rows; on Postgres by one statement, for it takes long over many."""
    if not rows:
        return
    target = f"INSERT INTO {table.name} ({', '.join(names)})"
    if connection.dialect.name == "sqlite":
        marks = ", ".join("?" * len(names))
        connection.exec_driver_sql(f"{target} VALUES ({marks})", rows)
        return
    types = [table.c[name].type.dialect_impl(connection.dialect) for name in names]
    arrays = [f"%s::{kind.compile(connection.dialect).split()[0]}[]" for kind in types]
    columns = tuple(map(list, zip(*rows, strict=True)))
    connection.exec_driver_sql(f"{target} SELECT * FROM unnest({', '.join(arrays)})", columns)


def _portions(keys):
    """Yield keys in lists that one query takes."""
    keys = list(keys)
    for begin in range(0, len(keys), KEYS):
        yield keys[begin : begin + KEYS]


def _run(connection, statements):
    for statement in statements:
        connection.execute(sa.text(statement))


def _create(connection, *tables):
    tables[0].metadata.create_all(connection, tables, checkfirst=False)


def _fill(connection):
    """Write runs, and the chunks of all tensors that were converted."""
    if connection.dialect.name == "postgresql":  # which has not counted the ids that were given
        _run(
            connection,
            [
                "SELECT setval(pg_get_serial_sequence('upgrade_tensor', 'id'),"
                " COALESCE(MAX(id), 0) + 1, false) FROM upgrade_tensor"
            ],
        )
    _run(connection, (*RUNS, *PLACES))


def _copy_labels(connection, label):
    """Write the labels of all versions into their table; those that are damaged stay as text."""
    query = sa.select(VERSION.c.id, VERSION.c.labels).where(VERSION.c.labels != "{}")
    last = 0
    while found := connection.execute(
        query.where(VERSION.c.id > last).order_by(VERSION.c.id).limit(KEYS)
    ).all():
        last = found[-1].id
        rows = [(id_, name, text) for id_, labels in found for name, text in _labels(labels)]
        _insert(connection, label, ("version", "name", "value"), rows)


def _labels(text):
    try:
        return [(name, value) for name, value in json.loads(text).items() if isinstance(value, str)]
    except (ValueError, AttributeError):
        return []


def _rename(connection, name):
    _run(connection, [f"ALTER TABLE upgrade_{name} RENAME TO {name}"])
    if connection.dialect.name == "postgresql":
        _run(connection, [f"ALTER INDEX pk_upgrade_{name} RENAME TO pk_{name}"])
        if name == "tensor":
            _run(connection, ["ALTER SEQUENCE upgrade_tensor_id_seq RENAME TO tensor_id_seq"])


def _index(connection, names):
    """Create the indexes of tables that are filled, which have these names now."""
    hex_digits = HEX[connection.dialect.name]
    _run(connection, [statement.format(hex=hex_digits, **names) for statement in INDEXES])


# ---------------------------------------------------------------------------------------------
# Digests and boundaries, as dcpstore computes them
# ---------------------------------------------------------------------------------------------


def cut(fqns):
    """Return where the sets of sorted FQNs begin, the first at 0."""
    count = len(fqns)
    if count <= 2 * NEAR:
        return [0]
    import numpy as np  # noqa: PLC0415 (a new repository needs none)

    hashes = np.fromiter(map(_hash, fqns), np.uint64, count)
    is_least = np.ones(count, bool)
    is_least[:NEAR] = is_least[count - NEAR :] = False
    for near in range(1, NEAR + 1):
        is_least[near:] &= hashes[near:] < hashes[:-near]
        is_least[:-near] &= hashes[:-near] <= hashes[near:]
    return [0, *np.flatnonzero(is_least).tolist()]


@lru_cache(1 << 16)
def _hash(fqn):
    return int.from_bytes(blake3(fqn.encode()).digest()[:8], "little")


def set_digest(rows, digests):
    """Return the digest of an entry set; `digests` are those of tensors in hex, by id."""
    entries = []
    for fqn, path, kind, tensor, value in rows:
        held = "null" if tensor is None else f'"{digests[tensor]}"'
        words = "null" if value is None else quoted(value)
        entries.append(f'[{quoted(fqn)},{path_text(path)},"{kind}",{held},{words}]')
    return blake3(b"dcpstore entry set\n" + ",".join(entries).encode()).digest()


def group_digest(children):
    """Return the digest of a group or root; children are pairs of their first FQN and digest."""
    return blake3(b"dcpstore entry group\n" + b"".join(d for _, d in children)).digest()


def _groups(below):
    """Return the groups of sets, each as its digest and its children."""
    bounds = [*cut([first for first, _ in below]), len(below)]
    return [(group_digest(below[i:j]), below[i:j]) for i, j in pairwise(bounds)]


def run_digest(codec, digests):
    """Return the digest of a run."""
    return blake3(f"dcpstore run\n{codec}\n".encode() + b"".join(digests)).digest()


def fqn_digest(name, path):
    """Return the digest of an FQN, whose path is `path_text`."""
    return blake3(f"[{quoted(name)},{path}]".encode()).digest()[:16]


def layout_digest(algorithm, dtype, shape, codec, parts):
    """Return the digest of a layout, whose shape and parts are texts."""
    names = ",".join(map(quoted, (algorithm, dtype, codec)))
    return blake3(f"[{names},{shape},{parts}]".encode()).digest()[:16]


quoted = encode_basestring_ascii


@lru_cache(1 << 16)
def path_text(text):
    """Return a path as it is written today; one that is damaged stays as it is."""
    try:
        found = json.loads(text)
        has_marks = isinstance(found[0], list) if found else False
        keys, *rest = found if has_marks else [found]
        marks = rest[0] if rest else ""
        plain = f"[{','.join(quoted(k) if isinstance(k, str) else str(k) for k in keys)}]"
    except (ValueError, TypeError, LookupError):
        return text
    if not has_marks or (len(keys) == 1 and not marks):
        return plain
    return f"[{plain},{quoted(marks)}]" if marks else f"[{plain}]"


@lru_cache(4096)
def read_integers(text):
    return tuple(json.loads(text))


def integers(text):
    """Return the text of offsets or a shape as it is written today."""
    return f"[{','.join(map(str, read_integers(text)))}]"


def grids_text(grids):
    """Return the parts of a layout; each is the texts of its offsets, shape and chunk shape."""
    return f"[{','.join('[' + ','.join(grid) + ']' for grid in grids)}]"


def chunks_along(size, chunk):
    """Return how many chunks there are along an axis."""
    return -(-size // max(1, chunk))  # 0 only in a damaged catalog


def upgrade():
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        # The repository first: every change of the others begins there.
        names = ("repository", "version", "plan", "pack", "entry", "tensor", "part", "chunk")
        _run(connection, [f"LOCK TABLE {', '.join(names)}, alias IN ACCESS EXCLUSIVE MODE"])
    Preparation().finish(connection)
