"""The queue of the writers of one SQLite file: in order, and never in the way."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import pytest

from dcpstore.catalog.db import write_queue
from dcpstore.catalog.db.database import Database
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.db.write_queue import WriteQueue

SPAWN = multiprocessing.get_context("spawn")


def hold(file: Path, pipe: Pipe) -> None:
    """Take a turn, say so, and keep it until the other end of the pipe answers."""
    with WriteQueue(file, seconds=60).turn():
        pipe.send("in turn")
        pipe.recv()


class Holder:
    """A process that has a turn, or waits for one."""

    def __init__(self, file: Path) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=hold, args=(file, theirs))
        self.process.start()

    def has_turn(self, seconds: float = 60.0) -> bool:
        return self.pipe.poll(seconds) and self.pipe.recv() == "in turn"

    def end(self) -> None:
        self.pipe.send("go on")
        self.process.join(60)
        assert self.process.exitcode == 0


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until_waiting(file: Path, count: int) -> None:
    """Wait until so many writers have a place in the queue."""
    end = time.monotonic() + 60
    inode = os.stat(file.parent).st_ino
    while (
        sum(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines()) < count
    ):
        assert time.monotonic() < end, "nobody came"
        time.sleep(0.005)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    return tmp_path / "own" / "catalog.db"


def test_writers_come_in_the_order_in_which_they_asked(file: Path) -> None:
    first = Holder(file)
    assert first.has_turn()
    came: list[int] = []
    threads = []
    for i in range(12):
        own = WriteQueue(file, seconds=60)  # as of a process of its own

        def work(i: int = i, own: WriteQueue = own) -> None:
            with own.turn():
                came.append(i)

        threads.append(in_thread(work))
        until_waiting(file, i + 2)
    assert came == []
    first.end()
    for thread in threads:
        thread.join(60)
    assert came == list(range(12))


def test_a_killed_writer_and_a_killed_waiter_leave_the_queue(file: Path) -> None:
    first = Holder(file)
    assert first.has_turn()
    second = Holder(file)
    until_waiting(file, 2)
    third = Holder(file)
    until_waiting(file, 3)
    for killed in (second, first):
        assert killed.process.pid is not None
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.process.join(60)
    assert third.has_turn()
    third.end()


def test_a_child_that_was_forked_in_a_turn_keeps_nobody_waiting(file: Path) -> None:
    queue = WriteQueue(file, seconds=60)
    read, write = os.pipe()
    with queue.turn():
        child = os.fork()
        if not child:
            os.read(read, 1)
            os._exit(0)
    other = Holder(file)
    assert other.has_turn()
    other.end()
    os.write(write, b"x")
    assert os.waitpid(child, 0)[1] == 0
    os.close(read)
    os.close(write)


def test_a_child_of_a_process_that_writes_has_its_own_turn(file: Path) -> None:
    """Its parent's thread, which the child does not have, is inside of a turn."""
    queue = WriteQueue(file, seconds=0.2)
    is_in, may_end = threading.Event(), threading.Event()

    def work() -> None:
        with queue.turn():
            is_in.set()
            may_end.wait(60)

    thread = in_thread(work)
    assert is_in.wait(60)
    child = os.fork()
    if not child:
        with queue.turn():  # passes over its parent's place after 0.2 seconds
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    may_end.set()
    thread.join(60)


def test_a_writer_that_stays_is_passed_over_once(file: Path) -> None:
    first = Holder(file)
    assert first.has_turn()
    queue = WriteQueue(file, seconds=0.2)
    with queue.turn():
        pass
    queue._seconds = 3600.0  # a second wait would not end
    with queue.turn():
        pass
    first.end()


def test_catalogs_of_one_folder_do_not_wait_for_each_other(file: Path) -> None:
    first = Holder(file)
    assert first.has_turn()
    with WriteQueue(file.with_name("other.db"), seconds=3600).turn():
        pass
    first.end()


def test_where_there_is_no_queue_writers_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a filesystem or an operating system without such locks."""
    database = Database(sqlite_url(tmp_path / "c.db"))
    database.may_create_file = True
    for broken in (None, 9999):
        monkeypatch.setattr(write_queue, "_SET", broken)
        with database.write() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS t (x)")
            connection.exec_driver_sql("INSERT INTO t VALUES (1)")
    with database.write() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM t").scalar_one() == 2
    database.close()


def test_threads_of_a_process_wait_for_each_other_without_a_limit(tmp_path: Path) -> None:
    """So that a long transaction does not look like another process to its own lease's thread."""
    database = Database(sqlite_url(tmp_path / "c.db"), busy_seconds=0.1, retry_seconds=0.0)
    database.may_create_file = True
    ended = []

    def renew() -> None:
        with database.write() as connection:
            connection.exec_driver_sql("INSERT INTO t VALUES (2)")
        ended.append(True)

    with database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
        thread = in_thread(renew)
        time.sleep(0.5)  # five times as long as another process would be waited for
        assert ended == []
    thread.join(60)
    assert ended == [True]
    database.close()
