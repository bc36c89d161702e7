"""Opens the storage that a data URL names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from dcpstore.errors import DcpstoreError, InvalidInputError
from dcpstore.storage.interface import Storage
from dcpstore.storage.local import LocalFolder

__all__ = ["OBJECT_STORES", "check_data_url", "open_storage"]

OBJECT_STORES = ("s3", "gs", "az")


def open_storage(url: str, *, base: Path | None = None, create: bool = False) -> Storage:
    """Return the storage at `url`.

    Args:
        url: a path, or "file:///path", or "s3://bucket/prefix" ("gs://", "az://" alike).
        base: the folder from which a relative path counts; the current one if not given.
        create: make a missing local folder, as a new repository does.

    Raises:
        InvalidInputError: the scheme is not known, or the URL is not well formed.
        NotFoundError: a local folder that is missing.
    """
    check_data_url(url)
    if "://" not in url:
        if not url or "\0" in url:
            raise InvalidInputError(f"{url!r} is not a path; give the data folder, or its URL.")
        return LocalFolder((base or Path()) / url, create=create)
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.strip("/"):
            raise InvalidInputError(
                f"{url!r} does not name a local folder; write file:///absolute/path."
            )
        return LocalFolder(Path(unquote(parts.path)), create=create)
    if parts.scheme in OBJECT_STORES:
        try:
            # Imported late: most repositories are in folders, and obstore is an extra.
            from dcpstore.storage.object_store import open_object_store  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise DcpstoreError(
                f"{url!r} needs obstore, which is not installed; run 'pip install obstore'."
            ) from error
        return open_object_store(url)
    raise InvalidInputError(
        f"there is no storage for {parts.scheme + '://'!r} in {url!r}; give a path, or a URL of "
        f"{', '.join(scheme + '://' for scheme in ('file', *OBJECT_STORES))}."
    )


def check_data_url(url: str) -> str:
    """Return `url` if the catalog, the journal and messages may show it.

    Raises:
        InvalidInputError: it holds a user, a password, or a query, which may be a signature.
    """
    if "://" in url:
        _, _, rest = url.partition("://")
        if "@" in rest.split("/", 1)[0] or "?" in rest or "#" in rest:
            raise InvalidInputError(  # without the URL itself
                "the data URL holds a user, a password or a query, and would be kept in the "
                "catalog; leave them out, and give credentials in the environment, such as AWS_*."
            )
    return url
