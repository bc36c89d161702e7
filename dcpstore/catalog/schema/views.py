"""The read-only views that users query: stable columns, the same on both databases.

Views hold no data, so migrations do not contain them: each run of the migrations drops them before
the tables change and creates them again afterwards.

The tree of a version's entries is joined in three levels, in whichever order suits a condition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["VIEWS", "create_views", "drop_views", "query_of"]

# Tags sorted by name. SQLite accepts ORDER BY inside the aggregate only from 3.44 on; in every
# release group_concat keeps the order of the subquery that it reads.
_TAGS = {
    "sqlite": (
        "SELECT group_concat(name, ',') FROM"
        " (SELECT name FROM ref WHERE version = v.id AND kind = 'tag' ORDER BY name)"
    ),
    "postgresql": (
        "SELECT string_agg(name, ',' ORDER BY name) FROM ref WHERE version = v.id AND kind = 'tag'"
    ),
}

VIEWS = {
    "history": """
        SELECT v.number AS version, v.uid AS uid, p.number AS parent, v.branch AS branch,
               v.step AS step, COALESCE(({tags}), '') AS tags, v.message AS message,
               v.author AS author, v.created_at AS created_at, v.ranks AS ranks,
               v.nbytes AS nbytes, v.nbytes_written AS nbytes_written
        FROM version v LEFT JOIN version p ON p.id = v.parent
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL""",
    "entries": """
        SELECT v.number AS version, f.name AS fqn, e.kind AS kind, l.dtype AS dtype,
               l.shape AS shape, l.nbytes AS nbytes, e.value AS value,
               CASE WHEN t.id IS NOT NULL THEN {digest} END AS digest
        FROM version v JOIN child g ON g.node = v.root JOIN child s ON s.node = g.child
             JOIN entry e ON e.node = s.child JOIN fqn f ON f.id = e.fqn
             LEFT JOIN tensor t ON t.id = e.tensor LEFT JOIN layout l ON l.id = t.layout
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL""",
    "storage": """
        SELECT p.key AS pack, v.number AS version, p.nbytes AS nbytes, p.status AS status
        FROM pack p JOIN version v ON v.id = p.version
        WHERE p.planned_at IS NULL""",
    "operations": """
        SELECT o.number AS number, o.kind AS kind, o.target AS target, b.number AS old,
               a.number AS new, o.author AS author, o.created_at AS created_at
        FROM operation o LEFT JOIN version b ON b.id = o.old LEFT JOIN version a ON a.id = o.new""",
    "metrics": """
        SELECT v.number AS version, m.name AS name, m.value AS value
        FROM metric m JOIN version v ON v.id = m.version
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL""",
    "labels": """
        SELECT v.number AS version, l.name AS name, l.value AS value
        FROM label l JOIN version v ON v.id = l.version
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL""",
    "tensor_history": """
        SELECT f.name AS fqn, v.number AS version, p.number AS parent, v.branch AS branch,
               v.step AS step, l.dtype AS dtype, l.shape AS shape, l.nbytes AS nbytes,
               {digest} AS digest,
               CASE WHEN v.parent IS NULL THEN 'added'
                    WHEN p.expired_at IS NOT NULL THEN 'unknown'
                    WHEN p.root = v.root THEN 'unchanged'
                    ELSE COALESCE(({change}), 'added') END AS change
        FROM entry e JOIN fqn f ON f.id = e.fqn JOIN child s ON s.child = e.node
             JOIN child g ON g.child = s.node JOIN version v ON v.root = g.node
             JOIN tensor t ON t.id = e.tensor JOIN layout l ON l.id = t.layout
             LEFT JOIN version p ON p.id = v.parent
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL AND e.kind = 'tensor'""",
    "unique_bytes": """
        WITH roots AS (
            SELECT root AS node, MIN(id) AS version, MAX(id) AS last
            FROM version WHERE root IS NOT NULL AND expired_at IS NULL GROUP BY root
        ), groups AS (
            SELECT c.child AS node, MIN(r.version) AS version, MAX(r.last) AS last
            FROM roots r JOIN child c ON c.node = r.node GROUP BY c.child
        ), sets AS (
            SELECT c.child AS node, MIN(r.version) AS version, MAX(r.last) AS last
            FROM groups r JOIN child c ON c.node = r.node GROUP BY c.child
        ), holders AS (
            SELECT e.tensor AS tensor, MIN(s.version) AS version, MAX(s.last) AS last
            FROM sets s JOIN entry e ON e.node = s.node
            WHERE e.tensor IS NOT NULL GROUP BY e.tensor
        ), chunked AS (
            SELECT tensor, version, last FROM holders
            UNION ALL
            SELECT r.run AS tensor, MIN(h.version) AS version, MAX(h.last) AS last
            FROM holders h JOIN run r ON r.tensor = h.tensor GROUP BY r.run
        ), places AS (
            SELECT MIN(h.version) AS version, MAX(h.last) AS last, MAX(k.length) AS length
            FROM chunked h JOIN chunk k ON k.tensor = h.tensor GROUP BY k.pack, k."offset"
        ), raw AS (
            SELECT h.version AS version, SUM(l.nbytes) AS nbytes
            FROM holders h JOIN tensor t ON t.id = h.tensor JOIN layout l ON l.id = t.layout
            WHERE h.version = h.last GROUP BY h.version
        ), stored AS (
            SELECT version, SUM(length) AS nbytes
            FROM places WHERE version = last GROUP BY version
        )
        SELECT v.number AS version, CAST(COALESCE(r.nbytes, 0) AS BIGINT) AS nbytes,
               CAST(COALESCE(s.nbytes, 0) AS BIGINT) AS nbytes_stored
        FROM version v LEFT JOIN raw r ON r.version = v.id LEFT JOIN stored s ON s.version = v.id
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL""",
}

# A digest as people see it.
_DIGEST = {"sqlite": "lower(hex(t.digest)) COLLATE BINARY", "postgresql": "encode(t.digest, 'hex')"}

# How the tensor of `e` under the FQN of `f` differs from that of the version `p`, in whose tree the
# set of the FQN is found by the last child that does not begin after it. NULL if it has none.
_CHANGE = """
    SELECT CASE WHEN o.tensor = e.tensor THEN 'unchanged' ELSE 'changed' END
    FROM fqn n JOIN entry o ON o.fqn = n.id
    WHERE n.name = f.name AND o.kind = 'tensor' AND o.node = (
        SELECT c.child FROM child c
        WHERE c.first <= f.name AND c.node = (
            SELECT b.child FROM child b
            WHERE b.node = p.root AND b.first <= f.name ORDER BY b.first DESC LIMIT 1
        ) ORDER BY c.first DESC LIMIT 1
    )"""


def query_of(view: str, dialect: str) -> str:
    """Return the query of a view, in the SQL of a database."""
    return VIEWS[view].format(tags=_TAGS[dialect], digest=_DIGEST[dialect], change=_CHANGE)


def create_views(connection: Connection) -> None:
    """Create every view."""
    for name in VIEWS:
        query = query_of(name, connection.dialect.name)
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {query}")


def drop_views(connection: Connection) -> None:
    """Drop the existing views, so that the tables below them can change."""
    for name in VIEWS:
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")
