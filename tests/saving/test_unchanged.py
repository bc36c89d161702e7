"""Saves after saves in one process: what is kept of the last one gives the same versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

import dcpstore
from dcpstore import Repository
from dcpstore.catalog.maintenance.fsck import list_packs, mark_pack
from dcpstore.catalog.read.entries import load_entries
from dcpstore.catalog.schema import tables
from dcpstore.formats.entry_tree import grow
from dcpstore.records import NewEntry
from tests.soundness import assert_sound


class Odd:
    """A value that is stored as a blob."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and other.text == self.text

    __hash__ = None  # type: ignore[assignment]


def root_of(repo: Repository, number: int) -> bytes:
    version, node = tables.version, tables.node
    with repo.catalog.database.write() as connection:
        query = select(node.c.digest).join(version, version.c.root == node.c.id)
        return bytes(connection.scalar(query.where(version.c.number == number)) or b"")


def check(repo: Repository, number: int) -> None:
    """Check that the tree of a version is the one that grows from its entries."""
    entries = [
        NewEntry(e.fqn, e.path, e.kind, None if e.tensor is None else e.tensor.digest, e.value)
        for e in load_entries(repo.catalog, number)
    ]
    assert root_of(repo, number) == grow(entries).root.digest


def state() -> dict[str, Any]:
    layers = {f"w{i:03}": torch.full((4,), float(i)) for i in range(200)}
    return {"layers": layers, "lr": 0.5, "odd": Odd("x" * 50), "list": [torch.ones(2), 3]}


def change_a_tensor(given: dict[str, Any]) -> None:
    given["layers"]["w100"] += 1


def change_a_value(given: dict[str, Any]) -> None:
    given["lr"] = 0.25


def change_a_blob(given: dict[str, Any]) -> None:
    given["odd"] = Odd("y" * 50)


def change_the_size_of_a_blob(given: dict[str, Any]) -> None:
    given["odd"] = Odd("y" * 51)


def add_a_tensor(given: dict[str, Any]) -> None:
    given["layers"]["w0005"] = torch.zeros(3)


def remove_a_tensor(given: dict[str, Any]) -> None:
    del given["layers"]["w007"]


def turn_a_tensor_into_a_value(given: dict[str, Any]) -> None:
    given["layers"]["w009"] = 9


def turn_a_list_into_a_tuple(given: dict[str, Any]) -> None:
    given["list"] = tuple(given["list"])


def take_one_tensor_twice(given: dict[str, Any]) -> None:
    given["layers"]["w020"] = given["layers"]["w021"]


def change_nothing(given: dict[str, Any]) -> None:
    pass


CHANGES = [
    change_nothing,
    change_a_tensor,
    change_a_value,
    change_a_blob,
    change_the_size_of_a_blob,
    add_a_tensor,
    change_a_tensor,
    remove_a_tensor,
    turn_a_tensor_into_a_value,
    turn_a_list_into_a_tuple,
    take_one_tensor_twice,
    change_nothing,
]


def test_each_change_gives_the_version_that_a_new_process_would_save(tmp_path: Path) -> None:
    given = state()
    with dcpstore.open(tmp_path / "one") as repo, dcpstore.open(tmp_path / "fresh") as other:
        dcpstore.save(given, repo, allow_pickle=True)
        dcpstore.save(given, other, allow_pickle=True)
    with dcpstore.open(tmp_path / "one") as repo:
        for change in CHANGES:
            change(given)
            version = dcpstore.save(given, repo, allow_pickle=True)
            with dcpstore.open(tmp_path / "fresh") as other:
                dcpstore.save(given, other, allow_pickle=True)
                assert root_of(repo, version.number) == root_of(other, version.number), change
            check(repo, version.number)
        assert_sound(repo)


def test_an_unchanged_save_inserts_no_row_of_entries(tmp_path: Path) -> None:
    given = state()
    with dcpstore.open(tmp_path) as repo:
        first = dcpstore.save(given, repo, allow_pickle=True)
        with repo.trace() as trace:
            second = dcpstore.save(given, repo, allow_pickle=True)
        assert root_of(repo, first.number) == root_of(repo, second.number)
    inserted = {text.split()[2] for text in trace.statements if text.startswith("INSERT")}
    assert inserted <= {"version", "operation", "metric", "progress", "ref"}
    # Nor does it look any tensor up that the last version has.
    assert not [text for text in trace.statements if "FROM alias" in text]


def test_what_lies_in_a_damaged_pack_is_written_again(tmp_path: Path) -> None:
    given = {"w": torch.arange(100.0), "v": torch.ones(50)}
    with dcpstore.open(tmp_path) as repo:
        dcpstore.save(given, repo)
        (pack,) = list_packs(repo.catalog)
        mark_pack(repo.catalog, pack.key, damage="a bit flipped", verified_at=None)
        version = dcpstore.save(given, repo)
        assert version.nbytes_written
        assert {pack.damage for pack in list_packs(repo.catalog)} == {None, "a bit flipped"}
        repo.storage.delete(pack.key)
        assert torch.equal(repo.read(1)["w"], given["w"])


@pytest.mark.parametrize("branch", ["main", "other"])
def test_another_branch_does_not_take_over_what_its_parent_lacks(
    tmp_path: Path, branch: str
) -> None:
    given = state()
    with dcpstore.open(tmp_path) as repo:
        dcpstore.save(given, repo, allow_pickle=True)
        change_a_tensor(given)
        dcpstore.save(given, repo, branch=branch, allow_pickle=True)
        add_a_tensor(given)
        version = dcpstore.save(given, repo, allow_pickle=True)
        check(repo, version.number)
        assert_sound(repo)
