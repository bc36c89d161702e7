"""How a function with SQL runs: in the caller's transaction, or in one of its own.

If the first argument of a decorated function is a `Connection`, it runs in the transaction of that.
If it is an open catalog, it runs in a transaction of its own, which is retried if that is safe.
The decorator beside the SQL says when it is safe: `@reads`, `@writes()`, `@writes(idempotent=True)`
or `@writes(find=...)`. A retry uses the arguments again, so none of them may be an iterator.

A function of one statement has `@reads_once` or `@writes(once=True, ...)`: it costs one round trip
to the server, where a transaction has two more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from sqlalchemy import Connection

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.db.db_errors import UnknownOutcomeError

__all__ = ["OpenCatalog", "reads", "reads_once", "writes"]

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

    It is retried if the connection is lost or the database is busy.
    """
    return _reading(function, one=False)


def reads_once(function: _Statements[P, T]) -> _OnCatalog[P, T]:
    """Make a function of one query at most a read; it is retried as `reads` is."""
    return _reading(function, one=True)


def _reading(function: _Statements[P, T], *, one: bool) -> _OnCatalog[P, T]:
    @wraps(function)
    def call(on: Connection | OpenCatalog, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if isinstance(on, Connection):
            return function(on, *args, **kwargs)
        return on.database.transact(
            lambda connection: function(connection, *args, **kwargs), writes=False, one=one
        )

    return call


class _Decorator(Protocol):
    def __call__(self, function: _Statements[P, T], /) -> _OnCatalog[P, T]: ...


@overload
def writes(*, idempotent: bool = ..., once: bool = ..., lock: str = ...) -> _Decorator: ...
@overload
def writes(
    *, find: Callable[Concatenate[Connection, P], T | None], once: bool = ...
) -> Callable[[_Statements[P, T]], _OnCatalog[P, T]]: ...
def writes(
    *,
    idempotent: bool = False,
    once: bool = False,
    lock: str = "",
    find: Callable[..., Any] | None = None,
) -> Any:
    """Make a function one write transaction, which commits whole or leaves nothing.

    It is retried if the database is known to have rolled it back, so the function must change
    nothing but the database. If the answer to its commit is lost, then:

    - by default the call raises `UnknownOutcomeError`;
    - with `idempotent`, which says that a second run changes nothing more, it is run again;
    - with `find`, that function is called with the same arguments in a transaction of its own. It
      must wait for the lost transaction, by a row that the latter had locked. It returns the
      result, or None if the transaction was rolled back: then the function is run again.

    With `once`, the function is one statement at most. `lock` is SQL that locks rows on a server,
    where it is sent together with BEGIN; on SQLite the whole database is locked anyway. If the
    function is called in the transaction of a caller, that one holds the lock.
    """

    def decorate(function: _Statements[P, T]) -> _OnCatalog[P, T]:
        @wraps(function)
        def call(on: Connection | OpenCatalog, /, *args: P.args, **kwargs: P.kwargs) -> T:
            if isinstance(on, Connection):
                return function(on, *args, **kwargs)
            database = on.database

            # Called only after the answer to the commit was lost.
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
                one=once,
                lock=lock,
                if_unknown=outcome,
            )

        return call

    return decorate
