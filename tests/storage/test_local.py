"""Local folders: durability in its order, no half objects, no way out, clear errors."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dcpstore.errors import CorruptionError, DcpstoreError, NotFoundError
from dcpstore.storage.local import LocalFolder

KEY = "packs/ab12/0-0.pack"


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "data", create=True)


def test_file_then_name_then_every_folder_is_made_durable(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(folder.url)
    sink = folder.create(KEY)
    sink.write(b"abc")
    steps: list[str] = []
    sync = os.fsync

    def spy(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file():
            assert not (root / KEY).exists()
            assert path.read_bytes() == b"abc"
        else:
            assert (root / KEY).exists()
        steps.append("file" if path.is_file() else str(path.relative_to(root)))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    sink.commit()
    assert steps == ["file", "packs/ab12", "packs", "."]


def test_every_folder_that_is_made_for_a_repository_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, synced = os.fsync, set()

    def spy(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    LocalFolder(tmp_path / "deep" / "down" / "data", create=True)
    assert synced == {tmp_path, tmp_path / "deep", tmp_path / "deep" / "down"}


def test_a_failed_sync_leaves_no_object(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DcpstoreError, match=r"No space left on device; free space.*gc"):
        folder.put(KEY, b"abc")
    assert list(folder.list()) == []


def test_a_killed_writer_leaves_a_listed_remainder_and_no_object(folder: LocalFolder) -> None:
    sink = folder.create(KEY)
    sink.write(b"abc")
    (left,) = folder.list("packs/ab12")
    assert left.startswith(KEY)
    assert left.endswith(".tmp")
    folder.delete(left)
    assert list(folder.list()) == []
    sink.discard()


def test_two_writers_of_one_key_do_not_meet(folder: LocalFolder) -> None:
    first, second = folder.create(KEY), folder.create(KEY)
    first.write(b"first")
    second.write(b"second")
    second.commit()
    first.discard()
    assert folder.get(KEY) == b"second"


def test_views_outlive_the_source_and_the_file(folder: LocalFolder) -> None:
    folder.put(KEY, b"abc")
    (view,) = folder.open(KEY).read([(1, 2)])
    folder.delete(KEY)
    assert bytes(view) == b"bc"
    assert view.readonly


def test_empty_version_folders_go_with_their_last_object(folder: LocalFolder) -> None:
    folder.put(KEY, b"abc")
    folder.delete(KEY)
    assert [path.name for path in Path(folder.url).rglob("*")] == ["packs"]


def test_a_missing_folder_is_not_made_by_chance(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="mount it"):
        LocalFolder(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DcpstoreError, match="is a file"):
        LocalFolder(tmp_path / "file")
    with pytest.raises(DcpstoreError, match="cannot make the data folder"):
        LocalFolder(tmp_path / "file" / "below", create=True)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.EROFS, "let this user write"),
        (errno.EACCES, "let this user write"),
        (errno.EMFILE, "raise the limit of open files"),
    ],
)
def test_a_folder_that_takes_no_file_says_what_to_do(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DcpstoreError, match=step):
        folder.create(KEY)


def test_an_object_that_cannot_be_read_asks_for_the_right_to_read(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put(KEY, b"abc")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    for call in (folder.get, folder.open):
        with pytest.raises(DcpstoreError, match=r"cannot read .*; let this user read it"):
            call(KEY)


@pytest.mark.parametrize("place", ["packs", "packs/ab12", KEY])
def test_links_out_of_the_folder_are_not_followed(
    folder: LocalFolder, tmp_path: Path, place: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = Path(folder.url) / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    for call in (folder.get, folder.open, folder.size, folder.delete, folder.create):
        with pytest.raises(CorruptionError, match="by a link"):
            call(KEY)
    assert list(outside.iterdir()) == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_keeps_nobody_waiting(
    folder: LocalFolder, make: Callable[[Path], None]
) -> None:
    folder.put(KEY, b"abc")
    path = Path(folder.url, KEY)
    path.unlink()
    make(path)
    with pytest.raises(CorruptionError, match="not a regular file"):
        folder.get(KEY)
    with pytest.raises(CorruptionError, match="not a regular file"):
        folder.open(KEY)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = LocalFolder(tmp_path / "link")
    folder.put(KEY, b"abc")
    assert folder.url == str((tmp_path / "real").resolve())
    assert (tmp_path / "real" / KEY).read_bytes() == b"abc"


def test_the_umask_decides_who_may_read(folder: LocalFolder) -> None:
    old = os.umask(0o027)
    try:
        folder.put(KEY, b"abc")
    finally:
        os.umask(old)
    path = Path(folder.url) / KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750


@pytest.mark.parametrize("create", [True, False])
def test_a_folder_that_cannot_even_be_looked_at(tmp_path: Path, create: bool) -> None:
    with pytest.raises(DcpstoreError, match="too long"):
        LocalFolder(tmp_path / ("x" * 300), create=create)
