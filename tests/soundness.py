"""Where a test's repository is; each suite ends with `assert_sound`."""

from __future__ import annotations

from dataclasses import dataclass

from dcpstore.records import ChunkDefaults
from dcpstore.repository import Repository
from dcpstore.repository import open as open_repository
from dcpstore.testing import assert_sound

__all__ = ["Place", "assert_sound"]


@dataclass(frozen=True)
class Place:
    """A repository's database and data folder; travels to ranks."""

    url: str
    data: str
    chunk_nbytes: int = 8 << 20

    def open(self) -> Repository:
        """Open it, or make it."""
        return open_repository(
            self.url, data=self.data, chunk=ChunkDefaults(nbytes=self.chunk_nbytes)
        )
