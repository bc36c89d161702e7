"""The read-only views that people query: stable columns, the same on both databases.

Views hold no data, so they are no part of a migration: each run drops them before the tables change
and creates them anew afterwards.
"""

from __future__ import annotations

from sqlalchemy import Connection

__all__ = ["VIEWS", "create_views", "drop_views"]

# Tags sorted by name. SQLite 3.44 first took ORDER BY inside the aggregate; before it, and after,
# group_concat keeps the order of the subquery that it reads.
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
}


def create_views(connection: Connection) -> None:
    """Create every view."""
    tags = _TAGS[connection.dialect.name]
    for name, select in VIEWS.items():
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {select.format(tags=tags)}")


def drop_views(connection: Connection) -> None:
    """Drop the views that there are, so that the tables below them can change."""
    for name in VIEWS:
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")
