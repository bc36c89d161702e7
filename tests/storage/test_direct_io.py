"""Streamed files: every byte in its place, past the page cache or through it, and no lost error."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.errors import DcpstoreError
from dcpstore.storage.direct_io import StreamedFile
from dcpstore.storage.local import LocalFolder

BLOCK = 16 << 10  # many in few bytes, so that every hand-over happens
Write = Callable[[int, memoryview, int], int]


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def content(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


def write_all(path: Path, pieces: list[bytes]) -> None:
    file = StreamedFile(path, block=BLOCK)
    try:
        for piece in pieces:
            file.write(piece)
        file.sync()
    finally:
        file.close()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 3 * BLOCK),
            st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 512, 4096, 9 * BLOCK]),
        ),
        max_size=12,
    )
)
def test_pieces_of_any_size_lie_one_after_another(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("streamed") / "file"
    pieces = [content(size) for size in sizes]
    write_all(path, pieces)
    assert path.read_bytes() == b"".join(pieces)


def test_what_was_written_may_change_at_once(tmp_path: Path) -> None:
    file = StreamedFile(tmp_path / "file", block=BLOCK)
    piece = np.zeros(BLOCK, np.uint8)
    for i in range(40):
        piece[:] = i
        file.write(piece.data)
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([i]) * BLOCK for i in range(40))


def test_full_blocks_go_past_the_page_cache_and_the_rest_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this filesystem takes no direct writes")
    seen: list[tuple[int, int, bool]] = []
    write = os.pwrite

    def spy(descriptor: int, data: memoryview, offset: int) -> int:
        seen.append((offset, len(data), is_direct(descriptor)))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", spy)
    write_all(tmp_path / "file", [content(2 * BLOCK + 5)])
    assert sorted(seen) == [(0, BLOCK, True), (BLOCK, BLOCK, True), (2 * BLOCK, 5, False)]
    seen.clear()
    write_all(tmp_path / "small", [b"abc"])
    assert seen == [(0, 3, False)]


def refuse_at_open(real: Write) -> Write:
    """Nothing but what the test does to fcntl."""
    return real


def refuse_direct(real: Write) -> Write:
    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    return write


def write_in_part(real: Write) -> Write:
    """A filesystem that writes a part, and then takes no direct write for the rest of it."""

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor) and offset % 512:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data[: max(len(data) // 3, 1)], offset)

    return write


@pytest.mark.parametrize("way", [refuse_at_open, refuse_direct, write_in_part])
def test_a_filesystem_that_refuses_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[Write], Write]
) -> None:
    if way is refuse_at_open:
        set_flags = fcntl.fcntl

        def refuse(descriptor: int, command: int, flags: int = 0) -> int:
            if command == fcntl.F_SETFL and flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return set_flags(descriptor, command, flags)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "pwrite", way(os.pwrite))
    pieces = [content(size) for size in (5, 7 * BLOCK, 1, 3 * BLOCK - 6, 100)]
    write_all(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_an_argument_that_is_wrong_for_good_is_no_endless_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="Invalid argument"):
        write_all(tmp_path / "file", [content(3 * BLOCK)])


@pytest.mark.parametrize("blocks", [0, 1, 3, 20])
def test_a_full_disk_is_told_whichever_thread_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    folder = LocalFolder(tmp_path, block=BLOCK)
    write = os.pwrite

    def fill(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= blocks * BLOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(DcpstoreError, match=r"No space left on device; free space.*gc"):
        folder.put("packs/ab12/0-0.pack", content(30 * BLOCK + 1))
    assert list(folder.list()) == []


def test_threads_and_descriptors_end_with_the_file(tmp_path: Path) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    folder = LocalFolder(tmp_path, block=BLOCK)
    given_up = folder.create("a")
    given_up.write(content(9 * BLOCK))
    given_up.discard()
    folder.put("b", content(9 * BLOCK))
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    assert list(folder.list()) == ["b"]
