"""A proxy before a real Postgres server, which loses what tests want lost."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

__all__ = ["Messages", "Proxy", "proxied"]

_COMMIT = b"COMMIT\x00"
_PROTOCOL = 3  # the major version, by which a client's greeting is told from what may precede it


class Messages:
    """Counts the messages in what one client sends, as Postgres's protocol frames them.

    Attributes:
        round_trips: how many messages so far are such that a client then waits for the answer: a
            query, a sync of what came before it, or the end of the rows of a COPY.
    """

    def __init__(self) -> None:
        self.round_trips = 0
        self._is_greeting = True  # which has no byte that tells its kind
        self._head = b""
        self._left = 0  # bytes of the message that has begun

    def count(self, data: bytes) -> int:
        """Return how many messages' heads end in these bytes."""
        found = 0
        while data:
            passed = min(self._left, len(data))
            self._left, data = self._left - passed, data[passed:]
            size = 8 if self._is_greeting else 5
            wanted = size - len(self._head)
            self._head, data = self._head + data[:wanted], data[wanted:]
            if len(self._head) < size:
                break
            found += 1
            if self._is_greeting:
                self._left = int.from_bytes(self._head[:4]) - 8
                self._is_greeting = int.from_bytes(self._head[4:6]) != _PROTOCOL
            else:
                self.round_trips += self._head[:1] in (b"Q", b"S", b"c")
                self._left = int.from_bytes(self._head[1:]) - 4
            self._head = b""
        return found


class Proxy:
    """Passes bytes between clients and the server at a URL; counts the commits that it sees.

    Attributes:
        url: by which clients come through it.
        commits: how many have been asked for.
        requests: how many messages clients have sent; how they lie in packets is up to the weather.
        round_trips: how often clients have waited for an answer, but for their greetings.
        connections: how many clients have come.
        lose: at the commit of this number, counted from 1, the connection breaks.
        counts: whether that is a number of commits or of requests.
        what: whether the server has carried that commit out ("answer" is lost), has just been told
            of it ("amid"), or never hears of it ("request").
        strike: called at that moment, for what is to befall the server.
        breaks: whether the connection breaks then; else it goes on.
        delay: seconds by which each answer is late.
        path: of the server's socket; another server may take over.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.path = str(Path(parse_qs(parts.query)["host"][0]) / ".s.PGSQL.5432")
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{port}{parts.path}?sslmode=disable"
        self.commits = self.requests = self.round_trips = self.connections = 0
        self.counts: Literal["commits", "requests"] = "commits"
        self.lose: int | None = None
        self.what: Literal["answer", "amid", "request"] = "answer"
        self.strike: Callable[[], None] = _nothing
        self.breaks = True
        self.delay = 0.0
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Take no more clients, and wait for those that are there to end; a second time is fine."""
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        messages = Messages()
        is_answered = threading.Event()  # what comes next answers the commit that is lost
        is_lost = threading.Event()

        def answer() -> None:
            try:
                while data := server.recv(1 << 16):
                    if is_answered.is_set():
                        is_answered.clear()
                        self.strike()  # the server has answered, and nobody hears it
                        if self.breaks:
                            is_lost.set()
                    if is_lost.is_set():
                        break
                    time.sleep(self.delay)
                    client.sendall(data)
            except OSError:
                pass
            finally:
                _hang_up(client)

        with client, server:
            try:
                server.connect(self.path)
            except OSError:
                return
            answers = threading.Thread(target=answer, daemon=True)
            answers.start()
            try:
                while data := client.recv(1 << 16):
                    before = messages.round_trips
                    count = messages.count(data)
                    self.round_trips += messages.round_trips - before
                    if self._is_lost(data, count):
                        if self.what == "answer":
                            is_answered.set()
                        elif self.what == "request":
                            self.strike()
                            if self.breaks:
                                break
                        else:
                            server.sendall(data)
                            self.strike()
                            continue
                    server.sendall(data)
            except OSError:
                pass
            _hang_up(server)
            answers.join(10)

    def _is_lost(self, data: bytes, messages: int) -> bool:
        """Count what a client sent in one packet; tell whether the one to lose is there."""
        is_commit = _COMMIT in data
        self.requests += messages
        self.commits += is_commit
        if self.lose is None:
            return False
        if self.counts == "commits":
            return is_commit and self.commits == self.lose
        return self.requests - messages < self.lose <= self.requests


def _nothing() -> None:
    """Let the server be."""


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has gone already


@contextmanager
def proxied(url: str) -> Iterator[Proxy]:
    """Yield a proxy before the server of a URL."""
    proxy = Proxy(url)
    try:
        yield proxy
    finally:
        proxy.close()
