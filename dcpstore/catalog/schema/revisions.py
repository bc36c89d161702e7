"""The revision of a catalog's schema: the id of the last migration that was applied to it.

Apart from `lifecycle`, so that the fast log need not import SQLAlchemy.
"""

from __future__ import annotations

__all__ = ["HEAD", "is_older"]

HEAD = "0003"  # the newest migration; a test compares it with migrations/versions


def is_older(revision: str) -> bool:
    """Tell whether a revision comes before `HEAD`: ids are consecutive numbers of four digits."""
    return revision.isdecimal() and len(revision) == len(HEAD) and revision < HEAD
