"""The read-only views that users query: stable columns, the same on both databases.

Views hold no data, so migrations do not contain them: each run of the migrations drops them before
the tables change and creates them again afterwards.
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

# The labels of a version are one JSON object.
_LABELS = {
    "sqlite": "json_each(v.labels)",
    "postgresql": "json_each_text(CAST(v.labels AS json))",
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
        SELECT v.number AS version, e.fqn AS fqn, e.kind AS kind, t.dtype AS dtype,
               t.shape AS shape, t.nbytes AS nbytes, e.value AS value, t.digest AS digest
        FROM entry e JOIN version v ON v.id = e.version LEFT JOIN tensor t ON t.id = e.tensor
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
        SELECT v.number AS version, l.key AS name, l.value AS value
        FROM version v, {labels} l
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL""",
    "tensor_history": """
        SELECT e.fqn AS fqn, v.number AS version, p.number AS parent, v.branch AS branch,
               v.step AS step, t.dtype AS dtype, t.shape AS shape, t.nbytes AS nbytes,
               t.digest AS digest,
               CASE WHEN v.parent IS NULL THEN 'added'
                    WHEN p.expired_at IS NOT NULL THEN 'unknown'
                    WHEN b.tensor IS NULL THEN 'added'
                    WHEN b.tensor = e.tensor THEN 'unchanged'
                    ELSE 'changed' END AS change
        FROM entry e JOIN version v ON v.id = e.version JOIN tensor t ON t.id = e.tensor
             LEFT JOIN version p ON p.id = v.parent
             LEFT JOIN entry b ON b.version = v.parent AND b.fqn = e.fqn AND b.kind = 'tensor'
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL AND e.kind = 'tensor'""",
    "unique_bytes": """
        SELECT v.number AS version, CAST(COALESCE(r.nbytes, 0) AS BIGINT) AS nbytes,
               CAST(COALESCE(s.nbytes, 0) AS BIGINT) AS nbytes_stored
        FROM version v
             LEFT JOIN (
                 SELECT h.version AS version, SUM(t.nbytes) AS nbytes
                 FROM ({holders}) h JOIN tensor t ON t.id = h.tensor
                 WHERE h.version = h.last GROUP BY h.version
             ) r ON r.version = v.id
             LEFT JOIN (
                 SELECT c.version AS version, SUM(c.length) AS nbytes
                 FROM (
                     SELECT MIN(h.version) AS version, MAX(h.last) AS last,
                            MAX(k.length) AS length
                     FROM ({holders}) h JOIN chunk k ON k.tensor = h.tensor
                     GROUP BY k.pack, k."offset"
                 ) c
                 WHERE c.version = c.last GROUP BY c.version
             ) s ON s.version = v.id
        WHERE v.number IS NOT NULL AND v.expired_at IS NULL""",
}

# The first and the last version that has each tensor. Forgotten versions, which still have entries
# until gc, do not count.
_HOLDERS = (
    "SELECT e.tensor AS tensor, MIN(e.version) AS version, MAX(e.version) AS last"
    " FROM entry e JOIN version w ON w.id = e.version"
    " WHERE e.tensor IS NOT NULL AND w.expired_at IS NULL GROUP BY e.tensor"
)


def query_of(view: str, dialect: str) -> str:
    """Return the query of a view, in the SQL of a database."""
    return VIEWS[view].format(tags=_TAGS[dialect], labels=_LABELS[dialect], holders=_HOLDERS)


def create_views(connection: Connection) -> None:
    """Create every view."""
    for name in VIEWS:
        query = query_of(name, connection.dialect.name)
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {query}")


def drop_views(connection: Connection) -> None:
    """Drop the existing views, so that the tables below them can change."""
    for name in VIEWS:
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")
