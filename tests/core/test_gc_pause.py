"""Cyclic garbage collection is off while a save or load pauses it, on while all of them wait."""

import gc
import threading
from collections.abc import Iterator

import pytest

from dcpstore.core.gc_pause import gc_allowed, gc_paused

MANY, FEW = 1 << 30, 1 << 20  # bytes


@pytest.fixture(autouse=True)
def is_on() -> Iterator[None]:
    assert gc.isenabled()
    yield
    assert gc.isenabled()


def test_it_is_off_while_held_and_on_while_many_bytes_move() -> None:
    with gc_paused():
        assert not gc.isenabled()
        with gc_paused(), gc_allowed(MANY):
            assert gc.isenabled()
            with gc_paused():
                assert not gc.isenabled()
        with gc_allowed(FEW):
            assert not gc.isenabled()
        with gc_allowed():
            assert gc.isenabled()
        assert not gc.isenabled()


def test_a_thread_that_does_not_pause_it_does_not_resume_it() -> None:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with gc_paused():
            held.set()
            leave.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    with gc_allowed(FEW), gc_allowed():
        assert not gc.isenabled()
    with gc_paused(), gc_allowed():
        assert not gc.isenabled()
    leave.set()
    other.join(60)


def test_an_error_leaves_it_on() -> None:
    with pytest.raises(KeyError), gc_paused(), gc_allowed():
        raise KeyError


def test_it_stays_off_if_it_was_off_before() -> None:
    gc.disable()
    try:
        with gc_paused(), gc_allowed():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
