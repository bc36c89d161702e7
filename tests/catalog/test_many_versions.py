"""What is asked of a long history costs no more than of a short one.

Costs are counted, not timed: on Postgres the rows that the database read, on SQLite the steps of
its virtual machine.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Connection, delete, select, text, update

from benchmarks.long_history import METRIC, STEPS, TAG_EVERY, lengthen
from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.maintenance.retention import Retention, _judge
from dcpstore.catalog.read.log_filter import LogFilter, best_version, list_log
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.catalog.schema import tables
from dcpstore.errors import NotFoundError
from dcpstore.repository import Repository
from tests import servers
from tests.soundness import Place

FEW, MANY = 3_000, 12_000  # more than what is looked at before an index is asked
MOST = 1.5  # times as much as for few versions
SPARE = 600  # rows: searches have more steps in a large index; some plans read rows twice

Ask = Callable[[Connection, int], object]


class Pair(NamedTuple):
    """Two repositories with few and with many versions."""

    few: Repository
    many: Repository

    def fill(self, is_expired: Callable[[int, int], bool] | None = None) -> None:
        """Fill them; `is_expired` is given a number, and how many versions there are."""
        for repo, count in zip(self, (FEW, MANY), strict=True):
            lengthen(repo, count)
            if is_expired is not None:
                expired = [n for n in range(1, count + 1) if is_expired(n, count)]
                expire_all(repo.catalog, expired)

    def check(self, asked: dict[str, Ask], subtests: pytest.Subtests) -> None:
        """Check that nothing that is asked costs more with many versions."""
        for name, ask in asked.items():
            with subtests.test(asked=name):
                few = cost(self.few.catalog, lambda on, ask=ask: ask(on, FEW))  # type: ignore[misc]
                many = cost(self.many.catalog, lambda on, ask=ask: ask(on, MANY))  # type: ignore[misc]
                assert many <= MOST * few + SPARE


@pytest.fixture(params=["sqlite", "postgres"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        if request.param == "sqlite":
            urls = [sqlite_url(tmp_path / f"{i}.db") for i in range(2)]
        else:
            server = request.getfixturevalue("postgres_server")
            urls = [stack.enter_context(servers.new_database(server)) for _ in range(2)]
        few, many = (
            stack.enter_context(Place(url, str(tmp_path / f"data-{i}")).open())
            for i, url in enumerate(urls)
        )
        yield Pair(few, many)


def expire_all(catalog: Catalog, numbers: list[int]) -> None:
    """Mark versions as expired, as rules would that were applied all along."""
    version, ref = tables.version, tables.ref
    with catalog.database.write() as connection:
        connection.execute(
            update(version)
            .where(version.c.number.in_(numbers))
            .values(status="expired", expired_at=datetime.now(UTC), plan=None)
        )
        gone = select(version.c.id).where(version.c.expired_at.is_not(None))
        connection.execute(delete(ref).where(ref.c.version.in_(gone)))
        if not catalog.database.is_sqlite:
            connection.execute(text("ANALYZE"))


def cost(catalog: Catalog, ask: Callable[[Connection], object]) -> int:
    """Return how many rows the database looked at to answer, on SQLite roughly."""
    with catalog.database.write() as connection:
        driver = connection.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            steps = 0

            def count() -> None:
                nonlocal steps
                steps += 1

            driver.set_progress_handler(count, 20)  # about as many steps for one row
            try:
                ask(connection)
            finally:
                driver.set_progress_handler(None, 0)
            return steps
        ask(connection)
        rows = connection.execute(
            text(
                "SELECT sum(seq_tup_read) + sum(coalesce(idx_tup_fetch, 0))"
                " FROM pg_stat_xact_user_tables"
            )
        )
        return int(rows.scalar_one())


def refused(ask: Ask) -> Ask:
    """Return a question that raises NotFoundError."""

    def check(on: Connection, count: int) -> None:
        with pytest.raises(NotFoundError):
            ask(on, count)

    return check


def logged(**wanted: Any) -> dict[str, Ask]:
    """Return the question for a page of the log that meets conditions, of all and of main."""
    condition = LogFilter(**wanted)
    name = ", ".join(f"{key}={value}" for key, value in wanted.items())
    return {
        f"log {name}": lambda on, count: list_log(on, limit=50, wanted=condition),
        f"log main {name}": lambda on, count: list_log(on, count, limit=50, wanted=condition),
    }


def expiring(**rules: Any) -> dict[str, Ask]:
    """Return the question which versions some rules expire, as a dry run and a save ask it."""
    given = Retention(**rules)

    def ask(on: Connection, count: int) -> object:
        return on.execute(_judge(on, given, "main").doomed(on).limit(100)).all()

    return {f"expire {rules}": ask}


def of_the_end(**ends: int) -> dict[str, Ask]:
    """Return the questions for versions that were saved shortly before the newest."""

    def ask(on: Connection, count: int) -> object:
        first, last = (count - ends["first"], count - ends["last"])
        wanted = LogFilter(steps=(STEPS * first, STEPS * last))
        return list_log(on, limit=50, wanted=wanted)

    return {f"log steps {ends}": ask}


ALWAYS: dict[str, Ask] = {
    "log": lambda on, count: list_log(on, limit=50),
    "log main": lambda on, count: list_log(on, count, limit=50),
    "misspelt branch": refused(lambda on, count: resolve(on, "mian")),
    "misspelt tag": refused(lambda on, count: resolve(on, "tgo-50")),
    "absent step": refused(lambda on, count: resolve(on, f"v{count}@step={STEPS * count - 5}")),
    "present step": lambda on, count: resolve(on, f"v{count}@step={STEPS * count // 2}"),
    "ancestor": lambda on, count: resolve(on, f"main~{count // 2}"),
    "best": lambda on, count: best_version(on, METRIC, mode="min", branch=None),
    "best of main": lambda on, count: best_version(on, METRIC, mode="max", branch="main"),
    "misspelt metric": refused(
        lambda on, count: list_log(on, limit=50, wanted=LogFilter(where=("los<1",)))
    ),
    "misspelt branch of a filter": refused(
        lambda on, count: list_log(on, limit=50, wanted=LogFilter(branch="mian"))
    ),
}


def test_a_long_history_costs_no_more(pair: Pair, subtests: pytest.Subtests) -> None:
    pair.fill()
    pair.check(
        ALWAYS
        | logged(where=(f"{METRIC}<1000",))
        | logged(where=(f"{METRIC}>0.95",))
        | logged(where=(f"{METRIC}>0.95", "lr<1"))
        | logged(where=("lr!=0.001",))
        | logged(steps=(0, 100))
        | logged(tag=f"tag-{TAG_EVERY}")
        | logged(tag="tag-*")
        | logged(since=datetime(2000, 1, 1, tzinfo=UTC))
        | logged(until=datetime(2000, 1, 1, tzinfo=UTC))
        | logged(since=datetime.now(UTC) - timedelta(hours=1))
        | logged(branch="main")
        | logged(labels={"run": "run-3"})
        | logged(labels={"run": "absent"})
        | of_the_end(first=10, last=5)
        | of_the_end(first=2000, last=1900)
        | expiring(keep_last=10)
        | expiring(keep_last=10, keep_every=1000, keep_best=(METRIC, 3), keep_since="7d"),
        subtests,
    )


def test_what_was_saved_and_has_expired_costs_nothing(
    pair: Pair, subtests: pytest.Subtests
) -> None:
    """As many versions are left of few as of many, so all costs are the same."""
    pair.fill(lambda number, count: number <= count - 30 and number % (count // 10) != 0)
    ever = datetime(2000, 1, 1, tzinfo=UTC)
    pair.check(
        {name: ask for name, ask in ALWAYS.items() if "step" not in name}
        | logged(where=(f"{METRIC}<1000",))
        | logged(where=(f"{METRIC}>0.95",))
        | logged(where=("lr!=0.001",))
        | logged(steps=(0, 100))
        | logged(tag="tag-*")
        | logged(since=ever)
        | logged(until=ever)
        | logged(branch="main")
        | logged(labels={"run": "run-3"})
        | logged(labels={"run": "absent"})
        | expiring(keep_last=10)
        | expiring(keep_every=STEPS)
        | expiring(keep_last=10, keep_best=(METRIC, 3), keep_since="7d"),
        subtests,
    )


def test_a_page_of_many_versions_is_right(pair: Pair, subtests: pytest.Subtests) -> None:
    """Each way to a page (the newest, an index, all) finds the same as all versions in Python."""
    lengthen(pair.few, FEW)
    expire_all(pair.few.catalog, [number for number in range(FEW) if number % 7 == 3])
    kept = [number for number in range(FEW, 0, -1) if number % 7 != 3]
    times = {version.number: version.created_at for version in pair.few.log()}
    pages: dict[str, tuple[dict[str, Any], Callable[[int], bool]]] = {
        "newest": ({"where": (f"{METRIC}<1000",)}, lambda n: True),
        "few": ({"where": (f"{METRIC}>=0.01",)}, lambda n: n <= 100),
        "few of two": ({"where": (f"{METRIC}>0.002", "lr!=5")}, lambda n: n < 500),
        "half": ({"where": (f"{METRIC}>0.0005",)}, lambda n: n < 2000),
        "steps": ({"steps": (50, 700)}, lambda n: 5 <= n <= 70),
        "label": ({"labels": {"run": "run-4"}}, lambda n: n % 10 == 4),
        "until": ({"until": times[9] + timedelta(seconds=1)}, lambda n: n <= 9),
        "tags": ({"tag": "tag-?0"}, lambda n: n % TAG_EVERY == 0 and n < 100),
    }
    for name, (wanted, holds) in pages.items():
        right = [number for number in kept if holds(number)]
        for start in (None, FEW, 1500):
            line = [number for number in right if start is None or number <= start]
            for limit in (None, 3, 50):
                with subtests.test(name=name, start=start, limit=limit):
                    found = list_log(
                        pair.few.catalog, start, limit=limit, wanted=LogFilter(**wanted)
                    )
                    assert [version.number for version in found] == line[:limit]


@pytest.mark.parametrize("pair", ["sqlite"], indirect=True)
def test_rules_read_no_row_of_a_version_that_they_keep(pair: Pair) -> None:
    """An index of live versions has all that they ask for."""
    database = pair.few.catalog.database
    lengthen(pair.few, 0)
    statements: list[str] = []
    with database.traced(statements.append):
        pair.few.expire(keep_every=STEPS, keep_since="7d", dry_run=True)
        pair.few.expire(keep_last=5, keep_every=STEPS, branch="main", dry_run=True)
    doomed = [statement for statement in statements if "NOT (EXISTS" in statement]
    assert len(doomed) == 2
    with database.outside() as driver:
        for statement in doomed:
            values = [None] * statement.count("?")
            rows = driver.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
            searches = [row[3] for row in rows if row[3].startswith("SEARCH version")]
            asked = "(branch=? AND number>? AND number<?)"
            assert f"SEARCH version USING COVERING INDEX ix_version_branch {asked}" in searches
