"""Repositories that older schemas left behind open, upgrade, verify, load and rebuild."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from sqlalchemy import text

import dcpstore
from dcpstore import Repository, SchemaError
from dcpstore.catalog.db.database import Database
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.schema.revisions import HEAD, is_older
from dcpstore.catalog.schema.views import VIEWS
from dcpstore.cli.app import commands
from dcpstore.formats.first_manifest import FirstManifest
from dcpstore.formats.manifest import Manifest, decode_manifest, manifest_key
from dcpstore.maintenance.rebuild import rebuild
from tests.kept.unpack import unpack
from tests.kept.write import large, state
from tests.maintenance.conftest import views
from tests.soundness import assert_sound

KEPT = sorted(folder.name for folder in Path(__file__).parent.glob("[0-9]*"))
STEPS = {3: 2, 4: 3, 5: 4, 6: 30, 7: 31}  # by version
LARGE = {9: 0, 11: 3000}  # by version; kept from 0002 on


@pytest.fixture(params=KEPT)
def revision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kept(revision: str, database_url: str, tmp_path: Path) -> str:
    """The URL of the catalog of a kept repository; its data is in the folder "data"."""
    kind = "sqlite" if database_url.startswith("sqlite") else "postgres"
    data = tmp_path / "data"
    unpack(f"{revision}/{kind}.tar.gz", data, url=database_url)
    return sqlite_url(data / "catalog.db") if kind == "sqlite" else database_url


def is_same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def answers(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of every view of a catalog of any schema, by plain SQL."""
    with closing(Database(url)) as database, database.read_only() as connection:
        return {
            name: sorted(map(tuple, connection.execute(text(f"SELECT * FROM {name}"))), key=repr)
            for name in VIEWS
        }


def assert_as_saved(repo: Repository) -> None:
    for number, step in STEPS.items():
        assert is_same(repo.read(number, nested=True), state(step))
        assert repo.show(number).step == step
    assert is_same(repo.read("main"), {"weight": torch.ones(5)})
    assert [v.number for v in repo.log("main")] == [8, 7, 4, 3]
    assert {ref.name: ref.version for ref in repo.tags()} == {"t3": 4}
    branches = {ref.name: ref.version for ref in repo.branches()}
    if branches.pop("large", None):
        for number, changed in LARGE.items():
            assert is_same(repo.read(number), {"large": large(changed)})
        (entry,) = repo.diff(*LARGE).entries
        # Two of 64 chunks, of 79 elements each, differ.
        assert (entry.change, entry.nbytes_shared) == ("changed", 8 * (5000 - 2 * 79))
    changed = {entry.fqn: entry.change for entry in repo.diff(3, 4).entries}
    assert {fqn for fqn, change in changed.items() if change != "unchanged"} == {
        "model.half",
        "model.scalar",
        "model.weight",
        "optimizer.state.0.step",
    }
    branches.pop("again", None)
    assert branches == {"main": 8, "side": 6}
    version = repo.show("t3")
    assert (version.labels, version.author, version.message) == ({"lr": "3e-4"}, "ada", "step 3")
    assert version.metrics["loss"] == 1 / 4
    assert version in repo.log(labels={"lr": "3e-4"})
    assert repo.verify(deep=True).damaged == ()


def is_first(revision: str) -> bool:
    """Tell whether a schema is older than manifests of pages."""
    return revision < "0003"


def formats(repo: Repository) -> set[type]:
    """Return the formats of the manifests of all versions."""
    return {type(decode_manifest(repo.storage.get(manifest_key(v.uid)))) for v in repo.log()}


def test_kept_repository_upgrades_and_rebuilds(kept: str, revision: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    answered = answers(kept)
    if is_older(revision):
        with pytest.raises(SchemaError, match="'dcpstore db-upgrade"):
            dcpstore.open(kept)
        done = CliRunner().invoke(commands, ["db-upgrade", "--repo", kept], catch_exceptions=False)
        assert (done.exit_code, HEAD in done.output) == (0, True)
    assert answers(kept) == answered
    with dcpstore.open(kept) as repo:
        assert_as_saved(repo)
        assert_sound(repo)
        # Versions of now and of then share their entry sets, and gc takes none of them.
        assert dcpstore.save(state(31), repo, branch="again").nbytes_written == 0
        dcpstore.save(state(40), repo, branch="again")
        # Manifests of both formats are there until gc has written the old ones again.
        assert formats(repo) == ({FirstManifest, Manifest} if is_first(revision) else {Manifest})
        rebuild(data, tmp_path / "between")
        with dcpstore.open(tmp_path / "between") as rebuilt:
            assert_as_saved(rebuilt)
            assert_sound(rebuilt)
        repo.gc(grace="0s", lease="0s")
        assert formats(repo) == {Manifest}
        repo.gc(grace="0s", lease="0s")
        assert_as_saved(repo)
        assert_sound(repo)
        before = views(repo)
    rebuild(data, tmp_path / "rebuilt")
    with dcpstore.open(tmp_path / "rebuilt") as repo:
        assert_as_saved(repo)
        assert views(repo) == before
        # What is saved now finds what was saved then.
        again = dcpstore.save(state(30), repo)
        assert again.nbytes_written == 0
        assert again.nbytes_reused == again.nbytes
        assert_sound(repo)
