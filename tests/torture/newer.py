"""A made-up schema after today's, so that every state that the torture prepares can be upgraded.

It adds two columns, by the real Alembic beside the real migrations, in a child process.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from dcpstore.catalog.schema import migrate as migrating
from dcpstore.catalog.schema import revisions

__all__ = ["NEWEST", "TODAY", "go_back", "newer_schema"]

TODAY = revisions.HEAD
NEWEST = f"{int(TODAY) + 1:04}"
_MIGRATION = f"""
import sqlalchemy as sa
from alembic import op

revision = "{NEWEST}"
down_revision = "{TODAY}"


def upgrade():
    for name, value in (("mood", "good"), ("weather", "fair")):
        op.add_column("version", sa.Column(name, sa.Text()))
        op.execute(f"UPDATE version SET {{name}} = '{{value}}'")
"""


@contextmanager
def newer_schema() -> Iterator[None]:
    """Let this process be of a dcpstore whose newest migration is one more."""
    found, head = migrating.migrations_folder, revisions.HEAD
    with _files_of_any_length():
        folder = tempfile.TemporaryDirectory()
        newer = Path(folder.name) / "migrations"
        shutil.copytree(found(), newer)
        (newer / "versions" / f"{NEWEST}_more_columns.py").write_text(_MIGRATION)
    with folder:
        migrating.migrations_folder = lambda: newer
        revisions.HEAD = NEWEST
        try:
            yield
        finally:
            migrating.migrations_folder, revisions.HEAD = found, head


@contextmanager
def _files_of_any_length() -> Iterator[None]:
    """Lift the limit that a disk under trial sets: what is written here is none of its affair."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def go_back(url: str) -> None:
    """Take the two columns away again."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        for name in ("mood", "weather"):
            connection.execute(sa.text(f"ALTER TABLE version DROP COLUMN {name}"))
        connection.execute(sa.text(f"UPDATE alembic_version SET version_num = '{TODAY}'"))
    engine.dispose()
