"""Who and which: the unique ids of versions, and the user name that operations are recorded under.

A uid is random, with the time of its making at the end. Packs that no catalog knows (of a save that
was killed, or still runs elsewhere) tell their age by their uid, whatever the storage says.
"""

from __future__ import annotations

import getpass
import os
import secrets
import time
from datetime import UTC, datetime

__all__ = [
    "new_uid",
    "this_user",
    "uid_time",
]

_RANDOM = 20  # hex digits; the rest are milliseconds since 1970


def new_uid() -> str:
    """Return 32 hex digits, of which the last 12 are the time now in milliseconds since 1970."""
    return f"{secrets.token_hex(_RANDOM // 2)}{time.time_ns() // 1_000_000:012x}"


def uid_time(uid: str) -> datetime:
    """Return when a uid was made.

    Raises:
        ValueError: it is not one of ours.
    """
    if len(uid) != _RANDOM + 12:
        raise ValueError(f"{uid!r} is not a uid of 32 hex digits.")
    return datetime.fromtimestamp(int(uid[_RANDOM:], 16) / 1000, UTC)


def this_user() -> str:
    """Return the name of the user, or the number of one who has none (as in many containers)."""
    try:
        name = getpass.getuser()
    except (KeyError, ImportError, OSError):  # the last alone from Python 3.13 on
        return str(os.getuid())
    return name.encode(errors="backslashreplace").decode()
