"""`Repository.trace`: what was asked of the database and of the storage, and only that."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

import dcpstore
from dcpstore import Repository
from tests.soundness import Place


def state() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(100.0), "b": torch.zeros(7)}


def test_a_save_and_a_load_are_recorded(repo: Repository) -> None:
    with repo.trace() as seen:
        version = dcpstore.save(state(), repo)
        saved = len(seen.requests)
        dcpstore.load(state(), repo)
    assert any("INTO version" in statement for statement in seen.statements)
    (written,) = (request for request in seen.requests if request.method == "write")
    assert written.nbytes == version.nbytes_written == (100 + 7) * 4
    assert (Path(repo.storage.url) / written.key).stat().st_size == written.nbytes
    assert [r.key for r in seen.requests[:saved] if r.key.startswith("manifests/")]
    assert all(request.method == "read" for request in seen.requests[saved:])
    assert sum(request.nbytes for request in seen.requests[saved:]) == written.nbytes


def test_nothing_is_recorded_outside_of_the_block(repo: Repository) -> None:
    dcpstore.save(state(), repo)
    with repo.trace() as seen:
        repo.show()
    before = (list(seen.statements), list(seen.requests))
    assert before[0]
    dcpstore.load(state(), repo)
    repo.sql("SELECT 1")
    assert (seen.statements, seen.requests) == before


def test_traces_inside_one_another_each_record_their_block(repo: Repository) -> None:
    dcpstore.save(state(), repo)
    with repo.trace() as outer:
        repo.read(fqns="w")
        before = (len(outer.statements), len(outer.requests))
        with repo.trace() as inner:
            repo.read(fqns="w")
        repo.show()
    assert inner.statements == outer.statements[before[0] :][: len(inner.statements)]
    assert inner.requests == outer.requests[before[1] :] != []
    assert len(outer.statements) > before[0] + len(inner.statements)


def test_a_query_of_the_user_is_recorded_though_its_connection_is_its_own(repo: Repository) -> None:
    with repo.trace() as seen:
        assert repo.sql("SELECT 41 + 1 AS answer") == [(42,)]
    assert any("SELECT 41 + 1 AS answer" in statement for statement in seen.statements)


def test_threads_are_recorded_and_other_objects_are_not(repo: Repository, place: Place) -> None:
    dcpstore.save(state(), repo)
    with repo.trace() as seen:
        with place.open() as other:
            other.show()
        assert seen.statements == []
        thread = threading.Thread(target=repo.show)
        thread.start()
        thread.join()
    assert seen.statements
