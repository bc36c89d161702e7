"""Which tables a catalog has, by the id of the last migration that it went through.

Apart from `lifecycle`, so that a look at the log need not load SQLAlchemy.
"""

from __future__ import annotations

__all__ = ["HEAD", "is_older"]

HEAD = "0002"  # the newest migration; a test holds it against migrations/versions


def is_older(revision: str) -> bool:
    """Tell whether a revision comes before ours: their ids are counted, in four digits."""
    return revision.isdecimal() and len(revision) == len(HEAD) and revision < HEAD
