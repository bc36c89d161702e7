"""Views through shared entry sets: what they answer, and that indexes lead each way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.expire import forget_versions
from dcpstore.catalog.read.user_sql import query_rows

from .conftest import Save, digest_of

A = digest_of("a")
BY_DIGEST = f"substr(digest, 1, 20) = '{A[:20]}' AND digest = '{A}'"
QUESTIONS = [
    "SELECT fqn, digest FROM entries WHERE version = 2",
    "SELECT e.fqn FROM entries e JOIN history h ON h.version = e.version WHERE h.version = 2",
    "SELECT version, digest FROM entries WHERE fqn = 'w'",
    "SELECT value FROM entries WHERE fqn = 'w' AND version = 2",
    "SELECT version, change FROM tensor_history WHERE fqn = 'w'",
    "SELECT fqn, change FROM tensor_history WHERE version = 2",
    f"SELECT version, fqn FROM tensor_history WHERE {BY_DIGEST}",
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_way_is_by_index(catalog: Catalog, save: Save, question: str) -> None:
    for text in ("a", "b"):
        save({"w": text, **{f"layer.{i}": f"{text} {i}" for i in range(200)}})
    with catalog.database.write() as connection:
        found = [*unindexed(connection, question)]
    assert not found


def unindexed(connection: Connection, query: str) -> Iterator[str]:
    """Yield what a query reads without a condition on an index."""
    if connection.dialect.name == "sqlite":
        steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}")
        yield from (step[3] for step in steps if step[3].startswith("SCAN"))
        return
    # Else it would read these few rows faster without an index.
    for way in ("seqscan", "hashjoin", "mergejoin"):
        connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
    plans = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {query}").scalar_one()
    nodes: list[dict[str, Any]] = [plan["Plan"] for plan in plans]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        is_scan = node["Node Type"].endswith("Scan")
        if is_scan and not {"Index Cond", "Recheck Cond"} & node.keys():
            yield f"{node['Node Type']} {node.get('Relation Name')} {node.get('Index Name')}"


def test_unique_bytes_asks_nothing_for_each_row(catalog: Catalog, save: Save) -> None:
    save()
    with catalog.database.write() as connection:
        explain = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
        steps = connection.exec_driver_sql(f"{explain} SELECT * FROM unique_bytes").all()
    assert steps
    assert not [step for step in steps if "CORRELATED" in str(step) or "SubPlan" in str(step)]


def test_history_compares_with_the_set_of_the_parent(catalog: Catalog, save: Save) -> None:
    layers = {f"layer.{i:03}": f"{i}" for i in range(300)}
    save(layers)
    save({**layers, "layer.007": "new"})
    save({**layers, "layer.007": "new", "layer.0075": "more"})
    save({**layers, "layer.007": "new", "layer.0075": "more"})
    save(dict(list(layers.items())[1:]))
    rows = query_rows(
        catalog, "SELECT version, fqn, change FROM tensor_history WHERE change <> 'unchanged'", {}
    )
    changes = {(row.version, row.fqn): row.change for row in rows}
    assert {key for key in changes if key[0] == 1} == {(1, fqn) for fqn in layers}
    assert {key: change for key, change in changes.items() if key[0] > 1} == {
        (2, "layer.007"): "changed",
        (3, "layer.0075"): "added",
        (5, "layer.007"): "changed",
    }
    rows = query_rows(catalog, "SELECT count(*) AS n, version FROM entries GROUP BY version", {})
    assert sorted((row.version, row.n) for row in rows) == [
        (1, 301),
        (2, 301),
        (3, 302),
        (4, 302),
        (5, 300),
    ]
    forget_versions(catalog, [4], force=True, dry_run=False, author="")
    query = "SELECT DISTINCT change FROM tensor_history WHERE version = 5"
    assert query_rows(catalog, query, {}) == [("unknown",)]


def test_unique_bytes_of_shared_sets(catalog: Catalog, save: Save) -> None:
    layers = {f"layer.{i:03}": f"{i}" for i in range(200)}
    save(layers)
    save({**layers, "layer.007": "new"})
    save({**layers, "layer.007": "new"})
    query = "SELECT version, nbytes, nbytes_stored FROM unique_bytes ORDER BY version"
    assert query_rows(catalog, query, {}) == [(1, 28, 40), (2, 0, 0), (3, 0, 0)]
    forget_versions(catalog, [3], force=True, dry_run=False, author="")
    assert query_rows(catalog, query, {}) == [(1, 28, 40), (2, 28, 40)]
