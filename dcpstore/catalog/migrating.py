"""Runs the migrations, wherever dcpstore is installed, inside the caller's transaction.

Imported only by who creates or upgrades a catalog, for Alembic takes long to load.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

import dcpstore
from dcpstore.errors import DcpstoreError

__all__ = ["migrate", "migrations_folder"]


def migrate(connection: Connection) -> None:
    """Bring the tables and views to the newest migration."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    command.upgrade(config, "head")


def migrations_folder() -> Path:
    """Return the folder of the migrations: in the package as installed, beside it in a checkout."""
    package = Path(dcpstore.__file__).parent
    for folder in (package / "migrations", package.parent / "migrations"):
        if folder.is_dir():
            return folder
    raise DcpstoreError("the migrations are missing beside dcpstore; install dcpstore again.")
