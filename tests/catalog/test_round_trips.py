"""How often a save, a tag and a load wait for the database: as few times as their answers need.

A statement counts where its answer is waited for, BEGIN and COMMIT too, as `Repository.trace`
counts them. Statements that are sent together count as one: on a server they are one round trip,
and a file has none. On a server, what is traced is compared with what goes over the wire.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import Repository
from dcpstore.catalog.maintenance.journal import journal_again, unjournaled
from dcpstore.catalog.write import saves
from dcpstore.formats.journal_entry import encode_operation, operation_key
from tests.proxy import Proxy, proxied
from tests.soundness import Place, assert_sound

Connected = tuple[Repository, Proxy | None]


def state(x: float) -> dict[str, Any]:
    return {"w": torch.arange(100.0) + x, "frozen": torch.zeros(7), "lr": 0.1}


@pytest.fixture
def connected(place: Place) -> Iterator[Connected]:
    """A repository with two versions that other processes saved, and what counts round trips."""
    for x in (0.0, 1.0):
        with place.open() as repo:
            dcpstore.save(state(x), repo)
    if place.url.startswith("sqlite"):
        with place.open() as repo:
            yield repo, None
    else:
        with proxied(place.url) as proxy, replace(place, url=proxy.url).open() as repo:
            yield repo, proxy
    with place.open() as repo:
        assert_sound(repo)


@contextmanager
def at_most(connected: Connected, count: int) -> Iterator[None]:
    """Check that the block waits for the database `count` times at most."""
    repo, proxy = connected
    with repo.catalog.keep_connection():
        repo.show()  # connects
        before = proxy.round_trips if proxy else 0
        with repo.trace() as seen:
            yield
        waits = proxy.round_trips - before if proxy else len(seen.statements)
    listed = "\n".join(seen.statements)
    assert waits == len(seen.statements), listed
    assert 0 < waits <= count, listed


def test_a_tag_and_a_branch(connected: Connected) -> None:
    repo, _ = connected
    version = repo.show()
    changes: list[Callable[[], object]] = [
        lambda: repo.tag("best"),
        lambda: repo.tag("first", "v1"),
        lambda: repo.tag("same", version),
        lambda: repo.tag("best", 1, move=True),
        lambda: repo.branch("side", at="first"),
    ]
    for change in changes:
        with at_most(connected, 6):
            change()
    assert [(ref.name, ref.version) for ref in repo.tags()] == [
        ("best", 1),
        ("first", 1),
        ("same", 2),
    ]


def test_a_load(connected: Connected) -> None:
    repo, _ = connected
    for ref in (None, "v1", 2, "main"):
        with at_most(connected, 6):
            dcpstore.load(state(0.0), repo, ref)


def test_a_save(connected: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a slow machine the save takes a second, and then its lease is renewed.
    monkeypatch.setattr(saves, "touch_save", lambda *_: None)
    repo, _ = connected
    with at_most(connected, 18):  # the first of a process also reads the entries of the parent
        dcpstore.save(state(2.0), repo)
    with at_most(connected, 12):
        dcpstore.save(state(2.0), repo)
    with at_most(connected, 16):
        dcpstore.save(state(3.0), repo)
    with at_most(connected, 16):
        dcpstore.save({**state(3.0), "lr": 0.2}, repo, message="one value")
    with at_most(connected, 16):
        dcpstore.save({**state(4.0), "new": torch.ones(3), "more": 1}, repo)


def test_resolving(connected: Connected) -> None:
    repo, _ = connected
    version = repo.show()
    for ref in ("main", "v1", 2, version, None):
        with at_most(connected, 1):
            repo.show(ref)


def test_the_journal_gets_what_the_catalog_would_say(repo: Repository) -> None:
    """A change writes the operations that it knows; read from the catalog they are the same."""
    first = dcpstore.save(
        state(0.0),
        repo,
        step=7,
        tags=["b", "a"],
        metrics={"z": float("nan"), "loss": 0.1},
        labels={"lr": "größer"},
        message="one",
    )
    dcpstore.save(state(1.0), repo)
    dcpstore.save(state(2.0), repo, branch="side", parent=first)
    repo.tag("a", "main", move=True)
    repo.branch("other", at="b")
    written = {
        entry: repo.storage.get(operation_key(entry))
        for entry in range(1, repo.operations()[0].number + 1)
    }
    assert unjournaled(repo.catalog) == []
    journal_again(repo.catalog, 1)
    read = {entry["operation"]: encode_operation(entry) for entry in unjournaled(repo.catalog)}
    assert read == written


def test_a_change_writes_what_an_earlier_one_left(repo: Repository) -> None:
    dcpstore.save(state(0.0), repo)
    (last,) = repo.operations(limit=1)
    kept = repo.storage.get(operation_key(last.number))
    repo.storage.delete(operation_key(last.number))
    journal_again(repo.catalog, last.number)
    repo.tag("best")
    assert repo.storage.get(operation_key(last.number)) == kept
    assert unjournaled(repo.catalog) == []
