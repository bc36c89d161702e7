"""The catalog: every SQL statement of dcpstore, on SQLite and Postgres; records out, never rows."""

from __future__ import annotations

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.connecting import sqlite_url

__all__ = ["Catalog", "sqlite_url"]
