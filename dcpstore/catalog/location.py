"""Where a repository is: from the path or URL that a user gives to its database and folder."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path

from dcpstore.catalog.db.sqlite_file import CATALOG_FILE
from dcpstore.catalog.db.url import parse_url, sqlite_url
from dcpstore.catalog.validation import can_be_kept
from dcpstore.errors import InvalidInputError
from dcpstore.storage.urls import check_data_url

__all__ = ["absolute_data", "absolute_target", "check_path", "locate"]


def locate(target: str | os.PathLike[str]) -> tuple[str, Path | None]:
    """Return the database URL, and the folder if the repository is named by its folder.

    The path of an SQLite file is made absolute, for the process may change its working folder.

    Raises:
        InvalidInputError: the target is not a path, is a file, or is an invalid URL.
    """
    target = check_path(target, what="the repository")
    if "://" in target:
        url = parse_url(target)
        is_file = url.get_backend_name() == "sqlite"
        return (sqlite_url(Path(url.database or "").absolute()) if is_file else target), None
    folder = Path(target).absolute()
    if os.path.isfile(folder):  # if that may not be read, opening the catalog reports it
        raise InvalidInputError(
            f"{target!r} is a file; pass its folder, or 'sqlite:///{target}' if it is a catalog."
        )
    return sqlite_url(folder / CATALOG_FILE), folder


def absolute_target(target: str | os.PathLike[str]) -> str:
    """Return a name of a repository that stays valid if the process changes its working folder.

    Raises:
        InvalidInputError: as `locate`.
    """
    url, folder = locate(target)
    return url if folder is None else str(folder)


def check_path(path: object, *, what: str) -> str:
    """Return a path or URL as text.

    Raises:
        InvalidInputError: it is neither a path nor a URL that a catalog can store.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(named := os.fspath(path), str):
        raise InvalidInputError(f"{what} is {reprlib.repr(path)}; pass a path or a URL, as text.")
    if not named:
        raise InvalidInputError(f"{what}: the path is empty; name a folder or a URL.")
    if not can_be_kept(named):
        raise InvalidInputError(
            f"{what} is {named!r}, which contains NUL or invalid UTF-8; give a path in UTF-8, "
            "without NUL."
        )
    return named


def absolute_data(data: str) -> str:
    """Return the place of data as a catalog stores it: a URL, or an absolute path.

    Raises:
        InvalidInputError: the URL holds credentials, which a catalog never stores.
    """
    return check_data_url(data) if "://" in data else str(Path(data).absolute())
