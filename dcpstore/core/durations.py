"""Spans of time as people write them, `90s`, `30m`, `24h`, `7d`, `2w`, and moments in UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from dcpstore.errors import InvalidInputError

__all__ = ["Duration", "as_duration", "in_utc"]

Duration = timedelta | str
_TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_MOST = timedelta(days=100_000)  # so long ago there still was a time, on every clock


def as_duration(given: Duration, *, what: str) -> timedelta:
    """Return a span of time that is not negative, of 100,000 days at most.

    Raises:
        InvalidInputError: `given` is none, or longer; the message calls it `what`.
    """
    span = given
    if isinstance(given, str) and (match := _TEXT.fullmatch(given.strip())):
        try:
            span = timedelta(**{_UNITS[match[2]]: float(match[1])})
        except OverflowError:
            span = timedelta.max
    if not isinstance(span, timedelta) or span < timedelta(0):
        raise InvalidInputError(
            f"{what} {given!r} is no span of time; write '90s', '30m', '24h', '7d' or '2w', or "
            "give a timedelta."
        )
    if span > _MOST:
        raise InvalidInputError(
            f"{what} {given!r} is longer than {_MOST.days:,} days; give a shorter span."
        )
    return span


def in_utc(given: datetime, *, what: str) -> datetime:
    """Return a moment in UTC; one without a zone is by this machine's.

    Raises:
        InvalidInputError: `given` is none, or there is none in UTC; the message calls it `what`.
    """
    if not isinstance(given, datetime):
        raise InvalidInputError(f"{what}={given!r} is no time; give a datetime.")
    try:
        return given.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidInputError(
            f"{what}={given} is no time in UTC, where years go from 1 to 9999; give another."
        ) from None
