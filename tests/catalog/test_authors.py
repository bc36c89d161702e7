"""Who does what: there always is a name, and one that can be kept."""

import os

import pytest

from dcpstore.catalog.validation import can_be_kept
from dcpstore.core.user import this_user


def test_a_name_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "Ada Lövelace")
    assert this_user() == "Ada Lövelace"


def test_who_has_no_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as 'docker run --user 54321' has it
    assert this_user() == "54321"


def test_a_name_that_is_no_text_is_one_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", os.fsdecode(b"L\xf6we"))
    assert this_user() == r"L\udcf6we"
    assert can_be_kept(this_user())
