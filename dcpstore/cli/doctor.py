"""`dcpstore doctor`: whether this machine and a repository are set up well, in one screen.

Each check does the real thing: it connects, and it writes one small object and deletes it again.
Without a catalog that opens, the data are not checked: only the catalog says where they are.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dcpstore.catalog.db.sqlite_file import open_file
from dcpstore.cli.output import (
    coloured,
    print_json,
    visible,
)
from dcpstore.cli.session import Session, repo_options
from dcpstore.core.display import human_bytes
from dcpstore.core.uids import new_uid
from dcpstore.errors import CorruptionError, DcpstoreError, NotFoundError, SchemaError

if TYPE_CHECKING:
    from dcpstore.catalog.catalog import Catalog
    from dcpstore.records import Version
    from dcpstore.storage.interface import Storage

__all__ = ["Finding", "doctor", "file_system", "is_locked_elsewhere"]

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
# Clock difference in seconds for a warning and for a problem; a lease is 1 h.
_CLOCK_WARNING, _CLOCK_PROBLEM = 10.0, 300.0
_FREE_WARNING, _FREE_PROBLEM = 1 << 30, 64 << 20
# A first sentence, in which a text in brackets may have a point of its own, and the others.
_SENTENCES = re.compile(r"((?:[^()]|\([^()]*\))*?\.) ([A-Z].*)", re.DOTALL)
_SECONDS = 30  # how long to wait for the other process
_NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs"} | {
    *("fuse.glusterfs", "fuse.s3fs", "lustre", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "wekafs")
}
_EXTRAS = {  # module, and what needs it
    "psycopg": ("postgres", "a catalog in Postgres"),
    "obstore": ("s3", "data in an object store"),
    "matplotlib": ("plot", "diff --plot"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `advice` is the next step if it is not ok."""

    check: str
    status: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


@click.command()
@repo_options
def doctor(session: Session) -> None:
    """Check the installation, and the repository if one is named.

    It connects to the database, and writes, reads and deletes one small object in the data folder
    or object store. Exits with 1 if there is a problem; warnings do not count.
    """
    findings = [*_installation()]
    if session.repo:
        findings += _repository(session.repo)
    if session.json:
        print_json(findings)
    else:
        _print(findings)
        if not session.repo:
            click.echo("no repository is named, so none was checked; pass --repo to check one")
    if any(one.status == "problem" for one in findings):
        click.get_current_context().exit(1)


def _print(findings: list[Finding]) -> None:
    width = max(len(one.check) for one in findings)
    for one in findings:
        mark = coloured(f"{one.status:7}", _COLOURS[one.status])
        for i, line in enumerate(filter(None, (*one.found.split("\n"), one.advice))):
            head = f"{' ' * (width + 9)}" if i else f"{mark}  {one.check:{width}}"
            click.echo(f"{head}  {visible(line)}")


def _installation() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("dcpstore", "ok", version("dcpstore"))
    for package, needed_by in (("torch", "saving and loading"), ("SQLAlchemy", "every command")):
        try:
            yield Finding(package, "ok", version(package))
        except PackageNotFoundError:
            yield Finding(
                package,
                "problem",
                f"not installed; {needed_by} needs it",
                f"Run 'pip install {package.lower()}'.",
            )
    for module, (extra, needed_by) in _EXTRAS.items():
        if sys.modules.get(module, True) is not None and find_spec(module) is not None:
            yield Finding(module, "ok", version(module))
        else:
            found = f"not installed; only {needed_by} needs it (pip install 'dcpstore[{extra}]')"
            yield Finding(module, "ok", found)


def _repository(target: str) -> Iterator[Finding]:
    """Check a repository, as far as it can be reached."""
    from dcpstore import repository  # noqa: PLC0415 (loads SQLAlchemy)
    from dcpstore.catalog.catalog import Catalog  # noqa: PLC0415
    from dcpstore.catalog.location import locate  # noqa: PLC0415
    from dcpstore.catalog.read.log_filter import list_log  # noqa: PLC0415
    from dcpstore.storage.urls import open_storage  # noqa: PLC0415

    try:
        url, folder = locate(target)
        catalog = Catalog.open(url)
    except SchemaError as error:
        if error.__cause__ is not None:  # the database's own error: there are no tables to look at
            yield _problem("database", error)
            return
        yield Finding("database", "ok", "it answers")
        yield _problem("schema", error)
        return
    except NotFoundError as error:
        lost = "" if folder is None else repository.advise(folder, target)
        yield _problem("database", lost or error)
        return
    except (DcpstoreError, OSError) as error:
        yield _problem("database", error)
        return
    with catalog:
        newest = None
        try:
            yield from _database(catalog)
            newest = next(iter(list_log(catalog, None, limit=1)), None)
        except (DcpstoreError, OSError) as error:
            yield _problem("database", error)
        try:
            storage = open_storage(catalog.repository.data_url, base=catalog.folder)
        except (DcpstoreError, OSError) as error:
            yield _problem("data", error)
        else:
            yield from _data(storage, newest)


def _problem(check: str, error: Exception | str) -> Finding:
    """Return an error as a finding: its first sentence, and the others as the advice."""
    sentences = _SENTENCES.fullmatch(str(error))
    found, advice = sentences.groups() if sentences else (str(error), "")
    return Finding(check, "problem", found, advice)


def _database(catalog: Catalog) -> Iterator[Finding]:
    from dcpstore.catalog.maintenance.health import (  # noqa: PLC0415 (loads SQLAlchemy)
        check_database,
        check_writable,
    )
    from dcpstore.catalog.schema.revisions import HEAD  # noqa: PLC0415

    health = check_database(catalog)
    check_writable(catalog)
    yield Finding("database", "ok", f"{health.product} at {catalog.shown}, writable")
    yield Finding("schema", "ok", HEAD)
    yield _clock(health.clock_ahead)
    if catalog.folder is not None:
        yield _locks(catalog.folder, catalog.database.file)


def _clock(ahead: float | None) -> Finding:
    if ahead is None:
        return Finding("clock", "ok", "the catalog uses the clock of this machine")
    found = f"{abs(ahead):.1f} s {'behind' if ahead > 0 else 'ahead of'} the database server"
    if abs(ahead) < _CLOCK_WARNING:
        return Finding("clock", "ok", found)
    return Finding(
        "clock",
        "problem" if abs(ahead) >= _CLOCK_PROBLEM else "warning",
        found,
        "Set both clocks by NTP: leases of saves and the grace time of gc depend on them.",
    )


def _locks(folder: Path, file: Path | None) -> Finding:
    """Check that the file lock works between two processes."""
    assert file is not None, "a catalog with a folder has a file"
    kind = file_system(folder, Path("/proc/self/mountinfo"))
    if not is_locked_elsewhere(file):
        return Finding(
            "locks",
            "problem",
            f"a second process could write to {str(file)!r} while this one was writing",
            "Do not write from two processes at once; put the catalog on a local disk, or in "
            "Postgres.",
        )
    if kind in _NETWORK:
        return Finding(
            "locks",
            "warning",
            f"they work on this machine; the catalog is on a network file system ({kind})",
            "Use it from one machine at a time: SQLite's write-ahead log is not shared between "
            "machines. For several, put the catalog in Postgres.",
        )
    return Finding("locks", "ok", f"a second process waits ({kind or 'unknown file system'})")


def file_system(folder: Path, mounts: Path) -> str:
    """Return the type of the file system of a folder, or "" where `mounts` does not say.

    `mounts` has the format of `/proc/self/mountinfo` (proc(5)).
    """
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return ""
    real = Path(os.path.realpath(folder))
    found = ("", "")
    for line in lines:
        before, separator, after = line.partition(" - ")
        if not separator:
            continue
        point = before.split()[4].encode().decode("unicode_escape")  # a space is \040 there
        if real.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, after.split()[0])  # of two mounts at one place, the later is used
    return found[1]


_TRY_TO_WRITE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
try:
    connection.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError as error:
    print("locked" if "locked" in str(error) else error)
"""


def is_locked_elsewhere(file: Path) -> bool:
    """Return whether another process cannot write while this one writes.

    It takes a second process: within one process SQLite does not rely on the file system.
    """
    connection = open_file(file, mode="rw", timeout=_SECONDS)
    try:
        connection.execute("BEGIN IMMEDIATE")
        other = subprocess.run(
            [sys.executable, "-c", _TRY_TO_WRITE, str(file)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    finally:
        connection.close()  # and so roll back
    return other.stdout.strip() == "locked"


def _data(storage: Storage, newest: Version | None) -> Iterator[Finding]:
    """Write, read, list and delete one small object, then check the free space."""
    is_folder = "://" not in storage.url
    uid = new_uid()
    # If we crash here, gc deletes the probe.
    key, content = f"packs/{uid}/doctor-probe", b"dcpstore doctor"
    done: list[str] = []
    try:
        storage.put(key, content)
        done.append("write")
        if storage.get(key) != content:
            raise CorruptionError(f"{key!r} was read with other bytes than were written.")
        done.append("read")
        if key not in storage.list(f"packs/{uid}"):
            raise DcpstoreError(f"{key!r} was written, and is missing in the list of objects.")
        done.append("list")
        storage.delete(key)
        if any(storage.list(f"packs/{uid}")):
            raise DcpstoreError(f"{key!r} was deleted, and is still in the list of objects.")
    except (DcpstoreError, OSError) as error:
        rights = "the folder's owner, mode and mount" if is_folder else "the rights of the key"
        worked = f"{', '.join(done)} worked; then" if done else "at the first write"
        yield Finding(
            "data",
            "problem",
            f"{storage.url}: {worked}: {error}",
            f"Check {rights}: saving needs to write, read, list and delete.",
        )
        if "write" in done:
            with suppress(DcpstoreError, OSError):
                storage.delete(key)
    else:
        yield Finding("data", "ok", f"write, read, list and delete work in {storage.url}")
    if is_folder:
        yield _space(storage.url, newest)


def _space(folder: str, newest: Version | None) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{human_bytes(free)} free"
    needed = 0 if newest is None else newest.nbytes
    if newest is not None:
        found += f"; {newest} has {human_bytes(needed)}"
    if free >= max(_FREE_WARNING, needed):
        return Finding("space", "ok", found)
    return Finding(
        "space",
        "problem" if free < _FREE_PROBLEM else "warning",
        found,
        "Free space with 'dcpstore expire' and 'dcpstore gc', or move the data folder.",
    )
