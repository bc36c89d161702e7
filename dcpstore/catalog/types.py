"""Column types that make both databases keep and return the same values.

Text compares byte by byte on both (collation "C"), so that names are sorted in one way; times come
back aware and in UTC; a metric that is not a number is NULL, for SQLite cannot keep a NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import BigInteger, DateTime, Dialect, Float, Integer, LargeBinary, Text
from sqlalchemy.types import TypeDecorator

__all__ = ["Bytes", "IntTuple", "JsonText", "Key", "Metric", "Number", "UtcTime", "Words"]

Words = Text().with_variant(Text(collation="C"), "postgresql")
Number = BigInteger()
Key = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only in an INTEGER column
Bytes = LargeBinary()


class IntTuple(TypeDecorator[tuple[int, ...]]):
    """A tuple of integers as JSON text: offsets, sizes, shapes."""

    impl = Words
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> str | None:
        """Return `[1,2]`."""
        return None if value is None else f"[{','.join(map(str, value))}]"

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[int, ...] | None:
        """Return the tuple."""
        return None if value is None else _integers(value)


class JsonText(TypeDecorator[Any]):
    """A mapping or sequence as JSON text; pure ASCII, for Postgres text refuses NUL."""

    impl = Words
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the JSON text."""
        return None if value is None else json.dumps(_plain(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Return plain Python values."""
        return None if value is None else json.loads(value)


class UtcTime(TypeDecorator[datetime]):
    """An aware datetime: timestamptz on Postgres, naive UTC text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

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
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return aware.astimezone(UTC)  # type: ignore[no-any-return]


class Metric(TypeDecorator[float]):
    """A float whose NaN is NULL in the database."""

    impl = Float(53)
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """Return None for a NaN."""
        return None if value is None or math.isnan(value) else value

    def process_result_value(self, value: Any, dialect: Dialect) -> float:
        """Return NaN for NULL."""
        return math.nan if value is None else float(value)


@lru_cache(4096)
def _integers(text: str) -> tuple[int, ...]:
    """Return the tuple of a text; thousands of rows hold the same few."""
    return tuple(json.loads(text))


def _plain(value: Any) -> Any:
    """Return `value` as json takes it: any mapping as a dict."""
    return dict(value) if isinstance(value, Mapping) else value
