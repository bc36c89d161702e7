"""Small versions of plain tensors, saved alone, and a second repository on the same kind."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import Repository, Version
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.schema.views import VIEWS
from dcpstore.catalog.write.saves import begin_save
from dcpstore.core.uids import new_uid
from dcpstore.formats.manifest import Manifest, decode_manifest, manifest_key
from dcpstore.maintenance.page_reader import PageReader
from dcpstore.records import VersionDraft
from dcpstore.repository import open as open_repository
from tests.cli.conftest import ask_database

Save = Callable[..., Version]


def open_intruder(folder: Path, data: str) -> Repository:
    """Return a repository whose catalog somebody pointed at the data of another."""
    open_repository(folder).close()
    ask_database(
        sqlite_url(folder / "catalog.db"),
        f"UPDATE repository SET data_url = '{data}', last_journaled = 0",
    )
    return open_repository(folder)


@pytest.fixture
def save(repo: Repository) -> Save:
    """Save a version: what its number makes new, and what never changes."""
    return saver(repo)


def saver(repo: Repository) -> Save:
    count = itertools.count(1)

    def save(state: dict[str, Any] | None = None, **options: Any) -> Version:
        new = torch.full((100,), float(next(count)))
        kept = torch.arange(50)
        return dcpstore.save(state or {"new": new, "kept": kept, "lr": 0.1}, repo, **options)

    return save


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Repository]:
    """Another repository, embedded in a folder."""
    with open_repository(tmp_path / "other") as opened:
        yield opened


def packs_named(repo: Repository, uid: str) -> set[str]:
    """Return the packs that the pages of a version name."""
    manifest = decode_manifest(repo.storage.get(manifest_key(uid)))
    assert isinstance(manifest, Manifest)
    held = PageReader(repo.storage).tree(manifest.root, manifest.page)
    return {chunk.pack for tensor in held.tensors for chunk in tensor.chunks}


def begin(repo: Repository, **options: Any) -> VersionDraft:
    """Begin a save that goes no further."""
    draft = VersionDraft(uid=new_uid(), branch="main", author="ada", host="node1", **options)
    begin_save(repo.catalog, draft)
    return draft


def packs_of(repo: Repository) -> set[str]:
    """Return the keys of the stored packs."""
    return set(repo.storage.list("packs"))


def views(repo: Repository) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of every view, in an order that they have in any catalog."""
    return {name: sorted(map(tuple, repo.sql(f"SELECT * FROM {name}")), key=repr) for name in VIEWS}


@contextmanager
def no_room_for_operations(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the storage refuse the journal, and nothing else."""
    put = repo.storage.put

    def refuse(key: str, data: bytes) -> None:
        if key.startswith("operations/"):
            raise dcpstore.DcpstoreError("the disk is full")
        put(key, data)

    with monkeypatch.context() as full:
        full.setattr(repo.storage, "put", refuse)
        yield
