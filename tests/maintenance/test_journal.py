"""The journal at rest: few objects, whatever is killed, damaged, raced or read meanwhile."""

import itertools
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Connection

import dcpstore
from dcpstore import DcpstoreError, Repository, SchemaError
from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.maintenance import journal, stored_journal
from dcpstore.catalog.maintenance.journal import journal_again, write_journal
from dcpstore.catalog.maintenance.stored_journal import compact, list_journal, read_journal
from dcpstore.catalog.write.operations import Change, lock_repository, record
from dcpstore.formats import journal_entry
from dcpstore.formats.journal_entry import operation_key
from dcpstore.formats.journal_segment import SHORTEST, Span, segment_key, spans_within
from dcpstore.maintenance.rebuild import rebuild
from dcpstore.repository import open as open_repository
from tests.maintenance.test_verify import flip
from tests.soundness import Place, assert_sound

pytestmark = pytest.mark.slow_on_postgres
FIRST = Span(1, SHORTEST)


@pytest.fixture
def repo(place: Place) -> Iterator[Repository]:
    """A repository that a test may damage."""
    with place.open() as opened:
        yield opened


@writes()
def note(connection: Connection) -> None:
    """Make an operation that changes nothing."""
    lock_repository(connection)
    record(connection, Change("gc"), author="ada")


def work(repo: Repository, last: int) -> None:
    """Save once, and make operations until there are `last` of them, each journaled by itself."""
    if not repo.log():
        dcpstore.save({"w": torch.ones(3)}, repo)
    with repo.catalog.keep_connection():
        for _ in range(repo.operations(limit=1)[0].number, last):
            note(repo.catalog)
            write_journal(repo.catalog, repo.storage)


def objects(repo: Repository) -> list[str]:
    return list(repo.storage.list("operations"))


def listed(repo: Repository) -> list[Any]:
    return sorted(repo.operations(), key=lambda operation: operation.number)


def test_each_operation_is_one_small_object_and_32_are_one(repo: Repository) -> None:
    for last in range(3, 3 * SHORTEST):
        work(repo, last)
        listing = list_journal(repo.storage)
        assert listing.spans == set(spans_within(1, last))
        alone = set(range(last // SHORTEST * SHORTEST + 1, last + 1))
        assert listing.single == alone | {1}  # the first one names the owner
        assert len(objects(repo)) <= SHORTEST + 2
    assert sorted(read_journal(repo.storage).operations) == list(range(1, last + 1))
    assert_sound(repo)


def test_segments_become_larger_ones(repo: Repository) -> None:
    work(repo, 8 * SHORTEST + 3)
    assert list_journal(repo.storage).spans == {Span(1, 8 * SHORTEST)}
    assert len(objects(repo)) == 5
    assert repo.verify(deep=True).damaged == ()
    assert_sound(repo)


@pytest.mark.parametrize("how", ["tag", "save", "metrics"])
def test_any_change_compacts(repo: Repository, how: str) -> None:
    dcpstore.save({"w": torch.zeros(3)}, repo)
    work(repo, SHORTEST - 1)
    if how == "tag":
        repo.tag("t")
    elif how == "save":
        dcpstore.save({"w": torch.ones(4)}, repo)
    else:
        repo.add_metrics(1, {"loss": 0.5})
    assert list_journal(repo.storage).spans == {FIRST}
    assert list_journal(repo.storage).single == {1}


def test_the_standard_library_reads_a_segment(repo: Repository) -> None:
    work(repo, SHORTEST)
    head, packed = repo.storage.get(segment_key(FIRST)).split(b"\n", 1)
    assert b'"first": 1, "last": 32}' in head
    lines = zlib.decompress(packed).splitlines()
    assert [f'"operation":{n},'.encode() in line for n, line in enumerate(lines, 1)] == [True] * 32


def test_a_catalog_is_rebuilt_from_segments(place: Place, repo: Repository, tmp_path: Path) -> None:
    work(repo, 2 * SHORTEST + 5)
    report = rebuild(place.data, tmp_path / "new")
    assert (report.problems, report.lost, report.operations) == ((), (), 2 * SHORTEST + 5)
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert listed(rebuilt) == listed(repo)
        assert rebuilt.branches() == repo.branches()
        assert_sound(rebuilt)


class Killed(BaseException):
    """What ends a process at a request to its storage."""


@pytest.mark.parametrize("last", [SHORTEST, 8 * SHORTEST])
def test_a_kill_at_any_request_loses_nothing_and_the_next_compaction_tidies(
    repo: Repository, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_compact", lambda *_: None)
        work(repo, last)
    want = listed(repo)
    monkeypatch.setattr(stored_journal, "_AT_ONCE", 1)
    for die_at in itertools.count():
        journal_again(repo.catalog, 1)
        left = itertools.count()

        def struck(call: Callable[..., Any], left: Any = left, die_at: int = die_at) -> Any:
            def run(*given: Any) -> Any:
                if next(left) == die_at:
                    raise Killed
                return call(*given)

            return run

        with monkeypatch.context() as patch:
            for name in ("put", "delete"):
                patch.setattr(repo.storage, name, struck(getattr(repo.storage, name)))
            try:
                write_journal(repo.catalog, repo.storage)
                is_done = True
            except Killed:
                is_done = False
        read = read_journal(repo.storage)
        assert sorted(read.operations) == [operation.number for operation in want]
        assert (read.single_faults, read.span_faults) == ({}, {})
        if is_done:
            break
        compact(repo.storage, last, lambda numbers: [])
        assert list_journal(repo.storage).spans == set(spans_within(1, last))
        assert list_journal(repo.storage).single == {1}
        for number in (2, 3):  # so that the next try has something to compact
            entries = journal.journal_entries(repo.catalog, [number])
            repo.storage.put(operation_key(number), journal_entry.encode_operation(entries[0]))
    assert die_at >= 3
    assert_sound(repo)


def test_a_compaction_that_fails_fails_no_change(
    repo: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put = repo.storage.put

    def refuse(key: str, data: bytes) -> None:
        if key.endswith(".segment"):
            raise DcpstoreError("the disk is full")
        put(key, data)

    with monkeypatch.context() as full:
        full.setattr(repo.storage, "put", refuse)
        work(repo, SHORTEST + 1)
    assert "was not compacted (the disk is full)" in caplog.text
    assert list_journal(repo.storage).single == set(range(1, SHORTEST + 2))
    work(repo, 2 * SHORTEST)
    assert list_journal(repo.storage).spans == set(spans_within(1, 2 * SHORTEST))
    assert len(objects(repo)) == 3
    assert_sound(repo)


def test_two_that_compact_at_once_and_one_that_reads_lose_nothing(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 3 * SHORTEST
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_compact", lambda *_: None)
        work(repo, last)
    faults: list[object] = []
    stop = threading.Event()

    def compacts() -> None:
        try:
            compact(repo.storage, last, lambda numbers: faults.append(numbers) or [])
        except BaseException as error:
            faults.append(error)

    def reads() -> None:
        while not stop.is_set():
            found = sorted(read_journal(repo.storage).operations)
            if found != list(range(1, last + 1)):
                faults.append(found)

    reader = threading.Thread(target=reads)
    reader.start()
    for _ in range(5):
        threads = [threading.Thread(target=compacts) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        journal.mark_journaled(repo.catalog, last)
        for entry in journal.journal_entries(repo.catalog, list(range(1, last + 1))):
            data = journal_entry.encode_operation(entry)
            repo.storage.put(operation_key(entry["operation"]), data)
    compact(repo.storage, last, lambda numbers: [])
    stop.set()
    reader.join()
    assert faults == []
    assert len(objects(repo)) == 4
    assert_sound(repo)


@pytest.mark.parametrize("how", ["gone", "flipped", "cut", "empty"])
def test_a_damaged_segment_is_found_and_the_next_change_repairs_it(
    place: Place, repo: Repository, how: str
) -> None:
    work(repo, SHORTEST + 4)
    path = Path(place.data) / segment_key(FIRST)
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        flip(path, len(whole) // 2)
    else:
        path.write_bytes(b"" if how == "empty" else whole[: len(whole) // 2])
    damaged = repo.verify(deep=True).damaged
    assert {damage.kind for damage in damaged} == {"operation"}
    if how == "gone":
        assert [damage.key for damage in damaged] == [operation_key(n) for n in range(2, 33)]
    else:
        assert [damage.key for damage in damaged] == [segment_key(FIRST)]
    repo.tag("next", "v1")
    assert repo.verify(deep=True).damaged == ()
    assert list_journal(repo.storage).spans == {FIRST}
    assert_sound(repo)


def test_an_intact_copy_is_taken_wherever_it_lies(
    place: Place, repo: Repository, tmp_path: Path
) -> None:
    work(repo, SHORTEST - 1)
    folder = Path(place.data)
    single = {n: (folder / operation_key(n)).read_bytes() for n in range(1, SHORTEST)}
    work(repo, SHORTEST + 2)
    for number in (2, 9):  # one is damaged in the segment, the other alone
        (folder / operation_key(number)).write_bytes(single[number])
    flip(folder / operation_key(9), 150)
    report = rebuild(place.data, tmp_path / "new")
    assert report.lost == ()
    assert report.operations == SHORTEST + 2
    assert [problem.split(":")[0] for problem in report.problems] == [operation_key(9)]
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert listed(rebuilt) == listed(repo)
        assert rebuilt.verify(deep=True).damaged == ()


@pytest.mark.parametrize("at", [12, 40])  # its format becomes 0; its digest is wrong
def test_what_is_whole_in_a_damaged_segment_is_read(
    place: Place, repo: Repository, tmp_path: Path, at: int
) -> None:
    work(repo, SHORTEST)
    path = Path(place.data) / segment_key(FIRST)
    flip(path, at)
    report = rebuild(place.data, tmp_path / "new")
    assert (report.lost, report.operations, len(report.problems)) == ((), SHORTEST, 1)
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert listed(rebuilt) == listed(repo)
        assert rebuilt.verify(deep=True).damaged == ()


def test_an_older_dcpstore_refuses_a_journal_with_segments(
    place: Place, repo: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as older:
        older.setattr(journal_entry, "_FORMAT", 1)
        work(repo, SHORTEST - 1)
    work(repo, SHORTEST)
    (Path(place.data) / segment_key(FIRST)).unlink()  # what the older one does not see
    monkeypatch.setattr(journal_entry, "_FORMAT", 1)
    with pytest.raises(SchemaError, match="format 2, newer than 1"):
        rebuild(place.data, tmp_path / "new")
    with pytest.raises(SchemaError):
        repo.gc()
