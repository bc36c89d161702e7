"""What a kind of fault is, the ground it is tried on, and the table of what came of it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from dcpstore.catalog.db.url import sqlite_url
from tests.servers import postgres_server

__all__ = [
    "DATABASES",
    "Dialect",
    "Ground",
    "Kind",
    "Outcome",
    "Tally",
    "Verdict",
    "prepared",
    "run",
]

P = TypeVar("P")
Dialect = Literal["sqlite", "postgres"]
DATABASES: tuple[Dialect, ...] = ("sqlite", "postgres")


class Verdict(StrEnum):
    """What came of a fault: all is well, something was lost or half-made, or somebody waits."""

    SURVIVED = "survived"
    LOST = "lost"
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict, and what was seen where it is a bad one."""

    verdict: Verdict
    detail: str = ""


class Kind(Protocol):
    """One kind of fault. A point is whatever its kind likes; its `str` names it in reports.

    A kind that has an attribute `at_once` has so many points tried at the same time, in threads.
    """

    @property
    def name(self) -> str:
        """The row of the table."""

    def points(self) -> Iterable[Any]:
        """Return the places where the fault is to strike."""

    def try_point(self, point: Any) -> Outcome:
        """Let it strike there and look; what this raises counts as lost."""


class Ground:
    """Where kinds are tried: folders, databases, and how much is wanted.

    Attributes:
        long: whether very many points are wanted, or a few of each kind.
    """

    def __init__(
        self, folder: Path, server: Callable[[], Any], stack: ExitStack, *, long: bool
    ) -> None:
        self._folder, self._server, self._stack = folder, server, stack
        self.long = long

    def keep(self, context: AbstractContextManager[P]) -> P:
        """Enter a context that ends with the ground."""
        return self._stack.enter_context(context)

    def on(self, server: Callable[[], Any]) -> Ground:
        """Return a ground like this, whose Postgres databases are on another server."""
        return Ground(self._folder, server, self._stack, long=self.long)

    def folder(self) -> Path:
        """Return a new empty folder."""
        return Path(tempfile.mkdtemp(dir=self._folder))

    def pick(self, points: Sequence[P], few: int, many: int | None = None) -> Sequence[P]:
        """Return `many` points in the long form, or all; else a few.

        They are spread evenly, the last among them.
        """
        most = many if self.long else few
        if most is None or len(points) <= most:
            return points
        return [points[(i + 1) * len(points) // most - 1] for i in range(most)]

    def database(self, dialect: Dialect, *, template: str = "") -> str:
        """Return the URL of a new database: empty, or like the Postgres one of URL `template`."""
        if dialect == "sqlite":
            return sqlite_url(self.folder() / "catalog.db")
        name = f"torture_{uuid.uuid4().hex}"
        # Copied as files: a copy by the log has sequences that go back when the server crashes.
        like = f' TEMPLATE "{_name_in(template)}" STRATEGY FILE_COPY' if template else ""
        self._administer(f'CREATE DATABASE "{name}"{like}')
        url: str = self._server().get_uri(name)
        return url

    def drop(self, url: str) -> None:
        """Drop a Postgres database of `database`."""
        self._administer(f'DROP DATABASE "{_name_in(url)}" WITH (FORCE)')

    def _administer(self, statement: str) -> None:
        with psycopg.connect(self._server().get_uri(), autocommit=True) as connection:
            connection.execute(statement.encode())


def _name_in(url: str) -> str:
    return str(conninfo_to_dict(url)["dbname"])


@contextmanager
def prepared(*, long: bool, server: Any = None) -> Iterator[Ground]:
    """Yield a ground in a temporary folder, with `server` or one that starts when it is needed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-")))
        started = [] if server is None else [server]

        def find_server() -> Any:
            if not started:
                started.append(stack.enter_context(postgres_server()))
            return started[0]

        yield Ground(folder, find_server, stack, long=long)


@dataclass
class Tally:
    """One row of the table, and what the bad outcomes said."""

    name: str
    tried: int = 0
    counts: dict[Verdict, int] = field(default_factory=lambda: dict.fromkeys(Verdict, 0))
    bad: list[str] = field(default_factory=list)

    def add(self, point: object, outcome: Outcome) -> None:
        """Count an outcome."""
        self.tried += 1
        self.counts[outcome.verdict] += 1
        if outcome.verdict is not Verdict.SURVIVED:
            self.bad.append(f"{self.name}, {point}: {outcome.verdict}: {outcome.detail}")


def run(kinds: Iterable[Kind], told: Callable[[Tally], None] = lambda tally: None) -> list[Tally]:
    """Try every point of every kind; `told` hears of each kind when it is done."""
    tallies = []
    for kind in kinds:
        tally = Tally(kind.name)
        points = list(kind.points())
        with ThreadPoolExecutor(getattr(kind, "at_once", 1)) as pool:
            for point, outcome in zip(points, pool.map(partial(_tried, kind), points), strict=True):
                tally.add(point, outcome)
        assert tally.tried, f"{kind.name} tries nothing"
        tallies.append(tally)
        told(tally)
    return tallies


def _tried(kind: Kind, point: Any) -> Outcome:
    try:
        return kind.try_point(point)
    except Exception as error:  # a harness that fails has proved nothing
        return Outcome(Verdict.LOST, f"{type(error).__name__}: {error}")
