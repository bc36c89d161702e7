"""Operations that break a promise on purpose: the torture must see it."""

from __future__ import annotations

import os
from dataclasses import replace

import dcpstore
from tests.torture.operations import OPERATIONS, save_alone
from tests.torture.sites import Site, state

__all__ = ["FORGETFUL", "HASTY"]


def _save_without_sync(site: Site, rank: int) -> None:
    os.fsync = lambda fd: None  # in this child alone
    save_alone(site, rank)


def _save_twice(site: Site, rank: int) -> None:
    """Make two versions where one is meant."""
    save_alone(site, rank)
    with site.open() as repo:
        dcpstore.save(state(5), repo, tags=["s5"], step=5, metrics={"loss": 2.5})


_SAVE = next(operation for operation in OPERATIONS if operation.name == "save")
FORGETFUL = replace(_SAVE, name="save without sync", act=_save_without_sync)
HASTY = replace(_SAVE, name="two saves for one", act=_save_twice)
