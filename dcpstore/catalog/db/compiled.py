"""Statements compiled once a process, and not once more for each engine.

SQLAlchemy keeps what it compiled by the dialect object, of which every engine has its own; so a
program that opens its repository for each save would compile the same fifty statements each time,
an eighth of a small save. Our engines of one kind differ in what they connect to alone: here they
share what was compiled, through the execution option `compiled_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from sqlalchemy import Compiled, Dialect

__all__ = ["compiled_statements"]

_MOST = 1_000  # so that filters, each of which makes a statement of its own, cannot pile up


class _Shared(MutableMapping[Any, Compiled]):
    """SQLAlchemy's mapping, with the kind of a dialect in place of the dialect."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Compiled] = {}

    def __getitem__(self, key: Any) -> Compiled:
        return self._compiled[_by_kind(key)]

    def get(self, key: Any, default: Any = None) -> Any:
        """Return what was compiled, or `default`."""
        return self._compiled.get(_by_kind(key), default)

    def __setitem__(self, key: Any, compiled: Compiled) -> None:
        if len(self._compiled) >= _MOST:
            self._compiled.clear()
        self._compiled[_by_kind(key)] = compiled

    def __delitem__(self, key: Any) -> None:
        del self._compiled[_by_kind(key)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._compiled)

    def __len__(self) -> int:
        return len(self._compiled)


def _by_kind(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a key of SQLAlchemy's in which the dialect is told by all that its SQL depends on."""
    return tuple(
        (type(part), part.server_version_info) if isinstance(part, Dialect) else part
        for part in key
    )


compiled_statements = _Shared()
