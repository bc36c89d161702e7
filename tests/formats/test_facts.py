"""The facts of a version as JSON, and the operations of the journal that carry them."""

import json
import math
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.journal_entry import decode_operation, encode_operation, kind_of
from dcpstore.formats.sealed import check_seal, seal
from dcpstore.formats.version import decode_info, decode_stats, encode_facts
from dcpstore.records import VersionInfo, VersionStats

INFO = VersionInfo(
    uid="ab12",
    branch="main",
    step=3,
    tags=("best",),
    message='a "b"\n',
    metrics={"loss": 0.5, "bad": -math.inf},
    labels={"lr": "3e-4"},
    author="ada",
    host="node-1",
    ranks=2,
)
STATS = VersionStats(
    created_at=datetime(2026, 3, 1, 10, 4, tzinfo=UTC),
    nbytes=8,
    nbytes_written=4,
    nbytes_reused=4,
    seconds={"plan": 0.25},
)


def stored_facts() -> dict[str, Any]:
    """Return the facts as they come back from JSON."""
    facts: dict[str, Any] = json.loads(json.dumps(encode_facts(INFO, STATS), allow_nan=False))
    return facts


def test_every_fact_comes_back() -> None:
    assert set(stored_facts()) == {fact.name for kind in (INFO, STATS) for fact in fields(kind)}
    assert decode_info(stored_facts()) == INFO
    assert decode_stats(stored_facts()) == STATS


def test_a_fact_with_a_default_may_be_missing() -> None:
    assert decode_info({"uid": "ab12", "branch": "main"}) == VersionInfo(uid="ab12", branch="main")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("uid", "../x"),
        ("branch", "v3"),
        ("tags", ["a b"]),
        ("step", -1),
        ("step", 2**63),
        ("step", 1.5),
        ("ranks", None),
        ("message", "a\0b"),
        ("labels", {"lr": 3}),
        ("metrics", {"loss": "low"}),
    ],
)
def test_what_no_catalog_keeps_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_info(stored_facts() | {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("created_at", "2026-03-01T10:04:00"), ("nbytes", "8"), ("seconds", [])]
)
def test_so_are_sizes_and_times_of_the_wrong_kind(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_stats(stored_facts() | {name: value})


def test_a_seal_names_its_algorithm_and_an_older_one_need_not() -> None:
    sealed = seal("format", 1, [b'"a":', b"1}"])
    assert check_seal(sealed, "format", what="thing") == 1
    assert json.loads(sealed) == {
        "format": 1,
        "digest": json.loads(sealed)["digest"],
        "algorithm": "blake3",
        "a": 1,
    }
    with pytest.raises(CorruptionError, match="not a thing"):
        check_seal(sealed, "version", what="thing")
    with pytest.raises(CorruptionError, match="names the algorithm 'blake4'"):
        check_seal(sealed.replace(b"blake3", b"blake4"), "format", what="thing")
    with pytest.raises(SchemaError, match="Update dcpstore"):
        check_seal(sealed.replace(b'blake3", "a":1', b'blake4", "a":2'), "format", what="thing")


def test_the_table_has_every_kind_of_operation(tmp_path: Path) -> None:
    """And the journal of each comes back as it was written."""
    with dcpstore.open(tmp_path / "repo") as repo:
        for step in range(4):
            dcpstore.save({"w": torch.full((4,), step)}, repo, step=step, tags=["t"][step:])
        repo.branch("side", at=1)
        repo.rollback("main~1")
        repo.delete_tag("t")
        repo.delete_branch("side")
        repo.undo()
        repo.add_metrics(2, {"loss": 1.0})
        repo.add_labels(2, {"a": "b"})
        repo.forget(1)
        repo.expire(keep_last=1)
        repo.gc(grace="0s")
        kinds = {operation.kind for operation in repo.operations()}
        for key in repo.storage.list("operations"):
            data = bytes(repo.storage.get(key))
            assert encode_operation(decode_operation(data)) == data
    assert kinds == {
        *("init", "save", "tag", "branch", "rollback", "delete_tag", "delete_branch", "undo"),
        *("metrics", "labels", "forget", "expire", "gc"),
    }
    unknown = kind_of("nothing")
    assert all(kind_of(kind) != unknown for kind in kinds - {"init"})


def test_an_operation_of_versions_moves_no_ref(tmp_path: Path) -> None:
    with dcpstore.open(tmp_path / "repo") as repo:
        dcpstore.save({"w": torch.ones(1)}, repo)
        dcpstore.save({"w": torch.ones(1)}, repo)
        repo.forget(1)
        *_, last = sorted(repo.storage.list("operations"))
        operation = decode_operation(bytes(repo.storage.get(last)))
    assert operation["kind"] == "forget"
    lie = operation | {"target": "../x", "new": {"uid": "ab12", "version": 2}}
    with pytest.raises(CorruptionError, match="moves a ref"):
        decode_operation(encode_operation(lie))
