"""Where a repository is: what people name, and the database and folder that this means."""

from __future__ import annotations

import os
from pathlib import Path

from dcpstore.catalog import sqlite_url
from dcpstore.errors import InvalidInputError
from dcpstore.storage.urls import check_data_url

__all__ = ["absolute_data", "locate"]

_CATALOG_FILE = "catalog.db"


def locate(target: str) -> tuple[str, Path | None]:
    """Return the database URL, and the folder of an embedded repository.

    Raises:
        InvalidInputError: the target is empty, or a file.
    """
    if "://" in target:
        return target, None
    if not target:
        raise InvalidInputError("the repository's path is empty; pass a folder or a database URL.")
    folder = Path(target).absolute()
    if os.path.isfile(folder):  # who may not even ask is told so when the catalog is looked for
        raise InvalidInputError(
            f"{target!r} is a file; pass its folder, or 'sqlite:///{target}' with data=."
        )
    return sqlite_url(folder / _CATALOG_FILE), folder


def absolute_data(data: str) -> str:
    """Return a place of data as a catalog keeps it: a URL, or a path from the root.

    Raises:
        InvalidInputError: the URL holds credentials, which a catalog never keeps.
    """
    return check_data_url(data) if "://" in data else str(Path(data).absolute())
