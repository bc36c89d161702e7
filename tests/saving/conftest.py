"""What bad input is tried on: a repository that must stay as it is."""

from __future__ import annotations

import pytest
import torch

import dcpstore
from dcpstore import Repository
from dcpstore.catalog.read.ref_lookup import list_refs


class Opaque:
    """Neither tensor nor value."""


@pytest.fixture
def kept(repo: Repository) -> Repository:
    """A repository with one version, which must be all that it holds at the end."""
    dcpstore.save({"w": torch.ones(3), "lr": 0.1}, repo, tags=["best"])
    return repo


def unchanged(repo: Repository) -> None:
    assert [v.number for v in repo.log()] == [1]
    assert [(r.name, r.kind) for r in list_refs(repo.catalog)] == [
        ("best", "tag"),
        ("main", "branch"),
    ]


W = {"w": torch.ones(3)}
