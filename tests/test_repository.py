"""Where a repository is: by its folder, by URL, when the process moves; and what is refused."""

import copy
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import (
    AlreadyExistsError,
    ChunkDefaults,
    InvalidInputError,
    NotFoundError,
    RepositoryReader,
    RepositoryWriter,
)
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.glance import glance_at_log
from dcpstore.convert import export_safetensors, import_any, import_safetensors
from dcpstore.repository import open as open_repository
from tests.test_records import HOSTILE, Shown

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of no process group


def state(number: float) -> dict[str, Any]:
    return {"w": torch.full((100,), number)}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside the tests' own, in which the process is."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("is_relative", [False, True])
def test_the_url_of_an_embedded_repository_names_its_data_too(
    tmp_path: Path, elsewhere: Path, is_relative: bool
) -> None:
    folder = tmp_path / "a 100% 'r'"
    dcpstore.save(state(1), folder)
    file = folder / "catalog.db"
    url = sqlite_url(Path(os.path.relpath(file)) if is_relative else file)
    dcpstore.save(state(2), url)
    assert list(elsewhere.iterdir()) == []
    for target in (url, folder):
        found = state(0)
        dcpstore.load(found, target)
        assert torch.equal(found["w"], state(2)["w"])
        with open_repository(target, create=False) as repo:
            assert repo.verify(deep=True).damaged == ()
            assert Path(repo.storage.url) == folder


def test_a_place_of_data_that_is_the_kept_one_may_be_said_in_any_way(
    tmp_path: Path, elsewhere: Path
) -> None:
    folder = tmp_path / "r"
    dcpstore.save(state(1), folder)
    for target in (folder, sqlite_url(folder / "catalog.db")):
        for data in (folder, "../r/."):
            with open_repository(target, data=data, create=False) as repo:
                assert len(repo.log()) == 1
    with pytest.raises(InvalidInputError, match=r"leave data= out.*dcpstore rebuild"):
        open_repository(folder, data=elsewhere)


@pytest.mark.parametrize("again", [lambda repo: pickle.loads(pickle.dumps(repo)), copy.deepcopy])
def test_a_repository_that_travels_stays_where_it_was_opened(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, again: Any
) -> None:
    dcpstore.save(state(1), "r")
    dcpstore.save(state(1), open_repository("sqlite:///u.db", data="data"))
    for target in ("r", "sqlite:///u.db"):
        monkeypatch.chdir(elsewhere)
        with open_repository(target) as repo:
            monkeypatch.chdir(tmp_path)
            with again(repo) as travelled:
                assert travelled.log() == repo.log() != []


def test_writers_and_readers_stay_where_they_were_made(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = RepositoryWriter("r"), RepositoryReader("r")
    monkeypatch.chdir(tmp_path)
    torch.distributed.checkpoint.save(state(1), storage_writer=writer)
    found = state(0)
    torch.distributed.checkpoint.load(found, storage_reader=reader)
    assert torch.equal(found["w"], state(1)["w"])
    assert not (tmp_path / "r").exists()
    with open_repository(elsewhere / "r", create=False) as repo:
        assert len(repo.log()) == 1


def test_data_are_of_one_repository_from_its_making_on(tmp_path: Path) -> None:
    open_repository(tmp_path / "a", data=tmp_path / "shared").close()
    open_repository(tmp_path / "embedded").close()
    for data in ("shared", "embedded"):
        with pytest.raises(AlreadyExistsError, match="another data folder"):
            open_repository(tmp_path / "b", data=tmp_path / data)
    with pytest.raises(NotFoundError):
        open_repository(tmp_path / "b", create=False)


def test_a_folder_of_torchs_is_named_with_what_reads_it(tmp_path: Path) -> None:
    dcp = torch.distributed.checkpoint
    folder = tmp_path / "torchs"
    dcp.save(state(1), checkpoint_id=folder)
    with pytest.raises(NotFoundError, match=r"torchs' holds a checkpoint.*'dcpstore import'"):
        dcpstore.load(state(0), folder)
    with pytest.raises(dcp.CheckpointException, match="'dcpstore import' stores it"):
        dcp.load(state(0), storage_reader=dcpstore.FileSystemReader(folder))
    found = state(0)
    dcpstore.load(found, storage_reader=dcp.FileSystemReader(folder))
    assert torch.equal(found["w"], state(1)["w"])
    import_any(folder, folder)
    dcpstore.load(found := state(0), folder)
    assert torch.equal(found["w"], state(1)["w"])


@pytest.mark.parametrize(
    "chunk",
    [
        ChunkDefaults(nbytes=0),
        ChunkDefaults(nbytes=-5),
        ChunkDefaults(nbytes=2**70),
        ChunkDefaults(nbytes=8.0),  # type: ignore[arg-type]
        ChunkDefaults(codec="lz4"),
        ChunkDefaults(codec=None),  # type: ignore[arg-type]
    ],
)
def test_chunks_that_cannot_be_made_make_no_repository(
    tmp_path: Path, chunk: ChunkDefaults
) -> None:
    with pytest.raises(InvalidInputError, match="chunks"):
        open_repository(tmp_path / "r", chunk=chunk)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [5, b"r", None])
def test_what_is_no_path_is_said_to_be_none(target: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="pass a path or a URL"):
        open_repository(target)
    with pytest.raises(InvalidInputError, match="pass a path or a URL"):
        open_repository(tmp_path / "r", data=b"x")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [dcpstore.save, dcpstore.load, dcpstore.async_save])
def test_swapped_arguments_are_named_and_not_printed(call: Any, tmp_path: Path) -> None:
    words = "the repository is a dict; pass the state first, then the repository: "
    kind = re.escape(f"{words}{call.__name__}(")
    with pytest.raises(InvalidInputError, match=kind):
        call(state(1.0), state(1.0))
    kind = kind if call is dcpstore.load else "the state is a str; pass a dict"
    with pytest.raises(InvalidInputError, match=kind):
        call(str(tmp_path / "new"), state(1.0))
    with pytest.raises(InvalidInputError) as refused:
        call(state(1.0), list(range(10_000)))
    assert len(str(refused.value)) < 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\0b", os.fsdecode(b"\x81")])
def test_a_path_that_no_catalog_keeps_is_refused(tmp_path: Path, name: str) -> None:
    for call in (
        lambda: open_repository(tmp_path / name),
        lambda: open_repository(tmp_path / "r", data=tmp_path / name),
        lambda: dcpstore.save(state(1), f"{tmp_path}/{name}"),
    ):
        with pytest.raises(InvalidInputError, match="in UTF-8, without NUL"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_dots_lead_where_links_lead(elsewhere: Path) -> None:
    (elsewhere / "deep" / "a").mkdir(parents=True)
    (elsewhere / "link").symlink_to("deep/a")
    with open_repository("link/../new") as repo:
        dcpstore.save(state(1), repo)
    assert (elsewhere / "deep" / "new" / "catalog.db").is_file()
    assert [path.name for path in elsewhere.iterdir() if path.name == "new"] == []
    for target in ("link/../new", "sqlite:///link/../new/catalog.db", elsewhere / "deep" / "new"):
        with open_repository(target, create=False) as repo:
            assert torch.equal(repo.read()["w"], state(1)["w"])
        lines = glance_at_log(str(target), limit=None)
        assert lines is not None
        assert len(lines) == 1


def test_a_refused_save_makes_no_repository(tmp_path: Path) -> None:
    calls: list[Any] = [
        lambda: dcpstore.save(state(1), tmp_path / "r", step="x"),  # type: ignore[call-overload]
        lambda: dcpstore.save([1], tmp_path / "r"),  # type: ignore[call-overload]
    ]
    for call in calls:
        with pytest.raises(InvalidInputError):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def on_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)  # as before: none was set


@pytest.mark.usefixtures("on_meta")
def test_the_default_device_is_for_new_models_not_for_reads(tmp_path: Path) -> None:
    held = torch.arange(6.0, device="cpu")
    with open_repository(tmp_path / "r") as repo:
        dcpstore.save({"w": held, "text": "x" * 70_000}, repo)
        dcpstore.save({"w": (held + 1).to(torch.float8_e4m3fn), "text": "y"}, repo)
        assert torch.equal(repo.read("v1")["w"], held)
        assert repo.read("v1")["text"] == "x" * 70_000
        found = {"w": torch.zeros(6, device="cpu"), "text": ""}
        dcpstore.load(found, repo, "v1")
        assert torch.equal(found["w"], held)
        assert repo.diff("v1", "v2", stats=True).retyped[0].stats is not None
        export_safetensors(repo, "v2", tmp_path / "out.safetensors")
        import_safetensors(tmp_path / "out.safetensors", repo, branch="back")
        assert torch.equal(repo.read("back")["w"].float(), held + 1)


def test_where_no_folder_can_be_made_the_cure_is_another_path() -> None:
    with pytest.raises(dcpstore.DcpstoreError, match="choose another path"):
        open_repository("/proc/nowhere/r")


def test_questions_of_another_kind_are_bad_input(tmp_path: Path) -> None:
    dcpstore.save(state(1), tmp_path / "r")
    with open_repository(tmp_path / "r") as repo:
        asked: list[Any] = [
            lambda: repo.log(where=5),  # type: ignore[arg-type]
            lambda: repo.log(steps=5),  # type: ignore[arg-type]
            lambda: repo.log(steps=(1, 2, 3)),  # type: ignore[arg-type]
            lambda: repo.copy_to("r"),  # type: ignore[arg-type]
            lambda: repo.copy_to(repo, 5),  # type: ignore[arg-type]
            lambda: repo.log(where=[1]),  # type: ignore[list-item]
            lambda: repo.log(labels=["a"]),  # type: ignore[arg-type]
            lambda: repo.add_labels(1, 5),  # type: ignore[arg-type]
            lambda: repo.add_metrics(1, ["x"]),  # type: ignore[arg-type]
            lambda: repo.read("v1", 5),  # type: ignore[arg-type]
            lambda: repo.read("v1", [5]),  # type: ignore[list-item]
            lambda: repo.entries("v1", [["w"]]),  # type: ignore[list-item]
            lambda: repo.entries("v1", "w"),
            lambda: repo.expire(keep_last=1, branch=5),  # type: ignore[arg-type]
            lambda: repo.verify(limit="a"),  # type: ignore[arg-type]
            lambda: open_repository(tmp_path / "s", chunk=5),  # type: ignore[arg-type]
            lambda: dcpstore.load(state(1), repo, init_missing=5),  # type: ignore[call-overload]
            lambda: dcpstore.load(state(1), repo, strict="no"),  # type: ignore[call-overload]
        ]
        for call in asked:
            with pytest.raises(InvalidInputError):
                call()
        with pytest.raises(NotFoundError, match=r"No version has a metric\.$"):
            repo.log(where="val<1")


def test_a_repository_and_a_diff_show_in_a_notebook(tmp_path: Path) -> None:
    with open_repository(tmp_path / "r") as repo:
        assert "no versions yet" in Shown(repo._repr_html_()).texts
        old = {f"w{i}": torch.zeros(2) for i in range(40)}
        dcpstore.save(old | {"note": "old"}, repo, message=HOSTILE, metrics={"loss": 2.5})
        dcpstore.save({"w0": torch.ones(2), "note": HOSTILE}, repo, tags=["best"], step=7)
        texts = Shown(repo._repr_html_()).texts
        assert texts[0] == f"Repository {tmp_path / 'r'}"
        assert texts[1:9] == [
            "VERSION",
            "BRANCH",
            "STEP",
            "TAGS",
            "WHEN",
            "BYTES",
            "METRICS",
            "MESSAGE",
        ]
        assert texts[9:13] == ["v2", "main", "7", "best"]
        assert {"loss=2.5", HOSTILE, "branches and tags: main (v2), best (v2)"} <= set(texts)
        diff = repo.diff("v1", "v2")
        assert repr(diff) == "<Diff v1 -> v2: 39 removed, 2 changed; 0 B of 8 B shared>"
        texts = Shown(diff._repr_html_()).texts
        assert texts[0] == diff.summary()
        assert json.dumps(HOSTILE) in texts
        assert texts[-1] == "and 11 more that changed"
        assert texts.count("float32 2") >= 20
        assert Shown(repo.diff("v1", "v1")._repr_html_()).texts == [
            "v1 -> v1: 41 unchanged; 8 B of 8 B shared"
        ]
    (tmp_path / "r" / "catalog.db").write_bytes(b"broken" * 1000)
    assert "problem" in Shown(repo._repr_html_()).texts
