"""The catalog: every SQL statement of dcpstore, on SQLite and Postgres; records out, never rows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcpstore.catalog.catalog import Catalog
    from dcpstore.catalog.db.url import sqlite_url

__all__ = ["Catalog", "sqlite_url"]

_HOMES = {"Catalog": "catalog", "sqlite_url": "db.url"}


def __getattr__(name: str) -> object:
    """Load what needs SQLAlchemy when it is first used: a glance at the log does without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
