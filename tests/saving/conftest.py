"""For tests of bad input: a repository that must stay unchanged."""

from __future__ import annotations

import pytest
import torch

import dcpstore
from dcpstore import Repository
from dcpstore.catalog.read.ref_lookup import list_refs


class Opaque:
    """An object that is neither a tensor nor a plain value."""


@pytest.fixture
def kept(repo: Repository) -> Repository:
    """A repository with one version; at the end it must hold nothing else."""
    dcpstore.save({"w": torch.ones(3), "lr": 0.1}, repo, tags=["best"])
    return repo


def assert_unchanged(repo: Repository) -> None:
    assert [v.number for v in repo.log()] == [1]
    assert [(r.name, r.kind) for r in list_refs(repo.catalog)] == [
        ("best", "tag"),
        ("main", "branch"),
    ]


W = {"w": torch.ones(3)}
