"""Column types that make both databases keep and return the same values.

Text compares byte by byte on both (collation "C"), so that names are sorted in one way; times come
back aware and in UTC; a metric that is not a number is NULL, for SQLite cannot keep a NaN; and what
a damaged row holds is an error that says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import BigInteger, DateTime, Dialect, Float, Integer, LargeBinary, Text
from sqlalchemy.types import TypeDecorator

from dcpstore.errors import CorruptionError
from dcpstore.formats import json_fields
from dcpstore.records import ObjectPath, StatePath

__all__ = [
    "Bytes",
    "IntTuple",
    "JsonText",
    "Key",
    "Metric",
    "Name",
    "Number",
    "PathText",
    "UtcTime",
    "Words",
]

T = TypeVar("T")

Words = Text().with_variant(Text(collation="C"), "postgresql")
Number = BigInteger()
Key = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only in an INTEGER column
Bytes = LargeBinary()


class _Checked(TypeDecorator[T]):
    """A type whose damaged values are an error of ours, and never reach who asks."""

    impl: Any = Words  # other types have another
    cache_ok = True
    belongs = ""  # what a value is, for people

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], T | None]:
        """Return what turns a value of the database into one of Python."""
        process = super().result_processor(dialect, coltype)
        assert process is not None, "each of these types turns its values"

        def checked(value: Any) -> T | None:
            try:
                found: T | None = process(value)
                return found
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise CorruptionError(
                    f"a row of the catalog is damaged: {str(value)[:80]!r} stands where "
                    f"{self.belongs} belongs ({error}). Restore the catalog from a backup, or make "
                    "it again from the data with 'dcpstore rebuild'."
                ) from error

        return checked


class IntTuple(_Checked[tuple[int, ...]]):
    """A tuple of integers as JSON text: offsets, sizes, shapes."""

    cache_ok = True
    belongs = "a list of integers"

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> str | None:
        """Return `[1,2]`."""
        return None if value is None else json_fields.integers(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[int, ...] | None:
        """Return the tuple."""
        return None if value is None else _integers(value)


class JsonText(_Checked[Any]):
    """A mapping or sequence as JSON text; pure ASCII, for Postgres text refuses NUL."""

    cache_ok = True
    belongs = "JSON"

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the JSON text."""
        return None if value is None else json.dumps(_plain(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Return plain Python values; most versions have no labels."""
        if value == "{}":
            return {}
        return None if value is None else json.loads(value)


class PathText(_Checked[ObjectPath]):
    """The keys and indices that lead to an object, as JSON text."""

    cache_ok = True
    belongs = "a path of names and numbers"

    def process_bind_param(self, value: ObjectPath | None, dialect: Dialect) -> str | None:
        """Return the JSON text; pure ASCII, as `JsonText`."""
        return None if value is None else json_fields.path(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> ObjectPath | None:
        """Return the path."""
        if value is None:
            return None
        return StatePath.parsed(json.loads(value))


class UtcTime(_Checked[datetime]):
    """An aware datetime: timestamptz on Postgres, naive UTC text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True
    belongs = "a time"

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time in UTC, naive for SQLite, whose text has no zone."""
        if value is None:
            return None
        assert value.tzinfo is not None, "times are aware"
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return the time, aware and in UTC."""
        if value is None:
            return None
        aware: datetime = value if value.tzinfo else value.replace(tzinfo=UTC)
        return aware.astimezone(UTC)


class Name(_Checked[str]):
    """A text that people give a version; SQLite would keep bytes in its place."""

    cache_ok = True
    belongs = "a name"

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """Return the text."""
        if value is not None and not isinstance(value, str):
            raise TypeError("not text")
        return value


class Metric(_Checked[float]):
    """A float whose NaN is NULL in the database."""

    impl = Float(53)
    cache_ok = True
    belongs = "a number"

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """Return None for a NaN."""
        return None if value is None or math.isnan(value) else value

    def process_result_value(self, value: Any, dialect: Dialect) -> float:
        """Return NaN for NULL."""
        return math.nan if value is None else float(value)


@lru_cache(4096)
def _integers(text: str) -> tuple[int, ...]:
    """Return the tuple of a text; thousands of rows hold the same few."""
    numbers = json.loads(text)
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("not a list of integers from 0 on")
    return tuple(numbers)


def _plain(value: Any) -> Any:
    """Return `value` as json takes it: any mapping as a dict."""
    return dict(value) if isinstance(value, Mapping) else value
