"""A Postgres server that is stopped, killed, started again, or follows another, amid an operation.

A real server of these kinds' own is struck while a request or a commit is under way: before it is
told of it, when it has just been told, or when it has carried it out and the answer is on its way.
The operation goes on all the same, or says in our words that it could not; then all must hold that
holds of a kill.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Literal

import psycopg
import torch
from psycopg.conninfo import conninfo_to_dict

from dcpstore.catalog import catalog as catalog_module
from dcpstore.catalog.db.database import Database
from tests.proxy import Proxy, proxied
from tests.servers import Server, own_server, standby_server
from tests.torture.children import start
from tests.torture.faults_disk import told, verdict_of
from tests.torture.kinds import Ground, Outcome, Verdict
from tests.torture.operations import OPERATIONS, Operation
from tests.torture.sites import Mould, Site

__all__ = ["Failovers", "Servers", "kinds"]

# What befalls the server. It comes back, but for "gone"; "full" is without a free connection.
How = Literal["backend killed", "killed", "immediate", "fast", "frozen", "full", "gone"]
What = Literal["request", "amid", "answer"]
HOWS: tuple[How, ...] = ("backend killed", "killed", "immediate", "fast", "frozen", "full", "gone")
WHATS: tuple[What, ...] = ("request", "amid", "answer")
AT_COMMIT = {"save": 7}  # blows at each commit, which take turns; 2 where nothing is said
FAILOVERS = ("save", "async save", "gc: repack")
SHORT = ("save",)
PATIENCE = 3.0  # seconds of a client whose server does not come back
FROZEN = 2.0  # seconds
RETRIES = 3  # connections that are refused before a full server has room again


@dataclass(frozen=True, slots=True)
class Blow:
    """Which request or commit, counted from 1, the server is struck at, and how."""

    number: int
    counts: Literal["commits", "requests"]
    what: What
    how: How

    def __str__(self) -> str:
        return f"{self.how} at {self.counts[:-1]} {self.number} ({self.what})"


class Servers:
    """The blows to the server of one operation."""

    def __init__(self, ground: Ground, operation: Operation, server: Callable[[], Server]) -> None:
        self._ground, self._operation, self._find_server = ground, operation, server
        self.name = f"server: {operation.name}"

    @property
    def _server(self) -> Server:
        return self._find_server()

    @cached_property
    def _mould(self) -> Mould:
        ground = self._ground.on(lambda: self._server)
        return Mould(ground, "postgres", self._operation.prepare)

    def points(self) -> Sequence[Blow]:
        """Run the operation once, and return its commits and some of its requests."""
        commits, requests = count(self._operation, self._mould)
        turns = itertools.cycle(itertools.product(WHATS, HOWS))
        # Neighbours among the requests are alike: inside one transaction, mostly.
        points = [Blow(1 + 25 * i, "requests", *next(turns)) for i in range(requests // 25)]
        points += [
            Blow(number, "commits", *next(turns))
            for number in range(1, commits + 1)
            for _ in range(AT_COMMIT.get(self._operation.name, 2))
        ]
        return self._ground.pick(points, 1, 16)

    def try_point(self, point: Blow) -> Outcome:
        """Strike the server there, and look."""
        site = self._mould.copy()
        with proxied(site.target) as proxy:
            striker = Striker(self._server, proxy, database_of(site), point.how)
            aim(proxy, point, striker.strike)
            patience = PATIENCE if point.how == "gone" else None
            ended = start(work, self._operation, replace(site, target=proxy.url), patience).end()
        striker.end()  # now that no thread of the proxy still strikes
        if not striker.is_done:
            return Outcome(Verdict.LOST, f"nothing struck: {striker.error!r}, {ended}")
        return verdict_of(ended, self._operation, site, self._mould)


class Striker:
    """What befalls the server in one try."""

    def __init__(self, server: Server, proxy: Proxy, database: str, how: How) -> None:
        self._server, self._proxy, self._database, self._how = server, proxy, database, how
        self._is_over = threading.Event()
        self._release: threading.Thread | None = None
        self.is_done = False
        self.error: Exception | None = None

    def strike(self) -> None:
        """Let it befall the server, which is back on return, or is to stay away until `end`."""
        try:
            self._strike()
            self.is_done = True
        except Exception as error:  # of a thread of the proxy: told where it is looked at
            self.error = error

    def end(self) -> None:
        """Bring the server back."""
        self._is_over.set()
        if self._release is not None:
            self._release.join()
        if self._how == "gone" and self.is_done:
            self._server.start()

    def _strike(self) -> None:
        match self._how:
            case "backend killed":  # the server then ends all sessions, and starts anew
                send(self._server.processes(self._database), signal.SIGKILL)
            case "killed":
                self._server.kill()
                self._server.start()
            case "immediate" | "fast":
                self._server.stop(self._how)
                self._server.start()
            case "frozen":
                processes = self._server.processes()
                send(processes, signal.SIGSTOP)
                time.sleep(FROZEN)
                send(processes, signal.SIGCONT)
            case "full":
                self._fill()
            case "gone":
                self._server.stop("immediate")

    def _fill(self) -> None:
        """Take every connection that there is, until some more were asked for in vain."""
        held = []
        with suppress(psycopg.OperationalError):
            while True:
                held.append(psycopg.connect(self._server.get_uri()))
        enough = self._proxy.connections + RETRIES

        def release() -> None:
            while self._proxy.connections < enough and not self._is_over.wait(0.01):
                pass
            for connection in held:
                connection.close()

        self._release = threading.Thread(target=release)
        self._release.start()


class Failovers:
    """A standby takes over at each commit of one operation, with all that was answered before."""

    def __init__(self, ground: Ground, operation: Operation) -> None:
        self._ground, self._operation = ground, operation
        self.name = f"failover: {operation.name}"

    @cached_property
    def _servers(self) -> list[Server]:
        """The servers that took over one from the other; the last is the one of now."""
        return [self._ground.keep(own_server())]

    @cached_property
    def _mould(self) -> Mould:
        ground = self._ground.on(lambda: self._servers[-1])
        return Mould(ground, "postgres", self._operation.prepare)

    def points(self) -> Sequence[Blow]:
        """Run the operation once, and return its commits: what they ask must not be lost."""
        commits, _ = count(self._operation, self._mould)
        every = 1 if self._operation.name == "save" else 2
        points = [
            Blow(number + 1, "commits", what, "killed")
            for number in range(0, commits, every)
            for what in ("amid", "answer")
        ]
        return self._ground.pick(points, 1, 16)

    def try_point(self, point: Blow) -> Outcome:
        """Let a standby take over there, and look at what it has."""
        first, site = self._servers[-1], self._mould.copy()
        standby = self._ground.keep(standby_server(first))

        def take_over() -> None:
            first.kill()
            standby.promote()
            self._servers.append(standby)
            proxy.path = standby.socket

        with proxied(site.target) as proxy:
            aim(proxy, point, take_over)
            ended = start(work, self._operation, replace(site, target=proxy.url), None).end()
        if self._servers[-1] is first:
            return Outcome(Verdict.LOST, f"nobody took over: {ended}")
        site = replace(site, target=standby.get_uri(database_of(site)))
        if len(self._servers) > 2:
            shutil.rmtree(first.data)  # it is some ten MiB, and of no use any more
        return verdict_of(ended, self._operation, site, self._mould)


def kinds(ground: Ground) -> Iterator[Servers | Failovers]:
    """Yield the blows to the server under every operation of one rank; in the short form, some."""
    server = cache(lambda: ground.keep(own_server()))
    for operation in OPERATIONS:
        if operation.ranks == 1 and (ground.long or operation.name in SHORT):
            yield Servers(ground, operation, server)
    for operation in OPERATIONS:
        if operation.name in FAILOVERS and ground.long:
            yield Failovers(ground, operation)


def count(operation: Operation, found: Mould) -> tuple[int, int]:
    """Run an operation; return its commits and requests."""
    site = found.copy()
    with proxied(site.target) as proxy:
        ended = start(work, operation, replace(site, target=proxy.url), None).end()
    assert (ended.code, ended.value, ended.error) == (0, None, ""), ended
    found.discard(site)
    return proxy.commits, proxy.requests


def work(operation: Operation, site: Site, patience: float | None) -> str | None:
    """Do an operation; return the error of ours that it raised, if any."""
    torch.set_num_threads(1)
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)  # it tells of each lost one
    if patience is not None:
        catalog_module.Database = partial(  # type: ignore[assignment,misc]
            Database, retry_seconds=patience
        )
    return told(operation, site)


def aim(proxy: Proxy, point: Blow, strike: Callable[[], None]) -> None:
    """Have a proxy strike at a point."""
    proxy.lose, proxy.counts, proxy.what = point.number, point.counts, point.what
    proxy.breaks = point.how not in ("frozen", "full")
    proxy.strike = strike


def send(processes: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def database_of(site: Site) -> str:
    """Return the name of a site's database."""
    return str(conninfo_to_dict(site.target)["dbname"])
