"""A quick verify: all objects by existence and size, the rest by what is new since the last one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore import Repository, Trace, Version
from dcpstore.catalog.maintenance.fsck import find_faults, last_verified
from dcpstore.formats.manifest import manifest_key
from tests.cli.conftest import ask_database
from tests.soundness import Place, assert_sound

LISTED = [("list", "packs"), ("list", "manifests"), ("list", "pages"), ("list", "plans")]


@pytest.fixture
def small(database_url: str, tmp_path: Path) -> Place:
    """Where a repository of small chunks is."""
    return Place(database_url, str(tmp_path / "data"), chunk_nbytes=4096)


@pytest.fixture
def repo(small: Place) -> Iterator[Repository]:
    """A repository that a test may damage; it need not be sound at the end."""
    with small.open() as opened:
        yield opened


def save(repo: Repository, seed: int = 0) -> Version:
    """Save a small tensor, and one of 64 chunks, in four runs."""
    state = {"small": torch.full((10,), float(seed)), "large": torch.arange(32 * 1024) + seed // 10}
    return dcpstore.save(state, repo, step=seed)


def traced(repo: Repository) -> Trace:
    with repo.trace() as trace:
        assert repo.verify().damaged == ()
    return trace


def requests(trace: Trace) -> list[tuple[str, str]]:
    return [(one.method, one.key) for one in trace.requests]


def test_requests_and_statements_do_not_grow_with_old_versions(repo: Repository) -> None:
    save(repo)
    repo.verify()
    few = traced(repo)
    for seed in range(1, 12):
        save(repo, seed)
    repo.verify()
    many = traced(repo)
    assert requests(few) == requests(many) == LISTED
    assert many.statements == few.statements
    assert not [sql for sql in many.statements if "UPDATE" in sql]  # there is nothing to note
    newest = save(repo, 12)
    listed = [one for one in requests(traced(repo)) if one not in LISTED]
    assert listed == [("get", manifest_key(newest.uid))]
    assert_sound(repo)


@pytest.mark.parametrize("kind", ["pack", "manifest", "page", "plan"])
def test_an_old_object_that_is_missing_is_found(small: Place, repo: Repository, kind: str) -> None:
    for seed in range(3):
        save(repo, seed)
    traced(repo)
    key = next(repo.storage.list(f"{kind}s"))
    path = Path(small.data) / key
    whole = path.read_bytes()
    path.unlink()
    for _ in range(2):
        (damage,) = repo.verify().damaged
        assert (damage.kind, damage.key) == (kind, key)
        assert damage.versions
    path.write_bytes(whole)
    traced(repo)
    path.write_bytes(b"" if kind == "manifest" else whole[:-1])
    assert [one.key for one in repo.verify().damaged] == [key]
    path.write_bytes(whole)
    traced(repo)


def test_a_damaged_manifest_is_found_when_it_is_new_and_reported_until_it_is_written_again(
    small: Place, repo: Repository
) -> None:
    old = save(repo)
    traced(repo)
    new = save(repo, 1)
    for version in (old, new):
        path = Path(small.data) / manifest_key(version.uid)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    for _ in range(2):
        assert [one.versions for one in repo.verify().damaged] == [(new.number,)]
    for deep in (True, False):
        found = {one.versions for one in repo.verify(deep=deep).damaged}
        assert found == {(old.number,), (new.number,)}
    repo.gc()
    assert repo.verify(deep=True).damaged == ()
    assert_sound(repo)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM chunk WHERE tensor = (SELECT MAX(run) FROM run) AND ordinal = 3",
        "UPDATE chunk SET length = 1000000 WHERE pack = (SELECT MAX(id) FROM pack)",
        "UPDATE version SET root = NULL WHERE number = 4",
        "DELETE FROM child WHERE node = (SELECT root FROM version WHERE number = 4)",
        "UPDATE ref SET version = (SELECT id FROM version WHERE number = 4); "
        "UPDATE version SET status = 'expired' WHERE number = 4",
        "DELETE FROM operation WHERE number = (SELECT MAX(number) FROM operation)",
    ],
)
def test_a_broken_rule_in_new_rows_is_found_and_stays_reported(
    small: Place, repo: Repository, damage: str
) -> None:
    for seed in range(3):
        save(repo, seed)
    traced(repo)
    save(repo, 30)
    seen, _ = last_verified(repo.catalog)
    assert seen.version == 3
    assert find_faults(repo.catalog, seen) == []
    for statement in damage.split("; "):
        ask_database(small.url, statement)
    texts = {fault.text for fault in find_faults(repo.catalog, seen)}
    assert texts
    assert texts <= {fault.text for fault in find_faults(repo.catalog)}
    for _ in range(2):
        assert {one.kind for one in repo.verify().damaged} == {"catalog"}
    assert last_verified(repo.catalog)[0] == seen


def test_a_broken_rule_in_old_rows_is_found_by_a_deep_check(small: Place, repo: Repository) -> None:
    save(repo)
    traced(repo)
    ask_database(small.url, "DELETE FROM chunk WHERE ordinal = 3")
    assert repo.verify().damaged == ()
    assert {one.kind for one in repo.verify(deep=True).damaged} == {"catalog"}
