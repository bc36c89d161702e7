"""Durations and times as people write them.

    duration := a number and s, m, h, d or w, such as "90s" or "7d"

Whatever passes here fits both databases and every clock.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from dcpstore.errors import InvalidInputError

__all__ = ["Duration", "as_duration", "in_utc"]


Duration = timedelta | str
_TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_MOST = timedelta(days=100_000)  # now minus this is still after the year 1, so it is a valid time


def as_duration(given: Duration, *, what: str) -> timedelta:
    """Return a duration that is not negative, of 100,000 days at most.

    Raises:
        InvalidInputError: `given` is not a valid duration, or longer; the message calls it `what`.
    """
    duration = given
    if isinstance(given, str) and (match := _TEXT.fullmatch(given.strip())):
        try:
            duration = timedelta(**{_UNITS[match[2]]: float(match[1])})
        except OverflowError:
            duration = timedelta.max
    if not isinstance(duration, timedelta) or duration < timedelta(0):
        other = "" if isinstance(given, str) else ", or give a timedelta"
        raise InvalidInputError(
            f"{what} {given!r} is not a valid duration; write '90s', '30m', '24h', '7d' or "
            f"'2w'{other}."
        )
    if duration > _MOST:
        raise InvalidInputError(
            f"{what} {given!r} is longer than {_MOST.days:,} days; give a shorter duration."
        )
    return duration


def in_utc(given: datetime, *, what: str) -> datetime:
    """Return a time in UTC; a time without a zone is in this machine's zone.

    Raises:
        InvalidInputError: `given` is not a time, or not in the range of UTC; the message calls it
            `what`.
    """
    if not isinstance(given, datetime):
        raise InvalidInputError(f"{what}={given!r} is not a time; give a datetime.")
    try:
        return given.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidInputError(
            f"{what}={given} is not a time in UTC, whose years are 1 to 9999; give another one."
        ) from None
