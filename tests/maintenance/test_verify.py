"""What verify finds, whom it says it touches, and how damage heals."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import CorruptionError, DcpstoreError, InvalidInputError, Repository, Version
from dcpstore.catalog.maintenance.fsck import mark_pack
from dcpstore.formats.manifest import manifest_key
from dcpstore.maintenance import verify
from dcpstore.repository import open as open_repository
from tests.cli.conftest import ask_database
from tests.maintenance.conftest import open_intruder
from tests.soundness import Place, assert_sound


@pytest.fixture
def repo(place: Place) -> Any:
    """A repository that a test may damage; it need not be sound at the end."""
    with place.open() as opened:
        yield opened


def saved(repo: Repository) -> list[Version]:
    """Save three versions; `kept` is in the pack of the first."""
    kept = torch.randn(50)
    return [
        dcpstore.save({"new": torch.randn(100) + i, "kept": kept}, repo, step=i) for i in range(3)
    ]


def pack_file(place: Place, version: Version) -> Path:
    return Path(place.data) / "packs" / version.uid / "0-0.pack"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_sound_repository_is_told_to_be_so(repo: Repository) -> None:
    assert repo.verify().damaged == ()
    saved(repo)
    quick, deep = repo.verify(), repo.verify(deep=True)
    assert (quick.damaged, quick.versions, quick.packs, quick.manifests) == ((), (), 3, 3)
    assert (quick.chunks, quick.nbytes_read) == (0, 0)
    assert (deep.damaged, deep.chunks) == ((), 4)
    assert deep.nbytes_read == sum(version.nbytes_written for version in repo.log())
    assert_sound(repo)


def test_a_flipped_bit_is_found_by_a_deep_look_and_stays_marked(
    place: Place, repo: Repository
) -> None:
    versions = saved(repo)
    flip(pack_file(place, versions[1]), 17)
    assert repo.verify().damaged == ()
    report = repo.verify(deep=True)
    (damage,) = report.damaged
    assert (damage.kind, damage.key) == ("pack", f"packs/{versions[1].uid}/0-0.pack")
    assert (damage.versions, damage.fqns) == ((2,), ("new",))
    (chunk,) = damage.chunks
    assert (chunk.offset, chunk.part, chunk.ordinal, chunk.fqns) == (0, 0, 0, ("new",))
    assert [(v.version, v.nearest_intact) for v in report.versions] == [(2, 1)]
    assert [one.key for one in repo.verify().damaged] == [damage.key]
    flip(pack_file(place, versions[1]), 17)  # restored from a copy
    assert repo.verify(deep=True).damaged == ()
    assert_sound(repo)


def test_a_deep_look_passes_over_no_pack_that_was_looked_at_in_the_future(
    place: Place, repo: Repository
) -> None:
    versions = saved(repo)
    pack = f"packs/{versions[1].uid}/0-0.pack"
    ahead = datetime.now(UTC) + timedelta(hours=30)  # the clock was wrong then
    mark_pack(repo.catalog, pack, damage=None, verified_at=ahead)
    flip(pack_file(place, versions[1]), 17)
    assert [one.key for one in repo.verify(deep=True).damaged] == [pack]


def test_shared_damage_touches_every_version_that_shares_it(place: Place, repo: Repository) -> None:
    versions = saved(repo)
    pack_file(place, versions[0]).unlink()
    report = repo.verify()
    (damage,) = report.damaged
    assert damage.reason.startswith("missing")
    assert (damage.versions, damage.fqns) == ((1, 2, 3), ("kept", "new"))
    assert [(v.version, v.nearest_intact) for v in report.versions] == [
        (1, None),
        (2, None),
        (3, None),
    ]
    with pytest.raises(CorruptionError):
        repo.read(3)
    (deep,) = repo.verify(deep=True).damaged
    assert deep.reason.startswith("missing")


def test_a_short_pack_is_found_without_reading(place: Place, repo: Repository) -> None:
    versions = saved(repo)
    path = pack_file(place, versions[2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    report = repo.verify()
    assert [d.reason for d in report.damaged] == [f"size: {len(whole) - 1} bytes instead of 400"]
    assert [(v.version, v.nearest_intact) for v in report.versions] == [(3, 2)]
    path.write_bytes(whole)
    assert repo.verify().damaged == ()
    assert_sound(repo)


def test_a_pack_of_the_wrong_size_is_damaged_though_every_digest_is_right(
    place: Place, repo: Repository
) -> None:
    versions = saved(repo)
    path = pack_file(place, versions[2])
    whole = path.read_bytes()
    path.write_bytes(whole + b"0123456789")
    for deep in (False, True, False, True):
        report = repo.verify(deep=deep)
        assert [d.reason for d in report.damaged] == [
            f"size: {len(whole) + 10} bytes instead of 400"
        ]
        assert [d.versions for d in report.damaged] == [(3,)]
        (row,) = repo.sql("SELECT damage FROM pack WHERE damage IS NOT NULL")
        assert row.damage == report.damaged[0].reason
    path.write_bytes(whole)
    assert repo.verify(deep=True).damaged == ()
    assert_sound(repo)


def test_saving_the_content_again_heals_it_for_every_version(
    place: Place, repo: Repository
) -> None:
    versions = saved(repo)
    kept = repo.read(1, ["kept"])["kept"]
    flip(pack_file(place, versions[0]), pack_file(place, versions[0]).stat().st_size - 1)
    flip(pack_file(place, versions[0]), 0)  # whichever tensor comes first
    with pytest.raises(CorruptionError):
        repo.read(1)
    assert repo.verify(deep=True).damaged
    fourth = dcpstore.save({"kept": kept}, repo)
    assert fourth.nbytes_written == kept.nbytes  # a damaged pack is never reused
    assert torch.equal(repo.read(2, ["kept"])["kept"], kept)
    repo.gc(grace="0s")
    report = repo.verify(deep=True)
    assert [v.version for v in report.versions] == [1]  # what only it held cannot heal
    assert report.versions[0].nearest_intact == 2


@pytest.mark.parametrize("how", ["missing", "flipped", "other"])
def test_a_damaged_manifest_is_written_anew_by_gc(place: Place, repo: Repository, how: str) -> None:
    versions = saved(repo)
    path = Path(place.data) / manifest_key(versions[1].uid)
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        flip(path, 200)
    else:
        path.write_bytes((Path(place.data) / manifest_key(versions[0].uid)).read_bytes())
    report = repo.verify()
    (damage,) = report.damaged
    assert (damage.kind, damage.key, damage.versions) == (
        "manifest",
        manifest_key(versions[1].uid),
        (2,),
    )
    assert report.versions == ()  # it loads all the same
    repo.gc()
    assert repo.verify().damaged == ()
    assert_sound(repo)


@pytest.mark.parametrize("how", ["missing", "cut", "flipped", "other"])
@pytest.mark.parametrize("kind", ["page", "plan"])
def test_a_damaged_page_or_plan_is_written_again_by_gc(
    place: Place, repo: Repository, kind: str, how: str
) -> None:
    saved(repo)
    key = next(repo.storage.list(f"{kind}s"))
    path = Path(place.data) / key
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(whole[:-1])
    elif how == "flipped":
        flip(path, len(whole) - 10)
    else:  # sound, and of another repository
        dcpstore.save({"other": torch.zeros(3)}, Path(place.data).parent / "another")
        (other,) = (Path(place.data).parent / "another" / f"{kind}s").iterdir()
        path.write_bytes(other.read_bytes())
    (damage,) = repo.verify(deep=True).damaged
    assert (damage.kind, damage.key) == (kind, key)
    assert damage.versions
    assert (repo.verify().damaged == ()) == (how == "flipped")  # which only a deep one reads
    repo.gc()
    assert path.read_bytes() == whole
    assert repo.verify(deep=True).damaged == ()
    assert_sound(repo)


def damage_operation(path: Path, how: str) -> None:
    """Take an operation away, flip a bit of it, or put another one in its place."""
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        flip(path, 150)
    else:
        path.write_bytes(path.with_name("000000000002.json").read_bytes())


@pytest.mark.parametrize("how", ["gone", "flipped", "another"])
def test_a_damaged_operation_is_written_anew_by_the_next_change(
    place: Place, repo: Repository, how: str
) -> None:
    saved(repo)
    path = Path(place.data) / "operations" / "000000000003.json"
    damage_operation(path, how)
    (damage,) = repo.verify(deep=True).damaged
    assert (damage.kind, damage.key) == ("operation", "operations/000000000003.json")
    repo.tag("next", "v1")
    assert repo.verify(deep=True).damaged == ()
    assert_sound(repo)


@pytest.mark.parametrize("how", ["gone", "flipped", "another"])
def test_the_first_operation_is_written_anew_where_the_others_are_ours(
    place: Place, repo: Repository, how: str
) -> None:
    saved(repo)
    path = Path(place.data) / "operations" / "000000000001.json"
    whole = path.read_bytes()
    damage_operation(path, how)
    (damage,) = repo.verify(deep=True).damaged
    assert (damage.kind, damage.key) == ("operation", "operations/000000000001.json")
    repo.gc()
    assert path.read_bytes() == whole
    assert repo.verify(deep=True).damaged == ()
    assert_sound(repo)


@pytest.mark.parametrize("how", ["gone", "flipped", "alone"])
def test_the_first_operation_of_another_repository_stays(
    place: Place, repo: Repository, tmp_path: Path, how: str
) -> None:
    with open_intruder(tmp_path / "second", place.data) as second:
        saved(repo)
        path = Path(place.data) / "operations" / "000000000001.json"
        if how == "gone":
            path.unlink()
        else:
            flip(path, 150)
        if how == "alone":
            for number in (2, 3, 4):
                path.with_name(f"{number:012}.json").unlink()
        journal = {file.name: file.read_bytes() for file in path.parent.iterdir()}
        dcpstore.save({"w": torch.zeros(3)}, second)
        with pytest.raises(DcpstoreError, match=r"nothing was changed|cannot tell which"):
            second.gc(grace="0s", lease="0s")
        second.verify(deep=True)
        second.tag("mine")
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == journal


def test_a_damaged_part_of_a_tensor_is_a_fault_and_no_crash(place: Place, repo: Repository) -> None:
    saved(repo)
    ask_database(place.url, "UPDATE layout SET parts = '[[[0],[1,2,3],[1]]]'")
    damages = repo.verify().damaged
    assert {damage.kind for damage in damages} == {"catalog"}
    assert {number for damage in damages for number in damage.versions} == {1, 2, 3}
    with pytest.raises(CorruptionError, match="is damaged"):
        repo.read("v1")


def test_a_deep_look_that_was_broken_off_goes_on(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(repo)
    mark, marked = verify.mark_pack, []

    def mark_one(self: Any, key: str, **found: Any) -> None:
        if marked:
            raise KeyboardInterrupt
        marked.append(key)
        mark(self, key, **found)

    with monkeypatch.context() as broken:
        broken.setattr(verify, "mark_pack", mark_one)
        with pytest.raises(KeyboardInterrupt):
            repo.verify(deep=True)
    resumed = repo.verify(deep=True, resume=True)
    assert 0 < resumed.chunks < 4
    assert repo.verify(deep=True, resume=True).chunks == 4  # nothing to resume: a new look
    assert repo.verify(deep=True).chunks == 4


def test_reading_is_held_back_by_the_limit(repo: Repository) -> None:
    dcpstore.save({f"w{i}": torch.randn(250) for i in range(4)}, repo)
    began = time.monotonic()
    report = repo.verify(deep=True, limit=10_000)
    assert report.nbytes_read == 4000
    assert time.monotonic() - began >= 0.29  # the last kilobyte waits for the three before it


def test_a_broken_rule_of_the_catalog_names_whom_it_touches(place: Place, repo: Repository) -> None:
    saved(repo)
    change(place, "DELETE FROM chunk WHERE length = 200")
    report = repo.verify()
    assert {d.kind for d in report.damaged} == {"catalog"}
    assert any(d.fqns == ("kept",) and d.versions == (1, 2, 3) for d in report.damaged)
    assert [(v.version, v.nearest_intact) for v in report.versions] == [
        (1, None),
        (2, None),
        (3, None),
    ]


def test_gaps_in_numbers_and_refs_to_nothing_are_found(place: Place, repo: Repository) -> None:
    saved(repo)
    change(place, "DELETE FROM operation WHERE number = 2")
    change(place, "UPDATE version SET status = 'expired' WHERE number = 3")
    reasons = [damage.reason for damage in repo.verify().damaged]
    assert any("operations" in reason for reason in reasons)
    assert any("'main' names a version that is expired" in reason for reason in reasons)


def change(place: Place, statement: str) -> None:
    """Change the database past dcpstore."""
    ask_database(place.url, statement)


def test_options_that_cannot_be_meant(repo: Repository) -> None:
    for wrong in ({"limit": 0.0}, {"limit": -1.0}, {"resume": True}):
        with pytest.raises(InvalidInputError):
            repo.verify(**wrong)  # type: ignore[arg-type]


def test_verify_of_an_embedded_repository_that_moved(tmp_path: Path) -> None:
    with open_repository(tmp_path / "old") as repo:
        saved(repo)
    (tmp_path / "old").rename(tmp_path / "new")
    with open_repository(tmp_path / "new", create=False) as moved:
        assert moved.verify(deep=True).damaged == ()
