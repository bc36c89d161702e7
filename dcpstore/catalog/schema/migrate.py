"""Runs the migrations, wherever dcpstore is installed, inside the caller's transaction.

Alembic's commands pass the connection to a migration through modules that a process has once
(`alembic.context`, `alembic.op`), so two threads that migrate at once would get each other's.
Here each run loads the migrations for itself, and gives them an `op` bound to its own connection.
Nothing is shared, so no lock is needed, which a forked process might wait for without end.

This module is imported only to create or upgrade a catalog, for Alembic takes long to import.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.runtime.migration import RevisionStep
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

import dcpstore
from dcpstore.catalog.schema.views import create_views, drop_views
from dcpstore.errors import DcpstoreError, SchemaError

__all__ = ["migrate", "migrations_folder"]


def migrate(connection: Connection) -> None:
    """Bring the tables and views to the newest migration.

    Raises:
        SchemaError: no migrations lead to it from the revision of the database.
    """

    def steps(revision: str, context: MigrationContext) -> Iterable[RevisionStep]:
        # `alembic.command.upgrade` calls this private method too; there is no public one.
        return _with_own_op(scripts._upgrade_revs("head", revision), Operations(context))

    try:
        scripts = ScriptDirectory(migrations_folder())
        context = MigrationContext.configure(connection, opts={"fn": steps, "script": scripts})
        drop_views(connection)
        context.run_migrations()
        create_views(connection)
    except CommandError as error:
        raise SchemaError(
            f"the catalog cannot be upgraded: {error}. No released dcpstore made it; restore it "
            "from a backup, or make a new one from the data with 'dcpstore rebuild'."
        ) from error


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
