"""Who does what: there always is a name, and one that can be kept."""

import os

import pytest

from dcpstore.catalog.validation import can_be_kept
from dcpstore.core.user import this_user


def test_a_user_name_is_used_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "Ada Lövelace")
    assert this_user() == "Ada Lövelace"


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as 'docker run --user 54321' has it
    assert this_user() == "54321"


def test_a_user_name_that_is_not_utf8_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", os.fsdecode(b"L\xf6we"))
    assert this_user() == r"L\udcf6we"
    assert can_be_kept(this_user())
