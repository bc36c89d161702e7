"""Races: the second process waits, sees what the first one did, or gets an error."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, func, select

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write import saves
from dcpstore.catalog.write.operations import Change, list_operations, lock_repository, record
from dcpstore.catalog.write.refs import make_ref
from dcpstore.catalog.write.saves import abort_save, begin_save, commit_save, touch_save
from dcpstore.errors import AlreadyExistsError, ConflictError, DcpstoreError

from .conftest import Save, make_content, make_draft, make_tensor

MANY = 6


def make_or_open(url: str) -> tuple[bool, str]:
    """Return whether this one made the repository, and its uid."""
    try:
        found, is_maker = Catalog.make(url, data_url="file:///d"), True
    except AlreadyExistsError:
        found, is_maker = Catalog.open(url), False
    with found as catalog:
        assert list_log(catalog) == []
        return is_maker, catalog.repository.uid


def at_once(work: Callable[[int], object]) -> list[object]:
    """Return what `work` returned or raised in each of many threads that begin together."""
    barrier = threading.Barrier(MANY)

    def run(i: int) -> object:
        barrier.wait()
        try:
            return work(i)
        except DcpstoreError as error:
            return error

    with ThreadPoolExecutor(MANY) as threads:
        return list(threads.map(run, range(MANY)))


def test_many_processes_create_one_repository(database_url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as processes:
        found = processes.map(make_or_open, [database_url] * 8, chunksize=1)
    assert len({uid for _, uid in found}) == 1
    assert sum(is_maker for is_maker, _ in found) == 1


def test_many_threads_create_one_repository(database_url: str) -> None:
    found = at_once(lambda _: make_or_open(database_url))
    assert len({uid for _, uid in found}) == 1, found
    assert sum(is_maker for is_maker, _ in found) == 1


def test_commits_on_one_branch_are_serialized(catalog: Catalog) -> None:
    def work(i: int) -> int:
        begin_save(catalog, make_draft(f"u{i}", tags=(f"t{i}",)))
        return commit_save(
            catalog, f"u{i}", make_content(f"u{i}", {"w": "same", "v": f"{i}"})
        ).value.number

    assert sorted(map(str, at_once(work))) == [str(i + 1) for i in range(MANY)]
    log = list_log(catalog)
    assert [version.parent for version in log] == [*range(MANY - 1, 0, -1), None]
    assert list_log(catalog, MANY) == log
    operations = list_operations(catalog)
    assert [o.number for o in operations] == list(range(1 + 2 * MANY, 0, -1))
    assert query_rows(catalog, "SELECT count(*) AS n FROM tensor", {})[0].n == MANY + 1


def test_compare_and_swap_lets_only_one_pass(catalog: Catalog, save: Save) -> None:
    save()

    def work(i: int) -> int:
        begin_save(catalog, make_draft(f"u{i}", expect_tip=1))
        return commit_save(catalog, f"u{i}", make_content(f"u{i}", {"w": "same"})).value.number

    ends = at_once(work)
    assert [end for end in ends if isinstance(end, int)] == [2]
    assert sum(isinstance(end, ConflictError) for end in ends) == MANY - 1


@pytest.mark.parametrize("kind", ["tag", "branch"])
def test_a_name_is_given_once(catalog: Catalog, save: Save, kind: str) -> None:
    save()
    ends = at_once(lambda i: make_ref(catalog, "best", kind, version=1, author=f"{i}"))
    assert sum(isinstance(end, AlreadyExistsError) for end in ends) == MANY - 1
    assert [o.target for o in list_operations(catalog, limit=2)] == ["best", "main"]


def test_commit_and_abort_exclude_each_other(catalog: Catalog) -> None:
    for i in range(MANY):
        begin_save(catalog, make_draft(f"u{i}"))

        def work(thread: int, uid: str = f"u{i}") -> object:
            if thread % 2:
                return abort_save(catalog, uid, "given up")
            return commit_save(catalog, uid, make_content(uid, {"w": uid})).value

        ends = at_once(work)
        committed = [v for v in list_log(catalog) if v.uid == f"u{i}"]
        assert sum(end == committed[0] for end in ends) == 1 if committed else not committed
        status = query_rows(catalog, "SELECT status FROM version WHERE uid = :u", {"u": f"u{i}"})
        assert status == [("committed" if committed else "aborted",)]


def test_readers_do_not_wait_for_a_writer(catalog: Catalog, save: Save) -> None:
    save()
    with catalog.database.write() as connection:
        connection.exec_driver_sql("UPDATE repository SET last_version = 7")
        with ThreadPoolExecutor(1) as other:
            assert len(other.submit(list_log, catalog).result(timeout=20)) == 1
            assert other.submit(query_rows, catalog, "SELECT 1 AS x", {}).result(timeout=20) == [
                (1,)
            ]
        connection.exec_driver_sql("UPDATE repository SET last_version = 1")


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_saves_write_their_content_at_the_same_time(
    catalog: Catalog, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has written its content, and not locked the repository yet, keeps nobody waiting."""
    save()
    has_written, may_lock = threading.Event(), threading.Event()
    lock = saves.raise_counters

    def wait_and_lock(connection: Connection, *also: Any, **numbers: int) -> Any:
        if threading.current_thread().name.startswith("slow"):
            has_written.set()
            assert may_lock.wait(60)
        return lock(connection, *also, **numbers)

    monkeypatch.setattr(saves, "raise_counters", wait_and_lock)
    begin_save(catalog, make_draft("slow", branch="slow"))
    begin_save(catalog, make_draft("fast", branch="fast"))
    before = query_rows(catalog, "SELECT touched_at FROM version WHERE uid = 'slow'", {})
    with ThreadPoolExecutor(1, "slow") as other:
        slow = other.submit(commit_save, catalog, "slow", make_content("slow", {"w": "slow"}))
        assert has_written.wait(60)
        fast = commit_save(catalog, "fast", make_content("fast", {"w": "fast"})).value
        touch_save(catalog, "slow")  # its lease is renewed while it commits
        after = query_rows(catalog, "SELECT touched_at FROM version WHERE uid = 'slow'", {})
        may_lock.set()
        assert (fast.number, slow.result().value.number) == (2, 3)
    assert after > before


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_equal_content_of_two_saves_is_stored_once(
    catalog: Catalog, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one finds the row of the first refused, and writes its content again."""
    save()
    attempts: list[bool] = []
    both = threading.Barrier(2)
    write = saves.write_content

    def write_at_once(connection: Connection, *what: Any) -> Any:
        if len(attempts) < 2:
            attempts.append(True)
            both.wait(60)
        return write(connection, *what)

    monkeypatch.setattr(saves, "write_content", write_at_once)
    for uid in ("a", "b"):
        begin_save(catalog, make_draft(uid, branch=uid))
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(commit_save, catalog, uid, make_content(uid, {"w": "same"}))
            for uid in ("a", "b")
        ]
        assert {end.result().value.number for end in ends} == {2, 3}
    with catalog.database.read_only() as connection:
        count = select(func.count())
        rows = [connection.scalar(count.select_from(t)) for t in (tables.tensor, tables.node)]
    assert rows == [2, 6]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_gc_between_the_content_and_the_lock(
    catalog: Catalog, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that reuses a tensor fails, because gc has condemned the pack meanwhile."""
    save({"w": "same"})
    lock = saves.raise_counters
    has_run: list[bool] = []

    @writes()
    def collect(connection: Connection) -> None:
        lock_repository(connection)
        connection.exec_driver_sql("UPDATE pack SET status = 'condemned', condemned_at = now()")
        record(connection, Change("gc"), author="")

    def collect_and_lock(connection: Connection, *also: Any, **numbers: int) -> Any:
        if not has_run:
            has_run.append(True)
            with ThreadPoolExecutor(1) as other:
                other.submit(collect, catalog).result()
        return lock(connection, *also, **numbers)

    monkeypatch.setattr(saves, "raise_counters", collect_and_lock)
    begin_save(catalog, make_draft("u"))
    known = make_tensor("same", "")._replace(chunks=())
    with pytest.raises(ConflictError, match=r"condemned or deleted since .*Save again"):
        commit_save(catalog, "u", make_content("u", {"w": "same"}, tensors=[known], packs=[]))
    assert has_run
    # A save that brings the chunks is not hindered, and no number is missing.
    assert commit_save(catalog, "u", make_content("u", {"w": "same"})).value.number == 2
