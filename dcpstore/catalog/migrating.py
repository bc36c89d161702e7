"""Runs the migrations, wherever dcpstore is installed, inside the caller's transaction.

Imported only by who creates or upgrades a catalog, for Alembic takes long to load.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection

import dcpstore
from dcpstore.errors import DcpstoreError, SchemaError

__all__ = ["migrate", "migrations_folder"]


def migrate(connection: Connection) -> None:
    """Bring the tables and views to the newest migration.

    Raises:
        SchemaError: there is no way to it from the revision that the database says.
    """
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaError(
            f"the catalog cannot be upgraded: {error}. No dcpstore that was released made it; "
            "restore it from a backup, or make it anew from the data with 'dcpstore rebuild'."
        ) from error


def migrations_folder() -> Path:
    """Return the folder of the migrations: in the package as installed, beside it in a checkout."""
    package = Path(dcpstore.__file__).parent
    for folder in (package / "migrations", package.parent / "migrations"):
        if folder.is_dir():
            return folder
    raise DcpstoreError("the migrations are missing beside dcpstore; install dcpstore again.")
