"""Repositories to strike: where one is, and copies of one that was prepared once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg
import torch

from dcpstore.records import ChunkDefaults
from dcpstore.repository import Repository
from dcpstore.repository import open as open_repository
from tests.torture.children import carry_out
from tests.torture.kinds import Dialect, Ground

__all__ = ["Mould", "Site", "state"]

CHUNK = 640 << 10  # bytes; a pack is then written in several steps


def state(number: int) -> dict[str, object]:
    """Return the state that is saved as the `number`th: a part new, a part shared, a part fixed."""
    return {
        "big": torch.arange(number, number + 320_000, dtype=torch.float32),
        "shared": torch.full((30_000,), number // 2, dtype=torch.bfloat16),
        "kept": torch.arange(50),
        "number": number,
    }


@dataclass(frozen=True)
class Site:
    """A repository in a folder that may be struck; it travels to children.

    Attributes:
        root: the folder whose files count; the repository is somewhere below it.
        target: as `dcpstore.open` takes it.
        data: the data folder.
    """

    root: Path
    target: str
    data: Path

    @property
    def on_postgres(self) -> bool:
        """Whether the catalog is on a server."""
        return "://" in self.target

    def open(self, *, create: bool = False) -> Repository:
        """Open the repository, or make it."""
        return open_repository(
            self.target,
            data=self.data if self.on_postgres else None,
            create=create,
            chunk=ChunkDefaults(nbytes=CHUNK),
        )


class Mould:
    """A site that is prepared once and copied for every strike.

    Args:
        ground: where.
        dialect: of the catalog.
        prepare: called in a child, with the site; it must be importable by name.
    """

    def __init__(self, ground: Ground, dialect: Dialect, prepare: Callable[[Site], None]) -> None:
        self._ground, self._dialect = ground, dialect
        self._first = self._site("")
        carry_out(prepare, self._first)

    @property
    def before(self) -> Path:
        """The folder as it was prepared."""
        return self._first.root

    def _site(self, template: str) -> Site:
        root = self._ground.folder() / "root"
        data = root / "deep" / "repository"
        if self._dialect == "sqlite":
            return Site(root, str(data), data)
        root.mkdir()
        return Site(root, self._ground.database("postgres", template=template), data)

    def copy(self) -> Site:
        """Return a new site like the one that was prepared."""
        site = self._site(self._first.target)
        shutil.copytree(self._first.root, site.root, dirs_exist_ok=True)
        if site.on_postgres:
            with psycopg.connect(site.target, autocommit=True) as connection:
                found = connection.execute("SELECT to_regclass('repository')").fetchone()
                if found is not None and found[0] is not None:
                    connection.execute("UPDATE repository SET data_url = %s", [str(site.data)])
        return site

    def discard(self, site: Site) -> None:
        """Remove a copy."""
        shutil.rmtree(site.root.parent)
        if site.on_postgres:
            self._ground.drop(site.target)
