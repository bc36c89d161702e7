"""The unique ids of versions and of other things that a repository makes.

A uid is random, with the time of its making at the end. So the age of a pack that no catalog names
(of a save that was killed, or that still runs elsewhere) is known from its key, whatever times the
storage reports.
"""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime

__all__ = ["new_uid", "uid_time"]

_RANDOM_DIGITS = 20  # hex digits; the other 12 are milliseconds since 1970


def new_uid() -> str:
    """Return 32 hex digits, of which the last 12 are the time now in milliseconds since 1970."""
    return f"{secrets.token_hex(_RANDOM_DIGITS // 2)}{time.time_ns() // 1_000_000:012x}"


def uid_time(uid: str) -> datetime:
    """Return when a uid was made.

    Raises:
        ValueError: it is not a uid of dcpstore.
    """
    if len(uid) != _RANDOM_DIGITS + 12:
        raise ValueError(f"{uid!r} is not a uid of 32 hex digits.")
    return datetime.fromtimestamp(int(uid[_RANDOM_DIGITS:], 16) / 1000, UTC)
