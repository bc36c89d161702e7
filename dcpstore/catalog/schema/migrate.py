"""Runs the migrations, wherever dcpstore is installed, inside the caller's transaction.

Alembic's commands pass the connection to a migration through modules that a process has once
(`alembic.context`, `alembic.op`), so two threads that migrate at once would get each other's.
Here each run loads the migrations for itself, and gives them an `op` bound to its own connection.
Nothing is shared, so no lock is needed, which a forked process might wait for without end.

A migration that may take long has a `Preparation`: it does most of the work before, in many
transactions, beside the tables that are in use.

This module is imported only to create or upgrade a catalog, for Alembic takes long to import.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.runtime.migration import RevisionStep
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

import dcpstore
from dcpstore.catalog.schema.views import create_views, drop_views
from dcpstore.errors import DcpstoreError, SchemaError

__all__ = ["Estimate", "Preparation", "migrate", "migrations_folder", "preparations"]


# The versions, entries, tensors and chunks that are to be converted; about how many rows, bytes and
# seconds that makes.
Estimate = tuple[int, int, int, int, int, int, float]


class Preparation(Protocol):
    """The work that a migration does before it, beside the tables that are in use."""

    def left(self, connection: Connection) -> int:
        """Return how many rows are to be converted."""

    def step(self, connection: Connection) -> int:
        """Convert some in the caller's transaction; return how many, or 0 if none is left."""

    def estimate(self, connection: Connection) -> Estimate:
        """Convert a sample into temporary tables, and return what all of it will make."""


def preparations(revision: str) -> list[Preparation]:
    """Return the preparations of the migrations that a catalog of this revision lacks."""
    with _explained():
        scripts = _scripts()
        lacking = scripts._upgrade_revs("head", revision)
    made = [getattr(step.revision.module, "Preparation", None) for step in lacking]
    return [make() for make in made if make is not None]


def migrate(connection: Connection) -> None:
    """Bring the tables and views to the newest migration.

    Raises:
        SchemaError: no migrations lead to it from the revision of the database.
    """

    def steps(revision: str, context: MigrationContext) -> Iterable[RevisionStep]:
        # `alembic.command.upgrade` calls this private method too; there is no public one.
        return _with_own_op(scripts._upgrade_revs("head", revision), Operations(context))

    with _explained():
        scripts = _scripts()
        context = MigrationContext.configure(connection, opts={"fn": steps, "script": scripts})
        drop_views(connection)
        context.run_migrations()
        create_views(connection)


@contextmanager
def _explained() -> Iterator[None]:
    """Raise what Alembic says of a revision that it does not know as an error of ours."""
    try:
        yield
    except CommandError as error:
        raise SchemaError(
            f"the catalog cannot be upgraded: {error}. No released dcpstore made it; restore it "
            "from a backup, or make a new one from the data with 'dcpstore rebuild'."
        ) from error


def _scripts() -> ScriptDirectory:
    folder = migrations_folder()
    try:
        os.listdir(folder / "versions")  # Alembic takes a folder that cannot be read for empty
    except OSError as error:
        raise DcpstoreError(
            f"cannot read the migrations in {str(folder)!r}: {error.strerror}. Nothing was "
            "changed; let this user read that folder ('ulimit -n' raises the limit of open files), "
            "and try again."
        ) from error
    return ScriptDirectory(folder)


def _with_own_op(steps: Iterable[RevisionStep], op: Operations) -> Iterator[RevisionStep]:
    """Yield the steps, each with `op` instead of the process-wide module of that name.

    Their modules belong to this run: a `ScriptDirectory` loads each file again, outside
    `sys.modules`.
    """
    for step in steps:
        vars(step.revision.module)["op"] = op
        yield step


def migrations_folder() -> Path:
    """Return the folder of the migrations: in the package as installed, beside it in a checkout."""
    package = Path(dcpstore.__file__).parent
    for folder in (package / "migrations", package.parent / "migrations"):
        if folder.is_dir():
            return folder
    raise DcpstoreError("the migrations are missing beside dcpstore; install dcpstore again.")
