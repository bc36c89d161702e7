"""How a function with SQL runs: in the caller's transaction, or in one of its own.

A function that is decorated here takes a `Connection` first, and then runs in that transaction; or
an open catalog, and then runs in a transaction of its own, which is retried where that is safe.
What "safe" means stands beside the SQL: `@reads`, `@writes()`, `@writes(idempotent=True)` or
`@writes(find=...)`. A retry uses the arguments again, so none of them may be an iterator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from sqlalchemy import Connection

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.db.db_errors import UnknownOutcomeError

__all__ = ["OpenCatalog", "reads", "writes"]

P = ParamSpec("P")
T = TypeVar("T")


class OpenCatalog(Protocol):
    """An open catalog."""

    @property
    def database(self) -> Database: ...


_Statements = Callable[Concatenate[Connection, P], T]
_OnCatalog = Callable[Concatenate[Connection | OpenCatalog, P], T]


def reads(function: _Statements[P, T]) -> _OnCatalog[P, T]:
    """Make a function one read transaction: it sees the database as of one moment.

    It is retried where the connection is lost or the database is busy.
    """

    @wraps(function)
    def call(on: Connection | OpenCatalog, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if isinstance(on, Connection):
            return function(on, *args, **kwargs)
        return on.database.transact(
            lambda connection: function(connection, *args, **kwargs), writes=False
        )

    return call


class _Decorator(Protocol):
    def __call__(self, function: _Statements[P, T], /) -> _OnCatalog[P, T]: ...


@overload
def writes(*, idempotent: bool = ...) -> _Decorator: ...
@overload
def writes(
    *, find: Callable[Concatenate[Connection, P], T | None]
) -> Callable[[_Statements[P, T]], _OnCatalog[P, T]]: ...
def writes(*, idempotent: bool = False, find: Callable[..., Any] | None = None) -> Any:
    """Make a function one write transaction, which commits whole or leaves nothing.

    It is retried where the database is known to have rolled it back, so the function must do
    nothing but change the database. If the answer to its commit is lost, then:

    - by default the call raises `UnknownOutcomeError`;
    - `idempotent` says that a second run changes nothing more: it is run again;
    - `find`, with the same arguments, looks for the result in a transaction of its own. It must
      wait for the lost transaction, by a row that this one had locked, and return None if that was
      rolled back: then the function is run again.
    """

    def decorate(function: _Statements[P, T]) -> _OnCatalog[P, T]:
        @wraps(function)
        def call(on: Connection | OpenCatalog, /, *args: P.args, **kwargs: P.kwargs) -> T:
            if isinstance(on, Connection):
                return function(on, *args, **kwargs)
            database = on.database

            def outcome() -> tuple[T] | None:
                if find is None and not idempotent:
                    raise UnknownOutcomeError
                if find is None:
                    return None
                found = database.transact(
                    lambda connection: find(connection, *args, **kwargs), writes=True
                )
                return None if found is None else (found,)

            return database.transact(
                lambda connection: function(connection, *args, **kwargs),
                writes=True,
                if_unknown=outcome,
            )

        return call

    return decorate
