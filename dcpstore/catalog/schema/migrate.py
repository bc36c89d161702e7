"""Runs the migrations, wherever dcpstore is installed, inside the caller's transaction.

Alembic's commands hand the connection to a migration through modules that are one a process
(`alembic.context`, `alembic.op`), so two threads that migrate at once would take each other's.
Here each run loads the migrations for itself, and gives them its own `op`, bound to the run's
connection: nothing is shared, so there is no lock, and a forked process never waits for one.

Imported only by who creates or upgrades a catalog, for Alembic takes long to load.
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
        SchemaError: there is no way to it from the revision that the database says.
    """

    def steps(revision: str, context: MigrationContext) -> Iterable[RevisionStep]:
        # As `alembic.command.upgrade` asks for them; Alembic has no public name for it.
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
    """Yield the steps, each with `op` in place of the process-wide module of that name.

    Their modules are of this run: a `ScriptDirectory` loads each file again, outside `sys.modules`.
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
