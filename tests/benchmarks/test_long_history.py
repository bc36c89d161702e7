"""Histories that are filled in bulk answer as saved ones do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sqlalchemy import select

import dcpstore
from benchmarks.long_history import CYCLE, METRIC, STEPS, TAG_EVERY, lengthen, state_of
from dcpstore import Repository
from dcpstore.catalog.maintenance.fsck import find_faults
from dcpstore.catalog.maintenance.journal import journal_again, write_journal
from dcpstore.catalog.read.versions import lineage_below
from dcpstore.catalog.schema import tables

VERSIONS = CYCLE + 27


@pytest.fixture
def long_repo(repo: Repository) -> Iterator[Repository]:
    """A repository with copies; at the end their operations go to the journal, as of others."""
    lengthen(repo, VERSIONS)
    yield repo
    journal_again(repo.catalog, 1)
    assert write_journal(repo.catalog, repo.storage)


def test_copies_are_versions_like_saved_ones(long_repo: Repository) -> None:
    assert find_faults(long_repo.catalog) == []
    assert long_repo.verify().damaged == ()
    log = long_repo.log()
    assert [version.number for version in log] == list(range(VERSIONS, 0, -1))
    assert [version.parent for version in log] == [*range(VERSIONS - 1, 0, -1), None]
    assert len({version.uid for version in log}) == VERSIONS
    times = [version.created_at for version in log]
    assert times == sorted(times, reverse=True)
    assert [v.number for v in log if v.tags] == list(
        range(VERSIONS - VERSIONS % TAG_EVERY, 0, -TAG_EVERY)
    )
    copy = long_repo.show(VERSIONS)
    assert (copy.step, copy.metrics[METRIC]) == (STEPS * VERSIONS, 1 / VERSIONS)
    assert long_repo.show(f"main~{VERSIONS - 1}").number == 1
    assert long_repo.diff(VERSIONS - 1, VERSIONS).changed
    assert len(long_repo.operations(limit=VERSIONS * 2)) == 1 + VERSIONS + VERSIONS // TAG_EVERY


def test_a_copy_loads_and_history_goes_on(long_repo: Repository) -> None:
    state = {fqn: torch.zeros_like(tensor) for fqn, tensor in state_of(0).items()}
    for number in (1, CYCLE + 1, VERSIONS):
        dcpstore.load(state, long_repo, ref=number)
        assert all(torch.equal(state[fqn], t) for fqn, t in state_of(number - 1).items())
    saved = dcpstore.save(state_of(VERSIONS), long_repo)
    assert (saved.number, saved.parent, saved.nbytes_written) == (VERSIONS + 1, VERSIONS, 0)
    assert not long_repo.gc(grace="0s").condemned
    assert long_repo.undo().kind == "undo"


def test_the_lines_of_ancestors_are_those_of_saves(long_repo: Repository) -> None:
    version = tables.version
    with long_repo.catalog.database.read_only() as connection:
        for row in connection.execute(select(version)).all():
            assert lineage_below(connection, row.parent) == {"depth": row.depth, "jump": row.jump}
