"""Where a repository is: what people name, and the database and folder that this means."""

from __future__ import annotations

import os
from pathlib import Path

from dcpstore.catalog.db.sqlite_file import CATALOG_FILE
from dcpstore.catalog.db.url import parse_url, sqlite_url
from dcpstore.catalog.validation import can_be_kept
from dcpstore.errors import InvalidInputError
from dcpstore.storage.urls import check_data_url

__all__ = ["absolute_data", "absolute_target", "check_path", "locate"]


def locate(target: str | os.PathLike[str]) -> tuple[str, Path | None]:
    """Return the database URL, and the folder of a repository that is named by its folder.

    The URL of a file of SQLite is made absolute: the process may change its folder.

    Raises:
        InvalidInputError: the target is not a path, is a file, or is an invalid URL.
    """
    target = check_path(target, what="the repository")
    if "://" in target:
        url = parse_url(target)
        is_file = url.get_backend_name() == "sqlite"
        return (sqlite_url(Path(url.database or "").absolute()) if is_file else target), None
    folder = Path(target).absolute()
    if os.path.isfile(folder):  # if even this may not be asked, opening the catalog says so
        raise InvalidInputError(
            f"{target!r} is a file; pass its folder, or 'sqlite:///{target}' if it is a catalog."
        )
    return sqlite_url(folder / CATALOG_FILE), folder


def absolute_target(target: str | os.PathLike[str]) -> str:
    """Return what names a repository so that it does when the process has changed its folder.

    Raises:
        InvalidInputError: as `locate`.
    """
    url, folder = locate(target)
    return url if folder is None else str(folder)


def check_path(path: object, *, what: str) -> str:
    """Return a path or URL as text.

    Raises:
        InvalidInputError: it is neither.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(named := os.fspath(path), str):
        raise InvalidInputError(f"{what} is {path!r}; pass a path or a URL, as text.")
    if not named:
        raise InvalidInputError(f"{what}: the path is empty; name a folder or a URL.")
    if not can_be_kept(named):
        raise InvalidInputError(
            f"{what} is {named!r}, which no catalog can keep; give a path in UTF-8, without NUL."
        )
    return named


def absolute_data(data: str) -> str:
    """Return a place of data as a catalog keeps it: a URL, or a path from the root.

    Raises:
        InvalidInputError: the URL holds credentials, which a catalog never keeps.
    """
    return check_data_url(data) if "://" in data else str(Path(data).absolute())
