"""What may be killed: operations on a repository, how it is prepared, and what must hold after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import torch

import dcpstore
from dcpstore import NotFoundError, Repository
from dcpstore.catalog.location import locate
from dcpstore.catalog.maintenance.fsck import list_packs, list_pages
from dcpstore.catalog.schema.lifecycle import upgrade_schema
from dcpstore.catalog.write.saves import begin_save
from dcpstore.core.uids import new_uid
from dcpstore.formats.journal_segment import SHORTEST
from dcpstore.formats.manifest import manifest_key
from dcpstore.maintenance.rebuild import rebuild
from dcpstore.records import VersionDraft
from dcpstore.storage.packs import pack_key
from dcpstore.zarr.stored_references import reference_key
from tests.kept.unpack import unpack
from tests.soundness import assert_sound
from tests.torture.newer import NEWEST, TODAY, go_back, newer_schema
from tests.torture.sites import Site, state

__all__ = ["OLDER", "OPERATIONS", "Operation", "check"]

OLDER = "0002"  # the schema of a kept repository, whose upgrade converts every row


def nothing(site: Site) -> None:
    """Leave a site as it is."""


@dataclass(frozen=True)
class Operation:
    """An operation, and the versions that a repository has before and after it.

    Attributes:
        name: of it.
        prepare: makes the repository that it finds.
        act: does it, on each of `ranks` ranks.
        before: the numbers of the versions that are there before.
        after: those that are there when it has ended.
        mend: what a user would do where it was killed, before anything else.
    """

    name: str
    prepare: Callable[[Site], None]
    act: Callable[[Site, int], object]
    before: frozenset[int]
    after: frozenset[int]
    ranks: int = 1
    mend: Callable[[Site], None] = nothing


def check(operation: Operation, site: Site, ended: bool) -> None:
    """Raise AssertionError where a struck repository is not as it must be."""
    torch.set_num_threads(1)
    operation.mend(site)
    with site.open(create=not operation.before) as repo, repo.catalog.keep_connection():
        numbers = {version.number for version in repo.log()}
        if ended:
            assert numbers == operation.after, f"it ended, and v{numbers} are there"
        assert numbers in (operation.before, operation.after), f"v{numbers} are there"
        tagged = {tag.version for tag in repo.tags()}
        assert numbers - operation.before <= tagged, "the new version lacks its tag"
        check_versions(repo)
        if repo.operations(limit=1):
            assert_sound(repo)
        (made,) = repo.sql("SELECT count(number) AS n FROM version")  # those forgotten, too
        saved = dcpstore.save(state(90), repo)
        # no number is left out, nor given twice
        assert saved.number == made.n + 1
        for _ in range(2):  # the second deletes what the first condemned
            repo.gc(grace="0s", lease="0s")
        check_folder(repo)
        check_versions(repo)
        assert {version.number for version in repo.log()} == numbers | {saved.number}
        assert_sound(repo)


def check_versions(repo: Repository) -> None:
    """Check that every version that is seen loads, bit for bit, with all that was said of it."""
    tags = {tag.name: tag.version for tag in repo.tags()}
    for version in repo.log():
        read = repo.read(version.number)
        number = read["number"]
        expected = state(number)
        rank_keys = {key for key in read if key.startswith("rank")}
        assert read.keys() == expected.keys() | rank_keys
        for key in rank_keys:
            part = rank_part(int(key.removeprefix("rank")), number)
            expected[key] = part.repeat(len(read[key]) // len(part))
        for fqn, value in expected.items():
            same = torch.equal(read[fqn], value) if torch.is_tensor(value) else read[fqn] == value
            assert same, f"{fqn} of v{version.number} is not what was saved"
        assert version.metrics == {"loss": number / 2} or number == 90
        assert tags.get(f"s{number}", version.number) == version.number
        assert version.step in (number, None)


def check_folder(repo: Repository) -> None:
    """Check that the data folder holds what the catalog names, and nothing else."""
    stored = {key for key in repo.storage.list() if not key.startswith("catalog.db")}
    named = {pack.key for pack in list_packs(repo.catalog)}
    named |= {page.key for page in list_pages(repo.catalog)}
    for version in repo.log():
        named |= {manifest_key(version.uid)} | (stored & {reference_key(version.uid)})
    named |= stored & {"README.txt", "references.py"}
    named |= {k for k in stored if k.startswith("operations/") and not k.endswith(".tmp")}
    assert stored == named, f"left over: {stored - named}; missing: {named - stored}"


def rank_part(rank: int, number: int) -> torch.Tensor:
    """Return what only one rank holds."""
    return torch.full((40_000 + rank,), float(number))


def said(number: int, **more: Any) -> dict[str, Any]:
    """Return what is said of the `number`th version."""
    return {"step": number, "tags": [f"s{number}"], "metrics": {"loss": number / 2}} | more


def save(site: Site, number: int, **more: Any) -> None:
    with site.open(create=True) as repo:
        dcpstore.save(state(number), repo, **said(number, **more))


def three_versions(site: Site) -> None:
    for number in (1, 2, 3):
        save(site, number)


def save_alone(site: Site, rank: int) -> None:
    save(site, 4, branch="side", parent=2)


def save_much(site: Site, rank: int) -> None:
    """Save so much that the disk is kept busy while the rest is still encoded."""
    with site.open() as repo:
        big = {"rank0": rank_part(0, 4).repeat(140), "rank1": rank_part(1, 4)}
        dcpstore.save(state(4) | big, repo, **said(4))


def save_on_ranks(site: Site, rank: int) -> None:
    with site.open() as repo:
        dcpstore.save(state(4) | {f"rank{rank}": rank_part(rank, 4)}, repo, **said(4))


def save_asynchronously(site: Site, rank: int) -> None:
    with site.open() as repo:
        given = state(4)
        pending = dcpstore.async_save(given, repo, **said(4))
        for value in given.values():
            if isinstance(value, torch.Tensor):
                value.zero_()  # training goes on
        pending.result()


def empty(site: Site) -> None:
    site.root.mkdir(exist_ok=True)


def create(site: Site, rank: int) -> None:
    site.open(create=True).close()


def save_first(site: Site, rank: int) -> None:
    save(site, 1)


def forget(site: Site, rank: int) -> None:
    with site.open() as repo:
        assert repo.forget(["s1", 3], force=True).forgotten == (1, 3)


def forgotten(site: Site) -> None:
    three_versions(site)
    forget(site, 0)


def undo(site: Site, rank: int) -> None:
    with site.open() as repo:
        repo.undo()


def best_tagged(site: Site) -> None:
    three_versions(site)
    with site.open() as repo:
        repo.tag("best", 1)


def move_best(site: Site, rank: int) -> None:
    with site.open() as repo:
        repo.tag("best", 3, move=True)


def nearly_a_segment(site: Site) -> None:
    """Prepare a journal in which the next operation makes a segment."""
    best_tagged(site)
    with site.open() as repo:
        repo.add_labels(2, {"note": "one"})
        for number in range(repo.operations(limit=1)[0].number + 1, SHORTEST):
            repo.tag("best", 2 if number % 2 == 0 else 1, move=True)
        assert repo.operations(limit=1)[0].number == SHORTEST - 1


def check_best(site: Site) -> None:
    with site.open() as repo:
        assert repo.show("best").number in (1, 3)


def untagged(site: Site) -> None:
    """Prepare versions of which the first three may go; the third shares a part with the second."""
    three_versions(site)
    save(site, 4)
    with site.open() as repo:
        for number in (1, 2, 3):
            repo.delete_tag(f"s{number}")


def expire(site: Site, rank: int) -> None:
    with site.open() as repo:
        repo.expire(keep_last=1)


def expired(site: Site) -> None:
    untagged(site)
    expire(site, 0)


def repack(site: Site, rank: int) -> None:
    with site.open() as repo:
        assert repo.gc(lease="0s").repacked


def condemned(site: Site) -> None:
    """Prepare packs that may be deleted, and what a crashed save left."""
    expired(site)
    repack(site, 0)
    with site.open() as repo:
        crashed = VersionDraft(uid=new_uid(), branch="main", author="ada", host="node1")
        begin_save(repo.catalog, crashed)
        repo.storage.put(pack_key(crashed.uid, 0, 0), b"left over")
        repo.storage.put(manifest_key(crashed.uid), b"{}")


def delete(site: Site, rank: int) -> None:
    with site.open() as repo:
        report = repo.gc(grace="0s", lease="0s")
        assert report.deleted
        assert report.cleared


def lost_catalog(site: Site) -> None:
    expired(site)
    if site.on_postgres:
        with psycopg.connect(site.target, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
    else:
        for file in site.data.glob("catalog.db*"):
            file.unlink()


def rebuild_catalog(site: Site, rank: int) -> None:
    report = rebuild(site.data, site.target)
    assert (report.versions, report.problems) == ((4,), ())


def rebuild_again(site: Site) -> None:
    try:
        site.open().close()
    except NotFoundError:
        rebuild_catalog(site, 0)


def upgrade(site: Site, rank: int) -> None:
    with newer_schema():
        before, after = upgrade_schema(locate(site.target)[0])
        assert (before, after) == (TODAY, NEWEST)


def check_upgrade(site: Site) -> None:
    """Check that the tables are all of one schema, and go back to those of today, for the look."""
    with newer_schema():
        upgrade_schema(locate(site.target)[0])
        with site.open() as repo:
            (row,) = repo.sql("SELECT mood, weather FROM version WHERE number = 1")
            assert tuple(row) == ("good", "fair")
    go_back(locate(site.target)[0])


def kept_versions(site: Site) -> None:
    """Prepare three versions as the dcpstore of an older schema saved them."""
    kind = "postgres" if site.on_postgres else "sqlite"
    unpack(f"{OLDER}/torture-{kind}.tar.xz", site.data, url=site.target)


def upgrade_kept(site: Site, rank: int) -> str:
    before, after = upgrade_schema(locate(site.target)[0])
    assert after == TODAY
    return before


def upgrade_again(site: Site) -> None:
    upgrade_kept(site, 0)


def _listed() -> list[Operation]:
    three, four = frozenset({1, 2, 3}), frozenset({1, 2, 3, 4})
    none, one, last = frozenset[int](), frozenset({1}), frozenset({4})
    return [
        Operation("save", three_versions, save_alone, three, four),
        Operation("save on two ranks", three_versions, save_on_ranks, three, four, ranks=2),
        Operation("large save", three_versions, save_much, three, four),
        Operation("async save", three_versions, save_asynchronously, three, four),
        Operation("create", empty, create, none, none),
        Operation("first save", empty, save_first, none, one),
        Operation("expire", untagged, expire, four, last),
        Operation("forget", three_versions, forget, three, frozenset({2})),
        Operation("undo of a forget", forgotten, undo, frozenset({2}), three),
        Operation("move a tag", best_tagged, move_best, three, three, mend=check_best),
        Operation("compact", nearly_a_segment, move_best, three, three, mend=check_best),
        Operation("gc: repack", expired, repack, last, last),
        Operation("gc: delete", condemned, delete, last, last),
        Operation("rebuild", lost_catalog, rebuild_catalog, last, last, mend=rebuild_again),
        Operation("upgrade", three_versions, upgrade, three, three, mend=check_upgrade),
        Operation(
            f"upgrade of {OLDER}", kept_versions, upgrade_kept, three, three, mend=upgrade_again
        ),
    ]


OPERATIONS = _listed()
