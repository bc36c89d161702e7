"""The way up from a version to its ancestors, in few rows however long the history is.

Each version keeps its `depth` (how many ancestors it has) and a `jump`, an ancestor further up:
where the last two jumps above it are equally long, it jumps over both, else to its parent. So an
ancestor at any depth is found in a number of rows that grows with the logarithm of the distance.
Source: Myers, "An applicative random-access stack", Information Processing Letters 17 (1983).
"""

from __future__ import annotations

from sqlalchemy import Connection, case, select

from dcpstore.catalog.schema import tables

__all__ = ["ancestor_at", "depth_of", "is_ancestor", "lineage_below"]

_version = tables.version


def lineage_below(connection: Connection, parent: int | None) -> dict[str, int | None]:
    """Return the columns `depth` and `jump` of a version whose parent has the id `parent`."""
    if parent is None:
        return {"depth": 0, "jump": None}
    above, further = _version.alias("above"), _version.alias("further")
    row = connection.execute(
        select(
            _version.c.depth,
            above.c.depth.label("above"),
            further.c.depth.label("further"),
            further.c.id.label("target"),
        )
        .outerjoin(above, above.c.id == _version.c.jump)
        .outerjoin(further, further.c.id == above.c.jump)
        .where(_version.c.id == parent)
    ).one()
    equally_long = row.target is not None and row.depth - row.above == row.above - row.further
    return {"depth": row.depth + 1, "jump": row.target if equally_long else parent}


def depth_of(connection: Connection, version: int) -> int:
    """Return how many ancestors a version has."""
    return int(
        connection.execute(select(_version.c.depth).where(_version.c.id == version)).scalar_one()
    )


def ancestor_at(connection: Connection, start: int, depth: int) -> int:
    """Return the id of the ancestor of `start` (or itself) at a depth, which is not below it."""
    first = select(_version.c.id, _version.c.depth).where(_version.c.id == start)
    up = first.cte("up", recursive=True)
    jump = _version.alias("jump_version")
    here, above = _version.alias("here"), _version.alias("above")
    step = (
        select(above.c.id, above.c.depth)
        .select_from(up)
        .join(here, here.c.id == up.c.id)
        .outerjoin(jump, jump.c.id == here.c.jump)
        .join(
            above,
            above.c.id == case((jump.c.depth >= depth, jump.c.id), else_=here.c.parent),
        )
        .where(up.c.depth > depth)
    )
    up = up.union_all(step)
    return int(connection.execute(select(up.c.id).where(up.c.depth == depth)).scalar_one())


def is_ancestor(connection: Connection, version: int, *, of: int) -> bool:
    """Tell whether a version is the other, or one of its ancestors."""
    depth = depth_of(connection, version)
    return depth <= depth_of(connection, of) and ancestor_at(connection, of, depth) == version
